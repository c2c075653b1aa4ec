"""Two and four real processes over gloo: equal to one; stopped, killed and resumed."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ilm_jax.errors import UsageError
from ilm_jax.runtime.processes import Cluster, one_run, take_flags
from tests.support import tiny_run
from tests.support.processes_programs import run

MESH = {'data': -1, 'fsdp': 2}  # a checkpoint's parameters are of both processes
STEPS = 4  # checkpoints at 2 and 4, an evaluation at 4
PROGRAM = Path(__file__).parents[1] / 'support' / 'processes_programs.py'
LIMIT = 420  # seconds; nothing may take as long
# What takes time is to compile, in every process: few programs.
TEMPLATES = """
sequential; seen; After {history:soft} comes; {target}
item_title; seen; The title of the film {item:soft} is; {item.title}
"""
_XLA_FLAGS = os.environ.get('XLA_FLAGS', '')


class Group:
  """Processes that were started together."""

  def __init__(self, folder: Path, words: list[str], *, processes: int):
    folder.mkdir()
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      port = free.getsockname()[1]
    flags = ['--multiprocess', f'--coordinator=127.0.0.1:{port}', f'--num_processes={processes}']
    env = os.environ | {
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': f'{_XLA_FLAGS} --xla_force_host_platform_device_count=1',
    }
    self._files = [folder / f'stderr_{i}' for i in range(processes)]
    self.processes = []
    for i, file in enumerate(self._files):
      command = [sys.executable, *words, *flags, f'--process_id={i}']
      with open(file, 'w') as stderr:
        self.processes.append(subprocess.Popen(command, env=env, stdout=stderr, stderr=stderr))

  def stderr(self, i: int) -> str:
    return self._files[i].read_text()

  def wait_for(self, path: Path) -> None:
    """Until a file appears."""
    deadline = time.monotonic() + LIMIT
    while not path.exists():
      for i, process in enumerate(self.processes):
        assert process.poll() is None, self.stderr(i)
      assert time.monotonic() < deadline
      time.sleep(0.01)

  def end(self) -> list[int]:
    """Exit statuses; after LIMIT seconds the test fails."""
    deadline = time.monotonic() + LIMIT
    try:
      return [process.wait(deadline - time.monotonic()) for process in self.processes]
    finally:
      for process in self.processes:
        process.kill()


def run_group(folder: Path, runs: list, *, processes: int) -> None:
  """Runs of `processes_programs.py`, by so many processes."""
  file = folder.with_suffix('.json')
  file.write_text(json.dumps(runs))
  group = Group(folder, [str(PROGRAM), str(file)], processes=processes)
  for i, status in enumerate(group.end()):
    assert status == 0, group.stderr(i)


def words_of(settings: dict) -> list[str]:
  return ['-m', 'ilm_jax.main', 'train', *(f'--{name}={value}' for name, value in settings.items())]


def assert_equal_curves(model_dir: Path, other: Path, after: int = 0) -> None:
  """Losses, gradients and what was validated, but for how sums round."""
  ours, theirs = (
    [row for row in tiny_run.curves(directory) if row['step'] > after]
    for directory in (model_dir, other)
  )
  assert len(ours) == len(theirs) > 0
  for row, expected in zip(ours, theirs):
    assert row.keys() == expected.keys()
    for name, value in expected.items():
      if 'R@' not in name and 'accuracy' not in name:  # steps of 1/n, by scores that may be equal
        np.testing.assert_allclose(row[name], value, rtol=2e-3, atol=1e-5, err_msg=name)


def arrays_of(model_dir: Path) -> dict[str, np.ndarray]:
  """Every array of the last checkpoint, whole, whatever devices it was saved from."""
  path = (model_dir / 'checkpoints' / str(STEPS) / 'state').absolute()
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    tree = reader.metadata(path).item_metadata.tree
    whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    tree = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=whole))
  return {jax.tree_util.keystr(key): x for key, x in jax.tree.leaves_with_path(tree)}


def assert_same_run(model_dir: Path, other: Path) -> None:
  """Arrays and curves, bit for bit."""
  found, expected = arrays_of(model_dir), arrays_of(other)
  assert found.keys() == expected.keys() != set()
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)
  assert tiny_run.curves(model_dir) == tiny_run.curves(other)


def halfway(model_dir: Path, copy: Path) -> Path:
  """A run as it was after half of its steps."""
  shutil.copytree(model_dir, copy)
  shutil.rmtree(copy / 'checkpoints' / str(STEPS))
  return copy


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
  return tmp_path_factory.mktemp('processes')


@pytest.fixture(scope='module')
def phase2(folder) -> dict:
  """Packed prompts; of 40 users, 12 are validated at a time: the last batch has 4."""
  settings = tiny_run.settings_of_trained(folder)
  (folder / 'templates.txt').write_text(TEMPLATES)
  return settings | {
    'data': str(settings['data']),
    'schedule': ['items_title'],
    'total_steps': STEPS,
    'losses': {},
    'text': settings['text'] | {'eval_batch_size': 12, 'eval_examples': 16},
    'learning_rate': 1e-3,
    'log_every': 1,
    'save_every': 2,
    'input_shards': 4,
  }


@pytest.fixture(scope='module')
def phase1(phase2) -> dict:
  """6 of 30 items are held out, fewer than a batch."""
  encoder = {'size': 'tiny', 'num_layers': 1, 'cross_attention_every': 1, 'd_model': 32}
  return {
    'data': phase2['data'],
    'schedule': ['user_item'],
    'total_steps': STEPS,
    'batch_size': 8,
    'item_encoder': encoder | {'d_mlp': 48, 'num_queries': 2, 'dropout_rate': 0.0},
    'text': {'vocabulary': 'bytes', 'max_text_tokens': 16, 'eval_batch_size': 64},
    'warmup_steps': 1,
    'eval_every': None,
    'save_every': 2,
    'log_every': 1,
    'keep_latest': 10,
  }


@pytest.fixture(scope='module')
def evaluation() -> dict:
  """40 users by the readout, 12 at a time; the losses of 40 prompts, 12 at a time."""
  return {
    'methods': ['readout'],
    'conditions': ['own', 'shuffled_items'],
    'checkpoint': STEPS,
    'rankers': [],
    'max_texts': 40,
    'fields': [],
  }


@pytest.fixture(scope='module')
def one_phase1(folder, phase1) -> Path:
  """What one process does."""
  run('train', phase1 | {'model_dir': folder / 'one_phase1'})
  return folder / 'one_phase1'


@pytest.fixture(scope='module')
def one_phase2(folder, phase2) -> Path:
  """What one process does."""
  run('train', phase2 | {'model_dir': folder / 'one_phase2'})
  return folder / 'one_phase2'


# ---------------------------------------------------------------- as one process does


@pytest.mark.slow
def test_four_processes_do_as_one_does(folder, one_phase2, phase1, phase2, evaluation):
  """Training, evaluation; a checkpoint of one goes on on four, and the reverse."""
  run('evaluate', evaluation | {'model_dir': one_phase2, 'output': one_phase2 / 'evaluation'})
  folder = folder / 'four'
  folder.mkdir()
  phase1 = phase1 | {'eval_every': STEPS}
  one_phase1 = folder / 'one_phase1'
  run('train', phase1 | {'model_dir': one_phase1})
  halfway(one_phase2, folder / 'phase2')
  measured = {'model_dir': str(one_phase2), 'output': str(folder / 'evaluation')}
  runs = [
    ('train', phase1 | {'model_dir': str(folder / 'phase1')}),
    ('train', phase2 | {'model_dir': str(folder / 'phase2'), 'input_shards': None}),
    ('evaluate', evaluation | measured),
  ]
  run_group(folder / 'group', runs, processes=4)
  assert_equal_curves(folder / 'phase1', one_phase1)
  assert_equal_curves(folder / 'phase2', one_phase2, after=2)
  ours, theirs = (
    json.loads((directory / 'evaluation' / 'evaluation.json').read_text())
    for directory in (folder, one_phase2)
  )
  assert len(theirs['rows']) == 4
  assert_equal_numbers(ours['rows'], theirs['rows'])
  assert_equal_numbers(ours['texts'], theirs['texts'])

  back = halfway(folder / 'phase1', folder / 'begun_by_four')
  run('train', phase1 | {'model_dir': back})
  assert_equal_curves(back, one_phase1, after=2)
  with pytest.raises(UsageError, match='input_shards=2: this run began with 4'):
    run('train', phase2 | {'model_dir': halfway(one_phase2, folder / 'other'), 'input_shards': 2})


def assert_equal_numbers(ours, theirs, where: str = '') -> None:
  if isinstance(theirs, dict):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
      assert_equal_numbers(ours[name], value, f'{where}/{name}')
  elif isinstance(theirs, list):
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs)):
      assert_equal_numbers(a, b, f'{where}/{i}')
  elif isinstance(theirs, float):
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3, err_msg=where)
  else:
    assert ours == theirs, where


# ---------------------------------------------------------------- stopped, killed, started again


def stopped(folder: Path, phase1: dict) -> tuple[Path, dict]:
  """A run of phase 1 by two processes, of which one is told to stop; and its settings."""
  settings, begun = phase1 | {'mesh': MESH}, folder / 'begun'
  group = Group(folder / 'begin', words_of(settings | {'model_dir': begun}), processes=2)
  group.wait_for(begun / 'phase.json')
  group.processes[1].send_signal(signal.SIGTERM)  # and of it, process 0 is told
  assert group.end() == [0, 0], group.stderr(0)
  (saved,) = (begun / 'checkpoints').iterdir()
  assert int(saved.name) < STEPS
  assert f'SIGTERM: saved step {saved.name} in' in group.stderr(0)
  assert 'saved step' not in group.stderr(1)  # only process 0 tells
  return begun, settings | {'model_dir': str(begun)}


def test_two_processes_go_on_as_one_does(folder, one_phase1, one_phase2, phase1, phase2):
  """Phase 1 after SIGTERM; and packed prompts, from a checkpoint of one process."""
  begun, settings = stopped(folder, phase1)
  directory = halfway(one_phase2, folder / 'begun_by_one')
  runs = [('train', settings), ('train', phase2 | {'model_dir': str(directory)})]
  run_group(folder / 'end', runs, processes=2)
  assert_equal_curves(begun, one_phase1)
  assert_equal_curves(directory, one_phase2, after=2)


@pytest.mark.slow
def test_two_processes_that_are_stopped_go_on_exactly(folder, phase1):
  """As two that nothing disturbs."""
  folder = folder / 'stopped'
  folder.mkdir()
  begun, settings = stopped(folder, phase1)
  run_group(folder / 'end', [('train', settings)], processes=2)
  assert_same_run(begun, undisturbed(folder, settings))


def undisturbed(folder: Path, settings: dict) -> Path:
  """What two processes do."""
  directory = folder / 'straight'
  run_group(folder / 'group', [('train', settings | {'model_dir': str(directory)})], processes=2)
  return directory


@pytest.mark.slow
def test_where_one_process_is_killed_the_other_ends_and_both_go_on_exactly(folder, phase1):
  folder = folder / 'killed'
  folder.mkdir()
  settings, begun = phase1 | {'mesh': MESH}, folder / 'begun'
  words = [*words_of(settings | {'model_dir': begun}), '--heartbeat=20']
  killed = Group(folder / 'begin', words, processes=2)
  killed.wait_for(begun / 'checkpoints' / '2')
  killed.processes[1].send_signal(signal.SIGKILL)
  start = time.monotonic()
  status, _ = killed.end()
  assert time.monotonic() - start < 60
  # The collective that fails, or JAX, which hears nothing of the other for too long.
  ours = status == 1 and 'process 0 of 2 ends: another process is gone' in killed.stderr(0)
  jaxs = status == -signal.SIGABRT and 'indicates that another task died' in killed.stderr(0)
  assert ours or jaxs, killed.stderr(0)
  run_group(folder / 'end', [('train', settings | {'model_dir': str(begun)})], processes=2)
  assert_same_run(begun, undisturbed(folder, settings))


@pytest.mark.slow
def test_shards_that_two_processes_cannot_share_are_told_at_once(folder, phase2):
  """Before anything is compiled or written."""
  settings = phase2 | {'model_dir': folder / 'three_shards', 'input_shards': 3}
  group = Group(folder / 'group_three_shards', words_of(settings), processes=2)
  assert group.end() == [2, 2], group.stderr(0)
  for i in range(2):
    assert 'train.input_shards=3: 2 processes cannot share them evenly' in group.stderr(i)
  assert not (folder / 'three_shards').exists()


# ---------------------------------------------------------------- meeting


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ('--multiprocess --coordinator=h:1', 'without --num_processes, --process_id: give all three'),
    ('--coordinator=h:1', '--coordinator is for --multiprocess, which is not given'),
    ('--multiprocess=yes', '--multiprocess=yes: true or false'),
    ('--multiprocess --coordinator=h --num_processes=2 --process_id=0', 'h: HOST:PORT of process'),
    ('--multiprocess --coordinator=h:1 --num_processes=x --process_id=0', '_processes=x: a number'),
    ('--multiprocess --coordinator=h:1 --num_processes=2 --process_id=2', 'the ids are 0 to 1'),
    ('--multiprocess --coordinator=h:1 --num_processes=2 --process_id=-1', 'id=-1: a number'),
    ('--multiprocess --coordinator=h:1 --num_processes=0 --process_id=0', 'of 0 processes'),
  ],
)
def test_wrong_flags_are_told(flags, message):
  with pytest.raises(UsageError, match=message):
    take_flags(flags.split())


def test_flags_are_taken_out_and_the_others_stay():
  words = ['--a=1', '--multiprocess', '--coordinator=h:12', '--b', '2', '--gin.X=[1, 2]']
  found = take_flags([*words, '--num_processes=2', '--process_id=1'])
  assert found == (Cluster('h:12', 2, 1), ['--a=1', '--b', '2', '--gin.X=[1, 2]'])
  assert take_flags(['--multiprocess=true']) == (Cluster(), [])
  assert take_flags(['--multiprocess=False', '--a=1']) == (None, ['--a=1'])
  assert take_flags(['--a=1']) == (None, ['--a=1'])


@pytest.mark.parametrize(
  ('setup', 'cluster', 'status', 'message'),
  [
    ('', "'127.0.0.1:1', 2, 1", 2, 'did not meet within 1 s at 127.0.0.1:1'),
    ('', 'f"127.0.0.1:{port}", 2, 0', 2, 'did not meet within 1 s'),
    ('used.listen()', 'f"127.0.0.1:{port}", 2, 0', 1, 'Is the port in use'),
    ('', '', 1, 'JAX finds no cluster here'),
  ],
)
def test_processes_that_do_not_meet_end_soon(setup, cluster, status, message):
  """The coordinator cannot be reached; another does not come; its port is in use; nothing given."""
  code = f"""
import socket
from ilm_jax.runtime.processes import Cluster, joined
used = socket.socket()
used.bind(('0.0.0.0', 0))
port = used.getsockname()[1]
{setup or 'used.close()'}
with joined(Cluster({cluster}), timeout=1):
  print('met')
"""
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
  assert (done.returncode, done.stdout) == (status, ''), done.stderr
  assert message in done.stderr


# ---------------------------------------------------------------- one run in a directory


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path):
  code = f"""
import pathlib, time
from ilm_jax.runtime.processes import one_run
with one_run(pathlib.Path({str(tmp_path)!r})):
  print('here', flush=True)
  time.sleep({LIMIT})
"""
  first = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
  assert first.stdout is not None
  assert first.stdout.readline() == 'here\n'
  message = rf'another run is at work there \(process {first.pid} of'
  with pytest.raises(UsageError, match=message), one_run(tmp_path):
    pass
  first.kill()
  first.wait()
  for _ in range(2):
    with one_run(tmp_path):
      assert f'process {os.getpid()} of' in (tmp_path / '.lock').read_text()

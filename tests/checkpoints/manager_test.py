"""Checkpoints on a real disk: exact, strict, kept as said, and whole after kill -9."""

import logging
import math
import os
import random
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ilm_jax.checkpoints.manager import CheckpointManager, read_identity, restore_params
from ilm_jax.errors import UsageError
from tests.support import two_processes

PROGRAMS = Path(__file__).parents[1] / 'support' / 'manager_programs.py'
IDENTITY = {
  'model': {'name': 'item_text', 'num_layers': 6, 'widths': (8, 4)},
  'data': {'name': 'ml100k', 'fingerprint': 'abc'},
}


class State(flax.struct.PyTreeNode):
  step: jax.Array
  params: Any
  opt_state: optax.OptState


def make_state(seed: int = 0, width: int = 5) -> State:
  """A state after one AdamW step: f32 and bf16 weights, int counts, empty and named tuples."""
  rng = np.random.default_rng(seed)
  params = {
    'item_encoder': {
      'layers_0': {'kernel': jnp.asarray(rng.standard_normal((7, width), np.float32))},
      'scale': jnp.asarray(rng.standard_normal(width), jnp.bfloat16),
      'nothing': {},
    },
    'adaptor': {'bias': jnp.array([np.nan, -0.0, np.inf, 1e-40], np.float32)},
    'temperature': jnp.float32(0.07),
  }
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.inject_hyperparams(optax.adamw)(optax.linear_schedule(1e-3, 0, 10), b1=0.8),
  )
  grads = jax.tree.map(lambda x: jnp.full_like(x, rng.standard_normal()), params)
  opt_state = optimizer.update(grads, optimizer.init(params), params)[1]
  return State(step=jnp.int32(seed), params=params, opt_state=opt_state)


def like(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_identical(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    assert (x.dtype, x.shape, x.sharding) == (y.dtype, y.shape, y.sharding)
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def small(step: int, **params) -> dict[str, Any]:
  return {'step': jnp.int32(step), 'params': params or {'w': jnp.full(3, step, jnp.float32)}}


@pytest.fixture
def saved(tmp_path) -> Path:
  """A run's directory with steps 1 and 2."""
  with CheckpointManager(tmp_path / 'run', identity=IDENTITY) as manager:
    for step in (1, 2):
      manager.save(step, make_state(step), position={'seed': 3, 'step': step})
  return tmp_path / 'run'


def test_round_trip_is_bit_for_bit(saved):
  with CheckpointManager(saved, identity=IDENTITY) as manager:
    assert (manager.all_steps(), manager.latest_step(), manager.best_step()) == ([1, 2], 2, None)
    restored = manager.restore(like(make_state()))
    assert (restored.step, restored.position) == (2, {'seed': 3, 'step': 2})
    assert isinstance(restored.state, State)
    assert_identical(restored.state, make_state(2))
    first = manager.restore(make_state(), step=1)
    assert (first.step, first.position['step']) == (1, 1)
    assert_identical(first.state, make_state(1))


def test_what_changes_after_save_is_not_in_the_checkpoint(tmp_path):
  # Large enough for the write to be under way when the buffers are donated.
  weights = np.random.default_rng(0).standard_normal((20, 500, 500), np.float32)
  state = {'step': jnp.int32(1), 'params': {str(i): jnp.asarray(w) for i, w in enumerate(weights)}}
  overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)
  position = {'step': 1, 'rows': [1, 2]}
  with CheckpointManager(tmp_path / 'run', identity={}) as manager:
    manager.save(1, state, position=position)
    for _ in range(3):
      state = jax.block_until_ready(overwrite(state))
    position['rows'].append(3)
    restored = manager.restore(state)
  assert restored.position == {'step': 1, 'rows': [1, 2]}
  for i, w in enumerate(weights):
    np.testing.assert_array_equal(restored.state['params'][str(i)], w)


def test_other_float_dtypes_are_cast(saved):
  params = make_state(2).params
  other = {jnp.dtype('float32'): jnp.bfloat16, jnp.dtype('bfloat16'): jnp.float32}
  expected = jax.tree.map(lambda x: x.astype(other[x.dtype]), params)
  restored = restore_params(saved, like(expected))
  assert jax.tree.map(lambda x: x.dtype, restored) == jax.tree.map(lambda x: x.dtype, expected)
  for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(expected)):
    # As float32, which is exact: NumPy cannot say that a bfloat16 is NaN.
    np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.parametrize('mode', ['max', 'min'])
@pytest.mark.parametrize(('keep_latest', 'keep_best'), [(1, 1), (2, 1), (2, 3), (1, 0)])
def test_latest_and_best_are_kept_apart(tmp_path, mode, keep_latest, keep_best):
  rng = random.Random(f'{mode}{keep_latest}{keep_best}')
  # Steps without metrics, with NaN, with infinities, and with ties.
  values = [None, math.nan, rng.random(), math.inf, -math.inf] + [rng.choice([0.2, 0.5, 0.8])] * 2
  rng.shuffle(values)
  settings = {'keep_latest': keep_latest, 'keep_best': keep_best, 'best_metric': 'hr'}
  seen = {}
  manager = CheckpointManager(tmp_path / 'run', identity={}, best_mode=mode, **settings)
  for step, value in enumerate(values, start=1):
    seen[step] = value
    if step == 4:  # a restart forgets nothing
      manager.close()
      manager = CheckpointManager(tmp_path / 'run', identity={}, best_mode=mode, **settings)
    metrics = None if value is None else {'hr': np.float32(value), 'loss': math.nan}
    manager.save(step, small(step), position={}, metrics=metrics)
    manager.wait()
    finite = [s for s in seen if seen[s] is not None and math.isfinite(seen[s])]
    finite.sort(key=lambda s: (seen[s] if mode == 'max' else -seen[s], s))
    expected = {*list(seen)[-keep_latest:], *(finite[-keep_best:] if keep_best else [])}
    on_disk = {int(path.name) for path in (tmp_path / 'run').iterdir()}
    assert on_disk == expected == set(manager.all_steps())
    best_kept = [s for s in finite if s in expected]
    assert manager.best_step() == (best_kept[-1] if best_kept else None)
  manager.close()


def test_a_misspelt_best_metric_is_named_after_the_checkpoint_is_safe(tmp_path):
  manager = CheckpointManager(tmp_path / 'run', identity={}, best_metric='hr@10')
  with pytest.raises(UsageError, match=r"'hr@10'.*step 1: 'hr@1O', 'loss'.*mean 'hr@1O'"):
    manager.save(1, small(1), position={}, metrics={'loss': 1.0, 'hr@1O': 0.5})
  manager.close()
  assert_identical(restore_params(tmp_path / 'run', small(0)['params']), small(1)['params'])


def test_saving_a_step_again_is_nothing_and_an_earlier_one_is_refused(tmp_path):
  with CheckpointManager(tmp_path / 'run', identity={}) as manager:
    manager.save(5, small(5), position={'first': True})
    manager.save(5, small(6), position={'first': False})
    restored = manager.restore(small(0))
    assert restored.position == {'first': True}
    assert_identical(restored.state, small(5))
    with pytest.raises(UsageError, match=r'step 4 cannot be saved after step 5.*model_dir'):
      manager.save(4, small(4), position={})


def test_another_identity_is_refused(saved):
  other = {
    'model': {'name': 'item_text', 'num_layers': 12, 'widths': (8, 4)},
    'data': {'name': 'ml1m', 'fingerprint': 'def'},
    'entity_table': {'sha256': '0a'},
  }
  leftover = saved / '3.orbax-checkpoint-tmp'
  leftover.mkdir()
  with pytest.raises(UsageError) as raised:
    CheckpointManager(saved, identity=other)
  assert str(raised.value) == (
    f'{saved} has checkpoints made with other settings:\n'
    '  data.fingerprint: "abc" in the checkpoint, "def" now\n'
    '  data.name: "ml100k" in the checkpoint, "ml1m" now\n'
    '  entity_table.sha256: absent in the checkpoint, "0a" now\n'
    '  model.num_layers: 6 in the checkpoint, 12 now\n'
    'Use another model_dir, or go back to the settings of the checkpoint.'
  )
  assert leftover.exists(), "what is refused may be another run's, and under way"
  params = like(make_state().params)
  with pytest.raises(UsageError, match='num_layers: 6 in the checkpoint, 12 now') as raised:
    restore_params(saved, params, identity=other)
  assert 'data' not in str(raised.value)
  restore_params(saved, params, identity=other | {'model': IDENTITY['model']})


def test_what_is_not_json_is_refused_at_once(tmp_path):
  with pytest.raises(TypeError, match=r'identity is not made of JSON values.*PosixPath'):
    CheckpointManager(tmp_path / 'run', identity={'data': {'path': tmp_path}})
  with CheckpointManager(tmp_path / 'run', identity={}) as manager:
    with pytest.raises(TypeError, match=r'position is not made of JSON values.*ndarray'):
      manager.save(1, small(1), position={'rows': np.arange(3)})
    assert manager.all_steps() == []


def test_leaves_that_do_not_fit_are_all_listed(saved):
  wanted = make_state(width=6)
  wanted.params['adapter'] = wanted.params.pop('adaptor')
  wanted = wanted.replace(step=jnp.float32(0))
  with (
    CheckpointManager(saved, identity=IDENTITY) as manager,
    pytest.raises(UsageError) as raised,
  ):
    manager.restore(like(wanted))
  lines = str(raised.value).splitlines()
  assert lines[0].startswith(f'{saved}/2 does not fit')
  assert [line for line in lines if 'params/' in line] == [
    '  + params/adapter/bias [4]',
    '  - params/adaptor/bias [4]',
    '  params/item_encoder/layers_0/kernel: float32 [7, 5] in the checkpoint,'
    ' float32 [7, 6] in the model',
    '  params/item_encoder/scale: bfloat16 [5] in the checkpoint, bfloat16 [6] in the model',
  ]
  assert '  step: int32 [] in the checkpoint, float32 [] in the model' in lines
  assert any('opt_state/1/inner_state/0/mu/item_encoder/scale: ' in line for line in lines)


@pytest.mark.parametrize(
  ('params', 'line'),
  [
    ({'w': jnp.zeros(3)}, r'- params/b \[2\]'),
    ({'w': jnp.zeros(3), 'b': jnp.zeros(2), 'c': jnp.zeros(1)}, r'\+ params/c \[1\]'),
    ({'w': jnp.zeros(3), 'b': jnp.zeros((1, 2))}, r'params/b: float32 \[2\].*float32 \[1, 2\]'),
    ({'w': jnp.zeros(3), 'b': jnp.zeros(2, int)}, r'params/b: float32 \[2\].*int32 \[2\]'),
    ({'w': {'w': jnp.zeros(3)}, 'b': jnp.zeros(2)}, r'- params/w \[3\]\n  \+ params/w/w \[3\]'),
  ],
)
def test_nothing_is_filled_silently(tmp_path, params, line):
  with CheckpointManager(tmp_path / 'run', identity={}) as manager:
    manager.save(1, small(1, w=jnp.ones(3), b=jnp.ones(2)), position={})
    with pytest.raises(UsageError, match=line):
      manager.restore(small(1, **params))
  with pytest.raises(UsageError, match=line):
    restore_params(tmp_path / 'run', params)


def test_where_to_restore_must_be_said(saved):
  with pytest.raises(ValueError, match='adaptor/bias of `like` has no sharding'):
    restore_params(saved, jax.eval_shape(lambda: make_state().params))


def test_params_come_from_a_run_or_from_a_step(saved, monkeypatch):
  params = like(make_state().params)
  assert_identical(restore_params(saved, params), make_state(2).params)
  assert_identical(restore_params(saved / '1', params), make_state(1).params)
  assert read_identity(saved) == read_identity(saved / '1')
  assert read_identity(saved)['model'] == {'name': 'item_text', 'num_layers': 6, 'widths': [8, 4]}
  saved.rename(saved.with_name('7'))  # a run's name may be a number, too
  monkeypatch.chdir(saved.parent)
  assert_identical(restore_params('7', params), make_state(2).params)
  assert_identical(restore_params('7/1', params), make_state(1).params)


def test_a_path_without_a_checkpoint_is_explained(saved):
  unfinished = saved / '3.orbax-checkpoint-tmp'
  (unfinished / 'state').mkdir(parents=True)
  foreign = saved.parent / 'foreign'
  (foreign / '5' / 'default').mkdir(parents=True)
  for path, message in (
    (saved.with_name('rum'), "there is no such directory. Did you mean 'run'?"),
    (saved / '12', 'there is no such directory. Did you mean'),
    (saved.parent, f'has no complete checkpoint.* There are some in {foreign}'),
    (unfinished, 'has no complete checkpoint'),
    (foreign, 'foreign/5 is not a checkpoint of this library'),
  ):
    with pytest.raises(UsageError, match=message):
      restore_params(path, {})
    with pytest.raises(UsageError, match=message):
      read_identity(path)
  with pytest.raises(UsageError, match='foreign/5 is not a checkpoint of this library'):
    CheckpointManager(foreign, identity={})
  with CheckpointManager(saved, identity=IDENTITY) as manager:
    with pytest.raises(UsageError, match='no checkpoint of step 3; it has: 1, 2'):
      manager.restore(make_state(), step=3)
    manager.save(3, make_state(3), position={})
  assert sorted(path.name for path in saved.iterdir()) == ['2', '3']
  with CheckpointManager(saved.parent / 'empty', identity={}) as manager:
    assert (manager.latest_step(), manager.best_step(), manager.all_steps()) == (None, None, [])
    with pytest.raises(UsageError, match='has no checkpoint yet'):
      manager.restore(make_state())


def test_settings_that_cannot_be_are_refused(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UsageError, match='is a file'):
    CheckpointManager(tmp_path / 'file', identity={})
  for setting, value in (('keep_latest', 0), ('keep_best', -1), ('best_mode', 'maximum')):
    with pytest.raises(UsageError, match=f'{setting}={value!r}'):
      CheckpointManager(tmp_path / 'run', identity={}, **{setting: value})


def test_a_directory_in_the_way_surfaces_at_once(tmp_path):
  directory, aside = tmp_path / 'run', tmp_path / 'aside'
  threads = threading.active_count()
  manager = CheckpointManager(directory, identity={})
  manager.save(1, small(1), position={})
  manager.wait()
  directory.rename(aside)
  directory.write_text('in the way')
  with pytest.raises(NotADirectoryError):
    manager.save(2, small(2), position={})
  directory.unlink()
  aside.rename(directory)
  manager.save(2, small(2), position={})
  manager.close()
  assert _complete(directory) == 2
  assert threading.active_count() <= threads, 'a thread that waits keeps a failed run from exiting'


def test_a_full_disk_surfaces_at_the_next_save_and_loses_nothing(tmp_path):
  weights = np.random.default_rng(0).standard_normal((4, 500, 500), np.float32)
  settings = {'identity': {}, 'keep_latest': 1, 'best_metric': 'hr'}
  with CheckpointManager(tmp_path / 'run', **settings) as manager:
    manager.save(1, small(1), position={})
    manager.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # as a disk that is full
    try:
      manager.save(2, small(2, w=jnp.asarray(weights)), position={}, metrics={'hr': 1.0})
      with pytest.raises(Exception, match='File too large'):
        manager.save(3, small(3), position={})
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    # What was to make room for the failed save is still there, and the manager goes on.
    assert (manager.all_steps(), manager.best_step()) == ([1], None)
    assert_identical(manager.restore(small(0)).state, small(1))
    manager.save(3, small(3), position={})
  assert _complete(tmp_path / 'run') == 3
  with CheckpointManager(tmp_path / 'run', **settings) as manager:
    assert manager.all_steps() == [3]


def test_orbax_is_quiet_and_others_are_not(tmp_path, caplog):
  logger = logging.getLogger('absl')
  with caplog.at_level(logging.DEBUG, 'absl'):
    with CheckpointManager(tmp_path / 'run', identity={}) as manager:
      manager.save(1, small(1), position={})
      manager.restore(small(0))
    logger.warning('ours')
  assert [record.message for record in caplog.records if record.name == 'absl'] == ['ours']


def test_another_mesh(tmp_path):
  done = _program('reshard', tmp_path / 'run')
  output, errors = done.communicate(timeout=60)
  assert (done.returncode, output, errors) == (0, '', ''), errors


def test_two_processes_share_a_checkpoint(tmp_path):
  port = two_processes.free_port()
  running = [_program('two_processes', tmp_path / 'run', port, str(i)) for i in range(2)]
  for process in running:
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert output.endswith('done\n')


@pytest.mark.parametrize('kills', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_from_a_whole_checkpoint(tmp_path, kills):
  """kill -9 at random moments; the next process compares what it restores with what belongs in."""
  directory, rng = tmp_path / 'run', random.Random(0)
  kills_inside, reached = 0, 0
  for _ in range(kills):
    process = _program('keep_saving', directory)
    line = process.stdout.readline()
    assert line.startswith('restored'), process.communicate()[1]
    assert int(line.split()[1]) >= reached, 'a complete checkpoint was lost'
    first = reached + rng.choice([1, 2])
    deadline = time.monotonic() + 60
    while _complete(directory) < first and time.monotonic() < deadline:
      time.sleep(0.005)
    while not list(directory.glob('*tmp*')) and time.monotonic() < deadline:
      time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.15))
    reached = _complete(directory)
    process.kill()
    assert process.communicate() == ('', '')
    kills_inside += bool(list(directory.glob('*tmp*')))
  assert kills_inside >= 1
  process = _program('keep_saving', directory)
  line = process.stdout.readline()
  process.kill()
  process.communicate()
  assert int(line.split()[1]) >= reached >= kills


def _complete(directory: Path) -> int:
  names = [path.name for path in directory.iterdir()] if directory.exists() else []
  return max((int(name) for name in names if name.isdecimal()), default=0)


def _program(*arguments) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, PROGRAMS, *map(str, arguments)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {'TF_CPP_MIN_LOG_LEVEL': '3'},
  )

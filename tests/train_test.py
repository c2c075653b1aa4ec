"""The train loop on real parts: data prepared from CSV files, checkpoints, curves, signals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from ilm_jax.checkpoints.manager import read_identity
from ilm_jax.errors import UsageError
from ilm_jax.main import main
from ilm_jax.phases.item_text import ItemTextPhase
from ilm_jax.runtime.metric_log import MetricLog, read_jsonl
from ilm_jax.runtime.processes import one_run
from ilm_jax.train import batches_taken, train
from tests.support import eight_devices
from tests.support.tiny_run import arrays_of, curves

# One layer without dropout: most of the time goes into compiling it.
ENCODER = {'size': 'tiny', 'num_layers': 1, 'cross_attention_every': 1, 'd_model': 32}
ENCODER |= {'d_mlp': 48, 'num_queries': 2, 'dropout_rate': 0.0}
STEPS = 6


@pytest.fixture(scope='session')
def settings(books_directory):
  """Two sources in turn, negatives drawn, checkpoints at 2, 4, 6, an evaluation at 4 and 6."""
  return {
    'data': books_directory,
    'schedule': ['item_text', 'user_item'],
    'total_steps': STEPS,
    'batch_size': 8,
    'item_encoder': ENCODER,
    'text': {'vocabulary': 'bytes', 'item_text': '{title}', 'max_text_tokens': 16},
    'learning_rate': 1e-3,
    'warmup_steps': 2,
    'eval_every': 4,
    'save_every': 2,
    'log_every': 1,
    'keep_latest': 10,
  }


@pytest.fixture(scope='session')
def straight(settings, tmp_path_factory):
  """A run that nothing disturbs, and what it returned."""
  model_dir = tmp_path_factory.mktemp('straight')
  return model_dir, train(model_dir=model_dir, **settings)


def assert_same_run(model_dir: Path, straight: Path) -> None:
  """The same arrays bit for bit, and the same curves."""
  found, expected = arrays_of(model_dir, STEPS), arrays_of(straight, STEPS)
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)
  for ours, theirs in zip(curves(model_dir), curves(straight), strict=True):
    assert ours == theirs


# ---------------------------------------------------------------- what a run leaves


def test_a_run_leaves_checkpoints_and_curves(straight, settings):
  model_dir, results = straight
  steps = sorted(int(path.name) for path in (model_dir / 'checkpoints').iterdir())
  assert steps == [2, 4, 6]
  rows = read_jsonl(model_dir / 'metrics.jsonl')
  trained = [row for row in rows if 'train/mfu' in row]
  assert [row['step'] for row in trained] == [1, 2, 3, 4, 5, 6]
  for row in trained:
    source = 'item_text' if row['step'] % 2 else 'user_item'
    assert f'train/{source}/loss' in row
    assert row['train/examples_per_second'] > 0 < row['train/mfu']
  texts = {name.removeprefix('train/item_text/') for name in trained[0]}
  assert texts >= {
    'itc/gain', 'itc/temperature', 'itm/accuracy_match', 'itm/accuracy_mismatch',
    'itm/loss_of_constant', 'itg/nll', 'query_collapse', 'gradient_norm',
  }  # fmt: skip
  assert {'train/user_item/ui/gain', 'train/user_item/ui/temperature'} <= trained[1].keys()
  assert [row['train/learning_rate'] for row in trained[:3]] == pytest.approx([0, 5e-4, 1e-3])
  validated = [row for row in rows if any(name.startswith('validation/') for name in row)]
  assert [row['step'] for row in validated] == [4, 6]
  assert {f'validation/{name}': value for name, value in results.items()}.items() <= (
    validated[-1].items()
  )
  assert list(model_dir.glob('events.out.tfevents.*'))


def test_the_evaluation_is_of_held_out_items(straight):
  _, results = straight
  # 5 of 24 items are held out: chance at 5 and 10 is certain, and ranks run from 0 to 4.
  for way in ('item_to_text', 'text_to_item'):
    assert results[f'item_text/{way}/R@1/chance'] == pytest.approx(1 / 5)
    assert results[f'item_text/{way}/R@10'] == results[f'item_text/{way}/R@10/chance'] == 1
    assert results[f'item_text/{way}/rank/chance'] == pytest.approx(2)
    assert 0 <= results[f'item_text/{way}/rank'] <= 4
  assert 1 < results['item_text/itg/perplexity'] < 2000
  # Both kinds of pairs, though II was not trained; and what the raw vectors would have scored.
  for name in ('item_item/ii/gain', 'user_item/ui/gain', 'user_item/raw_cf/gain'):
    assert np.isfinite(results[name])


# ---------------------------------------------------------------- stopping and going on


@pytest.mark.parametrize(
  ('number', 'owner', 'method', 'calls_before', 'saved'),
  [
    (signal.SIGTERM, ItemTextPhase, 'count', 2, 3),  # within step 3, which no period would save
    pytest.param(signal.SIGINT, ItemTextPhase, 'count', 2, 3, marks=pytest.mark.slow),
    # While step 3 is being logged, when it is too late to save it: the next step is.
    pytest.param(signal.SIGTERM, MetricLog, 'write', 2, 4, marks=pytest.mark.slow),
  ],
)
def test_a_signal_saves_and_the_next_run_goes_on_bit_for_bit(
  settings, straight, tmp_path, monkeypatch, capsys, number, owner, method, calls_before, saved
):
  original = getattr(owner, method)
  calls = []

  def interrupted(*args):
    calls.append(method)
    if len(calls) == calls_before + 1:
      signal.raise_signal(number)
    return original(*args)

  monkeypatch.setattr(owner, method, interrupted)
  handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  if number == signal.SIGINT:
    with pytest.raises(KeyboardInterrupt):
      train(model_dir=tmp_path, **settings)
  else:
    train(model_dir=tmp_path, **settings)
  assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
  assert sorted(int(path.name) for path in (tmp_path / 'checkpoints').iterdir()) == [2, saved]
  assert f'{number.name}: saved step {saved}' in capsys.readouterr().err
  monkeypatch.undo()

  train(model_dir=tmp_path, **settings)
  assert f'going on from step {saved} of 6 in {tmp_path}\n' in capsys.readouterr().err
  assert_same_run(tmp_path, straight[0])


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(settings, straight, tmp_path):
  """kill -9 of the real command, as soon as a checkpoint is there."""
  flags = [f'--{name}={value}' for name, value in settings.items()]
  command = [sys.executable, '-m', 'ilm_jax.main', 'train', f'--model_dir={tmp_path}', *flags]
  with open(tmp_path / 'stderr', 'w') as stderr:
    process = subprocess.Popen(command, stderr=stderr)
  deadline = time.monotonic() + 240
  while not (tmp_path / 'checkpoints' / '2').exists():
    assert process.poll() is None, (tmp_path / 'stderr').read_text()
    assert time.monotonic() < deadline
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.wait()
  train(model_dir=tmp_path, **settings)
  assert_same_run(tmp_path, straight[0])


def test_a_finished_run_has_nothing_to_do(settings, straight, capsys):
  before = (straight[0] / 'metrics.jsonl').read_text()
  assert train(model_dir=straight[0], **settings) == {}
  assert f'step 6 of 6 in {straight[0]}: nothing is left to do' in capsys.readouterr().err
  assert (straight[0] / 'metrics.jsonl').read_text() == before


def test_the_parameters_of_another_run_begin_a_new_one(settings, straight, tmp_path):
  """Gradients of two parts of a batch are accumulated; at a learning rate of 0."""
  options = settings | {'restore_from': str(straight[0]), 'learning_rate': 0.0, 'total_steps': 1}
  options |= {'accumulate_steps': 2, 'schedule': ['user_item'], 'eval_every': None}
  train(model_dir=tmp_path, **options)
  found, expected = arrays_of(tmp_path, 1), arrays_of(straight[0], STEPS)
  params = [name for name in expected if name.startswith('params/')]
  assert params
  for name in params:
    np.testing.assert_array_equal(found[name], expected[name])
  assert found['step'] == 1
  assert np.isfinite(read_jsonl(tmp_path / 'metrics.jsonl')[0]['train/user_item/loss'])


# ---------------------------------------------------------------- what goes wrong


def test_parameters_that_are_not_there_are_told_before_a_step_is_compiled(
  settings, tmp_path, caplog
):
  with jax.log_compiles(), pytest.raises(UsageError, match='nowhere'):
    train(model_dir=tmp_path / 'run', **settings, restore_from=str(tmp_path / 'nowhere'))
  assert 'train_step' not in caplog.text


@pytest.mark.parametrize(
  ('change', 'named'),
  [
    ({'item_encoder': ENCODER | {'num_queries': 3}}, r'num_queries: 2 in the checkpoint, 3 now'),
    ({'text': {'vocabulary': 'minilm'}}, r'model\.vocabulary: "bytes" in the checkpoint'),
  ],
)
@pytest.mark.network
def test_a_directory_of_another_model_is_refused(settings, straight, change, named):
  with pytest.raises(UsageError, match=named):
    train(model_dir=straight[0], **(settings | change))


def test_a_directory_of_another_data_set_is_refused(settings, straight, tmp_path, books_directory):
  from ilm_jax.prepare import prepare

  other = tmp_path / 'other'
  metadata = json.loads((books_directory / 'dataset.json').read_text())
  prepare(**(metadata['creation'] | {'output': other, 'seed': 1}))
  with pytest.raises(UsageError, match=r'data\.fingerprint.*in the checkpoint'):
    train(model_dir=straight[0], **(settings | {'data': other}))
  assert read_identity(straight[0] / 'checkpoints')['data']['name'] == 'books'


def test_a_run_that_is_refused_leaves_what_another_has_written(
  settings, straight, tmp_path, capsys
):
  """Of another model, with a wrong option, or while another run is at work there."""
  model_dir = tmp_path / 'run'
  shutil.copytree(straight[0], model_dir)
  flags = [f'--{name}={value}' for name, value in settings.items()]
  words = ['train', f'--model_dir={model_dir}', *flags]
  assert main(words) == 0
  files = {
    name: (model_dir / name).read_text()
    for name in ('config.gin', 'operative_config.gin', 'phase.json', 'metrics.jsonl')
  }
  assert 'train.batch_size = 8' in files['config.gin']
  capsys.readouterr()

  def refused(*more: str) -> str:
    assert main([*words, *more]) == 2
    assert {name: (model_dir / name).read_text() for name in files} == files
    return capsys.readouterr().err

  assert 'num_queries: 2 in the checkpoint, 3 now' in refused('--item_encoder.num_queries=3')
  assert "Did you mean 'tiny'" in refused('--item_encoder.size=tinny')
  with one_run(model_dir):
    assert f'another run is at work there (process {os.getpid()} of' in refused('--batch_size=4')


def test_a_value_that_is_not_finite_stops_with_its_name(settings, tmp_path):
  options = settings | {'learning_rate': 1e30, 'warmup_steps': 0, 'save_every': 1}
  options |= {'schedule': ['user_item'], 'eval_every': None}
  with pytest.raises(FloatingPointError, match=r'step 2 \(user_item batch\)') as error:
    train(model_dir=tmp_path, **options)
  assert 'user_item' in str(error.value)
  assert 'gradients of log_temperature_ui, qformer/' in str(error.value)
  assert 'lower learning_rate' in str(error.value)
  assert sorted(int(path.name) for path in (tmp_path / 'checkpoints').iterdir()) == [1]


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'schedule': ['item_txt']}, r"no source 'item_txt'. Did you mean 'item_text'\?"),
    ({'schedule': []}, r'schedule is empty'),
    ({'batch_size': {'item_text': 8}}, r"has no entry for 'user_item', which the schedule names"),
    ({'batch_size': 6, 'accumulate_steps': 4}, r'batch_size=6 .* a multiple of 4'),
    ({'total_steps': 0}, r'train\.total_steps=0: at least 1'),
    ({'save_every': 0}, r'train\.save_every=0: at least 1'),
    ({'eval_every': 3}, r'eval_every=3 is not a multiple of save_every=2'),
    ({'item_encoder': {'size': 'tinny'}}, r"size='tinny'.*Did you mean 'tiny'\?"),
    ({'item_encoder': {'num_querys': 2}}, r"num_querys.*Did you mean 'num_queries'\?"),
    ({'losses': {'itc_wieght': 1.0}}, r"itc_wieght.*Did you mean 'itc_weight'\?"),
    ({'losses': {'itc_weight': 'big'}}, r'train\.losses\.itc_weight'),
    ({'text': {'vocabulary': 'minilmm'}}, r"vocabulary='minilmm'.*Did you mean 'minilm'\?"),
    ({'mesh': {'data': 3}}, r'does not come to the 1 devices'),
    ({'data': Path('nowhere')}, r'nowhere'),
    ({'modules': 'no_such_module_of_mine'}, r"no module 'no_such_module_of_mine'"),
    ({'model': 'item_txt'}, r"one of item_text, item_language\. Did you mean 'item_text'"),
  ],
)
def test_wrong_settings_are_told(settings, tmp_path, change, message):
  with pytest.raises(UsageError, match=message):
    train(model_dir=tmp_path / 'run', **(settings | change))
  assert not (tmp_path / 'run' / 'metrics.jsonl').exists()


# ---------------------------------------------------------------- the schedule


def test_a_restart_knows_how_much_of_each_source_was_taken():
  schedule = ('item_text', 'item_item', 'item_text', 'user_item')
  for steps in range(12):
    taken = [schedule[step % 4] for step in range(steps)]
    for source in schedule:
      assert batches_taken(schedule, steps)[source] == taken.count(source)


# ---------------------------------------------------------------- on a mesh; the shipped files


@pytest.mark.slow
def test_eight_devices_train_as_one_does(settings, tmp_path):
  """The real command on a mesh of 2 x 2 x 2; its checkpoint then goes on on one device."""
  options = settings | {'total_steps': 4}
  one, eight = tmp_path / 'one', tmp_path / 'eight'
  train(model_dir=one, **options)
  flags = [f'--{name}={value}' for name, value in options.items()]
  flags += ["--mesh={'data': 2, 'fsdp': 2, 'tensor': 2}", f'--model_dir={eight}']
  done = subprocess.run(
    [sys.executable, '-m', 'ilm_jax.main', 'train', *flags],
    env={**os.environ, **eight_devices.ENVIRONMENT},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert '[tensor, fsdp]' in done.stderr, 'the table says how parameters are sharded'
  for ours, theirs in zip(curves(eight), curves(one), strict=True):
    for name, value in theirs.items():
      if 'R@' in name or 'rank' in name or 'accuracy' in name:
        continue  # steps of 1/n, by scores that may be equal but for rounding
      np.testing.assert_allclose(ours[name], value, rtol=2e-3, atol=1e-4, err_msg=name)
  train(model_dir=eight, **(options | {'total_steps': 5}))
  assert read_jsonl(eight / 'metrics.jsonl')[-1]['step'] == 5

"""What a run reports can be read back, also when it was killed and resumed."""

import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clu import asynclib
from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator
from tensorboard.util import tensor_util

from ilm_jax.errors import UsageError
from ilm_jax.runtime import metric_log
from ilm_jax.runtime.metric_log import MetricLog, Profile, read_jsonl


def steps_in_tensorboard(directory, tag='loss'):
  # What the TensorBoard application reads with; the other EventAccumulator knows no restarts of
  # the tensors that tf.summary writes.
  events = plugin_event_accumulator.EventAccumulator(str(directory))
  events.Reload()
  written = tag in events.Tags()['tensors']
  return [event.step for event in events.Tensors(tag)] if written else []


def wait_for_the_next_run():
  # TensorBoard reads the files of a directory by the second in their names.
  time.sleep(1)


def steps(directory):
  return [row['step'] for row in read_jsonl(directory / 'metrics.jsonl')]


def write_steps(directory, start_step, last_step):
  with MetricLog(directory, start_step=start_step) as log:
    for step in range(start_step + 10, last_step + 1, 10):
      log.write(step, {'loss': 1 / step})


def test_tensorboard_and_jsonl_hold_what_was_written(tmp_path):
  written = {
    'train/item_text/loss': 1.25,
    'train/tokens': 123_456_789_012,
    'train/numpy': np.float32(0.1),
    'train/jax': jnp.asarray(2.5, jnp.bfloat16),
  }
  with MetricLog(tmp_path / 'a' / 'run', start_step=0) as log:
    log.write(100, written)
    log.write(200, {'eval/items/HR@10': 0.5})
  rows = read_jsonl(tmp_path / 'a' / 'run' / 'metrics.jsonl')
  expected = {name: np.asarray(value).item() for name, value in written.items()}
  assert rows == [{'step': 100, **expected}, {'step': 200, 'eval/items/HR@10': 0.5}]
  assert isinstance(rows[0]['train/tokens'], int)

  events = event_accumulator.EventAccumulator(str(tmp_path / 'a' / 'run'))
  events.Reload()
  assert set(events.Tags()['tensors']) == {*written, 'eval/items/HR@10'}
  for name, value in expected.items():
    (event,) = events.Tensors(name)
    assert event.step == 100
    assert tensor_util.make_ndarray(event.tensor_proto) == np.float32(value)


def test_numbers_that_are_not_finite_are_strict_json(tmp_path):
  with MetricLog(tmp_path, start_step=0) as log:
    log.write(1, {'a': math.nan, 'b': math.inf, 'c': np.float32(-np.inf), 'd': 1.0})

  def refuse(constant):
    raise AssertionError(f'{constant} is not JSON')

  line = (tmp_path / 'metrics.jsonl').read_text()
  row = json.loads(line, parse_constant=refuse)
  assert row == {'step': 1, 'a': 'NaN', 'b': 'Infinity', 'c': '-Infinity', 'd': 1.0}
  assert all(math.isnan(x) or x == float(row[k]) for k, x in read_jsonl_row(tmp_path).items())
  write_steps(tmp_path, 1, 11)  # rewritten, they are what they were
  assert (tmp_path / 'metrics.jsonl').read_text().startswith(line)


def read_jsonl_row(directory):
  (row,) = read_jsonl(directory / 'metrics.jsonl')
  assert all(isinstance(value, int | float) for value in row.values())
  return row


def test_a_killed_run_that_resumes_has_one_straight_curve(tmp_path):
  write_steps(tmp_path, 0, 150)
  wait_for_the_next_run()
  write_steps(tmp_path, 100, 200)
  wait_for_the_next_run()
  write_steps(tmp_path, 180, 220)  # a checkpoint between two writes
  expected = [*range(10, 181, 10), 190, 200, 210, 220]
  assert steps(tmp_path) == expected
  assert steps_in_tensorboard(tmp_path) == expected
  assert not list(tmp_path.glob('.*'))


def test_resuming_keeps_what_is_said_of_the_step_it_starts_from(tmp_path):
  with MetricLog(tmp_path, start_step=0) as log:
    log.write(10, {'loss': 1.0})
    log.write(10, {'eval/loss': 2.0})
    log.write(11, {'loss': 3.0})
  wait_for_the_next_run()
  with MetricLog(tmp_path, start_step=10):
    pass
  rows = read_jsonl(tmp_path / 'metrics.jsonl')
  assert rows == [{'step': 10, 'loss': 1.0}, {'step': 10, 'eval/loss': 2.0}]
  assert steps_in_tensorboard(tmp_path) == [10]
  assert steps_in_tensorboard(tmp_path, 'eval/loss') == [10]


def test_starting_again_from_nothing_keeps_nothing(tmp_path):
  for last_step in (50, 30):
    with MetricLog(tmp_path, start_step=0) as log:
      for step in range(0, last_step + 1, 10):
        log.write(step, {'loss': 1.0})
    wait_for_the_next_run()
  assert steps(tmp_path) == [0, 10, 20, 30]
  assert steps_in_tensorboard(tmp_path) == [0, 10, 20, 30]


@pytest.mark.parametrize('cut', [1, 2, 10, 23])
def test_a_last_line_that_was_cut(tmp_path, cut):
  write_steps(tmp_path, 0, 30)
  path = tmp_path / 'metrics.jsonl'
  whole = path.read_bytes()
  path.write_bytes(whole[:-cut])
  assert steps(tmp_path) == ([10, 20, 30] if cut == 1 else [10, 20])  # 1: the line break alone
  write_steps(tmp_path, 30, 50)
  assert steps(tmp_path)[-3:] == [30, 40, 50] if cut == 1 else [20, 40, 50]
  path.write_bytes(whole + b'\0\0\xff')  # of a machine that lost power
  assert steps(tmp_path) == [10, 20, 30]


@pytest.mark.parametrize(
  'line', ['{"step": 20, "lo', '[20, 1.0]', '{"loss": 1.0}', '{"step": "a"}']
)
def test_another_line_that_is_wrong_is_named(tmp_path, line):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(f'{{"step": 10, "loss": 1.0}}\n{line}\n{{"step": 30, "loss": 1.0}}\n')
  with pytest.raises(UsageError, match=r'metrics\.jsonl, line 2: not a line of metrics'):
    MetricLog(tmp_path, start_step=20)
  assert line in path.read_text()  # nothing is lost


def test_a_write_needs_no_flush(tmp_path):
  log = MetricLog(tmp_path, start_step=0)
  for step in range(10, 50, 10):
    log.write(step, {'loss': 1.0})
  written = [10, 20, 30, 40]
  for _ in range(200):  # nobody flushes: the threads write on their own, in a moment
    if steps(tmp_path) == steps_in_tensorboard(tmp_path) == written:
      break
    time.sleep(0.05)
  assert steps(tmp_path) == steps_in_tensorboard(tmp_path) == written
  log.close()


def test_flush_waits_for_the_thread(tmp_path):
  with MetricLog(tmp_path, start_step=0) as log:
    log.write(10, {'loss': 1.0})
    log.flush()
    assert steps(tmp_path) == [10]
    assert steps_in_tensorboard(tmp_path) == [10]


def test_what_cannot_be_written_is_not_lost_in_silence(tmp_path, monkeypatch):
  def full(descriptor):
    raise OSError(28, 'No space left on device')

  log = MetricLog(tmp_path, start_step=0)
  monkeypatch.setattr(metric_log.os, 'fsync', full)
  log.write(10, {'loss': 1.0})
  with pytest.raises(asynclib.AsyncError, match='No space left'):
    log.close()


def test_a_directory_that_cannot_be_made(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UsageError, match='file/run: metrics cannot be written there'):
    MetricLog(tmp_path / 'file' / 'run', start_step=0)


def test_what_is_no_scalar_is_refused_where_it_is_written(tmp_path):
  with MetricLog(tmp_path, start_step=0) as log, pytest.raises(ValueError, match='size 1'):
    log.write(10, {'loss': np.ones(3)})


def test_other_processes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  with MetricLog(tmp_path / 'run', start_step=0) as log:
    log.write(10, {'loss': 1.0})
    log.flush()
  with Profile(tmp_path / 'run', first_step=1, num_steps=1) as profile:
    profile.step(1, None)
    profile.step(2, None)
  assert list(tmp_path.iterdir()) == []


@pytest.fixture
def tracer(monkeypatch):
  """What the profile asks of JAX, step by step."""
  calls = []
  monkeypatch.setattr(jax.profiler, 'start_trace', lambda directory: calls.append('start'))
  monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: calls.append('stop'))
  monkeypatch.setattr(jax, 'block_until_ready', lambda arrays: calls.append(arrays))
  return calls


@pytest.mark.parametrize(
  ('first_step', 'num_steps', 'expected'),
  [
    (3, 2, ['1', '2', 'after 2', 'start', '3', '4', 'after 4', 'stop', '5', '6']),
    (5, 9, ['1', '2', '3', '4', 'after 4', 'start', '5', '6', 'stop']),  # the training ends first
    (1, 1, ['after 0', 'start', '1', 'after 1', 'stop', '2', '3', '4', '5', '6']),
    (3, 0, ['1', '2', '3', '4', '5', '6']),
    (9, 2, ['1', '2', '3', '4', '5', '6']),
  ],
)
def test_a_profile_is_of_the_steps_named(tmp_path, tracer, first_step, num_steps, expected):
  with Profile(tmp_path, first_step, num_steps) as profile:
    for step in range(1, 7):
      profile.step(step, f'after {step - 1}')
      tracer.append(str(step))
  assert tracer == expected


def test_a_profile_ends_with_a_training_that_fails(tmp_path, tracer):
  def train():
    with Profile(tmp_path, 1, 9) as profile:
      profile.step(1, None)
      raise FloatingPointError

  with pytest.raises(FloatingPointError):
    train()
  assert tracer == [None, 'start', 'stop']


def test_a_real_profile(tmp_path):
  x = jnp.ones(4)
  with Profile(tmp_path, first_step=2, num_steps=1) as profile:
    for step in range(1, 4):
      profile.step(step, x)
      x = x * 2
  assert len(list((tmp_path / 'profile').rglob('*.xplane.pb'))) == 1

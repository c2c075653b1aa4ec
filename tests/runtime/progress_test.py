"""Progress in lines and on a real terminal, on a clock of our own."""

import io
import os
import pty
import re
import termios
import threading

import jax
import pytest

from ilm_jax.runtime.progress import Parts, Progress, duration


class Clock:
  def __init__(self):
    self.now = 1000.0

  def __call__(self):
    return self.now


@pytest.fixture
def clock():
  return Clock()


def test_a_line_a_log(clock):
  stream = io.StringIO()
  with Progress(2_000, 100, 'item_text', stream=stream, clock=clock) as progress:
    progress.log(110, {'loss': 4.0})  # before any rate is known
    for step in range(101, 201):
      clock.now += 0.2
      progress.step(step)
    rates = progress.rates(200, {'examples': 1_624, 'target_tokens': 20_000})
    assert rates == pytest.approx(
      {'steps_per_second': 5, 'examples_per_second': 81.2, 'target_tokens_per_second': 1_000}
    )
    progress.log(200, {'loss': 3.21, 'learning rate': 1e-4}, mfu=0.3124)
    progress.note('saved step 200')
  assert stream.getvalue() == (
    'item_text: step 110/2,000 (5 %)  loss 4\n'
    'item_text: step 200/2,000 (10 %)  loss 3.21  learning rate 0.0001  81.2 examples/s'
    '  ETA 6 min 0 s  MFU 31.2 %\n'
    'saved step 200\n'
  )


def test_rates_are_of_the_window_and_pauses_are_not_in_it(clock):
  progress = Progress(1_000, 0, 'a', stream=io.StringIO(), clock=clock)
  clock.now += 10
  assert progress.rates(10, {})['steps_per_second'] == pytest.approx(1)
  clock.now += 2
  with progress.paused():
    clock.now += 500
  clock.now += 3

  def fail():
    with progress.paused():
      clock.now += 70
      raise KeyError

  with pytest.raises(KeyError):
    fail()
  assert progress.rates(60, {'examples': 5})['steps_per_second'] == pytest.approx(10)
  clock.now += 1
  assert progress.rates(61, {'examples': 8}) == {'steps_per_second': 1, 'examples_per_second': 8}


def test_no_time_and_no_steps_do_no_harm(clock):
  stream = io.StringIO()
  progress = Progress(10, 10, 'a', stream=stream, clock=clock)
  assert progress.rates(10, {'examples': 0}) == {'steps_per_second': 0, 'examples_per_second': 0}
  progress.log(10, {'loss': float('nan')}, mfu=0.0)
  assert stream.getvalue() == 'a: step 10/10 (100 %)  loss nan  0.0 examples/s  MFU 0.0 %\n'


def test_other_processes_are_silent(clock, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  stream = io.StringIO()
  with Progress(10, 0, 'a', stream=stream, clock=clock) as progress:
    clock.now += 1
    progress.step(1)
    assert progress.rates(1, {})['steps_per_second'] == 1  # the numbers are there all the same
    progress.log(1, {'loss': 1.0})
    progress.note('note')
  assert stream.getvalue() == ''


def test_standard_error_is_the_default(capsys):
  progress = Progress(10, 0, 'a')
  progress.log(5, {'loss': 1.0})
  progress.note('note')
  output = capsys.readouterr()
  assert output.out == ''
  assert output.err.splitlines() == ['a: step 5/10 (50 %)  loss 1', 'note']


def test_a_bar_on_a_terminal(clock, monkeypatch):
  monkeypatch.setattr('tqdm.std.time', clock)
  master, slave = pty.openpty()
  termios.tcsetwinsize(slave, (24, 120))
  received = []

  def read():
    try:
      while data := os.read(master, 65_536):
        received.append(data)
    except OSError:
      pass  # how Linux says that the other end is closed

  reader = threading.Thread(target=read)
  reader.start()
  with (
    open(slave, 'w') as terminal,
    Progress(400, 100, 'item_text', stream=terminal, clock=clock) as progress,
  ):
    for step in range(101, 201):
      clock.now += 0.1
      progress.step(step)
    progress.rates(200, {'examples': 3_200})
    progress.log(200, {'loss': 3.21456}, mfu=0.31)
    progress.note('evaluated')
    with progress.paused():
      clock.now += 10_000
    for step in range(201, 211):
      clock.now += 0.1
      progress.step(step)
  reader.join()
  os.close(master)
  text = b''.join(received).decode()
  states = [state for state in re.split(r'[\r\n]+', text) if state.strip()]
  assert 'evaluated' in states
  shown = [state for state in states if 'loss' in state]
  assert re.match(r'item_text:  50%\|.+\| 200/400 \[.*loss 3\.215  320\.0 examples/s', shown[0])
  assert 'MFU 31.0 %' in shown[0]
  # 110 steps in 11 s; what was paused is not counted.
  assert re.search(r' 210/400 \[00:1[01]<00:1\d, +(9|10)\.\d+step/s', shown[-1])
  assert 'ETA' not in text  # the bar has its own


@pytest.mark.parametrize(
  ('seconds', 'expected'),
  [
    (0.2, '0 s'),
    (59.4, '59 s'),
    (59.6, '1 min 0 s'),
    (250, '4 min 10 s'),
    (7_500, '2 h 5 min'),
    (86_399, '23 h 59 min'),
    (3 * 86_400 + 4 * 3_600, '3 d 4 h'),
  ],
)
def test_durations(seconds, expected):
  assert duration(seconds) == expected


# ---------------------------------------------------------------- parts of a command


def test_parts_tell_a_line_every_ten_seconds(clock):
  stream = io.StringIO()
  parts = Parts('evaluate', 2, stream=stream, clock=clock)
  with parts('readout, own', 40) as done:
    for seconds in (8, 4, 4, 4, 4):  # the first eight wait for a compilation
      clock.now += seconds
      done(8)
  with parts('rankers', 5) as done:
    clock.now += 70
    done(3)
  assert stream.getvalue() == (
    'evaluate 1/2, readout, own: example 0/40 (0 %)\n'
    'evaluate 1/2, readout, own: example 16/40 (40 %)  2.0 examples/s  ETA 12 s\n'
    'evaluate 1/2, readout, own: example 40/40 (100 %)  2.0 examples/s  ETA 0 s\n'
    'evaluate 1/2, readout, own: 24 s\n'
    'evaluate 2/2, rankers: example 0/5 (0 %)\n'
    'evaluate 2/2, rankers: example 3/5 (60 %)\n'
    'evaluate 2/2, rankers: 1 min 10 s\n'
  )


def test_parts_of_other_processes_are_silent(clock, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  stream = io.StringIO()
  with Parts('evaluate', 1, stream=stream, clock=clock)('readout, own', 40) as done:
    done(40)
  assert stream.getvalue() == ''

"""Two or more ways to do the same work, each in a process of its own, that take turns.

  def ours(batch_size: int) -> Run:      # in a benchmark's file; builds, loads, prepares
    step = jax.jit(...)
    def run() -> dict[str, float]:       # one unit of the work; returns when it is done
      return {'loss': float(step(batch))}
    return run

  found = compare({'ours': Side(__file__, 'ours', {'batch_size': 64}), 'peer': ...}, rounds=7)
  found['ours'].median, ratio(found['peer'], found['ours'])

A process for each side keeps the thread pools, the allocators and the memory of two libraries
apart; only one works at a time, and in every round each has its turn, in an order that alternates,
so that what else the machine does meets all of them alike. What the first calls of a side take
(compiling, warming up) is told apart and does not count.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

Run = Callable[[], Mapping[str, float]]
_PAUSE = 0.2  # seconds before each turn, for threads of the side before to fall asleep
_GIB = 2**30


class Side(NamedTuple):
  """A function of a benchmark's file, `function(**options) -> Run`."""

  file: str
  function: str
  options: Mapping[str, Any] = {}


class Measured(NamedTuple):
  """What one side took.

  Attributes:
    seconds: of each round.
    numbers: what the last `run` returned.
    setup: seconds until the side was ready for its first call, imports included.
    first: seconds of its first call: compiling, where the side compiles.
    step_gib: the process's peak resident memory during the rounds, GiB.
    peak_gib: the same since the process began.
  """

  seconds: list[float]
  numbers: dict[str, float]
  setup: float
  first: float
  step_gib: float
  peak_gib: float

  @property
  def median(self) -> float:
    return statistics.median(self.seconds)

  def __str__(self) -> str:
    return f'{spread(self.seconds)} s, first {self.first:.1f} s, {self.step_gib:.2f} GiB'


def compare(sides: Mapping[str, Side], rounds: int, warm_ups: int = 2) -> dict[str, Measured]:
  """Measures all sides in turn; a side that fails ends the comparison with what it printed."""
  found: dict[str, Any] = {}
  with contextlib.ExitStack() as stack:
    workers = {}
    for name, side in sides.items():  # one after the other: nothing is compiled beside a compiler
      worker = workers[name] = stack.enter_context(_Worker(name, side))
      found[name] = worker.answer()
      for key in ('first', *['warm'] * (warm_ups - 1)):
        found[name][key] = worker.run()['seconds']
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    numbers: dict[str, dict[str, float]] = {}
    for worker in workers.values():
      worker.ask('forget the peak')
    for turn in range(rounds):
      for name in list(sides)[:: -1 if turn % 2 else 1]:
        time.sleep(_PAUSE)
        answer = workers[name].run()
        seconds[name].append(answer['seconds'])
        numbers[name] = answer['numbers']
    return {
      name: Measured(
        seconds[name],
        numbers[name],
        found[name]['setup'],
        found[name]['first'],
        **worker.ask('memory'),
      )
      for name, worker in workers.items()
    }


def ratios(slow: Measured, fast: Measured) -> list[float]:
  """How many times as long `slow` took, round by round."""
  return [a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)]


def spread(values: list[float]) -> str:
  """'median (least to most)'."""
  return f'{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})'


class _Worker:
  def __init__(self, name: str, side: Side):
    self._name = name
    command = [sys.executable, __file__, side.file, side.function, json.dumps(side.options)]
    self._process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

  def __enter__(self) -> '_Worker':
    return self

  def __exit__(self, *_: Any) -> None:
    self._process.kill()
    self._process.communicate()

  def answer(self) -> dict[str, Any]:
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError(f'{self._name} has failed: see above.')
    return json.loads(line)

  def ask(self, what: str) -> dict[str, Any]:
    assert self._process.stdin is not None
    self._process.stdin.write(what + '\n')
    self._process.stdin.flush()
    return self.answer()

  def run(self) -> dict[str, Any]:
    return self.ask('run')


def _work(file: str, function: str, options: str) -> None:
  """The worker: answers each line of its input with one line of JSON."""
  # Libraries print what they like; the answers go where nothing else is written.
  answers = os.fdopen(os.dup(1), 'w', buffering=1)
  os.dup2(2, 1)
  start = time.perf_counter()
  sys.path.insert(0, str(Path(file).parent))
  module = importlib.import_module(Path(file).stem)
  run = getattr(module, function)(**json.loads(options))
  answers.write(json.dumps({'setup': time.perf_counter() - start}) + '\n')
  before = 0.0
  for line in _lines():
    if line == 'run':
      start = time.perf_counter()
      numbers = run()
      seconds = time.perf_counter() - start
      answer = {'seconds': seconds, 'numbers': dict(numbers)}
    elif line == 'memory':
      answer = {'step_gib': _peak_gib(), 'peak_gib': max(before, _peak_gib())}
    else:
      gc.collect()
      ctypes.CDLL(None).malloc_trim(0)  # what a compiler has freed, glibc keeps
      before = _peak_gib()
      Path('/proc/self/clear_refs').write_text('5')  # the peak begins again at what is in use
      answer = {}
    answers.write(json.dumps(answer) + '\n')


def _lines() -> Iterator[str]:
  for line in sys.stdin:
    yield line.strip()


def _peak_gib() -> float:
  (kib,) = re.findall(r'VmHWM:\s+(\d+) kB', Path('/proc/self/status').read_text())
  return int(kib) * 1024 / _GIB


if __name__ == '__main__':
  _work(*sys.argv[1:])

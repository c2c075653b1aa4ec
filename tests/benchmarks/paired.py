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

`Workers` keeps the processes from one comparison to the next, with what they have imported.
"""

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
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from ilm_jax.data.prepare.fetch import cache_dir

Run = Callable[[], Mapping[str, float]]
LEAST_ROUNDS = 3
_BUDGET = 40.0  # seconds of rounds, after which there are no more than the least
_STEADY = 0.05  # ratios that are no further apart than this, of their median, are enough
_PAUSE = 0.2  # seconds before each turn, for threads of the side before to fall asleep
_GIB = 2**30


class Side(NamedTuple):
  """A function of a benchmark's file: `function(**options) -> Run`.

  Before it is measured it is called `warm_ups` times.
  """

  file: str
  function: str
  options: Mapping[str, Any] = {}
  warm_ups: int = 1


class Measured(NamedTuple):
  """What one side took.

  Attributes:
    seconds: of each round.
    calls: what each `run` returned, the warm-ups first.
    warm: seconds of the last warm-up.
    setup: seconds until the side was ready for its first call, imports included.
    first: seconds of its first call: compiling, where the side compiles.
    step_gib: the process's peak resident memory during the rounds, GiB.
    peak_gib: the same since the process began.
  """

  seconds: list[float]
  calls: list[dict[str, float]]
  warm: float
  setup: float
  first: float
  step_gib: float
  peak_gib: float

  @property
  def numbers(self) -> dict[str, float]:
    """What the last `run` returned."""
    return self.calls[-1]

  @property
  def median(self) -> float:
    return statistics.median(self.seconds)

  def __str__(self) -> str:
    return f'{spread(self.seconds)} s, first {self.first:.1f} s, {self.step_gib:.2f} GiB'


def compare(sides: Mapping[str, Side], rounds: int) -> dict[str, Measured]:
  """`Workers.compare` in processes that end with it."""
  with Workers() as workers:
    return workers.compare(sides, rounds)


class Workers:
  """A process for each name of a side.

  with Workers() as workers:
    for size in sizes:
      found = workers.compare({'ours': Side(...), 'peer': Side(...)}, rounds=7)
  """

  def __init__(self):
    self._workers: dict[str, _Worker] = {}

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: Any) -> None:
    for worker in self._workers.values():
      worker.end()

  def make(self, name: str, side: Side) -> float:
    """Calls a side's function in the process of that name; returns the seconds it took."""
    self._begin(name, side)
    return self._workers[name].answer()['seconds']

  def _begin(self, name: str, side: Side) -> None:
    if name not in self._workers:
      self._workers[name] = _Worker(name)
    self._workers[name].tell({'make': [side.file, side.function, side.options]})

  def compare(
    self, sides: Mapping[str, Side], rounds: int, one_of: Collection[str] = ()
  ) -> dict[str, Measured]:
    """Measures all sides in turn; a side that fails ends the comparison with what it printed.

    There are at least three rounds, and no more when the ratios are steady or the time is used up.

    Args:
      sides: name -> what it does. The first is made before the others, which may read its files.
      rounds: at most; 0: they are warmed up, and that is all.
      one_of: of these sides, the one that was the fastest when warm takes part in the rounds; the
        others are returned without.
    """
    for worker in self._workers.values():
      worker.ask('forget the run')
    first, *others = sides
    setups = {first: self.make(first, sides[first])}
    for name in others:
      self._begin(name, sides[name])
    setups |= {name: self._workers[name].answer()['seconds'] for name in others}
    found: dict[str, dict[str, Any]] = {}
    for name, side in sides.items():  # one after the other: nothing is compiled beside a compiler
      answers = [self._workers[name].ask('run') for _ in range(side.warm_ups)]
      warm = [answer['seconds'] for answer in answers] or [0.0]
      found[name] = {'seconds': [], 'calls': [answer['numbers'] for answer in answers]}
      found[name] |= {'setup': setups[name], 'first': warm[0], 'warm': warm[-1]}
    fastest = sorted(one_of, key=lambda name: found[name]['warm'])[:1]
    taking_part = [name for name in sides if name not in one_of or name in fastest]
    for name in sides:
      self._workers[name].ask('forget the peak')
    self._take_turns({name: found[name] for name in taking_part}, rounds)
    return {name: Measured(**x, **self._workers[name].ask('memory')) for name, x in found.items()}

  def _take_turns(self, found: Mapping[str, dict[str, Any]], rounds: int) -> None:
    start = time.monotonic()
    for turn in range(rounds):
      for name in list(found)[:: -1 if turn % 2 else 1]:
        time.sleep(_PAUSE)
        answer = self._workers[name].ask('run')
        found[name]['seconds'].append(answer['seconds'])
        found[name]['calls'].append(answer['numbers'])
      enough = time.monotonic() - start > _BUDGET or _steady([x['seconds'] for x in found.values()])
      if turn + 1 >= LEAST_ROUNDS and enough:
        break


def _steady(seconds: list[list[float]]) -> bool:
  """Whether the others are as many times as slow as the first one in every round, nearly."""
  first, *others = seconds
  for values in others or [[1.0] * len(first)]:
    ratios = [a / b for a, b in zip(values, first)]
    if max(ratios) - min(ratios) > _STEADY * statistics.median(ratios):
      return False
  return True


def ratios(slow: Measured, fast: Measured) -> list[float]:
  """How many times as long `slow` took, round by round."""
  return [a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)]


def spread(values: list[float]) -> str:
  """'median (least to most)'."""
  return f'{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})'


class _Worker:
  def __init__(self, name: str):
    self._name = name
    # As `ilm` has it: what was compiled once is not compiled again, by the next run.
    environment = {'JAX_COMPILATION_CACHE_DIR': str(cache_dir() / 'xla'), **os.environ}
    self._process = subprocess.Popen(
      [sys.executable, __file__],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=environment,
    )

  def end(self) -> None:
    self._process.kill()
    self._process.communicate()

  def ask(self, what: Any) -> dict[str, Any]:
    self.tell(what)
    return self.answer()

  def tell(self, what: Any) -> None:
    assert self._process.stdin is not None
    self._process.stdin.write(json.dumps(what) + '\n')
    self._process.stdin.flush()

  def answer(self) -> dict[str, Any]:
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError(f'{self._name} has failed: see above.')
    return json.loads(line)


def _work() -> None:
  """The worker: answers each line of its input with one line of JSON."""
  # Libraries print what they like; the answers go where nothing else is written.
  answers = os.fdopen(os.dup(1), 'w', buffering=1)
  os.dup2(2, 1)
  run: Run | None = None
  before = 0.0
  for line in sys.stdin:
    question, start = json.loads(line), time.perf_counter()
    answer: dict[str, Any] = {}
    if question == 'run':
      assert run is not None
      answer['numbers'] = dict(run())
      answer['seconds'] = time.perf_counter() - start
    elif question == 'memory':
      answer = {'step_gib': _peak_gib(), 'peak_gib': max(before, _peak_gib())}
    elif question == 'forget the run':
      run = None
      _give_back()
    elif question == 'forget the peak':
      _give_back()
      before = _peak_gib()
      Path('/proc/self/clear_refs').write_text('5')  # the peak begins again at what is in use
    else:
      file, function, options = question['make']
      folder = str(Path(file).parent)
      if folder not in sys.path:
        sys.path.insert(0, folder)
      run = getattr(importlib.import_module(Path(file).stem), function)(**options)
      answer['seconds'] = time.perf_counter() - start
    answers.write(json.dumps(answer) + '\n')


def _give_back() -> None:
  gc.collect()
  ctypes.CDLL(None).malloc_trim(0)  # what a compiler has freed, glibc keeps


def _peak_gib() -> float:
  (kib,) = re.findall(r'VmHWM:\s+(\d+) kB', Path('/proc/self/status').read_text())
  return int(kib) * 1024 / _GIB


if __name__ == '__main__':
  _work()

"""Seconds from a command to what it is asked for, everything cached.

  python tests/benchmarks/bench.py --only start

The commands are started as anybody would start them, one after the other, round by round, beside
`python -c "import jax; jax.devices()"`: what a start takes depends on the machine and the hour, and
its ratio to that much less. In a round before the first, data, language model and compiled programs
come into their caches. Training has one line of log for each step, and is stopped when the first
one is told; phase 2 begins with what phase 1 has saved when stopped, and recommending with what
phase 2 has.
"""

import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ml100k
from table import Row

_ROUNDS = 5  # at most
_PYTHON = [sys.executable, '-c', 'import jax; jax.devices()']
_ILM = [sys.executable, '-m', 'ilm_jax.main']
_REQUEST = '{"history": ["Heat (1995)", "Alien"]}\n'
_FIRST_STEP = re.compile(r': step 1/')


class _Start(NamedTuple):
  """A command.

  Attributes:
    name: of its row.
    wanted: seconds, at most.
    run: it is run by this, with the directory of the round; returns the seconds.
  """

  name: str
  wanted: float
  run: Callable[[Path], float]


def rows(rounds: int, peaks: Mapping[str, float]) -> Iterator[Row]:
  del peaks
  starts = [
    _Start('ilm --help', 0.5, lambda _: _whole([*_ILM, '--help'])),
    _Start(
      'ilm train --gin_file=jobs/demo_phase1.gin: from the command to the first step',
      12,
      lambda round: _first_step(_train('demo_phase1', round)),
    ),
    _Start(
      'ilm train --gin_file=jobs/demo_ilm.gin: from the command to the first step',
      12,
      lambda round: _first_step(
        _train('demo_ilm', round, f'--gin.PHASE1={round / "demo_phase1"}', f'--gin.LM={ml100k.LM}')
      ),
    ),
    _Start('ilm recommend, by the readout: from the command to its first line', 8, _recommend),
    _Start(f'ilm complete --lm={ml100k.LM} --prompt="The capital of France is"', 6, _complete),
  ]
  python: list[float] = []
  seconds: dict[str, list[float]] = {start.name: [] for start in starts}
  with tempfile.TemporaryDirectory() as directory:
    for number in range(1 + min(rounds, _ROUNDS)):
      round = Path(directory) / str(number)
      python.append(_whole(_PYTHON))
      for start in starts:
        seconds[start.name].append(start.run(round))
  for start in starts:
    first, *others = seconds[start.name]
    ratios = [start.wanted / value for value in others]
    to_python = [value / other for value, other in zip(others, python[1:])]
    yield Row(
      start.name,
      's',
      statistics.median(others),
      ratio=(statistics.median(ratios), min(ratios), max(ratios)),
      goal=1,
      note=f'against the {start.wanted:g} s that are wanted;'
      f' {statistics.median(to_python):.2g} ({min(to_python):.2g} to {max(to_python):.2g}) times'
      f' `python -c "import jax; jax.devices()"`, {statistics.median(python[1:]):.2g} s; the start'
      f' before, which may have had to compile: {first:.2g} s',
    )


def _train(job: str, round: Path, *flags: str) -> list[str]:
  return [
    *(*_ILM, 'train', f'--gin_file=jobs/{job}.gin', f'--gin.DATA={ml100k.prepared()}'),
    *(f'--gin.MODEL_DIR={round / job}', '--gin.LOG_EVERY=1', *flags),
  ]


def _whole(command: Sequence[str]) -> float:
  start = time.perf_counter()
  subprocess.run(command, check=True, capture_output=True)
  return time.perf_counter() - start


def _complete(_: Path) -> float:
  return _whole([*_ILM, 'complete', f'--lm={ml100k.LM}', '--prompt=The capital of France is'])


def _recommend(round: Path) -> float:
  """To the first line, standard input still open, as of a program that asks again and again."""
  command = [*_ILM, 'recommend', f'--model_dir={round / "demo_ilm"}', '--batch_size=1']
  start = time.perf_counter()
  with subprocess.Popen(
    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  ) as process:
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.write(_REQUEST)
    process.stdin.flush()
    line = process.stdout.readline()
    seconds = time.perf_counter() - start
    process.stdin.close()
    said = process.stderr.read()
  if not line:
    raise RuntimeError(f'nothing recommended: {said}')
  return seconds


def _first_step(command: Sequence[str]) -> float:
  said = []
  start = time.perf_counter()
  with subprocess.Popen(
    command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
  ) as process:
    assert process.stderr is not None
    for line in process.stderr:
      said.append(line)
      if _FIRST_STEP.search(line):
        seconds = time.perf_counter() - start
        process.send_signal(signal.SIGTERM)  # it ends by itself, and leaves the caches whole
        process.stderr.read()
        return seconds
  raise RuntimeError(f'no first step: {"".join(said)}')

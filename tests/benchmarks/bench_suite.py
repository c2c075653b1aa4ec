"""Seconds of the tests of `make test`: in a fresh copy with nothing compiled, and a second time.

  python tests/benchmarks/bench.py --only suite

The copy is a clone of what is committed, with the caches of fetched data that are there and none of
compiled programs. There is no peer, but times that are wanted on two cores.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from table import ROOT, Row

WANTED = {'nothing compiled before': 8 * 60.0, 'a second time': 5 * 60.0}
_PYTEST = ('-q', '-n', '2', '-m', 'not slow and not parity')


def rows(rounds: int, peaks: Mapping[str, float]) -> Iterator[Row]:
  del rounds, peaks
  with tempfile.TemporaryDirectory() as directory:
    copy, cache = Path(directory) / 'copy', Path(directory) / 'xla'
    subprocess.run(['git', 'clone', '--quiet', str(ROOT), str(copy)], check=True)
    for when, wanted in WANTED.items():
      start = time.monotonic()
      done = subprocess.run(
        [sys.executable, '-m', 'pytest', *_PYTEST],
        cwd=copy,
        env={**os.environ, 'JAX_COMPILATION_CACHE_DIR': str(cache)},
        capture_output=True,
        text=True,
      )
      seconds = time.monotonic() - start
      if done.returncode:
        raise RuntimeError(f'the tests fail: {done.stdout[-4000:]}{done.stderr[-4000:]}')
      ratio, said = wanted / seconds, done.stdout.splitlines()[-1].strip('= ')
      yield Row(
        f'tests of make test, {when}',
        's',
        seconds,
        ratio=(ratio, ratio, ratio),
        goal=1,
        note=f'against the {wanted:g} s that are wanted; {said}',
      )

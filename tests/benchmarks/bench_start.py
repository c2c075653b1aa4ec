"""Seconds from the command to the first training step of the demo's jobs, everything cached.

  python tests/benchmarks/bench.py --only start

`ilm train` is started as anybody would start it, with one line of log for each step, and stopped
when the first one is told. It has been started once before, so that data, language model and
compiled programs are in their caches. Phase 2 begins with what phase 1 has saved when stopped.
"""

import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import ml100k
from table import Row

WANTED = 20.0  # seconds, at most


def rows(rounds: int, peaks: Mapping[str, float]) -> Iterator[Row]:
  del peaks
  with tempfile.TemporaryDirectory() as directory:
    flags: list[str] = []
    for job in ('demo_phase1', 'demo_ilm'):
      seconds = []
      for start in range(1 + min(rounds, 3)):
        model_dir = Path(directory) / f'{job}_{start}'
        seconds.append(_first_step(_command(job, model_dir, *flags)))
        phase1 = model_dir  # has a checkpoint, as whatever is stopped
      flags = [f'--gin.PHASE1={phase1}', f'--gin.LM={ml100k.LM}']
      first, *others = seconds
      ratios = [WANTED / value for value in others]
      yield Row(
        f'ilm train --gin_file=jobs/{job}.gin: from the command to the first step',
        's',
        statistics.median(others),
        ratio=(statistics.median(ratios), min(ratios), max(ratios)),
        goal=1,
        note=f'against the {WANTED:g} s that are wanted; the start before, which may have had to'
        f' compile: {first:.0f} s',
      )


def _command(job: str, model_dir: Path, *flags: str) -> list[str]:
  return [
    *(sys.executable, '-m', 'ilm_jax.main', 'train', f'--gin_file=jobs/{job}.gin'),
    *(f'--gin.DATA={ml100k.prepared()}', f'--gin.MODEL_DIR={model_dir}', '--gin.LOG_EVERY=1'),
    *flags,
  ]


def _first_step(command: Sequence[str]) -> float:
  said = []
  start = time.perf_counter()
  with subprocess.Popen(
    command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
  ) as process:
    assert process.stderr is not None
    for line in process.stderr:
      said.append(line)
      if re.search(r': step 1/', line):
        seconds = time.perf_counter() - start
        process.send_signal(signal.SIGTERM)  # it ends by itself, and leaves the caches whole
        process.stderr.read()
        return seconds
  raise RuntimeError(f'no first step: {"".join(said)}')

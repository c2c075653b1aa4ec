"""Tests that need eight devices: all of them run in one process, by `tests/eight_devices_test.py`.

The number of devices is fixed when JAX starts, hence the process. In any other one conftest.py
leaves out what is marked with `needed`.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Where a collective's eight threads share few, busy cores, XLA takes them for stuck after 40 s.
FLAGS = (
  '--xla_force_host_platform_device_count=8 --xla_cpu_use_fusion_emitters=false'
  ' --xla_cpu_collective_call_warn_stuck_timeout_seconds=60'
  ' --xla_cpu_collective_call_terminate_timeout_seconds=300'
)
# XLA makes as many threads as there are devices, and a collective that waits for the others holds
# one: two collectives of a device at a time, or two programs, can leave the last device none, and
# all wait for ever. Hence more threads (NPROC is what XLA reads) and one program at a time.
ENVIRONMENT = {
  'XLA_FLAGS': FLAGS,
  'JAX_PLATFORMS': 'cpu',
  'NPROC': '64',
  'JAX_CPU_ENABLE_ASYNC_DISPATCH': 'false',
}
ARE_HERE = os.environ.get('XLA_FLAGS') == FLAGS
needed = pytest.mark.eight_devices


def run(which: str, files: Sequence[Path]) -> None:
  """Runs those tests of `files` that need eight devices and are `which`, a pytest expression.

  Their failures are this call's.
  """
  # Not captured there: of a process that XLA ends, what it said would be lost.
  done = subprocess.run(
    [sys.executable, '-m', 'pytest', '-q', '-s', '-p', 'no:cacheprovider', '-p', 'no:xdist']
    + ['-m', f'eight_devices and ({which})', *map(str, files)],
    cwd=ROOT,
    env={**os.environ, **ENVIRONMENT},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]

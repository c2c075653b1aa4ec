"""Tests on eight virtual devices: class TestOnEightDevices of a file, in a process of its own.

The number of devices is fixed when JAX starts, hence the process.
"""

import os
import subprocess
import sys
from pathlib import Path

# Where a collective's eight threads share few, busy cores, XLA takes them for stuck after 40 s.
FLAGS = (
  '--xla_force_host_platform_device_count=8'
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


def run_class_of(file: str) -> None:
  """Runs class TestOnEightDevices of a test file; its failures are this call's."""
  # Not captured there: of a process that XLA ends, what it said would be lost.
  done = subprocess.run(
    [sys.executable, '-m', 'pytest', '-q', '-s', '--noconftest', '-p', 'no:cacheprovider', file]
    + ['-k', 'TestOnEightDevices'],
    env={**os.environ, **ENVIRONMENT, 'PYTHONPATH': str(Path(__file__).parent)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-20000:]

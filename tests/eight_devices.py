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
  ' --xla_cpu_collective_call_warn_stuck_timeout_seconds=600'
  ' --xla_cpu_collective_call_terminate_timeout_seconds=1200'
)
ARE_HERE = os.environ.get('XLA_FLAGS') == FLAGS


def run_class_of(file: str) -> None:
  """Runs class TestOnEightDevices of a test file; its failures are this call's."""
  done = subprocess.run(
    [sys.executable, '-m', 'pytest', '-q', '--noconftest', '-p', 'no:cacheprovider', file]
    + ['-k', 'TestOnEightDevices'],
    env={
      **os.environ,
      'XLA_FLAGS': FLAGS,
      'JAX_PLATFORMS': 'cpu',
      'PYTHONPATH': str(Path(__file__).parent),
    },
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr

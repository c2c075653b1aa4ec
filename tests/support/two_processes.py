"""Two JAX processes on one machine, joined over gloo."""

import os
import socket
import subprocess
import sys

from tests.support import eight_devices

_JOINED = """
import sys
import jax
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
port, process = sys.argv[1:]
jax.distributed.initialize(f'127.0.0.1:{port}', num_processes=2, process_id=int(process))
"""


def free_port() -> str:
  """A port that nothing listens on."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return str(free.getsockname()[1])


def printed(program: str, *begins: str, devices: int = 1) -> list[list[str]]:
  """The lines of each process that begin with one of `begins`; gloo prints others.

  Args:
    program: Python, which both run, each with `devices` devices.
    begins: what lines begin with.
    devices: of each process.
  """
  env = {
    **os.environ,
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': str(eight_devices.ROOT),
  }
  port = free_port()
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', _JOINED + program, port, str(i)],
      env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    for i in range(2)
  ]  # fmt: skip
  found = []
  for process in processes:
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    found.append([line for line in stdout.split('\n') if line.startswith(begins)])
  return found

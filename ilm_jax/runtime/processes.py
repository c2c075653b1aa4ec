"""Several processes that train or evaluate together: how they meet, agree, stop and end.

  ilm train --multiprocess ...                          on TPU pods, SLURM and GKE, on every host
  ilm train --multiprocess --coordinator=10.0.0.1:8476 --num_processes=2 --process_id=0 ...

Who takes part is no configuration of the run: it is on the command line alone, and a run may go on
with another number of processes. All of them compute and save checkpoints together; process 0
alone writes the other files and tells how far the run is.

What happens to one process happens to all. Where one dies, the others' next collective fails, or
waits for it until nothing was heard of it for `--heartbeat` seconds: then JAX ends them.
"""

import argparse
import contextlib
import fcntl
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from ilm_jax.errors import UsageError

_LEAVE = 10  # seconds for the others to come to the same error
_MESSAGE = 4096  # bytes of an error that all are told


class Cluster(NamedTuple):
  """Who takes part.

  Attributes:
    coordinator, num_processes, process_id: where the processes meet, how many they are, and which
      one this is; None: JAX finds it out.
    heartbeat: seconds after which a process that is not heard of is dead.
  """

  coordinator: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  heartbeat: int = 60


def take_flags(words: Sequence[str]) -> tuple[Cluster | None, list[str]]:
  """Flags of a command without those of this file; None where there is one process.

  Raises:
    UsageError: some but not all of the three are given, or a value is not right.
  """
  parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  parser.add_argument('--multiprocess', nargs='?', const='True', default='False')
  for name in Cluster._fields:
    parser.add_argument(f'--{name}')
  flags, rest = parser.parse_known_args(words)
  if flags.multiprocess.lower() not in ('true', 'false'):
    raise UsageError(f'--multiprocess={flags.multiprocess}: true or false (or nothing: true).')
  heartbeat = flags.heartbeat or '60'
  if not heartbeat.isdecimal() or int(heartbeat) < 1:
    raise UsageError(f'--heartbeat={heartbeat}: seconds are needed, 1 or more.')
  given = {name: getattr(flags, name) for name in Cluster._fields[:3]}
  named = [f'--{name}' for name, value in given.items() if value is not None]
  missing = [f'--{name}' for name, value in given.items() if value is None]
  if flags.multiprocess.lower() == 'false':
    if named or flags.heartbeat:
      name = named[0] if named else '--heartbeat'
      raise UsageError(f'{name} is for --multiprocess, which is not given.')
    return None, rest
  if not named:
    return Cluster(heartbeat=int(heartbeat)), rest
  if missing:
    raise UsageError(
      f'{", ".join(named)} without {", ".join(missing)}: give all three, or none of them where JAX'
      ' finds them itself (TPU pods, SLURM, GKE).'
    )
  address = given['coordinator']
  host, _, port = address.rpartition(':')
  if not host or not port.isdecimal():
    raise UsageError(
      f'--coordinator={address}: HOST:PORT of process 0 is needed, such as 10.0.0.1:8476.'
    )
  for name in ('num_processes', 'process_id'):
    if not given[name].isdecimal():
      raise UsageError(f'--{name}={given[name]}: a number is needed, 0 or more.')
  number, own = int(given['num_processes']), int(given['process_id'])
  if own >= number:
    raise UsageError(
      f'--process_id={own}: of {number} processes the ids are 0 to {number - 1}, and each has its'
      ' own.'
    )
  return Cluster(address, number, own, int(heartbeat)), rest


@contextlib.contextmanager
def joined(
  cluster: Cluster | None, *, stops_on_sigterm: bool = False, timeout: float = 300
) -> Iterator[None]:
  """Makes this process one of several for what runs inside; none of them outlives another's error.

  Args:
    cluster: None: nothing is done.
    stops_on_sigterm: whether `StopSignals` listens inside. Else SIGTERM ends the process.
    timeout: seconds in which all processes must have come, or those that have come end.

  Raises:
    UsageError: JAX does not find out who takes part, or the coordinator's port is in use.
  """
  if cluster is None:
    yield
    return
  _meet(cluster, stops_on_sigterm, timeout)
  who = f'process {jax.process_index()} of {jax.process_count()}'
  try:
    yield
  except (UsageError, KeyboardInterrupt, SystemExit) as error:
    if not _leave(_LEAVE):  # an error of this process alone: the others wait for it in vain
      print(f'ilm: {who}: {error or "interrupted"}', file=sys.stderr, flush=True)
      os._exit(2 if isinstance(error, UsageError) else 130)
    raise
  except BaseException as error:
    traceback.print_exc()
    print(f'ilm: {who} ends: {_explained(error)}', file=sys.stderr, flush=True)
    # At once, without the ceremony of leaving: the others wait for this process in vain.
    os._exit(1)
  jax.distributed.shutdown()


def _meet(cluster: Cluster, stops_on_sigterm: bool, timeout: float) -> None:
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.config.update('jax_enable_preemption_service', stops_on_sigterm)

  def give_up() -> None:
    print(
      f'ilm: --multiprocess: the processes did not meet within {timeout:g} s at'
      f' {cluster.coordinator or "the coordinator that JAX has found"}. Were all of them started,'
      ' each with its own --process_id? Is the port on the host of process 0 free, and open to the'
      ' other hosts?',
      file=sys.stderr,
      flush=True,
    )
    os._exit(2)

  if cluster.process_id == 0 and cluster.coordinator:
    _check_port(cluster.coordinator)
  # JAX's own time limit aborts the process, with a trace of C++ that says nothing to anybody.
  waiting = threading.Timer(timeout, give_up)
  waiting.start()
  try:
    jax.distributed.initialize(
      *cluster[:3],
      initialization_timeout=round(timeout) + 60,
      heartbeat_timeout_seconds=cluster.heartbeat,
    )
  except ValueError as error:
    raise UsageError(
      f'--multiprocess: JAX finds no cluster here ({error}) Give --coordinator=HOST:PORT,'
      ' --num_processes and --process_id.'
    ) from error
  finally:
    waiting.cancel()
  if jax.default_backend() == 'cpu':
    # Programs out of the cache send over gloo in another order than those just compiled.
    jax.config.update('jax_enable_compilation_cache', False)


def _check_port(coordinator: str) -> None:
  # Before JAX, whose coordinator may crash the process where it cannot listen.
  try:
    socket.create_server(('', int(coordinator.rpartition(':')[2]))).close()
  except (OSError, OverflowError) as error:
    raise UsageError(
      f'--multiprocess: process 0 cannot listen at {coordinator}: {error}. Is the port in use? Name'
      ' another one, on all hosts.'
    ) from error


def _leave(seconds: float) -> bool:
  """Whether all processes have come to their end within so many seconds."""
  leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)
  leaving.start()
  leaving.join(seconds)
  return not leaving.is_alive()


def _explained(error: BaseException) -> str:
  if is_of_another(error):
    return (
      'another process is gone, or cannot be reached (see what it says itself). Start all of them'
      ' again with the same command: the run goes on from its latest checkpoint.'
    )
  return 'the others will end too.'


def is_of_another(error: BaseException | None) -> bool:
  """Whether an error may be that another process is gone."""
  return jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError)


def on_first(run: Callable[[], Any]) -> None:
  """Runs something on process 0 alone; all must call it, and all raise the UsageError it raises."""
  message = b''
  if jax.process_index() == 0:
    try:
      run()
    except UsageError as error:
      message = str(error).encode()[:_MESSAGE]
  if jax.process_count() > 1:
    padded = np.frombuffer(message.ljust(_MESSAGE, b'\0'), np.uint8)
    message = multihost_utils.broadcast_one_to_all(padded).tobytes().rstrip(b'\0')
  if message:
    raise UsageError(message.decode(errors='ignore'))


@contextlib.contextmanager
def one_run(model_dir: Path) -> Iterator[None]:
  """Refuses a second run that would write into a directory; the lock dies with its process.

  Raises:
    UsageError: another run is at work there.
  """
  with contextlib.ExitStack() as stack:

    def lock() -> None:
      try:
        model_dir.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context(open(model_dir / '.lock', 'a+'))
      except OSError as error:
        raise UsageError(f'{model_dir} cannot be written: {error}.') from error
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as error:
        file.seek(0)
        raise UsageError(
          f'{model_dir}: another run is at work there ({file.read().strip()}). Wait for it, stop'
          ' it, or name another directory.'
        ) from error
      file.truncate(0)
      file.write(f'process {os.getpid()} of {os.uname().nodename}\n')
      file.flush()

    on_first(lock)
    yield


class StopSignals:
  """SIGTERM or Ctrl-C asks for a stop after the step under way; a second Ctrl-C stops at once.

  Of several processes, one that gets a signal tells the others (JAX's preemption service, which
  listens for SIGTERM itself), and all stop after the same step, within a second or two.
  """

  def __init__(self):
    self._several = jax.process_count() > 1
    self._signal: int | None = None
    self._before: dict[int, Any] = {}

  def asked(self, step: int) -> bool:
    """Whether to stop after this step; to be called after every step, once."""
    if not self._several:
      return self._signal is not None
    reached = multihost_utils.reached_preemption_sync_point(step)
    if reached and self._signal is None:
      self._signal = signal.SIGTERM
    return reached

  def __str__(self) -> str:
    return signal.Signals(self._signal).name if self._signal else ''

  @property
  def interrupted(self) -> bool:
    return self._signal == signal.SIGINT

  def __enter__(self) -> 'StopSignals':
    # Python lets only the main thread set handlers; a test or a notebook may be in another.
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT):
        self._before[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *_: Any) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _note(self, number: int, _: Any) -> None:
    self._signal = number
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if self._several:
      signal.raise_signal(signal.SIGTERM)  # which JAX hears

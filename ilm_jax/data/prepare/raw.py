"""What every data source gives: interactions and item text, before any filtering."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ilm_jax.errors import UsageError

# How rows of one user are put in order.
ORDER_BY_TIMESTAMP = 'timestamp'  # stable sort: equal timestamps keep the file's order
ORDER_BY_FILE = 'file'  # the file's order is the order; timestamps, if any, must agree


@dataclasses.dataclass(frozen=True)
class RawData:
  """Interactions (one row each) and items (one row each) of one domain.

  Attributes:
    name: short name of the domain, e.g. 'ml100k': letters, digits and underscores.
    users: [n] str, the source's own user id of each interaction.
    items: [n] str, the source's own item id of each interaction.
    timestamps: [n] int64 (any unit, e.g. seconds), or None where the source has none.
    ratings: [n] float32, or None where the source has none.
    order: ORDER_BY_TIMESTAMP or ORDER_BY_FILE.
    item_ids: [m] str, the source's own id of each item that has text.
    item_text: field name -> m strings. 'title' is required; '' means "no value".
    provenance: where the data came from (files, sha256, licence, citation): JSON values.
  """

  name: str
  users: np.ndarray
  items: np.ndarray
  timestamps: np.ndarray | None
  ratings: np.ndarray | None
  order: str
  item_ids: np.ndarray
  item_text: Mapping[str, Sequence[str]]
  provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if not self.name.isidentifier():
      raise UsageError(
        f'data set name {self.name!r}: only letters, digits and underscores, not starting with a'
        ' digit (it becomes part of SeqIO task names).'
      )
    if self.order not in (ORDER_BY_TIMESTAMP, ORDER_BY_FILE):
      raise UsageError(f"{self.name}: order={self.order!r}; allowed: 'timestamp', 'file'.")
    if 'title' not in self.item_text:
      raise UsageError(
        f"{self.name}: items have no 'title' field; fields found: {sorted(self.item_text)}."
      )
    if self.timestamps is None and self.order == ORDER_BY_TIMESTAMP:
      raise UsageError(
        f'{self.name}: interactions have no timestamps, so they cannot be put in time order. Name'
        " the timestamp column, or say order='file' if the rows are already in time order."
      )
    for key in ('items', 'timestamps', 'ratings'):
      column = getattr(self, key)
      if column is not None and len(column) != len(self.users):
        raise UsageError(
          f'{self.name}: {len(self.users)} users but {len(column)} {key}; one value a row expected.'
        )
    for field, values in self.item_text.items():
      if len(values) != len(self.item_ids):
        raise UsageError(
          f'{self.name}: {len(self.item_ids)} items but {len(values)} values of {field!r}.'
        )

"""Packs a window of variable-length examples into few rows of fixed length. Numpy only.

An example is a set of ragged features (its tokens, its entities) that stay together: all of them
go to the same row, in the same order as the examples before and after. The limits of every
feature are respected at once, because a row that is full of entities cannot take another example
even where it still has room for tokens.
"""

from collections.abc import Mapping

import numpy as np

from ilm_jax.errors import UsageError

# What fills a row after its last example. 0 for tokens, as in SeqIO; but entity 0 is an entity.
PAD_VALUES = {'entity_ids': -1}

# A ragged feature of n examples: (values [sum of row_lengths], row_lengths [n]).
Ragged = tuple[np.ndarray, np.ndarray]


def pack_window(
  examples: Mapping[str, Ragged], lengths: Mapping[str, int], *, pack: bool = True
) -> dict[str, np.ndarray]:
  """Packs n examples into as few rows as first-fit needs.

  Three examples of 3, 4 and 2 tokens and of 1, 0 and 1 entities, in rows of 6 tokens and 2
  entities. The second does not fit behind the first; the third does:

  >>> packed = pack_window(
  ...   {
  ...     'targets': (np.array([7, 8, 1, 5, 6, 4, 1, 9, 1]), np.array([3, 4, 2])),
  ...     'entity_ids': (np.array([0, 42]), np.array([1, 0, 1])),
  ...   },
  ...   {'targets': 6, 'entity_ids': 2},
  ... )
  >>> packed['targets']
  array([[7, 8, 1, 9, 1, 0],
         [5, 6, 4, 1, 0, 0]])
  >>> packed['targets_segment_ids']
  array([[1, 1, 1, 2, 2, 0],
         [1, 1, 1, 1, 0, 0]], dtype=int32)
  >>> packed['targets_positions']
  array([[0, 1, 2, 0, 1, 0],
         [0, 1, 2, 3, 0, 0]], dtype=int32)
  >>> packed['entity_ids']
  array([[ 0, 42],
         [-1, -1]])
  >>> packed['entity_ids_segment_ids']
  array([[1, 2],
         [0, 0]], dtype=int32)

  Args:
    examples: feature -> (values [sum of row_lengths], row_lengths [n]).
    lengths: feature -> length of a row, for every feature of `examples`.
    pack: False gives every example a row of its own, in the same order.

  Returns:
    For every feature f, each of shape [rows, lengths[f]]: f (padded with 0, `entity_ids` with
    -1), f_segment_ids (which example of the row, from 1; 0 is padding; the same number in every
    feature) and f_positions (0, 1, 2, ... within the example). Within a row examples keep
    their order, and the result depends on nothing but the arguments.

  Raises:
    UsageError: an example is longer than a row.
  """
  names = list(examples)
  sizes = np.stack([np.asarray(examples[name][1], np.int64) for name in names], axis=1)
  capacity = np.array([lengths[name] for name in names], np.int64)
  too_long = np.flatnonzero((sizes > capacity).any(axis=1))
  if too_long.size:
    example = too_long[0]
    found = ', '.join(f'{name} {size}' for name, size in zip(names, sizes[example]))
    limit = ', '.join(f'{name} {size}' for name, size in zip(names, capacity))
    raise UsageError(
      f'example {example} of the window does not fit into a row: it has lengths {found}; a row'
      f' holds {limit}. Raise the lengths, or have the prompt drop its oldest history.'
    )

  rows = first_fit(sizes, capacity) if pack else np.arange(len(sizes))
  num_rows = int(rows.max()) + 1 if len(rows) else 0
  # From here on examples are sorted by row; the stable sort keeps their order within a row.
  order = np.argsort(rows, kind='stable')
  rows_sorted = rows[order]
  first_of_row = np.searchsorted(rows_sorted, rows_sorted)
  segments = np.empty(len(rows), np.int32)
  segments[order] = np.arange(len(rows)) - first_of_row + 1

  packed = {}
  for name, size in zip(names, sizes.T):
    starts = np.cumsum(size[order]) - size[order]
    # Where each example begins within its row.
    offsets = np.empty(len(rows), np.int64)
    offsets[order] = starts - starts[first_of_row]
    positions = ragged_positions(size)
    targets = np.repeat(rows * lengths[name] + offsets, size) + positions

    def fill(source, pad_value, targets=targets, length=lengths[name]):
      out = np.full(num_rows * length, pad_value, source.dtype)
      out[targets] = source
      return out.reshape(num_rows, length)

    packed[name] = fill(np.asarray(examples[name][0]), PAD_VALUES.get(name, 0))
    packed[f'{name}_segment_ids'] = fill(np.repeat(segments, size), 0)
    packed[f'{name}_positions'] = fill(positions.astype(np.int32), 0)
  return packed


def first_fit(sizes: np.ndarray, capacity: np.ndarray) -> np.ndarray:
  """Gives each example, in order, the first row that has room for all its features.

  >>> first_fit(np.array([[3], [4], [2], [2]]), np.array([6]))
  array([0, 1, 0, 1])

  Args:
    sizes: [n, num_features] int, the lengths of each example; none exceeds `capacity`.
    capacity: [num_features] int, the lengths of a row.

  Returns:
    [n] int, the row of each example. Rows are numbered from 0 without gaps.
  """
  free = np.tile(capacity, (len(sizes), 1))
  rows = np.zeros(len(sizes), np.int64)
  open_rows = 0
  for i, size in enumerate(sizes):
    # The row behind the open ones is empty, so some row always fits.
    row = int((free[: open_rows + 1] >= size).all(axis=1).argmax())
    rows[i] = row
    free[row] -= size
    open_rows = max(open_rows, row + 1)
  return rows


def ragged_positions(row_lengths: np.ndarray) -> np.ndarray:
  """Counts from 0 within each example.

  >>> ragged_positions(np.array([2, 0, 3]))
  array([0, 1, 0, 1, 2])
  """
  starts = np.cumsum(row_lengths) - row_lengths
  return np.arange(int(row_lengths.sum())) - np.repeat(starts, row_lengths)


def concatenate_ragged(left: Ragged, right: Ragged) -> Ragged:
  """Concatenates two ragged features example by example.

  >>> concatenate_ragged(
  ...   (np.array([7, 8, 5]), np.array([2, 1])), (np.array([1, 4, 1]), np.array([1, 2]))
  ... )
  (array([7, 8, 1, 5, 4, 1]), array([3, 3]))
  """
  left_values, left_lengths = left
  right_values, right_lengths = right
  lengths = left_lengths + right_lengths
  is_left = ragged_positions(lengths) < np.repeat(left_lengths, lengths)
  values = np.empty(len(is_left), left_values.dtype)
  values[is_left] = left_values
  values[~is_left] = right_values
  return values, lengths


def shift_right(tokens: np.ndarray, segment_ids: np.ndarray, first: int) -> np.ndarray:
  """Shifts every segment of every row right by one, and puts `first` before it.

  >>> shift_right(np.array([[7, 8, 1, 5, 1, 0]]), np.array([[1, 1, 1, 2, 2, 0]]), 2)
  array([[2, 7, 8, 2, 5, 0]])

  Args:
    tokens: [rows, length] int.
    segment_ids: [rows, length] int, 0 on padding, which stays 0.
    first: the value at the first position of every segment.
  """
  before = np.pad(tokens, [(0, 0), (1, 0)])[:, :-1]
  segment_before = np.pad(segment_ids, [(0, 0), (1, 0)])[:, :-1]
  shifted = np.where(segment_ids == segment_before, before, first)
  return np.where(segment_ids > 0, shifted, 0).astype(tokens.dtype)


def packing_efficiency(segment_ids: np.ndarray) -> float:
  """Fraction of positions of packed rows that hold something else than padding.

  >>> packing_efficiency(np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0]]))
  0.75
  """
  return float(np.mean(segment_ids > 0))

"""Packs a window of variable-length examples into few rows of fixed length. TensorFlow ops only.

An example is a set of ragged features (its tokens, its entities) that stay together: all of them
go to the same row, in the same order as the examples before and after. The limits of every
feature are respected at once, because a row that is full of entities cannot take another example
even where it still has room for tokens.
"""

from collections.abc import Mapping

import tensorflow as tf

from ilm_jax.data.input.model_features import PAD_VALUES


def pack_window(
  examples: Mapping[str, tf.RaggedTensor], lengths: Mapping[str, int], *, pack: bool = True
) -> dict[str, tf.Tensor]:
  """Packs n examples into as few rows as first-fit needs.

  Three examples of 3, 4 and 2 tokens and of 1, 0 and 1 entities, in rows of 6 tokens and 2
  entities. The second does not fit after the first; the third does:

  >>> packed = pack_window(
  ...   {
  ...     'targets': tf.ragged.constant([[7, 8, 1], [5, 6, 4, 1], [9, 1]], tf.int32),
  ...     'entity_ids': tf.ragged.constant([[0], [], [42]], tf.int32),
  ...   },
  ...   {'targets': 6, 'entity_ids': 2},
  ... )
  >>> packed['targets'].numpy()
  array([[7, 8, 1, 9, 1, 0],
         [5, 6, 4, 1, 0, 0]], dtype=int32)
  >>> packed['targets_segment_ids'].numpy()
  array([[1, 1, 1, 2, 2, 0],
         [1, 1, 1, 1, 0, 0]], dtype=int32)
  >>> packed['targets_positions'].numpy()
  array([[0, 1, 2, 0, 1, 0],
         [0, 1, 2, 3, 0, 0]], dtype=int32)
  >>> packed['entity_ids'].numpy()
  array([[ 0, 42],
         [-1, -1]], dtype=int32)
  >>> packed['entity_ids_segment_ids'].numpy()
  array([[1, 2],
         [0, 0]], dtype=int32)

  Args:
    examples: feature -> [n, None] int32. No example may be longer than a row.
    lengths: feature -> length of a row, for every feature of `examples`.
    pack: False gives every example a row of its own, in the same order.

  Returns:
    For every feature f, each int32 [rows, lengths[f]]: f (padded with 0, `entity_ids` with -1),
    f_segment_ids (which example of the row, from 1; 0 is padding; the same number in every
    feature) and f_positions (0, 1, 2, ... within the example). Within a row examples keep
    their order, and the result depends on nothing but the arguments.
  """
  names = list(examples)
  count = examples[names[0]].nrows()
  if pack:
    sizes = tf.stack([examples[name].row_lengths() for name in names], axis=1)
    rows = first_fit(sizes, tf.constant([lengths[name] for name in names], tf.int64))
    order = tf.argsort(rows, stable=True)  # by row; within a row examples keep their order
    rows = tf.gather(rows, order)
    segments = tf.range(count) - tf.searchsorted(rows, rows, out_type=tf.int64) + 1
  else:
    order = rows = tf.range(count)
    segments = tf.ones([count], tf.int64)
  num_rows = tf.reduce_max(tf.concat([rows + 1, [0]], axis=0))

  packed = {}
  for name in names:
    ordered = tf.gather(examples[name], order)
    example = ordered.value_rowids()
    row = tf.gather(rows, example)

    def fill(values: tf.Tensor, pad: int, row=row, length=lengths[name]) -> tf.Tensor:
      ragged = tf.RaggedTensor.from_value_rowids(values, row, num_rows, validate=False)
      return ragged.to_tensor(tf.constant(pad, values.dtype), shape=[None, length])

    packed[name] = fill(ordered.values, PAD_VALUES.get(name, 0))
    packed[f'{name}_segment_ids'] = fill(tf.cast(tf.gather(segments, example), tf.int32), 0)
    positions = tf.ragged.range(ordered.row_lengths()).values
    packed[f'{name}_positions'] = fill(tf.cast(positions, tf.int32), 0)
  return packed


def first_fit(sizes: tf.Tensor, capacity: tf.Tensor) -> tf.Tensor:
  """Gives each example, in order, the first row that has room for all its features.

  >>> first_fit(tf.constant([[3], [4], [2], [2]], tf.int64), tf.constant([6], tf.int64)).numpy()
  array([0, 1, 0, 1])

  Args:
    sizes: [n, num_features] int64, the lengths of each example; none exceeds `capacity`.
    capacity: [num_features] int64, the lengths of a row.

  Returns:
    [n] int64, the row of each example. Rows are numbered from 0 without gaps.
  """
  count = tf.shape(sizes)[0]
  # As many rows as examples: an empty one always fits.
  free = tf.tile(capacity[tf.newaxis, :], [count, 1])
  chosen = tf.TensorArray(tf.int64, size=count)

  def place(i, free, chosen):
    fits = tf.reduce_all(free >= sizes[i], axis=1)
    row = tf.argmax(tf.cast(fits, tf.int32))
    free = tf.tensor_scatter_nd_sub(free, [[row]], sizes[i][tf.newaxis])
    return i + 1, free, chosen.write(i, row)

  *_, chosen = tf.while_loop(lambda i, *_: i < count, place, (0, free, chosen))
  return chosen.stack()


def shift_right(tokens: tf.Tensor, segment_ids: tf.Tensor, first: int) -> tf.Tensor:
  """Shifts every segment of every row right by one, and puts `first` before it.

  >>> shift_right(
  ...   tf.constant([[7, 8, 1, 5, 1, 0]]), tf.constant([[1, 1, 1, 2, 2, 0]]), 2
  ... ).numpy()
  array([[2, 7, 8, 2, 5, 0]], dtype=int32)

  Args:
    tokens: [rows, length] int32.
    segment_ids: [rows, length] int32, 0 on padding, which stays 0.
    first: the value at the first position of every segment.
  """
  before = tf.pad(tokens, [(0, 0), (1, 0)])[:, :-1]
  segment_before = tf.pad(segment_ids, [(0, 0), (1, 0)])[:, :-1]
  shifted = tf.where(segment_ids == segment_before, before, first)
  return tf.where(segment_ids > 0, shifted, 0)

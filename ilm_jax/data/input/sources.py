"""SeqIO data sources over a prepared data set: random access to examples by index.

An example is a few integers; a split is a numbered list of examples, none of which is stored.
Random access is what makes resuming exact and cheap: example i of a split is a pure function of i.

Examples have some of the columns `user`, `item`, `target` ([n] int32), `rating` ([n] float32) and
`history` (ragged int32), which `ilm_jax.data.text.rendering` reads, or `entity_ids` and
`targets`; and always `seed` ([n, 2] int64), from which preprocessors take whatever randomness they
need.

All of it is TensorFlow ops on whole batches: no Python runs per example or per batch.
(tf.numpy_function would also deadlock: a tf.data iterator that is dropped holds the interpreter's
lock while it waits for calls that need it.)
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import seqio
import tensorflow as tf

from ilm_jax.data.input.row_table import RowTable
from ilm_jax.data.prepared import PreparedData
from ilm_jax.errors import UsageError

_BATCH = 256  # examples looked up at once
_PREPROCESSED = 64  # examples that a preprocessor sees at once, where SeqIO runs it

Columns = Mapping[str, Any]  # name -> tf.Tensor [n, ...] or tf.RaggedTensor [n, None]


class IndexedSource(seqio.DataSource, abc.ABC):
  """A data source whose examples can be looked up by index, in any order.

  Attributes:
    of_columns: whether its examples are dicts, whose columns are what `columns_at` gives.
  """

  of_columns = True

  def __init__(self, num_examples: Mapping[str, int]):
    super().__init__(
      splits=tuple(num_examples),
      num_input_examples=dict(num_examples),
      performs_internal_shuffling=True,
    )

  @abc.abstractmethod
  def examples_at(self, split: str, indices: tf.Tensor) -> Columns:
    """Returns the examples of `split` at `indices` [n] int64, without `seed`.

    It is traced into a tf.data graph: TensorFlow ops only.
    """

  @property
  def columns(self) -> Mapping[str, tf.TypeSpec]:
    """Name and type of the columns of a batch."""
    split = self.splits[0]
    traced = tf.data.Dataset.from_tensors(tf.zeros([0], tf.int64)).map(
      lambda i: self.examples_at(split, i)
    )
    return traced.element_spec

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return True

  def list_shards(self, split: str) -> Sequence[str]:
    return [split]

  def get_dataset(  # pyright: ignore[reportIncompatibleMethodOverride]
    self,
    split: str = 'train',
    shuffle: bool = True,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    *,
    sequence_length: Mapping[str, int] | None = None,
    use_cached: bool = False,
    num_epochs: int | None = 1,
  ) -> tf.data.Dataset:
    """All examples of a split once, as SeqIO asks for them. Training reads by `reader` instead."""
    del sequence_length, use_cached, num_epochs
    count = self.num_input_examples(split) or 0
    indices = tf.data.Dataset.range(count)
    if shard_info is not None:
      indices = indices.shard(shard_info.num_shards, shard_info.index)
    batches = indices.batch(_BATCH)
    if shuffle and count:
      # One permutation of the whole split, not of a buffer.
      pair = tf.constant(_shuffle_seed(seed), tf.int64)
      last = tf.constant(count - 1, tf.int64)
      batches = batches.map(lambda i: tf.random.experimental.index_shuffle(i, pair, last))
    return self.lookup(
      split, batches.map(lambda i: {'index': i, 'seed': tf.stack([tf.zeros_like(i), i], axis=1)})
    )

  def lookup(self, split: str, batches: tf.data.Dataset) -> tf.data.Dataset:
    """Looks up batches of {index [n], seed [n, 2]} (int64) and yields single examples, in order."""
    return map_batches(batches, functools.partial(self.columns_at, split))

  def columns_at(self, split: str, located: Columns) -> Columns:
    """The columns of the examples at {index [n], seed [n, 2]}, `seed` among them."""
    return {**self.examples_at(split, located['index']), 'seed': located['seed']}


def _shuffle_seed(seed: int | None) -> tuple[int, int]:
  if seed is None:
    seed = int(np.random.default_rng().integers(2**31))
  return seed, 0


def map_batches(
  batches: tf.data.Dataset, function: Callable[[dict[str, Any]], Columns]
) -> tf.data.Dataset:
  """Maps batches of columns and yields single examples, in order; ragged columns become 1-D."""
  # There is no Python control flow to convert, and tracing is much faster without.
  traced = tf.autograph.experimental.do_not_convert(function)
  examples = batches.map(traced, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).unbatch()
  if not any(isinstance(spec, tf.RaggedTensorSpec) for spec in examples.element_spec.values()):
    return examples
  # A row of a ragged batch is a tensor that calls itself ragged; SeqIO wants it by its name.
  return examples.map(lambda example: {name: tf.identity(x) for name, x in example.items()})


_Preprocessor = TypeVar('_Preprocessor', bound=Callable[..., tf.data.Dataset])


def one_to_one(preprocessor: _Preprocessor) -> _Preprocessor:
  """Declares that a SeqIO preprocessor gives one example for each; the reader need not try it."""
  preprocessor.one_to_one = True  # pyright: ignore[reportAttributeAccessIssue]
  return preprocessor


def is_one_to_one(preprocessor: Any) -> bool:
  """Whether a preprocessor (or what a functools.partial wraps) was declared `one_to_one`."""
  return getattr(getattr(preprocessor, 'func', preprocessor), 'one_to_one', False)


@dataclasses.dataclass(frozen=True)
class ColumnsPreprocessor:
  """A SeqIO preprocessor that is a function of the columns of many examples.

  SeqIO calls it as any other; `ilm_jax.data.input.reader` calls the function on whole
  windows, which is many times faster.

  Attributes:
    function: (columns of n examples, lengths by feature) -> columns of the same n examples, in
      their order. TensorFlow ops only; n may be 0.
    sequence_length: the lengths, where SeqIO calls it: SeqIO sets the fields of a preprocessor that
      is a dataclass.
  """

  function: Callable[[Columns, Mapping[str, int]], Columns]
  sequence_length: Mapping[str, int] | None = None
  one_to_one: ClassVar[bool] = True

  def __call__(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
    lengths = dict(self.sequence_length or {})
    batches = dataset.ragged_batch(_PREPROCESSED)
    return map_batches(batches, lambda columns: self.function(columns, lengths))


def ragged(column: tf.Tensor | tf.RaggedTensor) -> tf.RaggedTensor:
  """A column of 1-D features; those whose length is known (pairs of entities) are rectangles."""
  is_ragged = isinstance(column, tf.RaggedTensor)
  return column if is_ragged else tf.RaggedTensor.from_tensor(column)


def ragged_range_gather(values: tf.Tensor, starts: tf.Tensor, ends: tf.Tensor) -> tf.RaggedTensor:
  """Rows values[starts[i] : ends[i]] of a flat tensor."""
  return tf.ragged.map_flat_values(tf.gather, values, tf.ragged.range(starts, ends))


class InteractionSource(IndexedSource):
  """One example a (user, item) row, with the rows before it as history.

  Splits: `train`, every training row that has at least `min_history` rows before it; `validation`
  and `test`, the users' held-out rows. Columns are only what a prompt may show or a target may ask
  for: `user`, `history` (where history_length > 0) and
    predict='item':   `target`, the row's item;
    predict='rating': `item` and its `rating`.
  With user_states also `user_entity`, the entity id of the user as of that row
  (ilm_jax.modules.user_states).
  """

  def __init__(
    self,
    prepared: PreparedData,
    *,
    predict: str = 'item',
    history_length: int = 20,
    min_history: int = 0,
    user_states: bool = False,
  ):
    if predict not in ('item', 'rating'):
      raise ValueError(f"predict={predict!r}: 'item' or 'rating'.")
    if predict == 'rating' and prepared.ratings is None:
      raise UsageError(f'{prepared.name} has no ratings to predict.')
    self._predict = predict
    self._history_length = history_length
    # All rows of a user in one run (train, validation, test), so that every split is the same
    # arithmetic on a row number.
    rows = RowTable(prepared)
    self._first_state = prepared.num_entities if user_states else None
    self._items = tf.constant(rows.items)
    self._ratings = None if rows.ratings is None else tf.constant(rows.ratings)
    self._first_row = tf.constant(rows.offsets[:-1])
    train = np.diff(prepared.offsets)
    counts = np.maximum(train - min_history, 0)
    self._train_ends = tf.constant(np.cumsum(counts))
    # Example i of user u is row i + shift[u].
    self._train_shift = tf.constant(rows.offsets[:-1] + min_history - (np.cumsum(counts) - counts))
    num_examples = {'train': int(counts.sum())}
    self._held_out: dict[str, tuple[tf.Tensor, tf.Tensor]] = {}
    for distance, split in ((2, 'validation'), (1, 'test')):
      users = np.flatnonzero(getattr(prepared, f'{split}_items') >= 0)
      self._held_out[split] = tf.constant(users), tf.constant(rows.offsets[users + 1] - distance)
      num_examples[split] = len(users)
    super().__init__(num_examples)

  def examples_at(self, split: str, indices: tf.Tensor) -> Columns:
    if split == 'train':
      users = tf.searchsorted(self._train_ends, indices, side='right', out_type=tf.int64)
      rows = indices + tf.gather(self._train_shift, users)
    else:
      users, rows = (tf.gather(column, indices) for column in self._held_out[split])
    items = tf.gather(self._items, rows)
    columns: dict[str, Any] = {'user': tf.cast(users, tf.int32)}
    if self._first_state is not None:
      columns['user_entity'] = tf.cast(rows + self._first_state, tf.int32)
    if self._history_length:
      starts = tf.maximum(tf.gather(self._first_row, users), rows - self._history_length)
      columns['history'] = ragged_range_gather(self._items, starts, rows)
    if self._predict == 'item':
      columns['target'] = items
    else:
      columns['item'] = items
      columns['rating'] = tf.gather(self._ratings, rows)
    return columns


class HistorySource(IndexedSource):
  """Histories whole, for losses at each of their items: `entity_ids`, the oldest first.

  `train`: each user's training rows in windows of `length` + 1 from the end, of which the first is
  the last of the window before, so that each row but a user's first is predicted once; windows
  are shorter at the beginning of a history. `validation` and `test`: the last `length` items before
  the held-out one, and that one.
  """

  def __init__(self, prepared: PreparedData, *, length: int):
    if length < 1:
      raise ValueError(f'length={length}: 1 or more.')
    rows = RowTable(prepared)
    self._items = tf.constant(rows.items)
    self._length = length
    train = np.diff(prepared.offsets)
    windows = -(-np.maximum(train - 1, 0) // length)
    user = np.repeat(np.arange(len(train)), windows)
    back = np.arange(windows.sum()) - np.repeat(np.cumsum(windows) - windows, windows)
    train_end = rows.offsets[:-1] + train
    ends = {'train': (user, train_end[user] - back * length)}
    for distance, split in ((2, 'validation'), (1, 'test')):
      users = np.flatnonzero((getattr(prepared, f'{split}_items') >= 0) & (train > 0))
      ends[split] = users, rows.offsets[users + 1] - distance + 1
    self._ends = {
      split: (tf.constant(rows.offsets[users]), tf.constant(end))
      for split, (users, end) in ends.items()
    }
    super().__init__({split: len(users) for split, (users, _) in ends.items()})

  def examples_at(self, split: str, indices: tf.Tensor) -> Columns:
    first, end = (tf.gather(column, indices) for column in self._ends[split])
    begin = tf.maximum(first, end - self._length - 1)
    no_text = tf.RaggedTensor.from_row_lengths(tf.zeros([0], tf.int32), tf.zeros_like(indices))
    return {'entity_ids': ragged_range_gather(self._items, begin, end), 'targets': no_text}


class ItemSource(IndexedSource):
  """One example an item: `train` has the items whose text phase 1 sees, `validation` the rest."""

  def __init__(self, prepared: PreparedData):
    self._items = {
      'train': tf.constant(np.flatnonzero(~prepared.heldout_items), tf.int32),
      'validation': tf.constant(np.flatnonzero(prepared.heldout_items), tf.int32),
    }
    super().__init__({split: len(items) for split, items in self._items.items()})

  def examples_at(self, split: str, indices: tf.Tensor) -> Columns:
    return {'item': tf.gather(self._items[split], indices)}


class PairSource(IndexedSource):
  """Positive pairs for phase 1's contrastive losses: `entity_ids` = [left, right, user].

  `item_item` (II): left and right are consecutive in one user's training history. `user_item`
  (UI): left is the user, right an item of the user's training history. The third entity is the
  user whose history the pair comes from: in-batch negatives of the same user are no negatives.
  In `validation` and `test` the right side is the held-out item; II takes the item before it.
  """

  def __init__(self, prepared: PreparedData, kind: str):
    if kind not in ('item_item', 'user_item'):
      raise ValueError(f"kind={kind!r}: 'item_item' or 'user_item'.")
    self._num_items = prepared.num_items
    self._kind = kind
    skip = 1 if kind == 'item_item' else 0
    self._rows = InteractionSource(prepared, history_length=skip, min_history=skip)
    super().__init__(
      {split: self._rows.num_input_examples(split) or 0 for split in self._rows.splits}
    )

  def examples_at(self, split: str, indices: tf.Tensor) -> Columns:
    rows = self._rows.examples_at(split, indices)
    users = rows['user'] + self._num_items
    # min_history = 1 for II, so every history is exactly one item: its flat values are a column.
    left = users if self._kind == 'user_item' else rows['history'].values
    pairs = tf.stack([left, rows['target'], users], axis=1)
    no_text = tf.RaggedTensor.from_row_lengths(tf.zeros([0], tf.int32), tf.zeros_like(indices))
    return {'entity_ids': tf.ensure_shape(pairs, [None, 3]), 'targets': no_text}

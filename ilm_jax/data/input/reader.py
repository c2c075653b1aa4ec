"""Training input with exact resume: batches as a pure function of (seed, step).

The training stream of a SeqIO task or mixture is one infinite list of examples. Position p of the
list is decided by arithmetic alone:

* which task: a table of one block of the mixture, in which every task has its share of places;
* which of the task's examples: its j-th place reads example `index_shuffle(j mod n)` of epoch
  `j div n`, a new permutation every epoch, so each epoch has every example exactly once.

There is no shuffle buffer to save, restarting at any step costs nothing, and no host needs to know
what another one reads. Positions are dealt out in windows of consecutive ones; the stream is cut
into `num_shards` shards (window w belongs to shard w mod num_shards), and each shard fills its own
rows of the global batch. Hosts own shards, so the global batch depends on the number of shards,
which the job fixes, and never on the number of hosts.

Without packing a window is exactly a shard's rows of one batch: step s starts at window s. With
packing a window (the converter's) gives as many rows as it needs, so the place of a
shard after s steps depends on lengths: it is two integers, (window, rows taken of it). Hand
`BatchReader.position()` to the checkpoint and back, or let the reader find it from the step by
reading ahead.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import seqio
import tensorflow as tf

from ilm_jax.data.input.model_features import PAD_VALUES
from ilm_jax.data.input.stream import Stream
from ilm_jax.data.input.windows import INDEX, WindowFeatureConverter
from ilm_jax.errors import UsageError

_CHUNK = 256  # examples made at once, where a window has fewer


@dataclasses.dataclass(frozen=True)
class InputShards:
  """Which part of the global batch this host reads.

  Attributes:
    batch_size: rows of the global batch.
    num_shards: parts into which the stream and the batch are cut; fixed for a job. It divides
      batch_size, and is a multiple of the number of hosts.
    host_index, host_count: this process among all (`jax.process_index()`, `jax.process_count()`).
  """

  batch_size: int
  num_shards: int = 1
  host_index: int = 0
  host_count: int = 1

  def __post_init__(self):
    if self.batch_size % self.num_shards:
      raise UsageError(
        f'batch_size={self.batch_size} cannot be cut into num_shards={self.num_shards} equal parts.'
      )
    if self.num_shards % self.host_count:
      raise UsageError(
        f'num_shards={self.num_shards} cannot be dealt to {self.host_count} hosts evenly: choose a'
        f' multiple of {self.host_count}, and keep it for the whole job.'
      )

  @property
  def rows_per_shard(self) -> int:
    return self.batch_size // self.num_shards

  @property
  def local(self) -> range:
    per_host = self.num_shards // self.host_count
    return range(self.host_index * per_host, (self.host_index + 1) * per_host)


class BatchReader:
  """Iterates over this host's rows of the global batches, from any step on.

  A batch is a dict of NumPy arrays [batch_size / host_count, ...], shards in order.
  """

  def __init__(
    self,
    name: str,
    *,
    split: str = 'train',
    task_feature_lengths: Mapping[str, int],
    converter: seqio.FeatureConverter,
    shards: InputShards,
    seed: int,
    start_step: int = 0,
    position: np.ndarray | None = None,
    use_cached: bool = False,
  ):
    """Builds the pipelines; the first batch is that of `start_step`.

    Args:
      name: a registered SeqIO task or mixture.
      split: the split to read.
      task_feature_lengths: as in SeqIO.
      converter: makes model features of task features. One that packs must be of
        `ilm_jax.data.input.feature_converter`, because the reader counts in its windows.
      shards: this host's part.
      seed: decides order, mixing and templates; 0 <= seed < 2^31.
      start_step: number of batches that earlier runs have consumed.
      position: what `position()` returned after `start_step` batches, [local shards, 2]; only
        used with packing, where None means to find it by reading `start_step` batches.
      use_cached: read the tasks' SeqIO caches.

    Raises:
      UsageError: a task that is not one output for one input, an empty split, a seed out of range,
        another library's packing.
    """
    if not 0 <= seed < 2**31:
      raise UsageError(f'seed={seed}: an integer from 0 to 2^31 - 1 is expected.')
    if converter.pack and not isinstance(converter, WindowFeatureConverter):
      raise UsageError(
        f'{type(converter).__name__} packs in a way that the reader cannot resume from. Use a'
        ' converter of ilm_jax.data.input.feature_converter, or pack=False.'
      )
    self._shards = shards
    self._packed = converter.pack
    self._window = (
      converter.window
      if isinstance(converter, WindowFeatureConverter) and converter.pack
      else shards.rows_per_shard
    )
    self._stream = Stream(name, split, task_feature_lengths, seed=seed, use_cached=use_cached)
    self._position = np.zeros((len(shards.local), 2), np.int64)
    if not self._packed:
      self._position[:, 0] = start_step
    elif position is not None:
      self._position[:] = position
    self._examples_seen = np.zeros(len(shards.local), np.int64)
    self._iterators = [
      self._shard_rows(i, converter, task_feature_lengths) for i in range(len(shards.local))
    ]
    if self._packed and position is None:
      for _ in range(start_step):
        next(self)

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    parts = [next(iterator) for iterator in self._iterators]
    for i, part in enumerate(parts):
      self._advance(i, part)
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

  def position(self) -> np.ndarray:
    """Where the local shards stand: [local shards, 2] int64, (window, rows taken of it)."""
    return self._position.copy()

  def _shard_rows(
    self, i: int, converter: seqio.FeatureConverter, lengths: Mapping[str, int]
  ) -> Iterator[dict[str, np.ndarray]]:
    """Batches of the i-th local shard, from its position on."""
    shard = self._shards.local[i]
    window, skip = (int(x) for x in self._position[i])

    def positions(windows: tf.Tensor) -> tf.Tensor:
      starts = (windows * self._shards.num_shards + shard) * self._window
      return tf.reshape(starts[:, tf.newaxis] + tf.range(self._window, dtype=tf.int64), [-1])

    windows = tf.data.Dataset.counter(window, 1, tf.int64)
    if skip:
      # The first window has been taken in part: count the examples in its rows that are skipped.
      first = windows.take(1).batch(1).map(positions)
      taken = next(_iterate(_batches(self._stream, first, converter, lengths, rows=skip)))
      self._examples_seen[i] = taken['decoder_segment_ids'].max(axis=1).sum()
    # What is packed together is one window.
    chunks = windows.batch(1 if self._packed else max(1, _CHUNK // self._window)).map(positions)
    batches = _batches(
      self._stream, chunks, converter, lengths, rows=self._shards.rows_per_shard, skip=skip
    )
    return _iterate(batches.prefetch(2))

  def _advance(self, i: int, part: Mapping[str, np.ndarray]) -> None:
    if not self._packed:
      self._position[i, 0] += 1
      return
    for count in part['decoder_segment_ids'].max(axis=1):
      self._examples_seen[i] += count
      self._position[i, 1] += 1
      if self._examples_seen[i] == self._window:
        self._position[i] = self._position[i, 0] + 1, 0
        self._examples_seen[i] = 0


def read_once(
  name: str,
  *,
  split: str,
  task_feature_lengths: Mapping[str, int],
  converter: seqio.FeatureConverter,
  shards: InputShards,
  use_cached: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
  """Reads a split once, in order, for evaluation: every host yields the same number of batches.

  The last batch is filled up with padding (loss weights 0, entities -1).

  Args:
    name: a registered SeqIO task.
    split, task_feature_lengths, converter, shards, use_cached: as for `BatchReader`; the converter
      must not pack, because rows are examples here.

  Yields:
    dicts of arrays [batch_size / host_count, ...], and `example_mask` of that many bools.
  """
  if converter.pack:
    raise ValueError('read_once needs a converter that does not pack.')
  stream = Stream(name, split, task_feature_lengths, use_cached=use_cached, shuffle=False)
  rows = shards.batch_size // shards.host_count
  total = stream.num_examples
  steps = math.ceil(total / shards.batch_size)

  def mine(step: tf.Tensor) -> tf.Tensor:
    begin = tf.minimum(step * shards.batch_size + shards.host_index * rows, total)
    return tf.range(begin, tf.minimum(begin + rows, total))

  # Only the last step has windows that are not full, so batches and windows coincide.
  windows = tf.data.Dataset.range(steps).map(mine)
  dataset = _batches(
    stream, windows, converter, task_feature_lengths, rows=rows, drop_remainder=False
  )
  specs = dataset.element_spec
  batches = _iterate(dataset.prefetch(2))
  for _ in range(steps):
    found = next(batches, None)
    batch = {
      key: np.full((rows, *spec.shape[1:]), PAD_VALUES.get(key, 0), spec.dtype.as_numpy_dtype)
      for key, spec in specs.items()
    }
    count = 0
    for key, value in (found or {}).items():
      count = len(value)
      batch[key][:count] = value
    yield {**batch, 'example_mask': np.arange(rows) < count}


class Kept(Iterable[dict[str, np.ndarray]]):
  """Batches that are read when they are first asked for: to begin a pipeline takes seconds."""

  def __init__(self, batches: Iterator[dict[str, np.ndarray]]):
    self._batches = batches
    self._read: list[dict[str, np.ndarray]] = []

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    for i in itertools.count():
      if i == len(self._read):
        batch = next(self._batches, None)
        if batch is None:
          return
        self._read.append(batch)
      yield self._read[i]


def _iterate(dataset: tf.data.Dataset) -> Iterator[dict[str, np.ndarray]]:
  """Its elements, without tf.data's tuning: its thread may take a minute to see that it is to end.

  Whoever drops the iterator waits for that thread, and holds the interpreter's lock meanwhile.
  """
  options = tf.data.Options()
  options.autotune.enabled = False
  return dataset.with_options(options).as_numpy_iterator()


def _batches(
  stream: Stream,
  chunks: tf.data.Dataset,
  converter: seqio.FeatureConverter,
  lengths: Mapping[str, int],
  *,
  rows: int,
  skip: int = 0,
  drop_remainder: bool = True,
) -> tf.data.Dataset:
  """Batches of what a converter makes of the examples at positions.

  Args:
    stream: gives the examples.
    chunks: of positions, [n] int64 each; a converter that packs packs the examples of one together.
    converter: makes model features.
    lengths: as in SeqIO.
    rows: of a batch.
    skip: rows to leave out at the beginning, no more than the first chunk has.
    drop_remainder: whether to leave out a last batch that is not full.

  Returns:
    dicts of [rows, length of the feature].
  """
  if not (stream.of_columns and isinstance(converter, WindowFeatureConverter)):
    examples = converter(stream.examples(chunks), lengths).skip(skip)
    return examples.batch(rows, drop_remainder=drop_remainder)
  convert = converter.traced(lengths)

  @tf.autograph.experimental.do_not_convert
  def block(positions: tf.Tensor) -> dict[str, tf.Tensor]:
    return convert({INDEX: positions, **stream.columns(positions)})

  blocks = chunks.map(block, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
  if skip:
    rest = blocks.take(1).map(lambda block: {name: x[skip:] for name, x in block.items()})
    blocks = rest.concatenate(blocks.skip(1))
  batches = blocks.rebatch(rows, drop_remainder=drop_remainder)
  empty = converter.empty_features(lengths)
  if not empty:
    return batches

  def with_empty(batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    count = tf.shape(next(iter(batch.values())))[0]
    return {**batch, **dict.fromkeys(empty, tf.zeros([count, 0], tf.int32))}

  return batches.map(with_empty)

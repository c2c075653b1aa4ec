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
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from ilm_jax.data.packing import PAD_VALUES
from ilm_jax.data.sources import Columns, IndexedSource, is_one_to_one, ragged_range_gather
from ilm_jax.data.windows import WindowFeatureConverter
from ilm_jax.errors import UsageError

_MIN_BLOCK = 1024  # shares of a mixture are exact to one in this many, or better
_MAX_BLOCK = 1 << 20
_PROBE = 64
_CHUNK = 1024  # positions worked out at once


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
        `ilm_jax.data.feature_converter`, because the reader counts in its windows.
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
        ' converter of ilm_jax.data.feature_converter, or pack=False.'
      )
    self._shards = shards
    self._packed = converter.pack
    self._window = (
      converter.window
      if isinstance(converter, WindowFeatureConverter) and converter.pack
      else shards.rows_per_shard
    )
    self._stream = _Stream(name, split, task_feature_lengths, seed, use_cached)
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
    chunks = windows.batch(max(1, _CHUNK // self._window)).map(positions)
    rows = converter(self._stream.read(chunks), lengths)
    if skip:
      # The first window has been taken in part: count the examples in its rows that are skipped.
      first = converter(self._stream.read(windows.batch(1).take(1).map(positions)), lengths)
      taken = first.take(skip).as_numpy_iterator()
      self._examples_seen[i] = sum(int(row['decoder_segment_ids'].max()) for row in taken)
      rows = rows.skip(skip)
    batches = rows.batch(self._shards.rows_per_shard, drop_remainder=True)
    return batches.prefetch(2).as_numpy_iterator()

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
  stream = _Stream(name, split, task_feature_lengths, seed=0, use_cached=use_cached, shuffle=False)
  rows = shards.batch_size // shards.host_count
  total = stream.num_examples
  steps = math.ceil(total / shards.batch_size)

  def mine(step: tf.Tensor) -> tf.Tensor:
    begin = tf.minimum(step * shards.batch_size + shards.host_index * rows, total)
    return tf.range(begin, tf.minimum(begin + rows, total))

  # Only the last step has windows that are not full, so batches and windows coincide.
  dataset = converter(stream.read(tf.data.Dataset.range(steps).map(mine)), task_feature_lengths)
  specs = dataset.element_spec
  batches = dataset.batch(rows).prefetch(2).as_numpy_iterator()
  for _ in range(steps):
    found = next(batches, None)
    batch = {
      key: np.full((rows, *spec.shape), PAD_VALUES.get(key, 0), spec.dtype.as_numpy_dtype)
      for key, spec in specs.items()
    }
    count = 0
    for key, value in (found or {}).items():
      count = len(value)
      batch[key][:count] = value
    yield {**batch, 'example_mask': np.arange(rows) < count}


class _Stream:
  """The infinite list of examples of a task or mixture, readable at any positions."""

  def __init__(self, name, split, lengths, seed, use_cached=False, shuffle=True):
    provider = seqio.get_mixture_or_task(name)
    if isinstance(provider, seqio.Mixture):
      tasks = [t for t in provider.tasks if split in t.splits]
      rates = [float(provider.get_rate(t)) for t in tasks]
    else:
      tasks, rates = [provider], [1.0]
    if not tasks or split not in tasks[0].splits:
      raise UsageError(f'{name} has no split {split!r}; it has {list(provider.splits)}.')
    self._features = set(provider.output_features)
    self._lengths = lengths
    self._seed = seed
    self._shuffle = shuffle
    self._tasks = [_IndexedTask(t, split, lengths, use_cached) for t in tasks]
    self._block = _MixtureBlock.make(rates, [t.name for t in tasks], seed)

  @property
  def num_examples(self) -> int:
    return sum(task.num_examples for task in self._tasks)

  def read(self, windows: tf.data.Dataset) -> tf.data.Dataset:
    """Examples at the positions of `windows` ([n] int64 each), in order."""
    if len(self._tasks) == 1:
      return self._read_task(0, windows)
    tasks = tf.constant(self._block.task)
    size = len(self._block.task)
    members = [
      self._read_task(i, windows.map(lambda p, i=i: self._places_of(i, p)))
      for i in range(len(self._tasks))
    ]
    choices = windows.map(lambda p: tf.cast(tf.gather(tasks, p % size), tf.int64)).unbatch()
    return tf.data.Dataset.choose_from_datasets(members, choices, stop_on_empty_dataset=False)

  def _places_of(self, task: int, positions: tf.Tensor) -> tf.Tensor:
    """The task's own running numbers of those positions that are its own."""
    size = len(self._block.task)
    within = positions % size
    mine = tf.boolean_mask(positions, tf.gather(self._block.task, within) == task)
    rank = tf.gather(self._block.rank, mine % size)
    return (mine // size) * int(self._block.counts[task]) + rank

  def _read_task(self, i: int, places: tf.data.Dataset) -> tf.data.Dataset:
    task = self._tasks[i]
    count = tf.constant(task.num_examples, tf.int64)
    salt = zlib.crc32(task.name.encode())

    def locate(place: tf.Tensor) -> dict[str, tf.Tensor]:
      epoch, offset = place // count, place % count
      if not self._shuffle:
        return {'index': offset, 'seed': tf.stack([tf.zeros_like(place), place], axis=1)}
      here = tf.zeros_like(place)
      # The public index_shuffle takes one seed for all indices; the op itself takes one for each.
      index = tf.raw_ops.RandomIndexShuffle(
        index=offset,
        seed=tf.stack([here + self._seed, epoch, here + salt], axis=1),
        max_index=here + count - 1,
        rounds=4,
      )
      return {'index': index, 'seed': tf.stack([here + self._seed * 2**32 + salt, place], axis=1)}

    return task.read(places.map(locate), self._features)


@dataclasses.dataclass(frozen=True)
class _MixtureBlock:
  """One block of a mixture: which task each place belongs to, and its rank among that task's."""

  task: np.ndarray  # [block] int32
  rank: np.ndarray  # [block] int64
  counts: np.ndarray  # [tasks] int64

  @classmethod
  def make(cls, rates: Sequence[float], names: Sequence[str], seed: int) -> '_MixtureBlock':
    shares = np.asarray(rates) / sum(rates)
    if shares.min() <= 0:
      raise UsageError(f'mixture rates must be positive: {dict(zip(names, rates))}.')
    size = _MIN_BLOCK
    while size < _MAX_BLOCK and shares.min() * size < 8:
      size *= 2
    counts = np.maximum(np.floor(shares * size), 1).astype(np.int64)
    remainder = shares * size - counts
    missing = size - counts.sum()
    counts[np.argsort(-remainder, kind='stable')[: max(missing, 0)]] += 1
    task = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    np.random.default_rng([seed, 0]).shuffle(task)
    rank = np.zeros(len(task), np.int64)
    for t in range(len(counts)):
      rank[task == t] = np.arange(counts[t])
    return cls(task=task, rank=rank, counts=counts)


class _IndexedTask:
  """A SeqIO task whose examples are read by index."""

  def __init__(self, task: seqio.Task, split: str, lengths: Mapping[str, int], use_cached: bool):
    self.name = task.name
    self._task = task
    self._split = split
    self._lengths = lengths
    self._after_cache = use_cached and task.supports_caching
    if isinstance(task.source, IndexedSource) and not self._after_cache:
      self._source: IndexedSource = task.source
    else:
      self._source = MemorySource.load(task, split, self._after_cache)
    self.num_examples = self._source.num_input_examples(split) or 0
    if not self.num_examples:
      raise UsageError(f'task {task.name} has no examples in split {split!r}.')
    if not all(is_one_to_one(p) for p in self._preprocessors()):
      self._check_one_to_one()

  def _preprocessors(self) -> list[Callable[..., tf.data.Dataset]]:
    """What is to be run: all preprocessors, or those behind the cache."""
    markers = [isinstance(p, seqio.CacheDatasetPlaceholder) for p in self._task.preprocessors]
    start = markers.index(True) + 1 if self._after_cache else 0
    return [p for p, marker in list(zip(self._task.preprocessors, markers))[start:] if not marker]

  def read(self, located: tf.data.Dataset, features: set[str]) -> tf.data.Dataset:
    """Runs the task's preprocessors on the examples that `located` ({index, seed}) asks for."""
    examples = self._source.lookup(self._split, located)
    source = seqio.FunctionDataSource(
      lambda split, shuffle_files, seed=None: examples, splits=[self._split]
    )
    dataset = self._task.replace(source=source, preprocessors=self._preprocessors()).get_dataset(
      self._lengths, self._split, shuffle=False, try_in_mem_cache=False
    )
    return dataset.map(lambda ex: {k: v for k, v in ex.items() if k in features})

  def _check_one_to_one(self) -> None:
    """Positions count inputs, so preprocessors must neither drop nor multiply examples."""
    asked = min(self.num_examples, _PROBE)
    index = tf.range(asked, dtype=tf.int64)
    probe = {'index': index, 'seed': tf.stack([index, index], axis=1)}
    located = tf.data.Dataset.from_tensors(probe)
    given = sum(1 for _ in self.read(located, set(self._task.output_features)))
    if given != asked:
      raise UsageError(
        f'task {self.name}: {asked} source examples became {given} after preprocessing. Exact'
        ' resume needs one output for each input: do filtering and splitting in the source, or'
        ' before a seqio.CacheDatasetPlaceholder and cache the task.'
      )


class MemorySource(IndexedSource):
  """Any other SeqIO source (TFDS, text lines, a function, a task's cache), held in memory.

  Every example is read once, in the source's own order, and kept as columns: scalars and 1-D
  features. Text takes its bytes, an int32 four bytes.
  """

  def __init__(self, split: str, columns: Mapping[str, Any], num_examples: int, bare: bool):
    self._columns = columns
    self._bare = bare
    super().__init__({split: num_examples})

  @classmethod
  def load(cls, task: seqio.Task, split: str, after_cache: bool) -> 'MemorySource':
    """Reads the source of `task`, or its cache."""
    if after_cache:
      task.assert_cached()
      dataset = task._get_cached_source(split).get_dataset(split, shuffle=False)
    else:
      dataset = task.source.get_dataset(split, shuffle=False)
    # Text line sources give a tensor where others give a dict.
    bare = not isinstance(dataset.element_spec, dict)
    if bare:
      dataset = dataset.map(lambda element: {'element': element})
    specs = {name: spec for name, spec in dataset.element_spec.items() if name != 'seed'}
    for name, spec in specs.items():
      if not isinstance(spec, tf.TensorSpec) or spec.shape.rank not in (0, 1):
        raise UsageError(
          f'task {task.name}: source feature {name!r} is {spec}; only scalars and 1-D features can'
          ' be read by index.'
        )
    rows: dict[str, list[Any]] = {name: [] for name in specs}
    for example in dataset.as_numpy_iterator():
      for name in specs:
        rows[name].append(example[name])
    count = len(next(iter(rows.values()), []))
    return cls(
      split, {name: _column(rows[name], spec) for name, spec in specs.items()}, count, bare
    )

  def lookup(self, split: str, batches: tf.data.Dataset) -> tf.data.Dataset:
    examples = super().lookup(split, batches)
    return examples.map(lambda example: example['element']) if self._bare else examples

  def examples_at(self, split: str, indices: tf.Tensor) -> Columns:
    return {name: column(indices) for name, column in self._columns.items()}


def _column(rows: Sequence[Any], spec: tf.TensorSpec) -> Callable[[tf.Tensor], Any]:
  """Keeps a column as constants; returns the function that looks rows up."""
  if spec.shape.rank == 0:
    values = tf.constant(rows, spec.dtype)
    return lambda indices: tf.gather(values, indices)
  offsets = tf.constant(np.concatenate([[0], np.cumsum([len(r) for r in rows])]), tf.int64)
  flat = tf.constant(np.concatenate(rows) if rows else [], spec.dtype)
  return lambda indices: ragged_range_gather(
    flat, tf.gather(offsets, indices), tf.gather(offsets, indices + 1)
  )

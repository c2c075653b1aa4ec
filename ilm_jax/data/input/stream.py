"""The training stream of a SeqIO task or mixture: one infinite list of examples, read at positions.

Where a task is made of columns throughout (an `IndexedSource` and `ColumnsPreprocessor`s, as the
tasks of `ilm_jax.tasks` are), examples at many positions are one function, `Stream.columns`: no
stage of the pipeline sees a single example, and windows are made in parallel. Any other SeqIO task
is read example by example, `Stream.examples`. Both give the same examples.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from ilm_jax.data.input.sources import (
  Columns,
  ColumnsPreprocessor,
  IndexedSource,
  is_one_to_one,
  ragged,
  ragged_range_gather,
)
from ilm_jax.errors import UsageError

_MIN_BLOCK = 1024  # shares of a mixture are exact to one in this many, or better
_MAX_BLOCK = 1 << 20
_PROBE = 64


class Stream:
  """The infinite list of examples of a task or mixture, readable at any positions.

  Attributes:
    of_columns: whether `columns` can be called; `examples` always can.
  """

  def __init__(
    self,
    name: str,
    split: str,
    lengths: Mapping[str, int],
    *,
    seed: int = 0,
    use_cached: bool = False,
    shuffle: bool = True,
  ):
    """Finds the tasks of `name`, and their shares.

    Args:
      name: a registered SeqIO task or mixture.
      split: the split to read.
      lengths: the longest of each feature, as in SeqIO.
      seed: decides order, mixing and templates.
      use_cached: read the tasks' SeqIO caches.
      shuffle: False reads the examples once, in the order of the source.

    Raises:
      UsageError: no such split, no examples, preprocessors that drop or multiply examples.
    """
    provider = seqio.get_mixture_or_task(name)
    if isinstance(provider, seqio.Mixture):
      tasks = [t for t in provider.tasks if split in t.splits]
      rates = [float(provider.get_rate(t)) for t in tasks]
    else:
      tasks, rates = [provider], [1.0]
    if not tasks or split not in tasks[0].splits:
      raise UsageError(f'{name} has no split {split!r}; it has {list(provider.splits)}.')
    self._features = list(provider.output_features)
    self._seed = seed
    self._shuffle = shuffle
    self._tasks = [_IndexedTask(t, split, lengths, use_cached) for t in tasks]
    self._block = _MixtureBlock.make(rates, [t.name for t in tasks], seed)
    self.of_columns = all(task.of_columns for task in self._tasks)

  @property
  def num_examples(self) -> int:
    return sum(task.num_examples for task in self._tasks)

  def columns(self, positions: tf.Tensor) -> dict[str, tf.RaggedTensor]:
    """The features of the examples at `positions` [n] int64: [n, None] each."""
    if len(self._tasks) == 1:
      return self._tasks[0].columns(self._locate(0, positions), self._features)
    owner = tf.gather(self._block.task, positions % len(self._block.task))
    parts = [
      task.columns(self._locate(i, self._places_of(i, positions)), self._features)
      for i, task in enumerate(self._tasks)
    ]
    # Task by task, each in the order of positions: that is what a stable sort by task gives.
    back = tf.argsort(tf.argsort(owner, stable=True))
    return {
      name: tf.gather(tf.concat([part[name] for part in parts], axis=0), back)
      for name in self._features
    }

  def examples(self, windows: tf.data.Dataset) -> tf.data.Dataset:
    """Single examples at the positions of `windows` ([n] int64 each), in order."""
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
    located = places.map(lambda place: self._locate(i, place))
    return self._tasks[i].examples(located, self._features)

  def _locate(self, i: int, place: tf.Tensor) -> dict[str, tf.Tensor]:
    """Which example of the i-th task is at each of its places, and the seed of its randomness."""
    task = self._tasks[i]
    count = tf.constant(task.num_examples, tf.int64)
    here = tf.zeros_like(place)
    epoch, offset = place // count, place % count
    if not self._shuffle:
      return {'index': offset, 'seed': tf.stack([here, place], axis=1)}
    salt = zlib.crc32(task.name.encode())
    # The public index_shuffle takes one seed for all indices; the op itself takes one for each.
    index = tf.raw_ops.RandomIndexShuffle(
      index=offset,
      seed=tf.stack([here + self._seed, epoch, here + salt], axis=1),
      max_index=here + count - 1,
      rounds=4,
    )
    return {'index': index, 'seed': tf.stack([here + self._seed * 2**32 + salt, place], axis=1)}


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
    preprocessors = self._preprocessors()
    self.of_columns = self._source.of_columns and all(
      isinstance(p, ColumnsPreprocessor) for p in preprocessors
    )
    if not all(is_one_to_one(p) for p in preprocessors):
      self._check_one_to_one()

  def _preprocessors(self) -> list[Callable[..., tf.data.Dataset]]:
    """What is to be run: all preprocessors, or those after the cache."""
    markers = [isinstance(p, seqio.CacheDatasetPlaceholder) for p in self._task.preprocessors]
    start = markers.index(True) + 1 if self._after_cache else 0
    return [p for p, marker in list(zip(self._task.preprocessors, markers))[start:] if not marker]

  def columns(
    self, located: Mapping[str, tf.Tensor], features: Sequence[str]
  ) -> dict[str, tf.RaggedTensor]:
    """The features of the examples at `located`, {index [n], seed [n, 2]}, cut to their lengths."""
    columns = self._source.columns_at(self._split, located)
    for preprocessor in self._preprocessors():
      assert isinstance(preprocessor, ColumnsPreprocessor)
      columns = preprocessor.function(columns, self._lengths)
    found = {}
    for name in features:
      dtype = self._task.output_features[name].dtype
      if name not in columns or columns[name].dtype != dtype:
        raise UsageError(
          f'task {self.name}: its preprocessors give the columns'
          f' { {key: x.dtype.name for key, x in columns.items()} }, and not {name!r} as'
          f' {dtype.name}.'
        )
      found[name] = ragged(columns[name])
      if name in self._lengths:
        found[name] = found[name][:, : self._lengths[name]]
    return found

  def examples(self, located: tf.data.Dataset, features: Sequence[str]) -> tf.data.Dataset:
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
    given = sum(1 for _ in self.examples(located, list(self._task.output_features)))
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
    super().__init__({split: num_examples})
    self._columns = columns
    self.of_columns = not bare

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
    return examples if self.of_columns else examples.map(lambda example: example['element'])

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

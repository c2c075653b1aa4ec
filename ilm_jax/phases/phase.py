"""What the train loop asks of a phase."""

import abc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils

from ilm_jax.cf.entity_table import EntityTable
from ilm_jax.data.prepared import PreparedData, read_metadata
from ilm_jax.errors import UsageError, did_you_mean
from ilm_jax.runtime.sharding import MESH_AXES, Rules, pad_rows
from ilm_jax.runtime.tensorflow import import_tensorflow

HostBatch = Mapping[str, np.ndarray]


class Reader(Protocol):
  """This host's rows of the global batches, in order (ilm_jax.data.input.reader.BatchReader)."""

  def __next__(self) -> dict[str, np.ndarray]: ...

  def position(self) -> np.ndarray: ...


class InputOptions(NamedTuple):
  """What every phase is built from.

  Attributes:
    data: directory of the prepared data set.
    entity_table: directory of another entity table than the data set's own, or None.
    batch_size: rows of a global batch, of each source.
    seed: of the order of the examples.
    mesh, rules: where arrays will live.
    input_shards: parts of a packed batch, see `open_reader`.
  """

  data: Path
  entity_table: Path | None
  batch_size: Mapping[str, int]
  seed: int
  mesh: jax.sharding.Mesh
  rules: Rules
  input_shards: int | None = None


class Phase(abc.ABC):
  """A model with its data. `train` knows no more of it than this.

  Attributes:
    name: of the model, and of the phase.
    identity: for which model and data its checkpoints are, JSON values. Whatever makes parameters
      mean something else belongs here; what only decides how they are trained does not.
    frozen: arrays that are put on the devices once and never trained; boxed with their logical axes
      where they have some, or on the devices already.
    best_metric, best_mode: what `evaluate` returns that says which checkpoint is best.
    headline: names of `evaluate` that are shown when it is done; the others are in the curves.
  """

  name: ClassVar[str]
  best_metric: str
  best_mode: Literal['max', 'min']
  headline: tuple[str, ...]
  identity: dict[str, Any]
  frozen: Any

  @abc.abstractmethod
  def sources(self) -> tuple[str, ...]:
    """Names of the batch sources that a schedule may name."""

  def has_source(self, name: str) -> bool:
    """Whether `name` is among them; a phase may know without asking SeqIO for all."""
    return name in self.sources()

  @abc.abstractmethod
  def reader(self, source: str, start_step: int, position: np.ndarray | None) -> Reader:
    """Opens a source after `start_step` batches of it were taken.

    Args:
      source: one of `sources`.
      start_step: batches.
      position: what `all_positions` gave then, if it was saved.
    """

  @abc.abstractmethod
  def batch_shapes(self, source: str, rows: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a source's global batch of so many rows; all arrays are int32."""

  @abc.abstractmethod
  def init(self, key: jax.Array) -> Any:
    """Random parameters, boxed with their logical axes. Runs under jit."""

  def load_pretrained(self, params: Any, report: Callable[[str], None]) -> Any:
    """Parameters of a new run, with what comes from elsewhere filled in; `report` gets the list."""
    del report
    return params

  @abc.abstractmethod
  def loss(
    self, params: Any, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array, source: str
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a global batch, and scalars to be logged. Runs under jit."""

  @abc.abstractmethod
  def count(self, source: str, batch: HostBatch) -> dict[str, int]:
    """What this host's rows hold, for rates: {'examples': ..., 'target_tokens': ...}."""

  @abc.abstractmethod
  def flops(self, params: Any, frozen: Any, batch: HostBatch, source: str) -> int:
    """FLOPs of the matrix products of one step, nothing computed twice (for MFU)."""

  @abc.abstractmethod
  def evaluate(self, params: Any, frozen: Any) -> dict[str, float]:
    """Metrics on the validation data, by name."""


def check_sources(schedule: tuple[str, ...], phase: Phase) -> None:
  """Raises UsageError where the schedule names a source that the phase does not have."""
  if not schedule:
    raise UsageError(f'schedule is empty; sources: {", ".join(phase.sources())}.')
  for source in schedule:
    if not phase.has_source(source):
      sources = phase.sources()
      raise UsageError(
        f'schedule={list(schedule)}: no source {source!r}.{did_you_mean(source, sources)} Sources:'
        f' {", ".join(sources)}.'
      )


def batch_sizes(
  batch_size: int | dict[str, int], schedule: Sequence[str], parts: int
) -> dict[str, int]:
  """Rows of a global batch of each source of the schedule."""
  if isinstance(batch_size, int):
    batch_size = dict.fromkeys(schedule, batch_size)
  for source in schedule:
    if source not in batch_size:
      raise UsageError(
        f'train.batch_size={batch_size} has no entry for {source!r}, which the schedule names.'
        f'{did_you_mean(source, batch_size)} One number is for all sources.'
      )
    if batch_size[source] < 1 or batch_size[source] % parts:
      raise UsageError(
        f'train.batch_size={batch_size[source]} ({source}) cannot be taken in'
        f' accumulate_steps={parts} equal parts: use a multiple of {parts}.'
      )
  return {source: batch_size[source] for source in dict.fromkeys(schedule)}


def batch_part(mesh: jax.sharding.Mesh) -> tuple[int, int]:
  """Which part of every global batch this process reads, and how many parts there are.

  Processes that hold the same rows, because the tensor axis goes over several, read the same part.

  Raises:
    UsageError: some processes share some of their rows only.
  """
  tensor = mesh.shape[MESH_AXES[-1]]
  owners = np.vectorize(lambda device: device.process_index)(mesh.devices).reshape(-1, tensor)
  rows = {i: tuple(np.flatnonzero((owners == i).any(axis=1))) for i in np.unique(owners)}
  parts = sorted(set(rows.values()))
  if len({*map(len, parts)}) > 1 or sum(map(len, parts)) > len(owners):
    raise UsageError(
      f'mesh={dict(mesh.shape)}: processes share some of their rows of the batch. Let tensor be a'
      ' divisor or a multiple of the devices of a process.'
    )
  return parts.index(rows[jax.process_index()]), len(parts)


def check_input_shards(asked: int | None, mesh: jax.sharding.Mesh) -> None:
  """Raises UsageError for `train.input_shards` that the processes cannot share."""
  _, parts = batch_part(mesh)
  if asked is not None and (asked < 1 or asked % parts):
    raise UsageError(
      f'train.input_shards={asked}: {parts} processes cannot share them evenly. Use a multiple of'
      f' {parts}; a run that began with {parts} can go on with fewer processes, too.'
    )


def input_shards(batch_size: int, mesh: jax.sharding.Mesh, num_shards: int | None = None) -> Any:
  """This process's part of global batches, `ilm_jax.data.input.reader.InputShards`.

  `num_shards` is by default the number of parts.
  """
  from ilm_jax.data.input.reader import InputShards

  index, parts = batch_part(mesh)
  return InputShards(batch_size, num_shards or parts, index, parts)


def open_reader(
  name: str,
  inputs: InputOptions,
  source: str,
  *,
  lengths: Mapping[str, int],
  converter: Any,
  start_step: int,
  position: np.ndarray | None,
) -> Reader:
  """This process's rows of the training batches of a SeqIO task or mixture.

  What a batch holds is the same however many processes read it. Of packed batches that is so for
  one number of shards: `inputs.input_shards`, by default as many as there were readers when the
  run began. A restart keeps to it.

  Args:
    name: of the task or mixture.
    inputs: of the phase.
    source: which of `inputs.batch_size`.
    lengths, converter: as of BatchReader.
    start_step, position: as of `Phase.reader`.

  Raises:
    UsageError: the shards cannot be dealt to the processes, or are others than the run's.
  """
  import_tensorflow()
  from ilm_jax.data.input.reader import BatchReader

  shards = input_shards(inputs.batch_size[source], inputs.mesh)
  if converter.pack:
    began, asked = None if position is None else len(position), inputs.input_shards
    if began and asked and began != asked:
      raise UsageError(f'train.input_shards={asked}: this run began with {began}. Leave it out.')
    num_shards = began or asked or shards.host_count
    if num_shards % shards.host_count:
      raise UsageError(
        f'source {source!r}: the run began with batches packed in {num_shards} shards, which'
        f' {shards.host_count} processes cannot share evenly. A new run with'
        f' train.input_shards={shards.host_count} can go on with fewer processes, too.'
      )
    shards = input_shards(inputs.batch_size[source], inputs.mesh, num_shards)
    position = None if position is None else position[shards.local]
  return BatchReader(
    name,
    task_feature_lengths=lengths,
    converter=converter,
    shards=shards,
    seed=inputs.seed,
    start_step=start_step,
    position=position if converter.pack else None,
  )


def all_positions(reader: Reader, mesh: jax.sharding.Mesh) -> list[list[int]]:
  """[all shards, 2], where the readers of all processes stand; all must call it."""
  index, parts = batch_part(mesh)
  if parts == 1:
    return reader.position().tolist()
  found = multihost_utils.process_allgather((np.int32(index), reader.position().astype(np.int32)))
  first = [int(np.argmax(found[0] == part)) for part in range(parts)]
  return np.concatenate(found[1][first]).tolist()


def load_table(inputs: InputOptions, prepared: PreparedData) -> EntityTable:
  """The entity table that was asked for, or the data set's own.

  Raises:
    UsageError: it is of another data set.
  """
  directory = inputs.entity_table
  if directory is None:
    directory = inputs.data / read_metadata(inputs.data)['entity_table_dir']
  table = EntityTable.load(directory)
  table.check_data(prepared, str(directory))
  return table


def boxed_vectors(table: EntityTable, inputs: InputOptions) -> nn.LogicallyPartitioned:
  """The vectors of all entities, to be put on the devices by rows; zeros after the last."""
  rows = pad_rows(table.encoder_tokens, 'entities', inputs.mesh, inputs.rules)
  return nn.LogicallyPartitioned(rows, ('entities', 'cf'))

"""What the train loop asks of a phase."""

import abc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import jax
import numpy as np

from ilm_jax.errors import UsageError, did_you_mean

HostBatch = Mapping[str, np.ndarray]


class Reader(Protocol):
  """This host's rows of the global batches, in order (ilm_jax.data.reader.BatchReader)."""

  def __next__(self) -> dict[str, np.ndarray]: ...

  def position(self) -> np.ndarray: ...


class InputOptions(NamedTuple):
  """What every phase is built from.

  Attributes:
    data: directory of the prepared data set.
    entity_table: directory of another entity table than the data set's own, or None.
    batch_size: rows of a global batch, of each source.
    seed: of the order of the examples.
  """

  data: Path
  entity_table: Path | None
  batch_size: Mapping[str, int]
  seed: int


class Phase(abc.ABC):
  """A model with its data. `train` knows no more of it than this.

  Attributes:
    name: of the model, and of the phase.
    identity: for which model and data its checkpoints are, JSON values. Whatever makes parameters
      mean something else belongs here; what only decides how they are trained does not.
    frozen: arrays that are put on the devices once and never trained; boxed with their logical axes
      where they have some.
    best_metric, best_mode: what `evaluate` returns that says which checkpoint is best.
    headline: names of `evaluate` that are shown when it is done; the others are in the curves.
  """

  name: ClassVar[str]
  best_metric: ClassVar[str]
  best_mode: ClassVar[Literal['max', 'min']]
  headline: ClassVar[tuple[str, ...]]
  identity: dict[str, Any]
  frozen: Any

  @abc.abstractmethod
  def sources(self) -> tuple[str, ...]:
    """Names of the batch sources that a schedule may name."""

  @abc.abstractmethod
  def reader(self, source: str, start_step: int, position: np.ndarray | None) -> Reader:
    """Opens a source after `start_step` batches of it were taken."""

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


def check_sources(schedule: tuple[str, ...], sources: tuple[str, ...]) -> None:
  """Raises UsageError where the schedule names a source that the phase does not have."""
  if not schedule:
    raise UsageError(f'schedule is empty; sources: {", ".join(sources)}.')
  for source in schedule:
    if source not in sources:
      raise UsageError(
        f'schedule={list(schedule)}: no source {source!r}.{did_you_mean(source, sources)} Sources:'
        f' {", ".join(sources)}.'
      )

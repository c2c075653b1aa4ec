"""The batches of `ilm train` for T5X's train loop: see ilm_jax.phases.t5x_models.

A schedule's sources come in turn, in the order that `ilm train` has for the same seed, and a
restart goes on where the run was. T5X's own reading of SeqIO begins again.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import seqio
from clu.data import dataset_iterator
from etils import epath

from ilm_jax.data.input.reader import BatchReader, InputShards
from ilm_jax.errors import UsageError

SOURCE = 'source'  # of a batch: which of the schedule's, [B]


def get_dataset(
  cfg: Any,
  shard_id: int,
  num_shards: int,
  feature_converter_cls: Any,
  num_epochs: int | None = None,
  continue_from_last_checkpoint: bool = False,
) -> 'Batches':
  """The batches of `ilm train`, for train.get_dataset_fn: of a schedule's sources in turn.

  Args:
    cfg: T5X's DatasetConfig; its task is the model's, and it has a seed.
    shard_id, num_shards: of the hosts.
    feature_converter_cls: of the model.
    num_epochs, continue_from_last_checkpoint: only None and False.

  Raises:
    UsageError: a setting of `cfg` is not one of these.
  """
  model = feature_converter_cls.model
  wrong = {
    'num_epochs': num_epochs is not None,
    'continue_from_last_checkpoint': continue_from_last_checkpoint,
    f'shuffle={cfg.shuffle}': not cfg.shuffle,
    f'seed={cfg.seed}': cfg.seed is None,
    f'use_custom_packing_ops={cfg.use_custom_packing_ops}': cfg.use_custom_packing_ops,
    f'mixture_or_task_name={cfg.mixture_or_task_name!r}': (
      source_of(cfg.mixture_or_task_name, model.phase) != model.source
    ),
  }
  for setting in (name for name, is_wrong in wrong.items() if is_wrong):
    raise UsageError(
      f'train/DatasetConfig: {setting} does not go with t5x_batches.get_dataset, which shuffles by'
      ' a seed, without end, and takes the task of the model. With train.get_dataset_fn ='
      ' @utils.get_dataset T5X reads that task alone in its own way.'
    )
  return Batches(model, cfg, InputShards(cfg.batch_size, num_shards, shard_id, num_shards))


class Batches(dataset_iterator.DatasetIterator):
  """Batches of the sources of a schedule in turn, as of `ilm train`.

  A program takes batches of one kind. So a batch has the features of all sources by the names
  'SOURCE/FEATURE', zeros but for those of one, and says which one it is: 'source' [B]. Where there
  is one source, features have their own names.
  """

  def __init__(self, model: Any, cfg: Any, shards: InputShards):
    self._model, self._cfg, self._shards = model, cfg, shards
    self._schedule = model.schedule
    sources = tuple(dict.fromkeys(self._schedule))
    self._index = {source: i for i, source in enumerate(sources)}
    self._alone = sources == (model.source,)
    self._converters = {source: model.converter(source, pack=cfg.pack) for source in sources}
    rows = shards.batch_size // shards.host_count
    self._shapes: dict[str, tuple[int, ...]] = {} if self._alone else {SOURCE: (rows,)}
    for source, converter in self._converters.items():
      lengths = converter.get_model_feature_lengths(self._lengths(source))
      self._shapes |= {self._name(source, name): (rows, length) for name, length in lengths.items()}
    self.reset()

  def reset(self) -> None:
    self._begin(0, {}, {})

  @property
  def element_spec(self) -> dict[str, dataset_iterator.ArraySpec]:
    kind = np.dtype(np.int32)
    return {name: dataset_iterator.ArraySpec(kind, shape) for name, shape in self._shapes.items()}

  def __next__(self) -> dict[str, np.ndarray]:
    source = self._schedule[self._step % len(self._schedule)]
    found = next(self._readers[source])
    self._step += 1
    self._taken[source] += 1
    batch = {name: np.zeros(shape, np.int32) for name, shape in self._shapes.items()}
    if not self._alone:
      batch[SOURCE][:] = self._index[source]
    return batch | {self._name(source, name): x for name, x in found.items()}

  def save(self, filename: Any) -> None:
    position = {source: x.position().tolist() for source, x in self._readers.items()}
    state = {'step': self._step, 'taken': self._taken, 'position': position}
    epath.Path(filename).write_text(json.dumps(state))

  def restore(self, filename: Any) -> None:
    state = json.loads(epath.Path(filename).read_text())
    if {*state['taken']} != {*self._index}:
      raise UsageError(
        f'{filename} was saved of sources {sorted(state["taken"])}, and SCHEDULE has'
        f' {sorted(self._index)}.'
      )
    self._begin(state['step'], state['taken'], state['position'])

  def load(self, filename: Any) -> None:
    self.restore(filename)

  def _begin(self, step: int, taken: Mapping[str, int], position: Mapping[str, Any]) -> None:
    self._step = step
    self._taken = dict.fromkeys(self._index, 0) | dict(taken)
    self._readers = {
      source: BatchReader(
        _task_of(source, self._model.phase),
        split=self._cfg.split,
        task_feature_lengths=self._lengths(source),
        converter=converter,
        shards=self._shards,
        seed=self._cfg.seed,
        start_step=self._taken[source],
        position=np.asarray(position[source], np.int64) if position and converter.pack else None,
        use_cached=self._cfg.use_cached,
      )
      for source, converter in self._converters.items()
    }

  def _lengths(self, source: str) -> dict[str, int]:
    own = source == self._model.source
    return dict(self._cfg.task_feature_lengths if own else self._model.phase.steps.lengths(source))

  def _name(self, source: str, feature: str) -> str:
    return feature if self._alone else f'{source}/{feature}'


def source_of(task: str, phase: Any) -> str:
  """The name in a schedule of a SeqIO task or mixture."""
  return task.removeprefix(f'{phase.prepared.name}_')


def _task_of(source: str, phase: Any) -> str:
  own = f'{phase.prepared.name}_{source}'
  return own if own in {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()} else source

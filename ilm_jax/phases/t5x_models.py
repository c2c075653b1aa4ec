"""Both phases under T5X: `python -m t5x.train` with gin/t5x/phase1.gin or gin/t5x/phase2.gin.

T5X brings the loop, the partitioner, checkpoints and configuration. From here it gets

  T5XItemTextModel, T5XItemLanguageModel   t5x.models.BaseModel of a phase; losses are the phase's
  Trainer                                  t5x.trainer.Trainer that hands the steps what is frozen
  TrainStateInitializer                    begins with what `item_encoder.init_from` names
  learning_rates, adamw                    those of `ilm train`

and its batches from ilm_jax.phases.t5x_batches.

What is frozen (language model, entity table) is no part of T5X's train state: it is neither
differentiated nor saved, and has no optimizer slot. It is an argument of the compiled step; closed
over, it would be written into the program as literals.

T5X is on no package registry; docs/t5x.md says where it comes from and what was run. Letters: B
rows, K queries of an entity, F features.
"""

import abc
import copy
import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import seqio
from clu import metrics as clu_metrics
from flax import traverse_util
from flax.core import freeze, unfreeze
from flax.linen import partitioning
from jax.sharding import AxisType
from t5x import models, optimizers, trainer, utils  # pyright: ignore[reportMissingImports]

from ilm_jax.config.plugins import import_modules
from ilm_jax.errors import UsageError
from ilm_jax.phases.item_language_steps import ITEM_SEQUENCE
from ilm_jax.phases.phase import InputOptions, check_sources
from ilm_jax.phases.settings import PhaseSettings
from ilm_jax.phases.t5x_batches import SOURCE, source_of
from ilm_jax.phases.train_step import make_optimizer
from ilm_jax.runtime import sharding

_MODEL_AXIS = 'model'  # of T5X's meshes, the last; the others are for data

Batch = Mapping[str, Any]


class _Model(models.BaseModel, abc.ABC):
  """A phase as T5X's model.

  Attributes:
    phase: the phase of `ilm train`, with its data and its SeqIO tasks.
    source: of batches of a single task.
    schedule: sources of the batches of `get_dataset`, in turn.
  """

  _name: str  # of the phase

  def __init__(
    self,
    *,
    partitioner: Any,
    optimizer_def: Any,
    task: str,
    data: str,
    schedule: Sequence[str] = (),
    entity_table: str | None = None,
    modules: str | Sequence[str] = (),
    sharding_rules: Mapping[str, Any] | None = None,
    seed: int = 0,
    **options: Mapping[str, Any],
  ):
    """Loads the data, and the language model of phase 2, and registers the SeqIO tasks.

    Args:
      partitioner: a partitioner like the one that T5X trains with; its mesh is used.
      optimizer_def: T5X's.
      task: a SeqIO task or mixture: MIXTURE_OR_TASK_NAME, which T5X evaluates.
      data: a directory that `ilm prepare` made.
      schedule: sources, or SeqIO tasks, whose batches are taken in turn; by default `task` alone.
      entity_table, modules: as of `ilm train`.
      sharding_rules: changes of `ilm_jax.runtime.sharding.DEFAULT_RULES`, for what is frozen:
        T5X's axis 'data' is data there and 'model' is tensor. {'embed': 'data'} splits the language
        model over both.
      seed: of what the phase draws at its beginning.
      **options: item_encoder, losses, text and lm, as of `ilm train`.

    Raises:
      UsageError: a setting is wrong.
    """
    super().__init__(optimizer_def=optimizer_def)
    import_modules(modules)
    self._mesh = _same_devices(partitioner.mesh)
    self._rules = tuple((dict(sharding.DEFAULT_RULES) | dict(sharding_rules or {})).items())
    schedule = tuple(schedule) or (task,)
    inputs = InputOptions(
      Path(data).expanduser(),
      None if entity_table is None else Path(entity_table).expanduser(),
      dict.fromkeys((task, *schedule), 1),  # T5X makes the batches
      seed,
      self._mesh,
      self._rules,
    )
    self.phase: Any = PhaseSettings(self._name, options).make(inputs)
    self.source = source_of(task, self.phase)
    self.schedule = tuple(source_of(name, self.phase) for name in schedule)
    check_sources((self.source, *self.schedule), self.phase)
    self._frozen = sharding.place_constants(self.phase.frozen, self._mesh, self._rules)
    self._parts = 1

  @property
  def FEATURE_CONVERTER_CLS(self) -> Any:
    """What T5X makes feature converters with; `get_dataset` finds the model there."""
    return _Converters(self)

  @property
  def frozen(self) -> Any:
    """What is never trained, on the devices."""
    return self._frozen

  def bind(self, frozen: Any, parts: int = 1) -> Any:
    """This model with other arrays for what is frozen, as one of `parts` of a batch sees it.

    T5X adds the gradients of the parts up; a loss that is a mean is to be divided.
    """
    bound = copy.copy(self)
    bound._frozen, bound._parts = frozen, parts
    return bound

  def get_initial_variables(
    self, rng: jax.Array, input_shapes: Mapping[str, Any], input_types: Any = None
  ) -> Any:
    """Random parameters, and their logical axes as T5X wants them."""
    del input_shapes, input_types  # no parameter depends on a batch
    with nn.logical_axis_rules(()):  # how a dummy batch is split is nobody's business
      boxed = self.phase.init(rng)
    axes = traverse_util.flatten_dict(
      jax.tree.map(_logical_axes, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    )
    named = {(*path[:-1], f'{path[-1]}_axes'): names for path, names in axes.items()}
    return freeze({'params': nn.unbox(boxed), 'params_axes': traverse_util.unflatten_dict(named)})

  def load_pretrained(self, params: Any) -> Any:
    """Parameters of a new run, with what comes from elsewhere filled in."""
    return self.phase.load_pretrained(params, logging.getLogger(__name__).info)

  def loss_fn(self, params: Any, batch: Batch, dropout_rng: jax.Array | None) -> tuple[Any, Any]:
    """The loss and T5X's metrics, those of a source as 'SOURCE/NAME'.

    Args:
      params: what is trained.
      batch: of one source, or of `get_dataset`.
      dropout_rng: of dropout and of negatives; None: without dropout.
    """
    params = unfreeze(params)
    in_turn = SOURCE in batch
    losses = {
      source: functools.partial(
        self._loss, params, _rows_of(source, batch) if in_turn else batch, dropout_rng, source
      )
      for source in (dict.fromkeys(self.schedule) if in_turn else (self.source,))
    }
    index = batch[SOURCE][0] if in_turn else jnp.zeros((), jnp.int32)
    loss, found = _one_of(losses, index)
    average: Any = clu_metrics.Average
    metrics = {'loss': average(total=jnp.float32(loss), count=jnp.ones(()))}
    for i, source in enumerate(losses):
      here = jnp.float32(index == i)
      for name, value in found[source].items():
        metrics[f'{source}/{name}'] = average(total=jnp.float32(value) * here, count=here)
    return loss / self._parts, metrics

  @abc.abstractmethod
  def _loss(
    self, params: Any, batch: Batch, key: jax.Array | None, source: str
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The phase's loss of a batch and its metrics; without dropout where there is no key."""

  @abc.abstractmethod
  def converter(self, source: str, *, pack: bool) -> seqio.FeatureConverter:
    """SeqIO's feature converter of a source; only prompts are packed."""


class T5XItemTextModel(_Model):
  """Phase 1. T5X's inference gives features of items and texts, or -log p of the texts."""

  _name = 'item_text'

  def converter(self, source: str, *, pack: bool) -> seqio.FeatureConverter:
    del source, pack
    return self.phase.steps.converter()

  def predict_batch_with_aux(
    self, params: Any, batch: Batch, rng: jax.Array | None = None
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Unit features of items [B, K, F], and of their texts [B, F] as 'texts'."""
    del rng
    params = unfreeze(params)
    found = self.phase.steps.item_features(params, self.frozen, batch)
    return found['items'], {'texts': found['texts']}

  def score_batch(self, params: Any, batch: Batch, return_intermediates: bool = False) -> jax.Array:
    """log p of the texts [B], given their items."""
    _no_intermediates(return_intermediates)
    params = unfreeze(params)
    vectors = self.frozen.entity_vectors[jnp.maximum(batch['entity_ids'][:, 0], 0)]

    def score(vector, tokens, mask):
      return -self.phase.model.text_nll(params, vector[None], tokens[None], mask[None])[0]

    return jax.vmap(score)(vectors, batch['text_tokens'], batch['text_mask'])

  def _loss(self, params, batch, key, source):
    if key is not None:
      return self.phase.loss(params, self.frozen, batch, key, source)
    return self.phase.model.loss(
      params, self.frozen, batch, jax.random.key(0), source=source, deterministic=True
    )


class T5XItemLanguageModel(_Model):
  """Phase 2. T5X's inference gives log p of the targets of prompts."""

  _name = 'item_language'

  def converter(self, source: str, *, pack: bool) -> seqio.FeatureConverter:
    return self.phase.steps.converter(source, pack=pack)

  def predict_batch_with_aux(
    self, params: Any, batch: Batch, rng: jax.Array | None = None
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Raises UsageError: T5X's decoding knows no catalogue."""
    raise UsageError(
      'T5X cannot recommend: its decoding knows no catalogue. It can score (`score_batch`).'
    )

  def score_batch(self, params: Any, batch: Batch, return_intermediates: bool = False) -> jax.Array:
    """log p of the targets [B], of a task of prompts that are not packed."""
    _no_intermediates(return_intermediates)
    target_loss = self.phase.steps.target_loss(self.source)
    params = unfreeze(params)
    return -self.phase.steps.task_nll(params, self.frozen, batch, target_loss)[0]

  def _loss(self, params, batch, key, source):
    steps, frozen = self.phase.steps, self.frozen
    if key is not None:
      return steps.loss(params, frozen, batch, key, source)
    key = jax.random.key(0)
    if source == ITEM_SEQUENCE:
      ids = batch['entity_ids']
      return steps.model.readout_loss(params, frozen, ids, key, deterministic=True)
    return steps.model.loss(
      params, frozen, batch, key, target_loss=steps.target_loss(source), deterministic=True
    )


# ---------------------------------------------------------------- what is trained, and what is not


class Trainer(trainer.Trainer):
  """T5X's trainer, whose steps have what is frozen as an argument."""

  _model: Any

  @functools.cached_property
  def _partitioned_train_step(self) -> Any:
    def train_step(train_state, batch, frozen):
      return trainer.train_with_lr(
        train_state,
        batch,
        learning_rate=self._learning_rate_fn(train_state.step),
        dropout_rng=self._get_step_rng(train_state.step),
        model=self._model.bind(frozen, self._num_microbatches or 1),
        num_microbatches=self._num_microbatches,
        weight_metrics_computer=self._weight_metrics_computer,
        data_partition_spec=self._partitioner.data_partition_spec,
      )

    return self._partition(train_step, (self._train_state_axes, None), donate_argnums=(0,))

  @functools.cached_property
  def _partitioned_eval_step(self) -> Any:
    def eval_step(train_state, batch, frozen):
      return trainer.eval_step(self._model.bind(frozen), train_state, batch)

    return self._partition(eval_step, None)

  def _partition(self, step: Any, outputs: Any, **kwargs: Any) -> '_Step':
    frozen = self._model.frozen
    inputs = (
      self._train_state_axes,
      self._partitioner.data_partition_spec,
      jax.tree.map(lambda x: x.sharding, frozen),
    )
    function = self._partitioner.partition(
      step, in_axis_resources=inputs, out_axis_resources=outputs, **kwargs
    )
    return _Step(function, frozen)


@dataclasses.dataclass(frozen=True)
class _Step:
  """A function, lowered or compiled or neither, with its last argument."""

  function: Any
  frozen: Any

  def __call__(self, *args: Any) -> Any:
    return self.function(*args, self.frozen)

  def lower(self, *args: Any) -> '_Step':
    return _Step(self.function.lower(*args, self.frozen), self.frozen)

  def compile(self) -> '_Step':
    return _Step(self.function.compile(), self.frozen)


class TrainStateInitializer(utils.TrainStateInitializer):
  """T5X's, which begins a new run with what `item_encoder.init_from` names (BERT, phase 1)."""

  def __init__(self, optimizer_def: Any, init_fn: Any, *args: Any, **kwargs: Any):
    super().__init__(optimizer_def, init_fn, *args, **kwargs)
    self._model = init_fn.__self__

  def from_scratch(self, init_rng: jax.Array) -> Any:
    state = super().from_scratch(init_rng)
    params = self._model.load_pretrained(unfreeze(state.params))
    return state.replace_params(freeze(params))


# ---------------------------------------------------------------- data


@dataclasses.dataclass(frozen=True)
class _Converters:
  """What T5X calls for a feature converter."""

  model: _Model

  def __call__(
    self, pack: bool = False, use_custom_packing_ops: bool = False
  ) -> seqio.FeatureConverter:
    if use_custom_packing_ops:
      raise UsageError('DatasetConfig.use_custom_packing_ops=True: its packing knows no entities.')
    return self.model.converter(self.model.source, pack=pack)


# ---------------------------------------------------------------- the optimizer of `ilm train`


def learning_rates(
  *, learning_rate: float, total_steps: int, warmup_steps: int, final_learning_rate: float = 0.0
) -> Callable[[Any], Any]:
  """Warm-up and cosine, as of `ilm train`."""
  return optax.warmup_cosine_decay_schedule(
    0.0, learning_rate, min(warmup_steps, total_steps // 2), total_steps, final_learning_rate
  )


def adamw(
  *,
  learning_rates: Callable[[Any], Any],
  weight_decay: float = 0.05,
  adam_b1: float = 0.9,
  adam_b2: float = 0.98,
  clip_norm: float = 1.0,
) -> Any:
  """The optimizer of `ilm train` as T5X's. T5X's own learning rate is shown and not used."""
  return optimizers.OptaxWrapper(
    make_optimizer(learning_rates, clip_norm, b1=adam_b1, b2=adam_b2, weight_decay=weight_decay)
  )


# ---------------------------------------------------------------- inside


def _same_devices(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
  """T5X's mesh under our names, for what is frozen: all its data axes are ours, 'model' tensor."""
  # Not jax.make_mesh, which may reorder the devices; a program has them in one order.
  devices = mesh.devices.reshape(-1, 1, mesh.shape[_MODEL_AXIS])
  return jax.sharding.Mesh(devices, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def _logical_axes(leaf: Any) -> partitioning.AxisMetadata:
  names = leaf.names if isinstance(leaf, nn.Partitioned) else (None,) * leaf.ndim
  return partitioning.AxisMetadata(names=jax.sharding.PartitionSpec(*names))


def _rows_of(source: str, batch: Batch) -> dict[str, jax.Array]:
  own = f'{source}/'
  return {name.removeprefix(own): x for name, x in batch.items() if name.startswith(own)}


def _one_of(
  losses: Mapping[str, Callable[[], Any]], index: jax.Array
) -> tuple[jax.Array, dict[str, Any]]:
  """The loss of the source at `index`, and metrics of every source: zeros but for that one's."""
  shapes = {source: jax.eval_shape(loss)[1] for source, loss in losses.items()}
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

  def branch(source: str) -> Callable[[], tuple[jax.Array, dict[str, Any]]]:
    def run():
      loss, found = losses[source]()
      return loss, {**zeros, source: found}

    return run

  return jax.lax.switch(index, [branch(source) for source in losses])


def _no_intermediates(asked: bool) -> None:
  if asked:
    raise UsageError('score_batch: return_intermediates=True; allowed: False.')

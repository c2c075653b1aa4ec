"""One step of training: gradients of a batch, or of its parts, and AdamW."""

import functools
from collections.abc import Mapping
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from ilm_jax.runtime import sharding

# Parameters by these names are matrices or tables: weight decay is for them alone.
_DECAYED = ('kernel', 'embedding', 'queries', 'positions')


@flax.struct.dataclass
class TrainState:
  """What a checkpoint holds. Frozen parameters are no part of it.

  Attributes:
    step: [] int32, how many steps were done.
    params: what is trained.
    opt_state: of `params` alone.
  """

  step: Any
  params: Any
  opt_state: Any


class Trained(Protocol):
  """What a step knows of a phase; `ilm compile` has no more of it."""

  def init(self, key: jax.Array) -> Any: ...

  def loss(
    self, params: Any, frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array, source: str
  ) -> tuple[jax.Array, dict[str, jax.Array]]: ...


def make_optimizer(
  learning_rates: Any,
  clip_norm: float,
  *,
  b1: float,
  b2: float,
  weight_decay: float,
  item_encoder_rate: float = 1.0,
) -> optax.GradientTransformation:
  """AdamW after a clipped gradient; what it does to 'item_encoder' times item_encoder_rate."""
  parts = [
    optax.clip_by_global_norm(clip_norm),
    optax.adamw(learning_rates, b1=b1, b2=b2, weight_decay=weight_decay, mask=is_decayed),
  ]
  if item_encoder_rate != 1:
    parts.append(optax.masked(optax.scale(item_encoder_rate), _is_of_item_encoder))
  return optax.chain(*parts)


def jit_step(
  phase: Trained, optimizer: optax.GradientTransformation, parts: int, state: TrainState
) -> Any:
  """(state, frozen, batch, key, source=...) -> (state, metrics), the old state given up for it.

  The new state is where the old one was; `state`, arrays or shapes, says where.
  """
  step_of = functools.partial(train_step, phase=phase, optimizer=optimizer, parts=parts)
  stays = jax.tree.map(lambda x: x.sharding, state)
  return jax.jit(step_of, static_argnames='source', donate_argnums=0, out_shardings=(stays, None))


def abstract_state(phase: Trained, optimizer: Any, mesh: Any, rules: Any) -> TrainState:
  """Shapes and shardings of the state, nothing computed."""
  params = sharding.abstract_init(phase.init, mesh, rules, jax.random.key(0))
  opt_state = jax.eval_shape(optimizer.init, params)
  shardings = sharding.mirrored_shardings(opt_state, params, mesh)
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return TrainState(
    jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
    params,
    jax.tree.map(lambda x, s: x.update(sharding=s), opt_state, shardings),
  )


def train_step(
  state: TrainState,
  frozen: Any,
  batch: Mapping[str, jax.Array],
  key: jax.Array,
  *,
  source: str,
  phase: Trained,
  optimizer: optax.GradientTransformation,
  parts: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One step. Randomness depends on (seed, step) alone, so that a restart repeats it."""
  key = jax.random.fold_in(key, state.step)

  def gradient(rows, key):
    (_, metrics), gradients = jax.value_and_grad(phase.loss, has_aux=True)(
      state.params, frozen, rows, key, source
    )
    return gradients, metrics

  if parts == 1:
    gradients, metrics = gradient(batch, key)
  else:

    def add(total, part):
      return jax.tree.map(lambda x, y: x + y / parts, total, gradient(*part)), None

    each = _split(batch, parts), jax.random.split(key, parts)
    shapes = jax.eval_shape(gradient, *jax.tree.map(lambda x: x[0], each))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, _mean_dtype(x.dtype)), shapes)
    (gradients, metrics), _ = jax.lax.scan(add, zeros, each)
  updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  norms = [jnp.linalg.norm(x) for x in traverse_util.flatten_dict(gradients).values()]
  metrics |= {'gradient_norm': optax.global_norm(gradients), 'gradient_norms': jnp.stack(norms)}
  return TrainState(state.step + 1, params, opt_state), metrics


def _mean_dtype(dtype: Any) -> Any:
  """Of counts, too, a mean is taken."""
  return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.float32


def _split(batch: Mapping[str, jax.Array], parts: int) -> dict[str, jax.Array]:
  """[B, ...] -> [parts, B / parts, ...], each part with rows of every device."""
  return {
    name: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
    for name, x in batch.items()
  }


def is_decayed(params: Any) -> Any:
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in _DECAYED, params)


def _is_of_item_encoder(params: Any) -> Any:
  return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == 'item_encoder', params)

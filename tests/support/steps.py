"""Steps of a phase's model on one device and on eight, which are the same."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

ALL_AXES = {'data': 2, 'fsdp': 2, 'tensor': 2}
MESHES = [
  ALL_AXES,
  pytest.param({'data': 8}, marks=pytest.mark.slow),
  pytest.param({'data': 1, 'fsdp': 4, 'tensor': 2}, marks=pytest.mark.slow),
]
_OPTIMIZER = optax.sgd(1.0)  # Adam divides by gradients, and with them by their rounding errors


def random_params(init: Callable[..., Any], key: jax.Array) -> Any:
  """Random everywhere: at their initial values, biases and temperatures would hide mistakes."""
  rng = np.random.default_rng(0)
  initial = nn.meta.unbox(jax.jit(init)(key))
  return jax.tree.map(lambda x: np.asarray(x + 0.1 * rng.normal(size=x.shape), np.float32), initial)


def step_of(loss_of: Callable[..., Any]) -> Callable[..., Any]:
  """(params, frozen, batch, source) -> (loss, metrics, gradients, parameters after a step).

  Args:
    loss_of: of the same arguments; (loss, metrics).
  """

  def step(params, frozen, batch, source):
    (value, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(
      params, frozen, batch, source
    )
    updates, _ = _OPTIMIZER.update(gradients, _OPTIMIZER.init(params))
    return value, metrics, gradients, optax.apply_updates(params, updates)

  return step

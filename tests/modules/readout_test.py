"""The readout against its formula in NumPy."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ilm_jax.modules.readout import Readout, log_popularity

M, D, NUM_ITEMS, FEATURES = 5, 12, 9, 7
RNG = np.random.default_rng(0)
HIDDEN = 3 * RNG.normal(size=(M, D)).astype(np.float32)
VECTORS = RNG.normal(2, 5, size=(NUM_ITEMS, FEATURES)).astype(np.float32)
COUNTS = np.array([3, 0, 50, 7, 1, 1, 20, 0, 4])
POPULARITY = np.log((COUNTS + 1) / (COUNTS + 1).sum())
MODULE = Readout(FEATURES)
PARAMS = {
  'kernel': RNG.normal(size=(D, FEATURES)).astype(np.float32),
  'popularity_weight': jnp.float32(0.7),
}


def scores(params, hidden: Any = HIDDEN, vectors=VECTORS, popularity=POPULARITY):
  return np.asarray(MODULE.apply({'params': params}, hidden, vectors, jnp.float32(popularity)))


def by_hand(hidden, vectors, popularity):
  """One score after the other."""
  kernel = np.asarray(PARAMS['kernel'], np.float64)
  out = np.zeros((len(hidden), len(vectors)))
  for m, i in np.ndindex(*out.shape):
    h, v = hidden[m].astype(np.float64), vectors[i].astype(np.float64)
    said = (h / np.sqrt(np.mean(h**2))) @ kernel
    out[m, i] = said @ ((v - v.mean()) / v.std()) + 0.7 * popularity[i]
  return out


def test_scores_are_the_formula():
  expected = by_hand(HIDDEN, VECTORS, POPULARITY)
  np.testing.assert_allclose(scores(PARAMS), expected, rtol=1e-4, atol=1e-4)


def test_items_of_its_own_for_each_position():
  items = RNG.integers(0, NUM_ITEMS, (M, 3))
  expected = np.take_along_axis(by_hand(HIDDEN, VECTORS, POPULARITY), items, axis=1)
  found = scores(PARAMS, vectors=VECTORS[items], popularity=POPULARITY[items])
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('weight', [1.0, 0.0, 2.5])
def test_training_begins_at_popularity_and_can_leave_it(weight):
  module = Readout(FEATURES, weight)
  variables = module.init(jax.random.key(0), HIDDEN, VECTORS, jnp.float32(POPULARITY))
  params = nn.meta.unbox(variables)['params']
  found = module.apply({'params': params}, HIDDEN, VECTORS, jnp.float32(POPULARITY))
  expected = np.float32(weight) * POPULARITY.astype(np.float32)
  np.testing.assert_array_equal(found, np.tile(expected, (M, 1)))

  def loss(params):
    logits = module.apply({'params': params}, HIDDEN, VECTORS, jnp.float32(POPULARITY))
    return -jax.nn.log_softmax(jnp.asarray(logits))[:, 3].sum()

  for gradient in jax.tree.leaves(jax.grad(loss)(params)):
    assert np.abs(gradient).max() > 0.1


def test_states_in_half_precision_are_summed_in_single():
  half = jnp.asarray(HIDDEN, jnp.bfloat16)
  expected = by_hand(np.asarray(half, np.float32), VECTORS, POPULARITY)
  np.testing.assert_allclose(scores(PARAMS, hidden=half), expected, rtol=1e-4, atol=1e-4)


def test_nothing_is_divided_by_zero():
  params = jax.tree.map(jnp.asarray, PARAMS)
  zeros = jnp.zeros((1, D)), jnp.zeros((2, FEATURES)), jnp.zeros(2)

  def total(params, hidden, vectors):
    return jnp.asarray(MODULE.apply({'params': params}, hidden, vectors, zeros[2])).sum()

  gradients = jax.grad(total, argnums=(0, 1, 2))(params, *zeros[:2])
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_log_popularity():
  found = log_popularity(COUNTS)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, POPULARITY, rtol=1e-6)
  np.testing.assert_allclose(np.exp(found).sum(), 1, rtol=1e-6)

"""What has a backward pass of its own, against flax's and JAX's, and their gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ilm_jax.modules.backward import ACTIVATIONS, gated, gelu, softmax
from ilm_jax.modules.layers import LayerNorm, RMSNorm

X = np.random.default_rng(0).normal(0.3, 2.0, (5, 7, 30)).astype(np.float32)


def value_and_gradients(function, *args):
  """Of a sum that weighs every element differently."""
  weights = np.random.default_rng(1).normal(size=X.shape).astype(np.float32)
  wrt = tuple(range(len(args)))
  total = jax.value_and_grad(lambda *args: (function(*args) * weights).sum(), argnums=wrt)
  return function(*args), total(*args)[1]


@pytest.mark.parametrize(
  ('ours', 'theirs', 'names'),
  [
    (LayerNorm(1e-6, jnp.float32), nn.LayerNorm(epsilon=1e-6), ('scale', 'bias')),
    (RMSNorm(1e-6, jnp.float32), nn.RMSNorm(epsilon=1e-6), ('scale',)),
  ],
)
def test_norms_are_flaxs(ours, theirs, names):
  rng = np.random.default_rng(2)
  params = {name: rng.normal(size=30).astype(np.float32) for name in names}
  found, expected = (
    value_and_gradients(lambda x, p, m=m: m.apply({'params': p}, x), X, params)
    for m in (ours, theirs)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), found, expected)
  shapes = jax.tree.map(jnp.shape, nn.meta.unbox(ours.init(jax.random.key(0), X)))
  assert shapes == jax.tree.map(jnp.shape, theirs.init(jax.random.key(0), X))


@pytest.mark.parametrize(('saved', 'tolerance'), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-7)])
def test_gelu_is_jaxs_and_so_is_its_gradient(saved, tolerance):
  found, (gradient,) = value_and_gradients(lambda x: gelu(x, saved), X)
  expected, (wanted,) = value_and_gradients(lambda x: jax.nn.gelu(x, approximate=False), X)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(gradient, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('as_branch', [False, True])
@pytest.mark.parametrize(('saved', 'tolerance'), [(jnp.float32, 1e-5), (jnp.bfloat16, 2**-7)])
@pytest.mark.parametrize('activation', ACTIVATIONS)
def test_a_gate_is_a_product_and_so_are_its_gradients(activation, saved, tolerance, as_branch):
  up = np.random.default_rng(3).normal(size=X.shape).astype(np.float32)
  found, gradients = value_and_gradients(
    jax.jit(lambda gate, up: gated(gate, up, activation, saved, as_branch)), X, up
  )
  expected, wanted = value_and_gradients(lambda a, b: ACTIVATIONS[activation](a) * b, X, up)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  for ours, theirs in zip(gradients, wanted, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def test_softmax_is_jaxs_with_masked_scores_too():
  scores = np.where(np.random.default_rng(4).random(X.shape) < 0.3, -1e30, 10 * X)
  scores[0, 0] = -1e30  # nothing is seen
  found = value_and_gradients(lambda x: softmax(x, jnp.float32), scores.astype(np.float32))
  expected = value_and_gradients(lambda x: jax.nn.softmax(x, axis=-1), scores.astype(np.float32))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
  rounded = softmax(X, jnp.bfloat16)
  assert rounded.dtype == jnp.bfloat16
  np.testing.assert_array_equal(rounded, jax.nn.softmax(X, axis=-1).astype(jnp.bfloat16))


@pytest.mark.parametrize('saved', [jnp.float32, jnp.bfloat16])
def test_what_is_kept_is_no_larger_than_it_says(saved):
  """Of a gate: two arrays in the dtype that is asked for, and nothing else of that size."""
  x = jnp.asarray(X)
  _, pull = jax.vjp(lambda gate, up: gated(gate, up, 'silu', saved, False), x, x)
  kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.size >= X.size]
  assert [leaf.dtype for leaf in kept] == [saved, saved]

"""Dropout, LayerNorm and GELU of the Q-Former against flax's and JAX's own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ilm_jax.modules.dropout import Dropout, random_bytes
from ilm_jax.modules.layers import LayerNorm, gelu

X = np.random.default_rng(0).normal(0.3, 2.0, (5, 7, 30)).astype(np.float32)


def value_and_gradients(function, *args):
  """Of a sum that weighs every element differently."""
  weights = np.random.default_rng(1).normal(size=X.shape).astype(np.float32)
  wrt = tuple(range(len(args)))
  total = jax.value_and_grad(lambda *args: (function(*args) * weights).sum(), argnums=wrt)
  return function(*args), total(*args)[1]


def test_layer_norm_is_flaxs():
  rng = np.random.default_rng(2)
  params = {name: rng.normal(size=30).astype(np.float32) for name in ('scale', 'bias')}
  ours, theirs = LayerNorm(1e-6, jnp.float32), nn.LayerNorm(epsilon=1e-6)
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


@pytest.mark.parametrize('last', [1, 4, 30])
def test_bytes_are_uniform_and_independent(last):
  shape = (40_000 // last, last)
  drawn = np.asarray(random_bytes(jax.random.key(0), shape))
  assert drawn.shape == shape
  assert drawn.dtype == np.uint8
  counts = np.bincount(drawn.reshape(-1), minlength=256)
  expected = drawn.size / 256
  # Chi-square of 255 degrees of freedom: mean 255, deviation 22.6.
  assert ((counts - expected) ** 2 / expected).sum() < 255 + 5 * 22.6
  if last > 1:
    noise = np.corrcoef(drawn.astype(float), rowvar=False) - np.eye(last)
    assert np.abs(noise).max() < 6 / np.sqrt(shape[0])


def test_dropout_keeps_the_mean_and_drops_as_often_as_it_says():
  x = jnp.ones((200, 501))
  found = Dropout(0.1).apply({}, x, deterministic=False, rngs={'dropout': jax.random.key(0)})
  dropped = np.asarray(found) == 0
  assert dropped.mean() == pytest.approx(26 / 256, abs=0.003)
  np.testing.assert_allclose(np.asarray(found)[~dropped], 256 / 230, rtol=1e-6)
  assert Dropout(0.1).apply({}, x, deterministic=True) is x
  assert Dropout(0.0).apply({}, x, deterministic=False) is x
  everything = Dropout(1.0).apply({}, x, deterministic=False, rngs={'dropout': jax.random.key(0)})
  np.testing.assert_array_equal(everything, 0)

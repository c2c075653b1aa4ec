"""T5's relative position bias: the buckets in NumPy, and both ways to look them up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ilm_jax.modules import relative_bias
from ilm_jax.modules.relative_bias import relative_buckets


def buckets_of(distances, **kwargs):
  keys = jnp.asarray(distances)[None] + 1000
  return np.asarray(relative_buckets(jnp.full((1, 1), 1000), keys, **kwargs))[0, 0]


def test_the_docstring_is_true():
  back = -np.arange(14)
  got = buckets_of(back, bidirectional=False, num_buckets=8, max_distance=16)
  assert got.tolist() == [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7]


@pytest.mark.parametrize('bidirectional', [False, True])
@pytest.mark.parametrize(('num_buckets', 'max_distance'), [(32, 128), (16, 100), (64, 1000)])
def test_half_exact_half_logarithmic(bidirectional, num_buckets, max_distance):
  distances = np.arange(-1500, 1501)
  size = num_buckets // 2 if bidirectional else num_buckets
  exact = size // 2
  away = np.abs(distances) if bidirectional else np.maximum(-distances, 0)
  steps = np.log(np.maximum(away, exact) / exact) / np.log(max_distance / exact) * (size - exact)
  expected = np.where(away < exact, away, np.minimum(exact + np.floor(steps + 1e-9), size - 1))
  expected += np.where(distances > 0, size, 0) if bidirectional else 0
  got = buckets_of(
    distances, bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
  )
  np.testing.assert_array_equal(got, expected)
  assert got.max() == num_buckets - 1


def test_places_that_a_cache_has_not_written_do_not_overflow():
  unwritten = np.iinfo(np.int32).max - 1000
  assert buckets_of([unwritten], bidirectional=False, num_buckets=32, max_distance=128) == [0]


def test_a_product_with_one_hot_buckets_is_a_lookup():
  rng = np.random.default_rng(0)
  embedding = jnp.asarray(rng.normal(size=(3, 8)), jnp.float32)
  buckets = jnp.asarray(rng.integers(0, 8, (2, 4, 5)))
  weights = jnp.asarray(rng.normal(size=(2, 3, 4, 5)), jnp.float32)

  def both(look_up):
    return jax.value_and_grad(lambda e: (look_up(e, buckets) * weights).sum())(embedding)

  expected = np.asarray(embedding)[:, np.asarray(buckets)].swapaxes(0, 1)
  np.testing.assert_array_equal(relative_bias.by_gather(embedding, buckets), expected)
  np.testing.assert_allclose(relative_bias.by_product(embedding, buckets), expected, rtol=1e-6)
  for got, same in zip(both(relative_bias.by_gather), both(relative_bias.by_product)):
    np.testing.assert_allclose(got, same, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('platform', 'operation'), [('cpu', 'gather'), ('tpu', 'dot_general')])
def test_a_tpu_multiplies_where_others_look_up(platform, operation):
  module = relative_bias.RelativeBias(2, 8, jnp.float32)
  variables = {'params': {'embedding': jnp.ones((2, 8))}}
  traced = jax.jit(module.apply).trace(variables, jnp.zeros((1, 3, 3), jnp.int32))
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  other = {'gather', 'dot_general'} - {operation}
  assert operation in text
  assert not any(word in text for word in other)

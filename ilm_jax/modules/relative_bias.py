"""T5's relative position bias: a learnt number per head and bucket of distances, added to scores.

Raffel et al. 2020, arXiv:1910.10683. Made of positions, so that packed rows, caches and trees of
continuations need nothing else.

Letters: B batch, T queries, S keys, H heads, K buckets.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ilm_jax.runtime.sharding import with_axes


def relative_buckets(
  queries: jax.Array,
  keys: jax.Array,
  *,
  bidirectional: bool,
  num_buckets: int,
  max_distance: int,
) -> jax.Array:
  """Buckets of the distances from queries to keys.

  Half of the buckets are of one distance each; the others are equal steps of the logarithm up to
  max_distance, and the last one has no end. With 8 buckets and max_distance=16, 4 steps from 4 to
  16 would start at 4, 5.7, 8 and 11.3:

    key before query by   0 1 2 3 4 5 6 7 8 9 10 11 12 13 ...
    bucket                0 1 2 3 4 4 5 5 6 6  6  6  7  7 ...

  Keys after their query are in bucket 0; if bidirectional, in buckets of their own, the second
  half of them.

  Args:
    queries, keys: positions [B or 1, T] and [B or 1, S], int32.
    bidirectional: in encoders.
    num_buckets: K.
    max_distance: see above.

  Returns:
    [B or 1, T, S] int32.
  """
  distances = keys[:, None, :] - queries[:, :, None]
  if not bidirectional:
    return _bucket(jnp.maximum(-distances, 0), num_buckets, max_distance)
  half = num_buckets // 2
  return _bucket(jnp.abs(distances), half, max_distance) + half * (distances > 0)


def _bucket(distances: jax.Array, num_buckets: int, max_distance: int) -> jax.Array:
  starts = _starts(num_buckets, max_distance)
  return jnp.searchsorted(starts, distances, side='right', method='compare_all').astype(jnp.int32)


def _starts(num_buckets: int, max_distance: int) -> np.ndarray:
  """The smallest distance in bucket 1, 2, ...: in whole numbers, which no logarithm rounds."""
  exact = num_buckets // 2
  steps = num_buckets - exact
  starts = list(range(1, exact + 1))
  for step in range(1, steps):
    # distance >= exact * (max_distance / exact) ** (step / steps)
    least = max_distance**step * exact ** (steps - step)
    starts.append(next(d for d in range(exact, max_distance + 1) if d**steps >= least))
  return np.array(starts, np.int32)


class RelativeBias(nn.Module):
  """[B, T, S] buckets -> what is added to the scores, [B, H, T, S]."""

  num_heads: int
  num_buckets: int
  dtype: Any

  @nn.compact
  def __call__(self, buckets: jax.Array) -> jax.Array:
    init = with_axes(nn.initializers.variance_scaling(1, 'fan_avg', 'uniform'), ('heads', None))
    shape = (self.num_heads, self.num_buckets)
    embedding: Any = self.param('embedding', init, shape, jnp.float32)
    embedding = embedding.astype(self.dtype)
    # Where gathers are slow and products cost nothing.
    return jax.lax.platform_dependent(embedding, buckets, tpu=by_product, default=by_gather)


def by_gather(embedding: jax.Array, buckets: jax.Array) -> jax.Array:
  """[H, K], [B, T, S] -> [B, H, T, S]."""
  return embedding[:, buckets].swapaxes(0, 1)


def by_product(embedding: jax.Array, buckets: jax.Array) -> jax.Array:
  """The same."""
  one_hot = jax.nn.one_hot(buckets, embedding.shape[1], dtype=embedding.dtype)
  return jnp.einsum('hk,btsk->bhts', embedding, one_hot, precision='highest')

"""Ranking read off a language model's hidden state: a linear map, and a dot product with items.

  score(i) = (W h / rms(h)) . norm(v_i) + w log p_i

h is the state after a prompt, v_i what the item encoder says of item i, p_i its share of the
training rows. W begins at 0, and so does w: on MovieLens-100K, a beginning at popularity (w = 1)
learned more slowly what is not popularity. (Beyond the paper; ilm_jax's own.)

Letters: M positions, D width of the language model, I items, F width of the item encoder.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ilm_jax.runtime.sharding import with_axes

_EPSILON = 1e-6


class Readout(nn.Module):
  """Scores of items. `popularity_weight`: where w begins."""

  num_features: int
  popularity_weight: float = 0.0

  @nn.compact
  def __call__(self, hidden: jax.Array, vectors: jax.Array, log_popularity: jax.Array) -> jax.Array:
    """[M, D] against all items, [M, I]; or each against its own items, where those are [M, I, F].

    Args:
      hidden: [M, D], of the language model.
      vectors: [I, F] or [M, I, F], `Encoded.vectors`.
      log_popularity: [I] or [M, I].
    """
    init = with_axes(nn.initializers.zeros, ('embed', None))
    kernel: Any = self.param('kernel', init, (hidden.shape[-1], self.num_features), jnp.float32)
    begin = nn.initializers.constant(self.popularity_weight)
    weight: Any = self.param('popularity_weight', begin, (), jnp.float32)
    hidden = hidden.astype(jnp.float32)
    hidden *= jax.lax.rsqrt(jnp.mean(jnp.square(hidden), axis=-1, keepdims=True) + _EPSILON)
    # Of no use to the order of items, but to the scale of what is learned.
    vectors = nn.LayerNorm(use_scale=False, use_bias=False)(vectors)
    shared = 'md,df,if->mi' if vectors.ndim == 2 else 'md,df,mif->mi'
    return jnp.einsum(shared, hidden, kernel, vectors) + weight * log_popularity


def log_popularity(counts: Any) -> jax.Array:
  """[I] log of each item's share of the training rows, one added to each count."""
  counts = jnp.asarray(counts, jnp.float32) + 1
  return jnp.log(counts / counts.sum())

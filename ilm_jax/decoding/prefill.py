"""Prompts of different length, read at once."""

from typing import Any

import jax
import jax.numpy as jnp

from ilm_jax.modules.attention import Cache, NewTokens
from ilm_jax.modules.decoder import Decoder
from ilm_jax.modules.t5 import T5


def prefill(
  lm: Decoder | T5,
  params: Any,
  embeddings: jax.Array,
  lengths: jax.Array,
  *,
  cache: Cache | None = None,
) -> tuple[jax.Array, NewTokens]:
  """Reads prompts.

  Args:
    lm: a decoder, or a T5 that is one; `params` its parameters.
    embeddings: [B, T, D], padded on the right.
    lengths: [B], tokens of each.
    cache: of one row: tokens 0 to `cache.length` - 1, which come before all prompts.

  Returns:
    Hidden states [B, D] of the last tokens; and the tokens [B, T] as a cache takes them, padding
    in segment 0, which nobody sees.
  """
  batch, length, _ = embeddings.shape
  first = 0 if cache is None else cache.length
  positions = jnp.broadcast_to(first + jnp.arange(length, dtype=jnp.int32), (batch, length))
  segment_ids = (jnp.arange(length) < lengths[:, None]).astype(jnp.int32)
  read: Any = lm.apply({'params': params}, embeddings, positions, segment_ids, cache=cache)
  hidden, new = read
  at = jnp.maximum(lengths - 1, 0)[:, None, None]
  return jnp.take_along_axis(hidden, at, axis=1)[:, 0], new

"""Losses over a language model's vocabulary, in memory that does not grow with it.

Letters: M positions, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ilm_jax.runtime.sharding import batch_parts


def token_nll(
  logits: Callable[[jax.Array], jax.Array],
  hidden: jax.Array,
  targets: jax.Array,
  *,
  chunk: int = 256,
) -> jax.Array:
  """-log p of each target, a chunk of positions at a time, forward and backward.

  A batch of 32 x 128 targets of a vocabulary of 262,144 has 4 GB of logits; a chunk of 256, 256 MB.
  What the backward pass needs of a chunk is computed again.

  Args:
    logits: [m, D] -> [m, V] float32, of the language model.
    hidden: [M, D]. Give the positions that have a target, and no others.
    targets: [M] int32.
    chunk: positions at a time, of each device.

  Returns:
    [M] float32, in nats.
  """
  return in_chunks(lambda part: _nll(logits(part[0]), part[1]), (hidden, targets), chunk)


def in_chunks(
  one: Callable[[Any], jax.Array], rows: tuple[jax.Array, ...], chunk: int
) -> jax.Array:
  """one(arrays [m, ...]) -> [m] of arrays [M, ...], for `chunk` positions of each device at a time.

  What the backward pass needs of a chunk is computed again.
  """
  positions = rows[0].shape[0]
  parts = batch_parts(positions)
  own = positions // parts
  if own <= chunk:
    return one(rows)
  chunks = -(-own // chunk)

  def split(x: jax.Array) -> jax.Array:
    x = x.reshape(parts, own, *x.shape[1:])
    x = jnp.pad(x, ((0, 0), (0, chunks * chunk - own), *((0, 0),) * (x.ndim - 2)))
    x = x.reshape(parts, chunks, chunk, *x.shape[2:]).swapaxes(0, 1)
    return x.reshape(chunks, parts * chunk, *x.shape[3:])

  found = jax.lax.map(jax.checkpoint(one), tuple(split(x) for x in rows))
  found = found.reshape(chunks, parts, chunk).swapaxes(0, 1).reshape(parts, -1)
  return found[:, :own].reshape(-1)


def _nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
  # A masked sum, not a gather, which a vocabulary that is split over devices makes costly.
  is_target = targets[:, None] == jnp.arange(logits.shape[-1])
  return jax.nn.logsumexp(logits, axis=-1) - jnp.where(is_target, logits, 0.0).sum(axis=-1)

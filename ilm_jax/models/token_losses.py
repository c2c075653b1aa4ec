"""Losses over a language model's vocabulary, in memory that does not grow with it.

Letters: M positions, D width, V vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


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
    chunk: positions at a time.

  Returns:
    [M] float32, in nats.
  """
  positions = hidden.shape[0]
  if positions <= chunk:
    return _nll(logits(hidden), targets)
  chunks = -(-positions // chunk)
  missing = chunks * chunk - positions
  hidden = jnp.pad(hidden, ((0, missing), (0, 0))).reshape(chunks, chunk, -1)
  targets = jnp.pad(targets, (0, missing)).reshape(chunks, chunk)

  @jax.checkpoint
  def one(part: tuple[jax.Array, jax.Array]) -> jax.Array:
    return _nll(logits(part[0]), part[1])

  return jax.lax.map(one, (hidden, targets)).reshape(-1)[:positions]


def _nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
  # A masked sum, not a gather, which a vocabulary that is split over devices makes costly.
  is_target = targets[:, None] == jnp.arange(logits.shape[-1])
  return jax.nn.logsumexp(logits, axis=-1) - jnp.where(is_target, logits, 0.0).sum(axis=-1)

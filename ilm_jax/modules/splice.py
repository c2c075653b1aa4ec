"""Soft tokens into a prompt: which entities are encoded, and which slot takes which soft token.

Letters: B rows, T tokens of a row, E entities of a row, U different entities of a batch, K soft
tokens of an entity, D width of the language model.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class UniqueEntities(NamedTuple):
  """The different entities of some rows, each to be encoded once.

  Attributes:
    ids: [U] int32, ascending; after them -1.
    index: [B, E] int32: entity_ids == ids[index], where there is an entity.
    overflow: scalar bool: there are more than U, so that some have a wrong index.
  """

  ids: jax.Array
  index: jax.Array
  overflow: jax.Array


def unique_entities(entity_ids: jax.Array, capacity: int) -> UniqueEntities:
  """Finds the different ids among [B, E], padded with -1, for up to `capacity` of them (U).

  A capacity of B * E, or of all entities there are, is always enough.
  """
  flat = entity_ids.reshape(-1)
  ordered = jnp.sort(flat)
  new = (ordered >= 0) & (ordered != jnp.concatenate([jnp.full((1,), -1), ordered[:-1]]))
  place = jnp.where(new, jnp.cumsum(new) - 1, capacity)
  ids = jnp.full((capacity,), -1, flat.dtype).at[place].set(ordered, mode='drop')
  # Padding is above all ids for the search, as ids are ascending.
  searched = jnp.where(ids < 0, jnp.iinfo(ids.dtype).max, ids)
  index = jnp.searchsorted(searched, entity_ids).clip(0, capacity - 1)
  return UniqueEntities(ids, index.astype(jnp.int32), new.sum() > capacity)


def splice(
  embeddings: jax.Array, is_slot: jax.Array, soft_tokens: jax.Array, index: jax.Array
) -> jax.Array:
  """Puts soft tokens into the slots of token embeddings.

  In the order of a row, slot number i takes soft token i % K of the row's entity number i // K
  (house rule: slots == K * entities of the row). K = 2:

    tokens   the s s likes s s .           is_slot  0 1 1 0 1 1 0
    entity       0 0       1 1             query      0 1   0 1

  Args:
    embeddings: [B, T, D] of the tokens; those of slots are replaced.
    is_slot: [B, T] bool.
    soft_tokens: [U, K, D].
    index: [B, E] int32: the row of `soft_tokens` of each entity.

  Returns:
    [B, T, D], in the dtype of `embeddings`.
  """
  num_entities, num_queries, _ = soft_tokens.shape
  # A gather by place, not a scatter to the slots: exact for a slot at position 0, and rows of a
  # sharded batch stay where they are.
  number = jnp.cumsum(is_slot, axis=1) - 1
  entity = (number // num_queries).clip(0, index.shape[1] - 1)
  row = jnp.take_along_axis(index, entity, axis=1).clip(0, num_entities - 1)
  spliced = soft_tokens[row, number % num_queries].astype(embeddings.dtype)
  return jnp.where(is_slot[..., None], spliced, embeddings)

"""A user at a moment: the items before one of the user's rows, looked up on the device.

All rows of all users are one list: a user's training rows, then the validation and the test row. In
the space of entity ids, `num_entities + row` is the user as of that row, who knows the rows before
it and nothing else: an example of training may be encoded without a look at what is to be
predicted, which a user's one CF vector was fitted to.

Letters: U entities, E encoder tokens of an entity.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UserStates:
  """All rows, user by user.

  Attributes:
    items: [rows] int32.
    first: [rows] int32, the first row of the same user.
    num_entities: what ids of states begin with.
  """

  items: jax.Array
  first: jax.Array
  num_entities: int = dataclasses.field(metadata={'static': True})

  @classmethod
  def of(cls, items: np.ndarray, offsets: np.ndarray, num_entities: int) -> 'UserStates':
    """Of users whose rows are items[offsets[u] : offsets[u + 1]]."""
    first = np.repeat(offsets[:-1], np.diff(offsets))
    return cls(jnp.asarray(items, jnp.int32), jnp.asarray(first, jnp.int32), num_entities)

  def encoder_tokens(
    self, vectors: jax.Array, entity_ids: jax.Array, length: int
  ) -> tuple[jax.Array, jax.Array]:
    """What an item encoder reads of entities: the last items of a user's state, or one vector.

    Args:
      vectors: [num_entities or more, d_cf].
      entity_ids: [U], 0 or more.
      length: E, items of a state at most.

    Returns:
      [U, E, d_cf] and where there is a token, [U, E]. A state before a user's first row is one
      token of zeros.
    """
    is_state = entity_ids >= self.num_entities
    row = jnp.maximum(entity_ids - self.num_entities, 0)
    known = jnp.where(is_state, jnp.minimum(row - self.first[row], length), 1)
    place = jnp.arange(length)
    rows = row[:, None] - known[:, None] + place
    items = self.items[rows.clip(0, self.items.shape[0] - 1)]
    ids = jnp.where(is_state[:, None], items, entity_ids[:, None])
    there = place < known[:, None]
    tokens = jnp.where(there[..., None], vectors[ids.clip(0, self.num_entities - 1)], 0.0)
    return tokens, there | ((known == 0)[:, None] & (place == 0))

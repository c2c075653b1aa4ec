"""Which items are in a user's training history, asked on the device for whole batches."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UserHistories:
  """The training histories of all users as sorted runs of one array.

  Attributes:
    offsets: [num_users + 1] int32; user u's run is offsets[u] : offsets[u + 1].
    items: [num_rows] int32, ascending within a run, each item once.
    max_length: of the longest run (static).
  """

  offsets: jax.Array
  items: jax.Array
  max_length: int = dataclasses.field(metadata={'static': True})

  @classmethod
  def of(cls, offsets: np.ndarray, items: np.ndarray) -> 'UserHistories':
    """Of `PreparedData`'s arrays: user u's rows are items[offsets[u] : offsets[u + 1]]."""
    num_users = len(offsets) - 1
    users = np.repeat(np.arange(num_users), np.diff(offsets))
    pairs = np.unique(np.stack([users, items], axis=1), axis=0)
    lengths = np.bincount(pairs[:, 0], minlength=num_users)
    return cls(
      offsets=jnp.asarray(np.concatenate([[0], np.cumsum(lengths)]), jnp.int32),
      items=jnp.asarray(pairs[:, 1], jnp.int32),
      max_length=int(lengths.max(initial=0)),
    )

  def contains(self, users: jax.Array, items: jax.Array) -> jax.Array:
    """[B, C] bool, whether item items[c] is in the history of user users[b].

    A binary search in every run at once: about log2(max_length) gathers of [B, C].
    """
    if not self.items.shape[0]:
      return jnp.zeros((users.shape[0], items.shape[0]), bool)
    low = jnp.broadcast_to(self.offsets[users][:, None], (users.shape[0], items.shape[0]))
    end = self.offsets[users + 1][:, None]
    high = jnp.broadcast_to(end, low.shape)
    for _ in range(math.ceil(math.log2(self.max_length + 1))):
      middle = (low + high) // 2
      smaller = self.items[jnp.minimum(middle, self.items.shape[0] - 1)] < items[None, :]
      smaller &= low < high
      low, high = jnp.where(smaller, middle + 1, low), jnp.where(smaller, high, middle)
    return (low < end) & (self.items[jnp.minimum(low, self.items.shape[0] - 1)] == items[None, :])

"""The catalogue as a trie of token ids: what may follow what, so that only items can be said.

Items are sequences of tokens that end with EOS, so that no item is the beginning of another one.
Nodes are numbered level by level, and in a level in the order of their tokens: the children of a
node are neighbours, and so are, once items are sorted by their tokens, the items below a node.

  item 0 'Heat'    [5, 1]        node  0 root
       1 'Heat 2'  [5, 8, 1]           1 'Alien'  2 'Heat'
       2 'Alien'   [3, 1]              3 'Alien' EOS  4 'Heat' EOS  5 'Heat' '2'
                                       6 'Heat' '2' EOS
  items          [2, 0, 1]
  first_child    [1, 3, 4, 6, 6, 6, 7, 7]

Items with equal tokens (films of one title) share a leaf: their texts cannot tell them apart.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ilm_jax.errors import UsageError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trie:
  """Arrays of int32; node 0 is the root.

  Attributes:
    first_child: [nodes + 1]; the children of n are first_child[n] to first_child[n + 1] - 1.
    parent, token, depth: [nodes], of the edge that leads to a node; of the root -1, -1 and 0.
    first_item, end_item: [nodes], the items below a node are items[first_item : end_item].
    items: [items], in the order of their tokens.
    leaf: [items], the node of an item's EOS, by item.
    alphabet: [tokens that items have], ascending.
    column: [nodes], where a node's token is in the alphabet; of the root 0.
    max_children: of a node.
    max_depth: tokens of an item, EOS included.
  """

  first_child: jax.Array
  parent: jax.Array
  token: jax.Array
  depth: jax.Array
  first_item: jax.Array
  end_item: jax.Array
  items: jax.Array
  leaf: jax.Array
  alphabet: jax.Array
  column: jax.Array
  max_children: int = dataclasses.field(metadata={'static': True})
  max_depth: int = dataclasses.field(metadata={'static': True})

  @property
  def num_nodes(self) -> int:
    return self.parent.shape[0]

  @property
  def num_items(self) -> int:
    return self.items.shape[0]

  def children(self, nodes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of nodes [...]: their children [..., max_children], and whether there are so many."""
    child = self.first_child[nodes][..., None] + jnp.arange(self.max_children)
    exists = child < self.first_child[nodes + 1][..., None]
    return jnp.where(exists, child, 0), exists

  def is_leaf(self, nodes: jax.Array) -> jax.Array:
    return self.first_child[nodes] == self.first_child[nodes + 1]


def build_trie(sequences: Sequence[Sequence[int]], eos_id: int) -> Trie:
  """The trie of items 0, 1, ..., whose tokens are `sequences`, each ending with `eos_id`.

  Raises:
    UsageError: there is no item, or one is empty, does not end with EOS or has EOS inside.
  """
  if not len(sequences):
    raise UsageError('the catalogue has no item.')
  tokens = _padded(sequences, eos_id)
  items = np.lexsort(tokens.T[::-1])
  tokens = tokens[items]
  num_items, width = tokens.shape
  levels = [(np.array([-1]), np.array([-1]), np.array([0]), np.array([num_items]))]
  node_of = np.zeros(num_items, np.int64)  # of each item, on the level above
  begins = np.arange(num_items) == 0  # where a node begins: an item that differs from the one above
  num_nodes = 1
  for level in range(width):
    begins[1:] |= tokens[1:, level] != tokens[:-1, level]
    starts = np.flatnonzero(begins)
    ends = np.append(starts[1:], num_items)
    alive = tokens[starts, level] >= 0
    starts, ends = starts[alive], ends[alive]
    levels.append((node_of[starts], tokens[starts, level], starts, ends))
    lengths = ends - starts
    below = np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
    node_of[below] = np.repeat(num_nodes + np.arange(len(starts)), lengths)
    num_nodes += len(starts)
  parent, token, first_item, end_item = (np.concatenate(parts) for parts in zip(*levels))
  num_children = np.bincount(parent[1:], minlength=num_nodes)
  leaf = np.empty(num_items, np.int64)
  leaf[items] = node_of
  alphabet = np.unique(token[1:])
  return Trie(
    first_child=_int32(np.concatenate([[1], 1 + np.cumsum(num_children)])),
    parent=_int32(parent),
    token=_int32(token),
    depth=_int32(np.repeat(np.arange(len(levels)), [len(level[0]) for level in levels])),
    first_item=_int32(first_item),
    end_item=_int32(end_item),
    items=_int32(items),
    leaf=_int32(leaf),
    alphabet=_int32(alphabet),
    column=_int32(np.searchsorted(alphabet, token)),
    max_children=int(num_children.max()),
    max_depth=width,
  )


def _padded(sequences: Sequence[Sequence[int]], eos_id: int) -> np.ndarray:
  """[items, longest], -1 after the end."""
  rows = [np.asarray(row, np.int32) for row in sequences]
  for item, row in enumerate(rows):
    if len(row) < 2 or row[-1] != eos_id or (row[:-1] == eos_id).any() or (row < 0).any():
      raise UsageError(
        f'catalogue item {item}: tokens {row.tolist()}; they must be some text, then one EOS'
        f' ({eos_id}).'
      )
  tokens = np.full((len(rows), max(map(len, rows))), -1, np.int32)
  for item, row in enumerate(rows):
    tokens[item, : len(row)] = row
  return tokens


def _int32(values: np.ndarray) -> jax.Array:
  return jnp.asarray(values.astype(np.int32))

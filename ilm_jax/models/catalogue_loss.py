"""The loss of titles among titles: each token against those that may come in its place.

A loss over the vocabulary teaches, more than anything else, that a title is expected, and how
titles are written. Here only what tells items apart counts. The sum over the tokens of a title is
-log p of the item as `exact.catalogue_scores` has it, from one forward pass of the title alone.

  targets   Heat '2' EOS  Heat EOS   0      two spans of a packed row, and padding
  starts     1    0   0    1    0    0
  weights    1    1   1    1    1    0
  nodes      2    5   6    2    4   -1      of the trie in trie.py
  nll        a    b   0    a'   b'   0      a: Heat or Alien, b: '2' or EOS; only EOS after '2'

Letters: B rows, M places, D model width, C tokens that may come next, m places of a chunk.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ilm_jax.catalogue.legal import check_bias, legal_log_probs
from ilm_jax.catalogue.trie import Trie
from ilm_jax.modules.decoder import Decoder
from ilm_jax.modules.token_losses import in_chunks


def walk(trie: Trie, targets: jax.Array, starts: jax.Array) -> jax.Array:
  """The node that is reached at each place, as tokens are read one by one.

  Args:
    trie: the catalogue.
    targets: [B, M] tokens.
    starts: [B, M] bool, the first tokens of items, where reading begins again at the root.

  Returns:
    [B, M] int32; -1 from where a span leaves the catalogue, or goes on after an item, up to the
    next start, and in front of the first.
  """

  def step(node: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    token, start = at
    node = _child(trie, jnp.where(start, 0, node), token)
    return node, node

  nowhere = jnp.full_like(targets[:, 0], -1, jnp.int32)
  _, nodes = jax.lax.scan(step, nowhere, (targets.T, starts.astype(bool).T))
  return nodes.T


def _child(trie: Trie, nodes: jax.Array, tokens: jax.Array) -> jax.Array:
  """Nodes and tokens [B] -> the child [B] of that token; -1 where there is none, and of -1."""
  parents = jnp.maximum(nodes, 0)
  low, end = trie.first_child[parents], trie.first_child[parents + 1]
  high = end
  for _ in range(trie.max_children.bit_length()):
    middle = (low + high) // 2
    less = trie.token[jnp.minimum(middle, trie.num_nodes - 1)] < tokens
    low, high = (
      jnp.where((low < high) & less, middle + 1, low),
      jnp.where((low < high) & ~less, middle, high),
    )
  found = (nodes >= 0) & (low < end)
  found &= trie.token[jnp.minimum(low, trie.num_nodes - 1)] == tokens
  return jnp.where(found, low, -1)


def catalogue_nll(
  lm: Decoder,
  params: Any,
  trie: Trie,
  hidden: jax.Array,
  targets: jax.Array,
  starts: jax.Array,
  weights: jax.Array,
  *,
  bias: jax.Array | None = None,
  chunk: int = 256,
) -> tuple[jax.Array, jax.Array]:
  """-log p of each target among the tokens with which the catalogue goes on.

  Args:
    lm: a decoder; `params` its parameters.
    trie: the catalogue.
    hidden: [B, M, D], states that predict the targets. Give the places that have a target, and as
      few others as can be.
    targets: [B, M] int32.
    starts: [B, M], nonzero on the first target of each span.
    weights: [B, M], nonzero on targets; of other places, such as prompts and padding, nothing
      matters. A span ends with the last target before the next start.
    bias: [nodes], as in `exact.catalogue_scores`.
    chunk: m of each device. Memory grows with m x (tokens of the catalogue + children of the
      root); what the backward pass needs of a chunk is computed again.

  Returns:
    nll: [B, M] float32, in nats. 0 where the catalogue leaves no choice, and where is_item is not.
    is_item: [B, M] bool, targets of spans that are, from beginning to end, an item's tokens.

  Raises:
    UsageError: bias is not of this catalogue.
  """
  check_bias(bias, trie, 'catalogue')
  starts, weighted = starts.astype(bool), weights != 0
  nodes = walk(trie, targets, starts)
  is_item = _ends_well(trie, nodes, starts, weighted)
  log_probs = legal_log_probs(lm, params, trie.alphabet, 'catalogue')
  nodes = jnp.where(is_item, nodes, 0)
  parents = jnp.maximum(trie.parent[nodes], 0)

  def one(part: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    hidden, nodes, parents = part
    child, exists = trie.children(parents)
    of_edges = None if bias is None else bias[child]
    legal = log_probs(hidden, trie.column[child], exists, of_edges)
    is_target = exists & (child == nodes[:, None])
    return -jnp.where(is_target, legal, 0.0).sum(axis=-1)

  rows = hidden.reshape(-1, hidden.shape[-1]), nodes.reshape(-1), parents.reshape(-1)
  nll = in_chunks(one, rows, chunk).reshape(targets.shape)
  choice = trie.first_child[parents + 1] - trie.first_child[parents] > 1
  return jnp.where(is_item & choice, nll, 0.0), is_item


def _ends_well(trie: Trie, nodes: jax.Array, starts: jax.Array, weighted: jax.Array) -> jax.Array:
  """[B, M] bool, targets of spans whose last target is the end of an item.

  Nodes on the way there are then those of the item: one that has left the catalogue stays outside.
  """
  is_end = (nodes >= 0) & trie.is_leaf(jnp.maximum(nodes, 0))

  def step(carry: tuple[jax.Array, jax.Array], at: tuple[jax.Array, jax.Array, jax.Array]):
    well, has_target = carry  # of what comes after in the span
    is_end, start, target = at
    well = jnp.where(target & ~has_target, is_end, well)
    return (well & ~start, (has_target | target) & ~start), well & target

  nothing = jnp.zeros_like(is_end[:, 0])
  places = is_end.T, starts.T, weighted.T
  _, well = jax.lax.scan(step, (nothing, nothing), places, reverse=True)
  return well.T

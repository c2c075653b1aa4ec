"""The log-probability of every item of a catalogue, by as few tokens as that takes.

The prompt is read once. After it come nodes of the catalogue's trie, all at once: each sees the
prompt, its ancestors and itself. A node with one child adds nothing where probabilities are over
the catalogue, so that only nodes that branch are run, and what leads to them:

  'Heat' [5, 1], 'Heat 2' [5, 8, 1], 'Alien' [3, 1]

  root        after the prompt
  |- 'Alien'  one child, EOS: p = 1, not run
  |- 'Heat'   run: EOS or '2'
     |- '2'   one child, not run

  plan = scoring_plan(trie, 'catalogue')  # once, outside jit
  scores = jax.jit(functools.partial(catalogue_scores, lm))(params, plan, embeddings, lengths)

Letters: B users, T tokens of a prompt, D model width, I items, A tokens that the catalogue uses,
R children of the root, G nodes of a group, C children of a node.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ilm_jax.catalogue.legal import (
  LegalLogProbs,
  Normalise,
  check_bias,
  check_normalise,
  legal_log_probs,
)
from ilm_jax.catalogue.trie import Trie
from ilm_jax.decoding.prefill import prefill
from ilm_jax.modules.attention import Cache
from ilm_jax.modules.decoder import Decoder

_NOWHERE = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScoringPlan:
  """Which nodes are run together, and where what comes of them belongs. An argument of jit.

  Attributes:
    trie: the catalogue.
    alphabet: [A], tokens that may come next somewhere.
    column: [nodes], where a node's token is in the alphabet.
    groups: [groups, G], nodes that are run together, ancestors before the others; -1 for none.
    place: [nodes], where a node's parent is among all places of the groups; -1 where it is not run.
    num_root_children: R; they are nodes 1 to R.
    max_children: C, of a node that is run.
    normalise: over which tokens probabilities sum to one.
  """

  trie: Trie
  alphabet: jax.Array
  column: jax.Array
  groups: jax.Array
  place: jax.Array
  num_root_children: int = dataclasses.field(metadata={'static': True})
  max_children: int = dataclasses.field(metadata={'static': True})
  normalise: Normalise = dataclasses.field(metadata={'static': True})

  @property
  def num_nodes(self) -> int:
    """How many nodes are run for a user, padding included."""
    return self.groups.size


def scoring_plan(
  trie: Trie, normalise: Normalise = 'catalogue', *, nodes_at_once: int = 128
) -> ScoringPlan:
  """Made once for a catalogue, outside jit.

  Args:
    trie: the catalogue.
    normalise: over which tokens probabilities sum to one: those that go on towards an item
      ('catalogue': the probabilities of all distinct texts sum to one) or all ('vocabulary').
    nodes_at_once: G, about. Memory grows with B x G x (T + G), and so does the time of attention.
  """
  check_normalise(normalise)
  parent, depth, token = (np.asarray(x) for x in (trie.parent, trie.depth, trie.token))
  num_children = np.diff(np.asarray(trie.first_child))
  needed = num_children > (1 if normalise == 'catalogue' else 0)
  scored = needed[parent] | (parent == 0)
  scored[0] = False
  for level in range(trie.max_depth, 0, -1):  # what leads to needed nodes
    needed[parent[(depth == level) & needed]] = True
  needed[0] = False  # its place is the prompt's end
  # Ancestors first, and then what is below them: a part of this order lacks at its beginning the
  # ancestors of its first node, and no others.
  order = np.lexsort((depth, np.asarray(trie.first_item)))
  order = order[needed[order]]
  num_groups = -(-len(order) // nodes_at_once)
  parts = [part for part in np.array_split(order, num_groups or 1) if len(part)]
  rows = [[*_ancestors(part[0], parent), *part] for part in parts]
  groups = np.full((len(rows), max(map(len, rows), default=0)), _NOWHERE)
  place_of = np.full(trie.num_nodes, _NOWHERE)
  for i, row in enumerate(rows):
    groups[i, : len(row)] = row
    place_of[row] = i * groups.shape[1] + np.arange(len(row))
  alphabet = np.unique(token[scored])
  return ScoringPlan(
    trie=trie,
    alphabet=_int32(alphabet),
    column=_int32(np.searchsorted(alphabet, token).clip(0, max(len(alphabet) - 1, 0))),
    groups=_int32(groups),
    place=_int32(np.where(scored, place_of[parent], _NOWHERE)),
    num_root_children=int(num_children[0]),
    max_children=int(num_children[needed].max(initial=1)),
    normalise=normalise,
  )


def catalogue_scores(
  lm: Decoder,
  params: Any,
  plan: ScoringPlan,
  embeddings: jax.Array,
  lengths: jax.Array,
  *,
  bias: jax.Array | None = None,
) -> jax.Array:
  """The log-probability of every item, [B, I]; items of equal tokens share theirs.

  Args:
    lm: a decoder; `params` its parameters.
    plan: of the catalogue.
    embeddings: [B, T, D] of the prompts, padded on the right, with soft tokens in them or not.
    lengths: [B], tokens of each, 1 or more.
    bias: [nodes], added to the logit of the token that leads to a node, before what may come in its
      place is normalised (calibration.edge_bias); the plan's must be 'catalogue'.

  Raises:
    UsageError: bias is not of this catalogue, or of probabilities over the vocabulary.
  """
  trie = plan.trie
  scores = node_log_probs(lm, params, plan, embeddings, lengths, bias=bias)
  # Sums along the way to the root, each time of twice as many nodes.
  ahead = jnp.maximum(trie.parent, 0)
  for _ in range(trie.max_depth.bit_length()):
    scores += scores[:, ahead]
    ahead = ahead[ahead]
  return scores[:, trie.leaf]


def node_log_probs(
  lm: Decoder,
  params: Any,
  plan: ScoringPlan,
  embeddings: jax.Array,
  lengths: jax.Array,
  *,
  bias: jax.Array | None = None,
) -> jax.Array:
  """The log-probability of each node's token after those that lead there, [B, nodes].

  Arguments are those of `catalogue_scores`. 0 for the root, and where the catalogue leaves no
  choice and probabilities are over the catalogue.
  """
  trie, batch = plan.trie, embeddings.shape[0]
  check_bias(bias, trie, plan.normalise)
  log_probs = legal_log_probs(lm, params, plan.alphabet, plan.normalise)
  last, new = prefill(lm, params, embeddings, lengths)
  cache = lm.init_cache(*embeddings.shape[:2]).append(new)
  scores = jnp.zeros((batch, trie.num_nodes))
  root = _root_log_probs(log_probs, plan, last, bias)
  scores = scores.at[:, 1 : 1 + plan.num_root_children].set(root)
  if plan.groups.size:
    run = _GroupRun(lm, params, plan, log_probs, lengths, cache, bias)
    below = jax.lax.map(run, plan.groups)  # [groups, B, G, C]
    below = jnp.moveaxis(below, 1, 0).reshape(batch, -1, plan.max_children)
    ordinal = jnp.arange(trie.num_nodes) - trie.first_child[jnp.maximum(trie.parent, 0)]
    ordinal = jnp.clip(ordinal, 0, plan.max_children - 1)  # of what is not looked up
    scores = jnp.where(plan.place >= 0, below[:, plan.place, ordinal], scores)
  return scores


def root_log_probs(
  lm: Decoder,
  params: Any,
  plan: ScoringPlan,
  embeddings: jax.Array,
  lengths: jax.Array,
  *,
  bias: jax.Array | None = None,
) -> jax.Array:
  """Log-probabilities [B, R] of the first tokens of items, those of nodes 1 to R.

  Arguments are those of `catalogue_scores`.
  """
  check_bias(bias, plan.trie, plan.normalise)
  log_probs = legal_log_probs(lm, params, plan.alphabet, plan.normalise)
  last, _ = prefill(lm, params, embeddings, lengths)
  return _root_log_probs(log_probs, plan, last, bias)


def _root_log_probs(
  log_probs: LegalLogProbs, plan: ScoringPlan, last: jax.Array, bias: jax.Array | None
) -> jax.Array:
  first = slice(1, 1 + plan.num_root_children)
  columns = jnp.broadcast_to(plan.column[first], (last.shape[0], plan.num_root_children))
  exists = jnp.ones_like(columns, bool)
  return log_probs(last, columns, exists, None if bias is None else bias[first])


@dataclasses.dataclass(frozen=True)
class _GroupRun:
  """Nodes [G] -> log-probabilities of their children [B, G, C]."""

  lm: Decoder
  params: Any
  plan: ScoringPlan
  log_probs: LegalLogProbs
  lengths: jax.Array
  cache: Cache
  bias: jax.Array | None

  def __call__(self, nodes: jax.Array) -> jax.Array:
    trie, batch = self.plan.trie, self.lengths.shape[0]
    there, nodes = nodes >= 0, jnp.maximum(nodes, 0)
    variables = {'params': self.params}
    tokens = jnp.broadcast_to(jnp.maximum(trie.token[nodes], 0), (batch, *nodes.shape))
    embeddings = self.lm.apply(variables, tokens, method='embed_tokens')
    positions = self.lengths[:, None] + trie.depth[nodes] - 1
    # An ancestor's items are all of a node's, and of two with the same it is the upper one.
    first, end, depth = (x[nodes] for x in (trie.first_item, trie.end_item, trie.depth))
    sees = (first <= first[:, None]) & (end >= end[:, None]) & (depth <= depth[:, None])
    # Padding sees what it likes, and is not seen: the root is nobody's ancestor here.
    sees = jnp.where(there[:, None], sees & there, True)
    hidden: Any
    hidden, _ = self.lm.apply(variables, embeddings, positions, mask=sees[None], cache=self.cache)
    child = trie.first_child[nodes][:, None] + jnp.arange(self.plan.max_children)
    exists = child < trie.first_child[nodes + 1][:, None]
    child = jnp.where(exists, child, 0)
    columns = self.plan.column[child]
    shape = (batch, *exists.shape)
    log_probs = self.log_probs(
      hidden,
      jnp.broadcast_to(columns, shape),
      jnp.broadcast_to(exists, shape),
      None if self.bias is None else self.bias[child],
    )
    # Of a node whose children are not scored, and of padding, nothing is looked up.
    return jnp.where(exists & there[:, None], log_probs, 0.0)


def _ancestors(node: int, parent: np.ndarray) -> list[int]:
  """Without the root, from the top."""
  found: list[int] = []
  node = parent[node]
  while node > 0:
    found.insert(0, int(node))
    node = parent[node]
  return found


def _int32(values: np.ndarray) -> jax.Array:
  return jnp.asarray(values.astype(np.int32))

"""Items that a language model would say, best first: beam search in a catalogue, inside jit.

  beams = jax.jit(lambda params, trie, embeddings, lengths: beam_search(
    lm, params, trie, embeddings, lengths, beam_size=10
  ))(params, trie, embeddings, lengths)

All beams of a user are a tree of tokens after one prompt, and stay where they are in one cache:
each token of the tree is run once, and nothing is copied when a beam splits or ends. Two beams,
of which the second goes on in two ways, and the first is given up:

  step              1           2
  tokens         Alien Heat   EOS '2'
  place  prompt    0    1      2   3    of the tree
  parent                       1   1
  '2' sees  1      .    1      .   1

Letters: B users, T tokens of a prompt, D model width, W beams, I items, C children of a node,
S places of the cache, of which P are of the tree.
"""

from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from ilm_jax.catalogue.legal import Normalise, check_bias, legal_log_probs
from ilm_jax.catalogue.trie import Trie
from ilm_jax.decoding.prefill import prefill
from ilm_jax.errors import UsageError
from ilm_jax.modules.attention import Cache, NewTokens, Tokens
from ilm_jax.modules.decoder import Decoder


class Beams(NamedTuple):
  """Items by falling log-probability; where there are not so many, -1 and -inf.

  Items of equal tokens have the same leaf and follow each other in the order of their ids.

  Attributes:
    items: [B, W] int32.
    log_probs: [B, W] float32, of the tokens of the item's text.
    leaves: [B, W] int32, nodes of the trie.
  """

  items: jax.Array
  log_probs: jax.Array
  leaves: jax.Array


def beam_search(
  lm: Decoder,
  params: Any,
  trie: Trie,
  embeddings: jax.Array,
  lengths: jax.Array,
  *,
  beam_size: int,
  normalise: Normalise = 'catalogue',
  forbidden: jax.Array | None = None,
  bias: jax.Array | None = None,
) -> Beams:
  """The items of a catalogue that go on best from prompts, as far as W beams find them.

  Args:
    lm: a decoder; `params` its parameters.
    trie: the catalogue.
    embeddings: [B, T, D] of the prompts, padded on the right, with soft tokens in them or not.
    lengths: [B], tokens of each; 0 for a row that is not wanted, of which no item comes.
    beam_size: W. With as many as there are items, the search is exact.
    normalise: over which tokens probabilities sum to one. 'vocabulary' also counts against an item
      what the model would rather say that is no item.
    forbidden: [B, I] bool, items that must not come, such as those that a user has seen. Beams
      keep away from beginnings of which nothing else is left; scores do not change.
    bias: [nodes], added to the logit of the token that leads to a node, before what may come in its
      place is normalised (calibration.edge_bias); not with normalise='vocabulary'.

  The cache has room for W tokens of each level of the trie: it grows with beam_size x max_depth.

  Raises:
    UsageError: beam_size, normalise or bias is not what is allowed.
  """
  if beam_size < 1:
    raise UsageError(f'beam_size={beam_size}: it must be 1 or more.')
  check_bias(bias, trie, normalise)
  batch = embeddings.shape[0]
  beams = min(beam_size, trie.num_items)  # no level of the trie has more nodes
  steps = trie.max_depth - 1  # the last token of an item is not run
  log_probs = legal_log_probs(lm, params, trie.alphabet, normalise)
  allowed = _Allowed(trie, batch, forbidden)
  goes_to = jnp.arange(trie.num_nodes)
  if normalise == 'catalogue':  # where only one text is left, what is missing of it has p = 1
    first, last = (trie.leaf[trie.items[i]] for i in (trie.first_item, trie.end_item - 1))
    goes_to = jnp.where(first == last, first, goes_to)

  def grow(state: _State, hidden: jax.Array) -> _State:
    """One more token: of all children of all beams, the best W. `hidden` is [B, beams, D]."""
    child, exists = trie.children(state.nodes)
    of_edges = None if bias is None else bias[child]
    scores = state.scores[..., None] + log_probs(hidden, trie.column[child], exists, of_edges)
    scores = jnp.where(exists & allowed.any_below(child), scores, -jnp.inf)
    # A beam that has ended is its own only child.
    ended = trie.is_leaf(state.nodes)[..., None]
    itself = jnp.where(jnp.arange(child.shape[-1]) == 0, state.scores[..., None], -jnp.inf)
    scores = jnp.where(ended, itself, scores).reshape(batch, -1)
    child = jnp.where(ended, state.nodes[..., None], child).reshape(batch, -1)
    missing = max(0, beams - scores.shape[1])
    scores = jnp.pad(scores, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    best, at = jax.lax.top_k(scores, beams)
    parent = jnp.minimum(at // trie.max_children, state.nodes.shape[1] - 1)
    sees = jnp.take_along_axis(state.sees, parent[..., None], axis=1)
    own = (state.step - 1) * beams + parent  # where the parent's last token is
    nodes = jnp.take_along_axis(child, jnp.minimum(at, child.shape[1] - 1), axis=1)
    return _State(
      step=state.step + 1,
      nodes=goes_to[nodes],
      scores=best,
      sees=sees | (jnp.arange(steps * beams) == own[..., None]),
      cache=state.cache,
    )

  def go_on(state: _State) -> jax.Array:
    return (~trie.is_leaf(state.nodes) & (state.scores > -jnp.inf)).any()

  def body(state: _State) -> _State:
    tokens = jnp.maximum(trie.token[state.nodes], 0)
    positions = jnp.broadcast_to((lengths + state.step - 1)[:, None], tokens.shape)
    hidden, new = _run(lm, params, tokens, positions, state.sees, state.cache)
    grown = grow(state, hidden)
    return grown._replace(cache=state.cache.append(new, after=grown.nodes))

  hidden, new = prefill(lm, params, embeddings, lengths)
  cache = lm.init_cache(*embeddings.shape[:2]).append(new)
  root = _State(
    step=jnp.zeros((), jnp.int32),
    nodes=jnp.zeros((batch, 1), jnp.int32),
    scores=jnp.where(lengths > 0, 0.0, -jnp.inf)[:, None],
    sees=jnp.zeros((batch, 1, steps * beams), bool),
    cache=_one_row_each(cache).extended(steps * beams),
  )
  state = jax.lax.while_loop(go_on, body, grow(root, hidden[:, None]))
  return _items(trie, allowed, state.nodes, state.scores, beam_size)


class _State(NamedTuple):
  """Of the search, after `step` tokens: beams, and which places of the tree [B, W, P] they see."""

  step: jax.Array
  nodes: jax.Array
  scores: jax.Array
  sees: jax.Array
  cache: Cache


def _one_row_each(cache: Cache) -> Cache:
  """Keys and values as users with one row each, [B, 1, N, S, C], which their beams share.

  Once, and not in the loop, where XLA would copy what is given another shape.
  """
  layers = jax.tree.map(lambda x: x[..., None, :, :, :], cache.layers)
  return cache._replace(layers=layers)


def _run(
  lm: Decoder,
  params: Any,
  tokens: jax.Array,
  positions: jax.Array,
  sees: jax.Array,
  cache: Cache,
) -> tuple[jax.Array, NewTokens]:
  """Tokens [B, W] of beams, each after what it sees: hidden states [B, W, D] and for the cache."""
  variables, prompt_length = {'params': params}, cache.capacity - sees.shape[2]

  def of_user(
    tokens: jax.Array, positions: jax.Array, sees: jax.Array, layers: Any, cached: Tokens
  ) -> tuple[jax.Array, Any]:
    # Beams are rows that share the keys, but each has its own opinion of which are of its segment.
    beams = tokens.shape[0]
    prompt = jnp.broadcast_to(cached.segment_ids[:prompt_length], (beams, prompt_length))
    shared = Cache(
      layers,
      jnp.broadcast_to(cached.positions, (beams, *cached.positions.shape)),
      jnp.concatenate([prompt, sees.astype(jnp.int32)], axis=1),
      cache.length,
    )
    embeddings = lm.apply(variables, tokens[:, None], method='embed_tokens')
    hidden: Any
    hidden, new = lm.apply(variables, embeddings, positions[:, None], cache=shared)
    return hidden[:, 0], cast(NewTokens, new).layers

  users = jax.tree.map(lambda x: x.ndim - 5, cache.layers)
  run = jax.vmap(of_user, in_axes=(0, 0, 0, users, 0), out_axes=(0, users))
  # Inside, rows are beams: they are not what a mesh splits.
  with nn.logical_axis_rules(()):
    hidden, layers = run(tokens, positions, sees, cache.layers, cache.tokens)
  # From rows [B, W, N, 1, C] to places of the one row [B, 1, N, W, C].
  layers = jax.tree.map(lambda x: x.swapaxes(-4, -2), layers)
  return hidden, NewTokens(layers, positions, jnp.ones_like(positions))


class _Allowed:
  """Which items may come, counted along the items as the trie sorts them."""

  def __init__(self, trie: Trie, batch: int, forbidden: jax.Array | None):
    if forbidden is None:
      allowed = jnp.ones((batch, trie.num_items), jnp.int32)
    else:
      allowed = (~forbidden[:, trie.items]).astype(jnp.int32)
    self._trie = trie
    self._before = jnp.pad(jnp.cumsum(allowed, axis=1), ((0, 0), (1, 0)))  # [B, I + 1]

  def _counts(self, places: jax.Array) -> jax.Array:
    """[B, ...] places among the sorted items -> how many before them may come."""
    flat = places.reshape(places.shape[0], -1)
    return jnp.take_along_axis(self._before, flat, axis=1).reshape(places.shape)

  def num_below(self, nodes: jax.Array) -> jax.Array:
    """[B, ...] -> how many items below nodes may come."""
    return self._counts(self._trie.end_item[nodes]) - self._counts(self._trie.first_item[nodes])

  def any_below(self, nodes: jax.Array) -> jax.Array:
    return self.num_below(nodes) > 0

  def item(self, leaves: jax.Array, n: jax.Array) -> jax.Array:
    """[B, W] -> the n-th item of a leaf that may come."""
    target = self._counts(self._trie.first_item[leaves]) + n
    # Before it there are `target`, up to and with it one more.
    place = jax.vmap(lambda before, t: jnp.searchsorted(before, t, side='right'))
    places = place(self._before, target) - 1
    return self._trie.items[jnp.minimum(places, self._trie.num_items - 1)]


def _items(trie: Trie, allowed: _Allowed, leaves: jax.Array, scores: jax.Array, size: int) -> Beams:
  """Beams as items: all that share a leaf, in its place, the first `size`."""
  found = scores > -jnp.inf
  ends = jnp.cumsum(jnp.where(found, allowed.num_below(leaves), 0), axis=1)
  rank = jnp.arange(size)
  beam = jax.vmap(lambda e: jnp.searchsorted(e, rank, side='right'))(ends)  # whose item comes there
  exists = beam < leaves.shape[1]
  beam = jnp.where(exists, beam, 0)
  begins = jnp.pad(ends, ((0, 0), (1, 0)))
  leaves, scores = (jnp.take_along_axis(x, beam, axis=1) for x in (leaves, scores))
  items = allowed.item(leaves, rank - jnp.take_along_axis(begins, beam, axis=1))
  return Beams(
    items=jnp.where(exists, items, -1),
    log_probs=jnp.where(exists, scores, -jnp.inf),
    leaves=jnp.where(exists, leaves, -1),
  )

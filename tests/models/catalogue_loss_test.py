"""The loss of titles among titles, against exact scores and loops in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from ilm_jax.catalogue.trie import build_trie
from ilm_jax.decoding.exact import catalogue_scores, scoring_plan
from ilm_jax.errors import UsageError
from ilm_jax.models.catalogue_loss import catalogue_nll, walk
from tests.support import catalogues, tiny_gemma, tiny_lms

EOS, ITEMS = catalogues.EOS, catalogues.SEQUENCES
# Tokens of spans; whether all of them are an item's.
GOOD = [(s, True) for s in ITEMS]
BAD = [
  ([5, 9, EOS], False),  # leaves the catalogue in the middle
  ([4, 8, EOS], False),  # at once
  ([7, 30, 31], False),  # ends too early
  ([5], False),
  ([6, 8, EOS, 8], False),  # goes on after its end
  ([5, EOS, EOS], False),
  ([0], False),
  ([96, 96], False),
]
LENGTH = 24


def packed(seed):
  """Rows of spans, with places that are no target between them, in front and after.

  Returns targets, starts, weights [B, M] and the spans as (row, place, tokens, is an item).
  """
  rng = np.random.default_rng(seed)
  spans = GOOD + BAD
  rows, found, at = [[]], [], 0
  for i in rng.permutation(len(spans)):
    tokens, is_item = spans[i]
    gap = int(rng.integers(0, 3))
    if at + gap + len(tokens) > LENGTH:
      rows.append([])
      at = 0
    found.append((len(rows) - 1, at + gap, tokens, is_item))
    at += gap + len(tokens)
  targets = rng.choice([0, EOS, 5, 8], (len(rows), LENGTH)).astype(np.int32)
  starts, weights = np.zeros((2, len(rows), LENGTH), np.int32)
  for row, place, tokens, _ in found:
    targets[row, place : place + len(tokens)] = tokens
    starts[row, place] = 1
    weights[row, place : place + len(tokens)] = 1
  return targets, starts, weights, found


def test_nodes_are_those_of_the_beginnings():
  trie = catalogues.trie()
  targets, starts, weights, spans = packed(0)
  nodes = np.asarray(jax.jit(walk)(trie, targets, starts))
  assert nodes.dtype == np.int32
  parent, token = np.asarray(trie.parent), np.asarray(trie.token)
  beginnings = {tuple(s[: n + 1]) for s in ITEMS for n in range(len(s))}

  def path(node):
    return (*path(parent[node]), int(token[node])) if node > 0 else ()

  for row, place, tokens, _ in spans:
    for n in range(len(tokens)):
      node, said = nodes[row, place + n], tuple(tokens[: n + 1])
      assert path(node) == said if said in beginnings else node == -1
  seen = starts.cumsum(axis=1) > 0
  assert (~seen & (weights == 0)).any()
  assert (nodes[~seen] == -1).all()


@pytest.mark.parametrize('children', [1, 2, 3, 4, 7, 8, 9])
def test_any_number_of_children_is_searched(children):
  tokens = np.arange(children) * 3 + 5
  trie = build_trie([[t, EOS] for t in tokens], EOS)
  asked = np.arange(5 + 3 * children + 3)[:, None]
  nodes = np.asarray(walk(trie, jnp.asarray(asked), jnp.ones_like(asked)))[:, 0]
  expected = [1 + list(tokens).index(t) if t in tokens else -1 for t in asked[:, 0]]
  assert nodes.tolist() == expected


def by_hand(tiny, hidden, spans, biased):
  """nll, is_item [B, M] and the slope of the sum over hidden [B, M, D]; the head is not tied."""
  logits = np.asarray(tiny.lm.apply({'params': tiny.params}, hidden, method='logits'), np.float64)
  head = np.asarray(jax.tree.leaves(tiny.params['head'])[0], np.float64)
  nll, is_item, slope = np.zeros(hidden.shape[:2]), np.zeros(hidden.shape[:2], bool), 0 * hidden
  for row, place, tokens, good in spans:
    for n in range(len(tokens) if good else 0):
      said, at = tuple(tokens[:n]), (row, place + n)
      legal = catalogues.legal_after(said)
      of_legal = logits[at][legal]
      if biased:
        of_legal = of_legal + [catalogues.bias_of()[*said, token] for token in legal]
      log_probs = scipy.special.log_softmax(of_legal)
      target = legal.index(tokens[n])
      nll[at], is_item[at] = -log_probs[target], True
      slope[at] = (np.exp(log_probs) - np.eye(len(legal))[target]) @ head[legal]
  return nll, is_item, slope


@pytest.mark.parametrize(('biased', 'chunk'), [(False, 256), (True, 7)])
def test_is_the_loss_among_legal_tokens_and_its_slope(biased, chunk):
  """With spans that are no items, which neither count nor disturb those beside them."""
  tiny = tiny_lms.tiny_lm('llama')
  *batch, spans = packed(1)
  targets, starts, weights = map(jnp.asarray, batch)
  rng = np.random.default_rng(2)
  hidden = rng.normal(size=(*targets.shape, tiny.lm.config.d_model)).astype(np.float32)

  @tiny_gemma.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def loss(hidden, bias):
    nll, is_item = catalogue_nll(
      tiny.lm, tiny.params, catalogues.trie(), hidden, targets, starts, weights,
      bias=bias, chunk=chunk,
    )  # fmt: skip
    return nll.sum(), (nll, is_item)

  (_, (nll, is_item)), slope = loss(hidden, catalogues.bias() if biased else None)
  expected, expected_is_item, expected_slope = by_hand(tiny, hidden, spans, biased)
  np.testing.assert_array_equal(is_item, expected_is_item)
  np.testing.assert_allclose(nll, expected, atol=1e-5)
  np.testing.assert_allclose(slope, expected_slope, atol=1e-5)
  forced = expected_is_item & (expected == 0)
  assert forced.sum() > 10
  assert (np.asarray(nll)[forced] == 0).all()
  assert (np.asarray(slope)[forced] == 0).all()


def behind_prompts():
  """Rows of two segments, each an item after a prompt: every item after prompts 0 and 1.

  Returns tokens, positions, segments, targets, starts and weights [items, T], and for each row the
  items after the two prompts.
  """
  pairs = [(item, (item + 5) % len(ITEMS)) for item in range(len(ITEMS))]
  rows = []
  for pair in pairs:
    row = []
    for segment, (prompt, item) in enumerate(zip(catalogues.TOKENS, pair)):
      length = catalogues.LENGTHS[segment]
      said = [*prompt[:length], *ITEMS[item]]
      for place in range(len(said) - 1):
        start, target = place == length - 1, place >= length - 1
        row.append((said[place], place, segment + 1, said[place + 1], start, target))
    rows.append(row)
  longest = max(map(len, rows))
  padded = np.array([row + [(0,) * 6] * (longest - len(row)) for row in rows], np.int32)
  return *np.moveaxis(padded, -1, 0), np.array(pairs)


@pytest.mark.parametrize(('name', 'chunk'), [('gemma', 50), ('llama', 4096)])
def test_sums_over_items_are_exact_scores_and_so_are_gradients(name, chunk):
  """From a forward pass of packed titles; with a bias; and the gradient of the prompts."""
  tiny = tiny_lms.tiny_lm(name)
  trie, bias = catalogues.trie(), jnp.asarray(catalogues.bias())
  plan = scoring_plan(trie)
  tokens, positions, segments, targets, starts, weights, pairs = behind_prompts()
  counts = np.random.default_rng(0).uniform(size=pairs.shape).astype(np.float32)
  prompts = jnp.asarray(tiny.embed(catalogues.TOKENS[:2]))
  is_prompt = np.stack([(segments == s) & (positions < catalogues.LENGTHS[s - 1]) for s in (1, 2)])

  @tiny_gemma.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def packed_loss(prompts):
    embeddings = jnp.asarray(tiny.embed(tokens))
    for prompt, here in zip(prompts, is_prompt):
      placed = prompt[np.minimum(positions, prompt.shape[0] - 1)]
      embeddings = jnp.where(here[..., None], placed, embeddings)
    hidden, _ = tiny.lm.apply({'params': tiny.params}, embeddings, positions, segments)
    nll, is_item = catalogue_nll(
      tiny.lm, tiny.params, trie, hidden, targets, starts, weights, bias=bias, chunk=chunk
    )
    nll = jnp.stack([jnp.where(segments == s, nll, 0).sum(axis=1) for s in (1, 2)], axis=1)
    return (counts * nll).sum(), (nll, is_item)

  @tiny_gemma.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def exact_loss(prompts):
    lengths = jnp.asarray(catalogues.LENGTHS[:2])
    scores = catalogue_scores(tiny.lm, tiny.params, plan, prompts, lengths, bias=bias)
    nll = -jnp.stack([scores[s, pairs[:, s]] for s in (0, 1)], axis=1)
    return (counts * nll).sum(), nll

  (_, (nll, is_item)), slope = packed_loss(prompts)
  (_, exact), exact_slope = exact_loss(prompts)
  np.testing.assert_array_equal(is_item, weights)
  np.testing.assert_allclose(nll, exact, atol=2e-5)
  brute = catalogues.brute_force(name, 'catalogue', biased=True)
  np.testing.assert_allclose(nll, -brute[[0, 1], pairs], atol=2e-5)
  np.testing.assert_allclose(slope, exact_slope, rtol=1e-3, atol=1e-4)
  assert np.abs(slope[0]).max() > 0.1


def test_a_bias_of_another_catalogue():
  tiny = tiny_lms.tiny_lm('llama')
  row = jnp.zeros((1, 2), jnp.int32)
  hidden = jnp.zeros((1, 2, tiny.lm.config.d_model))
  trie = catalogues.trie()
  with pytest.raises(UsageError, match='bias of shape'):
    catalogue_nll(tiny.lm, tiny.params, trie, hidden, row, row, row, bias=jnp.zeros(3))

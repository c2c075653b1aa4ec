"""Scores of whole catalogues, against each item in a forward pass of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from ilm_jax.catalogue.trie import build_trie
from ilm_jax.decoding.exact import catalogue_scores, root_log_probs, scoring_plan
from ilm_jax.errors import UsageError
from tests.support import catalogues, tiny_lms


@functools.cache
def compiled(lm, function=catalogue_scores):
  return jax.jit(functools.partial(function, lm))


def scores_of(tiny, plan, **kwargs):
  arguments = (tiny.params, plan, catalogues.embedded(tiny), catalogues.LENGTHS)
  return np.asarray(compiled(tiny.lm)(*arguments, **kwargs))


@pytest.mark.parametrize(
  ('name', 'scan', 'normalise', 'nodes_at_once'),
  [
    ('gemma', True, 'catalogue', 512),
    ('gemma', False, 'vocabulary', 3),
    ('llama', True, 'vocabulary', 512),
    ('llama', False, 'catalogue', 3),
  ],
)
def test_is_what_forward_passes_of_each_item_say(name, scan, normalise, nodes_at_once):
  """With a window shorter than a prompt, softcaps, tied and other heads, one group and many."""
  plan = scoring_plan(catalogues.trie(), normalise, nodes_at_once=nodes_at_once)
  scores = scores_of(tiny_lms.tiny_lm(name, scan), plan)
  np.testing.assert_allclose(scores, catalogues.brute_force(name, normalise), atol=2e-5)
  assert scores.std() > 0.5  # the model does prefer some


@pytest.mark.parametrize(('name', 'nodes_at_once'), [('gemma', 128), ('llama', 3)])
def test_with_a_bias_of_each_edge(name, nodes_at_once):
  """One compiled program for all biases."""
  tiny = tiny_lms.tiny_lm(name)
  plan = scoring_plan(catalogues.trie(), nodes_at_once=nodes_at_once)
  arguments = (tiny.params, plan, catalogues.embedded(tiny), catalogues.LENGTHS)
  program = compiled(tiny.lm).lower(*arguments, bias=catalogues.bias()).compile()
  scores = program(*arguments, bias=catalogues.bias())
  expected = catalogues.brute_force(name, 'catalogue', biased=True)
  np.testing.assert_allclose(scores, expected, atol=2e-5)
  plain = program(*arguments, bias=np.zeros_like(catalogues.bias()))
  np.testing.assert_allclose(plain, catalogues.brute_force(name, 'catalogue'), atol=2e-5)


@pytest.mark.parametrize('biased', [False, True])
def test_probabilities_over_the_catalogue_sum_to_one(biased):
  kwargs = {'bias': catalogues.bias()} if biased else {}
  scores = scores_of(tiny_lms.tiny_lm('gemma'), scoring_plan(catalogues.trie()), **kwargs)
  distinct = [catalogues.SEQUENCES.index(list(s)) for s in catalogues.DISTINCT]
  np.testing.assert_allclose(np.exp(scores[:, distinct]).sum(axis=1), 1, atol=1e-5)
  np.testing.assert_array_equal(scores[:, 2], scores[:, 5])
  np.testing.assert_array_equal(scores[:, 2], scores[:, 10])


def nodes_of(plan):
  """The beginnings that are run."""

  def path(node):
    return (*path(int(plan.trie.parent[node])), int(plan.trie.token[node])) if node > 0 else ()

  return [[path(int(node)) for node in row if node >= 0] for row in plan.groups]


def test_runs_what_branches_and_what_leads_there():
  branching = [(5,), (5, 8), (5, 12), (5, 12, 8), (5, 12, 8, 96), (6,), (6, 8)]
  assert nodes_of(scoring_plan(catalogues.trie())) == [branching]
  inner = {tuple(s[:n]) for s in catalogues.SEQUENCES for n in range(1, len(s))}
  assert nodes_of(scoring_plan(catalogues.trie(), 'vocabulary')) == [sorted(inner)]
  parts = nodes_of(scoring_plan(catalogues.trie(), nodes_at_once=3))
  assert parts == [branching[:3], [(5,), (5, 12), *branching[3:5]], branching[5:]]


@pytest.mark.parametrize(
  ('items', 'normalise'),
  [
    ([[5]], 'catalogue'),
    ([[5], [5]], 'vocabulary'),
    ([[5, 6], [5, 6, 7]], 'catalogue'),
    ([[5], [6, 7]], 'vocabulary'),
  ],
)
def test_catalogues_of_next_to_nothing(items, normalise):
  trie = build_trie([[*item, catalogues.EOS] for item in items], catalogues.EOS)
  tiny = tiny_lms.tiny_lm('llama')
  plan = scoring_plan(trie, normalise)
  scores = scores_of(tiny, plan)
  assert scores.shape == (3, len(items))
  if normalise == 'catalogue':
    whole = scores[:, :1] if items[0] == items[-1] else scores
    np.testing.assert_allclose(np.exp(whole).sum(axis=1), 1, atol=1e-6)
  else:
    row = [*catalogues.TOKENS[1, :4], *items[-1], catalogues.EOS]
    log_probs = tiny.log_probs(tiny.embed(row[:-1]))[3:]
    expected = log_probs[np.arange(len(row) - 4), row[4:]].sum()
    np.testing.assert_allclose(scores[1, -1], expected, atol=1e-5)


@pytest.mark.parametrize('normalise', ['catalogue', 'vocabulary'])
def test_first_tokens_alone(normalise):
  tiny = tiny_lms.tiny_lm('gemma')
  plan = scoring_plan(catalogues.trie(), normalise)
  embeddings = catalogues.embedded(tiny)
  roots = compiled(tiny.lm, root_log_probs)(tiny.params, plan, embeddings, catalogues.LENGTHS)
  first = np.asarray(plan.trie.token[1 : 1 + plan.num_root_children])
  assert first.tolist() == [5, 6, 7, 90]
  for row, (prompt, length) in enumerate(zip(embeddings, catalogues.LENGTHS)):
    expected = tiny.log_probs(prompt[:length])[-1, first]
    if normalise == 'catalogue':
      expected = scipy.special.log_softmax(expected)
    np.testing.assert_allclose(roots[row], expected, atol=1e-5)


def test_first_tokens_with_a_bias():
  tiny = tiny_lms.tiny_lm('gemma')
  plan = scoring_plan(catalogues.trie())
  arguments = (tiny.params, plan, catalogues.embedded(tiny), catalogues.LENGTHS)
  roots = compiled(tiny.lm, root_log_probs)(*arguments, bias=catalogues.bias())
  first = [s[0] for s in catalogues.DISTINCT]
  scores = np.exp(catalogues.brute_force('gemma', 'catalogue', biased=True))
  items = [catalogues.SEQUENCES.index(list(s)) for s in catalogues.DISTINCT]
  for column, token in enumerate([5, 6, 7, 90]):
    below = [item for item, begins in zip(items, first) if begins == token]
    np.testing.assert_allclose(np.exp(roots[:, column]), scores[:, below].sum(axis=1), rtol=1e-4)


def test_gradients_are_those_of_finite_differences():
  """A loss that trains soft tokens goes through all of it."""
  tiny = tiny_lms.tiny_lm('llama')
  plan = scoring_plan(catalogues.trie(), nodes_at_once=3)
  embeddings = jnp.asarray(tiny.embed(catalogues.TOKENS))
  rng = np.random.default_rng(0)
  lengths = jnp.asarray(catalogues.LENGTHS)
  direction = rng.normal(size=embeddings.shape).astype(np.float32)

  @jax.jit
  @jax.value_and_grad
  def loss(embeddings):
    scores = catalogue_scores(tiny.lm, tiny.params, plan, embeddings, lengths)
    return -scores[jnp.arange(3), jnp.array([11, 2, 9])].sum()

  slope = (loss(embeddings)[1] * direction).sum()
  step = 1e-2
  rise = loss(embeddings + step * direction)[0] - loss(embeddings - step * direction)[0]
  np.testing.assert_allclose(slope, rise / (2 * step), rtol=2e-2)


def test_a_wrong_normalisation():
  with pytest.raises(UsageError, match=r"normalise='catalog'.*Did you mean 'catalogue'"):
    scoring_plan(catalogues.trie(), 'catalog')  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize('function', [catalogue_scores, root_log_probs])
def test_a_bias_of_something_else(function):
  tiny = tiny_lms.tiny_lm('llama')
  arguments = catalogues.embedded(tiny), catalogues.LENGTHS
  plan = scoring_plan(catalogues.trie(), 'vocabulary')
  with pytest.raises(UsageError, match="bias with normalise='vocabulary'"):
    function(tiny.lm, tiny.params, plan, *arguments, bias=jnp.asarray(catalogues.bias()))
  plan = scoring_plan(catalogues.trie())
  with pytest.raises(UsageError, match=r'bias of shape \(7,\): .* 34 nodes'):
    function(tiny.lm, tiny.params, plan, *arguments, bias=jnp.zeros(7))

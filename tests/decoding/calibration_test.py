"""Neutral prompts and popularity, in the trie and after it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ilm_jax.decoding.beam import beam_search
from ilm_jax.decoding.calibration import (
  calibrated,
  edge_bias,
  neutral_log_probs,
  popularity_bias,
  tune_calibration,
)
from ilm_jax.decoding.exact import catalogue_scores, scoring_plan
from ilm_jax.errors import UsageError
from tests.support import catalogues, tiny_lms

ITEMS = len(catalogues.SEQUENCES)
COUNTS = np.random.default_rng(7).integers(0, 50, ITEMS)


@functools.cache
def compiled(function, lm, **kwargs):
  return jax.jit(functools.partial(function, lm, **kwargs))


def popularity(weight=1.0):
  """[items] log-probabilities by counts alone, in float64; equal items have their sum."""
  of_text = {}
  for sequence, count in zip(catalogues.SEQUENCES, COUNTS):
    of_text[tuple(sequence)] = of_text.get(tuple(sequence), 0) + count + 1
  total = sum(of_text.values())
  return np.log([of_text[tuple(s)] / total for s in catalogues.SEQUENCES])


def test_a_model_that_says_nothing_gives_items_their_popularity():
  tiny = tiny_lms.tiny_lm('llama')
  params = tiny.params | {'head': jax.tree.map(jnp.zeros_like, tiny.params['head'])}
  bias = popularity_bias(catalogues.trie(), COUNTS)
  assert bias.shape == (catalogues.trie().num_nodes,)
  arguments = catalogues.embedded(tiny), catalogues.LENGTHS
  plan = scoring_plan(catalogues.trie())
  scores = compiled(catalogue_scores, tiny.lm)(params, plan, *arguments, bias=bias)
  np.testing.assert_allclose(scores, np.tile(popularity(), (3, 1)), atol=1e-5)


def test_behind_a_neutral_prompt_items_have_their_popularity():
  """Whatever the model says of titles; by exact scores and by beam search."""
  tiny, plan = tiny_lms.tiny_lm('gemma'), scoring_plan(catalogues.trie())
  # One prompt thrice, as other tests compile these programs.
  arguments = catalogues.embedded(tiny)[[1, 1, 1]], catalogues.LENGTHS[[1, 1, 1]]
  neutral = compiled(neutral_log_probs, tiny.lm)(tiny.params, plan, *arguments)
  bias = edge_bias(popularity_bias(plan.trie, COUNTS), neutral)
  scores = compiled(catalogue_scores, tiny.lm)(tiny.params, plan, *arguments, bias=bias)
  np.testing.assert_allclose(scores[0], popularity(), atol=1e-5)
  assert np.ptp(catalogues.brute_force('gemma', 'catalogue')[1] - popularity()) > 1
  tiny = tiny_lms.tiny_lm('gemma', False)
  search = compiled(beam_search, tiny.lm, beam_size=ITEMS + 5)
  beams = search(tiny.params, plan.trie, *arguments, bias=bias)
  ranked = np.argsort(-popularity().round(9), kind='stable')
  assert beams.items[0, :ITEMS].tolist() == ranked.tolist()
  np.testing.assert_allclose(beams.log_probs[0, :ITEMS], popularity()[ranked], atol=1e-5)


def test_neutral_is_the_mean_of_what_each_prompt_says_of_each_node():
  tiny = tiny_lms.tiny_lm('gemma')
  plan = scoring_plan(catalogues.trie(), nodes_at_once=3)
  arguments = catalogues.embedded(tiny), catalogues.LENGTHS
  neutral = np.asarray(compiled(neutral_log_probs, tiny.lm)(tiny.params, plan, *arguments))
  # p of a node is that of the items below it, and of its token that by its parent's.
  of_items = catalogues.brute_force('gemma', 'catalogue')
  below = {}
  for sequence in catalogues.DISTINCT:
    item = catalogues.SEQUENCES.index(list(sequence))
    for n in range(len(sequence) + 1):
      below.setdefault(sequence[:n], []).append(item)
  log_p = {said: np.log(np.exp(of_items[:, i]).sum(axis=1)) for said, i in below.items()}
  paths = list(catalogues.bias_of())
  assert len(paths) == len(neutral)
  assert neutral[0] == 0
  for node, said in enumerate(paths[1:], 1):
    expected = (log_p[said] - log_p[said[:-1]]).mean()
    np.testing.assert_allclose(neutral[node], expected, atol=2e-5)
    if len(catalogues.legal_after(said[:-1])) == 1:
      assert neutral[node] == 0


def test_weights_of_a_bias():
  a, b = jnp.array([1.0, 2.0]), jnp.array([10.0, 30.0])
  np.testing.assert_array_equal(edge_bias(a, b), [-9, -28])
  np.testing.assert_array_equal(edge_bias(a, b, popularity_weight=2, neutral_weight=0.5), [-3, -11])


def test_what_is_wrong():
  trie = catalogues.trie()
  for counts in (COUNTS[:-1], np.where(np.arange(ITEMS) == 3, -1, COUNTS)):
    with pytest.raises(UsageError, match=r'counts of shape .* 14 items'):
      popularity_bias(trie, counts)
  tiny = tiny_lms.tiny_lm('gemma')
  plan = scoring_plan(trie, 'vocabulary')
  arguments = jnp.asarray(catalogues.embedded(tiny)), jnp.asarray(catalogues.LENGTHS)
  with pytest.raises(UsageError, match="plan with normalise='vocabulary'"):
    neutral_log_probs(tiny.lm, tiny.params, plan, *arguments)
  zeros = np.zeros(3)
  with pytest.raises(UsageError, match='neutral_weights is empty'):
    tune_calibration(np.zeros((1, 3)), zeros, zeros, np.array([0]), neutral_weights=())


def test_tuned_weights_are_those_of_the_lowest_rank_percentile():
  """By counting ranks in a loop; users' choices follow (.5, .25), and seen items do not count."""
  rng = np.random.default_rng(0)
  users, items = 60, 30
  neutral, log_popularity = rng.normal(size=(2, items)) * [[2], [3]]
  truth = rng.normal(size=(users, items))
  scores = truth + 0.5 * neutral - 0.25 * log_popularity
  seen = np.stack([rng.choice(items, 4, replace=False) for _ in range(users)])
  # The best that is not seen, for most.
  masked = truth.copy()
  np.put_along_axis(masked, seen, -np.inf, axis=1)
  targets = np.argsort(-masked, axis=1)[np.arange(users), rng.choice([0, 0, 0, 3, 8], users)]
  exclude = np.arange(users + 1) * 4, seen.ravel()
  grid = (0.0, 0.25, 0.5, 1.0)
  found = tune_calibration(
    scores, neutral, log_popularity, targets, exclude,
    neutral_weights=grid, popularity_weights=grid,
  )  # fmt: skip

  def percentile(weights):
    total = 0.0
    for user in range(users):
      values = scores[user] - weights[0] * neutral + weights[1] * log_popularity
      others = [i for i in range(items) if i not in seen[user] and i != targets[user]]
      total += np.mean([values[i] > values[targets[user]] for i in others])
    return total / users

  best = min(((a, b) for a in grid for b in grid), key=percentile)
  assert found == best == (0.5, 0.25)
  np.testing.assert_allclose(calibrated(scores, neutral, log_popularity, *found), truth, atol=1e-12)


def test_equal_percentiles_are_decided_by_reciprocal_ranks():
  """Two users: ranks 1 and 1 without popularity, 0 and 2 with it."""
  scores = np.array([[2.0, 3.0, 1.0], [1.5, 2.0, 2.5]])
  log_popularity, targets = np.array([1.5, 0.0, 0.0]), np.array([0, 1])

  def tuned(*popularity_weights):
    return tune_calibration(
      scores, np.zeros(3), log_popularity, targets,
      neutral_weights=(0.0,), popularity_weights=popularity_weights,
    )  # fmt: skip

  assert tuned(0.0, 1.0) == tuned(1.0, 0.0) == (0.0, 1.0)
  assert tuned(2.0, 1.0) == (0.0, 2.0)  # equal in all: the first

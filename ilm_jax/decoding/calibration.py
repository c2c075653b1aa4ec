"""From what a language model says of titles anyway to what it says of them to a user.

Without it, titles that are likely text come first for everybody. So what the model says after a
neutral prompt is taken off, and how popular items are is put on; a model that has learned nothing
then ranks by popularity. Either in the trie, as a bias of each edge, in training as in decoding:

  neutral = neutral_log_probs(lm, params, plan, embeddings, lengths)  # of prompts about nobody
  bias = edge_bias(popularity_bias(trie, counts), neutral)
  scores = catalogue_scores(lm, params, plan, prompts, lengths, bias=bias)

or afterwards, on the scores of items, with `tune_calibration` and `calibrated`.

Letters: B users, I items, N neutral prompts, T tokens, D model width.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ilm_jax.catalogue.trie import Trie
from ilm_jax.decoding.exact import ScoringPlan, node_log_probs
from ilm_jax.errors import UsageError
from ilm_jax.metrics.ranking import rank_percentile, ranks, reciprocal_rank
from ilm_jax.modules.decoder import Decoder

_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)


def popularity_bias(trie: Trie, counts: np.ndarray) -> jax.Array:
  """The logarithm of the sum of count + 1 over the items below each node: [nodes] float32.

  Made once for a catalogue, outside jit. A model that gives all tokens one logit gives, with this
  bias, each item a probability in proportion to its count + 1; items of equal tokens have the sum
  of theirs.

  Args:
    trie: the catalogue.
    counts: [I], how often each item was chosen in training data.

  Raises:
    UsageError: counts are not one number, 0 or more, for each item.
  """
  counts = np.asarray(counts, np.float64)
  if counts.shape != (trie.num_items,) or not (counts >= 0).all():
    raise UsageError(
      f'counts of shape {counts.shape}: one number, 0 or more, is needed for each of the'
      f' {trie.num_items} items of the catalogue.'
    )
  items, first, end = (np.asarray(x) for x in (trie.items, trie.first_item, trie.end_item))
  before = np.concatenate([[0.0], np.cumsum(counts[items] + 1)])
  return jnp.asarray(np.log(before[end] - before[first]), jnp.float32)


def neutral_log_probs(
  lm: Decoder, params: Any, plan: ScoringPlan, embeddings: jax.Array, lengths: jax.Array
) -> jax.Array:
  """What the model says of each node's token, among what may come, after neutral prompts.

  Args:
    lm: a decoder; `params` its parameters.
    plan: of the catalogue, with normalise='catalogue'.
    embeddings: [N, T, D] of prompts that are about no user, padded on the right.
    lengths: [N], tokens of each, 1 or more.

  Returns:
    [nodes] float32, the mean of log-probabilities over the prompts; 0 where a node has no sibling.

  Raises:
    UsageError: the plan is of probabilities over the vocabulary.
  """
  if plan.normalise != 'catalogue':
    raise UsageError(
      f'plan with normalise={plan.normalise!r}: what is neutral is compared with what may come'
      " instead; make the plan with normalise='catalogue'."
    )
  return node_log_probs(lm, params, plan, embeddings, lengths).mean(axis=0)


def edge_bias(
  popularity: jax.Array,
  neutral: jax.Array,
  *,
  popularity_weight: float | jax.Array = 1.0,
  neutral_weight: float | jax.Array = 1.0,
) -> jax.Array:
  """[nodes], of `popularity_bias` and `neutral_log_probs` [nodes] each."""
  return popularity_weight * popularity - neutral_weight * neutral


def calibrated(
  scores: np.ndarray,
  neutral_scores: np.ndarray,
  log_popularity: np.ndarray,
  neutral_weight: float,
  popularity_weight: float,
) -> np.ndarray:
  """Scores [B, I] less neutral ones, plus popularity, [I] each and finite, times their weights."""
  return scores + (popularity_weight * log_popularity - neutral_weight * neutral_scores)


def tune_calibration(
  scores: np.ndarray,
  neutral_scores: np.ndarray,
  log_popularity: np.ndarray,
  targets: np.ndarray,
  exclude: tuple[np.ndarray, np.ndarray] | None = None,
  *,
  neutral_weights: Sequence[float] = _WEIGHTS,
  popularity_weights: Sequence[float] = _WEIGHTS,
) -> tuple[float, float]:
  """The weights of `calibrated` with which targets rank best.

  Feed it each user's VALIDATION item, never the test item: two numbers that were chosen on what is
  then measured are no measurement.

  Args:
    scores: [B, I], of histories that end before the validation item.
    neutral_scores, log_popularity: [I], of training data alone.
    targets: [B], the validation items.
    exclude: items that are no candidates of a user, as metrics.ranking.ranks takes them.
    neutral_weights, popularity_weights: all pairs are tried.

  Returns:
    (neutral_weight, popularity_weight) of the lowest mean rank percentile; of several, of the
    highest MRR; and then the first.

  Raises:
    UsageError: there is no weight to try.
  """
  for name, weights in (
    ('neutral_weights', neutral_weights),
    ('popularity_weights', popularity_weights),
  ):
    if not len(weights):
      raise UsageError(f'{name} is empty: give the weights to try, such as {_WEIGHTS}.')

  def badness(weights: tuple[float, float]) -> tuple[float, float]:
    ranked = ranks(calibrated(scores, neutral_scores, log_popularity, *weights), targets, exclude)
    # What differs in the order of a sum alone is equal.
    percentile, reciprocal = rank_percentile(ranked).mean(), reciprocal_rank(ranked).mean()
    return round(float(percentile), 9), -round(float(reciprocal), 9)

  return min(itertools.product(neutral_weights, popularity_weights), key=badness)

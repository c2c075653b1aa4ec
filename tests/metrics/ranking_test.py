import dataclasses
import itertools
import math

import numpy as np
import pytest
import scipy.stats

from ilm_jax.metrics import ranking


def _every_order(scores, target, excluded):
  """Ranks of the target in every order of the candidates that the scores allow."""
  candidates = [i for i in range(len(scores)) if i == target or i not in excluded]
  orders = [
    order
    for order in itertools.permutations(candidates)
    if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
  ]
  return [order.index(target) for order in orders], len(candidates)


def _random_case(seed, n=12, num_items=6, levels=3):
  rng = np.random.default_rng(seed)
  scores = rng.integers(levels, size=(n, num_items)).astype(np.float32) - 1
  scores[rng.random(scores.shape) < 0.1] = -np.inf
  targets = rng.integers(num_items, size=n)
  seen = [list(rng.integers(num_items, size=rng.integers(4))) for _ in range(n)]  # with repeats
  offsets = np.concatenate([[0], np.cumsum([len(s) for s in seen])])
  return scores, targets, seen, (offsets, np.array([i for s in seen for i in s], np.int32))


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('removed', [True, False])
def test_metrics_are_means_over_every_order_of_the_ties(seed, removed):
  scores, targets, seen, exclude = _random_case(seed)
  ranks = ranking.ranks(scores, targets, exclude if removed else None)
  metrics = ranking.ranking_metrics(ranks, ks=(1, 3, 10))
  optimistic = ranking.ranking_metrics(ranks.optimistic(), ks=(1, 3, 10))
  for row in range(len(scores)):
    places, size = _every_order(scores[row], targets[row], seen[row] if removed else [])
    for chosen, actual in ((places, metrics), ([min(places)], optimistic)):
      for k in (1, 3, 10):
        hits = [place < k for place in chosen]
        gains = [1 / math.log2(place + 2) if place < k else 0 for place in chosen]
        assert actual[f'HR@{k}'][row] == pytest.approx(np.mean(hits))
        assert actual[f'NDCG@{k}'][row] == pytest.approx(np.mean(gains))
      assert actual['MRR'][row] == pytest.approx(np.mean([1 / (place + 1) for place in chosen]))
      percentile = np.mean(chosen) / (size - 1) if size > 1 else 0.5
      assert actual['rank_pct'][row] == pytest.approx(percentile)
    assert ranks.candidates[row] == size


def test_one_score_for_all_items_is_chance():
  metrics = ranking.ranking_metrics(ranking.ranks(np.zeros((3, 100)), np.array([0, 50, 99])))
  np.testing.assert_allclose(metrics['HR@10'], 0.1)
  np.testing.assert_allclose(metrics['rank_pct'], 0.5)


def test_item_order_does_not_matter():
  scores, targets, _, exclude = _random_case(9)
  rng = np.random.default_rng(0)
  new_id = rng.permutation(scores.shape[1])
  shuffled = np.empty_like(scores)
  shuffled[:, new_id] = scores
  before = ranking.ranking_metrics(ranking.ranks(scores, targets, exclude))
  moved = (exclude[0], new_id[exclude[1]])
  after = ranking.ranking_metrics(ranking.ranks(shuffled, new_id[targets], moved))
  for name in before:
    np.testing.assert_array_equal(before[name], after[name])


@pytest.mark.parametrize(
  ('scores', 'targets', 'exclude', 'message'),
  [
    ([[0.0, np.nan]], [0], None, 'NaN, the first is row 0'),
    ([[0.0, 1.0]], [-1], None, 'no target'),
    ([[0.0, 1.0]], [2], None, r'items are 0\.\.1'),
    ([[0.0, 1.0]], [0, 1], None, 'shape'),
    ([[0.0, 1.0]], [0], ([0, 1], [2]), 'exclude: items'),
    ([[0.0, 1.0]], [0], ([0, 1, 1], [1]), 'exclude: offsets'),
  ],
)
def test_refuses_broken_input(scores, targets, exclude, message):
  with pytest.raises(ValueError, match=message):
    ranking.ranks(np.array(scores), np.array(targets), exclude)


def test_bootstrap_agrees_with_scipy_and_with_the_closed_form():
  values = np.random.default_rng(1).exponential(size=400)
  ours = ranking.bootstrap_interval(values, confidence=0.9, resamples=20_000, seed=3)
  theirs = scipy.stats.bootstrap(
    (values,),
    np.mean,
    confidence_level=0.9,
    n_resamples=20_000,
    method='percentile',
    rng=np.random.default_rng(4),
    vectorized=True,
    batch=1000,
  )
  error = values.std() / math.sqrt(len(values))  # of the mean of a resample, exactly
  assert ours.mean == pytest.approx(values.mean())
  assert ours.standard_error == pytest.approx(error, rel=0.02)
  # A percentile of 20,000 resamples is itself uncertain by about .015 standard errors.
  assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.08 * error)
  assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.08 * error)


def test_interval_covers_the_truth_as_often_as_it_says():
  rng = np.random.default_rng(0)
  samples = rng.random((200, 400)) < 0.3  # 400 experiments as columns
  intervals = ranking.bootstrap_intervals(samples, confidence=0.8, resamples=500)
  covered = np.mean([i.low <= 0.3 <= i.high for i in intervals])
  # All columns share one set of resamples, yet each covers with probability .8: se < .03.
  assert 0.72 < covered < 0.88


def test_bootstrap_is_seeded():
  values = np.random.default_rng(1).random((50, 2))
  first = ranking.bootstrap_intervals(values, resamples=300, seed=7)
  assert first == ranking.bootstrap_intervals(values, resamples=300, seed=7)
  assert first != ranking.bootstrap_intervals(values, resamples=300, seed=8)
  alone = ranking.bootstrap_interval(values[:, 1], resamples=300, seed=7)
  assert (first[1].low, first[1].high) == pytest.approx((alone.low, alone.high))


def test_bootstrap_of_many_rows_is_that_of_its_resamples():
  """So many rows that resamples are drawn in several parts; here they are drawn at once."""
  n, resamples = 900_000, 10
  values = np.random.default_rng(2).random((n, 2))
  draws = np.random.default_rng(7).integers(n, size=(resamples, n))
  for column, found in enumerate(ranking.bootstrap_intervals(values, resamples=resamples, seed=7)):
    means = values[draws, column].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    expected = (values[:, column].mean(), low, high, means.std(ddof=1))
    np.testing.assert_allclose(dataclasses.astuple(found), expected, rtol=1e-9)


def test_paired_interval_cancels_what_users_share():
  rng = np.random.default_rng(5)
  difficulty = rng.random(500)
  a, b = difficulty + 0.02 + 0.01 * rng.random(500), difficulty + 0.01 * rng.random(500)
  paired = ranking.paired_bootstrap(a, b)
  assert paired.mean == pytest.approx((a - b).mean())
  assert paired.standard_error == pytest.approx((a - b).std() / math.sqrt(500), rel=0.1)
  assert paired.low > 0
  assert ranking.bootstrap_interval(a).low < ranking.bootstrap_interval(b).high


def test_bootstrap_refuses_broken_input():
  with pytest.raises(ValueError, match='pair the same users'):
    ranking.paired_bootstrap(np.zeros(3), np.zeros(4))
  with pytest.raises(ValueError, match='1 values are not finite'):
    ranking.bootstrap_interval(np.array([0.0, np.inf]))
  with pytest.raises(ValueError, match='rows >= 1'):
    ranking.bootstrap_interval(np.array([]))
  with pytest.raises(ValueError, match='confidence=95'):
    ranking.bootstrap_interval(np.zeros(3), confidence=95)

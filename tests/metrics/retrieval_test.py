import dataclasses

import numpy as np
import pytest

from ilm_jax.metrics import ranking
from ilm_jax.metrics.retrieval import retrieval, retrieval_from_features

WAYS = ('item_to_text', 'text_to_item')


def _arrays(results):
  return {way: dataclasses.astuple(results[way].ranks) for way in WAYS}


def _features(seed=0, n=23, num_queries=3, dim=4):
  """Small whole numbers: sums of products are exact in any order, and many scores tie."""
  rng = np.random.default_rng(seed)
  items = rng.integers(-2, 3, size=(n, num_queries, dim)).astype(np.float32)
  texts = rng.integers(-2, 3, size=(n, dim)).astype(np.float32)
  return items, texts


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('duplicates', [False, True])
def test_agrees_with_random_orders_of_the_ties(seed, duplicates):
  rng = np.random.default_rng(seed)
  n, ks = 7, (1, 2, 5)
  scores = rng.integers(4, size=(n, n)).astype(np.float64)
  labels = list('abacdea') if duplicates else None
  results = retrieval(scores, ks=ks, same=labels)
  for way in WAYS:
    table = scores if way == 'item_to_text' else scores.T
    for i in range(n):
      others = [j for j in range(n) if j != i and not (labels and labels[i] == labels[j])]
      better = sum(table[i, j] > table[i, i] for j in others)
      tied = sum(table[i, j] == table[i, i] for j in others)
      ranks = range(better, better + tied + 1)  # equally likely
      metrics = results[way].metrics
      for k in ks:
        assert metrics[f'R@{k}'][i] == pytest.approx(np.mean([rank < k for rank in ranks]))
      assert metrics['rank'][i] == pytest.approx(np.mean(ranks))
      assert results[way].ranks.candidates[i] == len(others) + 1


def test_worked_example():
  scores = np.array([[0.9, 0.1, 0.0], [0.8, 0.7, 0.2], [0.5, 0.6, 0.4]])
  results = retrieval(scores, ks=(1, 2))
  np.testing.assert_array_equal(results['item_to_text'].metrics['rank'], [0, 1, 2])
  np.testing.assert_array_equal(results['text_to_item'].metrics['rank'], [0, 0, 0])
  np.testing.assert_array_equal(results['item_to_text'].metrics['R@2'], [1, 1, 0])
  assert results['item_to_text'].chance == pytest.approx({'R@1': 1 / 3, 'R@2': 2 / 3, 'rank': 1.0})


def test_a_model_that_knows_nothing_is_at_chance():
  labels = ['x', 'x', 'x', *'abcdefg']
  constant = retrieval(np.zeros((10, 10)), same=labels)
  rng = np.random.default_rng(0)
  metrics = [retrieval(rng.random((10, 10)), same=labels) for _ in range(400)]
  for way in WAYS:
    chance = constant[way].chance
    assert chance['R@1'] == pytest.approx((7 / 10 + 3 / 8) / 10)  # 10, or 8 candidates
    assert chance['R@10'] == 1.0
    for name, value in chance.items():
      assert constant[way].metrics[name].mean() == pytest.approx(value)
      drawn = np.array([result[way].metrics[name].mean() for result in metrics])
      assert drawn.mean() == pytest.approx(value, abs=5 * drawn.std() / np.sqrt(400) + 1e-12)


@pytest.mark.parametrize('block', [1, 5, 23, 100])
def test_features_are_scored_in_blocks_by_the_best_query(block):
  items, texts = _features()
  labels = np.arange(23) // 2
  scores = np.array([[max(q @ t for q in queries) for t in texts] for queries in items])
  expected = retrieval(scores, same=labels)
  actual = retrieval_from_features(items, texts, same=labels, block=block)
  for way in WAYS:
    np.testing.assert_array_equal(_arrays(expected)[way], _arrays(actual)[way])
  one, flat = (retrieval_from_features(x, texts) for x in (items[:, :1], items[:, 0]))
  np.testing.assert_equal(_arrays(one), _arrays(flat))


def test_queries_are_some_rows_and_all_rows_are_candidates():
  items, texts = _features()
  labels, queries = np.arange(23) // 3, np.array([20, 3, 4])
  all_rows = retrieval_from_features(items, texts, same=labels)
  some = retrieval_from_features(items, texts, same=labels, queries=queries, block=2)
  for way in WAYS:
    for name, values in some[way].metrics.items():
      np.testing.assert_array_equal(values, all_rows[way].metrics[name][queries])


def test_never_holds_all_scores_of_features():
  n, largest = 300, 0

  class Watched(np.ndarray):
    def __matmul__(self, other):
      nonlocal largest
      result = np.asarray(self) @ np.asarray(other)
      largest = max(largest, result.size)
      return result

  rng = np.random.default_rng(0)
  items, texts = (rng.normal(size=shape).view(Watched) for shape in ((n, 2, 4), (n, 4)))
  retrieval_from_features(items, texts, block=16)
  assert largest == 16 * n


def test_intervals_are_those_of_ranking_and_systems_pair():
  items, texts = _features(n=60)
  ours = retrieval_from_features(items, texts, seed=3)['item_to_text']
  hits = ours.metrics['R@5']
  expected = ranking.bootstrap_interval(hits, seed=3)
  actual = ours.intervals['R@5']
  assert dataclasses.astuple(actual) == pytest.approx(dataclasses.astuple(expected))
  theirs = retrieval_from_features(items[:, :1], texts)['item_to_text']
  difference = ranking.paired_bootstrap(hits, theirs.metrics['R@5'])
  assert difference.mean == pytest.approx(hits.mean() - theirs.metrics['R@5'].mean())


def test_refuses_broken_input():
  with pytest.raises(ValueError, match='must be a pair'):
    retrieval(np.zeros((2, 3)))
  with pytest.raises(ValueError, match='NaN'):
    retrieval(np.full((2, 2), np.nan))
  with pytest.raises(ValueError, match='3 labels for 2 pairs'):
    retrieval(np.zeros((2, 2)), same=['a', 'b', 'c'])
  with pytest.raises(ValueError, match='text_features'):
    retrieval_from_features(np.zeros((3, 2, 4)), np.zeros((3, 5)))

import dataclasses

import numpy as np
import pytest

from ilm_jax.cf import rankers
from ilm_jax.cf.rankers import Sequences
from ilm_jax.data.prepared import PreparedData
from ilm_jax.errors import UsageError
from ilm_jax.metrics import ranking


def _prepared(seed=0, num_users=30, num_items=20):
  """Random rows with repeats; the first user has a test item only, the second has nothing."""
  rng = np.random.default_rng(seed)
  rows = [rng.integers(num_items - 1, size=rng.integers(1, 40)) for _ in range(num_users)]
  rows[0] = rows[1] = np.zeros(0, np.int64)
  validation = rng.integers(num_items, size=num_users).astype(np.int32)
  test = rng.integers(num_items, size=num_users).astype(np.int32)
  validation[:2], test[1] = -1, -1
  return PreparedData(
    name='toy',
    offsets=np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64),
    items=np.concatenate(rows).astype(np.int32),
    ratings=None,
    timestamps=None,
    validation_items=validation,
    validation_ratings=None,
    validation_timestamps=None,
    test_items=test,
    test_ratings=None,
    test_timestamps=None,
    user_keys=[f'u{i}' for i in range(num_users)],
    item_keys=[f'i{i}' for i in range(num_items)],
    item_text={'title': [f'Film {i}' for i in range(num_items)]},
    heldout_items=np.zeros(num_items, bool),
    settings={},
  )


@pytest.fixture
def prepared():
  return _prepared()


@pytest.fixture
def history(prepared):
  return rankers.histories(prepared, 'test')


def _lists(prepared, split):
  return [list(prepared.history(user, split)) for user in range(prepared.num_users)]


@pytest.mark.parametrize('split', ['validation', 'test'])
def test_histories_are_all_rows_before_the_target(prepared, split):
  history = rankers.histories(prepared, split)
  for user, expected in enumerate(_lists(prepared, split)):
    assert list(history.items[history.offsets[user] : history.offsets[user + 1]]) == expected
  users = np.array([5, 0, 29, 5])
  offsets, items = history.of(users)
  for row, user in enumerate(users):
    assert list(items[offsets[row] : offsets[row + 1]]) == _lists(prepared, split)[user]


def _cosine_oracle(lists, num_items):
  sets = [{user for user, row in enumerate(lists) if item in row} for item in range(num_items)]
  cosines = np.zeros((num_items, num_items))
  for i in range(num_items):
    for j in range(num_items):
      if i != j and sets[i] and sets[j]:
        cosines[i, j] = len(sets[i] & sets[j]) / np.sqrt(len(sets[i]) * len(sets[j]))
  return cosines


def test_popularity_counts_rows(prepared, history):
  scores = rankers.popularity(history)(np.arange(3))
  rows = [item for row in _lists(prepared, 'test') for item in row]
  assert scores.shape == (3, 20)
  assert scores[1].tolist() == [rows.count(item) for item in range(20)]


def test_item_knn_sums_cosines_over_distinct_items(prepared, history):
  lists = _lists(prepared, 'test')
  cosines = _cosine_oracle(lists, 20)
  users = np.array([4, 0, 1, 17])
  scores = rankers.item_knn(history)(users)
  for row, user in enumerate(users):
    expected = sum((cosines[item] for item in set(lists[user])), np.zeros(20))
    np.testing.assert_allclose(scores[row], expected, atol=1e-12)


def test_recency_weighs_the_last_rows(prepared, history):
  lists = _lists(prepared, 'test')
  cosines = _cosine_oracle(lists, 20)
  vectors = np.random.default_rng(3).normal(size=(20, 6)).astype(np.float32)
  vectors[11] = 0
  units = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
  assert max(len(row) for row in lists) > 20
  users = np.arange(30)
  knn = rankers.item_knn_recency(history)(users)
  cosine = rankers.recency_cosine(history, vectors)(users)
  for user in users:
    expected, taste = np.zeros(20), np.zeros(6)
    for age, item in enumerate(lists[user][::-1][:20]):
      expected += 0.8**age * cosines[item]
      taste += 0.8**age * units[item]
    np.testing.assert_allclose(knn[user], expected, atol=1e-12)
    np.testing.assert_allclose(np.delete(cosine[user], 11), np.delete(units @ taste, 11), atol=1e-5)
  assert (cosine[:, 11] == -np.inf).all()


def test_ease_solves_each_column_without_itself(prepared, history):
  lists = _lists(prepared, 'test')
  matrix = np.array([[float(item in row) for item in range(20)] for row in lists])
  expected = np.zeros((20, 20))
  for item in range(20):
    others = np.delete(np.arange(20), item)
    features = matrix[:, others]
    expected[others, item] = np.linalg.solve(
      features.T @ features + 7.0 * np.eye(19), features.T @ matrix[:, item]
    )
  users = np.array([2, 9, 0])
  scores = rankers.ease(history, regularization=7.0)(users)
  np.testing.assert_allclose(scores, matrix[users] @ expected, atol=1e-10)


def test_ease_refuses_large_catalogues():
  history = Sequences(np.array([0, 1]), np.array([0]), rankers.EASE_MAX_ITEMS + 1)
  with pytest.raises(UsageError, match="Leave 'ease' out"):
    rankers.ease(history)


def test_dot_product_never_recommends_cold_items():
  users = np.array([[1.0, 0.0], [0.0, -1.0]], np.float32)
  items = np.array([[0.5, 2.0], [0.0, 0.0]], np.float32)
  scores = rankers.dot_product(users, items)(np.array([1, 0]))
  np.testing.assert_array_equal(scores, [[-2.0, -np.inf], [0.5, -np.inf]])


@pytest.mark.parametrize('split', ['validation', 'test'])
def test_evaluation_ranks_every_user_with_a_target(prepared, split):
  table = np.random.default_rng(5).random((30, 20))
  targets = {'validation': prepared.validation_items, 'test': prepared.test_items}[split]
  removed, kept = rankers.evaluate_scores(
    'x',
    lambda users: table[users],
    prepared,
    split,
    max_scores=20 * 7,  # several batches, the last one short
  )
  expected_users = [user for user in range(30) if targets[user] >= 0]
  for evaluation in (removed, kept):
    assert evaluation.users.tolist() == expected_users
  for row, user in enumerate(expected_users):
    target, seen = targets[user], set(prepared.history(user, split))
    better = [item for item in range(20) if table[user, item] > table[user, target]]
    assert kept.ranks.better[row] == len(better)
    assert removed.ranks.better[row] == len([item for item in better if item not in seen])
    assert removed.ranks.candidates[row] == 20 - len(seen - {target})


def test_all_rankers_run_and_the_table_shows_them(prepared):
  settings = {'factors': 3, 'regularization': 0.5, 'progress': False}
  evaluations = rankers.evaluate_rankers(prepared, ials_settings=settings)
  assert len(evaluations) == 2 * 2 * len(rankers.RANKERS)
  lines = rankers.format_table(evaluations).splitlines()
  assert len(lines) == 2 + len(evaluations)
  assert len({len(line) for line in lines}) == 1
  for evaluation, line in zip(evaluations, lines[2:]):
    seen = 'removed' if evaluation.seen_removed else 'kept'
    cells = [cell.strip() for cell in line.strip('|').split('|')]
    assert cells[:3] == [evaluation.split, seen, evaluation.ranker]
    assert cells[4].startswith(f'{evaluation.metrics["HR@5"].mean():.4f} [')
    interval = evaluation.intervals['MRR']
    assert interval.low <= evaluation.metrics['MRR'].mean() <= interval.high


def test_unknown_names_are_refused_with_a_hint(prepared):
  with pytest.raises(UsageError, match="Did you mean 'itemknn'"):
    rankers.evaluate_rankers(prepared, rankers=['itemkn'])
  with pytest.raises(UsageError, match='validation, test'):
    rankers.evaluate_rankers(prepared, splits=['train'])
  nothing = dataclasses.replace(prepared, test_items=np.full(30, -1, np.int32))
  with pytest.raises(UsageError, match='no user has a test item'):
    rankers.evaluate_rankers(nothing, rankers=['popularity'], splits=['test'])


@pytest.mark.network
def test_reference_figures_of_movielens_100k():
  """Figures of an independent implementation (HR@5, NDCG@5, HR@10, NDCG@10, seen removed).

  They hold for equal timestamps in the order of the source's numeric item ids, and for a target
  placed before what ties with it (which only popularity's NDCG notices).
  """
  from ilm_jax.data.prepare.preparation import PreparationOptions, prepare
  from ilm_jax.tasks import movielens

  prepared = prepare(movielens.ml100k(), PreparationOptions())
  assert (prepared.num_users, prepared.num_items) == (943, 1349)
  assert prepared.num_interactions == 99_287
  expected = {
    ('popularity', True): (0.0339, 0.0207, 0.0498, 0.0257),
    ('itemknn', True): (0.0339, 0.0199, 0.0604, 0.0285),
    ('itemknn_recency', True): (0.0764, 0.0498, 0.1156, 0.0627),
    ('itemknn_recency', False): (0.0308, 0.0201, 0.0615, 0.0299),
    ('ease', True): (0.0456, 0.0278, 0.0912, 0.0426),
  }
  names = ['popularity', 'itemknn', 'itemknn_recency', 'ease']
  for evaluation in rankers.evaluate_rankers(prepared, rankers=names, splits=['test']):
    key = evaluation.ranker, evaluation.seen_removed
    metrics = ranking.ranking_metrics(evaluation.ranks.optimistic())
    means = [metrics[name].mean() for name in ('HR@5', 'NDCG@5', 'HR@10', 'NDCG@10')]
    if key in expected:
      assert np.round(means, 4).tolist() == list(expected[key]), key

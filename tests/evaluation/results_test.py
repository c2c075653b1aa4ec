import json

import numpy as np
import pytest

from ilm_jax.errors import UsageError
from ilm_jax.evaluation.results import Ranked, Results, compare
from ilm_jax.metrics import ranking

RNG = np.random.default_rng(0)


def ranked(users, model='ilm', condition='own', seed=0, **other):
  rng = np.random.default_rng(seed)
  n = len(users)
  ranks = ranking.Ranks(rng.integers(0, 40, n), np.zeros(n, np.int64), np.full(n, 50))
  row = {'task': 'history', 'method': 'readout', 'seen': 'removed'} | other
  return Ranked(model=model, condition=condition, users=np.asarray(users), ranks=ranks, **row)


def test_a_comparison_pairs_the_users_that_both_have():
  a, b = ranked(np.arange(30)), ranked(np.arange(10, 50)[::-1], model='mlp', seed=1)
  found = compare(a, b)
  assert found.users == 20
  common = np.arange(10, 30)
  for name, interval in found.differences.items():
    left = a.metrics[name][common]
    right = np.array([b.metrics[name][np.flatnonzero(b.users == user)[0]] for user in common])
    assert interval == ranking.paired_bootstrap(left, right)


def test_nobody_in_common():
  with pytest.raises(UsageError, match='no user in common'):
    compare(ranked([1, 2]), ranked([3, 4]))


def test_what_is_saved_is_read_back(tmp_path):
  rows = [ranked(np.arange(30)), ranked(np.arange(30), condition='zeroed', seed=2)]
  texts = {'genres: F1': {'own': ranking.bootstrap_interval(RNG.random(20))}}
  results = Results({'split': 'test'}, rows, [compare(*rows)], texts, [{'item': 'Heat'}])
  results.save(tmp_path / 'evaluation')
  again = Results.load(tmp_path / 'evaluation')
  assert again.facts == results.facts
  assert again.texts == texts
  assert again.examples == [{'item': 'Heat'}]
  for row, read in zip(rows, again.rows, strict=True):
    assert read.name == row.name
    np.testing.assert_array_equal(read.users, row.users)
    assert read.intervals == row.intervals
  values = json.loads((tmp_path / 'evaluation' / 'evaluation.json').read_text())
  mean = values['rows'][1]['metrics']['MRR']['mean']
  assert mean == pytest.approx(rows[1].metrics['MRR'].mean())
  assert f'{mean:.4f}' in (tmp_path / 'evaluation' / 'evaluation.txt').read_text()
  with pytest.raises(UsageError):
    results.save(tmp_path / 'evaluation')
  with pytest.raises(UsageError, match=r'no evaluation: it has no evaluation\.json'):
    Results.load(tmp_path)


def test_a_table_has_every_figure_and_a_star_where_an_interval_excludes_0():
  better, worse = (
    ranked(np.arange(30), condition=condition, model='a model') for condition in ('own', 'zeroed')
  )
  better.ranks.better[:] = np.arange(30) % 3
  worse.ranks.better[:] = 20 + np.arange(30) % 3
  texts = {'genres: F1': {'own': ranking.Interval(0.25, 0.125, 0.375, 0.1)}}
  comparisons = [compare(better, worse), compare(better, better)]
  lines = Results({}, [better, worse], comparisons, texts).table().splitlines()
  assert len({line.count('|') for line in lines[:4]}) == 1
  cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
  head = ['model', 'task', 'method', 'condition', 'seen', 'users']
  assert cells[0] == [*head, 'HR@5', 'NDCG@5', 'HR@10', 'NDCG@10', 'MRR', 'rank_pct']
  way = ['a model', 'history', 'readout', 'own', 'removed', '30']
  shown = [str(better.intervals[name]) for name in cells[0][6:]]
  assert cells[2] == [*way, *shown]
  assert cells[2][6] == '1.0000 [1.0000, 1.0000]'
  assert cells[3][3] == 'zeroed'
  assert cells[5][:3] == ['a', 'less b', 'users']
  assert cells[7][3] == '1.0000 [1.0000, 1.0000] *'
  assert all(cell.endswith(' *') for cell in cells[7][3:])
  assert all(cell == '0.0000 [0.0000, 0.0000]' for cell in cells[8][3:])
  assert cells[-1] == ['genres: F1', 'own', '0.2500 [0.1250, 0.3750]']


def test_nothing_is_left_of_results_that_cannot_be_saved(tmp_path):
  """What is no JSON value is told, and no half of an evaluation is there."""
  results = Results({'model': object()}, [ranked([1, 2, 3])])
  with pytest.raises(TypeError):
    results.save(tmp_path / 'evaluation')
  assert not (tmp_path / 'evaluation').exists()


def test_one_row_is_asked_for():
  rows = [ranked(np.arange(3)), ranked(np.arange(3), condition='zeroed')]
  results = Results({}, rows)
  assert results.row(condition='zeroed') is rows[1]
  with pytest.raises(KeyError, match='2 rows have'):
    results.row(method='readout')
  with pytest.raises(KeyError, match='0 rows have'):
    results.row(condition='text_only')

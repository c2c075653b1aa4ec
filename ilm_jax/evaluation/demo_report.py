"""What the demo found, put together for `ilm_jax.evaluation.report`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ilm_jax.cf import rankers
from ilm_jax.data.prepared import PreparedData
from ilm_jax.evaluation import report
from ilm_jax.evaluation.results import Comparison, Ranked, Results, compare
from ilm_jax.metrics.ranking import Interval
from ilm_jax.runtime.metric_log import JSONL_FILE, read_jsonl
from ilm_jax.serving.recommender import Recommender

_SHOWN_USERS = 5
_TOP = 10
_CONDITIONS = {
  'own': 'own soft tokens',
  'shuffled_users': "another user's soft tokens",
  'shuffled_items': "other items' soft tokens",
  'zeroed': 'soft tokens of zeros',
  'text_only': 'titles, no soft tokens',
  '': '',
}
_CURVES = (
  ('phase1', 'Phase 1: loss of items and texts', 'item_text', 'nats'),
  ('', 'Phase 2: loss of the next item of a history', 'item_sequence', 'nats an item'),
  ('', 'Phase 2: loss of titles and genres', 'items_title', 'nats a token'),
)


def report_of(output: Path, seconds: Mapping[str, float], *, smoke: bool = False) -> str:
  """Writes the report of a finished demo; returns a summary for a terminal.

  Args:
    output: the demo's directory.
    seconds: of each stage.
    smoke: whether figures mean nothing.
  """
  ilm, mlp = (Results.load(output / name / 'evaluation') for name in ('ilm', 'mlp'))
  recommender = Recommender.load(output / 'ilm')
  prepared = recommender.prepared
  rows = [r for r in (*ilm.rows, *mlp.rows) if r.seen == 'removed']
  comparisons = _comparisons(ilm, mlp)
  values = {
    'title': 'What an item-language model learned from MovieLens-100K',
    'summary': _summary(ilm, comparisons, prepared.num_items, smoke),
    'settings': {
      'data': f'MovieLens-100K, 5-core: {prepared.num_users} users, {prepared.num_items} films',
      'language model, frozen': recommender.phase.lm.name,
      'soft tokens of a film': recommender.phase.model.num_soft_tokens,
      'to be found': "each user's last film, among all that the user has not seen",
      'tuned on': 'the film before it (weights of the text-only baseline)',
    },
    'stages': [{'name': name, 'seconds': value} for name, value in seconds.items()],
    'rankings': [_ranking(row) for row in rows],
    'comparisons': comparisons,
    'curves': _curves(output),
    'embedding_map': _map(recommender),
    'users': _users(recommender),
    'descriptions': [
      {
        'title': f'{e["item"]}: {e["field"]}',
        'truth': e['truth'],
        'generated': e['generated'],
        'shuffled': e['shuffled'],
      }
      for e in _spread(ilm.examples, _SHOWN_USERS)
    ],
    'generation': _generation(ilm, prepared),
    'notes': [
      'Intervals are 95 % bootstrap intervals over users or films; comparisons are paired.',
      'One seed, minutes of training: what is above is what a demo can show, not what is possible.',
      'Text-only: the frozen language model reads titles, and its scores are calibrated by a'
      ' neutral prompt and popularity, with weights chosen on the validation film.',
    ],
  }
  report.write_report(values, output)
  return report.text_summary(values)


def _summary(
  ilm: Results, comparisons: Sequence[Mapping[str, Any]], num_items: int, smoke: bool
) -> list[str]:
  if smoke:
    return ['This was a smoke test with tiny models and a few steps: its figures mean nothing.']
  own = ilm.row(method='readout', condition='own', seen='removed').intervals
  popularity = ilm.row(method='popularity', seen='removed').intervals
  first = comparisons[0]['metrics']['rank_pct']
  read = first['high'] < 0
  return [
    f'After a few minutes of training around a frozen language model, the film that a user watched'
    f' next is among the first ten of {num_items:,} for {own["HR@10"].mean:.1%} of the users'
    f' (popularity: {popularity["HR@10"].mean:.1%}), and on average in the best'
    f' {own["rank_pct"].mean:.1%} of the list (popularity: {popularity["rank_pct"].mean:.1%}).',
    f"With another user's soft tokens the mean rank is worse by {-first['mean']:.1%} of the list"
    f' (95 % interval {-first["high"]:.1%} to {-first["low"]:.1%}):'
    f' {"the soft tokens are read" if read else "whether the soft tokens are read is not told"}.',
    'The language model itself was not changed by a bit: without soft tokens it says what it said.',
  ]


def _comparisons(ilm: Results, mlp: Results) -> list[dict[str, Any]]:
  """What the demo is to show, in this order."""

  def row(results: Results, method: str, condition: str) -> Ranked:
    return results.row(method=method, condition=condition, seen='removed')

  readout = row(ilm, 'readout', 'own')
  pairs = [
    (readout, row(ilm, 'readout', 'shuffled_users')),
    (readout, row(ilm, 'exact', 'text_only')),
    (readout, row(mlp, 'readout', 'own')),
    (readout, ilm.row(method='popularity', seen='removed')),
    (readout, ilm.row(method='itemknn_recency', seen='removed')),
    (readout, ilm.row(method='ials_recency', seen='removed')),
  ]
  return [_comparison(compare(*pair), *pair) for pair in pairs]


def _comparison(found: Comparison, a: Ranked, b: Ranked) -> dict[str, Any]:
  return {
    'a': _label(a),
    'b': _label(b),
    'users': found.users,
    'metrics': {name: _interval(i) for name, i in found.differences.items()},
  }


def _label(row: Ranked) -> str:
  parts = [row.model if row.model != 'reference' else '', row.method, _CONDITIONS[row.condition]]
  return ', '.join(part for part in parts if part)


def _ranking(row: Ranked) -> dict[str, Any]:
  kind = 'model' if row.condition == 'own' else 'control'
  return {
    'name': row.model if row.model != 'reference' else row.method,
    'method': '' if row.model == 'reference' else row.method,
    'condition': _CONDITIONS[row.condition],
    'kind': 'reference' if row.model == 'reference' else kind,
    'users': len(row.users),
    'seen_items': row.seen,
    'metrics': {name: _interval(i) for name, i in row.intervals.items()},
  }


def _interval(interval: Interval) -> dict[str, float]:
  return {'mean': interval.mean, 'low': interval.low, 'high': interval.high}


def _curves(output: Path) -> list[dict[str, Any]]:
  curves = []
  for only, title, source, unit in _CURVES:
    series = []
    for name in [only] if only else ['ilm', 'mlp']:
      lines = read_jsonl(output / name / JSONL_FILE)
      key = f'train/{source}/loss'
      points = [[line['step'], line[key]] for line in lines if key in line]
      if points:
        series.append({'name': name, 'points': points})
    if series:
      curves.append({'title': title, 'x': 'step', 'y': unit, 'series': series})
  return curves


def _map(recommender: Recommender) -> dict[str, Any]:
  """Items in the plane of the two directions in which their soft tokens differ most."""
  prepared = recommender.prepared
  soft = recommender.soft_tokens(np.arange(prepared.num_items))
  vectors = soft.reshape(prepared.num_items, -1)
  vectors = vectors - vectors.mean(axis=0)
  _, _, directions = np.linalg.svd(vectors, full_matrices=False)
  x, y = (vectors @ directions[:2].T).T
  genres = [text.split(',')[0].strip() or 'none' for text in prepared.item_text['genres']]
  points = [
    {'x': float(a), 'y': float(b), 'title': title, 'group': genre}
    for a, b, title, genre in zip(x, y, prepared.item_text['title'], genres)
  ]
  note = 'Soft tokens of all films, their two principal components; coloured by the first genre.'
  return {'note': note, 'points': points}


def _users(recommender: Recommender) -> list[dict[str, Any]]:
  """Some users: what they saw, what is recommended, and what they saw next."""
  prepared = recommender.prepared
  titles = prepared.item_text['title']
  chosen = np.linspace(0, prepared.num_users - 1, _SHOWN_USERS).astype(int)
  chosen = [user for user in chosen.tolist() if prepared.test_items[user] >= 0]
  history = rankers.histories(prepared, 'test')
  histories = [history.items[history.offsets[u] : history.offsets[u + 1]].tolist() for u in chosen]
  ranked = recommender.top(histories, k=prepared.num_items)
  users = []
  for user, seen, items in zip(chosen, histories, ranked):
    target = int(prepared.test_items[user])
    place = [item for item, _ in items].index(target)
    users.append(
      {
        'name': f'user {prepared.user_keys[user]}',
        'history': [titles[item] for item in seen[-_TOP:]],
        'recommended': [{'title': titles[i], 'score': s} for i, s in items[:_TOP]],
        'next': titles[target],
        'rank': place + 1,
      }
    )
  return users


def _spread(examples: Sequence[Any], count: int) -> list[Any]:
  """A few, from all over."""
  places = np.linspace(0, len(examples) - 1, min(count, len(examples))).astype(int)
  return [examples[i] for i in places.tolist()]


def _generation(ilm: Results, prepared: PreparedData) -> list[dict[str, Any]]:
  found = []
  for name, by_condition in ilm.texts.items():
    if 'own - shuffled_items' in by_condition:
      found.append(
        {
          'what': name,
          'n': int(prepared.heldout_items.sum()),
          'own': _interval(by_condition['own']),
          'control': _interval(by_condition['shuffled_items']),
          'difference': _interval(by_condition['own - shuffled_items']),
          'note': 'held-out films, whose texts phase 1 did not see; control: another film of them',
        }
      )
  return found

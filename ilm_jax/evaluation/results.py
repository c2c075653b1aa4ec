"""What evaluations found: rows of ranks, their intervals, comparisons; on disk, and as tables.

DIR/evaluation.json   every row with its means and intervals, comparisons, metrics of text
DIR/ranks.npz         the rank of each user's target in each row: what paired comparisons need
DIR/evaluation.txt    the tables
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ilm_jax.errors import UsageError
from ilm_jax.metrics import ranking
from ilm_jax.metrics.ranking import Interval
from ilm_jax.runtime.atomic_directory import complete_or_absent

EVALUATION_FILE, RANKS_FILE, TABLE_FILE = 'evaluation.json', 'ranks.npz', 'evaluation.txt'
_RANKS = ('better', 'tied', 'candidates')
SHOWN = ('HR@5', 'NDCG@5', 'HR@10', 'NDCG@10', 'MRR', 'rank_pct')


@dataclasses.dataclass(frozen=True, eq=False)
class Ranked:
  """Where the targets of users stand, ranked in one way.

  Attributes:
    model: whose ranking, e.g. 'ilm'.
    task: the prompt, e.g. 'sequential_seen_title'; 'history' for the readout, '' for references.
    method: 'readout', 'exact', 'beam', or the name of a reference ranker.
    condition: 'own' soft tokens, or a control.
    seen: 'removed' or 'kept': whether a user's own items are candidates.
    users: [n].
    ranks: of their targets.
  """

  model: str
  task: str
  method: str
  condition: str
  seen: str
  users: np.ndarray
  ranks: ranking.Ranks

  @property
  def name(self) -> str:
    """What tells it from other rows of the same model."""
    return '/'.join(part for part in (self.task, self.method, self.condition, self.seen) if part)

  @functools.cached_property
  def metrics(self) -> dict[str, np.ndarray]:
    """By name, [n] each."""
    return ranking.ranking_metrics(self.ranks)

  @functools.cached_property
  def intervals(self) -> dict[str, Interval]:
    columns = np.stack(list(self.metrics.values()), axis=1)
    return dict(zip(self.metrics, ranking.bootstrap_intervals(columns)))

  def of(self, users: np.ndarray) -> dict[str, np.ndarray]:
    """The metrics of some of its users."""
    place = {user: i for i, user in enumerate(self.users.tolist())}
    rows = [place[user] for user in users.tolist()]
    return {name: values[rows] for name, values in self.metrics.items()}


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Metrics of `a` less those of `b`, on the same users, and intervals of the differences."""

  a: str
  b: str
  users: int
  differences: dict[str, Interval]


def compare(a: Ranked, b: Ranked) -> Comparison:
  """Pairs the users that both have.

  Raises:
    UsageError: they have none in common.
  """
  users = np.intersect1d(a.users, b.users)
  if not len(users):
    raise UsageError(f'{a.model} {a.name} and {b.model} {b.name} have no user in common.')
  left, right = a.of(users), b.of(users)
  return Comparison(
    f'{a.model} {a.name}',
    f'{b.model} {b.name}',
    len(users),
    {name: ranking.paired_bootstrap(left[name], right[name]) for name in left},
  )


@dataclasses.dataclass(frozen=True)
class Results:
  """An evaluation of a model.

  Attributes:
    facts: of the model and the data, JSON values.
    rows: rankings.
    comparisons: of rows.
    texts: metrics of generated and predicted texts: name -> condition -> interval.
    examples: generated texts, JSON values.
  """

  facts: Mapping[str, Any]
  rows: Sequence[Ranked]
  comparisons: Sequence[Comparison] = ()
  texts: Mapping[str, Mapping[str, Interval]] = dataclasses.field(default_factory=dict)
  examples: Sequence[Mapping[str, Any]] = ()

  def save(self, directory: Path) -> None:
    """Writes the three files; the directory appears complete or not at all."""
    with complete_or_absent(directory, 'an evaluation') as unfinished:
      (unfinished / EVALUATION_FILE).write_text(json.dumps(self.to_json(), indent=2) + '\n')
      arrays = {}
      for i, row in enumerate(self.rows):
        arrays[f'{i}/users'] = row.users
        arrays |= {f'{i}/{name}': getattr(row.ranks, name) for name in _RANKS}
      np.savez_compressed(unfinished / RANKS_FILE, **arrays)
      (unfinished / TABLE_FILE).write_text(self.table() + '\n')

  def to_json(self) -> dict[str, Any]:
    """Of evaluation.json."""
    return {
      'facts': dict(self.facts),
      'intervals': '95 % bootstrap over users or items',
      'rows': [
        {
          **{name: getattr(row, name) for name in ('model', 'task', 'method', 'condition', 'seen')},
          'users': len(row.users),
          'metrics': {name: interval_json(i) for name, i in row.intervals.items()},
        }
        for row in self.rows
      ],
      'comparisons': [
        {
          'a': c.a,
          'b': c.b,
          'users': c.users,
          'differences': {name: interval_json(i) for name, i in c.differences.items()},
        }
        for c in self.comparisons
      ],
      'texts': {
        name: {condition: interval_json(i) for condition, i in found.items()}
        for name, found in self.texts.items()
      },
      'examples': list(self.examples),
    }

  @classmethod
  def load(cls, directory: Path) -> 'Results':
    """Reads what `save` wrote; comparisons are not read.

    Raises:
      UsageError: it is no evaluation.
    """
    file = directory / EVALUATION_FILE
    if not file.is_file():
      raise UsageError(f'{directory} is no evaluation: it has no {EVALUATION_FILE}.')
    values = json.loads(file.read_text())
    rows = []
    with np.load(directory / RANKS_FILE) as arrays:
      for i, row in enumerate(values['rows']):
        ranks = ranking.Ranks(*(arrays[f'{i}/{name}'] for name in _RANKS))
        names = ('model', 'task', 'method', 'condition', 'seen')
        own = {name: row[name] for name in names}
        rows.append(Ranked(**own, users=arrays[f'{i}/users'], ranks=ranks))
    texts = {
      name: {condition: Interval(**i) for condition, i in found.items()}
      for name, found in values['texts'].items()
    }
    return cls(values['facts'], rows, (), texts, values['examples'])

  def row(self, **wanted: str) -> Ranked:
    """The one row that has these attributes.

    Raises:
      KeyError: there is none, or more than one.
    """
    found = [r for r in self.rows if all(getattr(r, k) == v for k, v in wanted.items())]
    if len(found) != 1:
      raise KeyError(f'{len(found)} rows have {wanted}: {[r.name for r in self.rows]}')
    return found[0]

  def table(self) -> str:
    """All of it as Markdown."""
    parts = [ranking_table(self.rows)]
    if self.comparisons:
      parts.append(comparison_table(self.comparisons))
    if self.texts:
      head = ['text', 'condition', 'mean [95 % interval]']
      lines = [[n, c, str(i)] for n, found in self.texts.items() for c, i in found.items()]
      parts.append(markdown([head, *lines]))
    return '\n\n'.join(parts)


def ranking_table(rows: Sequence[Ranked]) -> str:
  """Means and intervals of rows, in Markdown."""
  head = ['model', 'task', 'method', 'condition', 'seen', 'users', *SHOWN]
  lines = [
    [
      *(r.model, r.task, r.method, r.condition, r.seen, f'{len(r.users):,}'),
      *(str(r.intervals[name]) for name in SHOWN),
    ]
    for r in rows
  ]
  return markdown([head, *lines])


def comparison_table(comparisons: Sequence[Comparison]) -> str:
  """Paired differences, a star where the interval excludes 0, in Markdown."""
  head = ['a', 'less b', 'users', *SHOWN]
  lines = [
    [c.a, c.b, f'{c.users:,}', *(_starred(c.differences[name]) for name in SHOWN)]
    for c in comparisons
  ]
  return markdown([head, *lines])


def markdown(rows: Sequence[Sequence[str]]) -> str:
  """The first row is the head."""
  widths = [max(map(len, column)) for column in zip(*rows)]
  body = [rows[0], ['-' * width for width in widths], *rows[1:]]
  return '\n'.join(
    '| ' + ' | '.join(c.ljust(w) for c, w in zip(row, widths)) + ' |' for row in body
  )


def interval_json(interval: Interval) -> dict[str, float]:
  return dataclasses.asdict(interval)


def _starred(interval: Interval) -> str:
  excludes = interval.low > 0 or interval.high < 0
  return f'{interval}{" *" if excludes else ""}'

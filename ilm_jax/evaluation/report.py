"""What a person reads after a run: report.json, and report.html, one page that needs no server.

The report is plain JSON values; `SCHEMA` says what it may hold. Every section but the title may be
missing, and is then left out. The page loads nothing from anywhere and runs no script.
"""

import json
import math
import numbers
import os
import secrets
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from ilm_jax.errors import did_you_mean
from ilm_jax.evaluation.report_plots import IntervalRow, interval_chart, line_chart, scatter_chart

# How to read SCHEMA: a key that ends in ? may be missing; ANY stands for keys of any name; [x] is a
# list of x, (x, y) a pair; a frozenset holds the words that are allowed; int is a whole number >= 1
# (counts, ranks), float any finite number.
ANY = '*'
INTERVAL = {'mean': float, 'low': float, 'high': float}
SCHEMA = {
  'title': str,
  'summary?': [str],
  'settings?': {ANY: str | float},
  'stages?': [{'name': str, 'seconds': float, 'note?': str}],
  'rankings?': [
    {
      'name': str,
      'method?': str,
      'condition?': str,
      'kind': frozenset({'model', 'control', 'reference'}),
      'users': int,
      'seen_items': str,
      'metrics': {ANY: INTERVAL},
    }
  ],
  'comparisons?': [{'a': str, 'b': str, 'users': int, 'metrics': {ANY: INTERVAL}, 'note?': str}],
  'curves?': [
    {'title': str, 'x': str, 'y': str, 'series': [{'name': str, 'points': [(float, float)]}]}
  ],
  'embedding_map?': {
    'note?': str,
    'points': [{'x': float, 'y': float, 'title': str, 'group': str}],
  },
  'users?': [
    {
      'name': str,
      'history': [str],
      'recommended': [{'title': str, 'score': float}],
      'next': str,
      'rank': int,
    }
  ],
  'descriptions?': [{'title': str, 'truth': str, 'generated': str, 'shuffled': str}],
  'generation?': [
    {
      'what': str,
      'n': int,
      'own': INTERVAL,
      'control': INTERVAL,
      'difference': INTERVAL,
      'note?': str,
    }
  ],
  'notes?': [str],
}

_LOWER_IS_BETTER = frozenset({'rank_pct'})
_MEANINGS = {
  'HR': 'share of users whose next item is among the first {k}',
  'NDCG': 'as HR@{k}, but a place near the top counts more',
  'MRR': 'mean of 1 / rank of the next item',
  'rank_pct': 'share of the other items that are ranked above the next one; 0.5 is chance',
}
_SECTIONS = {
  'rankings': 'Rankings',
  'comparisons': 'Comparisons',
  'users': 'Recommendations',
  'descriptions': 'Descriptions',
  'generation': 'What the text tells',
  'curves': 'Training',
  'embedding_map': 'Map of the items',
  'settings': 'Settings',
  'stages': 'Stages',
  'notes': 'Notes',
}
_TEXT_WIDTH = 100


def write_report(report: Mapping[str, Any], directory: Path) -> None:
  """Writes DIRECTORY/report.json and DIRECTORY/report.html, each whole or not at all.

  Files that are there already are replaced; a report that is refused changes nothing.

  Args:
    report: see `SCHEMA`. Metrics are means with their 95 % intervals; a comparison is paired, a - b
      on the same users; a user's `rank` counts from 1.
    directory: is made where it is missing.

  Raises:
    ValueError: something in `report` is not as in `SCHEMA`; the message names where.
  """
  checked = _checked(report, SCHEMA, 'report')
  text = json.dumps(checked, indent=1, ensure_ascii=False, allow_nan=False) + '\n'
  page = _html(checked)
  directory.mkdir(parents=True, exist_ok=True)
  _replace(directory / 'report.json', text)
  _replace(directory / 'report.html', page)


def text_summary(report: Mapping[str, Any]) -> str:
  """The report for a terminal: rankings, comparisons, one user, two descriptions.

  Args:
    report: see `SCHEMA`.

  Raises:
    ValueError: something in `report` is not as in `SCHEMA`; the message names where.
  """
  report = _checked(report, SCHEMA, 'report')
  blocks = [[_one_line(report['title'])]]
  if summary := report.get('summary'):
    blocks[0] += textwrap.wrap(_one_line(' '.join(summary)), _TEXT_WIDTH)
  if rankings := report.get('rankings'):
    blocks.append(_ranking_lines(rankings))
  if comparisons := report.get('comparisons'):
    blocks.append(_comparison_lines(comparisons))
  if users := report.get('users'):
    blocks.append(_user_lines(users[0]))
  for described in report.get('descriptions', [])[:2]:
    what = {
      'in truth': 'truth',
      'from its soft tokens': 'generated',
      "from another item's": 'shuffled',
    }
    lines = [_one_line(described['title'])]
    for name, key in what.items():
      lines += _hanging(f'  {name:<21}', described[key])
    blocks.append(lines)
  return '\n\n'.join('\n'.join(lines) for lines in blocks) + '\n'


def _ranking_lines(rankings: Sequence[Mapping[str, Any]]) -> list[str]:
  """Tables of as many metrics as fit beside the names, and more tables for the rest."""
  setting = _shared_setting(rankings)
  names = [_ranking_label(one, setting is None) for one in rankings]
  metrics = _metric_names(rankings)
  heads = [
    f'{metric} (low is good)' if metric in _LOWER_IS_BETTER else metric for metric in metrics
  ]
  columns = [
    [_bracketed(one['metrics'][metric]) if metric in one['metrics'] else '-' for one in rankings]
    for metric in metrics
  ]
  columns = [[head, *column] for head, column in zip(heads, columns)]
  columns = [[f'{cell:<{max(map(len, column))}}' for cell in column] for column in columns]
  first = ['', *names]
  first = [f'{cell:<{max(map(len, first))}}' for cell in first]
  lines = ['Rankings: mean [95 % interval]' + (f'; {setting}' if setting else '')]
  start = len(lines)
  while columns:
    if len(lines) > start:
      lines.append('')
    count = 1
    while count < len(columns) and _width([first, *columns[: count + 1]]) <= _TEXT_WIDTH:
      count += 1
    lines += ['  '.join(cells).rstrip() for cells in zip(first, *columns[:count])]
    columns = columns[count:]
  return lines


def _width(columns: Sequence[Sequence[str]]) -> int:
  return sum(len(column[0]) + 2 for column in columns) - 2


def _comparison_lines(comparisons: Sequence[Mapping[str, Any]]) -> list[str]:
  lines = ['Paired differences, a - b [95 % interval]']
  for one in comparisons:
    lines.append(f'{one["a"]}  -  {one["b"]}  ({one["users"]} users)')
    width = max((len(metric) for metric in one['metrics']), default=0)
    for metric, value in one['metrics'].items():
      verdict = _verdict(metric, one, value)
      lines.append(f'  {metric:<{width}}  {_bracketed(value, signed=True)}  {verdict}')
    if note := one.get('note'):
      lines += _hanging('  ', note)
  return lines


def _user_lines(user: Mapping[str, Any]) -> list[str]:
  lines = _hanging(f'{_one_line(user["name"])} watched  ', '; '.join(user['history']))
  hit = _hit(user)
  for i, one in enumerate(user['recommended']):
    mark = '  <- watched next' if i == hit else ''
    lines.append(f'  {i + 1:>2}. {one["score"]:8.2f}  {_one_line(one["title"])}{mark}')
  return lines + _hanging('  watched next: ', f'{user["next"]}, ranked {user["rank"]}')


def _one_line(text: str) -> str:
  """`text` without line breaks, and without what would steer a terminal."""
  return ' '.join(''.join(c if c.isprintable() else ' ' for c in text).split())


def _hanging(start: str, text: str) -> list[str]:
  indent = ' ' * min(len(start), 24)
  text = start + _one_line(text)
  return textwrap.wrap(text, _TEXT_WIDTH, subsequent_indent=indent, drop_whitespace=True) or [start]


def _bracketed(interval: Mapping[str, float], signed: bool = False) -> str:
  digits = _digits(interval)
  mean, low, high = (_number(interval[k], digits, signed) for k in ('mean', 'low', 'high'))
  return f'{mean} [{low}, {high}]'


def _digits(interval: Mapping[str, float]) -> int:
  """Three decimals, or as many (up to six) as show that a number is not 0."""
  shown = (d for d in (3, 4, 5) if all(round(v, d) or not v for v in interval.values()))
  return next(shown, 6)


def _number(value: float, digits: int = 3, signed: bool = False) -> str:
  value = round(value, digits) + 0.0  # no -0
  return f'{value:+.{digits}f}' if signed and value else f'{value:.{digits}f}'


def _verdict(metric: str, comparison: Mapping[str, Any], difference: Mapping[str, float]) -> str:
  """Whether the interval of a - b excludes 0, and whom that favours."""
  side = _side(difference)
  if not side:
    return 'includes 0: no clear difference'
  a_wins = (side > 0) != (metric in _LOWER_IS_BETTER)
  return f'excludes 0, in favour of {comparison["a"] if a_wins else comparison["b"]}'


def _generation_verdict(difference: Mapping[str, float]) -> str:
  side = _side(difference)
  if not side:
    return 'includes 0: no clear difference'
  return f'excludes 0: {"own" if side > 0 else "control"} is higher'


def _side(interval: Mapping[str, float]) -> int:
  """1 or -1 where the whole interval lies above or below 0, else 0."""
  return int(interval['low'] > 0) - int(interval['high'] < 0)


def _hit(user: Mapping[str, Any]) -> int | None:
  """The place among the recommended (from 0) of what was watched next.

  Titles alone do not tell: two films may share one.
  """
  titles = [one['title'] for one in user['recommended']]
  same = [i for i, title in enumerate(titles) if title == user['next']]
  if not same or user['rank'] > len(titles):
    return None
  return user['rank'] - 1 if user['rank'] - 1 in same else same[0]


def _metric_names(entries: Iterable[Mapping[str, Any]]) -> list[str]:
  return list(dict.fromkeys(metric for one in entries for metric in one['metrics']))


def _setting(ranking: Mapping[str, Any]) -> str:
  return f'{ranking["users"]} users, seen items {ranking["seen_items"]}'


def _shared_setting(rankings: Sequence[Mapping[str, Any]]) -> str | None:
  settings = {_setting(one) for one in rankings}
  return settings.pop() if len(settings) == 1 else None


def _ranking_label(ranking: Mapping[str, Any], with_setting: bool) -> str:
  parts = [ranking['name'], ranking.get('method'), ranking.get('condition')]
  return ', '.join(filter(None, [*parts, _setting(ranking) if with_setting else '']))


def _html(report: Mapping[str, Any]) -> str:
  environment = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
  )
  environment.filters.update(
    number=_typeset_number,
    range=_typeset_range,
    signed=lambda interval: _typeset_number(interval, signed=True),
    signed_range=lambda interval: _typeset_range(interval, signed=True),
    duration=_duration,
    score=lambda score: f'{score:.2f}'.replace('-', '\N{MINUS SIGN}'),
  )
  rankings, comparisons = report.get('rankings', []), report.get('comparisons', [])
  curves = [
    (one['title'], line_chart(one['series'], x_label=one['x'], y_label=one['y']))
    for one in report.get('curves', [])
    if any(series['points'] for series in one['series'])
  ]
  points = report.get('embedding_map', {}).get('points')
  filled = dict(report, curves=curves, embedding_map=points)
  setting = _shared_setting(rankings)
  template = environment.from_string(
    resources.files('ilm_jax.evaluation').joinpath('report.html').read_text('utf-8')
  )
  return template.render(
    report=report,
    sections={key: name for key, name in _SECTIONS.items() if filled.get(key)},
    setting=setting,
    metrics=_metric_names(rankings),
    meanings=[(name, _meaning(name)) for name in _metric_names([*rankings, *comparisons])],
    lower_is_better=_LOWER_IS_BETTER,
    label=lambda ranking: _ranking_label(ranking, setting is None),
    verdict=_verdict,
    generation_verdict=_generation_verdict,
    hit=_hit,
    ranking_charts=_metric_charts(
      rankings, lambda one: _ranking_label(one, setting is None), signed=False
    ),
    comparison_charts=_metric_charts(
      comparisons, lambda one: f'{one["a"]} \N{MINUS SIGN} {one["b"]}', signed=True
    ),
    curve_charts=curves,
    map_chart=scatter_chart(points) if points else None,
    generation_charts=[_generation_chart(one) for one in report.get('generation', [])],
  )


def _metric_charts(entries, label, *, signed: bool) -> list[str]:
  """One chart for each metric, with a row for each entry that has it."""
  charts = []
  for metric in _metric_names(entries):
    rows = [
      _interval_row(label(one), one['metrics'][metric], one.get('kind', 'model'), signed)
      for one in entries
      if metric in one['metrics']
    ]
    better = 'lower' if metric in _LOWER_IS_BETTER else 'higher'
    axis = f'{metric}, paired difference' if signed else f'{metric} ({better} is better)'
    charts.append(interval_chart(rows, axis=axis))
  return charts


def _generation_chart(one: Mapping[str, Any]) -> str:
  rows = [
    _interval_row('own soft tokens', one['own'], 'model', False),
    _interval_row('control', one['control'], 'control', False),
  ]
  return interval_chart(rows, axis=one['what'])


def _interval_row(label: str, value: Mapping[str, float], kind: str, signed: bool) -> IntervalRow:
  text = _bracketed(value, signed=signed).replace('-', '\N{MINUS SIGN}')
  return IntervalRow(label, value['mean'], value['low'], value['high'], text, kind)


def _typeset_number(interval: Mapping[str, float], signed: bool = False) -> str:
  return _number(interval['mean'], _digits(interval), signed).replace('-', '\N{MINUS SIGN}')


def _typeset_range(interval: Mapping[str, float], signed: bool = False) -> str:
  low, high = (_number(interval[k], _digits(interval), signed) for k in ('low', 'high'))
  return f'{low} to {high}'.replace('-', '\N{MINUS SIGN}')


def _duration(seconds: float) -> str:
  if seconds < 60:
    return f'{seconds:.1f} s'
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours} h {minutes} min' if hours else f'{minutes} min {rest} s'


def _meaning(metric: str) -> str:
  name, _, k = metric.partition('@')
  return _MEANINGS.get(name, '').format(k=k)


def _checked(value: Any, schema: Any, path: str) -> Any:
  """A copy of `value` in JSON's own types.

  Raises:
    ValueError: `value` is not as in `schema`.
  """
  if isinstance(schema, dict):
    if not isinstance(value, Mapping):
      raise ValueError(f'{path}: expected a mapping, found {value!r}')
    if ANY in schema:
      for key in value:
        _checked_leaf(key, str, f'{path}: key')
      names = {key: schema[ANY] for key in value}
    else:
      names = {key.rstrip('?'): kind for key, kind in schema.items()}
      for key in value:
        if key not in names:
          allowed = ', '.join(names)
          hint = did_you_mean(str(key), names)
          raise ValueError(f'{path}: unknown key {key!r}; allowed are {allowed}.{hint}')
      for key in schema:
        if not key.endswith('?') and key not in value:
          raise ValueError(f'{path}: no {key!r}; it has {", ".join(map(str, value)) or "nothing"}')
    copy = {key: _checked(value[key], names[key], _at(path, key)) for key in value}
    if schema is INTERVAL and copy['low'] > copy['high']:
      raise ValueError(f'{path}: low={copy["low"]} is above high={copy["high"]}')
    return copy
  if isinstance(schema, list | tuple):
    if not isinstance(value, list | tuple):
      raise ValueError(f'{path}: expected a list, found {value!r}')
    if isinstance(schema, tuple) and len(value) != len(schema):
      raise ValueError(f'{path}: expected {len(schema)} values, found {value!r}')
    kinds = schema if isinstance(schema, tuple) else schema * len(value)
    return [_checked(one, kind, f'{path}[{i}]') for i, (one, kind) in enumerate(zip(value, kinds))]
  if isinstance(schema, frozenset):
    if not isinstance(value, str) or value not in schema:
      raise ValueError(f'{path}: {value!r} is none of {", ".join(sorted(schema))}')
    return value
  return _checked_leaf(value, schema, path)


def _checked_leaf(value: Any, schema: Any, path: str) -> str | float:
  kinds = typing.get_args(schema) if isinstance(schema, types.UnionType) else (schema,)
  if str in kinds and isinstance(value, str):
    return value
  # NumPy's scalars are Real and Integral too.
  number = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if number and int in kinds and isinstance(value, numbers.Integral) and int(value) >= 1:
    return int(value)
  if number and float in kinds and math.isfinite(value):
    return int(value) if isinstance(value, numbers.Integral) else float(value)
  names = {str: 'text', float: 'a finite number', int: 'a whole number from 1 on'}
  expected = ' or '.join(names[kind] for kind in kinds)
  raise ValueError(f'{path}: expected {expected}, found {value!r}')


def _at(path: str, key: Any) -> str:
  return f'{path}.{key}' if str(key).isidentifier() else f'{path}[{key!r}]'


def _replace(target: Path, text: str) -> None:
  """Writes a file under another name first: readers see the old one or the new one, whole."""
  unfinished = target.with_name(f'.{target.name}.incomplete-{os.getpid()}-{secrets.token_hex(4)}')
  try:
    with open(unfinished, 'w', encoding='utf-8', newline='\n') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(unfinished, target)
  except BaseException:
    unfinished.unlink(missing_ok=True)
    raise

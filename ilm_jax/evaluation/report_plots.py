"""Charts as inline SVG: curves, means with intervals, a map of points.

A chart is one Markup string that needs nothing beside the style sheet of report.html: colours are
the classes c0..c7 and 'rest', so that they follow the reader's light or dark scheme. Every chart is
420 units wide with text of 12, which a phone shows at about the size of its own text; what a mark
stands for is in its <title>, which browsers show when the pointer rests on it.
"""

import dataclasses
import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

WIDTH = 420
NUM_COLOURS = 8
_DASHES = ('none', '6 3', '2 3', '8 3 2 3')
_LINE = 16  # height of a line of text
_LABEL_CHARS = 60  # of 12 units, on the whole width
_CHAR = 6.8  # width of a digit


@dataclasses.dataclass(frozen=True)
class IntervalRow:
  """One row of `interval_chart`: low <= high, `text` is written beside the mark.

  Attributes:
    kind: 'model' (filled circle), 'control' (open circle) or 'reference' (square).
  """

  label: str
  mean: float
  low: float
  high: float
  text: str
  kind: str = 'model'


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
  """Round numbers, evenly spaced, the first <= low and the last >= high.

  Worked example: 0.013, 0.18 -> [0.0, 0.05, 0.1, 0.15, 0.2].

  Args:
    low, high: finite, low <= high; equal ones are moved apart.
    most: about so many steps.
  """
  if high - low <= 1e-9 * max(abs(low), abs(high)):
    margin = abs(high) / 10 or 1.0
    low, high = low - margin, high + margin
  rough = (high - low) / most
  magnitude = 10.0 ** math.floor(math.log10(rough))
  step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= rough * (1 - 1e-9))
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  digits = max(0, -math.floor(math.log10(step)))
  return [round(i * step, digits) for i in range(first, last + 1)]


def interval_chart(rows: Sequence[IntervalRow], *, axis: str) -> Markup:
  """Means as marks on their intervals, one row each, above one common axis that includes 0.

  Args:
    rows: at least one.
    axis: what the axis shows.
  """
  ticks = nice_ticks(min(0.0, *(r.low for r in rows)), max(0.0, *(r.high for r in rows)))
  x = _scale(ticks, 12, WIDTH - 16 - _CHAR * max(len(row.text) for row in rows))
  marks, y = [], 4
  for row in rows:
    for line in textwrap.wrap(row.label, _LABEL_CHARS) or ['']:
      y += _LINE
      marks.append(_tag('text', line, x=0, y=y - 4))
    y += _LINE
    middle = y - 8
    for value in ticks:  # not through the labels
      kind = 'zero' if value == 0 else 'rule'
      marks.append(_tag('line', class_=kind, x1=x(value), x2=x(value), y1=y - _LINE, y2=y))
    marks.append(
      _tag(
        'g',
        _tag('title', f'{row.label}: {row.text}'),
        _tag('line', class_='interval', x1=x(row.low), x2=x(row.high), y1=middle, y2=middle),
        _mark(row.kind, x(row.mean), middle),
        class_=f'row {row.kind}',
      )
    )
    marks.append(_tag('text', row.text, class_='value', x=WIDTH, y=middle + 4, text_anchor='end'))
    y += 4
  for value, text in zip(ticks, _tick_texts(ticks)):
    marks.append(_tag('text', text, class_='tick', x=x(value), y=y + 15, text_anchor='middle'))
  marks.append(_tag('text', axis, class_='axis', x=12, y=y + 32))
  return _svg(y + 38, f'{axis}: means with intervals', *marks)


def line_chart(series: Sequence[Mapping[str, Any]], *, x_label: str, y_label: str) -> Markup:
  """Curves, with a legend below.

  Args:
    series: {'name': str, 'points': [[x, y], ...]}, with at least one point among them.
    x_label, y_label: of the axes, with their units.
  """
  points = [point for one in series for point in one['points']]
  x_ticks = nice_ticks(min(p[0] for p in points), max(p[0] for p in points))
  y_ticks = nice_ticks(min(p[1] for p in points), max(p[1] for p in points))
  x_texts, y_texts = _tick_texts(x_ticks), _tick_texts(y_ticks)
  left, right = 12 + _CHAR * max(map(len, y_texts)), WIDTH - 4 - _CHAR / 2 * len(x_texts[-1])
  top, bottom = 26, 216
  x, y = _scale(x_ticks, left, right), _scale(y_ticks, bottom, top)
  parts = [_tag('text', y_label, class_='axis', x=0, y=12)]
  for value, text in zip(y_ticks, y_texts):
    parts.append(_tag('line', class_='rule', x1=left, x2=right, y1=y(value), y2=y(value)))
    parts.append(_tag('text', text, class_='tick', x=left - 6, y=y(value) + 4, text_anchor='end'))
  for value, text in zip(x_ticks, x_texts):
    parts.append(_tag('line', class_='zero', x1=x(value), x2=x(value), y1=bottom, y2=bottom + 4))
    parts.append(_tag('text', text, class_='tick', x=x(value), y=bottom + 17, text_anchor='middle'))
  parts.append(_tag('line', class_='zero', x1=left, x2=right, y1=bottom, y2=bottom))
  parts.append(_tag('text', x_label, class_='axis', x=right, y=bottom + 34, text_anchor='end'))
  swatches = []
  for i, one in enumerate(series):
    dash = _DASHES[i % len(_DASHES)]
    places = ' '.join(f'{x(a):.2f},{y(b):.2f}' for a, b in one['points'])
    parts.append(
      _tag(
        'g',
        _tag('polyline', class_='curve', points=places, stroke_dasharray=dash),
        *(
          _tag(
            'circle',
            _tag('title', f'{one["name"]}: {x_label} {a:g}, {y_label} {b:.4g}'),
            cx=x(a),
            cy=y(b),
            r=2.2 if len(one['points']) <= 40 else 1.2,
          )
          for a, b in one['points']
        ),
        class_=_colour(i),
      )
    )
    sample = _tag('line', class_='curve', x1=0, x2=22, y1=6, y2=6, stroke_dasharray=dash)
    swatches.append((one['name'], _swatch(22, sample, _colour(i))))
  return _svg(bottom + 42, f'{y_label} over {x_label}', *parts) + _legend(swatches)


def scatter_chart(points: Sequence[Mapping[str, Any]]) -> Markup:
  """A map of points; both axes have one scale. The largest groups have a colour and a shape.

  Args:
    points: {'x': float, 'y': float, 'title': str, 'group': str}, at least one.
  """
  sizes = Counter(point['group'] for point in points)
  groups = sorted(sizes, key=lambda group: (-sizes[group], group))
  style = {group: i for i, group in enumerate(groups[:NUM_COLOURS])}
  margin = 10
  low = {axis: min(point[axis] for point in points) for axis in 'xy'}
  high = {axis: max(point[axis] for point in points) for axis in 'xy'}
  span = max(high[axis] - low[axis] for axis in 'xy') or 1.0
  unit = (WIDTH - 2 * margin) / span
  height = (high['y'] - low['y']) * unit + 2 * margin
  left = (WIDTH - (high['x'] - low['x']) * unit) / 2
  marks = []
  # Small groups are drawn last, so that large ones do not hide them.
  for point in sorted(points, key=lambda point: -sizes[point['group']]):
    i = style.get(point['group'])
    x = left + (point['x'] - low['x']) * unit
    y = height - margin - (point['y'] - low['y']) * unit
    title = _tag('title', f'{point["title"]} ({point["group"]})')
    marks.append(_dot(i, x, y, title))
  swatches = [
    (f'{group} ({sizes[group]})', _swatch(12, _dot(i, 6, 6), '')) for group, i in style.items()
  ]
  if rest := groups[NUM_COLOURS:]:
    count = sum(sizes[group] for group in rest)
    swatches.append((f'{len(rest)} other groups ({count})', _swatch(12, _dot(None, 6, 6), '')))
  return _svg(height, f'Map of {len(points)} items', *marks) + _legend(swatches)


def _scale(ticks: Sequence[float], start: float, end: float):
  """The linear map of the ticks' range on start..end."""
  low, high = ticks[0], ticks[-1]
  return lambda value: start + (value - low) / (high - low) * (end - start)


def _tick_texts(ticks: Sequence[float]) -> list[str]:
  step = ticks[1] - ticks[0]
  digits = max(0, -math.floor(math.log10(step) + 1e-9))
  return [f'{value + 0.0:,.{digits}f}'.replace('-', '\N{MINUS SIGN}') for value in ticks]


def _mark(kind: str, x: float, y: float) -> Markup:
  if kind == 'reference':
    return _tag('rect', class_='mark', x=x - 4, y=y - 4, width=8, height=8)
  return _tag('circle', class_='mark', cx=x, cy=y, r=4.5)


def _dot(index: int | None, x: float, y: float, *children: Markup) -> Markup:
  """A point of the map: the shape helps where colours cannot be told apart."""
  colour = _colour(index)
  if index is None or index % 3 == 0:
    return _tag('circle', *children, class_=f'dot {colour}', cx=x, cy=y, r=3)
  if index % 3 == 1:
    return _tag(
      'rect', *children, class_=f'dot {colour}', x=x - 2.7, y=y - 2.7, width=5.4, height=5.4
    )
  triangle = f'M{x - 3.4:.2f},{y + 2.8:.2f}h6.8l-3.4,-6.4z'
  return _tag('path', *children, class_=f'dot {colour}', d=triangle)


def _colour(index: int | None) -> str:
  return 'rest' if index is None else f'c{index % NUM_COLOURS}'


def _svg(height: float, label: str, *children: Markup) -> Markup:
  box = f'0 0 {WIDTH} {height:.0f}'
  return _tag('svg', *children, class_='chart', viewBox=box, role='img', aria_label=label)


def _swatch(width: int, sample: Markup, colour: str) -> Markup:
  box = f'0 0 {width} 12'
  return _tag('svg', sample, class_=colour, viewBox=box, width=width, height=12, aria_hidden='true')


def _legend(entries: Sequence[tuple[str, Markup]]) -> Markup:
  return _tag('ul', *(_tag('li', swatch, name) for name, swatch in entries), class_='legend')


def _tag(name: str, *children: str, **attributes: str | float) -> Markup:
  """An element; text and attributes are escaped, children that are Markup are not."""
  written = [
    Markup(' {}="{}"').format(
      key.rstrip('_') if key.endswith('_') else key.replace('_', '-'),
      value if isinstance(value, str) else f'{value:.2f}'.rstrip('0').rstrip('.'),
    )
    for key, value in attributes.items()
  ]
  opening = Markup('<{}{}>').format(name, Markup('').join(written))
  return opening + Markup('').join(children) + Markup('</{}>').format(name)

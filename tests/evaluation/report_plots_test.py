"""Charts: where marks stand is a linear map of the values, and what they are called."""

import re
import textwrap
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest

from ilm_jax.evaluation.report_plots import (
  IntervalRow,
  interval_chart,
  line_chart,
  nice_ticks,
  scatter_chart,
)

MINUS = '\N{MINUS SIGN}'
NUMBER = r'(-?[\d.]+)'


def test_interval_chart_places_are_linear_in_the_values():
  rng = np.random.default_rng(1)
  means = rng.normal(0.02, 0.1, 12)
  lows, highs = means - rng.uniform(0.01, 0.1, 12), means + rng.uniform(0.01, 0.1, 12)
  kinds = ['model', 'control', 'reference'] * 4
  rows = [
    IntervalRow(f'row {i}', *map(float, values), f'text {i}', kind)
    for i, (*values, kind) in enumerate(zip(means, lows, highs, kinds))
  ]
  chart = str(interval_chart(rows, axis='HR@10'))
  lines = re.findall(rf'class="interval" x1="{NUMBER}" x2="{NUMBER}" y1="{NUMBER}"', chart)
  marks = [
    float(cx) if cx else float(x) + 4
    for cx, x in re.findall(rf'class="mark" (?:cx="{NUMBER}"|x="{NUMBER}")', chart)
  ]
  x1, x2, y1 = np.array(lines, float).T
  assert len(marks) == len(x1) == 12
  assert (np.diff(y1) > 0).all()  # one below the other
  values = np.concatenate([means, lows, highs])
  places = np.concatenate([marks, x1, x2])
  order = np.argsort(values)
  assert (np.diff(places[order]) >= 0).all()
  slope, start = np.polyfit(values, places, 1)
  assert slope > 0
  np.testing.assert_allclose(places, start + slope * values, atol=0.02)
  (zero,) = set(re.findall(rf'class="zero" x1="{NUMBER}"', chart))
  assert float(zero) == pytest.approx(start, abs=0.02)
  # the ticks stand where their numbers belong, and enclose all values
  ticks = re.findall(
    rf'<text class="tick" x="{NUMBER}" y="[^"]*" text-anchor="middle">(.*?)<', chart
  )
  for place, text in ticks:
    assert float(place) == pytest.approx(start + slope * float(text.replace(MINUS, '-')), abs=0.02)
  assert float(ticks[0][0]) <= places.min()
  assert float(ticks[-1][0]) >= places.max()
  assert [kind for kind in re.findall(r'<g class="row (\w+)">', chart)] == kinds


def test_long_labels_of_intervals_are_wrapped_not_cut():
  label = 'ilm with a very long name ' * 5
  chart = str(interval_chart([IntervalRow(label, 0.1, 0.0, 0.2, 'x')], axis=''))
  lines = re.findall(r'<text x="0" y="\d+">(.*?)</text>', chart)
  assert lines == textwrap.wrap(label, 60)
  assert len(lines) > 1


def test_line_chart():
  series = [
    {'name': 'a <b>', 'points': [[0, 2.0], [500, 1.0], [1500, 0.25]]},
    {'name': 'c', 'points': [[250, 1.5]]},
    {'name': 'none', 'points': []},
  ]
  chart = str(line_chart(series, x_label='step', y_label='loss, nats'))
  points = np.array(re.findall(rf'cx="{NUMBER}" cy="{NUMBER}"', chart), float)
  values = np.array([point for one in series for point in one['points']])
  for axis, sign in ((0, 1), (1, -1)):
    slope, start = np.polyfit(values[:, axis], points[:, axis], 1)
    assert slope * sign > 0  # SVG's y grows downwards
    np.testing.assert_allclose(points[:, axis], start + slope * values[:, axis], atol=0.02)
  curve = re.findall(r'points="(.*?)"', chart)[0]
  np.testing.assert_allclose([[*map(float, p.split(','))] for p in curve.split()], points[:3])
  assert '<title>a &lt;b&gt;: step 500, loss, nats 1</title>' in chart
  assert '>1,500</text>' in chart
  assert re.findall(r'</svg>([^<]*?)</li>', chart) == ['a &lt;b&gt;', 'c', 'none']
  assert '>step</text>' in chart
  assert '>loss, nats</text>' in chart


def test_scatter_keeps_shape_and_names_the_largest_groups():
  rng = np.random.default_rng(2)
  groups = [i for i in range(10) for _ in range(20 - i)]
  places = rng.uniform(-1, 1, (len(groups), 2)) * [5, 1]
  points = [
    {'x': float(x), 'y': float(y), 'title': f'film {i}', 'group': f'g{group}'}
    for i, (group, (x, y)) in enumerate(zip(groups, places))
  ]
  chart = str(scatter_chart(points))
  found = {}
  middles = {'circle': ('cx', 'cy', 0, 0), 'rect': ('x', 'y', 2.7, 2.7)}
  for tag, attributes, title in re.findall(r'<(\w+) class="dot ([^>]*)><title>(.*?)<', chart):
    if tag == 'path':
      corner = re.search(rf'd="M{NUMBER},{NUMBER}h', attributes).groups()
      found[title] = (float(corner[0]) + 3.4, float(corner[1]) - 2.8)
    else:
      x, y, right, down = middles[tag]
      corner = re.search(rf' {x}="{NUMBER}" {y}="{NUMBER}"', attributes).groups()
      found[title] = (float(corner[0]) + right, float(corner[1]) + down)
  got = np.array([found[f'film {i} (g{group})'] for i, group in enumerate(groups)])
  across, left = np.polyfit(places[:, 0], got[:, 0], 1)
  up, bottom = np.polyfit(places[:, 1], got[:, 1], 1)
  assert across == pytest.approx(-up, rel=1e-3)  # one scale
  np.testing.assert_allclose(got, [left, bottom] + places * [across, up], atol=0.02)
  legend = re.findall(r'</svg>([^<]*?)</li>', chart)
  assert legend == [f'g{i} ({20 - i})' for i in range(8)] + ['2 other groups (23)']
  assert chart.count('class="dot rest"') == 23 + 1


def test_charts_of_one_value():
  one = {'x': 1.0, 'y': 1.0, 'title': 't', 'group': 'g'}
  for chart in (
    scatter_chart([one, one]),
    line_chart([{'name': 'n', 'points': [[3, 0.0]]}], x_label='x', y_label='y'),
    interval_chart([IntervalRow('l', 0.0, 0.0, 0.0, '0')], axis='a'),
  ):
    assert 'nan' not in chart
    assert 'inf' not in chart
    ElementTree.fromstring(f'<p>{chart}</p>')


@pytest.mark.parametrize(
  ('low', 'high', 'expected'),
  [
    (0.013, 0.18, [0, 0.05, 0.1, 0.15, 0.2]),
    (0, 450, [0, 100, 200, 300, 400, 500]),
    (-0.11, 0.079, [-0.15, -0.1, -0.05, 0, 0.05, 0.1]),
    (3, 3, [2.6, 2.8, 3.0, 3.2, 3.4]),
    (0, 0, [-1, -0.5, 0, 0.5, 1]),
  ],
)
def test_ticks(low, high, expected):
  assert nice_ticks(low, high) == expected


def test_ticks_of_any_range_enclose_it_evenly():
  rng = np.random.default_rng(3)
  for _ in range(300):
    low = float(rng.normal() * 10 ** rng.uniform(-4, 6))
    high = low + float(10 ** rng.uniform(-4, 6)) * max(1.0, abs(low) * 1e-6)
    ticks = nice_ticks(low, high)
    step = ticks[1] - ticks[0]
    assert 3 <= len(ticks) <= 8
    assert ticks[0] <= low + step * 1e-6
    assert ticks[-1] >= high - step * 1e-6
    np.testing.assert_allclose([b - a for a, b in pairwise(ticks)], step, rtol=1e-3)
    digits = f'{step:.0e}'[0]
    assert digits in '125'

"""The report: its JSON, its page, its charts, its refusals."""

import copy
import html
import html.parser
import json
import os
import re
from collections import Counter

import numpy as np
import pytest

from ilm_jax.evaluation.report import text_summary, write_report

VOID = {'meta', 'br', 'link', 'img', 'hr'}
MINUS = '\N{MINUS SIGN}'
SECTIONS = [
  'settings',
  'stages',
  'rankings',
  'comparisons',
  'curves',
  'embedding_map',
  'users',
  'descriptions',
  'generation',
  'notes',
]


def interval(mean, low, high):
  return {'mean': mean, 'low': low, 'high': high}


def ranking(name, kind, hr, pct, **more):
  metrics = {
    'HR@10': interval(hr, hr - 0.0181, hr + 0.0194),
    'NDCG@10': interval(hr / 2, hr / 2 - 0.011, hr / 2 + 0.012),
    'MRR': interval(hr / 2.1, hr / 2.1 - 0.0102, hr / 2.1 + 0.0113),
    'rank_pct': interval(pct, pct - 0.0151, pct + 0.0162),
  }
  return {
    'name': name,
    'method': '',
    'condition': '',
    'kind': kind,
    'users': 943,
    'seen_items': 'removed',
    'metrics': metrics,
    **more,
  }


def example():
  """A report as a run on MovieLens-100K makes it."""
  rng = np.random.default_rng(0)
  titles = ['Young Guns & Old <Guns> (1988)', 'Beauty "and" the Beast\'s (1991)', 'M (1931)']
  titles += [f'Film {i} (199{i % 10})' for i in range(40)]
  return {
    'title': 'Films & <words>: an item-language model on MovieLens-100K',
    'summary': [
      'The model puts the next film among its first ten for 9.4 % of 943 users.',
      "With another user's soft tokens that falls to 3.9 %.",
      'iALS, from which the soft tokens are made, reaches 18.1 %.',
    ],
    'settings': {'lm': 'smollm2_135m', 'K & more': 4, 'learning rate': 0.0003},
    'stages': [
      {'name': 'prepare', 'seconds': 12.34, 'note': 'ML-100K, 5-core'},
      {'name': 'phase 1', 'seconds': 95.0, 'note': ''},
      {'name': 'phase 2', 'seconds': 3725.2, 'note': '450 steps'},
    ],
    'rankings': [
      ranking('ilm', 'model', 0.0944, 0.2312, method='readout', condition='own soft tokens'),
      ranking('ilm', 'control', 0.0392, 0.3271, method='readout', condition='shuffled'),
      ranking('ilm', 'control', 0.0312, 0.3391, method='readout', condition='zeroed'),
      ranking('popularity', 'reference', 0.0350, 0.2870),
      ranking('iALS', 'reference', 0.1812, 0.1283),
    ],
    'comparisons': [
      {
        'a': 'ilm, readout',
        'b': 'ilm, readout, shuffled',
        'users': 943,
        'metrics': {
          'HR@10': interval(0.0552, 0.0311, 0.0793),
          'MRR': interval(0.0004, -0.0072, 0.0081),
          'rank_pct': interval(-0.0959, -0.1123, -0.0802),
        },
        'note': 'the same users in the same order',
      },
      {
        'a': 'ilm, readout',
        'b': 'iALS',
        'users': 943,
        'metrics': {
          'HR@10': interval(-0.0868, -0.1102, -0.0623),
          'rank_pct': interval(0.1029, 0.0872, 0.1191),
        },
        'note': '',
      },
    ],
    'curves': [
      {
        'title': 'phase 2: validation',
        'x': 'step',
        'y': 'HR@10',
        'series': [
          {'name': 'ilm', 'points': [[0, 0.03], [150, 0.06], [300, 0.085], [450, 0.091]]},
          {'name': 'shuffled', 'points': [[0, 0.03], [450, 0.04]]},
        ],
      }
    ],
    'embedding_map': {
      'note': 'The CF vectors on their first two principal components.',
      'points': [
        {
          'x': float(rng.normal()),
          'y': float(rng.normal()),
          'title': title,
          'group': f'genre {i % 11} & co',
        }
        for i, title in enumerate(titles)
      ],
    },
    'users': [
      {
        'name': 'user 196',
        'history': ["It's <here> (1990)", titles[2]],
        'recommended': [
          {'title': titles[0], 'score': 3.217},
          {'title': titles[1], 'score': 2.5},
          {'title': 'Twin & Twin (1995)', 'score': -1.25},
          {'title': 'Twin & Twin (1995)', 'score': -1.5},
        ],
        'next': 'Twin & Twin (1995)',
        'rank': 4,
      }
    ],
    'descriptions': [
      {
        'title': titles[0],
        'truth': 'Western & comedy <1988>',
        'generated': 'A western\nof the 1980s.',
        'shuffled': 'A musical.',
      },
      {'title': 'M & N', 'truth': 'Crime', 'generated': 'A crime film.', 'shuffled': 'A war film.'},
    ],
    'generation': [
      {
        'what': 'genre F1',
        'n': 135,
        'own': interval(0.4123, 0.3712, 0.4534),
        'control': interval(0.2211, 0.1902, 0.2523),
        'difference': interval(0.1912, 0.1433, 0.2391),
        'note': 'greedy',
      }
    ],
    'notes': ['Less than half of what iALS knows passes the language model.'],
  }


class Page(html.parser.HTMLParser):
  """Reads a page; fails where tags are not balanced."""

  def __init__(self, text):
    super().__init__(convert_charrefs=True)
    self.open, self.texts, self.rows, self.ids, self.tags = [], [], [], [], Counter()
    self.attributes, self.hits = [], []
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.tags[tag] += 1
    self.attributes += list(attrs.items())
    self.ids += [attrs['id']] if 'id' in attrs else []
    if tag not in VOID:
      self.open.append(tag)
    if tag == 'tr':
      self.rows.append([])
    if tag in ('td', 'th'):
      self.rows[-1].append('')
    if attrs.get('class') == 'hit':
      self.hits.append('')

  def handle_endtag(self, tag):
    assert self.open, f'</{tag}> closes nothing'
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.texts.append(data)
    if {'td', 'th'} & set(self.open):
      self.rows[-1][-1] += data
    if self.open and self.open[-1] == 'li' and self.hits and not self.hits[-1]:
      self.hits[-1] = data

  @property
  def text(self):
    return ' '.join(''.join(self.texts).split())

  def row(self, *start):
    """The cells of the one row that starts so."""
    rows = [[' '.join(cell.split()) for cell in row] for row in self.rows]
    (found,) = (row for row in rows if tuple(row[: len(start)]) == start)
    return found


def written(report, directory):
  write_report(report, directory)
  return (directory / 'report.html').read_text('utf-8')


def shown(value):
  """An interval as a table shows it, written another way than the library's."""
  mean, low, high = (f'{value[key]:.3f}'.replace('-', MINUS) for key in ('mean', 'low', 'high'))
  return f'{mean} {low} to {high}'


def test_json_is_the_report(tmp_path):
  report = example()
  before = copy.deepcopy(report)
  write_report(report, tmp_path / 'new' / 'directory')
  path = tmp_path / 'new' / 'directory' / 'report.json'
  assert json.loads(path.read_text('utf-8')) == report == before
  assert sorted(os.listdir(path.parent)) == ['report.html', 'report.json']


def test_numpy_values_and_tuples_are_taken(tmp_path):
  report = example()
  report['curves'][0]['series'][0]['points'] = [(np.int64(1), np.float32(0.5)), (2, 0.75)]
  report['rankings'][0]['users'] = np.int32(943)
  write_report(report, tmp_path)
  read = json.loads((tmp_path / 'report.json').read_text('utf-8'))
  assert read['curves'][0]['series'][0]['points'] == [[1, 0.5], [2, 0.75]]
  assert read['rankings'][0]['users'] == 943


def test_page_is_one_file_with_balanced_tags(tmp_path):
  text = written(example(), tmp_path)
  page = Page(text)
  assert not {'script', 'link', 'img', 'iframe', 'object'} & set(page.tags)
  assert not re.search(r'url\(|@import|https?:', text)
  assert all(value.startswith('#') for key, value in page.attributes if key == 'href')
  assert not {'src', 'srcset', 'onload'} & {key for key, _ in page.attributes}
  assert sorted(page.ids) == sorted(SECTIONS)  # each once
  links = [value[1:] for key, value in page.attributes if key == 'href']
  assert links == page.ids
  assert page.tags['h1'] == 1
  # one chart a metric for rankings (4) and comparisons (3), curve, map, generation
  assert ('class', 'chart') in page.attributes
  assert page.attributes.count(('class', 'chart')) == 4 + 3 + 1 + 1 + 1


def test_every_text_is_on_the_page_and_escaped(tmp_path):
  report = example()
  text = written(report, tmp_path)
  page = Page(text)

  def strings(value):
    if isinstance(value, str):
      yield value
    elif isinstance(value, dict | list):
      for one in value.values() if isinstance(value, dict) else value:
        yield from strings(one)

  for string in strings(report):
    assert ' '.join(string.split()) in page.text
  for dangerous in ('<Guns>', '<here>', '<words>', '& Old', '<1988>'):
    assert dangerous not in text
  titles = re.findall(r'<title>(.*?)</title>', text)
  assert 'Young Guns &amp; Old &lt;Guns&gt; (1988) (genre 0 &amp; co)' in titles


def test_figures_are_those_of_the_report(tmp_path):
  report = example()
  page = Page(written(report, tmp_path))
  labels = [
    'ilm, readout, own soft tokens',
    'ilm, readout, shuffled',
    'ilm, readout, zeroed',
    'popularity',
    'iALS',
  ]
  for label, one in zip(labels, report['rankings']):
    cells = page.row(label, one['kind'])
    assert cells[2:] == [shown(value) for value in one['metrics'].values()]
  assert page.row('genre F1')[1:4] == ['135', '0.412 0.371 to 0.453', '0.221 0.190 to 0.252']
  assert page.row('genre F1')[4:] == [
    '+0.191 +0.143 to +0.239',
    'excludes 0: own is higher. greedy',
  ]
  assert page.row('prepare') == ['prepare', '12.3 s', 'ML-100K, 5-core']
  assert page.row('phase 1')[1] == '1 min 35 s'
  assert page.row('phase 2')[1] == '1 h 2 min'
  assert page.row('together')[1] == '1 h 3 min'
  assert page.row('learning rate')[1] == '0.0003'
  assert '943 users, seen items removed' in page.text
  scores = re.findall(r'<span class="score">(.*?)</span>', (tmp_path / 'report.html').read_text())
  assert scores == ['3.22', '2.50', f'{MINUS}1.25', f'{MINUS}1.50']


def test_other_settings_are_told_row_by_row(tmp_path):
  report = example()
  report['rankings'][3]['users'] = 200
  del report['rankings'][4]['metrics']['MRR']
  page = Page(written(report, tmp_path))
  assert page.row('popularity, 200 users, seen items removed')
  assert page.row('iALS, 943 users, seen items removed')[4] == '\N{EN DASH}'
  assert 'popularity, 200 users' in text_summary(report)


def test_comparisons_say_whom_they_favour(tmp_path):
  report = example()
  page = Page(written(report, tmp_path))
  ours, shuffled = 'excludes 0, in favour of ilm, readout', 'in favour of ilm, readout, shuffled'
  assert page.row('HR@10', '+0.055 +0.031 to +0.079')[2] == ours
  assert page.row('rank_pct', f'{MINUS}0.096 {MINUS}0.112 to {MINUS}0.080')[2] == ours
  assert page.row('HR@10', f'{MINUS}0.087 {MINUS}0.110 to {MINUS}0.062')[2].endswith('of iALS')
  assert page.row('rank_pct', '+0.103 +0.087 to +0.119')[2].endswith('of iALS')
  # 0.0004 does not become 0
  unclear = page.row('MRR', f'+0.0004 {MINUS}0.0072 to +0.0081')[2]
  assert unclear == 'includes 0: no clear difference'
  report['comparisons'][0]['metrics']['HR@10'] = interval(-0.02, -0.03, -0.01)
  assert (
    shuffled
    in Page(written(report, tmp_path)).row('HR@10', f'{MINUS}0.020 {MINUS}0.030 to {MINUS}0.010')[2]
  )
  report['comparisons'][0]['metrics']['HR@10'] = interval(0.02, 0.0, 0.04)  # touches 0
  assert Page(written(report, tmp_path)).row('HR@10', '+0.020 0.000 to +0.040')[2] == unclear


@pytest.mark.parametrize(
  ('rank', 'next_title', 'place'),
  [
    (4, 'Twin & Twin (1995)', 4),  # the third has the same title
    (3, 'Twin & Twin (1995)', 3),
    (9, 'Twin & Twin (1995)', None),  # another film of that title
    (1, 'Young Guns & Old <Guns> (1988)', 1),
    (7, 'M (1931)', None),
  ],
)
def test_what_was_watched_next_is_marked(tmp_path, rank, next_title, place):
  report = example()
  report['users'][0].update(rank=rank, next=next_title)
  text = written(report, tmp_path)
  items = re.search(r'<ol>(.*?)</ol>', text, re.DOTALL).group(1)
  marked = ['class="hit"' in line for line in items.strip().splitlines()]
  assert marked == [i + 1 == place for i in range(4)]
  assert items.count('watched next') == (place is not None)
  assert f'which is ranked {rank}.' in Page(text).text
  lines = [line for line in text_summary(report).splitlines() if '<- watched next' in line]
  assert [int(line.split('.')[0]) for line in lines] == ([place] if place else [])


@pytest.mark.parametrize('missing', SECTIONS)
def test_missing_sections_are_left_out(tmp_path, missing):
  report = example()
  del report[missing]
  page = Page(written(report, tmp_path))
  assert sorted(page.ids) == sorted(set(SECTIONS) - {missing})
  assert ('href', f'#{missing}') not in page.attributes
  text_summary(report)


def test_title_alone_and_empty_sections(tmp_path):
  for report in (
    {'title': 'A & B'},
    {
      'title': 'A & B',
      'rankings': [],
      'users': [],
      'embedding_map': {'points': []},
      'settings': {},
    },
    {'title': 'A & B', 'curves': [{'title': '', 'x': '', 'y': '', 'series': []}]},
  ):
    page = Page(written(report, tmp_path))
    assert not page.ids
    assert not page.tags['nav']
    assert page.tags['svg'] == 0
    assert text_summary(report) == 'A & B\n'


def change(path, value):
  def apply(report):
    for key in path[:-1]:
      report = report[key]
    report[path[-1]] = value

  return apply


def remove(path):
  def apply(report):
    for key in path[:-1]:
      report = report[key]
    del report[path[-1]]

  return apply


@pytest.mark.parametrize(
  ('spoil', 'message'),
  [
    (remove(['title']), "report: no 'title'"),
    (
      remove(['rankings', 1, 'metrics', 'HR@10', 'mean']),
      r"report.rankings\[1\].metrics\['HR@10'\]: no 'mean'",
    ),
    (change(['ranking'], []), "report: unknown key 'ranking'.*Did you mean 'rankings'"),
    (
      change(['users', 0, 'ranks'], 1),
      r"report.users\[0\]: unknown key 'ranks'.*Did you mean 'rank'",
    ),
    (change(['users', 0, 'rank'], 0), r'report.users\[0\].rank: expected a whole number from 1'),
    (change(['users', 0, 'rank'], 1.5), r'report.users\[0\].rank: expected a whole number'),
    (change(['rankings', 0, 'kind'], 'best'), r"rankings\[0\].kind: 'best' is none of control"),
    (change(['rankings', 0, 'kind'], []), r'rankings\[0\].kind: \[\] is none of'),
    (
      change(['rankings', 0, 'metrics', 'MRR', 'mean'], float('nan')),
      r'rankings\[0\].metrics.MRR.mean: expected a finite number, found nan',
    ),
    (
      change(['generation', 0, 'own'], interval(0.5, 0.6, 0.4)),
      r'generation\[0\].own: low=0.6 is above high=0.4',
    ),
    (
      change(['curves', 0, 'series', 0, 'points', 2], [1]),
      r'curves\[0\].series\[0\].points\[2\]: expected 2 values',
    ),
    (change(['summary'], 'One. Two.'), 'report.summary: expected a list'),
    (change(['settings', 'int8'], True), 'settings.int8: expected text or a finite number'),
    (change(['settings', 'a b'], None), r"settings\['a b'\]: expected text or"),
    (change(['settings', 3], 'x'), 'report.settings: key: expected text, found 3'),
    (change(['stages', 0, 'seconds'], '3'), r"stages\[0\].seconds: expected a finite .* '3'"),
    (change(['embedding_map'], []), r'report.embedding_map: expected a mapping'),
  ],
)
def test_mistakes_are_named_and_change_nothing(tmp_path, spoil, message):
  write_report(example(), tmp_path)
  before = [(tmp_path / name).read_bytes() for name in ('report.json', 'report.html')]
  report = example()
  spoil(report)
  for take in (lambda: write_report(report, tmp_path), lambda: text_summary(report)):
    with pytest.raises(ValueError, match=message):
      take()
  assert [(tmp_path / name).read_bytes() for name in ('report.json', 'report.html')] == before


def test_a_second_report_replaces_the_first_whole(tmp_path, monkeypatch):
  names = ['report.html', 'report.json']
  write_report({'title': 'first'}, tmp_path)
  with open(tmp_path / 'report.html', encoding='utf-8') as reader:
    start = reader.read(20)
    write_report({'title': 'second'}, tmp_path)
    rest = start + reader.read()  # whoever has begun to read reads the first to its end
  assert 'first' in rest
  assert 'second' not in rest
  assert rest.rstrip().endswith('</html>')
  assert '<h1>second</h1>' in (tmp_path / 'report.html').read_text('utf-8')
  assert sorted(os.listdir(tmp_path)) == names

  def full_disk(descriptor):
    raise OSError('no space')

  monkeypatch.setattr(os, 'fsync', full_disk)
  with pytest.raises(OSError, match='no space'):
    write_report({'title': 'third'}, tmp_path)
  assert sorted(os.listdir(tmp_path)) == names
  assert json.loads((tmp_path / 'report.json').read_text('utf-8')) == {'title': 'second'}


def test_text_summary():
  report = example()
  report['descriptions'][0]['generated'] = 'one\x1b[31m\n  two'
  text = text_summary(report)
  lines = text.splitlines()
  assert lines[0] == report['title']
  assert '0.094 [0.076, 0.114]' in text
  row = next(line for line in lines if line.startswith('iALS'))
  shown_row = re.findall(r'(0\.\d+) \[(0\.\d+), (0\.\d+)\]', row)
  metrics = list(report['rankings'][4]['metrics'].values())
  assert shown_row == [
    tuple(f'{value[key]:.3f}' for key in ('mean', 'low', 'high'))
    for value in metrics[: len(shown_row)]
  ]
  # Every metric of every ranking is in one of the tables.
  assert len(re.findall(r'^iALS ', text, re.MULTILINE)) == 2
  assert max(map(len, lines)) <= 100
  assert '  rank_pct  -0.096 [-0.112, -0.080]  excludes 0, in favour of ilm, readout' in lines
  assert '  MRR       +0.0004 [-0.0072, +0.0081]  includes 0: no clear difference' in lines
  assert '   4.    -1.50  Twin & Twin (1995)  <- watched next' in lines
  assert 'M & N' in lines
  assert '\x1b' not in text
  assert any(re.fullmatch(r'  from its soft tokens +one \[31m two', line) for line in lines)

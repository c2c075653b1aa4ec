"""Tables of any domain: what is read is what was written, and every bad input is named."""

import gzip
import json

import numpy as np
import pandas as pd
import pytest

from ilm_jax.errors import UsageError
from ilm_jax.tasks import sources
from ilm_jax.tasks.tabular import tabular

INTERACTIONS = 'user,item,timestamp,stars\n007,a,30,5\n7,b,20,1.5\n007,b,10,4\n'
ITEMS = 'item,title,genre,year\na,"Alien, the film",horror,1979\nb,Brazil,,1985\n'


@pytest.fixture
def write(tmp_path):
  def write(name, text):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path

  return write


def read(write, interactions=INTERACTIONS, items=ITEMS, **options):
  return tabular('shop', write('i.csv', interactions), write('t.csv', items), **options)


def refused(write, *parts, **options):
  with pytest.raises(UsageError) as error:
    read(write, **options)
  for part in parts:
    assert part in str(error.value), (part, str(error.value))


def check(raw):
  assert raw.name == 'shop'
  assert raw.users.tolist() == ['007', '7', '007']  # not 7
  assert raw.items.tolist() == ['a', 'b', 'b']
  assert raw.timestamps.dtype == np.int64
  assert raw.timestamps.tolist() == [30, 20, 10]
  assert raw.ratings.dtype == np.float32
  assert raw.ratings.tolist() == [5.0, 1.5, 4.0]
  assert raw.item_ids.tolist() == ['a', 'b']
  assert list(raw.item_text['title']) == ['Alien, the film', 'Brazil']
  assert list(raw.item_text['genre']) == ['horror', '']


def test_csv(write):
  raw = read(write, rating='stars')
  check(raw)
  assert list(raw.item_text) == ['title', 'genre']  # the year is a number: take it by name
  assert [len(file['sha256']) for file in raw.provenance['files']] == [64, 64]
  json.dumps(raw.provenance)


def test_same_data_in_every_kind_of_file(write, tmp_path):
  frame = pd.DataFrame(
    {
      'user': ['007', '7', '007'],
      'item': list('abb'),
      'timestamp': [30, 20, 10],
      'stars': [5, 1.5, 4],
    }
  )
  items = pd.DataFrame(
    {'item': ['a', 'b'], 'title': ['Alien, the film', 'Brazil'], 'genre': ['horror', None]}
  )
  writers = {
    '.csv': lambda f, p: f.to_csv(p, index=False),
    '.tsv': lambda f, p: f.to_csv(p, index=False, sep='\t'),
    '.csv.gz': lambda f, p: f.to_csv(p, index=False),
    '.tsv.gz': lambda f, p: f.to_csv(p, index=False, sep='\t'),
    '.jsonl': lambda f, p: f.to_json(p, orient='records', lines=True),
    '.jsonl.gz': lambda f, p: f.to_json(p, orient='records', lines=True),
    '.parquet': lambda f, p: f.to_parquet(p),
  }
  for kind, writer in writers.items():
    writer(frame, tmp_path / ('i' + kind))
    writer(items, tmp_path / ('t' + kind))
    check(tabular('shop', tmp_path / ('i' + kind), tmp_path / ('t' + kind), rating='stars'))


def test_parquet_types(write, tmp_path):
  frame = pd.DataFrame(
    {
      'user': pd.Categorical(['u', 'v', 'u']),
      'item': np.array([1, 2, 1], np.uint16),
      'when': pd.to_datetime(['2014-01-30', '2014-01-31', '2014-02-01']),
    }
  )
  frame.to_parquet(tmp_path / 'i.parquet')
  items = pd.DataFrame({'item': [1, 2], 'title': ['x', 'y'], 'tags': [['p', 'q'], []]})
  items.to_parquet(tmp_path / 't.parquet')
  raw = tabular('shop', tmp_path / 'i.parquet', tmp_path / 't.parquet', timestamp='when')
  assert raw.users.tolist() == ['u', 'v', 'u']
  assert raw.items.tolist() == ['1', '2', '1']
  assert raw.timestamps.tolist() == [1391040000, 1391126400, 1391212800]
  assert raw.item_text['tags'] == ['p, q', '']


def test_jsonl_keeps_numbers_as_written_and_joins_lists(write):
  interactions = write(
    'i.jsonl',
    '{"user": 12345678901234567890, "item": "007", "timestamp": 5}\n'
    '\n'
    '{"user": "b", "item": 1.10, "timestamp": "6"}\n',
  )
  items = write(
    't.jsonl',
    '{"item": "007", "title": "T", "genres": ["A", "B"], "n": 3}\n{"item": 1.10, "title": null}\n',
  )
  raw = tabular('shop', interactions, items)
  assert raw.users.tolist() == ['12345678901234567890', 'b']
  assert raw.items.tolist() == ['007', '1.10']
  assert raw.timestamps.tolist() == [5, 6]
  assert raw.item_text == {'title': ['T', ''], 'genres': ['A, B', '']}


def test_named_columns_and_fields(write):
  raw = read(
    write,
    'who,what,stars\nu,a,1\n',
    'what,name,genre,year\na,Alien,horror,1979\n',
    user='who',
    item='what',
    title='name',
    timestamp=None,
    order='file',
    text_fields=['year'],
  )
  assert raw.item_text == {'title': ['Alien'], 'year': ['1979']}
  assert raw.timestamps is None
  assert raw.ratings is None


def test_quoted_line_breaks_and_byte_order_mark(write):
  raw = read(write, items='\ufeffitem,title\r\na,"two\nlines"\r\n\r\nb,"say ""hi"""\r\n')
  assert raw.item_text['title'] == ['two\nlines', 'say "hi"']


@pytest.mark.parametrize(
  ('values', 'expected', 'unit'),
  [
    (['10', '9223372036854775', '-3'], [10, 9223372036854775, -3], 'as in the source'),
    (['1391040000000000001', '-2', '0'], [1391040000000000001, -2, 0], 'as in the source'),
    (['10.0', '1e3', '7'], [10, 1000, 7], 'as in the source'),
    (['0.25', '0.5', '1'], [250_000, 500_000, 1_000_000], "microseconds, if the source's is 1 s"),
    (
      ['2014-01-30', '2014-01-30T01:00:00', '2014-01-30 02:00:00+02:00'],
      [1391040000, 1391043600, 1391040000],
      'seconds since 1970, UTC',
    ),
    (
      ['1969-12-31T23:59:59Z', '1970-01-01', '1970-01-01T00:00:00.5Z'],
      [-1_000_000, 0, 500_000],
      'microseconds since 1970, UTC',
    ),
  ],
)
def test_timestamps(write, values, expected, unit):
  rows = ''.join(f'u,a,{value}\n' for value in values)
  raw = read(write, 'user,item,timestamp\n' + rows)
  assert raw.timestamps.tolist() == expected
  assert raw.provenance['timestamp_unit'] == unit


@pytest.mark.parametrize(
  'value', ['', 'soon', 'nan', 'today', '2014-13-01', '2014-02-30', '9' * 20, '1e300']
)
@pytest.mark.parametrize('first', ['5', '2014-01-30'])
def test_bad_timestamp_names_file_line_and_value(write, first, value):
  rows = f'user,item,timestamp\nu,a,{first}\n\nu,b,{value}\n'
  refused(write, 'i.csv, line 4', "'timestamp'", repr(value), interactions=rows)


def test_dates_among_numbers(write):
  rows = 'user,item,timestamp\nu,a,5\nu,b,2014-01-30\n'
  refused(write, 'line 3', "'2014-01-30'", 'line 2', "'5'", interactions=rows)


def test_null_timestamp_in_parquet(write, tmp_path):
  for when in ([1.0, None], pd.to_datetime(['2014-01-30', None])):
    frame = pd.DataFrame({'user': ['u', 'u'], 'item': ['a', 'b'], 'timestamp': when})
    frame.to_parquet(tmp_path / 'i.parquet')
    with pytest.raises(UsageError, match=r'i.parquet, row 2, column .timestamp.'):
      tabular('shop', tmp_path / 'i.parquet', write('t.csv', ITEMS))


@pytest.mark.parametrize('value', ['', 'nan', 'inf', 'good', '1e99'])
def test_bad_rating(write, value):
  rows = f'user,item,timestamp,stars\nu,a,1,2\nu,b,1,{value}\n'
  refused(write, 'i.csv, line 3', "'stars'", repr(value), interactions=rows, rating='stars')


@pytest.mark.parametrize('row', [',b,1', '  ,b,1', 'u,,1'])
def test_empty_id(write, row):
  rows = f'user,item,timestamp\nu,a,1\n{row}\n'
  refused(write, 'i.csv, line 3', 'the id is empty', interactions=rows)


def test_line_number_after_a_quoted_line_break(write):
  items = 'item,title\na,"one\ntwo\nthree"\n,x\n'
  refused(write, 't.csv, line 5', 'the id is empty', items=items)


def test_ids_that_are_not_ids(write, tmp_path):
  frame = pd.DataFrame({'user': [1.0, 2.0], 'item': ['a', 'b'], 'timestamp': [1, 2]})
  frame.to_parquet(tmp_path / 'i.parquet')
  with pytest.raises(UsageError, match=r"i.parquet, column 'user': its type is double"):
    tabular('shop', tmp_path / 'i.parquet', write('t.csv', ITEMS))
  for value in ('["u"]', 'true', 'null'):
    interactions = write('i.jsonl', f'{{"user": {value}, "item": "a", "timestamp": 1}}\n')
    with pytest.raises(UsageError, match=r"i.jsonl, line 1, column 'user'"):
      tabular('shop', interactions, write('t.csv', ITEMS))


def test_column_not_found(write):
  refused(
    write, "user='usr'", 'i.csv', "'user', 'item', 'timestamp', 'stars'", "mean 'user'", user='usr'
  )
  refused(write, "timestamp='time'", 'i.csv', "mean 'timestamp'", timestamp='time')
  refused(write, "title='titel'", 't.csv', "mean 'title'", title='titel')
  refused(write, "text_fields[1]='genres'", "mean 'genre'", text_fields=['year', 'genres'])


def test_no_timestamps_needs_order_file(write):
  refused(write, "order='file'", timestamp=None)
  refused(write, "order='time'", order='time')


def test_order_file_is_checked(write):
  refused(write, 'i.csv, line 4', "user '007'", 'goes back', order='file')
  rows = 'user,item,timestamp\nu,a,5\nv,a,1\nu,b,5\nv,b,2\n'  # users may take turns, times may tie
  assert read(write, rows, order='file').order == 'file'


def test_item_listed_twice(write):
  refused(write, 't.csv, line 4', "item 'a'", 'line 2', items='item,title\na,x\nb,y\na,z\n')


def test_second_title_column(write):
  items = 'item,title,name\na,x,Alien\nb,y,Brazil\n'
  assert read(write, items=items, title='name').item_text == {'title': ['Alien', 'Brazil']}
  refused(write, "'title'", 'rename', items=items, title='name', text_fields=['title'])


@pytest.mark.parametrize(
  ('text', 'part'),
  [
    ('', 'the file is empty'),
    ('user,item,timestamp\n', 'no rows'),
    ('user,item,timestamp\nu,a,1\nu,b\n', 'line 3: 2 fields, the header has 3'),
    ('user,item,timestamp\nu,a,1\n\nu,b,1,9\n', 'line 4: 4 fields, the header has 3'),
    ('user,item,timestamp\nu,"a,1\nv,b,2\n', 'line 2: unexpected end of data'),
    ('user,item,timestamp\nu,"a" b,1\n', "line 2: ',' expected after '\"'"),
    ('user,user,item,timestamp\nu,u,a,1\n', "more than one column is called 'user'"),
    (b'user,item,timestamp\nu,a,1\nJos\xe9,b,2\n', 'line 3: not UTF-8'),
    (b'user,item,Jos\xe9\nu,a,1\n', 'line 1: not UTF-8'),
  ],
)
def test_malformed_csv(write, text, part):
  refused(write, 'i.csv', part, interactions=text)


@pytest.mark.parametrize(
  ('name', 'data', 'part'),
  [
    ('i.jsonl', b'{"user": 1,\n', 'line 1: not JSON'),
    ('i.jsonl', b'[1]\n', 'line 1: a JSON object is expected'),
    ('i.jsonl', b'\xff\n', 'line 1: not UTF-8'),
    ('i.jsonl', b'\n\n', 'no such column'),
    ('i.parquet', b'PAR1 not really', 'cannot be read as Parquet'),
    ('i.csv.gz', b'user,item,timestamp\n', 'cannot be read'),
    ('i.csv.gz', gzip.compress(INTERACTIONS.encode(), mtime=0)[:-12], 'cannot be read'),
    ('i.jsonl.gz', gzip.compress(b'{"user": 1}\n' * 99, mtime=0)[:-9], 'cannot be read'),
    ('i.xlsx', b'PK', 'unknown kind of file; allowed: .csv'),
  ],
)
def test_unreadable_file(write, name, data, part):
  with pytest.raises(UsageError) as error:
    tabular('shop', write(name, data), write('t.csv', ITEMS))
  assert part in str(error.value)
  assert name in str(error.value)


def test_missing_file_and_directory(write, tmp_path):
  items = write('items.csv', ITEMS)
  with pytest.raises(UsageError, match=r"interactions=.*no such file.*Did you mean 'items.csv'"):
    tabular('shop', tmp_path / 'itmes.csv', items)
  with pytest.raises(UsageError, match=r'interactions=.*is a directory'):
    tabular('shop', tmp_path, items)


def test_text_that_is_not_text(write):
  items = write('t.jsonl', '{"item": "a", "title": "x", "facts": {"size": 1}}\n')
  interactions = write('i.csv', INTERACTIONS)
  assert list(tabular('shop', interactions, items).item_text) == ['title']
  with pytest.raises(UsageError, match=r"t.jsonl, line 1, column 'facts'.*is not text"):
    tabular('shop', interactions, items, text_fields=['facts'])


def test_name_must_be_an_identifier(write):
  with pytest.raises(UsageError, match='letters, digits and underscores'):
    tabular('my shop', write('i.csv', INTERACTIONS), write('t.csv', ITEMS))


# The registry.


def test_shipped_sources():
  assert set(sources.all_sources()) >= {
    *('ml100k', 'ml1m', 'ml25m', 'beauty', 'clothing', 'openp5', 'tabular', 'csv', 'parquet')
  }


def test_load_raw(write):
  raw = sources.load_raw(
    'csv', name='shop', interactions=write('i.csv', INTERACTIONS), items=write('t.csv', ITEMS)
  )
  assert raw.users.tolist() == ['007', '7', '007']


@pytest.mark.parametrize(
  ('dataset', 'options', 'parts'),
  [
    ('ml100', {}, ["dataset='ml100'", 'tabular', "mean 'ml100k'"]),
    ('tabular', {'intractions': 'x'}, ["'intractions'", 'text_fields', "mean 'interactions'"]),
    ('tabular', {'name': 'x'}, ["needs 'interactions', 'items'"]),
    ('ml100k', {'x': 1}, ["no option 'x'", 'it takes none']),
  ],
)
def test_load_raw_refuses(dataset, options, parts):
  with pytest.raises(UsageError) as error:
    sources.load_raw(dataset, **options)
  for part in parts:
    assert part in str(error.value)


def test_own_source(monkeypatch, write):
  monkeypatch.setattr(sources, 'SOURCES', dict(sources.SOURCES))

  @sources.source('my_shop')
  def my_shop(export):
    return tabular('my_shop', export, write('t.csv', ITEMS))

  assert sources.load_raw('my_shop', export=write('i.csv', INTERACTIONS)).name == 'my_shop'
  sources.all_sources()
  with pytest.raises(UsageError, match=r"'tabular'.*is taken by ilm_jax.tasks.tabular"):
    sources.source('tabular')(my_shop)

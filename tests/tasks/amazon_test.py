"""Amazon 2014: reviews are JSON, the metadata are Python literals."""

import gzip
import json

import pytest

from ilm_jax.errors import UsageError
from ilm_jax.tasks import amazon
from ilm_jax.tasks.sources import load_raw

REVIEWS = [
  {
    'reviewerID': f'A{user}',
    'asin': asin,
    'reviewerName': 'Ann "the\\" nose',
    'helpful': [3, 4],
    'reviewText': 'Nice.\n',
    'overall': stars,
    'summary': "It's ok",
    'unixReviewTime': day * 86400,
    'reviewTime': '01 30, 2014',
  }
  for user, asin, stars, day in [(1, 'B001', 5.0, 16100), (2, '7806397051', 1.0, 16000)]
]
META = (
  "{'asin': 'B001', 'description': 'Rock &amp; Roll\\n  \"perfume\"',"
  " 'title': \"L'Eau &quot;X&quot;\", 'price': 9.99, 'imUrl': 'u',"
  " 'brand': 'Dior', 'related': {'also_bought': ['B002']},"
  " 'salesRank': {'Beauty': 12}, 'categories': [['Beauty', 'Fragrance'], ['Gifts']]}\n"
  "{'asin': 'B999', 'title': 'nobody reviewed this', 'categories': [['Beauty']]}\n"
  "{'asin': '7806397051', 'categories': [['Beauty']]}\n"
)


@pytest.fixture
def folder(tmp_path):
  put(tmp_path, 'reviews_Beauty_5.json.gz', ''.join(json.dumps(r) + '\n' for r in REVIEWS))
  put(tmp_path, 'meta_Beauty.json.gz', META)
  return tmp_path


def put(folder, name, text):
  (folder / name).write_bytes(gzip.compress(text.encode(), mtime=0))


def refused(folder, *parts):
  with pytest.raises(UsageError) as error:
    amazon.beauty(folder)
  for part in parts:
    assert part in str(error.value), str(error.value)


def check(raw):
  assert raw.name == 'beauty'
  assert raw.users.tolist() == ['A1', 'A2']
  assert raw.items.tolist() == ['B001', '7806397051']
  assert raw.ratings.tolist() == [5.0, 1.0]
  assert raw.timestamps.tolist() == [16100 * 86400, 16000 * 86400]
  assert raw.item_ids.tolist() == ['B001', '7806397051']
  assert raw.item_text == {
    'title': ['L\'Eau "X"', ''],
    'brand': ['Dior', ''],
    'categories': ['Beauty > Fragrance; Gifts', 'Beauty'],
    'description': ['Rock & Roll "perfume"', ''],
  }
  json.dumps(raw.provenance)


def test_reviews(folder):
  check(load_raw('beauty', source_dir=folder))


def test_ratings_csv(folder):
  (folder / 'reviews_Beauty_5.json.gz').unlink()
  rows = (f'{r["reviewerID"]},{r["asin"]},{r["overall"]},{r["unixReviewTime"]}\n' for r in REVIEWS)
  (folder / 'ratings_Beauty.csv').write_text(''.join(rows))
  check(amazon.beauty(folder))


def test_clothing(folder):
  for kind in ('reviews_{}_5.json.gz', 'meta_{}.json.gz'):
    (folder / kind.format('Beauty')).rename(folder / kind.format('Clothing_Shoes_and_Jewelry'))
  assert amazon.clothing(folder).name == 'clothing'


def test_missing_files_say_where_to_get_them(folder):
  (folder / 'reviews_Beauty_5.json.gz').unlink()
  refused(folder, 'reviews_Beauty_5.json.gz (or ratings_Beauty.csv)', 'jmcauley', str(folder))
  (folder / 'meta_Beauty.json.gz').unlink()
  refused(folder, 'meta_Beauty.json.gz', 'jmcauley', str(folder))


def test_metadata_are_never_evaluated(folder, tmp_path):
  trap = tmp_path / 'trap'
  put(folder, 'meta_Beauty.json.gz', META + f"{{'title': open({str(trap)!r}, 'w').name}}\n")
  refused(folder, 'meta_Beauty.json.gz, line 4', 'not a Python literal')
  assert not trap.exists()


@pytest.mark.parametrize(
  ('line', 'part'),
  [
    ("{'asin': 'B001', 'title': 'x'", 'line 4: not a Python literal'),
    ("['asin']", "line 4: a dict with 'asin'"),
    ("{'title': 'x'}", "line 4: a dict with 'asin'"),
    ("{'title': 'x', 'asin': 'B001'}", "line 4: product 'B001' is on line 1 already"),
    ('{[]: 1}', 'line 4: not a Python literal'),
  ],
)
def test_malformed_metadata(folder, line, part):
  put(folder, 'meta_Beauty.json.gz', META + line + '\n')
  refused(folder, 'meta_Beauty.json.gz', part)


@pytest.mark.parametrize(
  ('change', 'part'),
  [
    ({'overall': None}, 'rating None'),
    ({'overall': float('nan')}, "rating 'NaN'"),
    ({'unixReviewTime': 'x'}, "time 'x'"),
    ({'asin': ''}, "product ''"),
    ({'reviewerID': None}, 'user None'),
  ],
)
def test_malformed_reviews(folder, change, part):
  text = ''.join(json.dumps(r) + '\n' for r in [*REVIEWS, {**REVIEWS[0], **change}])
  put(folder, 'reviews_Beauty_5.json.gz', text)
  refused(folder, 'reviews_Beauty_5.json.gz, line 3', part)


def test_unreadable_reviews(folder):
  path = folder / 'reviews_Beauty_5.json.gz'
  put(folder, path.name, '{"asin": "B001"}\n')
  refused(folder, "line 1: no 'reviewerID'; the keys are ['asin']")
  put(folder, path.name, '')
  refused(folder, 'no reviews')
  put(folder, path.name, json.dumps(REVIEWS[0]) + '\n{"asin": \n')
  refused(folder, 'line 2: not JSON')
  path.write_bytes(gzip.compress(json.dumps(REVIEWS[0]).encode())[:-9])
  refused(folder, str(path), 'cannot be read')


def test_malformed_ratings_csv(folder):
  (folder / 'reviews_Beauty_5.json.gz').unlink()
  (folder / 'ratings_Beauty.csv').write_text('A1,B001,5.0,1\nA1,B002,5.0\n')
  refused(folder, 'ratings_Beauty.csv, line 2: user,item,rating,timestamp expected')
  (folder / 'ratings_Beauty.csv').write_text('user,item,rating,timestamp\nA1,B001,5.0,1\n')
  refused(folder, "ratings_Beauty.csv, line 1: rating 'rating'")

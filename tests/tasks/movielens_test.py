"""MovieLens: the real 100K; 1M and 25M from small files in GroupLens's formats, and from TFDS."""

import json
import os
from unittest import mock

import numpy as np
import pandas as pd
import pytest

from ilm_jax.errors import UsageError
from ilm_jax.tasks import movielens

MOVIES = [
  ('1', 'Toy Story (1995)', 'Animation|Comedy'),
  ('34', 'Postino, Il (The Postman) (1994)', 'Drama'),
  ('57', 'Misérables, Les (1995)', '(no genres listed)'),
]
RATINGS = [('1', '34', '3', '978300760'), ('1', '57', '4', '978300760'), ('7', '1', '5', '9')]
EXPECTED_TEXT = {
  'title': ['Toy Story (1995)', 'Il Postino (The Postman) (1994)', 'Les Misérables (1995)'],
  'genres': ['Animation, Comedy', 'Drama', ''],
  'year': ['1995', '1994', '1995'],
}
cut_off = pytest.mark.filterwarnings('ignore:.*Is a file cut off:UserWarning')


def write_1m(folder):
  folder.mkdir()
  for name, rows in {'ratings.dat': RATINGS, 'movies.dat': MOVIES}.items():
    (folder / name).write_bytes(''.join('::'.join(r) + '\n' for r in rows).encode('latin-1'))
  (folder / 'users.dat').write_text('1::F::1::10::48067\n7::M::56::16::70072\n')
  return folder


def write_25m(folder):
  folder.mkdir()
  pd.DataFrame(MOVIES, columns=['movieId', 'title', 'genres']).to_csv(
    folder / 'movies.csv', index=False
  )
  rows = ''.join(','.join([u, m, f'{r}.5', t]) + '\n' for u, m, r, t in RATINGS)
  (folder / 'ratings.csv').write_text('userId,movieId,rating,timestamp\n' + rows)
  return folder


def check(raw, plus=0.0):
  assert raw.users.tolist() == ['1', '1', '7']
  assert raw.items.tolist() == ['34', '57', '1']
  assert raw.timestamps.dtype == np.int64
  assert raw.timestamps.tolist() == [978300760, 978300760, 9]
  assert raw.ratings.dtype == np.float32
  assert raw.ratings.tolist() == [3 + plus, 4 + plus, 5 + plus]
  assert raw.item_ids.tolist() == ['1', '34', '57']
  assert raw.item_text == EXPECTED_TEXT
  assert raw.order == 'timestamp'
  json.dumps(raw.provenance)


@cut_off
def test_ml1m(tmp_path):
  raw = movielens.ml1m(write_1m(tmp_path / 'ml-1m'))
  check(raw)
  assert raw.name == 'ml1m'


@cut_off
def test_ml25m(tmp_path):
  raw = movielens.ml25m(write_25m(tmp_path / 'ml-25m'))
  check(raw, 0.5)
  assert raw.name == 'ml25m'


def test_file_that_is_cut_off_warns(tmp_path):
  with pytest.warns(UserWarning, match='3 ratings; the published data set has 1,000,209'):
    movielens.ml1m(write_1m(tmp_path / 'ml-1m'))


@cut_off
def test_tfds(tmp_path):
  """TFDS's own builder prepares the same files; only its download is replaced."""
  import tensorflow_datasets as tfds

  write_1m(tmp_path / 'ml-1m')
  movies = (tmp_path / 'ml-1m' / 'movies.dat').read_text('latin-1')  # '57': as 1M really has it
  (tmp_path / 'ml-1m' / 'movies.dat').write_text(
    movies.replace('(no genres listed)', "Children's"), 'latin-1'
  )
  data_dir = tmp_path / 'tfds'
  builder = tfds.builder('movielens/1m-ratings', data_dir=data_dir)
  with mock.patch.object(
    tfds.download.DownloadManager, 'download_and_extract', return_value=str(tmp_path)
  ):
    builder.download_and_prepare()

  raw = movielens.ml1m(tfds_dir=data_dir)
  rows = zip(raw.users, raw.items, raw.ratings, raw.timestamps)  # TFDS has shuffled them
  assert sorted(rows) == sorted((u, m, float(r), int(t)) for u, m, r, t in RATINGS)
  assert raw.item_ids.tolist() == ['1', '34', '57']
  assert raw.item_text == {**EXPECTED_TEXT, 'genres': ['Animation, Comedy', 'Drama', 'Children']}
  assert raw.provenance['tfds'] == 'movielens/1m-ratings'


@pytest.mark.parametrize(('read', 'version'), [(movielens.ml1m, '1m'), (movielens.ml25m, '25m')])
def test_missing_files_say_what_to_download(tmp_path, monkeypatch, read, version):
  page = f'https://grouplens.org/datasets/movielens/{version}/'
  with pytest.raises(UsageError) as error:
    read(tmp_path)
  for part in (page, f'ml-{version}.zip', str(tmp_path), 'movies.'):
    assert part in str(error.value)
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'tfds'))
  with pytest.raises(UsageError) as error:
    read()
  for part in (page, str(tmp_path / 'tfds'), f'tfds build movielens/{version}-ratings'):
    assert part in str(error.value)


@pytest.mark.parametrize(
  ('line', 'shown'),
  [
    ('1::34::3', "'1::34::3'"),
    ('1::34::three::9', 'three'),
    ('1::34::nan::9', 'nan'),
    ('x::34::3::9', "'x::"),
    ('1::34::3::', "3::'"),
    ('1::34::3::9::9', '9::9'),
  ],
)
def test_malformed_ratings(tmp_path, line, shown):
  folder = write_1m(tmp_path / 'ml-1m')
  with open(folder / 'ratings.dat', 'a') as f:
    f.write(line + '\n')
  with pytest.raises(UsageError) as error:
    movielens.ml1m(folder)
  for part in ('ratings.dat, line 4', 'user::item::rating::time', shown):
    assert part in str(error.value)


def test_malformed_movies_and_headers(tmp_path):
  folder = write_1m(tmp_path / 'ml-1m')
  (folder / 'movies.dat').write_text('1::Toy Story (1995)::Comedy\n2::Jumanji (1995)\n')
  with pytest.raises(UsageError, match=r'movies.dat, line 2: id::title::genres expected'):
    movielens.ml1m(folder)
  folder = write_25m(tmp_path / 'ml-25m')
  (folder / 'ratings.csv').write_text('1,34,3.5,9\n')
  with pytest.raises(UsageError, match=r"ratings.csv, line 1: the header 'userId,movieId"):
    movielens.ml25m(folder)
  (folder / 'movies.csv').write_text('1,Toy Story (1995),Comedy\n')
  with pytest.raises(UsageError, match=r'movies.csv, line 1: movieId,title,genres expected'):
    movielens.ml25m(folder)


@pytest.mark.parametrize(
  ('title', 'natural'),
  [
    ('Postino, Il', 'Il Postino'),
    ('Nightmare Before Christmas, The', 'The Nightmare Before Christmas'),
    ("Star Maker, The (Uomo delle stelle, L')", "The Star Maker (L'Uomo delle stelle)"),
    ('Maybe, Maybe Not (Bewegte Mann, Der)', 'Maybe, Maybe Not (Der Bewegte Mann)'),
    ('Killer, The (a.k.a. Film, A) (Mörder, Der)', 'The Killer (a.k.a. A Film) (Der Mörder)'),
    ('Mrs. Brown (Her Majesty, Mrs. Brown)', 'Mrs. Brown (Her Majesty, Mrs. Brown)'),
    ('Paris, Texas', 'Paris, Texas'),
    ('I, Worst of All (Yo, la peor de todas)', 'I, Worst of All (Yo, la peor de todas)'),
    ('Seven (a.k.a. Se7en)', 'Seven (a.k.a. Se7en)'),
  ],
)
def test_natural_title(title, natural):
  assert movielens.natural_title(title) == natural


@cut_off
@pytest.mark.parametrize(
  ('written', 'title', 'year'),
  [
    ('Fawlty Towers (1975-1979)', 'Fawlty Towers (1975-1979)', '1975'),
    ('Death Note, The (2006\u2013)', 'The Death Note (2006\u2013)', '2006'),
    ('Babylon 5', 'Babylon 5', ''),
    ('1984 (Nineteen Eighty-Four) (1984) ', '1984 (Nineteen Eighty-Four) (1984)', '1984'),
    ('"Great Performances" Cats (1998)', '"Great Performances" Cats (1998)', '1998'),
  ],
)
def test_years(tmp_path, written, title, year):
  folder = write_25m(tmp_path / 'ml-25m')
  frame = pd.DataFrame({'movieId': ['1'], 'title': [written], 'genres': ['Drama']})
  frame.to_csv(folder / 'movies.csv', index=False)
  raw = movielens.ml25m(folder)
  assert raw.item_text == {'title': [title], 'genres': ['Drama'], 'year': [year]}


@pytest.mark.network
@pytest.mark.skipif(os.environ.get('ILM_OFFLINE') == '1', reason='ILM_OFFLINE=1')
def test_ml100k_is_the_real_one():
  raw = movielens.ml100k()
  assert len(raw.users) == 100_000
  assert len(set(raw.users)) == 943
  assert set(raw.items) == set(raw.item_ids)
  assert len(raw.item_ids) == 1_682
  assert (np.diff(raw.items.astype(int)) >= 0).all()  # ties in time are in the order of the ids
  assert raw.provenance['tie_order'] == 'item id'
  # MovieLens's README: ratings 1 to 5, from 19 September 1997 to 22 April 1998.
  assert np.unique(raw.ratings).tolist() == [1, 2, 3, 4, 5]
  first, last = pd.to_datetime([raw.timestamps.min(), raw.timestamps.max()], unit='s')
  assert (str(first.date()), str(last.date())) == ('1997-09-20', '1998-04-22')

  text = dict(zip(raw.item_ids, zip(*raw.item_text.values())))
  assert list(raw.item_text) == ['title', 'genres', 'year']
  assert text['1'] == ('Toy Story (1995)', 'Animation, Children, Comedy', '1995')
  assert text['50'] == ('Star Wars (1977)', 'Action, Adventure, Romance, Sci-Fi, War', '1977')
  assert text['12'][0] == 'The Usual Suspects (1995)'
  assert text['267'] == ('unknown', '', '')
  name = 'Land Before Time III: The Time of the Great Giving (1995)'
  assert text['1412'] == (name, 'Animation, Children', '1995')
  assert text['1653'][0].startswith('Entertaining Angels')
  assert all(raw.item_text['title'])
  assert sum(year == '' for year in raw.item_text['year']) == 1

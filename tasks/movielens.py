"""MovieLens 100K, 1M and 25M: `ml100k`, `ml1m`, `ml25m`.

ml100k is fetched from a package that carries it. ml1m and ml25m are read from the files that
GroupLens publishes, downloaded by the user, or from TFDS where it has prepared them.

Item text is the same in all of them:
  title   as people write it, with the year: 'Il Postino (1994)' where the files have
          'Postino, Il (1994)'; other titles in brackets likewise ('The Blue Angel (Der Blaue
          Engel) (1930)')
  genres  'Animation, Children, Comedy', '' where none is listed; "Children's" of the older files
          is the 'Children' of the newer
  year    '1994', '' where the files have none

Ties: MovieLens was rated page by page, so that many ratings have the same second. In 100K, 76 % of
the rows share it with another row of the same user, and so do the last two rows of 44 % of the
users; which of them leave-one-out tests on is then decided by the order of the rows.
* ml100k puts them in the order of the item ids. The order decides how hard the test set is (the
  HR@10 of popularity: .050 so, .087 in the file's own order, in which the popular films come last),
  and published figures for this split hold for item ids.
* ml1m and ml25m keep the file's order. TFDS stores rows in an order of its own, so that splits made
  from TFDS differ from splits made from the files.
"""

import csv
import io
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from ilm_jax.data.prepare.fetch import fetch_package_files
from ilm_jax.data.prepare.raw import ORDER_BY_TIMESTAMP, RawData
from ilm_jax.data.prepare.tables import read_lines, shared_strings
from ilm_jax.errors import UsageError
from ilm_jax.tasks.sources import describe_files, source, source_file

_PACKAGE = 'recbole==1.2.1'
_FOLDER = 'recbole/dataset_example/ml-100k/'
_ML100K_FILES = {
  _FOLDER + 'ml-100k.inter': '4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff',
  _FOLDER + 'ml-100k.item': '51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532',
}
_RATINGS = {'ml1m': 1_000_209, 'ml25m': 25_000_095}
_CITATION = (
  'F. M. Harper and J. A. Konstan. The MovieLens Datasets: History and Context. ACM TiiS 5(4),'
  ' 2015. https://doi.org/10.1145/2827872'
)
_LICENCE = 'GroupLens: research use, no redistribution; see the README of the data set'

_ARTICLES = (
  "The|A|An|La|Le|Les|L'|Un|Une|Il|Lo|Gli|El|Los|Las|Una|Der|Die|Das|Den|Det|De|Het|En|Ein|Eine"
  '|O|Os'
)
_TRAILING_ARTICLE = re.compile(rf'(^|\()(a\.k\.a\. )?([^()]+), ({_ARTICLES})(?=\)|$|\s*\()')
_YEAR = re.compile(r'\s*\((\d{4})(?:[-\u2013]\d{0,4})?\)\s*$')  # also (2006-2007) and (2019-)
_NO_GENRE = ('unknown', '(no genres listed)')
_TFDS_BATCH = 16_384


@source('ml100k')
def ml100k() -> RawData:
  """MovieLens 100K: 100,000 ratings, 943 users, 1,682 items. Fetched on first use (2 MB).

  Rows come in the order of the item ids, which breaks the ties in time; see above.

  Raises:
    UsageError: it cannot be fetched; the message says which file to put where by hand.
  """
  inter, item = fetch_package_files(_PACKAGE, _ML100K_FILES).values()
  ids, text = [], _Text()
  for _, line in list(read_lines(item))[1:]:
    movie, title, year, genres = line.split('\t')
    if title == 'unkonwn':  # the package's spelling; MovieLens calls item 267 'unknown'
      title, year = 'unknown', ''
    elif not year.isdigit():  # '... (1995) (V)' of item 1412 was split at the wrong bracket
      title, year = _split_year(title)
    ids.append(movie)
    text.add(title, f' ({year})' if year else '', year, genres.split(' '))
  header = 'user_id:token', 'item_id:token', 'rating:float', 'timestamp:float'
  ratings = _read_ratings(inter, inter.read_bytes(), '\t', header)
  by_item = np.argsort(ratings['item'], kind='stable')
  ratings = {name: column[by_item] for name, column in ratings.items()}
  origin = {'package': _PACKAGE, 'tie_order': 'item id'}
  return _raw('ml100k', ratings, ids, text, [inter, item], origin)


@source('ml1m')
def ml1m(
  source_dir: str | os.PathLike[str] | None = None, tfds_dir: str | os.PathLike[str] | None = None
) -> RawData:
  """MovieLens 1M: 1,000,209 ratings, 6,040 users, 3,883 movies, of which 3,706 are rated.

  Args:
    source_dir: directory with GroupLens's `ratings.dat` and `movies.dat`. None reads what TFDS has
      prepared as `movielens/1m-ratings`.
    tfds_dir: TFDS's data directory; default $TFDS_DATA_DIR or ~/tensorflow_datasets.

  Raises:
    UsageError: the files are missing (the message says where to get them) or malformed.
  """
  if source_dir is None:
    return _from_tfds('ml1m', '1m', tfds_dir)
  movies = source_file(source_dir, 'movies.dat', _advice('1m', source_dir))
  ratings_path = source_file(source_dir, 'ratings.dat', _advice('1m', source_dir))
  ids, text = [], _Text()
  for number, line in read_lines(movies, 'latin-1'):
    fields = line.split('::')
    if len(fields) != 3:
      raise UsageError(f'{movies}, line {number}: id::title::genres expected, found {line!r:.80}.')
    ids.append(fields[0])
    text.add_titled(fields[1], fields[2].split('|'))
  data = ratings_path.read_bytes().replace(b'::', b'\t')
  ratings = _read_ratings(ratings_path, data, '\t', None)
  return _raw('ml1m', ratings, ids, text, [ratings_path, movies], {})


@source('ml25m')
def ml25m(
  source_dir: str | os.PathLike[str] | None = None, tfds_dir: str | os.PathLike[str] | None = None
) -> RawData:
  """MovieLens 25M: 25,000,095 ratings, 162,541 users, 62,423 movies.

  Args:
    source_dir: directory with GroupLens's `ratings.csv` and `movies.csv`. None reads what TFDS has
      prepared as `movielens/25m-ratings`.
    tfds_dir: TFDS's data directory; default $TFDS_DATA_DIR or ~/tensorflow_datasets.

  Raises:
    UsageError: the files are missing (the message says where to get them) or malformed.
  """
  if source_dir is None:
    return _from_tfds('ml25m', '25m', tfds_dir)
  movies = source_file(source_dir, 'movies.csv', _advice('25m', source_dir))
  ratings_path = source_file(source_dir, 'ratings.csv', _advice('25m', source_dir))
  ids, text = [], _Text()
  for number, line in read_lines(movies):
    fields = next(csv.reader([line]))
    if number == 1 and fields == ['movieId', 'title', 'genres']:
      continue
    if number == 1 or len(fields) != 3:
      raise UsageError(f'{movies}, line {number}: movieId,title,genres expected, found {line!r}.')
    ids.append(fields[0])
    text.add_titled(fields[1], fields[2].split('|'))
  header = 'userId', 'movieId', 'rating', 'timestamp'
  ratings = _read_ratings(ratings_path, ratings_path, ',', header)
  return _raw('ml25m', ratings, ids, text, [ratings_path, movies], {})


def natural_title(title: str) -> str:
  """'Postino, Il' -> 'Il Postino'; "Star Maker, The (Uomo, L')" -> "The Star Maker (L'Uomo)".

  Known articles only, so that 'Paris, Texas' stays.
  """

  def moved(match: re.Match[str]) -> str:
    before, also, name, article = match.groups(default='')
    return f'{before}{also}{article}{"" if article.endswith(chr(39)) else " "}{name}'

  return _TRAILING_ARTICLE.sub(moved, title.strip())


class _Text:
  """The text of the items, in the order in which they are added."""

  def __init__(self):
    self.fields: dict[str, list[str]] = {'title': [], 'genres': [], 'year': []}

  def add(self, title: str, suffix: str, year: str, genres: Sequence[str]) -> None:
    names = ['Children' if g == "Children's" else g for g in genres]
    self.fields['title'].append(natural_title(title) + suffix)
    self.fields['genres'].append(', '.join(n for n in names if n.lower() not in _NO_GENRE))
    self.fields['year'].append(year)

  def add_titled(self, title: str, genres: Sequence[str]) -> None:
    """Adds an item whose title ends with its year or years, as in 'Postino, Il (1994)'."""
    name, year = _split_year(title)
    self.add(name, ' ' + title.strip()[len(name) :].strip() if year else '', year, genres)


def _split_year(title: str) -> tuple[str, str]:
  match = _YEAR.search(title)
  return (title[: match.start()].strip(), match[1]) if match else (title.strip(), '')


def _advice(version: str, folder: str | os.PathLike[str] | None) -> str:
  return (
    f'Download ml-{version}.zip from https://grouplens.org/datasets/movielens/{version}/, unzip it,'
    f' and put its files into {folder or "a directory"} (source_dir).'
  )


def _read_ratings(
  path: Path, data: bytes | Path, separator: str, header: Sequence[str] | None
) -> dict[str, np.ndarray]:
  """Returns user, item ([n] int32), rating ([n] float32) and timestamp ([n] int64) columns."""
  types = {'user': pa.int32(), 'item': pa.int32(), 'rating': pa.float32(), 'time': pa.int64()}
  if header is not None:
    with open(path, 'rb') as f:
      first = f.readline().decode('utf-8', 'replace').rstrip('\r\n')
    if first != separator.join(header):
      raise UsageError(
        f'{path}, line 1: the header {separator.join(header)!r} is expected, found {first!r:.80}.'
      )
  try:
    table = pyarrow.csv.read_csv(
      io.BytesIO(data) if isinstance(data, bytes) else data,
      read_options=pyarrow.csv.ReadOptions(
        column_names=list(types), skip_rows=0 if header is None else 1
      ),
      parse_options=pyarrow.csv.ParseOptions(delimiter=separator, quote_char=False),
      convert_options=pyarrow.csv.ConvertOptions(column_types=types, null_values=[]),
    )
  except pa.ArrowInvalid as error:
    _name_bad_line(path, '::' if header is None else separator, 0 if header is None else 1)
    raise UsageError(f'{path}: {error}') from error
  columns = {name: table[name].to_numpy() for name in types}
  bad = ~np.isfinite(columns['rating'])
  if bad.any():
    _name_bad_line(path, '::' if header is None else separator, 0 if header is None else 1)
  return columns


def _name_bad_line(path: Path, separator: str, skip: int) -> None:
  pattern = re.compile(r'\d{1,9}\t\d{1,9}\t\d+(\.\d+)?\t\d{1,18}')
  for number, line in read_lines(path):
    if number > skip and line and not pattern.fullmatch(line.replace(separator, '\t')):
      raise UsageError(
        f'{path}, line {number}: {separator.join(("user", "item", "rating", "time"))} expected,'
        f' found {line!r:.80}.'
      )


def _raw(
  name: str,
  ratings: dict[str, np.ndarray],
  ids: Sequence[str],
  text: _Text,
  files: Sequence[Path],
  origin: dict[str, Any],
) -> RawData:
  found, published = len(ratings['user']), _RATINGS.get(name)
  if published is not None and found != published:
    warnings.warn(
      f'{name}: {found:,} ratings; the published data set has {published:,}. Is a file cut off?',
      stacklevel=3,
    )
  return RawData(
    name=name,
    users=shared_strings(ratings['user']),
    items=shared_strings(ratings['item']),
    timestamps=ratings['time'],
    ratings=ratings['rating'],
    order=ORDER_BY_TIMESTAMP,
    item_ids=np.array(ids, dtype=object),
    item_text=text.fields,
    provenance={
      'source': f'MovieLens {name.removeprefix("ml").upper()}',
      'licence': _LICENCE,
      'citation': _CITATION,
      'files': describe_files(files),
      'timestamp_unit': 'seconds since 1970, UTC',
      **origin,
    },
  )


def _from_tfds(name: str, version: str, tfds_dir: str | os.PathLike[str] | None) -> RawData:
  """Reads `movielens/{version}-ratings`, which holds the movies' text in each of its rows."""
  root = Path(tfds_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets').expanduser()
  prepared = sorted(
    (root / 'movielens' / f'{version}-ratings').glob('*/dataset_info.json'),
    key=lambda path: [int(part) if part.isdigit() else -1 for part in path.parent.name.split('.')],
  )
  if not prepared:
    raise UsageError(
      f'{name}: no source_dir is given, and {root} (tfds_dir) has no prepared'
      f' movielens/{version}-ratings. {_advice(version, None)} Or, on a machine with internet'
      f' access: `tfds build movielens/{version}-ratings --data_dir={root}`.'
    )
  import tensorflow as tf  # both here because importing them takes seconds
  import tensorflow_datasets as tfds

  builder = tfds.builder_from_directory(prepared[-1].parent)
  if builder.info.file_format != tfds.core.FileFormat.TFRECORD:
    raise UsageError(
      f'{prepared[-1].parent}: TFRecord files are expected, found {builder.info.file_format}. Build'
      ' it again with `tfds build --file_format=tfrecord`.'
    )
  features: Any = builder.info.features
  genre_names = features['movie_genres'].feature.names
  spec = {
    'user_id': tf.io.FixedLenFeature([], tf.string),
    'movie_id': tf.io.FixedLenFeature([], tf.string),
    'user_rating': tf.io.FixedLenFeature([], tf.float32),
    'timestamp': tf.io.FixedLenFeature([], tf.int64),
    'movie_title': tf.io.FixedLenFeature([], tf.string),
    'movie_genres': tf.io.RaggedFeature(tf.int64),
  }

  def parsed(records: Any) -> dict[str, Any]:
    rows: Any = tf.io.parse_example(records, spec)
    genres = tf.strings.as_string(rows['movie_genres'])
    return {
      'user': tf.strings.to_number(rows['user_id'], tf.int32),
      'item': tf.strings.to_number(rows['movie_id'], tf.int32),
      'rating': rows['user_rating'],
      'time': rows['timestamp'],
      'title': rows['movie_title'],
      'genres': tf.strings.reduce_join(genres, axis=-1, separator='|'),
    }

  # Whole batches of records are parsed at once: ten times as fast as `builder.as_dataset`.
  paths = [str(path) for path in builder.info.splits['train'].filepaths]
  rows = tf.data.TFRecordDataset(paths).batch(_TFDS_BATCH).map(parsed, num_parallel_calls=2)
  movies: dict[int, tuple[Any, Any]] = {}
  parts: dict[str, list[np.ndarray]] = {key: [] for key in ('user', 'item', 'rating', 'time')}
  for batch in rows.as_numpy_iterator():
    for key, part in parts.items():
      part.append(batch[key])
    for movie, row in zip(*np.unique(batch['item'], return_index=True)):
      movies.setdefault(int(movie), (batch['title'][row], batch['genres'][row]))
  ids, text = [], _Text()
  for movie, (title, genres) in sorted(movies.items()):
    ids.append(str(movie))
    text.add_titled(title.decode(), [genre_names[int(g)] for g in genres.split(b'|') if g])
  ratings = {key: np.concatenate(part) for key, part in parts.items()}
  origin = {'tfds': f'movielens/{version}-ratings', 'tfds_version': prepared[-1].parent.name}
  return _raw(name, ratings, ids, text, sorted(prepared[-1].parent.glob('*')), origin)

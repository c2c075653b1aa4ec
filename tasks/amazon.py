"""Amazon reviews, 2014 (McAuley et al.): `beauty` and `clothing`, from files the user downloaded.

The files are on jmcauley.ucsd.edu/data/amazon ("Amazon product data"). Reviews are JSON, one a
line; the metadata are Python literals, one a line, which `ast.literal_eval` reads. Both are
streamed. The 5-core has 22,363 / 12,101 / 198,502 (Beauty) and 39,387 / 23,033 / 278,677
(Clothing) users / items / interactions.

Review times are days, so that many reviews of one user have the same time: they keep the order of
the file.
"""

import ast
import html
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ilm_jax.data.prepare.raw import ORDER_BY_TIMESTAMP, RawData
from ilm_jax.data.prepare.tables import read_json_lines, read_lines, shared_strings
from ilm_jax.errors import UsageError
from ilm_jax.tasks.sources import describe_files, source, source_file

_PAGE = 'https://jmcauley.ucsd.edu/data/amazon/links.html'
_CITATION = (
  'J. McAuley, C. Targett, J. Shi, A. van den Hengel. Image-based recommendations on styles and'
  ' substitutes. SIGIR 2015.'
)
_ASIN = re.compile(r"""\{['"]asin['"]: ['"]([^'"]+)['"]""")
_NUMBER = re.compile(r'\d{1,12}(\.\d{1,6})?')


@source('beauty')
def beauty(source_dir: str | os.PathLike[str]) -> RawData:
  """Reads Amazon Beauty 2014; see `read_category`."""
  return read_category('beauty', 'Beauty', source_dir)


@source('clothing')
def clothing(source_dir: str | os.PathLike[str]) -> RawData:
  """Reads Amazon Clothing, Shoes and Jewelry 2014; see `read_category`."""
  return read_category('clothing', 'Clothing_Shoes_and_Jewelry', source_dir)


def read_category(name: str, category: str, source_dir: str | os.PathLike[str]) -> RawData:
  """Reads one category of the 2014 reviews.

  Args:
    name: short name of the domain.
    category: the category as the file names have it, e.g. 'Toys_and_Games'.
    source_dir: directory with `meta_{category}.json.gz` and the interactions: the 5-core
      `reviews_{category}_5.json.gz` where it is there, else all of `ratings_{category}.csv`.

  Returns:
    The domain; item_text has title, brand, categories ('Beauty > Makeup > Face', several joined
    with '; ') and description, '' where Amazon has none. Products that nobody reviewed are left
    out.

  Raises:
    UsageError: a file is missing (the message says where to get it) or malformed (file and line).
  """
  folder = Path(source_dir).expanduser()
  reviews = f'reviews_{category}_5.json.gz'
  ratings = f'ratings_{category}.csv'
  meta = f'meta_{category}.json.gz'
  advice = f'Download {{}} from {_PAGE} and put it into {folder} (source_dir).'
  meta_path = source_file(folder, meta, advice.format(meta))
  if (folder / reviews).is_file():
    path, rows = folder / reviews, _reviews(folder / reviews)
  else:
    path = source_file(folder, ratings, advice.format(f'{reviews} (or {ratings})'))
    rows = _ratings(path)
  users, items, scores, times = [], [], [], []
  for number, user, item, score, time in rows:
    if not all(isinstance(value, str) and value.strip() for value in (user, item)):
      raise UsageError(f'{path}, line {number}: user {user!r}, product {item!r}: two ids expected.')
    if not all(_NUMBER.fullmatch(str(value)) for value in (score, time)):
      raise UsageError(
        f'{path}, line {number}: rating {score!r}, time {time!r}: a number and whole seconds are'
        ' expected.'
      )
    users.append(user)
    items.append(item)
    scores.append(float(score))
    times.append(int(float(time)))
  if not users:
    raise UsageError(f'{path}: no reviews in it.')
  item_ids, item_text = _products(meta_path, set(items))
  return RawData(
    name=name,
    users=shared_strings(np.array(users, dtype=object)),
    items=shared_strings(np.array(items, dtype=object)),
    timestamps=np.array(times, np.int64),
    ratings=np.array(scores, np.float32),
    order=ORDER_BY_TIMESTAMP,
    item_ids=np.array(item_ids, dtype=object),
    item_text=item_text,
    provenance={
      'source': f'Amazon product data 2014, {category}',
      'page': _PAGE,
      'citation': _CITATION,
      'files': describe_files([path, meta_path]),
      'timestamp_unit': 'seconds since 1970, UTC, whole days',
    },
  )


def _reviews(path: Path) -> Iterator[tuple[int, Any, Any, Any, Any]]:
  keys = ('reviewerID', 'asin', 'overall', 'unixReviewTime')
  for number, row in read_json_lines(path):
    lacking = [key for key in keys if key not in row]
    if lacking:
      raise UsageError(f'{path}, line {number}: no {lacking[0]!r}; the keys are {sorted(row)}.')
    yield number, row['reviewerID'], row['asin'], row['overall'], row['unixReviewTime']


def _ratings(path: Path) -> Iterator[tuple[int, Any, Any, Any, Any]]:
  for number, line in read_lines(path):
    fields = line.split(',')
    if len(fields) != 4:
      raise UsageError(
        f'{path}, line {number}: user,item,rating,timestamp expected, found {line[:80]!r}.'
      )
    user, item, score, time = fields
    yield number, user, item, score, time


def _products(path: Path, wanted: set[str]) -> tuple[list[str], dict[str, list[str]]]:
  """Returns the ids and the text of those products of the metadata that are in `wanted`."""
  first_line: dict[str, int] = {}
  text: dict[str, list[str]] = {'title': [], 'brand': [], 'categories': [], 'description': []}
  for number, line in read_lines(path):
    if not line.strip():
      continue
    # Parsing costs 0.1 ms a line, and nine lines of ten are of products without enough reviews.
    match = _ASIN.match(line)
    if match and match[1] not in wanted:
      continue
    try:
      product = ast.literal_eval(line)
    except (ValueError, SyntaxError, TypeError, RecursionError) as error:
      raise UsageError(f'{path}, line {number}: not a Python literal: {error}.') from error
    asin = product.get('asin') if isinstance(product, dict) else None
    if not isinstance(asin, str):
      raise UsageError(f"{path}, line {number}: a dict with 'asin' is expected: {line[:60]!r}.")
    if asin not in wanted:
      continue
    if asin in first_line:
      raise UsageError(
        f'{path}, line {number}: product {asin!r} is on line {first_line[asin]} already.'
      )
    first_line[asin] = number
    for field in ('title', 'brand', 'description'):
      text[field].append(_clean(product.get(field)))
    paths = [' > '.join(map(_clean, path)) for path in product.get('categories') or ()]
    text['categories'].append('; '.join(paths))
  return list(first_line), text


def _clean(value: Any) -> str:
  """'Rock &amp;\\n Roll' -> 'Rock & Roll', as the shop's pages show it; None -> ''."""
  return ' '.join(html.unescape(str(value or '')).split())

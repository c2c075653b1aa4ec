"""Any domain as two files: a table of interactions and a table of items.

  ilm prepare --dataset=tabular --output=DIR --source.name=books \\
      --source.interactions=reviews.csv --source.items=books.jsonl

CSV, TSV, JSONL (each also as .gz) and Parquet. Ids stay exactly as written: '007' is not '7'.
"""

import os
from collections.abc import Sequence

import numpy as np
import pandas as pd

from ilm_jax.data.prepare import tables
from ilm_jax.data.prepare.raw import ORDER_BY_FILE, RawData
from ilm_jax.errors import UsageError
from ilm_jax.tasks.sources import describe_files, source


@source('tabular', 'csv', 'parquet')
def tabular(
  name: str,
  interactions: str | os.PathLike[str],
  items: str | os.PathLike[str],
  user: str = 'user',
  item: str = 'item',
  timestamp: str | None = 'timestamp',
  rating: str | None = None,
  title: str = 'title',
  text_fields: str | Sequence[str] | None = None,
  order: str = 'timestamp',
) -> RawData:
  """Reads interactions and items of any domain.

  Args:
    name: short name of the domain, e.g. 'books'.
    interactions: file with one interaction a row.
    items: file with one item a row; its id column has the name `item` too.
    user: column of the user ids (strings or integers).
    item: column of the item ids (strings or integers), in both files.
    timestamp: column of the times: integers, floats or ISO-8601 dates (-> seconds, UTC). None only
      with order='file'.
    rating: column of the ratings, or None where there are none.
    title: column of the items' titles. It becomes the field 'title'.
    text_fields: columns of the items that are text. None takes every other column with text in it:
      columns of numbers alone are left out, and must be named to be taken.
    order: 'timestamp' sorts each user's rows by time (ties keep the file's order); 'file' says that
      they are in order already, which is checked where there are timestamps.

  Returns:
    The domain; item_text has 'title' first, then the text fields.

  Raises:
    UsageError: anything about the files or the columns is not as described.
  """
  options = {'user': user, 'item': item, 'timestamp': timestamp, 'rating': rating}
  table = tables.read_table(
    interactions, 'interactions', {k: v for k, v in options.items() if v is not None}
  )
  users = tables.ids(table, user)
  times, unit = (None, None) if timestamp is None else tables.timestamps(table, timestamp)
  if order == ORDER_BY_FILE and times is not None:
    _check_order(table, users, times)
  item_table, item_ids, item_text = read_items(items, 'items', item, title, text_fields)
  return RawData(
    name=name,
    users=users,
    items=tables.ids(table, item),
    timestamps=times,
    ratings=None if rating is None else tables.numbers(table, rating),
    order=order,
    item_ids=item_ids,
    item_text=item_text,
    provenance={
      'source': 'tabular',
      'files': describe_files([table.path, item_table.path]),
      'columns': {**options, 'title': title},
      'timestamp_unit': unit,
    },
  )


def read_items(
  path: str | os.PathLike[str],
  option: str,
  item: str = 'item',
  title: str = 'title',
  text_fields: str | Sequence[str] | None = None,
) -> tuple[tables.Table, np.ndarray, dict[str, list[str]]]:
  """Reads item text. The arguments are those of `tabular`; `option` named the path.

  Returns:
    The table, [m] str item ids, and field -> m strings.

  Raises:
    UsageError: as `tabular`; also where an item is listed twice.
  """
  if isinstance(text_fields, str):
    text_fields = [text_fields]
  fields = list(text_fields or ())
  if title != 'title' and 'title' in fields:
    raise UsageError(f"text_fields={fields}: 'title' is the column {title!r} already; rename one.")
  wanted = {'item': item, 'title': title, **{f'text_fields[{i}]': f for i, f in enumerate(fields)}}
  table = tables.read_table(path, option, wanted, others=text_fields is None)
  item_ids = tables.ids(table, item)
  repeated = pd.Series(item_ids).duplicated().to_numpy()
  if repeated.any():
    row = int(np.flatnonzero(repeated)[0])
    first = int(np.flatnonzero(item_ids == item_ids[row])[0])
    raise UsageError(
      f'{table.where(row)}: item {item_ids[row]!r} is listed again; it is in'
      f' {table.where(first).removeprefix(f"{table.path}, ")} already. Keep one row an item.'
    )
  if text_fields is None:
    # A second column called 'title' would clash with the one that was chosen as the title.
    fields = [f for f in tables.text_columns(table) if f not in (item, title, 'title')]
  text = {'title': tables.texts(table, title)}
  text.update((field, tables.texts(table, field)) for field in fields if field != title)
  return table, item_ids, text


def _check_order(table: tables.Table, users: np.ndarray, times: np.ndarray) -> None:
  codes = pd.factorize(users)[0]
  rows = np.argsort(codes, kind='stable')
  back = (np.diff(codes[rows]) == 0) & (np.diff(times[rows]) < 0)
  if back.any():
    at = rows[1:][back].min()
    raise UsageError(
      f"{table.where(int(at))}: order='file', but the time of user {users[at]!r} goes back here."
      " Use order='timestamp' to sort by time, or timestamp=None if this column is not the order."
    )

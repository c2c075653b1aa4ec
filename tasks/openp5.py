"""OpenP5's files (arXiv 2306.11134): `user_sequence.txt`, one user a line.

  A1YJEY40YUW4SE B004756YJA B004ZT0SSG B0020YLEYK

is a user and the items in time order. There are no timestamps, and item text is a file of its own.
"""

import os
from collections.abc import Sequence

import numpy as np

from ilm_jax.data.prepare.raw import ORDER_BY_FILE, RawData
from ilm_jax.data.prepare.tables import existing_file, read_lines, shared_strings
from ilm_jax.errors import UsageError
from ilm_jax.tasks.sources import describe_files, source
from ilm_jax.tasks.tabular import read_items


@source('openp5')
def openp5(
  name: str,
  sequences: str | os.PathLike[str],
  items: str | os.PathLike[str] | None = None,
  item: str = 'item',
  title: str = 'title',
  text_fields: str | Sequence[str] | None = None,
  title_from_id: bool = False,
) -> RawData:
  """Reads OpenP5 sequences and, from a table, the items' text.

  Args:
    name: short name of the domain, e.g. 'ml1m'.
    sequences: path of `user_sequence.txt`.
    items: CSV, TSV, JSONL or Parquet file of item text, with the sequences' item ids.
    item: its id column.
    title: its title column.
    text_fields: its text columns; None takes all that have text (see `tabular`).
    title_from_id: without `items`, use the item ids as titles. A language model learns nothing
      about an item from that, so it has to be asked for.

  Raises:
    UsageError: no item text and not `title_from_id` (or both); a line with a user only; a user
      on two lines; anything wrong with the items file.
  """
  if (items is None) != title_from_id:
    raise UsageError(
      f'items={items!r}, title_from_id={title_from_id}: give items=FILE (a table with the columns'
      f' {item!r} and {title!r}), or title_from_id=True to use item ids as titles; not both.'
    )
  path = existing_file(sequences, 'sequences')
  first_line: dict[str, int] = {}
  users: list[str] = []
  item_ids: list[str] = []
  for number, line in read_lines(path):
    user, *sequence = line.split() or ['']
    if not user:
      continue
    if not sequence:
      raise UsageError(f'{path}, line {number}: user {user!r} has no items.')
    if user in first_line:
      raise UsageError(
        f'{path}, line {number}: user {user!r} is on line {first_line[user]} already; one line a'
        ' user, with all items in time order.'
      )
    first_line[user] = number
    users += [user] * len(sequence)
    item_ids += sequence
  if not users:
    raise UsageError(f'{path}: no user in it.')
  interacted = shared_strings(np.array(item_ids, dtype=object))
  if items is None:
    files = [path]
    text_ids = np.array(list(dict.fromkeys(item_ids)), dtype=object)
    text = {'title': text_ids.tolist()}
  else:
    table, text_ids, text = read_items(items, 'items', item, title, text_fields)
    files = [path, table.path]
  return RawData(
    name=name,
    users=np.array(users, dtype=object),
    items=interacted,
    timestamps=None,
    ratings=None,
    order=ORDER_BY_FILE,
    item_ids=text_ids,
    item_text=text,
    provenance={
      'source': 'openp5',
      'files': describe_files(files),
      'titles': 'item ids' if items is None else title,
    },
  )

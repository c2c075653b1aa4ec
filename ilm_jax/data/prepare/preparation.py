"""From raw interactions to fixed splits: k-core, time order, leave-one-out, random item ids.

Everything here is NumPy and a pure function of its arguments, so that a prepared data set can be
made again from the choices that `dataset.json` records.
"""

import dataclasses
from typing import Any

import numpy as np
import pandas as pd

from ilm_jax.data.prepare.raw import ORDER_BY_FILE, RawData
from ilm_jax.data.prepared import PreparedData
from ilm_jax.errors import UsageError

_DUPLICATES = ('error', 'first', 'last', 'keep')
_MISSING_TEXT = ('error', 'drop', 'id')
_EXAMPLES_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class PreparationOptions:
  """The choices that fix a prepared data set. All of them are recorded in `dataset.json`.

  Attributes:
    k_core: drop users and items with fewer than this many interactions, until none is left.
    duplicates: what to do with repeated (user, item) pairs: 'error', keep the 'first' or the
      'last' in time order, or 'keep' all.
    missing_text: what to do with items that have no title: 'error', 'drop' the item and its
      interactions (before the k-core), or use the source's 'id' as the title.
    heldout_items: fraction of items whose text phase 1 never sees (the item-level hold-out).
    seed: seeds the random item ids and the choice of held-out items.
  """

  k_core: int = 5
  duplicates: str = 'error'
  missing_text: str = 'error'
  heldout_items: float = 0.1
  seed: int = 0

  def __post_init__(self):
    _check_choice('duplicates', self.duplicates, _DUPLICATES)
    _check_choice('missing_text', self.missing_text, _MISSING_TEXT)
    if self.k_core < 1:
      raise UsageError(f'k_core={self.k_core}: must be at least 1 (1 keeps everything).')
    if not 0.0 <= self.heldout_items < 1.0:
      raise UsageError(f'heldout_items={self.heldout_items}: a fraction in [0, 1) is expected.')


def prepare(raw: RawData, options: PreparationOptions) -> PreparedData:
  """Makes the splits of `raw`.

  Per user, in time order: the last item is the test item, the last but one the validation item,
  all before are training rows (OpenP5, arXiv 2306.11134). Users with fewer than three
  interactions (possible for k_core < 3) have training rows only.

  Raises:
    UsageError: duplicate pairs, items without text, rows out of order, an empty k-core.
  """
  if not len(raw.users):
    raise UsageError(f'{raw.name}: no interactions at all.')
  if raw.ratings is not None and not np.isfinite(raw.ratings).all():
    row = int(np.flatnonzero(~np.isfinite(raw.ratings))[0])
    raise UsageError(f'{raw.name}: rating {raw.ratings[row]} in interaction row {row + 1}.')
  user_codes, user_keys = _factorize(raw.users)
  item_codes, item_keys = _factorize(raw.items)
  titles, text_rows = _titles(raw, item_keys)
  no_text = titles == ''

  rows = _time_order(raw, user_codes, user_keys)
  if options.missing_text == 'drop':
    rows = rows[~no_text[item_codes[rows]]]
  rows = _resolve_duplicates(raw, rows, user_codes, item_codes, options.duplicates)
  rows, rounds = _k_core(rows, user_codes, item_codes, options.k_core)
  if not len(rows):
    raise UsageError(
      f'{raw.name}: nothing is left of {len(raw.users)} interactions, {len(user_keys)} users and'
      f' {len(item_keys)} items after the {options.k_core}-core. Choose a smaller --k_core, or'
      ' check that the user and item columns are the right ones.'
    )
  _check_text(raw, options.missing_text, np.unique(item_codes[rows]), item_keys, no_text, text_rows)
  titles = np.where(no_text, item_keys, titles)

  kept_users, users = np.unique(user_codes[rows], return_inverse=True)
  kept_items, items = np.unique(item_codes[rows], return_inverse=True)
  rng = np.random.default_rng(options.seed)
  new_id = rng.permutation(len(kept_items))  # the source's order may tell popularity or test order
  items = new_id[items].astype(np.int32)
  old_of_new = kept_items[np.argsort(new_id)]
  heldout = np.zeros(len(kept_items), bool)
  heldout[rng.permutation(len(kept_items))[: round(options.heldout_items * len(kept_items))]] = True

  text = {'title': [str(t) for t in titles[old_of_new]]}
  source_row = text_rows[old_of_new]
  for field, values in raw.item_text.items():
    if field != 'title':
      text[field] = [str(values[r]) if r >= 0 else '' for r in source_row]
  return _leave_one_out(
    name=raw.name,
    users=users,
    items=items,
    ratings=None if raw.ratings is None else raw.ratings[rows].astype(np.float32),
    timestamps=None if raw.timestamps is None else raw.timestamps[rows].astype(np.int64),
    user_keys=[str(k) for k in user_keys[kept_users]],
    item_keys=[str(k) for k in item_keys[old_of_new]],
    item_text=text,
    heldout_items=heldout,
    settings={
      **dataclasses.asdict(options),
      'order': raw.order,
      'split': 'leave_one_out',
      'source': dict(raw.provenance),
      'raw': {
        'users': len(user_keys),
        'items': len(item_keys),
        'interactions': len(raw.users),
        'items_with_title': int(np.count_nonzero(~no_text)),
      },
      'dropped': {
        'users': len(user_keys) - len(kept_users),
        'items': len(item_keys) - len(kept_items),
        'interactions': len(raw.users) - len(rows),
        'k_core_rounds': rounds,
      },
    },
  )


def _check_choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
  if value not in allowed:
    raise UsageError(f'{key}={value!r}: allowed are {", ".join(map(repr, allowed))}.')


def _factorize(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  codes, keys = pd.factorize(np.asarray(ids, dtype=object))
  return codes, np.asarray(keys, dtype=object)


def _titles(raw: RawData, item_keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the title of each key ('' where there is none) and its row in raw.item_ids (or -1)."""
  row_of = pd.Series(np.arange(len(raw.item_ids)), index=np.asarray(raw.item_ids, dtype=object))
  if not row_of.index.is_unique:
    twice = list(row_of.index[row_of.index.duplicated()][:_EXAMPLES_SHOWN])
    raise UsageError(f'{raw.name}: items listed more than once: {twice}. Keep one row an item.')
  rows = row_of.reindex(item_keys).fillna(-1).to_numpy(np.int64)
  titles = np.asarray([str(t).strip() for t in raw.item_text['title']] + [''], dtype=object)
  return titles[rows], rows


def _time_order(raw: RawData, users: np.ndarray, user_keys: np.ndarray) -> np.ndarray:
  """Rows sorted by (user, time); equal times keep the file's order (lexsort is stable)."""
  if raw.order != ORDER_BY_FILE:
    assert raw.timestamps is not None  # RawData has checked it
    return np.lexsort((raw.timestamps, users))
  rows = np.argsort(users, kind='stable')
  if raw.timestamps is not None:
    times = raw.timestamps[rows]
    back = (np.diff(times) < 0) & (np.diff(users[rows]) == 0)
    if back.any():
      at = int(np.flatnonzero(back)[0])
      raise UsageError(
        f"{raw.name}: order='file', but the timestamps of user {user_keys[users[rows[at]]]!r} go"
        f' back from {times[at]} (interaction row {rows[at] + 1}) to {times[at + 1]} (row'
        f" {rows[at + 1] + 1}). Use order='timestamp' to sort by time, or leave the timestamps out."
      )
  return rows


def _resolve_duplicates(
  raw: RawData, rows: np.ndarray, users: np.ndarray, items: np.ndarray, policy: str
) -> np.ndarray:
  if policy == 'keep':
    return rows
  frame = pd.DataFrame({'user': users[rows], 'item': items[rows]})
  repeated = frame.duplicated(keep='last' if policy == 'last' else 'first').to_numpy()
  if policy == 'error' and repeated.any():
    shown = [(str(raw.users[r]), str(raw.items[r])) for r in rows[repeated][:_EXAMPLES_SHOWN]]
    raise UsageError(
      f'{raw.name}: {int(repeated.sum())} interactions repeat a (user, item) pair, such as {shown}.'
      " Say --duplicates=first or --duplicates=last to keep one of each, or 'keep' if repeats are"
      ' meant (a song played twice).'
    )
  return rows[~repeated]


def _k_core(
  rows: np.ndarray, users: np.ndarray, items: np.ndarray, k: int
) -> tuple[np.ndarray, int]:
  """Drops users and items with fewer than k rows until a fixed point. Returns (rows, rounds)."""
  rounds = 0
  while len(rows):
    u, i = users[rows], items[rows]
    keep = (np.bincount(u)[u] >= k) & (np.bincount(i)[i] >= k)
    if keep.all():
      break
    rows = rows[keep]
    rounds += 1
  return rows, rounds


def _check_text(raw, policy, kept, item_keys, no_text, text_rows) -> None:
  lacking = kept[no_text[kept]]
  if policy != 'error' or not len(lacking):
    return
  unknown = [str(k) for k in item_keys[lacking[text_rows[lacking] < 0]]]
  untitled = [str(k) for k in item_keys[lacking[text_rows[lacking] >= 0]]]
  parts = []
  if unknown:
    parts.append(
      f'{len(unknown)} item ids of the interactions are in no row of the items table, such as'
      f' {unknown[:_EXAMPLES_SHOWN]}'
    )
  if untitled:
    parts.append(f'{len(untitled)} items have an empty title: {untitled[:_EXAMPLES_SHOWN]}')
  raise UsageError(
    f'{raw.name}: {"; ".join(parts)}. Mend the items table (are the two id columns the same kind of'
    ' id?), or say --missing_text=drop to leave those items out, or --missing_text=id to use the id'
    ' as the title.'
  )


def _leave_one_out(
  *,
  users: np.ndarray,
  items: np.ndarray,
  ratings: np.ndarray | None,
  timestamps: np.ndarray | None,
  **rest: Any,
) -> PreparedData:
  """Splits rows that are sorted by (user, time)."""
  counts = np.bincount(users)
  ends = np.cumsum(counts)
  splittable = counts >= 3
  is_test = np.zeros(len(users), bool)
  is_test[ends[splittable] - 1] = True
  is_validation = np.zeros(len(users), bool)
  is_validation[ends[splittable] - 2] = True
  is_train = ~(is_test | is_validation)

  def held(values: np.ndarray | None, mask: np.ndarray, absent: float) -> np.ndarray | None:
    if values is None:
      return None
    column = np.full(len(counts), absent, values.dtype)
    column[splittable] = values[mask]
    return column

  train_counts = counts - 2 * splittable
  return PreparedData(
    offsets=np.concatenate([[0], np.cumsum(train_counts)]).astype(np.int64),
    items=items[is_train],
    ratings=None if ratings is None else ratings[is_train],
    timestamps=None if timestamps is None else timestamps[is_train],
    validation_items=_required(held(items, is_validation, -1)),
    validation_ratings=held(ratings, is_validation, np.nan),
    validation_timestamps=held(timestamps, is_validation, -1),
    test_items=_required(held(items, is_test, -1)),
    test_ratings=held(ratings, is_test, np.nan),
    test_timestamps=held(timestamps, is_test, -1),
    **rest,
  )


def _required(array: np.ndarray | None) -> np.ndarray:
  assert array is not None
  return array

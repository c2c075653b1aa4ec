"""From raw rows to splits: against brute force, and every kind of bad input."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilm_jax.data.prepare.preparation import PreparationOptions, prepare
from ilm_jax.data.prepare.raw import RawData
from ilm_jax.errors import UsageError

ALL = PreparationOptions(k_core=1)


def raw_of(rows, *, item_ids=None, titles=None, timestamps=True, order='timestamp', **columns):
  """RawData of (user, item, time) rows; the items' titles are 'Title of ITEM'."""
  users, items, times = zip(*rows) if rows else ((), (), ())
  if item_ids is None:
    item_ids = sorted(set(items))
  return RawData(
    name='toy',
    users=np.array(users, dtype=object),
    items=np.array(items, dtype=object),
    timestamps=np.array(times, np.int64) if timestamps else None,
    ratings=columns.pop('ratings', None),
    order=order,
    item_ids=np.array(item_ids, dtype=object),
    item_text={'title': titles or [f'Title of {i}' for i in item_ids], **columns},
    provenance={'source': 'test'},
  )


def sequences(prepared):
  """user key -> item keys: training rows, validation, test."""
  result = {}
  for user, key in enumerate(prepared.user_keys):
    rows = list(prepared.items[prepared.offsets[user] : prepared.offsets[user + 1]])
    rows += [i for i in (prepared.validation_items[user], prepared.test_items[user]) if i >= 0]
    result[key] = [prepared.item_keys[i] for i in rows]
  return result


def random_rows(seed, num_users=12, num_items=9, num_rows=60, last_time=40):
  rng = np.random.default_rng(seed)
  pairs = {(int(u), int(i)) for u, i in rng.integers([num_users, num_items], size=(num_rows, 2))}
  rows = [(f'u{u}', f'i{i}', int(rng.integers(last_time))) for u, i in sorted(pairs)]
  return [rows[i] for i in rng.permutation(len(rows))]


def brute_force_core(rows, k):
  """The largest set of rows in which every user and item has k: one bad row away at a time."""
  rows = list(rows)
  while True:
    users, items = [r[0] for r in rows], [r[1] for r in rows]
    bad = [r for r in rows if users.count(r[0]) < k or items.count(r[1]) < k]
    if not bad:
      return rows
    rows.remove(bad[0])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 5))
def test_k_core_time_order_and_ids_against_brute_force(seed, k):
  rows = random_rows(seed)
  core = brute_force_core(rows, k)
  if not core:
    with pytest.raises(UsageError, match='nothing is left of'):
      prepare(raw_of(rows), PreparationOptions(k_core=k))
    return
  prepared = prepare(raw_of(rows), PreparationOptions(k_core=k, seed=seed))
  expected = {}
  for row in sorted(core, key=lambda row: row[2]):  # stable: ties keep the file's order
    expected.setdefault(row[0], []).append(row[1])
  assert sequences(prepared) == expected
  for user, key in enumerate(prepared.user_keys):
    has = len(expected[key]) >= 3
    assert (prepared.validation_items[user] >= 0) == (prepared.test_items[user] >= 0) == has
  assert prepared.num_interactions == len(core)
  assert prepared.item_text['title'] == [f'Title of {i}' for i in prepared.item_keys]
  dropped = prepared.settings['dropped']
  assert dropped['users'] == len({r[0] for r in rows}) - len(expected)
  assert dropped['items'] == len({r[1] for r in rows}) - prepared.num_items
  assert dropped['interactions'] == len(rows) - len(core)


def test_a_user_below_the_k_core_is_dropped_and_counted():
  rows = [(u, i, t) for t, (u, i) in enumerate((u, i) for u in 'abc' for i in 'xyz')]
  rows += [('few', 'x', 50), ('few', 'y', 51)]
  prepared = prepare(raw_of(rows), PreparationOptions(k_core=3))
  assert sorted(prepared.user_keys) == ['a', 'b', 'c']
  assert prepared.settings['dropped'] == {
    'users': 1,
    'items': 0,
    'interactions': 2,
    'k_core_rounds': 1,
  }
  assert prepared.settings['raw']['users'] == 4


def test_ratings_and_timestamps_follow_their_rows():
  rows = random_rows(3, num_rows=80)
  ratings = np.arange(len(rows), dtype=np.float32) + 0.5
  prepared = prepare(raw_of(rows, ratings=ratings), PreparationOptions(k_core=2))
  of_pair = {(u, i): (t, r) for (u, i, t), r in zip(rows, ratings)}
  for user, key in enumerate(prepared.user_keys):
    span = slice(prepared.offsets[user], prepared.offsets[user + 1])
    for item, time, rating in zip(
      prepared.items[span], prepared.timestamps[span], prepared.ratings[span]
    ):
      assert of_pair[key, prepared.item_keys[item]] == (time, rating)
    for split in ('validation', 'test'):
      item, time, rating = (
        getattr(prepared, f'{split}_{column}')[user]
        for column in ('items', 'timestamps', 'ratings')
      )
      if item >= 0:
        assert of_pair[key, prepared.item_keys[item]] == (time, rating)
      else:
        assert time == -1
        assert np.isnan(rating)


def test_item_ids_and_held_out_items_are_random_and_seeded():
  rows = [(f'u{u}', f'i{i:03}', i) for u in range(3) for i in range(200)]
  options = PreparationOptions(k_core=3, heldout_items=0.25, seed=1)
  first, again = prepare(raw_of(rows), options), prepare(raw_of(rows), options)
  other = prepare(raw_of(rows), dataclasses.replace(options, seed=2))
  assert first.fingerprint == again.fingerprint
  assert first.fingerprint != other.fingerprint
  assert sequences(first) == sequences(other)
  # Neither the ids nor the hold-out follow the source's order: rank correlation of a permutation.
  positions = np.array([int(key[1:]) for key in first.item_keys])
  assert abs(np.corrcoef(positions, np.arange(200))[0, 1]) < 0.25
  assert first.heldout_items.sum() == 50
  assert set(np.array(first.item_keys)[first.heldout_items]) != set(
    np.array(other.item_keys)[other.heldout_items]
  )


def test_the_fingerprint_sees_every_part(small_prepared):
  changes = {
    'items': small_prepared.items[::-1].copy(),
    'ratings': small_prepared.ratings + 1,
    'test_items': small_prepared.test_items[::-1].copy(),
    'user_keys': small_prepared.user_keys[::-1],
    'item_text': {**small_prepared.item_text, 'year': ['']},
    'heldout_items': ~small_prepared.heldout_items,
    'name': 'other',
    'timestamps': None,
  }
  prints = {small_prepared.fingerprint}
  for field, value in changes.items():
    prints.add(dataclasses.replace(small_prepared, **{field: value}).fingerprint)
  assert len(prints) == 1 + len(changes)


REPEATED = [('a', 'x', 1), ('a', 'y', 2), ('a', 'x', 3), ('a', 'z', 4)]


def test_duplicates():
  with pytest.raises(UsageError, match=r"1 interactions repeat .* \[\('a', 'x'\)\]") as caught:
    prepare(raw_of(REPEATED), ALL)
  assert '--duplicates=first' in str(caught.value)
  for policy, expected in {'first': 'xyz', 'last': 'yxz', 'keep': 'xyxz'}.items():
    prepared = prepare(raw_of(REPEATED), dataclasses.replace(ALL, duplicates=policy))
    assert sequences(prepared) == {'a': list(expected)}


ROWS = [('a', 'x', 1), ('a', 'y', 2), ('a', 'z', 3), ('b', 'x', 1), ('b', 'y', 2), ('b', 'z', 3)]


def test_items_without_text():
  unknown = raw_of(ROWS, item_ids=['x', 'y', 'other'])
  with pytest.raises(UsageError, match=r"1 item ids .* no row of the items table.*\['z'\]"):
    prepare(unknown, ALL)
  untitled = raw_of(ROWS, titles=['X', ' ', 'Z'], genres=['g', 'h', ''])
  with pytest.raises(UsageError, match=r"1 items have an empty title: \['y'\]") as caught:
    prepare(untitled, ALL)
  assert '--missing_text=drop' in str(caught.value)

  dropped = prepare(untitled, dataclasses.replace(ALL, missing_text='drop'))
  assert sequences(dropped) == {'a': ['x', 'z'], 'b': ['x', 'z']}
  by_id = prepare(untitled, dataclasses.replace(ALL, missing_text='id'))
  text = {k: (t, g) for k, t, g in zip(by_id.item_keys, *by_id.item_text.values())}
  assert text == {'x': ('X', 'g'), 'y': ('y', 'h'), 'z': ('Z', '')}
  assert by_id.settings['raw']['items_with_title'] == 2
  by_id = prepare(unknown, dataclasses.replace(ALL, missing_text='id'))
  assert 'z' in by_id.item_text['title']


def test_an_item_that_the_k_core_drops_needs_no_text():
  rows = [*ROWS, ('b', 'rare', 4)]
  prepared = prepare(raw_of(rows, item_ids=['x', 'y', 'z']), PreparationOptions(k_core=2))
  assert sorted(prepared.item_keys) == ['x', 'y', 'z']


def test_order_of_the_file():
  rows = [('a', 'z', 5), ('b', 'x', 1), ('a', 'x', 5), ('a', 'y', 6)]
  for timestamps in (True, False):
    prepared = prepare(raw_of(rows, order='file', timestamps=timestamps), ALL)
    assert sequences(prepared) == {'a': ['z', 'x', 'y'], 'b': ['x']}
  back = [('a', 'z', 5), ('b', 'x', 1), ('a', 'x', 4)]
  with pytest.raises(UsageError) as caught:
    prepare(raw_of(back, order='file'), ALL)
  assert "user 'a' go back from 5 (interaction row 1) to 4 (row 3)" in str(caught.value)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'ratings': np.array([1, 2, np.nan, 4, 5, 6])}, 'rating nan in interaction row 3'),
    ({'ratings': np.array([1, np.inf, 3, 4, 5, 6])}, 'rating inf in interaction row 2'),
    ({'ratings': np.ones(5)}, '6 users but 5 ratings'),
    ({'name': 'my books'}, "'my books': only letters"),
    ({'name': '100k'}, 'not starting with a digit'),
    ({'order': 'random'}, "order='random'; allowed: 'timestamp', 'file'"),
    ({'timestamps': None}, 'no timestamps, so they cannot be put in time order'),
    ({'item_text': {'genres': ['g'] * 3}}, "no 'title' field"),
    ({'item_text': {'title': ['t'] * 2}}, "3 items but 2 values of 'title'"),
    ({'item_ids': np.array(['x', 'y', 'x'])}, r"listed more than once: \['x'\]"),
  ],
)
def test_broken_sources(change, message):
  with pytest.raises(UsageError, match=message):
    prepare(dataclasses.replace(raw_of(ROWS), **change), ALL)


def test_nothing_to_prepare():
  with pytest.raises(UsageError, match='no interactions at all'):
    prepare(raw_of([]), ALL)
  with pytest.raises(UsageError, match='6 interactions, 2 users and 3 items after the 4-core'):
    prepare(raw_of(ROWS), PreparationOptions(k_core=4))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'k_core': 0}, 'k_core=0: must be at least 1'),
    ({'heldout_items': 1.0}, r'heldout_items=1.0: a fraction in \[0, 1\)'),
    ({'duplicates': 'maybe'}, "duplicates='maybe': allowed are 'error', 'first'"),
    ({'missing_text': ''}, "missing_text='': allowed are 'error', 'drop', 'id'"),
  ],
)
def test_options_out_of_range(options, message):
  with pytest.raises(UsageError, match=message):
    PreparationOptions(**options)

import jax
import numpy as np
import pytest

from ilm_jax.modules.histories import UserHistories


def _histories(rows):
  """Of users with these training rows."""
  items = np.array([item for items in rows for item in items], np.int32)
  return UserHistories.of(np.cumsum([0, *map(len, rows)]), items)


def _assert_contains(histories, rows, num_items):
  """Every user and item, in random order and with repeats, against Python's sets."""
  rng = np.random.default_rng(0)
  users = rng.integers(len(rows), size=3 * len(rows))
  items = np.concatenate([rng.permutation(num_items), rng.integers(num_items, size=5)])
  expected = np.array([[int(i) in set(rows[u]) for i in items] for u in users])
  actual = jax.jit(UserHistories.contains)(histories, users, items)
  assert actual.dtype == bool
  np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize('longest', [*range(1, 10), 15, 16, 17, 31, 32, 33])
def test_contains_agrees_with_sets(longest):
  rng = np.random.default_rng(longest)
  num_items = 40
  rows = [rng.integers(num_items, size=rng.integers(longest + 1)).tolist() for _ in range(12)]
  rows[3], rows[5] = [], rng.permutation(num_items)[:longest].tolist()
  rows[7] = [0, num_items - 1, 0, 0]  # the ends of the catalogue, and repeats
  histories = _histories(rows)
  assert histories.max_length == max(len(set(items)) for items in rows)
  _assert_contains(histories, rows, num_items)


@pytest.mark.parametrize(
  'rows',
  [
    [[], [], []],
    [[4]],
    [[], [4], []],
    [[], [], list(range(10))],
    [list(range(10)), [], []],
    [[9] * 20, [0] * 3],
  ],
  ids=['no rows', 'one', 'empty around', 'empty first', 'empty last', 'one item many times'],
)
def test_ends_of_the_array(rows):
  histories = _histories(rows)
  _assert_contains(histories, rows, 10)


def test_of_a_prepared_data_set(small_prepared):
  histories = UserHistories.of(small_prepared.offsets, small_prepared.items)
  items = np.arange(small_prepared.num_items)
  for user in range(small_prepared.num_users):
    row = np.asarray(histories.contains(np.array([user]), items))[0]
    # The validation and the test item are no history: nothing of training may know them.
    assert set(np.flatnonzero(row)) == set(small_prepared.history(user, 'validation').tolist())


def test_compiles_once_for_all_batches_of_a_shape(small_prepared):
  histories = UserHistories.of(small_prepared.offsets, small_prepared.items)
  traced = []

  @jax.jit
  def contains(histories, users, items):
    traced.append(users.shape)
    return histories.contains(users, items)

  for start in range(3):
    contains(histories, np.arange(start, start + 4), np.arange(start, start + 6))
  assert traced == [(4,)]

"""Histories in windows: every row is predicted once, and the held-out ones after their history."""

import collections
import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from ilm_jax.data.input.feature_converter import EntityTextFeatureConverter
from ilm_jax.data.input.sources import HistorySource

LENGTHS = [0, 1, 2, 5, 0, 6, 7, 13, 1]  # training rows of users
HELD = [True, True, False, True, False, True, True, True, False]  # those with held-out rows
NUM_ROWS, NUM_USERS = sum(LENGTHS), len(LENGTHS)
TEST = 1000


@pytest.fixture(scope='module')
def prepared(small_prepared):
  """Each row an item of its own: training rows from 0, validation from 500, test from 1000."""
  users = np.arange(NUM_USERS)
  return dataclasses.replace(
    small_prepared,
    user_keys=[f'u{user}' for user in users],
    offsets=np.cumsum([0, *LENGTHS]),
    items=np.arange(NUM_ROWS, dtype=np.int32),
    ratings=None,
    validation_items=np.where(HELD, 500 + users, -1).astype(np.int32),
    test_items=np.where(HELD, TEST + users, -1).astype(np.int32),
  )


def windows(source, split):
  """All examples of a split, by index."""
  count = source.num_input_examples(split)
  columns = source.examples_at(split, tf.range(count, dtype=tf.int64))
  assert columns['targets'].to_list() == [[]] * count
  return columns['entity_ids'].to_list()


@pytest.mark.parametrize('length', [1, 2, 3, 5, 6, 100])
def test_every_training_row_but_a_users_first_is_predicted_once(prepared, length):
  source = HistorySource(prepared, length=length)
  user_of = np.repeat(np.arange(NUM_USERS), LENGTHS)
  predicted, by_user = collections.Counter(), collections.defaultdict(list)
  for window in windows(source, 'train'):
    assert 2 <= len(window) <= length + 1
    user = user_of[window[0]]
    assert window == list(range(window[0], window[-1] + 1))
    assert (user_of[window] == user).all()
    predicted.update(window[1:])
    by_user[user].append(window)
  firsts = {start for start, n in zip(prepared.offsets, LENGTHS) if n}
  assert predicted == collections.Counter(set(range(NUM_ROWS)) - firsts)
  # Only a history's beginning is in a window that is not full, so that there are as few as can be.
  for user, of_user in by_user.items():
    short = [window for window in of_user if len(window) <= length]
    assert all(window[0] == prepared.offsets[user] for window in short)
    assert len(of_user) == -(-(LENGTHS[user] - 1) // length)


@pytest.mark.parametrize('length', [1, 3, 100])
@pytest.mark.parametrize('split', ['validation', 'test'])
def test_a_held_out_item_is_behind_its_history(prepared, split, length):
  """Of users who have one, and training rows; in the order of users."""
  expected = [
    [*prepared.history(user, split)[-length:], getattr(prepared, f'{split}_items')[user]]
    for user in range(NUM_USERS)
    if LENGTHS[user] and HELD[user]
  ]
  assert windows(HistorySource(prepared, length=length), split) == expected


def test_of_a_prepared_data_set(small_prepared):
  p = small_prepared
  source = HistorySource(p, length=4)
  for split in ('validation', 'test'):
    users = np.flatnonzero(getattr(p, f'{split}_items') >= 0)
    expected = [
      [*p.history(user, split)[-4:], getattr(p, f'{split}_items')[user]] for user in users
    ]
    assert windows(source, split) == expected
  predicted = sum(len(window) - 1 for window in windows(source, 'train'))
  assert predicted == len(p.items) - np.count_nonzero(np.diff(p.offsets))


def test_as_a_batch_of_the_model_has_them(prepared):
  """Padded after with -1, and never cut."""
  source = HistorySource(prepared, length=5)
  lengths = {'targets': 0, 'entity_ids': 6}
  converter = EntityTextFeatureConverter(apply_length_check=False)
  dataset = source.get_dataset('train', shuffle=False).map(
    lambda example: {name: example[name] for name in lengths}
  )
  found = [x['entity_ids'].tolist() for x in converter(dataset, lengths).as_numpy_iterator()]
  expected = windows(source, 'train')
  assert found == [window + [-1] * (6 - len(window)) for window in expected]


@pytest.mark.parametrize('length', [0, -1])
def test_a_length_that_predicts_nothing_is_refused(prepared, length):
  with pytest.raises(ValueError, match=f'length={length}: 1 or more'):
    HistorySource(prepared, length=length)


def test_nothing_to_predict(prepared):
  """No user has two training rows."""
  nothing = dataclasses.replace(
    prepared, offsets=np.arange(NUM_USERS + 1), items=np.arange(NUM_USERS, dtype=np.int32)
  )
  source = HistorySource(nothing, length=3)
  assert source.num_input_examples('train') == 0
  assert len(windows(source, 'test')) == sum(HELD)

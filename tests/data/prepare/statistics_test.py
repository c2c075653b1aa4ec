"""Statistics of a prepared data set, counted by hand."""

import dataclasses

import numpy as np
import pytest
from matplotlib import image

from ilm_jax.data.prepare import statistics
from ilm_jax.data.prepare.preparation import PreparationOptions, prepare
from ilm_jax.data.prepare.raw import RawData


def toy(**changes):
  """Two users: a has x y z w at times 1 2 2 3, b has y x z at 1 1 1."""
  rows = [('a', 'x', 1), ('a', 'y', 2), ('a', 'z', 2), ('a', 'w', 3)]
  rows += [('b', 'y', 1), ('b', 'x', 1), ('b', 'z', 1)]
  users, items, times = zip(*rows)
  raw = RawData(
    name='toy',
    users=np.array(users, dtype=object),
    items=np.array(items, dtype=object),
    timestamps=np.array(times, np.int64),
    ratings=np.array([1, 2, 2, 5, 5, 5, 1], np.float32),
    order='timestamp',
    item_ids=np.array(list('wxyz'), dtype=object),
    item_text={'title': ['ab', 'abcd', 'ab', 'abcdef'], 'genres': ['', 'g', '', 'gh']},
    provenance={'tie_order': 'the moon'},
  )
  options = PreparationOptions(k_core=1, heldout_items=0.5)
  return prepare(dataclasses.replace(raw, **changes), options)


def test_counts():
  values = statistics.compute(toy())
  expected = {
    'users': 2,
    'items': 4,
    'interactions': 7,
    'density': 7 / 8,
    'train_interactions': 3,  # a: x y, b: y
    'validation_users': 2,
    'test_users': 2,
    'heldout_items': 2,
    'items_without_training_rows': 2,  # w, z
    'top_1_percent_items_share': 2 / 7,
    'equal_timestamps': 0.0,
    'test_ties': 0.5,  # a's test item is later than its validation item, b's is not
    'tie_order': 'the moon',
    'ratings': {'1': 1, '2': 1, '5': 1},
    'duplicate_titles': 1,
  }
  assert {key: values[key] for key in expected} == expected
  assert (
    values['history_length'] | {'mean': 3.5, 'min': 3.0, 'max': 4.0, 'median': 3.5}
    == (values['history_length'])
  )
  assert values['item_popularity']['mean'] == 7 / 4
  assert values['text']['title'] == {'coverage': 1.0, 'mean_characters': 3.5, 'max': 6}
  assert values['text']['genres'] == {'coverage': 0.5, 'mean_characters': 1.5, 'max': 2}


def test_report_names_what_matters():
  prepared = toy()
  report = statistics.format_report('toy', statistics.compute(prepared))
  for part in (
    'toy: 2 users, 4 items, 7 interactions (density 87.50%)',
    'train 3 rows, validation 2 users, test 2 users; text of 2 items held out',
    '1 repeat the title of another item',
    '2 items occur in no training row',
    'of 50.0% of users is decided by a tie (broken by the moon)',
  ):
    assert part in report
  assert max(map(len, report.splitlines())) <= 100


def test_without_timestamps_ratings_and_test_items():
  prepared = toy(timestamps=None, order='file', ratings=None)
  nothing = np.full(2, -1, np.int32)
  prepared = dataclasses.replace(prepared, validation_items=nothing, test_items=nothing)
  values = statistics.compute(prepared)
  assert 'test_ties' not in values
  assert 'ratings' not in values
  assert values['test_users'] == 0
  assert 'ties' not in statistics.format_report('toy', values)


@pytest.mark.parametrize('ratings', [True, False])
def test_plot(small_prepared, tmp_path, ratings):
  if not ratings:
    small_prepared = dataclasses.replace(small_prepared, ratings=None)
  statistics.plot(small_prepared, tmp_path / 'plot.png')
  pixels = image.imread(tmp_path / 'plot.png')
  assert pixels.shape == (770, 1100, 4)
  assert len(np.unique(pixels[..., 0])) > 20  # drawn on, not blank

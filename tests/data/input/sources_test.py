"""Data sources against the plain definition of each example, written as loops."""

import itertools

import numpy as np
import pytest
import seqio

from ilm_jax.data.input.sources import InteractionSource, ItemSource, PairSource
from ilm_jax.errors import UsageError


def examples(source, split, **kwargs):
  return list(source.get_dataset(split, shuffle=False, **kwargs).as_numpy_iterator())


def expected_interactions(prepared, split, history_length, min_history):
  rows = []
  for user in range(prepared.num_users):
    train = prepared.items[prepared.offsets[user] : prepared.offsets[user + 1]].tolist()
    held = [prepared.validation_items[user], prepared.test_items[user]]
    everything = train + [int(i) for i in held if i >= 0]
    if split == 'train':
      targets = range(min_history, len(train))
    elif held[0] >= 0:
      targets = [len(everything) - (2 if split == 'validation' else 1)]
    else:
      targets = []
    for at in targets:
      rows.append((user, everything[max(0, at - history_length) : at], everything[at]))
  return rows


@pytest.mark.parametrize('split', ['train', 'validation', 'test'])
@pytest.mark.parametrize(('history_length', 'min_history'), [(5, 1), (20, 0), (3, 3)])
def test_interactions(small_prepared, split, history_length, min_history):
  source = InteractionSource(small_prepared, history_length=history_length, min_history=min_history)
  found = [
    (int(x['user']), x['history'].tolist(), int(x['target'])) for x in examples(source, split)
  ]
  expected = expected_interactions(small_prepared, split, history_length, min_history)
  assert found == expected
  assert source.num_input_examples(split) == len(expected)


def test_ratings_belong_to_their_rows(small_prepared):
  p = small_prepared
  train = examples(InteractionSource(p, predict='rating', history_length=0), 'train')
  assert [x['rating'] for x in train] == p.ratings.tolist()
  assert [x['item'] for x in train] == p.items.tolist()
  test = examples(InteractionSource(p, predict='rating'), 'test')
  assert [x['rating'] for x in test] == p.test_ratings[p.test_items >= 0].tolist()
  assert 'target' not in train[0]  # nothing that a prompt could give away


def test_without_history_there_is_no_history_column(small_prepared):
  assert set(InteractionSource(small_prepared, history_length=0).columns) == {'user', 'target'}


def test_items_are_split_by_the_hold_out(small_prepared):
  source = ItemSource(small_prepared)
  train = {int(x['item']) for x in examples(source, 'train')}
  held = {int(x['item']) for x in examples(source, 'validation')}
  assert held == set(np.flatnonzero(small_prepared.heldout_items))
  assert train | held == set(range(small_prepared.num_items))
  assert not train & held


def test_pairs(small_prepared):
  p = small_prepared
  consecutive, of_user = [], []
  for user in range(p.num_users):
    rows = p.items[p.offsets[user] : p.offsets[user + 1]].tolist()
    entity = p.num_items + user
    consecutive += [[a, b, entity] for a, b in itertools.pairwise(rows)]
    of_user += [[entity, item, entity] for item in rows]
  for kind, expected in (('item_item', consecutive), ('user_item', of_user)):
    found = examples(PairSource(p, kind), 'train')
    assert [x['entity_ids'].tolist() for x in found] == expected
    assert all(len(x['targets']) == 0 for x in found)


def test_held_out_pairs_end_in_the_held_out_item(small_prepared):
  p = small_prepared
  users = np.flatnonzero(p.test_items >= 0)
  found = [x['entity_ids'].tolist() for x in examples(PairSource(p, 'item_item'), 'test')]
  assert found == [[p.validation_items[u], p.test_items[u], p.num_items + u] for u in users]


def test_shuffling_is_a_permutation_and_seeded(small_prepared):
  source = InteractionSource(small_prepared)
  plain = [(x['user'], x['target']) for x in examples(source, 'train')]

  def shuffled(seed):
    dataset = source.get_dataset('train', shuffle=True, seed=seed)
    return [(x['user'], x['target']) for x in dataset.as_numpy_iterator()]

  assert shuffled(1) == shuffled(1)
  assert shuffled(1) != shuffled(2)
  assert shuffled(1) != plain
  assert sorted(shuffled(1)) == sorted(plain)


def test_sharding_covers_every_example_once(small_prepared):
  source = InteractionSource(small_prepared)
  shards = [
    examples(source, 'train', shard_info=seqio.ShardInfo(index=i, num_shards=3)) for i in range(3)
  ]
  seeds = sorted(int(x['seed'][1]) for shard in shards for x in shard)
  assert seeds == list(range(source.num_input_examples('train')))


def test_rating_task_without_ratings_is_refused(small_prepared):
  import dataclasses

  without = dataclasses.replace(
    small_prepared, ratings=None, validation_ratings=None, test_ratings=None
  )
  with pytest.raises(UsageError, match='no ratings'):
    InteractionSource(without, predict='rating')

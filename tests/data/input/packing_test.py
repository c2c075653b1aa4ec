"""Packing loses nothing, repeats nothing, and never exceeds a row."""

import doctest

import numpy as np
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from ilm_jax.data.input import packing

TOKENS, ENTITIES = 12, 4


def pack_window(examples, lengths, pack=True):
  features = {
    name: tf.ragged.constant(lists, tf.int32, ragged_rank=1) for name, lists in examples.items()
  }
  packed = packing.pack_window(features, lengths, pack=pack)
  return {name: value.numpy() for name, value in packed.items()}


def unpack(packed, name):
  """Reads (row, segment) -> values back out of packed rows, position by position."""
  found = {}
  for row, (values, segments, positions) in enumerate(
    zip(packed[name], packed[f'{name}_segment_ids'], packed[f'{name}_positions'])
  ):
    for value, segment, position in zip(values, segments, positions):
      if segment:
        example = found.setdefault((row, int(segment)), [])
        assert position == len(example)
        example.append(int(value))
  return found


def brute_force_first_fit(examples):
  """The textbook algorithm, one example and one row at a time."""
  rows = []
  for index, (tokens, entities) in enumerate(examples):
    for row in rows:
      if (
        sum(len(examples[i][0]) for i in row) + len(tokens) <= TOKENS
        and sum(len(examples[i][1]) for i in row) + len(entities) <= ENTITIES
      ):
        row.append(index)
        break
    else:
      rows.append([index])
  return rows


# Token 0 and entity 0 are legal values (SmolLM2's id 0 is a real token), so they are drawn too.
example_lists = st.lists(
  st.tuples(
    st.lists(st.integers(0, 99), min_size=1, max_size=TOKENS),
    st.lists(st.integers(0, 9), max_size=ENTITIES),
  ),
  max_size=30,
)


@given(example_lists)
@settings(max_examples=50, deadline=None)  # TensorFlow's first calls are slow
def test_every_example_lies_whole_in_the_row_of_textbook_first_fit(examples):
  packed = pack_window(
    {
      'targets': [tokens for tokens, _ in examples],
      'entity_ids': [entities for _, entities in examples],
    },
    {'targets': TOKENS, 'entity_ids': ENTITIES},
  )
  expected_rows = brute_force_first_fit(examples)
  assert packed['targets'].shape == (len(expected_rows), TOKENS)
  assert packed['entity_ids'].shape == (len(expected_rows), ENTITIES)
  expected = {
    (row, segment): examples[index]
    for row, indices in enumerate(expected_rows)
    for segment, index in enumerate(indices, start=1)
  }
  assert unpack(packed, 'targets') == {key: tokens for key, (tokens, _) in expected.items()}
  assert unpack(packed, 'entity_ids') == {
    key: entities for key, (_, entities) in expected.items() if entities
  }
  for name, pad in (('targets', 0), ('entity_ids', -1)):
    segments = packed[f'{name}_segment_ids']
    assert (packed[name][segments == 0] == pad).all()
    assert (packed[f'{name}_positions'][segments == 0] == 0).all()
    # Nothing stands after padding, and segments follow one another.
    for row in segments:
      used = row[row > 0]
      assert (row[: len(used)] == used).all()
      assert (np.diff(used) >= 0).all()


@given(example_lists)
@settings(max_examples=50, deadline=None)  # TensorFlow's first calls are slow
def test_a_longer_row_changes_padding_only(examples):
  """With one example a row, the row length decides nothing but the amount of padding."""
  features = {'targets': [tokens for tokens, _ in examples]}
  short = pack_window(features, {'targets': TOKENS}, pack=False)
  long = pack_window(features, {'targets': TOKENS + 5}, pack=False)
  for name, values in short.items():
    np.testing.assert_array_equal(values, long[name][:, :TOKENS])
    assert not long[name][:, TOKENS:].any()
  assert [row[: len(tokens)].tolist() for row, (tokens, _) in zip(short['targets'], examples)] == [
    tokens for tokens, _ in examples
  ]


def test_a_row_full_of_entities_takes_no_more_tokens():
  packed = pack_window(
    {'targets': [[1], [2], [3]], 'entity_ids': [[5, 6], [7, 8, 9], [4]]},
    {'targets': TOKENS, 'entity_ids': ENTITIES},
  )
  assert packed['entity_ids'].tolist() == [[5, 6, 4, -1], [7, 8, 9, -1]]
  assert packed['targets'][:, :2].tolist() == [[1, 3], [2, 0]]


def test_segment_numbers_agree_where_a_feature_is_empty():
  """An encoder-decoder row pairs encoder and decoder segments by number."""
  packed = pack_window(
    {'inputs': [[3], [], [4, 5]], 'targets': [[1], [2], [1]]},
    {'inputs': 4, 'targets': 4},
  )
  assert packed['inputs_segment_ids'].tolist() == [[1, 3, 3, 0]]
  assert packed['targets_segment_ids'].tolist() == [[1, 2, 3, 0]]


def test_examples_of_the_documentation():
  failures, attempted = doctest.testmod(packing)
  assert attempted
  assert not failures

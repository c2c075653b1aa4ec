"""The converters against their documentation and against SeqIO's own."""

import ast
import collections
import functools
import re

import numpy as np
import pytest
import seqio
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from ilm_jax.data.input.feature_converter import (
  EntityTextFeatureConverter,
  ItemEncDecFeatureConverter,
  ItemLMFeatureConverter,
  ItemPrefixLMFeatureConverter,
)
from ilm_jax.errors import UsageError

SLOT, K, BOS, EOS = 9, 2, 2, 1
WINDOW = 16
CONVERTERS = (ItemLMFeatureConverter, ItemPrefixLMFeatureConverter, ItemEncDecFeatureConverter)


@functools.cache  # to trace a conversion takes seconds, and to run it none
def converter(cls, **options):
  if cls is EntityTextFeatureConverter:
    return cls(**options)
  # SeqIO's own checks, which are slow, are on in feature_converter_in_seqio_test.
  own = {'slot_id': SLOT, 'num_soft_tokens': K, 'bos_id': BOS, 'window': WINDOW}
  return cls(apply_length_check=False, **{**own, **options})


def dataset(examples):
  features = list(examples[0])
  spec = {name: tf.TensorSpec([None], tf.int32) for name in features}
  return tf.data.Dataset.from_generator(
    lambda: ({k: np.array(v, np.int32) for k, v in example.items()} for example in examples),
    output_signature=spec,
  )


def convert(converter, examples, lengths):
  """Rows out of a pipeline, each of which takes seconds to begin."""
  return list(converter(dataset(examples), lengths).as_numpy_iterator())


@functools.cache
def conversion(converter, lengths):
  """What the pipeline of a converter does to a window, as a function of tensors."""
  spec = {name: tf.RaggedTensorSpec([None, None], tf.int32) for name in converter.TASK_FEATURES}
  spec['index'] = tf.TensorSpec([None], tf.int64)
  traced = converter.traced(dict(lengths))
  return tf.function(lambda window: traced(window), input_signature=[spec], autograph=False)


def convert_windows(converter, examples, lengths, window=WINDOW):
  """The same rows without a pipeline."""
  rows = []
  for start in range(0, len(examples), window):
    part = examples[start : start + window]
    columns = {
      name: tf.RaggedTensor.from_row_lengths(
        np.concatenate([np.array(example[name], np.int32) for example in part]),
        np.array([len(example[name]) for example in part], np.int64),
      )
      for name in converter.TASK_FEATURES
    }
    columns['index'] = tf.range(start, start + len(part), dtype=tf.int64)
    made = conversion(converter, tuple(sorted(lengths.items())))(columns)
    made = {name: values.numpy() for name, values in made.items()}
    rows += [
      {name: values[i] for name, values in made.items()} for i in range(len(made['entity_ids']))
    ]
  return rows


def random_examples(seed, count, entities=3):
  """Prompts of tokens 10.. and slots at random places, 0 to 3 entities, targets with EOS."""
  rng = np.random.default_rng(seed)
  examples = []
  for _ in range(count):
    entity_ids = rng.integers(0, 100, rng.integers(0, entities + 1))
    inputs = rng.integers(10, 50, rng.integers(1, 12))
    inputs = rng.permutation(np.append(inputs, [SLOT] * (K * len(entity_ids))))
    targets = np.append(rng.integers(10, 50, rng.integers(0, 5)), EOS)
    examples.append({'inputs': inputs, 'targets': targets, 'entity_ids': entity_ids})
  return examples


LENGTHS = {'inputs': 18, 'targets': 6, 'entity_ids': 4}
PACKED_LENGTHS = {'inputs': 50, 'targets': 20, 'entity_ids': 8}


def segments(row, prefix, names):
  """Returns the examples of a packed row as tuples of tuples, without padding."""
  ids = row[f'{prefix}_segment_ids']
  return [
    tuple(tuple(row[name][ids == segment].tolist()) for name in names)
    for segment in range(1, ids.max() + 1)
  ]


# ---- the documentation


def examples_of_documentation(cls):
  """Yields (ds, task_feature_lengths, converted_ds) as the docstring spells them out."""
  text = cls.__doc__
  state = {}
  for match in re.finditer(r'\b(ds|task_feature_lengths|converted_ds) = (?=[\[{])', text):
    end = next(
      end
      for end in range(match.end() + 1, len(text) + 1)
      if text[match.end() : end].count('[') == text[match.end() : end].count(']')
      and text[match.end() : end].count('{') == text[match.end() : end].count('}')
    )
    state[match.group(1)] = ast.literal_eval(text[match.end() : end].strip())
    if match.group(1) == 'converted_ds':
      yield dict(state)


@pytest.mark.parametrize('cls', [*CONVERTERS, EntityTextFeatureConverter])
def test_token_examples_of_the_documentation(cls):
  cases = list(examples_of_documentation(cls))
  assert len(cases) == (2 if cls is ItemLMFeatureConverter else 1)
  for case in cases:
    if cls is EntityTextFeatureConverter:
      instance = converter(cls)
    else:
      pack = 'decoder_segment_ids' in case['converted_ds'][0]
      bos_id = 0 if cls is ItemEncDecFeatureConverter else BOS
      instance = converter(cls, bos_id=bos_id, pack=pack)
    converted = convert_windows(instance, case['ds'], case['task_feature_lengths'])
    assert [{k: v.tolist() for k, v in row.items()} for row in converted] == case['converted_ds']
    assert all(value.dtype == np.int32 for row in converted for value in row.values())


# ---- SeqIO's converters as the oracle


def seqio_converted(cls, examples, lengths, pack, **options):
  examples = [{k: v for k, v in example.items() if k in cls.TASK_FEATURES} for example in examples]
  lengths = {k: v for k, v in lengths.items() if k in cls.TASK_FEATURES}
  instance = cls(pack=pack, bos_id=BOS, apply_length_check=False, **options)
  return convert(instance, examples, lengths)


def drop_repeated_eos(row):
  """SeqIO shifts the whole row, so that EOS is repeated after the last token."""
  is_token = row['decoder_target_tokens'] != 0
  row['decoder_input_tokens'] = row['decoder_input_tokens'] * is_token


# A prompt to be continued, and the last one, in a window that is not full.
EMPTY_TARGETS = {'inputs': [7, 9, 9, 5], 'targets': [], 'entity_ids': [3]}


@functools.cache
def unpacked(cls, oracle):
  """Examples, what our pipeline makes of them, and what SeqIO's makes of them."""
  examples = random_examples(seed=0, count=300)
  if oracle is seqio.PrefixLMFeatureConverter:
    examples.append(EMPTY_TARGETS)
  ours = convert(converter(cls), examples, LENGTHS)
  return examples, ours, seqio_converted(oracle, examples, LENGTHS, pack=False)


@pytest.mark.parametrize(
  ('cls', 'oracle'),
  [
    (ItemPrefixLMFeatureConverter, seqio.PrefixLMFeatureConverter),
    (ItemEncDecFeatureConverter, seqio.EncDecFeatureConverter),
  ],
)
def test_unpacked_equals_seqio(cls, oracle):
  examples, ours, theirs = unpacked(cls, oracle)
  assert len(ours) == len(theirs) == len(examples)
  for row, theirs_row, example in zip(ours, theirs, examples):
    expected = dict(theirs_row)
    if len(example['targets']):
      drop_repeated_eos(expected)
    for name, value in expected.items():
      np.testing.assert_array_equal(row[name], value, err_msg=name)
    entities = len(example['entity_ids'])
    np.testing.assert_array_equal(row['entity_ids'][:entities], example['entity_ids'])
    assert (row['entity_ids'][entities:] == -1).all()
    assert row.keys() == {*expected, 'entity_ids'}


def test_causal_equals_prefix_lm_without_its_mask():
  examples = random_examples(seed=1, count=50)
  causal, prefix = (
    convert_windows(converter(cls, pack=True), examples, PACKED_LENGTHS)
    for cls in (ItemLMFeatureConverter, ItemPrefixLMFeatureConverter)
  )
  for row, expected in zip(causal, prefix, strict=True):
    del expected['decoder_causal_attention']
    assert row.keys() == expected.keys()
    for name, value in expected.items():
      np.testing.assert_array_equal(row[name], value)


def test_text_without_a_prompt_equals_seqio_lm():
  examples = [{**example, 'inputs': [], 'entity_ids': []} for example in random_examples(2, 50)]
  ours = convert_windows(converter(ItemLMFeatureConverter, num_soft_tokens=0), examples, LENGTHS)
  lengths = {'targets': LENGTHS['inputs'] + LENGTHS['targets']}
  theirs = seqio_converted(seqio.LMFeatureConverter, examples, lengths, pack=False)
  for row, expected in zip(ours, theirs, strict=True):
    drop_repeated_eos(expected)
    for name, value in expected.items():
      np.testing.assert_array_equal(row[name], value)


def test_empty_targets_read_the_whole_prompt_as_seqio():
  _, ours, theirs = unpacked(ItemPrefixLMFeatureConverter, seqio.PrefixLMFeatureConverter)
  row = ours[-1]
  for name, value in theirs[-1].items():
    np.testing.assert_array_equal(row[name], value)
  assert row['decoder_input_tokens'][:6].tolist() == [BOS, 7, 9, 9, 5, 0]
  assert not row['decoder_loss_weights'].any()


def test_packed_decoder_segments_equal_seqio():
  examples = random_examples(seed=3, count=300)
  names = [
    'decoder_input_tokens',
    'decoder_target_tokens',
    'decoder_loss_weights',
    'decoder_causal_attention',
    'decoder_positions',
  ]
  counts = [
    collections.Counter(s for row in rows for s in segments(row, 'decoder', names))
    for rows in (
      convert_windows(converter(ItemPrefixLMFeatureConverter, pack=True), examples, PACKED_LENGTHS),
      seqio_converted(seqio.PrefixLMFeatureConverter, examples, PACKED_LENGTHS, pack=True),
    )
  ]
  assert counts[0] == counts[1]
  assert sum(counts[0].values()) == len(examples)


def test_packed_encoder_decoder_segments_equal_seqio():
  examples = random_examples(seed=4, count=300)
  encoder = ['encoder_input_tokens', 'encoder_positions']
  decoder = [
    'decoder_input_tokens',
    'decoder_target_tokens',
    'decoder_loss_weights',
    'decoder_positions',
  ]
  counts = [
    collections.Counter(
      pair
      for row in rows
      for pair in zip(
        segments(row, 'encoder', encoder), segments(row, 'decoder', decoder), strict=True
      )
    )
    for rows in (
      convert_windows(converter(ItemEncDecFeatureConverter, pack=True), examples, PACKED_LENGTHS),
      seqio_converted(seqio.EncDecFeatureConverter, examples, PACKED_LENGTHS, pack=True),
    )
  ]
  assert counts[0] == counts[1]
  assert sum(counts[0].values()) == len(examples)


# ---- entities


def splice(row, prefix):
  """What the device computes: the entity of every slot, per segment, K slots an entity."""
  is_slot = row[f'{prefix}_input_tokens'] == SLOT
  index = np.cumsum(is_slot) - 1
  entities = row['entity_ids'][np.clip(index // K, 0, len(row['entity_ids']) - 1)]
  return [
    entities[is_slot & (row[f'{prefix}_segment_ids'] == segment)][::K].tolist()
    for segment in range(1, row[f'{prefix}_segment_ids'].max() + 1)
  ]


@pytest.mark.parametrize('cls', CONVERTERS)
@given(seed=st.integers(0, 10_000), window=st.sampled_from([1, 7]))
@settings(max_examples=4, deadline=None)
def test_every_slot_of_a_packed_row_finds_its_entity(cls, seed, window):
  examples = random_examples(seed, count=20)
  rows = convert_windows(converter(cls, pack=True), examples, PACKED_LENGTHS, window)
  prefix = 'encoder' if cls is ItemEncDecFeatureConverter else 'decoder'
  found = [entities for row in rows for entities in splice(row, prefix)]
  assert sorted(found) == sorted(example['entity_ids'].tolist() for example in examples)
  # Packing saves rows, and the more the larger the window.
  assert len(rows) < len(examples) or window == 1


def test_window_bounds_what_is_packed_together():
  examples = random_examples(seed=5, count=40)
  instance = converter(ItemLMFeatureConverter, pack=True)
  expected = convert_windows(instance, examples, PACKED_LENGTHS)
  rows = convert(instance, examples, PACKED_LENGTHS)
  for row, other in zip(rows, expected, strict=True):
    assert row.keys() == other.keys()
    for name, value in other.items():
      np.testing.assert_array_equal(row[name], value)


@pytest.mark.parametrize(
  ('example', 'message'),
  [
    (
      {'inputs': [7, 9, 9, 9, 5], 'targets': [1], 'entity_ids': [3, 4]},
      r'its inputs contain 3 slot tokens \(9\), but its entity_ids have 2 entities, which need '
      r'2 \* num_soft_tokens = 4',
    ),
    (
      {'inputs': [7, 9, 9, 9], 'targets': [1], 'entity_ids': [3]},
      r'its inputs contain 3 slot tokens \(9\), but its entity_ids have 1 entities, which need '
      r'1 \* num_soft_tokens = 2',
    ),
    (
      {'inputs': [7, 9, 9, 9, 9], 'targets': [9, 1], 'entity_ids': [3, 4]},
      r'its targets contain the slot token 9 \(1 times\)',
    ),
    (
      {'inputs': [7, 9, 9], 'targets': [1], 'entity_ids': [-1]},
      r'its entity_ids contain -1; entities are numbered from 0',
    ),
  ],
)
def test_a_broken_example_is_named_and_shown(example, message):
  good = {'inputs': [7], 'targets': [1], 'entity_ids': []}
  examples = [good] * 5 + [example] + [good] * 2
  with pytest.raises(tf.errors.InvalidArgumentError, match=message) as raised:
    convert_windows(converter(ItemLMFeatureConverter), examples, LENGTHS, window=4)
  text = str(raised.value)
  assert 'example 5 of the data set' in text
  shown = ' '.join(map(str, example['inputs']))
  assert f'inputs = [{shown}] (length {len(example["inputs"])})' in text
  assert 'Traceback' not in text


def test_lengths_are_checked_also_when_seqio_does_not():
  """Its checks are slow, so training may turn them off."""
  good = {'inputs': [7], 'targets': [1], 'entity_ids': []}
  examples = [good] * (WINDOW + 1) + [{**good, 'targets': [3, 4, 5, 6, 7, 8, 1]}]
  message = f'example {WINDOW + 1} of the data set: its targets have length 7, but .* allows 6'
  with pytest.raises(tf.errors.InvalidArgumentError, match=message) as raised:
    convert(converter(ItemLMFeatureConverter), examples, LENGTHS)
  assert 'Traceback' not in str(raised.value)


@pytest.mark.parametrize(
  'example',
  [
    {'inputs': [7, 9, 9], 'targets': [1], 'entity_ids': [3]},
    {'inputs': [7], 'targets': [1], 'entity_ids': [3]},
    {'inputs': [7, 9], 'targets': [1], 'entity_ids': []},
  ],
)
def test_text_only_has_neither_slots_nor_entities(example):
  with pytest.raises(tf.errors.InvalidArgumentError, match='num_soft_tokens=0 says'):
    convert_windows(converter(ItemLMFeatureConverter, num_soft_tokens=0), [example], LENGTHS)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'bos_id': None}, 'bos_id=None'),
    ({'bos_id': -1}, 'bos_id=-1'),
    ({'slot_id': -1}, 'slot_id=-1'),
    ({'num_soft_tokens': -2}, 'num_soft_tokens=-2'),
    ({'window': 0}, 'window=0'),
    ({'use_custom_packing_ops': True}, 'use_custom_packing_ops=True'),
  ],
)
def test_arguments_are_checked(options, message):
  with pytest.raises(UsageError, match=message):
    converter(ItemLMFeatureConverter, **options)


# ---- phase 1


def test_entity_text():
  examples = [
    {'targets': [5, 0, 6], 'entity_ids': [3]},
    {'targets': [], 'entity_ids': [0, 8, 120]},
  ]
  instance, lengths = converter(EntityTextFeatureConverter), {'targets': 4, 'entity_ids': 3}
  first, second = convert_windows(instance, examples, lengths)
  assert first['text_tokens'].tolist() == [5, 0, 6, 0]
  assert first['text_mask'].tolist() == [1, 1, 1, 0]
  assert first['entity_ids'].tolist() == [3, -1, -1]
  assert second['text_mask'].tolist() == [0, 0, 0, 0]
  assert second['entity_ids'].tolist() == [0, 8, 120]
  with pytest.raises(UsageError, match='pack=True'):
    EntityTextFeatureConverter(pack=True)
  with pytest.raises(tf.errors.InvalidArgumentError, match='its entity_ids contain -1'):
    convert_windows(instance, [{'targets': [], 'entity_ids': [2, -1]}], lengths)


def test_a_feature_of_known_length_is_no_special_case():
  """item_text tasks give `entity_ids` the static shape [1]."""
  ds = tf.data.Dataset.range(5).map(
    lambda i: {
      'targets': tf.fill([i], 7),
      'entity_ids': tf.reshape(tf.cast(i, tf.int32), [1]),
    }
  )
  ds = EntityTextFeatureConverter()(ds, {'targets': 5, 'entity_ids': 1})
  assert [row['entity_ids'].tolist() for row in ds.as_numpy_iterator()] == [[i] for i in range(5)]
  assert ds.element_spec['entity_ids'].shape == [1]


def test_other_features_of_a_task_do_not_get_in_the_way():
  """Prompts keep strings, such as the user's id, beside the features for the model."""
  ds = tf.data.Dataset.from_tensors(
    {'inputs': [7], 'targets': [3, 1], 'entity_ids': tf.zeros([0], tf.int32), 'user': 'u1'}
  )
  (row,) = converter(ItemLMFeatureConverter)(ds, LENGTHS).as_numpy_iterator()
  assert row['decoder_target_tokens'][:3].tolist() == [7, 3, 1]
  assert set(row) == set(ItemLMFeatureConverter.MODEL_FEATURES)

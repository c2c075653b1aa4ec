"""The stream: windows of columns are what SeqIO makes of the same examples one by one."""

import dataclasses

import numpy as np
import pytest
import seqio
import tensorflow as tf

from ilm_jax.data.input.sources import ColumnsPreprocessor, one_to_one
from ilm_jax.data.input.stream import Stream
from ilm_jax.data.text.vocabularies import ByteVocabulary
from ilm_jax.errors import UsageError
from ilm_jax.tasks import recommendation

LENGTHS = {'inputs': 300, 'targets': 60, 'entity_ids': 12}
SHORT = {'targets': 5, 'entity_ids': 4}


@pytest.fixture(scope='module', autouse=True)
def prepared(small_prepared):
  p = dataclasses.replace(small_prepared, name='stream')
  recommendation.register_recommendation_tasks(p, ByteVocabulary(), num_soft_tokens=2)
  recommendation.register_item_language_tasks(p, ByteVocabulary())
  recommendation.register_history_task(p, length=8)
  return p


@pytest.mark.parametrize(
  ('name', 'lengths'),
  [
    pytest.param('openp5_title', LENGTHS, marks=pytest.mark.slow),  # tasks of multitask
    ('multitask_id', LENGTHS),
    ('it_ui', SHORT),
    ('it_ii', {'targets': 0, 'entity_ids': 3}),
    ('item_sequence', SHORT),
  ],
)
def test_columns_are_the_examples_that_seqio_gives(name, lengths):
  stream = Stream(f'stream_{name}', 'train', lengths, seed=3, shuffle=name != 'it_ui')
  assert stream.of_columns
  positions = np.concatenate([np.arange(100), [100_003, 7]])
  found = {name: x.to_list() for name, x in stream.columns(tf.constant(positions)).items()}
  windows = tf.data.Dataset.from_tensors(positions)
  examples = list(stream.examples(windows).as_numpy_iterator())
  assert len(examples) == len(positions)
  for feature, values in found.items():
    assert values == [example[feature].tolist() for example in examples], feature
    longest = max(map(len, values))
    assert longest <= lengths[feature]
  if name.startswith('it_'):
    assert max(map(len, found['targets'])) == lengths['targets']  # texts were cut


@pytest.mark.parametrize('name', ['multitask_title', 'it_ui', 'item_sequence'])
def test_a_window_without_examples(name):
  """The last batch of an evaluation has none for some hosts; tasks of a mixture miss windows."""
  stream = Stream(f'stream_{name}', 'train', LENGTHS)
  assert all(x.shape[0] == 0 for x in stream.columns(tf.zeros([0], tf.int64)).values())


def test_a_preprocessor_of_seqio_makes_a_task_that_is_read_by_example(prepared):
  own = seqio.TaskRegistry.get('stream_straightforward_seen_id')
  assert Stream(own.name, 'train', LENGTHS).of_columns

  @one_to_one
  def unchanged(dataset):
    return dataset.map(lambda example: example)

  seqio.TaskRegistry.add_provider(
    'stream_by_example',
    own.replace(name='stream_by_example', preprocessors=[*own.preprocessors, unchanged]),
  )
  stream = Stream('stream_by_example', 'train', LENGTHS)
  assert not stream.of_columns
  windows = tf.data.Dataset.from_tensors(np.arange(5))
  assert len(list(stream.examples(windows))) == 5


def test_a_column_that_is_no_feature_is_named():
  own = seqio.TaskRegistry.get('stream_straightforward_seen_id')
  wrong = ColumnsPreprocessor(
    lambda columns, lengths: {**columns, 'targets': tf.cast(columns['targets'], tf.int64)}
  )
  seqio.TaskRegistry.add_provider(
    'stream_wrong', own.replace(name='stream_wrong', preprocessors=[*own.preprocessors, wrong])
  )
  stream = Stream('stream_wrong', 'train', LENGTHS)
  with pytest.raises(UsageError, match=r"stream_wrong.*'targets': 'int64'.*not 'targets' as int32"):
    stream.columns(tf.constant([0, 1], tf.int64))

"""The converters inside SeqIO: mixtures, trimming, the evaluator."""

import functools

import numpy as np
import pytest
import seqio
import tensorflow as tf

from ilm_jax.data.input.feature_converter import ItemEncDecFeatureConverter, ItemLMFeatureConverter
from ilm_jax.data.text.vocabularies import ByteVocabulary

K, EOS = 2, 1


@functools.cache
def converter(cls, pack=False):
  return cls(slot_id=ByteVocabulary().slot_id, num_soft_tokens=K, bos_id=0, pack=pack)


@pytest.fixture
def mixture():
  """Two tasks of 20 examples each, as a mixture; the vocabularies are equal, not identical."""
  names = ['converter_test_a', 'converter_test_b']
  slot = ByteVocabulary().slot_id

  def examples_of(name):
    for i in range(20):
      entity_ids = [i] * (i % 3)
      prompt = ByteVocabulary().encode(f'{name} {i}: ')
      yield {
        'inputs': np.array(prompt + [slot] * (K * len(entity_ids)), np.int32),
        'targets': np.array([*ByteVocabulary().encode(f'answer {i}'), EOS], np.int32),
        'entity_ids': np.array(entity_ids, np.int32),
        'user': f'user {i}',
      }

  def source(name):
    spec = {
      **dict.fromkeys(('inputs', 'targets', 'entity_ids'), tf.TensorSpec([None], tf.int32)),
      'user': tf.TensorSpec([], tf.string),
    }
    return seqio.FunctionDataSource(
      lambda split, shuffle_files, seed=None: tf.data.Dataset.from_generator(
        lambda: examples_of(name), output_signature=spec
      ),
      splits=['train', 'validation'],
    )

  def matches(targets, predictions):
    return {'matches': sum(a == b for a, b in zip(targets, predictions, strict=True))}

  for name in names:
    seqio.TaskRegistry.add(
      name,
      source(name),
      preprocessors=[],
      output_features={
        'inputs': seqio.Feature(ByteVocabulary(), add_eos=False),
        'targets': seqio.Feature(ByteVocabulary()),
        'entity_ids': seqio.Feature(seqio.PassThroughVocabulary(100), add_eos=False),
      },
      metric_fns=[matches],
    )
  seqio.MixtureRegistry.add('converter_test', names, default_rate=1.0)
  yield 'converter_test'
  seqio.MixtureRegistry.remove('converter_test')
  for name in names:
    seqio.TaskRegistry.remove(name)


TASK_LENGTHS = {'inputs': 100, 'targets': 28, 'entity_ids': 10}


@pytest.mark.parametrize(
  ('cls', 'pack'), [(ItemLMFeatureConverter, False), (ItemEncDecFeatureConverter, True)]
)
def test_get_dataset_of_a_mixture(mixture, cls, pack):
  instance = converter(cls, pack=pack)

  def rows():
    ds = seqio.get_dataset(
      mixture, TASK_LENGTHS, instance, dataset_split='train', shuffle=True, seed=3, num_epochs=1
    )
    expected = instance.get_model_feature_lengths(TASK_LENGTHS)
    assert {k: v.shape.as_list() for k, v in ds.element_spec.items()} == {
      name: [length] for name, length in expected.items()
    }
    return list(ds.as_numpy_iterator())

  # A mixture of finite tasks ends with the first of them, so the count depends on the seed.
  source = seqio.get_mixture_or_task(mixture).get_dataset(
    TASK_LENGTHS, split='train', shuffle=True, seed=3, num_epochs=1
  )
  examples = list(source.as_numpy_iterator())
  entities = sorted(entity for example in examples for entity in example['entity_ids'].tolist())
  first, second = rows(), rows()
  assert entities == sorted(e for row in first for e in row['entity_ids'].tolist() if e >= 0)
  is_eos = [(row['decoder_target_tokens'] == EOS).sum() for row in first]
  assert sum(is_eos) == len(examples)
  assert len(first) < len(examples) if pack else len(first) == len(examples)
  for row, again in zip(first, second, strict=True):
    for name, value in row.items():
      np.testing.assert_array_equal(value, again[name])


def test_trimming_by_seqio_is_explained(mixture):
  """SeqIO cuts inputs to task_feature_lengths before the converter sees them."""
  instance = converter(ItemLMFeatureConverter)
  ds = seqio.get_dataset(mixture, {**TASK_LENGTHS, 'inputs': 22}, instance, shuffle=False)
  with pytest.raises(tf.errors.InvalidArgumentError, match='SeqIO cut it to the inputs'):
    list(ds)


def test_evaluator(mixture):
  instance = converter(ItemLMFeatureConverter)
  evaluator = seqio.Evaluator(mixture, instance, eval_split='validation')

  def predict(enumerated):
    """Reads the answer off the targets, as a perfect model would give it."""
    predictions = []
    for index, row in enumerated.as_numpy_iterator():
      answer = row['decoder_target_tokens'][row['decoder_loss_weights'] == 1]
      predictions.append((index, np.pad(answer, (0, 20 - len(answer)))))
    return predictions

  metrics, _ = evaluator.evaluate(compute_metrics=True, step=0, predict_fn=predict)
  tasks = ('converter_test_a', 'converter_test_b')
  assert metrics.result() == {task: {'matches': 20} for task in tasks}

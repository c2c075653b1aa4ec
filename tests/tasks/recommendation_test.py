"""The registered tasks: names, idempotence, SeqIO caching, and what a mistake says."""

import dataclasses
import itertools

import numpy as np
import pytest
import seqio

from ilm_jax.data.input.feature_converter import EntityTextFeatureConverter, ItemLMFeatureConverter
from ilm_jax.data.input.reader import BatchReader, InputShards
from ilm_jax.data.input.sources import InteractionSource, ItemSource
from ilm_jax.data.text import prompts
from ilm_jax.data.text.text_tokens import TextTokens
from ilm_jax.data.text.vocabularies import ByteVocabulary
from ilm_jax.errors import UsageError
from ilm_jax.tasks import recommendation

VOCABULARY = ByteVocabulary()
LENGTHS = {'inputs': 600, 'targets': 80, 'entity_ids': 22}


@pytest.fixture
def registered(small_prepared):
  p = dataclasses.replace(small_prepared, name='books')
  mixtures = recommendation.register_item_language_tasks(
    p, VOCABULARY, item_text='{title}. {genres}'
  )
  mixtures += recommendation.register_recommendation_tasks(p, VOCABULARY, num_soft_tokens=2)
  return p, mixtures


def test_names(registered):
  _, mixtures = registered
  assert mixtures == [
    'books_it',
    'books_it_ii',
    'books_it_ui',
    'books_openp5_title',
    'books_items_title',
    'books_multitask_title',
    'books_openp5_id',
    'books_items_id',
    'books_multitask_id',
  ]
  for task in ('sequential', 'straightforward', 'rating', 'item_description'):
    for group in ('seen', 'unseen'):
      for form in ('title', 'id'):
        assert f'books_{task}_{group}_{form}' in seqio.TaskRegistry.names()


def test_registering_again_changes_nothing_and_other_settings_replace(registered):
  p, _ = registered
  name = 'books_sequential_seen_title'
  before = seqio.TaskRegistry.get(name)
  recommendation.register_recommendation_tasks(p, ByteVocabulary(), num_soft_tokens=2)
  assert seqio.TaskRegistry.get(name) is before
  recommendation.register_recommendation_tasks(p, VOCABULARY, num_soft_tokens=3)
  assert seqio.TaskRegistry.get(name) is not before


def test_what_new_templates_do_not_have_is_registered_no_more(registered, tmp_path):
  p = dataclasses.replace(registered[0], name='fewer')
  (tmp_path / 'one.txt').write_text('sequential; seen; After {history} comes; {target}\n')

  def register(**options):
    recommendation.register_recommendation_tasks(p, VOCABULARY, num_soft_tokens=2, **options)
    names = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    return {name for name in names if name.startswith('fewer_')}

  everything = register()
  assert {'fewer_straightforward_seen_title', 'fewer_items_title'} < everything
  fewer = register(templates=tmp_path / 'one.txt')
  mixtures = {
    f'fewer_{name}_{form}' for name in ('openp5', 'multitask') for form in ('title', 'id')
  }
  tasks = {f'fewer_sequential_seen_{form}' for form in ('title', 'id')}
  assert fewer == mixtures | tasks
  assert register() == everything


@pytest.mark.parametrize(
  'split', ['train', pytest.param('validation', marks=pytest.mark.slow), 'test']
)
def test_sequential_and_straightforward_have_all_splits(registered, split):
  p, _ = registered
  for task in ('sequential', 'straightforward'):
    dataset = seqio.get_mixture_or_task(f'books_{task}_unseen_id').get_dataset(
      LENGTHS, split, shuffle=False
    )
    found = list(dataset.as_numpy_iterator())
    if split == 'test':
      targets = [VOCABULARY.decode(x['targets'].tolist()[:-1]).strip() for x in found]
      assert targets == [f'BOOKS item_{1001 + i}' for i in p.test_items if i >= 0]
    for x in found:
      assert (x['inputs'] == VOCABULARY.slot_id).sum() == 2 * len(x['entity_ids'])


def test_item_text_is_the_text(registered):
  p, _ = registered
  dataset = seqio.get_mixture_or_task('books_item_text').get_dataset(
    {'targets': 100, 'entity_ids': 3}, 'train', shuffle=False
  )
  for x in dataset.as_numpy_iterator():
    (item,) = x['entity_ids']
    expected = f'{p.item_text["title"][item]}. {p.item_text["genres"][item]}'[:64]
    assert VOCABULARY.decode(x['targets'].tolist()) == expected


def test_phase_1_mixtures_are_read_by_the_reader(registered):
  p, _ = registered
  for mixture, left in (('it_ii', range(p.num_items)), ('it_ui', range(p.num_items, 10**6))):
    reader = BatchReader(
      f'books_{mixture}',
      split='train',
      task_feature_lengths={'targets': 64, 'entity_ids': 3},
      converter=EntityTextFeatureConverter(),
      shards=InputShards(batch_size=256),
      seed=0,
    )
    batch = next(reader)
    is_pair = batch['entity_ids'][:, 1] >= 0
    assert 96 < is_pair.sum() < 160  # texts and pairs have equal shares
    np.testing.assert_array_equal(batch['text_mask'].any(axis=1), ~is_pair)
    assert np.isin(batch['entity_ids'][is_pair, 0], left).all()
    assert (batch['entity_ids'][is_pair, 2] >= p.num_items).all()
    assert (batch['entity_ids'][~is_pair, 1:] == -1).all()


def test_mixture_rates(registered):
  p, _ = registered
  mixture = seqio.MixtureRegistry.get('books_multitask_title')
  rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
  assert rates['books_straightforward_seen_title'] == len(p.items)
  assert rates['books_item_description_seen_title'] == np.count_nonzero(~p.heldout_items)


def test_a_prompt_may_not_show_what_it_asks_for(small_prepared):
  leaking = prompts.parse_template(
    'sequential', 'seen', 'Is it {item}?', '{target}', dataset='B', where='x', fields=('title',)
  )
  source = InteractionSource(small_prepared)
  with pytest.raises(UsageError, match=r'slot \{item\}.*cannot be shown'):
    recommendation.add_prompt_task(
      'leaking', source, [leaking], TextTokens(small_prepared, VOCABULARY), num_soft_tokens=1
    )


def test_a_custom_task(small_prepared):
  template = prompts.parse_template(
    'genre', 'seen', 'Which genre is {item:soft}?', '{item.genres}', dataset='B', where='here',
    fields=small_prepared.item_text,
  )  # fmt: skip
  recommendation.add_prompt_task(
    'custom_genre', ItemSource(small_prepared), [template],
    TextTokens(small_prepared, VOCABULARY), num_soft_tokens=4,
  )  # fmt: skip
  dataset = seqio.get_mixture_or_task('custom_genre').get_dataset(LENGTHS, 'train', shuffle=False)
  for x in dataset.as_numpy_iterator():
    assert len(x['entity_ids']) == 1
    genres = small_prepared.item_text['genres'][x['item']]
    assert VOCABULARY.decode(x['targets'].tolist()[:-1]) == f' {genres}'


def test_without_ratings_there_is_no_rating_task(small_prepared):
  p = dataclasses.replace(
    small_prepared, name='plain', ratings=None, validation_ratings=None, test_ratings=None
  )
  recommendation.register_recommendation_tasks(p, VOCABULARY, num_soft_tokens=1)
  assert not any(name.startswith('plain_rating') for name in seqio.TaskRegistry.names())
  assert 'plain_multitask_id' in seqio.MixtureRegistry.names()


def test_caching_on_beam_gives_the_same_examples(registered, tmp_path):
  import apache_beam as beam
  from absl import flags
  from seqio.scripts import cache_tasks_main

  if not flags.FLAGS.is_parsed():
    flags.FLAGS(['seqio_cache_tasks'])  # as its command line does

  name = 'books_sequential_seen_title'
  with beam.Pipeline() as pipeline:
    cache_tasks_main.run_pipeline(pipeline, [name], str(tmp_path))
  seqio.add_global_cache_dirs([str(tmp_path)])
  task = seqio.get_mixture_or_task(name)

  def examples(use_cached):
    dataset = task.get_dataset(LENGTHS, 'train', use_cached=use_cached, shuffle=False)
    return sorted(
      (x['inputs'].tolist(), x['targets'].tolist(), x['entity_ids'].tolist())
      for x in dataset.as_numpy_iterator()
    )

  assert task.assert_cached() is None
  assert examples(use_cached=True) == examples(use_cached=False)

  def reader(start_step):
    converter = ItemLMFeatureConverter(
      slot_id=VOCABULARY.slot_id, num_soft_tokens=2, bos_id=0, apply_length_check=False
    )
    return BatchReader(
      name,
      task_feature_lengths=LENGTHS,
      converter=converter,
      shards=InputShards(batch_size=4),
      seed=0,
      start_step=start_step,
      use_cached=True,
    )

  straight = list(itertools.islice(reader(0), 5))
  resumed = next(reader(4))
  for feature, value in straight[4].items():
    np.testing.assert_array_equal(resumed[feature], value)

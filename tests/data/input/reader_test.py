"""The reader: every example once an epoch, any number of hosts, resume at any step."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
import seqio
import tensorflow as tf

from ilm_jax.data.input.feature_converter import ItemLMFeatureConverter
from ilm_jax.data.input.reader import BatchReader, InputShards, read_once
from ilm_jax.data.text.vocabularies import ByteVocabulary
from ilm_jax.errors import UsageError
from ilm_jax.tasks import recommendation

VOCABULARY = ByteVocabulary()
NUM_TRAIN = []  # examples of TASK
LENGTHS = {'inputs': 300, 'targets': 60, 'entity_ids': 12}
MIXTURE = 'reader_openp5_title'
TASK = 'reader_straightforward_seen_id'
# Few templates: each is part of what is traced for a reader.
TEMPLATES = """
sequential; seen; {user} has seen {history}. Next:; {target}
straightforward; seen; What would {user} like?; {target}
straightforward; seen; Recommend something to {user}.; {target}
item_description; seen; What is {item:soft} called?; {item.title}
"""


@pytest.fixture(scope='module', autouse=True)
def prepared(small_prepared, tmp_path_factory):
  p = dataclasses.replace(small_prepared, name='reader')
  templates = tmp_path_factory.mktemp('reader') / 'templates.txt'
  templates.write_text(TEMPLATES)
  recommendation.register_recommendation_tasks(
    p, VOCABULARY, num_soft_tokens=2, templates=templates
  )
  NUM_TRAIN[:] = [len(p.items)]
  return p


@functools.cache  # to trace a conversion takes seconds, and to run it none
def converter(pack=False, window=32):
  return ItemLMFeatureConverter(
    slot_id=VOCABULARY.slot_id, num_soft_tokens=2, bos_id=0, pack=pack, window=window
  )


def reader(name=MIXTURE, pack=False, shards=InputShards(8), **overrides):
  arguments = {
    'split': 'train',
    'task_feature_lengths': LENGTHS,
    'converter': converter(pack),
    'shards': shards,
    'seed': 5,
    **overrides,
  }
  return BatchReader(name, **arguments)


def take(batches, n):
  return list(itertools.islice(batches, n))


def name_of(pack):
  """What a stream is made of has nothing to do with packing, and a task is read in less time."""
  return TASK if pack else MIXTURE


@functools.cache  # to begin a reader takes seconds, and to read from it nothing
def first(pack):
  """Nine batches of a run that is not interrupted, and its position after each number of them."""
  running = reader(name_of(pack), pack)
  positions, batches = [running.position()], []
  for _ in range(9):
    batches.append(next(running))
    positions.append(running.position())
  return batches, positions


@functools.cache
def of_task(pack=False, num_shards=2, host=None, seed=5):
  """Batches of TASK as one host reads them, or as the only one."""
  hosts = {} if host is None else {'host_index': host, 'host_count': 2}
  size, steps = (8, 3) if pack else (64, 2)
  if host is not None and not pack:
    steps = 2 + 2 * NUM_TRAIN[0] // size  # two epochs and more
  return take(reader(TASK, pack, InputShards(size, num_shards, **hosts), seed=seed), steps)


def assert_equal_batches(left, right):
  assert left.keys() == right.keys()
  for key in left:
    np.testing.assert_array_equal(left[key], right[key], err_msg=key)


def rows(batch):
  return [tuple(map(tuple, (batch['decoder_target_tokens'][i], batch['entity_ids'][i])))
          for i in range(len(batch['entity_ids']))]  # fmt: skip


@pytest.mark.parametrize('pack', [False, True])
def test_starting_at_a_step_equals_reading_up_to_it(pack):
  (straight, _), start = first(pack), 7
  for a, b in zip(
    straight[start:], take(reader(name_of(pack), pack, start_step=start), 2), strict=True
  ):
    assert_equal_batches(a, b)


def test_packed_resume_from_a_saved_position_however_often():
  straight, positions = first(True)
  position, step = positions[1], 1
  for steps in (3, 5):
    running = reader(name_of(True), True, start_step=step, position=position)
    for batch in straight[step : step + steps]:
      assert_equal_batches(batch, next(running))
    position, step = running.position(), step + steps
    np.testing.assert_array_equal(position, positions[step])


@pytest.mark.parametrize('pack', [False, True])
def test_the_global_batch_does_not_depend_on_the_number_of_hosts(pack):
  # With packing the second host is enough: the first is what the whole begins with.
  hosts = (1,) if pack else (0, 1)
  parts = [of_task(pack, host=host) for host in hosts]
  for step, batch in enumerate(of_task(pack)):
    joined = {key: np.concatenate([p[step][key] for p in parts]) for key in batch}
    rows_of_hosts = {key: values[-len(joined[key]) :] for key, values in batch.items()}
    assert len(joined['entity_ids']) * 2 == len(batch['entity_ids']) * len(hosts)
    assert_equal_batches(rows_of_hosts, joined)


def test_without_packing_the_batch_does_not_even_depend_on_the_number_of_shards():
  for one, two in zip(of_task(num_shards=1), of_task(), strict=True):
    assert_equal_batches(one, two)


def test_each_example_exactly_once_an_epoch_over_all_hosts(prepared):
  users = np.repeat(np.arange(prepared.num_users), np.diff(prepared.offsets))
  everything = sorted(
    (prepared.num_items + int(user), (*VOCABULARY.encode(f' READER item_{1001 + item}'), 1))
    for user, item in zip(users, prepared.items)
  )
  stream = []
  for batches in zip(of_task(host=0), of_task(host=1), strict=True):
    stream += entities_and_targets_of_stream(batches)
  epochs = [stream[: len(everything)], stream[len(everything) :][: len(everything)]]
  for epoch in epochs:
    assert sorted(epoch) == everything
  assert epochs[0] != epochs[1]


def entities_and_targets(batch):
  # The prompt's wording is drawn anew each epoch; the user and the target are the example.
  found = []
  for i in range(len(batch['entity_ids'])):
    on = batch['decoder_loss_weights'][i] == 1
    found.append((int(batch['entity_ids'][i][0]), tuple(batch['decoder_target_tokens'][i][on])))
  return found


def test_another_seed_is_another_order():
  assert rows(of_task(num_shards=1)[0]) != rows(of_task(num_shards=1, seed=6)[0])


def test_mixture_shares(prepared):
  name = 'reader_multitask_title'
  mixture = seqio.MixtureRegistry.get(name)
  rates = np.array([mixture.get_rate(task) for task in mixture.tasks])
  running = reader(name, shards=InputShards(64))
  # Item descriptions are the examples with one item as their only entity and no user.
  described = sum(
    int((batch['entity_ids'][:, 0] < prepared.num_items).sum())
    for batch in take(running, 16)
    for batch in [{'entity_ids': np.where(batch['entity_ids'][:, 1:2] >= 0, 10**6,
                                          batch['entity_ids'])}]
  )  # fmt: skip
  names = [task.name for task in mixture.tasks]
  share = rates[names.index('reader_item_description_seen_title')] / rates.sum()
  assert abs(described - 1024 * share) <= 1


def test_packing_loses_nothing():
  unpacked = entities_and_targets_of_stream(of_task(num_shards=1))
  packed = []
  for batch in first(True)[0]:
    for i in range(len(batch['entity_ids'])):
      for segment in range(1, batch['decoder_segment_ids'][i].max() + 1):
        on = (batch['decoder_segment_ids'][i] == segment) & (batch['decoder_loss_weights'][i] == 1)
        packed.append(tuple(batch['decoder_target_tokens'][i][on]))
  # Both streams are the same examples; packing reorders within windows of 32.
  for window in range(4):
    part = slice(32 * window, 32 * (window + 1))
    assert sorted(packed[part]) == sorted(target for _, target in unpacked[part])


def entities_and_targets_of_stream(batches):
  return [x for batch in batches for x in entities_and_targets(batch)]


@pytest.mark.parametrize('hosts', [pytest.param(1, marks=pytest.mark.slow), 2])
def test_read_once_pads_the_last_batch_on_every_host(prepared, hosts):
  name = 'reader_sequential_seen_title'
  total = int((prepared.test_items >= 0).sum())
  per_host = [
    list(
      read_once(
        name,
        split='test',
        task_feature_lengths=LENGTHS,
        converter=converter(),
        shards=InputShards(16, hosts, host, hosts),
      )
    )
    for host in range(hosts)
  ]
  assert len({len(batches) for batches in per_host}) == 1
  assert all(b['entity_ids'].shape == (16 // hosts, 12) for batches in per_host for b in batches)
  assert sum(int(b['example_mask'].sum()) for batches in per_host for b in batches) == total
  last = per_host[-1][-1]
  assert not last['decoder_loss_weights'][~last['example_mask']].any()
  assert (last['entity_ids'][~last['example_mask']] == -1).all()


def test_any_seqio_source_resumes_exactly(tmp_path):
  """A task as a user of SeqIO writes it: text lines, a map, a tokenizer."""
  path = tmp_path / 'lines.txt'
  path.write_text('\n'.join(f'question {i}\tanswer {i}' for i in range(37)))

  def split_line(dataset):
    def split(example):
      parts = tf.strings.split(example['text'], '\t')
      return {'inputs': parts[0], 'targets': parts[1], 'entity_ids': tf.zeros([0], tf.int32)}

    return dataset.map(split)

  plain = seqio.ByteVocabulary()
  features = {
    'inputs': seqio.Feature(plain),
    'targets': seqio.Feature(plain),
    'entity_ids': seqio.Feature(seqio.PassThroughVocabulary(10)),
  }

  def tokenize(dataset, output_features):
    text_features = {k: v for k, v in output_features.items() if k != 'entity_ids'}
    return seqio.preprocessors.tokenize(dataset, text_features, copy_pretokenized=False)

  def source():
    return seqio.TextLineDataSource({'train': str(path)})

  def to_dict(dataset):
    return dataset.map(lambda line: {'text': line})

  name = 'reader_lines'
  seqio.TaskRegistry.add(
    name, source=source(), preprocessors=[to_dict, split_line, tokenize],
    output_features=features,
  )  # fmt: skip
  text_only = ItemLMFeatureConverter(
    slot_id=VOCABULARY.slot_id, num_soft_tokens=0, bos_id=0, apply_length_check=False
  )
  lengths = {'inputs': 30, 'targets': 30, 'entity_ids': 0}

  def read(start):
    return reader(
      name, converter=text_only, task_feature_lengths=lengths, shards=InputShards(4),
      start_step=start,
    )  # fmt: skip

  straight = take(read(0), 12)
  for a, b in zip(straight[5:], take(read(5), 7)):
    assert_equal_batches(a, b)
  first_epoch = [tuple(row) for batch in straight for row in batch['decoder_target_tokens']][:37]
  assert len(set(first_epoch)) == 37


def test_filtering_preprocessors_are_refused(prepared):
  task = seqio.TaskRegistry.get(TASK)
  seqio.TaskRegistry.add(
    'reader_filtered',
    source=task.source,
    preprocessors=[lambda ds: ds.filter(lambda ex: ex['user'] % 2 == 0), *task.preprocessors[1:]],
    output_features=task.output_features,
  )
  with pytest.raises(UsageError, match='reader_filtered: 64 source examples became'):
    reader('reader_filtered')


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'batch_size': 9, 'num_shards': 2}, 'batch_size=9'),
    ({'batch_size': 8, 'num_shards': 2, 'host_count': 4}, 'num_shards=2 .* 4 hosts'),
  ],
)
def test_sizes_that_do_not_divide(arguments, message):
  with pytest.raises(UsageError, match=message):
    InputShards(**arguments)


def test_an_unknown_split():
  with pytest.raises(UsageError, match="no split 'dev'"):
    reader(split='dev')


def test_seeds_and_packing_that_cannot_be_resumed_are_refused():
  with pytest.raises(UsageError, match='seed=-1'):
    reader(seed=-1)
  with pytest.raises(UsageError, match='LMFeatureConverter packs'):
    reader(converter=seqio.LMFeatureConverter(pack=True))

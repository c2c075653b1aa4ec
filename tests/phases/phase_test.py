"""What all phases share: an entity table that fits the data, and each process's own rows."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ilm_jax.cf.entity_table import EntityTable
from ilm_jax.data.input.feature_converter import ItemLMFeatureConverter
from ilm_jax.data.text.vocabularies import ByteVocabulary
from ilm_jax.errors import UsageError
from ilm_jax.phases.phase import InputOptions, load_table, open_reader
from ilm_jax.runtime.sharding import DEFAULT_RULES, MESH_AXES, make_mesh, rows_for
from ilm_jax.tasks import recommendation


def test_an_entity_table_of_another_data_set_is_refused(small_prepared, tmp_path):
  entities = small_prepared.num_entities
  table = EntityTable(
    vectors=np.ones((entities, 4), np.float32),
    cold=np.zeros(entities, bool),
    num_items=small_prepared.num_items,
    method='import',
    settings={},
    data_name=small_prepared.name,
    data_fingerprint=small_prepared.fingerprint,
  )
  table.save(tmp_path / 'table')
  mesh = make_mesh({'data': -1})
  inputs = InputOptions(Path('unused'), tmp_path / 'table', {}, 0, mesh, DEFAULT_RULES)
  assert load_table(inputs, small_prepared).content_hash == table.content_hash
  other = dataclasses.replace(small_prepared, item_keys=small_prepared.item_keys[::-1])
  with pytest.raises(UsageError, match='was made for data set'):
    load_table(inputs, other)


def mesh_of_two_processes() -> Any:
  """Of which this one, number 0, has the second part of a batch."""
  devices = [SimpleNamespace(process_index=number) for number in (1, 0)]
  shape = dict(zip(MESH_AXES, (2, 1, 1)))
  return SimpleNamespace(devices=np.array(devices, object).reshape(2, 1, 1), shape=shape)


def test_a_process_goes_on_where_its_own_shards_stood(small_prepared):
  data = dataclasses.replace(small_prepared, name='shards')
  vocabulary = ByteVocabulary()
  recommendation.register_recommendation_tasks(data, vocabulary, num_soft_tokens=1)
  task = 'shards_straightforward_seen_title'
  converter = ItemLMFeatureConverter(
    slot_id=vocabulary.slot_id, num_soft_tokens=1, bos_id=0, pack=True, window=8
  )
  inputs = InputOptions(Path(), None, {task: 8}, 0, mesh_of_two_processes(), DEFAULT_RULES)
  stood = np.array([[3, 0], [5, 0], [7, 0], [9, 0]])  # of four shards, two of each process
  lengths = {'inputs': 300, 'targets': 60, 'entity_ids': 12}
  reader = open_reader(
    task, inputs, task, lengths=lengths, converter=converter, start_step=4, position=stood
  )
  np.testing.assert_array_equal(reader.position(), stood[2:])


@pytest.mark.parametrize(('least', 'expected'), [(1, 4), (4, 4), (5, 8), (8, 8)])
def test_rows_split_evenly_and_there_are_enough(least, expected):
  mesh: Any = SimpleNamespace(shape=dict(zip(MESH_AXES, (2, 2, 2))))
  assert rows_for(least, mesh) == expected

"""The batches for T5X's train loop, for which T5X itself is not needed."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from ilm_jax.data.input.feature_converter import EntityTextFeatureConverter
from ilm_jax.data.text.vocabularies import ByteVocabulary
from ilm_jax.phases.t5x_batches import SOURCE, Batches, InputShards
from ilm_jax.tasks import recommendation

SCHEDULE = ('item_text', 'item_text', 'user_item')
LENGTHS = {
  'item_text': {'targets': 30, 'entity_ids': 1},
  'user_item': {'targets': 0, 'entity_ids': 3},
}


@pytest.fixture
def batches(small_prepared):
  """A function that begins to read."""
  recommendation.register_item_language_tasks(
    small_prepared, ByteVocabulary(), item_text='{title}', max_text_tokens=30
  )
  model = SimpleNamespace(
    schedule=SCHEDULE,
    source=SCHEDULE[0],
    converter=lambda source, pack: EntityTextFeatureConverter(),
    phase=SimpleNamespace(prepared=small_prepared, steps=SimpleNamespace(lengths=LENGTHS.get)),
  )
  config = SimpleNamespace(
    split='train', task_feature_lengths=LENGTHS[SCHEDULE[0]], pack=False, seed=3, use_cached=False
  )
  return lambda: Batches(model, config, InputShards(4))


def test_they_go_on_where_they_were(batches, tmp_path):
  running = batches()
  for _ in range(5):
    next(running)
  running.save(tmp_path / 'position')
  expected = list(itertools.islice(running, 4))
  again = batches()
  again.restore(tmp_path / 'position')
  for ours, theirs in zip(itertools.islice(again, 4), expected):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
      np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_sources_come_in_turn_and_say_which_they_are(batches):
  for batch, source in zip(batches(), SCHEDULE * 2):
    assert (batch[SOURCE] == (source == 'user_item')).all()
    for name, value in batch.items():
      if not name.startswith((SOURCE, f'{source}/')):
        assert not value.any(), name
    assert batch[f'{source}/entity_ids'].any()

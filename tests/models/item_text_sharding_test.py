"""Phase 1 on eight devices is phase 1 on one: loss, gradients, and the parameters after a step."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from ilm_jax.models.item_text import Frozen
from ilm_jax.modules.histories import UserHistories
from ilm_jax.runtime import sharding
from tests.models.item_text_test import (
  D_CF,
  ENCODER,
  KEY,
  NUM_ITEMS,
  NUM_USERS,
  make_model,
  text_batch,
)
from tests.support import eight_devices, steps

RULES = sharding.DEFAULT_RULES
# Not 64 rows, but with what makes a global batch differ from eight local ones: items 3 and 5 occur
# on several devices, where they must not be negatives.
ITEMS = [0, 3, 1, 5, 2, 3, 4, 6, 5, 7, 8, 9, 10, 3, 11, 5]


def batch_of(source):
  if source == 'item_text':
    return text_batch(ITEMS)
  rng = np.random.default_rng(1)
  users = NUM_ITEMS + rng.integers(NUM_USERS, size=16)
  left = users if source == 'user_item' else rng.integers(NUM_ITEMS, size=16)
  return {'entity_ids': np.stack([left, rng.integers(NUM_ITEMS, size=16), users], axis=1)}


def constants(mesh):
  rng = np.random.default_rng(2)
  vectors = rng.normal(size=(NUM_ITEMS + NUM_USERS, D_CF)).astype(np.float32)
  histories = UserHistories(
    offsets=np.array([0, 3, 4, 6, 8, 10]),
    items=np.array([1, 4, 7, 0, 2, 5, 3, 8, 6, 9]),
    max_length=3,
  )
  vectors = sharding.pad_rows(vectors, 'entities', mesh, RULES)
  return Frozen(nn.LogicallyPartitioned(vectors, ('entities', 'cf')), histories)


SOURCES = ['item_text', 'user_item', pytest.param('item_item', marks=pytest.mark.slow)]
MODEL = make_model()


def loss(params, frozen, batch, source):
  return MODEL.loss(params, frozen, batch, KEY, source=source, deterministic=True)


step = steps.step_of(loss)


@pytest.fixture(scope='module')
def single():
  """On one device: parameters that are random everywhere, and what a step makes of them."""
  params = steps.random_params(MODEL.init, KEY)
  frozen = nn.meta.unbox(constants(sharding.make_mesh({}, jax.devices()[:1])))
  run = jax.jit(step, static_argnames='source')
  return params, functools.cache(
    lambda source: run(params, frozen, batch_of(source), source=source)
  )


@eight_devices.needed
class TestOnEightDevices:
  @pytest.mark.parametrize('shape', steps.MESHES, ids=str)
  @pytest.mark.parametrize('source', SOURCES)
  def test_a_step_is_one_devices_step(self, single, shape, source):
    params, expected = single
    mesh = sharding.make_mesh(shape)
    shapes = sharding.abstract_init(MODEL.init, mesh, RULES, KEY)
    at = jax.tree.map(lambda x: x.sharding, shapes)
    placed = jax.device_put(params, at)
    frozen = sharding.place_constants(constants(mesh), mesh, RULES)
    with sharding.use_mesh(mesh, RULES):
      run = jax.jit(step, static_argnames='source', out_shardings=(None, None, at, at))
      batch = sharding.place_batch(batch_of(source), mesh)
      found = run(placed, frozen, batch, source=source)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected(source)), strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)

  def test_negatives_are_those_of_the_global_batch(self, single):
    """Had each device its own negatives, chance would be log 2."""
    metrics = single[1]('item_text')[1]
    same = np.equal.outer(ITEMS, ITEMS) & ~np.eye(16, dtype=bool)
    chance = np.log((~same).sum(axis=1)).mean()
    np.testing.assert_allclose(metrics['itc/gain'] + metrics['itc/nll'], chance, rtol=1e-5)
    assert chance > 2.5
    assert ENCODER.num_queries == 3

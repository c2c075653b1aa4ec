"""Phase 2 on eight devices is phase 2 on one: losses, gradients, parameters after a step."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ilm_jax.catalogue.trie import build_trie
from ilm_jax.models.item_language import Frozen, ItemLanguageConfig, ItemLanguageModel
from ilm_jax.modules.qformer import QFormerConfig
from ilm_jax.modules.readout import log_popularity
from ilm_jax.modules.soft_tokens import SoftTokenConfig
from ilm_jax.runtime import sharding
from tests.support import eight_devices, steps, tiny_gemma

RULES = sharding.DEFAULT_RULES
SLOT, K, D_CF, NUM_ENTITIES, NUM_ITEMS, ROWS, T = 9, 2, 6, 1003, 900, 8, 12
LM, VARIABLES = tiny_gemma.load('gemma3')
ENCODER = QFormerConfig(
  num_layers=2, d_model=16, num_heads=2, d_mlp=32, num_queries=K, d_encoder=D_CF
)
# Chunks of 3 of the 4 or more positions of each device.
CONFIG = ItemLanguageConfig(target_loss={'catalogue': 'catalogue'}, max_targets=4, chunk=3)


def model_of(config):
  return ItemLanguageModel(
    LM,
    SoftTokenConfig(ENCODER, LM.config.d_model, gain=0.5),
    slot_id=SLOT,
    num_items=NUM_ITEMS,
    config=config,
    prefix_tokens=(2, 30, 17),
  )


MODEL = model_of(CONFIG)
SAMPLED = model_of(dataclasses.replace(CONFIG, whole_catalogue=10, num_negatives=64))
EOS, KEY = 1, jax.random.key(1)
TEXTS = [[10 + i % 30, 10 + i // 30, EOS] for i in range(NUM_ITEMS)]
SOURCES = [
  'vocabulary',
  'history',
  pytest.param('catalogue', marks=pytest.mark.slow),  # catalogue_sharding_test.py has its loss
  pytest.param('sampled', marks=pytest.mark.slow),
]


def batch_of(source):
  """Two slots of two entities, two words, and a text of the catalogue."""
  rng = np.random.default_rng(2)
  if source in ('history', 'sampled'):
    ids = rng.integers(NUM_ITEMS, size=(ROWS, 6))
    ids[1, 3:] = ids[4, 2:] = -1
    return {'entity_ids': ids.astype(np.int32)}
  entities = rng.integers(NUM_ENTITIES, size=(ROWS, 2))
  entities[3] = entities[5]  # on other devices
  texts = np.array([TEXTS[i] for i in rng.integers(NUM_ITEMS, size=ROWS)])
  words = rng.integers(10, 50, (ROWS, 2))
  slots = np.full((ROWS, 2 * K), SLOT)
  tokens = np.concatenate([np.full((ROWS, 1), 2), slots, words, texts], axis=1)
  tokens = np.pad(tokens, ((0, 0), (0, T - tokens.shape[1] + 1)))
  weights = np.zeros((ROWS, T))
  weights[:, 2 * K + 2 : 2 * K + 5] = 1
  return {
    'decoder_input_tokens': tokens[:, :-1].astype(np.int32),
    'decoder_target_tokens': tokens[:, 1:].astype(np.int32),
    'decoder_loss_weights': weights.astype(np.int32),
    'entity_ids': entities.astype(np.int32),
  }


def constants(mesh):
  rng = np.random.default_rng(3)
  vectors = rng.normal(size=(NUM_ENTITIES, D_CF)).astype(np.float32)
  abstract = sharding.abstract_init(
    lambda key: LM.init(key, jnp.zeros((1, 2), jnp.int32), method='logits_of')['params'],
    mesh,
    RULES,
    KEY,
  )
  lm = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), VARIABLES['params'], abstract)
  trie = build_trie(TEXTS, EOS)
  return sharding.place_constants(
    Frozen(
      lm=lm,
      entity_vectors=nn.LogicallyPartitioned(
        sharding.pad_rows(vectors, 'entities', mesh, RULES), ('entities', 'cf')
      ),
      log_popularity=log_popularity(rng.integers(100, size=NUM_ITEMS)),
      prefix=jax.jit(MODEL.run_prefix)(lm),
      trie=trie,
      bias=rng.normal(size=trie.num_nodes).astype(np.float32),
    ),
    mesh,
    RULES,
  )


def loss(params, frozen, batch, source):
  if source in ('history', 'sampled'):
    model = SAMPLED if source == 'sampled' else MODEL
    return model.readout_loss(params, frozen, batch['entity_ids'], KEY, deterministic=True)
  return MODEL.loss(params, frozen, batch, KEY, target_loss=source, deterministic=True)


step = steps.step_of(loss)


def placed(params, mesh):
  shapes = sharding.abstract_init(MODEL.init, mesh, RULES, KEY)
  at = jax.tree.map(lambda x: x.sharding, shapes)
  return jax.device_put(params, at), at


@pytest.fixture(scope='module')
def single():
  """On one device: parameters that are random everywhere, and what a step makes of them."""
  params = steps.random_params(MODEL.init, KEY)
  frozen = constants(sharding.make_mesh({}, jax.devices()[:1]))
  run = jax.jit(step, static_argnames='source')
  return params, functools.cache(
    lambda source: run(params, frozen, batch_of(source), source=source)
  )


_compiled: dict = {}


def compiled(params, shape, source):
  """A step on a mesh, compiled once, and its arguments."""
  if (str(shape), source) not in _compiled:
    mesh = sharding.make_mesh(shape)
    params, at = placed(params, mesh)
    with sharding.use_mesh(mesh, RULES):
      run = jax.jit(step, static_argnames='source', out_shardings=(None, None, at, at))
      args = params, constants(mesh), sharding.place_batch(batch_of(source), mesh)
      _compiled[str(shape), source] = run.lower(*args, source=source).compile(), args
  return _compiled[str(shape), source]


@eight_devices.needed
class TestOnEightDevices:
  @pytest.mark.parametrize('shape', steps.MESHES, ids=str)
  @pytest.mark.parametrize('source', SOURCES)
  def test_a_step_is_one_devices_step(self, single, shape, source):
    _, expected = single
    run, args = compiled(single[0], shape, source)
    found = run(*args)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected(source)), strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-5)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected(source)[2]))
    assert largest > 1e-3  # or the tolerance would say nothing

  def test_the_entity_table_stays_where_it_is(self, single):
    """Each device holds an eighth of the rows, and no program has all of them on one device."""
    run, (params, frozen, batch) = compiled(single[0], steps.ALL_AXES, 'vocabulary')
    assert frozen.entity_vectors.sharding.shard_shape(frozen.entity_vectors.shape) == (126, D_CF)
    whole = rf'f32\[(1003|1008),{D_CF}\]'
    assert not re.search(whole, run.as_text())
    assert re.search(rf'f32\[126,{D_CF}\]', run.as_text())
    # What would be seen if it were gathered:
    mesh = sharding.make_mesh(steps.ALL_AXES)
    with sharding.use_mesh(mesh, RULES):
      table = sharding.replicate(np.asarray(frozen.entity_vectors), mesh)
      frozen = dataclasses.replace(frozen, entity_vectors=table)
      run = jax.jit(step, static_argnames='source')
      program = run.lower(params, frozen, batch, source='vocabulary').compile().as_text()
      assert re.search(whole, program)

  def test_states_and_logits_are_split(self, single):
    """Rows over data and fsdp, the vocabulary over tensor: seen in the compiled program."""
    program = compiled(single[0], steps.ALL_AXES, 'vocabulary')[0].as_text()
    d, vocab = LM.config.d_model, LM.config.vocab_size
    assert re.search(rf'f32\[{ROWS // 4},{T},{d}\]', program)
    assert not re.search(rf'f32\[{ROWS},{T},{d}\]', program)
    assert re.search(rf'f32\[\d+,{vocab // 2}\]', program)
    assert not re.search(rf'f32\[\d+,{vocab}\]', program)

  def test_a_device_needs_nothing_of_others_for_its_own_soft_tokens(self, single):
    """Where it has the table and the parameters: no entity of other rows, no soft token."""
    mesh = sharding.make_mesh({'data': 8})
    params, _ = placed(single[0], mesh)
    frozen = constants(mesh)
    table = sharding.replicate(np.asarray(frozen.entity_vectors), mesh)
    frozen = dataclasses.replace(frozen, entity_vectors=table)
    with sharding.use_mesh(mesh, RULES):
      batch = sharding.place_batch(batch_of('vocabulary'), mesh)
      args = params, frozen, batch['decoder_input_tokens'], batch['entity_ids']
      program = jax.jit(MODEL.embed).lower(*args).compile().as_text()
    collectives = 'all-reduce', 'all-gather', 'all-to-all', 'collective-permute', 'reduce-scatter'
    assert not re.search(rf' ({"|".join(collectives)})\S*\(', program)

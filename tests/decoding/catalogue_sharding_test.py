"""Recommending on eight devices is what it is on one: users and all weights are split."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_lms

from ilm_jax import sharding
from ilm_jax.decoding.beam import beam_search
from ilm_jax.decoding.exact import catalogue_scores, scoring_plan
from ilm_jax.decoding.trie import build_trie
from ilm_jax.modules.decoder import Decoder
from tests import eight_devices

RULES = sharding.DEFAULT_RULES
LM = Decoder(dataclasses.replace(tiny_lms.CONFIGS['llama'], vocab_size=98))
TRIE = build_trie([[5, 1], [5, 8, 1], [6, 8, 9, 1], [6, 8, 10, 1], [7, 30, 31, 1]], 1)
TOKENS = np.random.default_rng(0).integers(2, 98, (8, 6))
LENGTHS = np.arange(8, dtype=np.int32) % 6 + 1


def test_on_eight_devices():
  eight_devices.run_class_of(__file__)


def init(key):
  return LM.init(key, jnp.zeros((1, 2), jnp.int32), method='logits_of')['params']


def results(mesh):
  """With 3 beams, which no mesh axis divides."""
  params = sharding.init_sharded(init, mesh, RULES, jax.random.key(0))
  batch = sharding.place_batch({'tokens': TOKENS, 'lengths': LENGTHS}, mesh)

  @jax.jit
  def run(params, trie, plan, batch):
    prompts: Any = LM.apply({'params': params}, batch['tokens'], method='embed_tokens')
    arguments = (prompts, batch['lengths'])
    beams = beam_search(LM, params, trie, *arguments, beam_size=3, normalise='vocabulary')
    return beams, catalogue_scores(LM, params, plan, *arguments)

  with sharding.use_mesh(mesh, RULES):
    return run(params, TRIE, scoring_plan(TRIE), batch)


@pytest.mark.skipif(not eight_devices.ARE_HERE, reason='run by test_on_eight_devices')
class TestOnEightDevices:
  def test_is_that_on_one(self):
    expected, expected_scores = results(sharding.make_mesh({'data': 1}, jax.devices()[:1]))
    beams, scores = results(sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2}))
    np.testing.assert_array_equal(beams.items, expected.items)
    np.testing.assert_allclose(beams.log_probs, expected.log_probs, atol=1e-5)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)
    assert scores.sharding.shard_shape(scores.shape) == (2, 5)
    assert beams.items.sharding.shard_shape(beams.items.shape) == (2, 3)

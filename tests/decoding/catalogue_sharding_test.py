"""Recommending on eight devices is what it is on one: users and all weights are split."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ilm_jax.catalogue.trie import build_trie
from ilm_jax.decoding.beam import beam_search
from ilm_jax.decoding.exact import catalogue_scores, scoring_plan
from ilm_jax.models.catalogue_loss import catalogue_nll
from ilm_jax.modules.decoder import Decoder
from ilm_jax.runtime import sharding
from tests.support import eight_devices, tiny_lms

RULES = sharding.DEFAULT_RULES
LM = Decoder(dataclasses.replace(tiny_lms.CONFIGS['llama'], vocab_size=98))
ITEMS = [[5, 1], [5, 8, 1], [6, 8, 9, 1], [6, 8, 10, 1], [7, 30, 31, 1]]
TRIE = build_trie(ITEMS, 1)
BIAS = np.random.default_rng(1).normal(size=TRIE.num_nodes).astype(np.float32)
TOKENS = np.random.default_rng(0).integers(2, 98, (8, 6))
LENGTHS = np.arange(8, dtype=np.int32) % 6 + 1
TARGETS = np.array([[*ITEMS[i % 5], *[0] * (6 - len(ITEMS[i % 5]))] for i in range(8)], np.int32)


def init(key):
  return LM.init(key, jnp.zeros((1, 2), jnp.int32), method='logits_of')['params']


def results(mesh):
  """With 3 beams, which no mesh axis divides."""
  params = sharding.init_sharded(init, mesh, RULES, jax.random.key(0))
  batch = {'tokens': TOKENS, 'lengths': LENGTHS, 'targets': TARGETS}
  batch = sharding.place_batch(batch, mesh)

  @jax.jit
  def run(params, trie, plan, bias, batch):
    prompts: Any = LM.apply({'params': params}, batch['tokens'], method='embed_tokens')
    arguments = (prompts, batch['lengths'])
    beams = beam_search(LM, params, trie, *arguments, beam_size=3, normalise='vocabulary')
    scores = catalogue_scores(LM, params, plan, *arguments, bias=bias)

    def loss(prompts):
      hidden, _ = LM.apply({'params': params}, prompts)
      targets = batch['targets']
      starts = jnp.broadcast_to(jnp.arange(6) == 0, targets.shape)
      nll, _ = catalogue_nll(
        LM, params, trie, hidden, targets, starts, targets > 0, bias=bias, chunk=16
      )
      return nll.sum()

    return beams, scores, jax.value_and_grad(loss)(prompts)

  with sharding.use_mesh(mesh, RULES):
    return run(params, TRIE, scoring_plan(TRIE), BIAS, batch)


@eight_devices.needed
class TestOnEightDevices:
  def test_is_that_on_one(self):
    expected, expected_scores, expected_loss = results(
      sharding.make_mesh({'data': 1}, jax.devices()[:1])
    )
    beams, scores, loss = results(sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2}))
    np.testing.assert_array_equal(beams.items, expected.items)
    np.testing.assert_allclose(beams.log_probs, expected.log_probs, atol=1e-5)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)
    for got, single in zip(loss, expected_loss):
      np.testing.assert_allclose(got, single, rtol=1e-4, atol=1e-5)
    assert loss[1].sharding.shard_shape(loss[1].shape)[0] == 2
    assert scores.sharding.shard_shape(scores.shape) == (2, 5)
    assert beams.items.sharding.shard_shape(beams.items.shape) == (2, 3)

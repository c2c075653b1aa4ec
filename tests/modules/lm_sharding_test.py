"""Language models on eight devices are those on one: loss, gradients of embeddings and weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ilm_jax.modules.decoder import Decoder, DecoderConfig
from ilm_jax.modules.layers import Compute
from ilm_jax.modules.t5 import T5, T5Config
from ilm_jax.modules.token_losses import token_nll
from ilm_jax.runtime import sharding
from tests.support import eight_devices

ALL = {'data': 2, 'fsdp': 2, 'tensor': 2}
CASES = [
  ('gemma3', ALL),
  pytest.param('gemma3', {'data': 8}, marks=pytest.mark.slow),
  pytest.param('gemma3', {'data': 1, 'fsdp': 4, 'tensor': 2}, marks=pytest.mark.slow),
  pytest.param('llama_unstacked', ALL, marks=pytest.mark.slow),
  ('t5', ALL),
]
RULES = sharding.DEFAULT_RULES
SIZES = dict(d_model=32, num_heads=4, head_dim=8, d_mlp=64, vocab_size=64)
GEMMA3 = dict(
  activation='gelu', window=4, global_every=2, qk_norm=True, post_norms=True,
  scale_embeddings=True, final_softcap=20.0,
)  # fmt: skip
LMS = {
  'gemma3': Decoder(DecoderConfig(num_layers=4, num_kv_heads=2, **SIZES, **GEMMA3)),
  'llama_unstacked': Decoder(
    DecoderConfig(num_layers=2, num_kv_heads=2, tied_head=False, **SIZES),
    Compute(scan_layers=False, remat='full'),
  ),
  't5': T5(T5Config(num_encoder_layers=0, num_decoder_layers=2, **SIZES)),
}
RNG = np.random.default_rng(0)
BATCH = {
  'tokens': RNG.integers(0, 64, (8, 12)).astype(np.int32),
  'targets': RNG.integers(0, 64, (8, 12)).astype(np.int32),
}


def init(lm, key):
  return lm.init(key, jnp.zeros((1, 2), jnp.int32), method='logits_of')['params']


def loss(params, shift, batch, lm):
  variables = {'params': params}
  embeddings = lm.apply(variables, batch['tokens'], method='embed_tokens')
  hidden, _ = lm.apply(variables, embeddings + shift)
  return token_nll(
    lambda x: lm.apply(variables, x, method='logits'),
    hidden.reshape(-1, hidden.shape[-1]),
    batch['targets'].reshape(-1),
    chunk=32,
  ).mean()


def results(lm, mesh):
  params = sharding.init_sharded(lambda key: init(lm, key), mesh, RULES, jax.random.key(0))
  with sharding.use_mesh(mesh, RULES):
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnames='lm')
    arguments = (params, jnp.zeros((8, 12, 32)), sharding.place_batch(BATCH, mesh), lm)
    return params, jax.device_get(compiled(*arguments))


@eight_devices.needed
class TestOnEightDevices:
  @pytest.mark.parametrize(('name', 'shape'), CASES, ids=str)
  def test_is_that_on_one(self, name, shape):
    one = sharding.make_mesh({'data': 1}, jax.devices()[:1])
    _, (value, gradients) = results(LMS[name], one)
    params, (found, found_gradients) = results(LMS[name], sharding.make_mesh(shape))
    np.testing.assert_allclose(found, value, rtol=1e-5)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
      found_gradients,
      gradients,
    )
    if shape.get('tensor', 1) > 1:
      table = params['embedder']['embedding']
      assert table.sharding.shard_shape(table.shape)[0] == 32  # of 64 tokens

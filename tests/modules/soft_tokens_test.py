import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ilm_jax.modules.qformer import QFormerConfig
from ilm_jax.modules.soft_tokens import MlpConfig, SoftTokenConfig, SoftTokens

D_CF, D_LM, K = 6, 20, 3
QFORMER = QFormerConfig(
  num_layers=2, d_model=16, num_heads=2, d_mlp=32, num_queries=K, d_encoder=D_CF
)
ONE_LAYER = dataclasses.replace(QFORMER, num_layers=1, cross_attention_every=1)
RNG = np.random.default_rng(0)
TOKENS = RNG.normal(size=(4, 5, D_CF)).astype(np.float32)


def module_of(item_encoder, **changes):
  module = SoftTokens(SoftTokenConfig(item_encoder, D_LM, **changes))
  tokens = jnp.zeros((1, module.config.max_encoder_tokens, D_CF))
  return module, lambda: nn.meta.unbox(module.init(jax.random.key(0), tokens))


@functools.cache
def make(item_encoder, **changes):
  module, init = module_of(item_encoder, **changes)
  return module, jax.device_get(jax.jit(init)())


@functools.partial(jax.jit, static_argnums=0)
def encode(module, *args):
  return module.apply(*args)


def soft(module, *args):
  return np.asarray(encode(module, *args).soft_tokens)


def count(variables):
  return sum(x.size for x in jax.tree.leaves(variables))


def test_mlp_is_linear_relu_linear():
  module, variables = make(MlpConfig(K, D_CF), normalise=False)
  found = soft(module, variables, TOKENS[:, :1])
  params = variables['params']
  hidden = np.maximum(TOKENS[:, 0] @ params['item_encoder']['kernel'], 0)
  expected = np.einsum('bf,fkd->bkd', hidden, params['adaptor']['kernel'])
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
  wide = 10 * D_CF
  assert count(variables) == D_CF * wide + wide + (wide + 1) * K * D_LM


def test_qformer_has_no_text_branch():
  _, init = module_of(QFORMER)
  d, mlp, d_cf = 16, 32, D_CF
  attention = 4 * (d * d + d) + 2 * d
  cross = 2 * (d * d + d) + 2 * (d_cf * d + d) + 2 * d
  feed_forward = d * mlp + mlp + mlp * d + d + 2 * d
  layers = 2 * (attention + feed_forward) + cross
  assert count(jax.eval_shape(init)) == K * d + 2 * d + layers + (d + 1) * D_LM + 1


def test_scale_is_that_of_the_token_embeddings():
  for encoder in (ONE_LAYER, MlpConfig(K, D_CF)):
    module, variables = make(encoder, gain=0.136)
    found = np.asarray(soft(module, variables, 50 * TOKENS[:, :1]))
    np.testing.assert_allclose(np.sqrt((found**2).mean(axis=-1)), 0.136, rtol=1e-3)


def test_padding_of_a_sequence_is_not_seen():
  module, variables = make(ONE_LAYER, max_encoder_tokens=5)
  mask = np.array([[1, 1, 1, 0, 0]] * 4)
  padded = soft(module, variables, TOKENS, mask)
  other = np.where(mask[:, :, None] > 0, TOKENS, 7.0)
  np.testing.assert_allclose(padded, soft(module, variables, other, mask), atol=1e-6)
  np.testing.assert_allclose(padded, soft(module, variables, TOKENS[:, :3]), atol=1e-6)


def test_order_is_counted_from_the_end():
  module, variables = make(ONE_LAYER, max_encoder_tokens=5)
  params = {**variables['params'], 'recency': np.zeros((5, D_CF), np.float32)}
  reversed_tokens = TOKENS[:, ::-1]
  alike = [soft(module, {'params': params}, x) for x in (TOKENS, reversed_tokens)]
  np.testing.assert_allclose(*alike, atol=1e-5)  # without it, a set
  first = np.zeros((5, D_CF), np.float32)
  first[0] = 1.0  # of the last one
  marked = TOKENS.copy()
  marked[:, -1] += 1
  _, plain = make(ONE_LAYER, max_encoder_tokens=5)
  plain = {**plain['params'], 'recency': np.zeros((5, D_CF), np.float32)}
  np.testing.assert_allclose(
    soft(module, {'params': params | {'recency': first}}, TOKENS),
    soft(module, {'params': plain}, marked),
    atol=1e-5,
  )


def test_what_does_not_fit():
  with pytest.raises(ValueError, match='an MLP reads one'):
    SoftTokenConfig(MlpConfig(), D_LM, max_encoder_tokens=2)
  module, variables = make(ONE_LAYER, max_encoder_tokens=2)
  with pytest.raises(ValueError, match='max_encoder_tokens=2'):
    soft(module, variables, TOKENS)
  assert dataclasses.replace(QFORMER, has_text=False).num_queries == K


def test_skip_reads_the_encoder_tokens_beside_the_queries():
  module, variables = make(ONE_LAYER, skip=True, max_encoder_tokens=5)
  mask = np.array([[1] * 5, [1] * 3 + [0] * 2, [1] + [0] * 4, [1] * 4 + [0]])
  encoded = encode(module, variables, TOKENS, mask)
  recency = np.asarray(variables['params']['recency'])
  for row, (tokens, there) in enumerate(zip(TOKENS, mask)):
    n = there.sum()
    mean = np.mean([tokens[i] + recency[n - 1 - i] for i in range(n)], axis=0)
    np.testing.assert_allclose(encoded.vectors[row, 16:], mean, atol=1e-5)
  assert encoded.vectors.shape == (4, module.config.num_features)
  kernel = variables['params']['adaptor']['kernel']
  assert kernel.shape == (16 + D_CF, D_LM)
  # Without that part of the kernel, it is what it would be without the skip.
  cut = {**variables['params'], 'adaptor': {**variables['params']['adaptor']}}
  cut['adaptor']['kernel'] = np.concatenate([kernel[:16], np.zeros((D_CF, D_LM), np.float32)])
  plain = {**cut, 'adaptor': {**cut['adaptor'], 'kernel': kernel[:16]}}
  without, _ = make(ONE_LAYER, max_encoder_tokens=5)
  np.testing.assert_allclose(
    soft(module, {'params': cut}, TOKENS, mask),
    soft(without, {'params': plain}, TOKENS, mask),
    atol=1e-5,
  )


def test_an_mlp_has_nothing_to_skip():
  with pytest.raises(ValueError, match='skip=True'):
    SoftTokenConfig(MlpConfig(K, D_CF), D_LM, skip=True)

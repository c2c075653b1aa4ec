"""The Q-Former's masks, shapes and axes."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ilm_jax.modules import qformer

CONFIG = dataclasses.replace(
  qformer.SIZES['tiny'], d_encoder=16, vocab_size=100, max_text_length=16, num_layers=4
)
B, T = 3, 7


@pytest.fixture(scope='module')
def model():
  module = qformer.QFormer(CONFIG)
  key = jax.random.key(0)
  encoder = jax.random.normal(key, (B, 1, CONFIG.d_encoder))
  text = jax.random.randint(jax.random.key(1), (B, T), 0, CONFIG.vocab_size)
  variables = jax.jit(module.init)(jax.random.key(2), encoder, text)
  # Random everywhere, biases and norms too: zeros hide mistakes.
  leaves, tree = jax.tree.flatten(nn.meta.unbox(variables))
  keys = jax.random.split(jax.random.key(3), len(leaves))
  noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
  apply = jax.jit(lambda *args: module.apply(jax.tree.unflatten(tree, noisy), *args))
  return apply, encoder, text


def mask(kind, lengths=(T, T, T)):
  return qformer.attention_mask(
    kind, CONFIG.num_queries, jnp.arange(T)[None] < jnp.array(lengths)[:, None]
  )


def changed(before, after):
  return np.abs(np.asarray(before) - np.asarray(after)).max(axis=(0, 2)) > 1e-6


@pytest.mark.parametrize(
  ('kind', 'queries_see_text'), [('unimodal', False), ('generation', False), ('multimodal', True)]
)
def test_a_changed_text_token_changes_queries_only_in_matching(model, kind, queries_see_text):
  apply, encoder, text = model
  queries, _ = apply(encoder, text, mask(kind))
  other, _ = apply(encoder, text.at[:, 3].add(1), mask(kind))
  assert changed(queries, other).all() == queries_see_text
  assert changed(queries, other).any() == queries_see_text


def test_generation_is_causal(model):
  apply, encoder, text = model
  _, states = apply(encoder, text, mask('generation'))
  _, other = apply(encoder, text.at[:, 4].add(1), mask('generation'))
  np.testing.assert_array_equal(changed(states, other), np.arange(T) >= 4)


@pytest.mark.parametrize(
  ('kind', 'text_sees_entity'), [('unimodal', False), ('generation', True), ('multimodal', True)]
)
def test_who_sees_the_entity(model, kind, text_sees_entity):
  apply, encoder, text = model
  queries, states = apply(encoder, text, mask(kind))
  other_queries, other = apply(encoder + 1, text, mask(kind))
  assert changed(queries, other_queries).all()
  assert changed(states, other).all() == text_sees_entity
  assert changed(states, other).any() == text_sees_entity


@pytest.mark.parametrize('kind', ['unimodal', 'generation', 'multimodal'])
def test_padding_is_seen_by_nobody(model, kind):
  apply, encoder, text = model
  lengths = (T, 5, 2)
  queries, states = apply(encoder, text, mask(kind, lengths))
  padding = jnp.arange(T)[None] >= jnp.array(lengths)[:, None]
  other_queries, other = apply(encoder, jnp.where(padding, 0, text), mask(kind, lengths))
  np.testing.assert_allclose(queries, other_queries, atol=1e-6)
  keep = ~np.asarray(padding)
  np.testing.assert_allclose(np.asarray(states)[keep], np.asarray(other)[keep], atol=1e-6)


def test_unimodal_equals_two_separate_passes(model):
  apply, encoder, text = model
  queries, states = apply(encoder, text, mask('unimodal'))
  alone, nothing = apply(encoder, None, None)
  assert nothing is None
  np.testing.assert_allclose(queries, alone, atol=1e-5)
  nothing, alone = apply(None, text, None)
  assert nothing is None
  np.testing.assert_allclose(states, alone, atol=1e-5)


def test_every_parameter_has_logical_axes():
  shapes = jax.eval_shape(
    qformer.QFormer(CONFIG).init,
    jax.random.key(0),
    jnp.zeros((B, 1, CONFIG.d_encoder)),
    jnp.zeros((B, T), jnp.int32),
  )
  known = {'layers', 'queries', 'embed', 'vocab', 'length', 'heads', 'kv', 'mlp', 'cf'}
  boxes = jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
  for box in boxes:
    assert isinstance(box, nn.LogicallyPartitioned)
    assert len(box.names) == box.value.ndim
    assert set(box.names) <= known


def parameter_count(config):
  shapes = jax.eval_shape(
    qformer.QFormer(config).init,
    jax.random.key(0),
    jnp.zeros((1, 1, config.d_encoder)),
    jnp.zeros((1, 4), jnp.int32),
  )
  return sum(x.size for x in jax.tree.leaves(nn.meta.unbox(shapes)))


@pytest.mark.parametrize('size', sorted(qformer.SIZES))
def test_parameter_counts_by_hand(size):
  c = qformer.SIZES[size]
  d, norm = c.d_model, 2 * c.d_model
  attention = 4 * (d * d + d) + norm
  mlp = 2 * d * c.d_mlp + c.d_mlp + d + norm
  cross = 2 * (d * d + d) + 2 * (c.d_encoder * d + d) + norm
  embeddings = (c.vocab_size + c.max_text_length + c.num_queries) * d + norm
  layers = c.num_layers * (attention + 2 * mlp)
  assert parameter_count(c) == embeddings + layers + cross * c.num_layers // c.cross_attention_every


def test_blip2_has_the_published_size():
  """188 M parameters (Li et al. 2023, section 3.1), over a ViT-g of width 1408."""
  config = dataclasses.replace(qformer.SIZES['blip2'], d_encoder=1408)
  assert parameter_count(config) / 1e6 == pytest.approx(188, rel=0.02)


def test_wrong_sizes_are_refused():
  with pytest.raises(ValueError, match='num_layers=3 must be a multiple'):
    dataclasses.replace(CONFIG, num_layers=3)
  with pytest.raises(ValueError, match='num_heads=5'):
    dataclasses.replace(CONFIG, num_heads=5)
  with pytest.raises(ValueError, match="kind='causal'"):
    qformer.attention_mask('causal', 2, jnp.ones((1, 3)))

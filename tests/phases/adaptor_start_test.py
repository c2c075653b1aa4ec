"""An adaptor that begins at words: against closed forms, scikit-learn, and features by hand."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ilm_jax.modules.qformer import QFormerConfig
from ilm_jax.modules.soft_tokens import MlpConfig, SoftTokenConfig, SoftTokens
from ilm_jax.phases.adaptor_start import begin_at_words, mean_embeddings, ridge

K, D_CF, D, ITEMS = 2, 6, 20, 90
QFORMER = QFormerConfig(
  num_layers=2, d_model=16, num_heads=2, d_mlp=32, num_queries=K, d_encoder=D_CF
)
CONFIG = SoftTokenConfig(QFORMER, D, gain=0.5, skip=True, standardise=True)
RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(ITEMS, D_CF)).astype(np.float32)
WORDS = RNG.normal(size=(50, D)).astype(np.float32)
TEXTS = {i: [i % 7, 7 + i % 11] for i in range(ITEMS) if i % 3}


@pytest.fixture(scope='module')
def params():
  tokens = jnp.zeros((1, 1, D_CF))
  return nn.meta.unbox(jax.jit(SoftTokens(CONFIG).init)(jax.random.key(0), tokens)['params'])


@pytest.fixture(scope='module')
def begun(params):
  return begin_at_words(CONFIG, {**params, 'lm': 'kept'}, VECTORS, TEXTS, lambda ids: WORDS[ids])


def encode(params):
  own = {name: x for name, x in params.items() if name != 'lm'}
  return jax.jit(SoftTokens(CONFIG).apply)({'params': own}, VECTORS[:, None])


def test_mean_embeddings():
  found = mean_embeddings([[3], [4, 4, 1]], lambda ids: WORDS[ids])
  np.testing.assert_allclose(found, [WORDS[3], (2 * WORDS[4] + WORDS[1]) / 3], rtol=1e-6)


def test_the_regression_is_that_of_numpys_least_squares_with_rows_for_the_penalty():
  x, y = RNG.normal(size=(40, 5)) + 3, RNG.normal(size=(40, 4)) - 2
  found = ridge(x, y)
  x, y = x - x.mean(axis=0), y - y.mean(axis=0)
  penalty = 0.1 * x.var(axis=0).mean() * len(x)
  augmented = np.concatenate([x, np.sqrt(penalty) * np.eye(5)])
  kernel = np.linalg.lstsq(augmented, np.concatenate([y, np.zeros((5, 4))]), rcond=None)[0]
  np.testing.assert_allclose(found, kernel / np.sqrt(np.mean((x @ kernel) ** 2)), rtol=1e-4)


def test_features_are_standardised_over_the_catalogue(begun):
  vectors = np.asarray(encode(begun).vectors)  # the mean over K queries
  assert np.abs(vectors.mean(axis=0)).max() < 1e-4
  beside = vectors[:, 16:]  # CF vectors themselves, alike for all queries
  np.testing.assert_allclose(beside.std(axis=0), 1, rtol=1e-4)
  np.testing.assert_allclose(
    beside, (VECTORS - VECTORS.mean(axis=0)) / VECTORS.std(axis=0), atol=1e-4
  )


def test_soft_tokens_point_to_the_words_of_their_items(begun):
  """The mean over queries, before the LayerNorm, is the regression of the words of an item."""
  words = mean_embeddings(list(TEXTS.values()), lambda ids: WORDS[ids])
  found = encode(begun).vectors[np.array(list(TEXTS))]
  outputs = np.asarray(found) @ np.asarray(begun['adaptor']['kernel'])
  np.testing.assert_allclose(np.sqrt(np.mean((outputs - outputs.mean(axis=0)) ** 2)), 1, rtol=1e-3)
  of_own = np.sum(outputs * (words - words.mean(axis=0)))
  of_another = np.sum(outputs * np.roll(words - words.mean(axis=0), 5, axis=0))
  assert of_own > 2 * abs(of_another)


def test_the_rest_is_left_alone_and_no_other_text_is_read(params, begun):
  assert begun['lm'] == 'kept'
  assert begun.keys() == {*params, 'lm'}
  jax.tree.map(np.testing.assert_array_equal, begun['item_encoder'], params['item_encoder'])
  assert begun['adaptor'].keys() == {'kernel'}
  others = {i: [49, 48] for i in range(ITEMS) if i not in TEXTS}
  again = begin_at_words(CONFIG, params, VECTORS, TEXTS, lambda ids: WORDS[ids])
  changed = begin_at_words(CONFIG, params, VECTORS, TEXTS | others, lambda ids: WORDS[ids])
  np.testing.assert_array_equal(again['adaptor']['kernel'], begun['adaptor']['kernel'])
  assert np.abs(changed['adaptor']['kernel'] - begun['adaptor']['kernel']).max() > 1e-3


def test_constants_are_not_trained_and_what_is_common_is_a_vector_of_its_own(begun):
  own = {name: x for name, x in begun.items() if name != 'lm'}
  target = RNG.normal(size=(ITEMS, K, D)).astype(np.float32)

  def loss(params):
    encoded: Any = SoftTokens(CONFIG).apply({'params': params}, VECTORS[:, None])
    return jnp.mean((encoded.soft_tokens - target) ** 2)

  gradients = jax.jit(jax.grad(loss))(own)
  for name in ('feature_mean', 'feature_deviation'):
    assert not np.any(gradients[name])
  assert np.any(gradients['common'])
  assert np.any(gradients['item_encoder']['queries'])
  shift = np.ones((K, D), np.float32)
  moved = encode({**begun, 'common': shift}).soft_tokens - encode(begun).soft_tokens
  np.testing.assert_allclose(moved, np.broadcast_to(shift, moved.shape), rtol=1e-5)


def test_it_is_for_a_qformer():
  with pytest.raises(ValueError, match='standardise=True is for a Q-Former'):
    SoftTokenConfig(MlpConfig(1, D_CF), D, standardise=True)

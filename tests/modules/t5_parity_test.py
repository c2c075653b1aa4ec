"""T5's buckets and published sizes against transformers. Logits: t5_recipes_parity_test.py."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ilm_jax.modules.relative_bias import relative_buckets
from ilm_jax.modules.t5 import T5, T5_SIZES

pytestmark = pytest.mark.parity


@pytest.mark.parametrize('bidirectional', [False, True])
@pytest.mark.parametrize(('num_buckets', 'max_distance'), [(32, 128), (32, 256), (64, 512)])
def test_buckets(bidirectional, num_buckets, max_distance):
  import torch
  from transformers.models.t5.modeling_t5 import T5Attention

  distances = np.arange(-1100, 1101)
  expected = T5Attention._relative_position_bucket(
    torch.tensor(distances), bidirectional, num_buckets, max_distance
  ).numpy()
  got = relative_buckets(
    jnp.zeros((1, 1), int),
    jnp.asarray(distances)[None],
    bidirectional=bidirectional,
    num_buckets=num_buckets,
    max_distance=max_distance,
  )
  np.testing.assert_array_equal(got[0, 0], expected)


@pytest.mark.parametrize('size', T5_SIZES)
def test_published_sizes(size):
  import torch
  import transformers

  c = T5_SIZES[size]
  family = 'MT5' if size.startswith('mt5') else 'T5'
  config = getattr(transformers, f'{family}Config')(
    vocab_size=c.vocab_size,
    d_model=c.d_model,
    d_kv=c.head_dim,
    d_ff=c.d_mlp,
    num_layers=c.num_encoder_layers,
    num_heads=c.num_heads,
    feed_forward_proj='gated-gelu',
  )
  with torch.device('meta'):
    model = getattr(transformers, f'{family}ForConditionalGeneration')(config)
    head = torch.nn.Parameter(torch.empty(c.vocab_size, c.d_model))
  assert model.lm_head.weight is model.shared.weight  # transformers 5 ties what is published untied
  model.lm_head.weight = head
  init = functools.partial(T5(c).init, method='logits_of')
  tokens = jnp.ones((1, 2), jnp.int32)
  shapes = jax.eval_shape(init, jax.random.key(0), tokens, tokens)
  assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == model.num_parameters()

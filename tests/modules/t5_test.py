"""T5: what must not matter (packing, padding, a cache, scanned layers) and what must.

What T5 computes is compared with T5X's own numbers in tests/lm/t5x_source_test.py, and with
Hugging Face's in t5_recipes_parity_test.py.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ilm_jax.modules.attention import Cache
from ilm_jax.modules.layers import Compute
from ilm_jax.modules.t5 import T5, T5_SIZES, T5Config

BOTH = T5Config(
  num_encoder_layers=2, num_decoder_layers=2, d_model=16, num_heads=2, head_dim=6, d_mlp=24,
  vocab_size=40, relative_buckets=8, relative_max_distance=12,
)  # fmt: skip
ALONE = dataclasses.replace(BOTH, num_encoder_layers=0, tied_head=True)
OWN_BIAS = dataclasses.replace(BOTH, shared_relative_bias=False)


class Run(NamedTuple):
  """A model, and its methods compiled: run.decode(embeddings, encoded)."""

  lm: T5
  params: Any

  def __call__(self, *args, **kwargs):
    return _compiled(self.lm, '__call__')(self.params, *args, **kwargs)

  def __getattr__(self, method):
    return functools.partial(_compiled(self.lm, method), self.params)


@functools.cache
def _compiled(lm, method):
  run = jax.jit(
    lambda params, *args, **kw: lm.apply({'params': params}, *args, **kw, method=method)
  )
  # What is done with NumPy's arrays is not compiled.
  return lambda *args, **kwargs: jax.device_get(run(*args, **kwargs))


append = jax.jit(Cache.append)


@functools.cache
def run(config, compute=Compute()):
  """Random weights: the same ones however the layers are stacked."""
  lm, tokens = T5(config), jnp.ones((1, 2), jnp.int32)
  encoder_tokens = tokens if config.num_encoder_layers else None
  init = functools.partial(lm.init, method='logits_of')
  shapes = jax.eval_shape(init, jax.random.key(0), tokens, encoder_tokens)['params']
  rng = np.random.default_rng(0)
  params = {}
  for path, leaf in flax.traverse_util.flatten_dict(nn.meta.unbox(shapes), sep='/').items():
    fan_in = math.prod(leaf.shape[int('/layers/' in path) : -1]) if 'kernel' in path else 1
    params[path] = np.asarray(rng.normal(size=leaf.shape) / math.sqrt(fan_in), np.float32)
    if not compute.scan_layers and '/layers/' in path:
      for i, layer in enumerate(params.pop(path)):
        params[path.replace('layers', f'layers_{i}')] = layer
  return Run(T5(config, compute), flax.traverse_util.unflatten_dict(params, sep='/'))


def random_tokens(*shape, seed=0):
  return np.random.default_rng(seed).integers(1, BOTH.vocab_size, shape).astype(np.int32)


def assert_close(got, expected):
  np.testing.assert_allclose(got, expected, atol=2e-5)


# An encoder and what all layers share are in one of the others each.
@pytest.mark.parametrize('config', [pytest.param(BOTH, marks=pytest.mark.slow), OWN_BIAS, ALONE])
def test_scanned_layers_are_layers(config):
  encoder_tokens = random_tokens(2, 9, seed=1) if config.num_encoder_layers else None
  logits = [
    run(config, Compute(scan_layers=scan)).logits_of(random_tokens(2, 7), encoder_tokens)
    for scan in (True, False)
  ]
  assert logits[0].dtype == jnp.float32
  assert np.std(logits[0]) > 0.1
  assert_close(*logits)


def test_rematerialised_gradients_are_the_gradients():
  def gradients(compute):
    lm, params = run(dataclasses.replace(ALONE, shared_relative_bias=False), compute)

    def loss(p):
      return (lm.apply({'params': p}, random_tokens(2, 7), method='logits_of') ** 2).mean()

    return jax.jit(jax.grad(loss))(params)

  saved, again = gradients(Compute()), gradients(Compute(remat='full'))
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(saved))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), again, saved)


def packed(*rows):
  """Rows in one, with three places of padding: tokens, positions, segment ids, [1, T]."""
  tokens = np.concatenate([*rows, np.full(3, 7)])
  positions = np.concatenate([*(np.arange(len(row)) for row in rows), np.arange(3)])
  segment_ids = [np.full(len(row), i + 1) for i, row in enumerate(rows)]
  return tokens[None], positions[None], np.concatenate([*segment_ids, np.zeros(3, int)])[None]


def padded(row):
  """[1, 16] tokens and segment ids: one shape, compiled once."""
  there = np.arange(16) < len(row)
  return np.pad(row, (0, 16 - len(row)))[None], there.astype(int)[None]


def test_packed_rows_are_as_if_alone():
  lm = run(BOTH)
  inputs = [random_tokens(n, seed=n) for n in (13, 4)]
  targets = [random_tokens(n, seed=n) for n in (5, 14)]
  tokens, positions, segment_ids = packed(*inputs)
  encoded = lm.encode(lm.embed_tokens(tokens), positions, segment_ids)
  tokens, positions, target_ids = packed(*targets)
  hidden, _ = lm.decode(
    lm.embed_tokens(tokens),
    encoded,
    positions=positions,
    segment_ids=target_ids,
    encoder_segment_ids=segment_ids,
  )
  for start, row, target in zip([0, 5], inputs, targets):
    (tokens, there), (row, row_there) = padded(target), padded(row)
    alone = lm.logits_of(tokens, row, segment_ids=there, encoder_segment_ids=row_there)
    assert_close(lm.logits(hidden)[0, start : start + len(target)], alone[0, : len(target)])


def test_packed_rows_of_a_decoder_with_prefixes_are_as_if_alone():
  lm = run(ALONE)
  rows = [random_tokens(n, seed=n) for n in (6, 15)]
  prefixes = [np.arange(len(row)) < 4 for row in rows]
  tokens, positions, segment_ids = packed(*rows)
  prefix_mask = np.concatenate([*prefixes, np.zeros(3, bool)])[None]
  hidden, _ = lm(lm.embed_tokens(tokens), positions, segment_ids, prefix_mask=prefix_mask)
  hidden = hidden[0]
  for start, row in zip([0, 6], rows):
    tokens, there = padded(row)
    embeddings = lm.embed_tokens(tokens)
    alone, plain = (
      lm(embeddings, segment_ids=there, prefix_mask=(np.arange(16) < n)[None])[0][0, : len(row)]
      for n in (4, 0)
    )
    assert_close(hidden[start : start + len(row)], alone)
    assert np.abs(alone - plain).max() > 0.01  # the prefix does something


def test_what_stands_in_padding_does_not_matter():
  lm, lengths = run(BOTH), np.array([8, 3])
  there = np.asarray(np.arange(8) < lengths[:, None], np.int32)
  inputs, targets = random_tokens(2, 8, seed=1), random_tokens(2, 8, seed=2)
  kwargs = dict(segment_ids=there, encoder_segment_ids=there)
  logits = lm.logits_of(targets, inputs, **kwargs)
  other = lm.logits_of(np.where(there == 1, targets, 5), np.where(there == 1, inputs, 6), **kwargs)
  assert_close(logits[there == 1], other[there == 1])
  assert_close(logits[1, :3], lm.logits_of(targets[1:, :3], inputs[1:, :3])[0])


# (Texts of both with and without scanned layers are generated in sampling_test.py.)
SCAN = [True, pytest.param(False, marks=pytest.mark.slow)]


@pytest.mark.parametrize('scan', SCAN)
def test_a_cache_changes_nothing(scan):
  """Prompts of 6 and 4 tokens, then token by token."""
  lm = run(ALONE, Compute(scan_layers=scan))
  tokens, lengths = random_tokens(2, 12), np.array([6, 4])
  expected = lm.logits_of(tokens)
  there = np.asarray(np.arange(6) < lengths[:, None], np.int32)
  positions = np.broadcast_to(np.arange(6), (2, 6))
  hidden, new = lm(lm.embed_tokens(tokens[:, :6]), positions, there)
  cache = append(lm.lm.init_cache(2, 12), new)
  for row, n in enumerate(lengths):
    assert_close(lm.logits(hidden)[row, :n], expected[row][:n])
  for step in range(4):
    at = np.asarray(lengths + step)[:, None]
    token = np.take_along_axis(tokens, at, axis=1)
    hidden, new = lm(lm.embed_tokens(token), at, cache=cache)
    cache = append(cache, new)
    for row, n in enumerate(lengths + step):
      assert_close(lm.logits(hidden)[row, 0], expected[row][n])


@pytest.mark.parametrize('scan', SCAN)
def test_decoding_with_caches_changes_nothing(scan):
  lm = run(OWN_BIAS, Compute(scan_layers=scan))
  inputs, targets = random_tokens(2, 9, seed=1), random_tokens(2, 7, seed=2)
  there = np.asarray(np.arange(9) < np.array([[9], [5]]), np.int32)
  expected = lm.logits_of(targets, inputs, encoder_segment_ids=there)
  encoded = lm.encode(lm.embed_tokens(inputs), segment_ids=there)
  source, cache = lm.cross_cache(encoded), lm.lm.init_cache(2, 8)
  for step in range(7):
    at = np.full((2, 1), step)
    hidden, new = lm.decode(
      lm.embed_tokens(targets[:, step : step + 1]),
      source,
      positions=at,
      encoder_segment_ids=there,
      cache=cache,
    )
    cache = append(cache, new)
    assert_close(lm.logits(hidden)[:, 0], expected[:, step])


def test_many_rows_share_an_encoded_text_and_a_beginning():
  """As continuations of one prompt do: everything cached has one row."""
  lm = run(BOTH)
  text, beginning = random_tokens(1, 9, seed=1), random_tokens(1, 3, seed=2)
  ends = random_tokens(4, 2, seed=3)
  rows = np.concatenate([np.repeat(beginning, 4, 0), ends], axis=1)
  expected = lm.logits_of(rows, np.repeat(text, 4, 0))[:, 3:]
  encoded = lm.encode(lm.embed_tokens(text))
  _, new = lm.decode(lm.embed_tokens(beginning), encoded)
  cache = append(lm.lm.init_cache(1, 3), new)
  positions = np.broadcast_to(np.arange(3, 5), (4, 2))
  source = lm.cross_cache(encoded)
  hidden, _ = lm.decode(lm.embed_tokens(ends), source, positions=positions, cache=cache)
  assert_close(lm.logits(hidden), expected)
  # All continuations in one row: [0, a, a', b, b', ...] with a mask in place of segments.
  same = np.arange(8) // 2 == (np.arange(8) // 2)[:, None]
  mask = (same & (np.arange(8) <= np.arange(8)[:, None]))[None]
  hidden, _ = lm.decode(
    lm.embed_tokens(ends.reshape(1, 8)),
    encoded,
    positions=positions.reshape(1, 8),
    mask=mask,
    cache=cache,
  )
  assert_close(lm.logits(hidden).reshape(expected.shape), expected)


def test_logits_at_places():
  lm = run(ALONE)
  hidden, _ = lm(lm.embed_tokens(random_tokens(2, 5)))
  at = np.array([[1, 4], [0, 2]])
  expected = np.stack([lm.logits(hidden)[i, at[i]] for i in range(2)])
  assert_close(lm.logits_at(hidden, at), expected)


# Published: transformers' num_parameters() of google/t5-v1_1-*, google/flan-t5-*, google/mt5-*.
@pytest.mark.parametrize(
  ('size', 'parameters'),
  [
    ('t5_1_1_small', 76_961_152),
    ('t5_1_1_base', 247_577_856),
    ('t5_1_1_large', 783_150_080),
    ('t5_1_1_xl', 2_849_757_184),
    ('t5_1_1_xxl', 11_135_332_352),
    ('flan_t5_base', 247_577_856),
    ('mt5_small', 300_176_768),
    ('mt5_base', 582_401_280),
    ('mt5_large', 1_229_581_312),
    ('mt5_xl', 3_742_619_648),
    ('mt5_xxl', 12_921_057_280),
  ],
)
def test_published_sizes(size, parameters):
  lm, tokens = T5(T5_SIZES[size]), jnp.ones((1, 2), jnp.int32)
  init = functools.partial(lm.init, method='logits_of')
  shapes = jax.eval_shape(init, jax.random.key(0), tokens, tokens)
  assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == parameters


@pytest.mark.parametrize('param_dtype', [jnp.bfloat16, jnp.int8])
def test_logits_are_float32_whatever_the_model_is(param_dtype):
  lm = T5(BOTH, Compute(dtype=jnp.bfloat16, param_dtype=param_dtype))
  init = functools.partial(lm.init_with_output, method='logits_of')
  tokens = jnp.ones((1, 2), jnp.int32)
  logits, variables = jax.eval_shape(init, jax.random.key(0), tokens, tokens)
  assert logits.dtype == jnp.float32
  params = variables['params']
  assert params['decoder']['layers']['cross_attention']['key']['kernel'].value.dtype == param_dtype
  assert params['decoder']['relative_bias']['embedding'].value.dtype == jnp.float32


def test_what_a_t5_cannot_do_it_says():
  embeddings = jnp.ones((1, 2, 16))
  with pytest.raises(ValueError, match=r'num_encoder_layers=0: this T5 runs by __call__\(\)'):
    run(ALONE).encode(embeddings)
  with pytest.raises(ValueError, match=r'num_encoder_layers=2: this T5 runs by encode\(\) and dec'):
    run(BOTH)(embeddings)
  with pytest.raises(ValueError, match="attention='splash' knows no relative position bias"):
    T5(BOTH, Compute(attention='splash')).init(jax.random.key(0), embeddings)
  with pytest.raises(ValueError, match='relative_buckets=30 must be a multiple of 4'):
    dataclasses.replace(BOTH, relative_buckets=30)
  with pytest.raises(ValueError, match="activation='glu': one of"):
    dataclasses.replace(BOTH, activation='glu')

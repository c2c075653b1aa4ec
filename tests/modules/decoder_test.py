"""The decoder against stored logits of transformers, and against NumPy in float64.

`tests/golden/gemma` has a tiny Gemma 2 and 3 with their logits; `numpy_decoder` computes the same
from the same tensors, and so says what is right for packed rows, prefixes, trees and gradients.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ilm_jax.lm import huggingface
from ilm_jax.lm.assemble import assemble
from ilm_jax.modules.attention import Cache
from ilm_jax.modules.decoder import Decoder, DecoderConfig, LayerByLayer, RopeScaling
from ilm_jax.modules.layers import Compute
from tests.support import numpy_decoder, tiny_gemma

UNSCANNED = Compute(scan_layers=False)
FAMILIES = ('gemma2', 'gemma3')
T = 20

_LLAMA = DecoderConfig(
  num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=8, d_mlp=24, vocab_size=50,
)  # fmt: skip
# What the stored models do not have.
OTHERS = {
  'llama3': dataclasses.replace(
    _LLAMA, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16), rope_base=500.0, norm_epsilon=1e-5
  ),
  'qwen2': dataclasses.replace(_LLAMA, qkv_bias=True, tied_head=False),
  'qwen3': dataclasses.replace(_LLAMA, qk_norm=True, head_dim=6),
  'gemma': dataclasses.replace(
    _LLAMA, activation='gelu', scale_embeddings=True, num_kv_heads=1, query_scale=0.3
  ),
  'gemma3_4b': dataclasses.replace(
    tiny_gemma.CONFIGS['gemma3'], num_layers=3, rope_divisor=8.0, window=4
  ),
}


def load(c, tensors, compute=Compute()):
  lm = Decoder(c, compute)
  source = tiny_gemma.Tensors(tensors)
  recipe, dropped = huggingface.decoder_recipe(c, source.shapes)
  params, _ = assemble(source, recipe, tiny_gemma.abstract(lm), dropped=dropped)
  return lm, {'params': params}


@functools.cache
def jitted(family, compute):
  lm, variables = tiny_gemma.load(family, compute)

  def run(variables, ids, positions, segment_ids, cache, more):
    embeddings = lm.apply(variables, ids, method='embed_tokens')
    hidden, new = lm.apply(variables, embeddings, positions, segment_ids, cache=cache, **more)
    return lm.apply(variables, hidden, method='logits'), new

  # Weights that are constants of a program are compiled with it.
  return functools.partial(tiny_gemma.jit(run), variables)


def run(family, ids, positions=None, segment_ids=None, *, cache=None, compute=Compute(), **more):
  """Logits of a stored model, and the tokens for a cache."""
  logits, new = jitted(family, compute)(ids, positions, segment_ids, cache, more)
  return np.asarray(logits), new


append = tiny_gemma.jit(Cache.append)


def empty_cache(family, compute, rows, capacity):
  return Decoder(tiny_gemma.CONFIGS[family], compute).init_cache(rows, capacity)


def oracle(family, embeddings, positions, sees):
  tensors, _, _ = tiny_gemma.golden(family)
  return numpy_decoder.logits(tensors, tiny_gemma.CONFIGS[family], embeddings, positions, sees)


def oracle_of(family, tokens, positions, sees):
  tensors, _, _ = tiny_gemma.golden(family)
  embeddings = numpy_decoder.embed(tensors, tiny_gemma.CONFIGS[family], tokens)
  return oracle(family, embeddings, positions, sees)


def close(a, b, atol=1e-4):
  np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize('compute', [Compute(), UNSCANNED], ids=['scanned', 'unscanned'])
@pytest.mark.parametrize('family', FAMILIES)
def test_logits_are_those_of_transformers(family, compute):
  _, ids, expected = tiny_gemma.golden(family)
  close(run(family, ids, compute=compute)[0], expected)


@pytest.mark.parametrize('family', FAMILIES)
def test_so_are_those_of_the_oracle(family):
  _, ids, expected = tiny_gemma.golden(family)
  positions = np.tile(np.arange(T), (2, 1))
  close(oracle_of(family, ids, positions, np.tri(T, dtype=bool)[None].repeat(2, 0)), expected, 1e-5)


@pytest.mark.parametrize('family', OTHERS)
def test_other_families(family):
  c = OTHERS[family]
  tensors = numpy_decoder.random_tensors(c)
  lm, variables = load(c, tensors)
  ids = np.random.default_rng(1).integers(0, 50, (2, 9))
  positions = np.array([[*range(9)], [*range(5), *range(4)]])
  segment_ids = np.array([[1] * 9, [1] * 5 + [2] * 4])
  apply = tiny_gemma.jit(functools.partial(lm.apply, method='logits_of'))
  sees = numpy_decoder.who_sees_whom(positions, segment_ids)
  embeddings = numpy_decoder.embed(tensors, c, ids)
  expected = numpy_decoder.logits(tensors, c, embeddings, positions, sees)
  close(apply(variables, ids, positions, segment_ids), expected)


# Two texts and padding, with a prefix that reaches over the end of the first; and one short text.
POSITIONS = np.array([[*range(11), *range(6), 0, 0, 0], [*range(13), *[0] * 7]])
SEGMENT_IDS = np.array([[1] * 11 + [2] * 6 + [0] * 3, [1] * 13 + [0] * 7])
PREFIX = np.array([[1] * 10 + [0] + [1] * 3 + [0] * 6, [0] * 2 + [1] * 4 + [0] * 14])


@pytest.mark.parametrize(
  ('family', 'prefix'),
  [('gemma2', None), ('gemma2', PREFIX), ('gemma3', PREFIX)],
  ids=['gemma2', 'gemma2, prefix', 'gemma3, prefix'],
)
def test_packed_rows_and_prefixes(family, prefix):
  _, ids, _ = tiny_gemma.golden(family)
  sees = numpy_decoder.who_sees_whom(POSITIONS, SEGMENT_IDS, prefix)
  more = {} if prefix is None else {'prefix_mask': prefix}
  got, _ = run(family, ids, POSITIONS, SEGMENT_IDS, **more)
  there = SEGMENT_IDS > 0
  close(got[there], oracle_of(family, ids, POSITIONS, sees)[there])


def test_packed_rows_are_separate_rows():
  _, ids, expected = tiny_gemma.golden('gemma3')
  row = np.concatenate([ids[0, :12], ids[1, :8]])[None]
  positions = np.array([[*range(12), *range(8)]])
  packed, _ = run('gemma3', row, positions, np.array([[5] * 12 + [3] * 8]))
  close(packed[0, :12], expected[0, :12])
  close(packed[0, 12:], expected[1, :8])


def feed(family, compute, pieces):
  """Feeds pieces (ids, positions, segment_ids) one after the other; logits of each."""
  cache, outputs = empty_cache(family, compute, 2, T + 4), []
  for piece in pieces:
    logits, new = run(family, *piece, cache=cache, compute=compute)
    cache = append(cache, new)
    outputs.append(logits)
  return outputs


# The window is 8, so that the prompts of 13 are longer.
@pytest.mark.parametrize(
  ('family', 'compute', 'pieces'),
  [
    ('gemma2', Compute(), [13, *[1] * 7]),
    ('gemma3', UNSCANNED, [13, *[1] * 7]),
    ('gemma2', Compute(), [6, 7, *[1] * 7]),
  ],
  ids=['scanned', 'unscanned', 'in two pieces'],
)
def test_cached_tokens_are_seen_as_if_they_were_there(family, compute, pieces):
  _, ids, expected = tiny_gemma.golden(family)
  ends = np.cumsum(pieces)
  outputs = feed(
    family,
    compute,
    [
      (ids[:, e - n : e], np.tile(np.arange(e - n, e), (2, 1)), np.ones((2, n), int))
      for n, e in zip(pieces, ends)
    ],
  )
  close(np.concatenate(outputs, axis=1), expected)


def test_rows_of_different_length_in_a_cache():
  _, ids, expected = tiny_gemma.golden('gemma2')
  lengths = np.array([13, 9])
  positions = np.tile(np.arange(13), (2, 1))
  pieces = [(ids[:, :13], positions, (positions < lengths[:, None]).astype(int))]
  for step in range(7):
    at = (lengths + step)[:, None]
    pieces.append((np.take_along_axis(ids, at, 1), at, np.ones((2, 1), int)))
  outputs = feed('gemma2', Compute(), pieces)
  for step, got in enumerate(outputs[1:]):
    close(got[:, 0], expected[np.arange(2), lengths + step])


@pytest.mark.parametrize(('family', 'compute'), [('gemma2', UNSCANNED), ('gemma3', Compute())])
def test_a_beginning_that_all_rows_share(family, compute):
  _, ids, _ = tiny_gemma.golden(family)
  beginning, ends = ids[:1, :13], np.stack([ids[0, 13:], ids[1, 13:], ids[1, :7]])
  rows = np.concatenate([beginning.repeat(3, 0), ends], axis=1)
  whole = np.tile(np.arange(T), (3, 1))
  sees = np.tri(T, dtype=bool)[None].repeat(3, 0)
  expected = oracle_of(family, rows, whole, sees)[:, 13:]
  one_row = append(empty_cache(family, compute, 1, 13), run(family, beginning, compute=compute)[1])
  positions = np.tile(np.arange(13, T), (3, 1))
  for cache in (one_row, one_row.repeat(3)):
    close(run(family, ends, positions, cache=cache, compute=compute)[0], expected)


# A prompt, and a tree after it: a token with two continuations, of two tokens and of one.
#   0 1 ... 9  10 -> 11 -> 12
#                 -> 13
TREE = np.array([10, 11, 12, 11])
BRANCHES = ([0, 1, 2], [0, 3])
TREE_SEES = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]], bool)


def branches_alone(family, ids):
  """For each branch, its tokens in the tree and their logits after the prompt."""
  for branch in BRANCHES:
    row = np.concatenate([ids[0, :10], ids[0, 10:14][branch]])[None]
    positions, sees = np.arange(row.size)[None], np.tri(row.size, dtype=bool)[None]
    yield branch, oracle_of(family, row, positions, sees)[0, 10:]


def test_a_tree_of_continuations():
  _, ids, _ = tiny_gemma.golden('gemma2')
  sees = np.tri(14, dtype=bool)
  sees[10:, 10:] = TREE_SEES
  positions = np.concatenate([np.arange(10), TREE])[None]
  tree = run('gemma2', ids[:1, :14], positions, mask=sees[None])[0][0, 10:]
  for branch, expected in branches_alone('gemma2', ids):
    close(tree[branch], expected)


def test_a_tree_behind_a_cache():
  """The tree of many rows is one; the prompt is in a cache, some of it beyond the window."""
  _, ids, _ = tiny_gemma.golden('gemma3')
  empty = empty_cache('gemma3', Compute(), 1, 10)
  prompt = append(empty, run('gemma3', ids[:1, :10])[1])
  tokens, positions = ids[:1, 10:14].repeat(2, 0), TREE[None].repeat(2, 0)
  tree, _ = run('gemma3', tokens, positions, mask=TREE_SEES[None], cache=prompt)
  for branch, expected in branches_alone('gemma3', ids):
    close(tree[0, branch], expected)
    close(tree[1, branch], expected)


def test_logits_at_chosen_places():
  lm, variables = tiny_gemma.load('gemma2')
  hidden = np.random.default_rng(4).normal(size=(2, T, 32)).astype(np.float32)
  at = np.array([[3, 19], [0, 0]])

  @tiny_gemma.jit
  def both(variables):
    apply = functools.partial(lm.apply, variables, hidden)
    return apply(method='logits'), apply(at, method='logits_at')

  everywhere, got = both(variables)
  close(got, np.asarray(everywhere)[np.arange(2)[:, None], at], 1e-5)


WEIGHTS = np.random.default_rng(2).normal(size=(2, T, 512)) / 100


@functools.cache
def gradient(family, compute):
  """Of a loss of all logits with respect to the embeddings, where soft tokens stand."""
  lm, variables = tiny_gemma.load(family, compute)

  def loss(embeddings, variables):
    hidden, _ = lm.apply(variables, embeddings, POSITIONS, SEGMENT_IDS)
    return jnp.sum(lm.apply(variables, hidden, method='logits') * WEIGHTS)

  tensors, ids, _ = tiny_gemma.golden(family)
  embeddings = numpy_decoder.embed(tensors, lm.config, ids).astype(np.float32)
  return np.asarray(tiny_gemma.jit(jax.grad(loss))(embeddings, variables))


@pytest.mark.parametrize('family', FAMILIES)
def test_gradients_are_finite_differences_of_the_oracle(family):
  tensors, ids, _ = tiny_gemma.golden(family)
  embeddings = numpy_decoder.embed(tensors, tiny_gemma.CONFIGS[family], ids)
  sees = numpy_decoder.who_sees_whom(POSITIONS, SEGMENT_IDS)
  rng, got = np.random.default_rng(3), gradient(family, Compute())
  for _ in range(3):
    direction = rng.normal(size=embeddings.shape)
    up, down = (
      np.sum(oracle(family, embeddings + step * direction, POSITIONS, sees) * WEIGHTS)
      for step in (1e-4, -1e-4)
    )
    assert np.sum(got * direction) == pytest.approx((up - down) / 2e-4, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(
  'changes',
  [
    # It is the same call as of 'dots', with another policy.
    pytest.param({'remat': 'full'}, marks=pytest.mark.slow),
    {'remat': 'dots'},
    {'scan_layers': False},
  ],
  ids=str,
)
def test_gradients_are_the_same_however_they_are_computed(changes):
  compute = dataclasses.replace(Compute(), **changes)
  close(gradient('gemma2', compute), gradient('gemma2', Compute()), 1e-5)


@pytest.mark.parametrize(
  'compute',
  [Compute(bf16_matmul=True), Compute(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)],
  ids=['bf16_matmul', 'bfloat16'],
)
def test_less_precise_is_close(compute):
  """Eight bits are about three digits; the logits are around 1."""
  _, ids, expected = tiny_gemma.golden('gemma2')
  logits, _ = run('gemma2', ids, compute=compute)
  assert logits.dtype == np.float32
  error = np.abs(logits - expected).max() / expected.std()
  assert 1e-4 < error < 0.1


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'num_heads': 3}, 'num_heads=3 must be a multiple of num_kv_heads=2'),
    ({'head_dim': 7}, 'head_dim=7 must be even'),
    ({'activation': 'tanh'}, r"activation='tanh': one of \['gelu', 'relu', 'silu'\]"),
    ({'window': None}, 'global_every=2, but no window'),
  ],
)
def test_a_wrong_configuration_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(tiny_gemma.CONFIGS['gemma2'], **changes)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'remat': 'some'}, r"remat='some': 'none' or one of \['dots', 'full'\]"),
    ({'attention': 'flash'}, r"attention='flash': one of"),
    ({'param_dtype': 'int4'}, r"param_dtype='int4': one of|int4"),
  ],
)
def test_a_wrong_way_to_compute_is_refused(changes, message):
  with pytest.raises((ValueError, TypeError), match=message):
    Compute(**changes)


def test_layer_by_layer_is_the_same():
  """With local layers, after a cache and without."""
  lm, variables = tiny_gemma.load('gemma3', UNSCANNED)
  run, layers = functools.partial(tiny_gemma.jit(lm.apply), variables), LayerByLayer(lm)
  rng = np.random.default_rng(0)
  first, second = (rng.normal(size=(2, n, lm.config.d_model)).astype(np.float32) for n in (9, 4))
  cache = None
  for embeddings, start in ((first, 0), (second, 9)):
    positions = np.tile(start + np.arange(embeddings.shape[1]), (2, 1))
    segment_ids = np.ones_like(positions)
    whole, new = run(embeddings, positions, segment_ids, cache=cache)
    found, own = layers(variables['params'], embeddings, positions, segment_ids, cache=cache)
    np.testing.assert_allclose(found, whole, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), own, new)
    cache = append(lm.init_cache(2, 9), new)

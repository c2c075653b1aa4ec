"""Who sees whom; attention against NumPy in float64; and what a cache holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from ilm_jax.modules.attention import (
  UNWRITTEN,
  Cache,
  KeyValue,
  NewTokens,
  Tokens,
  attend,
  cudnn_serves,
  init_cache,
  tokens_at,
  visible,
  within,
)

RNG = np.random.default_rng(0)


def normal(*shape):
  return RNG.normal(size=shape).astype(np.float32)


def by_hand(query, new, cached, mask, scale, softcap, bias):
  """One head of one row after the other."""
  out = np.zeros(query.shape)
  group = query.shape[1] // new.key.shape[1]
  for b, h in np.ndindex(*query.shape[:2]):
    parts = [] if cached is None else [KeyValue(*(x[b % len(x)] for x in cached))]
    parts.append(KeyValue(*(x[b] for x in new)))
    key, value = (np.concatenate([part[i][h // group] for part in parts]) for i in range(2))
    scores = query[b, h].astype(np.float64) @ key.T * scale
    if softcap is not None:
      scores = softcap * np.tanh(scores / softcap)
    if bias is not None:
      scores = scores + bias[b % len(bias), h]
    scores = np.where(mask[b % len(mask)], scores, -np.inf)
    out[b, h] = scipy.special.softmax(scores, axis=-1) @ value
  return out


@pytest.mark.parametrize('rows', [1, 3])
@pytest.mark.parametrize('length', [1, 6])  # of a few rows, and of many, products go differently
@pytest.mark.parametrize('cached_rows', [None, 1, 3])
@pytest.mark.parametrize(('softcap', 'has_bias'), [(None, False), (2.0, True)])
def test_attention(rows, length, cached_rows, softcap, has_bias):
  if (cached_rows or 0) > rows:
    cached_rows = rows
  places = 0 if cached_rows is None else 7
  query = normal(rows, 4, length, 8)
  new = KeyValue(normal(rows, 2, length, 8), normal(rows, 2, length, 8))
  cached = None
  if cached_rows is not None:
    cached = KeyValue(normal(cached_rows, 2, places, 8), normal(cached_rows, 2, places, 8))
  mask = RNG.random((rows, length, places + length)) < 0.6
  mask[..., -length:] |= np.eye(length, dtype=bool)  # everyone sees itself
  bias = normal(1, 4, length, places + length) if has_bias else None
  options = dict(scale=0.3, softcap=softcap, bias=bias)
  got = jax.jit(lambda *args: attend(*args, **options))(query, new, cached, mask)
  np.testing.assert_allclose(got, by_hand(query, new, cached, mask, **options), atol=1e-5)


@pytest.mark.parametrize('stacked', [True, False])
def test_a_cache_is_written_where_it_ends(stacked):
  def new(batch, length, begin):
    shape = (batch, 2, length, 4)
    layers = [KeyValue(normal(*shape), normal(*shape)) for _ in range(3)]
    if stacked:
      layers = jax.tree.map(lambda *x: np.stack(x), *layers)
    positions = np.broadcast_to(np.arange(begin, begin + length), (batch, length))
    return NewTokens(layers, positions.astype(np.int32), np.ones((batch, length), np.int32))

  def check(cache: Cache, parts, capacity):
    length = sum(part.positions.shape[1] for part in parts)
    assert (cache.capacity, int(cache.length)) == (capacity, length)
    for name, axis in (('layers', -2), ('positions', 1), ('segment_ids', 1)):
      leaves = [jax.tree.leaves(getattr(x, name)) for x in (cache, *parts)]
      for whole, *written in zip(*leaves):
        whole = np.moveaxis(whole, axis, 0)
        assert (whole[:length] == np.moveaxis(np.concatenate(written, axis), axis, 0)).all()
        assert (whole[length:] == (UNWRITTEN if name == 'positions' else 0)).all()

  first, second, third = new(1, 3, 0), new(2, 2, 3), new(2, 1, 5)
  shared = init_cache(3, 1, 4, 2, 4, dtype=jnp.float32, stacked=stacked).append(first)
  check(shared, [first], 4)
  cache = shared.repeat(2).extended(3).append(second)
  repeated = jax.tree.map(lambda x: np.repeat(x, 2, max(0, x.ndim - 4)), first)
  check(cache, [repeated, second], 7)
  check(cache.append(third, after=jnp.array([4, 0])), [repeated, second, third], 7)


def table(text):
  """'1 . 1' -> [True, False, True], line by line."""
  return np.array([[cell == '1' for cell in line.split()] for line in text.split('\n') if line])


def tokens(positions, segment_ids):
  return Tokens(np.array([positions]), np.array([segment_ids]))


PACKED = tokens([0, 1, 2, 3, 0, 1, 0], [1, 1, 1, 1, 2, 2, 0])  # of the docstring of `visible`


def test_who_sees_whom_is_as_documented():
  lines = [line.split() for line in (visible.__doc__ or '').splitlines()]
  rows = [[cell for cell in line if cell in ('1', '.')][-7:] for line in lines if '.' in line]
  documented = table('\n'.join(' '.join(row) for row in rows if len(row) == 7))
  expected = table("""
1 . . . . . .
1 1 . . . . .
1 1 1 . . . .
1 1 1 1 . . .
. . . . 1 . .
. . . . 1 1 .
. . . . . . 1""")
  np.testing.assert_array_equal(visible(PACKED, PACKED)[0], expected)
  np.testing.assert_array_equal(documented, expected)


def test_a_prefix_sees_both_ways_in_its_segment():
  got = visible(PACKED, PACKED, prefix_mask=jnp.array([[0, 1, 1, 0, 1, 1, 0]]))
  expected = table("""
1 . . . . . .
1 1 1 . . . .
1 1 1 . . . .
1 1 1 1 . . .
. . . . 1 1 .
. . . . 1 1 .
. . . . . . 1""")
  np.testing.assert_array_equal(got[0], expected)


def test_without_causality_all_of_a_segment_is_seen():
  keys = tokens([0, 1, 5, UNWRITTEN], [1, 1, 2, 1])
  got = visible(tokens([7, 0], [1, 2]), keys, causal=False)
  np.testing.assert_array_equal(got[0], table('1 1 . .\n. . 1 .'))


def test_nobody_sees_what_is_not_written():
  keys = tokens([0, 1, UNWRITTEN], [1, 1, 1])
  np.testing.assert_array_equal(visible(tokens([9], [1]), keys)[0], table('1 1 .'))


def test_one_row_of_keys_for_many_of_queries():
  queries = Tokens(np.array([[0, 1], [1, 2]]), np.ones((2, 2), int))
  keys = tokens([0, 1], [1, 1])
  np.testing.assert_array_equal(visible(queries, keys), [table('1 .\n1 1'), table('1 1\n1 1')])


def test_a_window_has_the_token_itself_and_those_before():
  queries = tokens_at(1, 6, None, None)
  expected = table("""
1 . . . . .
1 1 . . . .
1 1 1 . . .
. 1 1 1 . .
. . 1 1 1 .
. . . 1 1 1""")
  got = within(queries, queries, 3) & visible(queries, queries)
  np.testing.assert_array_equal(got[0], expected)


# ---------------------------------------------------------------- cuDNN


@pytest.mark.parametrize(
  ('dtype', 'width', 'lengths', 'capability', 'expected'),
  [
    ('bfloat16', 128, (64, 64), 8.0, True),
    ('bfloat16', 256, (64, 64), 9.0, True),
    ('float16', 64, (2, 64), 12.0, True),
    ('bfloat16', 256, (64, 64), 8.9, False),
    ('bfloat16', 128, (64, 64), 7.5, False),
    ('bfloat16', 128, (64, 64), 0.0, False),
    ('float32', 128, (64, 64), 9.0, False),
    ('bfloat16', 60, (64, 64), 9.0, False),
    ('bfloat16', 128, (63, 64), 9.0, False),
    ('bfloat16', 128, (64, 63), 9.0, False),
  ],
)
def test_where_cudnn_serves(dtype, width, lengths, capability, expected):
  query, key = (jax.ShapeDtypeStruct((2, 4, length, width), dtype) for length in lengths)
  assert cudnn_serves(query, key, capability) == expected


def test_without_an_nvidia_gpu_cudnn_serves_nowhere():
  query = normal(2, 2, 4, 8).astype(jnp.bfloat16)
  new, mask = KeyValue(query, query), np.tri(4, dtype=bool)[None]
  expected = attend(query, new, None, mask)
  np.testing.assert_array_equal(attend(query, new, None, mask, implementation='cudnn'), expected)

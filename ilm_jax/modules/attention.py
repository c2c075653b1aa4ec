"""Attention of the language models: who sees whom, and keys and values kept for later tokens.

What a token sees follows from positions and segment ids alone, in a cache too, where they are kept
beside the keys: rows of different length, packed rows and prompts with a shared beginning need
nothing else.

Letters: B batch, T new tokens, S places of a cache, L layers, H heads, N key-value heads,
G = H / N, C head width.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ilm_jax.modules.backward import softmax

UNWRITTEN = jnp.iinfo(jnp.int32).max  # position of a place in a cache that holds no token
SHARED = -1  # segment id of cached tokens that all segments see: the beginning of every prompt
_MASKED = -1e30
_FEW_ROWS = 8  # of queries, as when one token is decoded after the other


class KeyValue(NamedTuple):
  """Keys and values of one layer, heads first: [B, N, T, C] each. Stacked: [L, B, N, T, C]."""

  key: jax.Array
  value: jax.Array


class Tokens(NamedTuple):
  """Where tokens stand: `positions` and `segment_ids`, [B, T] int32."""

  positions: jax.Array
  segment_ids: jax.Array


class NewTokens(NamedTuple):
  """Keys and values of tokens that went through the layers, for `Cache.append`."""

  layers: Any
  positions: jax.Array
  segment_ids: jax.Array


class Cache(NamedTuple):
  """What later tokens see of earlier ones. The layers read it; `append` writes it.

  Attributes:
    layers: KeyValue, stacked; where layers are not scanned, a list of one for each.
    positions: [B, S] int32, UNWRITTEN where there is no token.
    segment_ids: [B, S] int32; 0 for padding.
    length: scalar int32, how many places are written, in every row the same ones.

  B may be 1 while tokens come in many rows: a beginning that all share.
  """

  layers: Any
  positions: jax.Array
  segment_ids: jax.Array
  length: jax.Array

  @property
  def capacity(self) -> int:
    """S."""
    return self.positions.shape[1]

  @property
  def tokens(self) -> Tokens:
    """Where its tokens stand."""
    return Tokens(self.positions, self.segment_ids)

  def append(self, new: NewTokens, *, after: jax.Array | None = None) -> 'Cache':
    """With T more tokens. There must be room: a full cache would be overwritten at its end.

    Args:
      new: the tokens.
      after: ids >= 0, made of what was read from this cache (the next tokens, say). In a loop, XLA
        writes into a cache in place only where it sees that all have read it before; else it copies
        all of it in every step.
    """
    start = self.length
    if after is not None:
      start += jnp.minimum(jnp.min(after), 0)  # nothing, but XLA does not know

    def write(cached: jax.Array, x: jax.Array, axis: int) -> jax.Array:
      x = x.astype(cached.dtype)
      return jax.lax.dynamic_update_slice_in_dim(cached, x, start, cached.ndim + axis)

    return Cache(
      jax.tree.map(lambda cached, x: write(cached, x, -2), self.layers, new.layers),
      write(self.positions, new.positions, -1),
      write(self.segment_ids, new.segment_ids, -1),
      self.length + new.positions.shape[1],
    )

  def extended(self, places: int) -> 'Cache':
    """With room for more tokens."""

    def more(x: jax.Array, axis: int, fill: int = 0) -> jax.Array:
      widths = [(0, 0)] * x.ndim
      widths[axis] = (0, places)
      return jnp.pad(x, widths, constant_values=fill)

    return self._replace(
      layers=jax.tree.map(lambda x: more(x, -2), self.layers),
      positions=more(self.positions, -1, UNWRITTEN),
      segment_ids=more(self.segment_ids, -1),
    )

  def repeat(self, rows: int) -> 'Cache':
    """A cache of one row as one of many."""
    return self._replace(
      layers=jax.tree.map(lambda x: jnp.repeat(x, rows, x.ndim - 4), self.layers),
      positions=jnp.repeat(self.positions, rows, 0),
      segment_ids=jnp.repeat(self.segment_ids, rows, 0),
    )


def init_cache(
  num_layers: int,
  batch: int,
  capacity: int,
  num_kv_heads: int,
  head_dim: int,
  *,
  dtype: Any,
  stacked: bool,
) -> Cache:
  """An empty cache; `stacked` as the layers are (`Compute.scan_layers`)."""
  shape = (batch, num_kv_heads, capacity, head_dim)

  def empty(*leading: int) -> KeyValue:
    return KeyValue(jnp.zeros(leading + shape, dtype), jnp.zeros(leading + shape, dtype))

  return Cache(
    empty(num_layers) if stacked else [empty() for _ in range(num_layers)],
    jnp.full((batch, capacity), UNWRITTEN, jnp.int32),
    jnp.zeros((batch, capacity), jnp.int32),
    jnp.zeros((), jnp.int32),
  )


def tokens_at(
  batch: int, length: int, positions: jax.Array | None, segment_ids: jax.Array | None
) -> Tokens:
  """Fills in what was not given: positions 0, 1, ..., and one segment."""
  if positions is None:
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
  if segment_ids is None:
    segment_ids = jnp.ones((batch, length), jnp.int32)
  return Tokens(positions, segment_ids)


def visible(
  queries: Tokens,
  keys: Tokens,
  *,
  causal: bool = True,
  prefix_mask: jax.Array | None = None,
) -> jax.Array:
  """Who sees whom: tokens of the same segment, backwards; within the prefix both ways.

  positions    0 1 2 3 0 1 0     1 . . . . . .
  segment_ids  1 1 1 1 2 2 0     1 1 . . . . .
                                 1 1 1 . . . .
                                 1 1 1 1 . . .
                                 . . . . 1 . .
                                 . . . . 1 1 .
                                 . . . . . . 1

  Args:
    queries, keys: [B, T] and [B or 1, S].
    causal: False lets queries see all of their segment.
    prefix_mask: [B, T], where queries and keys are the same tokens: nonzero in the prefix.

  Returns:
    [B, T, S] bool.
  """
  same = queries.segment_ids[:, :, None] == keys.segment_ids[:, None, :]
  same |= (keys.segment_ids == SHARED)[:, None, :]
  if not causal:
    return same & (keys.positions != UNWRITTEN)[:, None, :]
  backwards = keys.positions[:, None, :] <= queries.positions[:, :, None]
  if prefix_mask is not None:
    prefix = prefix_mask != 0
    backwards |= prefix[:, :, None] & prefix[:, None, :]
  return same & backwards


def within(queries: Tokens, keys: Tokens, window: int) -> jax.Array:
  """[B, T, S] bool: less than `window` tokens apart. Itself and window - 1 before."""
  apart = queries.positions[:, :, None] - keys.positions[:, None, :]
  return jnp.abs(apart) < window


def beside(before: jax.Array, after: jax.Array) -> jax.Array:
  """What is of cached keys, before what is of new ones: [B or 1, T, S + T']."""
  rows = max(before.shape[0], after.shape[0])
  parts = [jnp.broadcast_to(x, (rows, *x.shape[1:])) for x in (before, after)]
  return jnp.concatenate(parts, axis=-1)


def attend(
  query: jax.Array,
  new: KeyValue,
  cached: KeyValue | None,
  mask: jax.Array,
  *,
  scale: float = 1.0,
  softcap: float | None = None,
  bias: jax.Array | None = None,
  implementation: str = 'xla',
) -> jax.Array:
  """Attention to cached and new tokens.

  Args:
    query: [B, H, T, C].
    new: [B or 1, N, T', C].
    cached: [B or 1, N, S, C] or None.
    mask: [B or 1, T, S + T'] bool, cached tokens first.
    scale: of the scores.
    softcap: c: scores become c tanh(score / c).
    bias: [B or 1, H, T, S + T'], added to the scores.
    implementation: 'cudnn': cuDNN's fused kernel where it serves, which is without a cache, softcap
      or bias, and as `cudnn_serves` says; 'xla' elsewhere.

  Returns:
    [B, H, T, C].
  """
  batch, heads, length, width = query.shape
  is_plain = cached is softcap is bias is None and new.key.shape[0] == batch
  if implementation == 'cudnn' and is_plain and cudnn_serves(query, new.key, _compute_capability()):
    attended = jax.nn.dot_product_attention(
      query.swapaxes(1, 2),
      new.key.swapaxes(1, 2),
      new.value.swapaxes(1, 2),
      mask=mask[:, None],
      scale=scale,
      implementation='cudnn',
    )
    return attended.swapaxes(1, 2)
  kv_heads = new.key.shape[1]
  grouped = query.reshape(batch, kv_heads, heads // kv_heads, length, width)
  scores = _scores(grouped, new.key)
  if cached is not None:
    # Scores are put together, not keys: a cache is read where it lies.
    scores = jnp.concatenate([_scores(grouped, cached.key), scores], axis=-1)
  scores *= scale
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  if bias is not None:
    scores += bias.reshape(bias.shape[0], kv_heads, -1, *bias.shape[2:])
  scores = jnp.where(mask[:, None, None], scores, _MASKED)
  weights: Any = softmax(scores, query.dtype)
  before = 0 if cached is None else cached.key.shape[-2]
  attended = _weighted(weights[..., before:], new.value)
  if cached is not None:
    attended += _weighted(weights[..., :before], cached.value)
  return attended.astype(query.dtype).reshape(query.shape)


def cudnn_serves(query: Any, key: Any, capability: float) -> bool:
  """Whether cuDNN has a kernel for [B, H, T, C] and [B, N, S, C] under a mask, backwards as well.

  `capability` is the compute capability of the GPU, 0 for what is none of NVIDIA's. The conditions
  are those of jax.nn.dot_product_attention, which fails where they do not hold.
  """
  width = query.shape[-1]
  return (
    capability >= 8.0
    and query.dtype in (jnp.bfloat16, jnp.float16)
    and width % 8 == 0
    and width <= (256 if capability >= 9.0 else 128)
    and query.shape[-2] % 2 == key.shape[-2] % 2 == 0
  )


def _compute_capability() -> float:
  device = jax.local_devices()[0]
  return float(device.compute_capability) if 'cuda' in device.client.platform_version else 0.0


def _scores(query: jax.Array, key: jax.Array) -> jax.Array:
  """[B, N, G, T, C], [B or 1, N, S, C] -> [B, N, G, T, S] float32."""
  queries, shape = _rows_for(query, key), query.shape[:-1]
  if queries.shape[2] <= _FEW_ROWS:
    # XLA on a CPU rearranges the right operand for its kernel: here the small one.
    scores = _batched(key.astype(query.dtype), queries, 3, 3).swapaxes(2, 3)
  else:
    scores = _batched(queries, key.astype(query.dtype), 3, 3)
  return _rows_of(scores, shape)


def _weighted(weights: jax.Array, value: jax.Array) -> jax.Array:
  """[B, N, G, T, S], [B or 1, N, S, C] -> [B, N, G, T, C] float32."""
  rows = _rows_for(weights, value)
  return _rows_of(_batched(rows, value.astype(weights.dtype), 3, 2), weights.shape[:-1])


def _rows_for(x: jax.Array, cached: jax.Array) -> jax.Array:
  """[B, N, G, T, ...] -> [B, N, G T, ...]; [1, N, B G T, ...] for what all rows share."""
  if cached.shape[0] < x.shape[0]:
    x = x.swapaxes(0, 1)
    return x.reshape(1, x.shape[0], -1, x.shape[-1])
  return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _rows_of(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """What `_rows_for` did, undone."""
  batch, kv_heads, groups, length = shape
  if x.shape[0] < batch:
    return x.reshape(kv_heads, batch, groups, length, -1).swapaxes(0, 1)
  return x.reshape(*shape, -1)


def _batched(lhs: jax.Array, rhs: jax.Array, lhs_axis: int, rhs_axis: int) -> jax.Array:
  """Matrix products of [b, N, ...] and [b, N, ...], sums in float32."""
  dims = (((lhs_axis,), (rhs_axis,)), ((0, 1), (0, 1)))
  return jax.lax.dot_general(lhs, rhs, dims, preferred_element_type=jnp.float32)

"""Splash attention, JAX's fused kernel for TPUs: scores of a block at a time, never [T, T] of them.

Blocks that nobody sees are skipped: the later half of a causal mask, and what is outside a window.

Letters: B batch, T tokens, H heads, N key-value heads, C head width.
"""

import functools
import math
from typing import Any

import flax.linen.spmd as logical
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as kernels
from jax.sharding import PartitionSpec

_LANES = 128  # of a TPU's vector unit: blocks are multiples of it
_BLOCKS = (512, 256, _LANES)


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array,
  *,
  scale: float,
  softcap: float | None = None,
  window: int | None = None,
) -> jax.Array:
  """Causal attention within segments, on every device to its own rows and heads.

  What comes before is told by places in the row, and how far by their number: tokens of a segment
  must stand side by side, in order, as packed rows do.

  Args:
    query: [B, H, T, C].
    key, value: [B, N, T, C].
    segment_ids: [B, T] int32.
    scale: of the scores.
    softcap: c: scores become c tanh(score / c).
    window: tokens that a token sees, itself included; None for all.

  Returns:
    [B, H, T, C].
  """
  length = query.shape[2]
  padding = -length % _LANES  # after all others, hence seen by none of them
  inputs = [jnp.pad(x, [(0, 0)] * 2 + [(0, padding), (0, 0)]) for x in (query * scale, key, value)]
  inputs.append(jnp.pad(segment_ids, [(0, 0), (0, padding)]))
  local = functools.partial(_local, softcap=softcap, window=window)
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty:
    batch, heads = logical.logical_to_mesh_axes(('batch', 'heads')) or (None, None)
    # Each device has to have the key-value heads of its own heads. Where there are too few of them
    # to be split, copies are.
    names = (heads,) if isinstance(heads, str) else heads or ()
    split = math.prod(mesh.shape[name] for name in names)
    copies = split // math.gcd(split, key.shape[1])
    inputs[1:3] = [jnp.repeat(x, copies, axis=1) for x in inputs[1:3]]
    by_head = PartitionSpec(batch, heads)
    specs = (by_head, by_head, by_head, PartitionSpec(batch))
    local = jax.shard_map(local, in_specs=specs, out_specs=by_head, check_vma=False)
  return local(*inputs)[:, :, :length]


def _local(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array,
  *,
  softcap: float | None,
  window: int | None,
) -> jax.Array:
  heads, length = query.shape[1:3]
  if window is None:
    mask = kernels.CausalMask((length, length))
  else:
    mask = kernels.LocalMask((length, length), (window - 1, 0), offset=0)
  block = next(size for size in _BLOCKS if length % size == 0)
  kernel = kernels.make_splash_mha(
    mask=kernels.MultiHeadMask([mask] * heads),
    head_shards=1,
    q_seq_shards=1,
    attn_logits_soft_cap=softcap,
    block_sizes=kernels.BlockSizes(
      block_q=block,
      block_kv=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_q_dq=block,
      block_kv_dq=block,
    ),
  )
  segments = kernels.SegmentIds(segment_ids, segment_ids)
  attended: Any = jax.vmap(kernel)(query, key, value, segment_ids=segments)
  return attended

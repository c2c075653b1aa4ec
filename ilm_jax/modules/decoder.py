"""Decoder-only language models by configuration: Gemma 1, 2 and 3, Llama, Qwen 2.5 and 3.

They take EMBEDDINGS, so that soft tokens can stand among them; `embed_tokens` is a method of its
own, and so is `logits`, which is asked for at the positions that matter only.

  hidden, _ = lm(lm.embed_tokens(tokens), positions, segment_ids)
  logits = lm.logits(hidden[:, -1])

Letters: B batch, T tokens, S places of a cache, D model width, L layers, H heads, N key-value
heads, G = H / N, C head width, F feed-forward width, V vocabulary.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ilm_jax.modules import attention
from ilm_jax.modules.attention import Cache, KeyValue, NewTokens, Tokens
from ilm_jax.modules.backward import ACTIVATIONS, in_branch
from ilm_jax.modules.layers import Compute, Embedder, GatedMlp, RMSNorm, dense, run_layers
from ilm_jax.runtime.sharding import constrain

_HIDDEN = ('batch', 'length', 'activation_embed')


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3's change of the RoPE frequencies for long contexts (arXiv:2407.21783).

  Attributes:
    factor: by which the lowest frequencies are divided.
    low_frequency_factor, high_frequency_factor: between these many turns within original_length
      frequencies are divided by less, above the second one by nothing.
    original_length: the context before it was made longer.
  """

  factor: float
  low_frequency_factor: float
  high_frequency_factor: float
  original_length: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """What a decoder-only language model is.

  Attributes:
    num_layers, d_model, num_heads, num_kv_heads, head_dim, d_mlp, vocab_size: L, D, H, N, C, F, V.
    max_length: positions that the model was trained for.
    activation: of the feed-forward gate: 'gelu' (Gemma), 'silu' (Llama, Qwen).
    norm_epsilon: of RMSNorm.
    rope_base: of RoPE, in layers that see everything.
    local_rope_base: in layers with a window; None means rope_base.
    rope_divisor: positions are divided by it, in layers that see everything (Gemma 3 from 4B: 8).
    rope_scaling: Llama 3's; None for others.
    window: tokens that a local layer sees, itself included.
    global_every: each n-th layer sees everything, the others are local: 2 in Gemma 2, 6 in Gemma 3;
      1 means that all see everything.
    query_scale: factor of attention scores.
    attention_softcap, final_softcap: c, as in c tanh(x / c), of scores and logits; None for none.
    qk_norm: RMSNorm over the head width of queries and keys (Gemma 3, Qwen 3).
    qkv_bias: of queries, keys and values (Qwen 2.5).
    post_norms: RMSNorm after attention and feed-forward as well (Gemma 2 and 3).
    scale_embeddings: embeddings times sqrt(D), rounded to their dtype (Gemma).
    tied_head: the head is the embedding table.
  """

  num_layers: int
  d_model: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  d_mlp: int
  vocab_size: int
  max_length: int = 8192
  activation: str = 'silu'
  norm_epsilon: float = 1e-6
  rope_base: float = 10_000.0
  local_rope_base: float | None = None
  rope_divisor: float = 1.0
  rope_scaling: RopeScaling | None = None
  window: int | None = None
  global_every: int = 1
  query_scale: float | None = None
  attention_softcap: float | None = None
  final_softcap: float | None = None
  qk_norm: bool = False
  qkv_bias: bool = False
  post_norms: bool = False
  scale_embeddings: bool = False
  tied_head: bool = True

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}.'
      )
    if self.head_dim % 2:
      raise ValueError(f'head_dim={self.head_dim} must be even: RoPE turns pairs.')
    if self.activation not in ACTIVATIONS:
      raise ValueError(f'activation={self.activation!r}: one of {sorted(ACTIVATIONS)}.')
    if self.global_every > 1 and self.window is None:
      raise ValueError(f'global_every={self.global_every}, but no window for the other layers.')

  @property
  def is_local(self) -> tuple[bool, ...]:
    """For each layer, whether it sees a window only."""
    return tuple((i + 1) % self.global_every != 0 for i in range(self.num_layers))


class Decoder(nn.Module):
  """A decoder-only language model."""

  config: DecoderConfig
  compute: Compute = Compute()

  def setup(self):
    c = self.config
    self.embedder = Embedder(c.vocab_size, c.d_model, self.compute)
    if not c.tied_head:
      self.head = Embedder(c.vocab_size, c.d_model, self.compute)

  def embed_tokens(self, tokens: jax.Array) -> jax.Array:
    """[B, T] ids -> [B, T, D], scaled as the layers expect them."""
    embeddings = self.embedder(tokens)
    if not self.config.scale_embeddings:
      return embeddings
    return embeddings * jnp.asarray(math.sqrt(self.config.d_model), embeddings.dtype)

  @nn.compact
  def __call__(
    self,
    embeddings: jax.Array,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    *,
    prefix_mask: jax.Array | None = None,
    mask: jax.Array | None = None,
    cache: Cache | None = None,
  ) -> tuple[jax.Array, NewTokens]:
    """Runs the layers.

    Args:
      embeddings: [B, T, D], of `embed_tokens`, with soft tokens in it or not.
      positions: [B, T] int32; 0, 1, ... by default.
      segment_ids: [B, T] int32, of packed rows, 0 for padding; all one segment by default.
      prefix_mask: [B, T], nonzero on tokens that see each other in both directions.
      mask: [B or 1, T, T] bool, who sees whom among these tokens, in place of what positions,
        segments and prefix say: for trees of continuations.
      cache: tokens that come before, which these see.

    Returns:
      Hidden states [B, T, D] after the final norm, for `logits`; and the tokens as a cache takes
      them.
    """
    c = self.config
    hidden, shared = _begin(
      self, embeddings, positions, segment_ids, prefix_mask=prefix_mask, mask=mask, cache=cache
    )
    layer = functools.partial(_Layer, c, self.compute)
    if self.compute.scan_layers:
      per_layer = jnp.asarray(c.is_local), cache.layers if cache else None
    else:
      per_layer = list(zip(c.is_local, cache.layers if cache else [None] * c.num_layers))
    hidden, layers = run_layers(self, layer, c.num_layers, self.compute, hidden, per_layer, shared)
    norm = RMSNorm(c.norm_epsilon, self.compute.dtype, name='final_norm')
    return norm(hidden), NewTokens(layers, *shared.tokens)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """[..., D] after the final norm -> [..., V] float32. Ask for the positions that matter."""
    table = self.embedder if self.config.tied_head else self.head
    logits = table.attend(hidden)
    if self.config.final_softcap is None:
      return logits
    return self.config.final_softcap * jnp.tanh(logits / self.config.final_softcap)

  def logits_at(self, hidden: jax.Array, at: jax.Array) -> jax.Array:
    """[B, T, D] and positions in the rows [B, N] -> [B, N, V]."""
    return self.logits(jnp.take_along_axis(hidden, at[..., None], axis=1))

  def logits_of(self, tokens: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    """[B, T] ids -> [B, T, V]: everything at once, for small inputs and for `init`."""
    return self.logits(self(self.embed_tokens(tokens), *args, **kwargs)[0])

  def init_cache(self, batch: int, capacity: int) -> Cache:
    """An empty cache for `batch` rows of up to `capacity` tokens."""
    c = self.config
    return attention.init_cache(
      c.num_layers,
      batch,
      capacity,
      c.num_kv_heads,
      c.head_dim,
      dtype=self.compute.dtype,
      stacked=self.compute.scan_layers,
    )


class LayerByLayer:
  """Runs a decoder whose layers are not scanned as calls of one small program, layer after layer.

  XLA loads a program of 30 layers from its cache for seconds, longer than one request runs. For
  programs that are run often, all layers in one jit are as fast.
  """

  def __init__(self, lm: Decoder):
    c, compute = lm.config, lm.compute

    def one_layer(params: Any, hidden: Any, cached: Any, shared: _Shared, is_local: bool) -> Any:
      layer = _Layer(c, compute, parent=None)
      return layer.apply({'params': params}, hidden, (is_local, cached), shared)

    def norm(params: Any, hidden: jax.Array) -> Any:
      final = RMSNorm(c.norm_epsilon, compute.dtype, parent=None)
      return final.apply({'params': params}, hidden)

    self._is_local = c.is_local
    self._begin = jax.jit(functools.partial(_begin, lm))
    self._layer = jax.jit(one_layer, static_argnames='is_local')
    self._norm = jax.jit(norm)

  def __call__(
    self,
    params: Any,
    embeddings: jax.Array,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    *,
    cache: Cache | None = None,
  ) -> tuple[jax.Array, NewTokens]:
    """As `Decoder.__call__`, with its parameters."""
    hidden, shared = self._begin(embeddings, positions, segment_ids, cache=cache)
    cached = cache.layers if cache else [None] * len(self._is_local)
    layers = []
    for i, (is_local, own) in enumerate(zip(self._is_local, cached, strict=True)):
      hidden, new = self._layer(params[f'layers_{i}'], hidden, own, shared, is_local=is_local)
      layers.append(new)
    return self._norm(params['final_norm'], hidden), NewTokens(layers, *shared.tokens)


def _begin(
  lm: Decoder,
  embeddings: jax.Array,
  positions: jax.Array | None,
  segment_ids: jax.Array | None,
  *,
  prefix_mask: jax.Array | None = None,
  mask: jax.Array | None = None,
  cache: Cache | None,
) -> tuple[jax.Array, '_Shared']:
  """What goes into the first layer, and what every layer gets."""
  c, compute = lm.config, lm.compute
  batch, length, _ = embeddings.shape
  tokens = attention.tokens_at(batch, length, positions, segment_ids)

  def ropes(_: jax.Array) -> tuple[Any, Any]:
    everything = _rope(tokens.positions, c, local=False)
    return everything, _rope(tokens.positions, c, local=True) if any(c.is_local) else None

  # Else sines are computed in every layer and head.
  both = ropes(embeddings) if compute.scan_layers else in_branch(ropes, embeddings)
  shared = _Shared(tokens, *both)
  if not (compute.attention == 'splash' and cache is prefix_mask is mask is None):
    everything, local = _masks(c, tokens, prefix_mask, mask, cache)
    shared = shared._replace(mask=everything, local_mask=local)
  return constrain(embeddings.astype(compute.dtype), _HIDDEN), shared


class _Shared(NamedTuple):
  """What every layer gets. `local_*` is for layers with a window, None where there are none.

  rope: (sin, cos), [B, 1, T, C / 2] each. mask: [B, T, S + T] bool; None with splash attention.
  """

  tokens: Tokens
  rope: tuple[jax.Array, jax.Array]
  local_rope: tuple[jax.Array, jax.Array] | None
  mask: jax.Array | None = None
  local_mask: jax.Array | None = None


def _masks(
  c: DecoderConfig,
  tokens: Tokens,
  prefix_mask: jax.Array | None,
  mask: jax.Array | None,
  cache: Cache | None,
) -> tuple[jax.Array, jax.Array | None]:
  """[B, T, S + T] bool of who sees whom, without and with a window."""
  if mask is None:
    mask = attention.visible(tokens, tokens, prefix_mask=prefix_mask)
  if cache is not None:
    mask = attention.beside(attention.visible(tokens, cache.tokens), mask)
  if c.window is None or not any(c.is_local):
    return mask, None
  near = attention.within(tokens, tokens, c.window)
  if cache is not None:
    near = attention.beside(attention.within(tokens, cache.tokens, c.window), near)
  return mask, mask & near


class _Layer(nn.Module):
  config: DecoderConfig
  compute: Compute

  @nn.compact
  def __call__(self, hidden, own, shared: _Shared):
    c = self.config
    is_local, cached = own

    def norm(x: jax.Array, name: str) -> jax.Array:
      return RMSNorm(c.norm_epsilon, self.compute.dtype, name=name)(x)

    attend = _Attention(c, self.compute, name='attention')
    attended, new = attend(norm(hidden, 'attention_norm'), is_local, cached, shared)
    hidden += norm(attended, 'post_attention_norm') if c.post_norms else attended
    mlp = GatedMlp(c.d_mlp, c.activation, self.compute, name='mlp')
    wide = mlp(norm(hidden, 'mlp_norm'))
    hidden += norm(wide, 'post_mlp_norm') if c.post_norms else wide
    return constrain(hidden, _HIDDEN), new


class _Attention(nn.Module):
  config: DecoderConfig
  compute: Compute

  @nn.compact
  def __call__(self, x, is_local, cached, shared: _Shared):
    c = self.config

    def project(name: str, heads: int, axis: str) -> jax.Array:
      shape, axes = (heads, c.head_dim), ('embed', axis, 'kv')
      projected = dense(name, shape, axes, self.compute, bias=c.qkv_bias)(x)
      return constrain(projected, ('batch', 'length', axis, 'kv')).swapaxes(1, 2)

    query = project('query', c.num_heads, 'heads')
    key = project('key', c.num_kv_heads, 'kv_heads')
    value = project('value', c.num_kv_heads, 'kv_heads')
    if c.qk_norm:
      query = RMSNorm(c.norm_epsilon, self.compute.dtype, 'kv', name='query_norm')(query)
      key = RMSNorm(c.norm_epsilon, self.compute.dtype, 'kv', name='key_norm')(key)
    sin_cos = _choose(is_local, shared.local_rope, shared.rope)
    query, new = _rotate(query, *sin_cos), KeyValue(_rotate(key, *sin_cos), value)
    options: dict[str, Any] = dict(
      scale=c.head_dim**-0.5 if c.query_scale is None else c.query_scale,
      softcap=c.attention_softcap,
    )
    if shared.mask is None:
      windows = (c.window, None) if shared.local_rope else (None, None)
      args = query, new, shared.tokens.segment_ids
      attended = _splash(is_local, windows, *args, **options)
    else:
      mask = _choose(is_local, shared.local_mask, shared.mask)
      implementation = self.compute.attention
      attended = attention.attend(
        query, new, cached, mask, implementation=implementation, **options
      )
    out = dense('out', c.d_model, ('heads', 'kv', 'embed'), self.compute, inputs=2)
    return out(attended.swapaxes(1, 2)), new


def _splash(is_local: Any, windows: tuple[int | None, int | None], *args: Any, **options: Any):
  """Splash attention, with the first of `windows` in local layers and the second in others."""
  from ilm_jax.modules import splash  # not needed elsewhere, and Pallas takes a while to import

  def attend(window: int | None, query: jax.Array, new: KeyValue, segment_ids: jax.Array):
    return splash.attend(query, *new, segment_ids, window=window, **options)

  local, everything = (functools.partial(attend, window) for window in windows)
  if isinstance(is_local, bool) or windows[0] is None:
    return (local if is_local is True else everything)(*args)
  return jax.lax.cond(is_local, local, everything, *args)


def _choose(is_local: Any, local: Any, everything: Any) -> Any:
  """`local` in layers with a window; a scanned layer gets to know which it is when it runs."""
  if local is None:
    return everything
  return jax.tree.map(lambda a, b: jnp.where(is_local, a, b), local, everything)


def _rope(positions: jax.Array, c: DecoderConfig, local: bool) -> tuple[jax.Array, jax.Array]:
  """(sin, cos) of the angles [B, 1, T, C / 2], float32 (Su et al. 2021, arXiv:2104.09864)."""
  base = c.local_rope_base if local and c.local_rope_base else c.rope_base
  frequencies = base ** -(jnp.arange(0, c.head_dim, 2, dtype=jnp.float32) / c.head_dim)
  if not local:
    frequencies = _scaled(frequencies / c.rope_divisor, c.rope_scaling)
  angles = positions[:, None, :, None].astype(jnp.float32) * frequencies
  return jnp.sin(angles), jnp.cos(angles)


def _scaled(frequencies: jax.Array, scaling: RopeScaling | None) -> jax.Array:
  """Llama 3's frequencies: low ones divided, high ones left, a ramp between."""
  if scaling is None:
    return frequencies
  low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
  turns = scaling.original_length * frequencies / (2 * math.pi)
  kept = jnp.clip((turns - low) / (high - low), 0, 1)
  return frequencies * (kept + (1 - kept) / scaling.factor)


def _rotate(x: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
  """Turns the pairs (i, i + C / 2) of [B, heads, T, C]."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.astype(x.dtype)

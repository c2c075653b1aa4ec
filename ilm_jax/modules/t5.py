"""T5 by configuration: T5 1.1, Flan-T5, mT5, umT5 (encoder-decoder) and T5X's decoder_only.

They take EMBEDDINGS, so that soft tokens can stand among them; `embed_tokens` is a method of its
own, and so is `logits`, which is asked for at the positions that matter only.

  encoded = lm.encode(lm.embed_tokens(inputs))                    encoder-decoder
  hidden, _ = lm.decode(lm.embed_tokens(targets), encoded)
  hidden, _ = lm(lm.embed_tokens(tokens))                         decoder only
  logits = lm.logits(hidden[:, -1])

What T5 does otherwise than most: scores are not scaled, nothing has a bias, and distance is told by
a learnt number per head and bucket of distances, added to the scores (Raffel et al. 2020,
arXiv:1910.10683).

Letters: B batch, T tokens, E tokens of the encoder, S places of a cache, D model width, L layers,
H heads, C head width, F feed-forward width, V vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ilm_jax.modules import attention
from ilm_jax.modules.attention import Cache, KeyValue, NewTokens, Tokens
from ilm_jax.modules.backward import ACTIVATIONS
from ilm_jax.modules.layers import Compute, Embedder, GatedMlp, RMSNorm, dense, run_layers
from ilm_jax.modules.relative_bias import RelativeBias, relative_buckets
from ilm_jax.runtime.sharding import constrain

_HIDDEN = ('batch', 'length', 'activation_embed')


@dataclasses.dataclass(frozen=True)
class T5Config:
  """What a T5 is.

  Attributes:
    num_encoder_layers: 0 for decoder only.
    num_decoder_layers, d_model, num_heads, head_dim, d_mlp, vocab_size: L, D, H, C, F, V.
    max_length: tokens of the encoder, and of the decoder, that the model was trained for.
    relative_buckets: of distances: half of them exact, the others in equal steps of the logarithm.
    relative_max_distance: from which on all distances are in the last bucket.
    shared_relative_bias: all layers of a stack have one; else each its own (T5X's scanned models,
      umT5).
    activation: of the feed-forward gate.
    norm_epsilon: of RMSNorm.
    tied_head: the head is the embedding table, and logits are divided by sqrt(D).
  """

  num_encoder_layers: int
  num_decoder_layers: int
  d_model: int
  num_heads: int
  head_dim: int
  d_mlp: int
  vocab_size: int
  max_length: int = 512
  relative_buckets: int = 32
  relative_max_distance: int = 128
  shared_relative_bias: bool = True
  activation: str = 'gelu'
  norm_epsilon: float = 1e-6
  tied_head: bool = False

  def __post_init__(self):
    if self.activation not in ACTIVATIONS:
      raise ValueError(f'activation={self.activation!r}: one of {sorted(ACTIVATIONS)}.')
    if self.relative_buckets % 4 or self.relative_max_distance <= self.relative_buckets // 2:
      raise ValueError(
        f'relative_buckets={self.relative_buckets} must be a multiple of 4 and less than twice'
        f' relative_max_distance={self.relative_max_distance}.'
      )


def _sizes(vocab_size: int) -> dict[str, T5Config]:
  table = {
    'small': (8, 512, 6, 1024),
    'base': (12, 768, 12, 2048),
    'large': (24, 1024, 16, 2816),
    'xl': (24, 2048, 32, 5120),
    'xxl': (24, 4096, 64, 10_240),
  }
  return {
    name: T5Config(
      num_encoder_layers=layers,
      num_decoder_layers=layers,
      d_model=d_model,
      num_heads=heads,
      head_dim=64,
      d_mlp=d_mlp,
      vocab_size=vocab_size,
    )
    for name, (layers, d_model, heads, d_mlp) in table.items()
  }


# As published (arXiv:1910.10683, 2210.11416, 2010.11934): 't5_1_1_small', 'mt5_xxl', ...
T5_SIZES: Mapping[str, T5Config] = {
  f'{family}_{size}': config
  for family, vocab_size in (('t5_1_1', 32_128), ('flan_t5', 32_128), ('mt5', 250_112))
  for size, config in _sizes(vocab_size).items()
}


class _Shared(NamedTuple):
  """What every layer of a stack gets.

  Attributes:
    mask: [B, T, S + T] bool, who sees whom, cached tokens first.
    buckets: [B or 1, T, S + T] int32, of the distance from query to key.
    bias: [B or 1, H, T, S + T], made of the buckets; None where each layer has its own.
    encoded: [B or 1, E, D]; None in an encoder, and where keys and values were made of it before.
    cross_mask: [B, T, E] bool.
  """

  mask: Any = None
  buckets: Any = None
  bias: jax.Array | None = None
  encoded: jax.Array | None = None
  cross_mask: Any = None


class T5(nn.Module):
  """An encoder-decoder, or a decoder alone. Initialise with `method='logits_of'`."""

  config: T5Config
  compute: Compute = Compute()

  def setup(self):
    c = self.config
    if self.compute.attention == 'splash':
      raise ValueError("attention='splash' knows no relative position bias: 'xla' or 'cudnn'.")
    self.embedder = Embedder(c.vocab_size, c.d_model, self.compute)
    if c.num_encoder_layers:
      self.encoder = _Stack(c, self.compute, c.num_encoder_layers, False)
    self.decoder = _Stack(c, self.compute, c.num_decoder_layers, bool(c.num_encoder_layers))
    if not c.tied_head:
      self.head = Embedder(c.vocab_size, c.d_model, self.compute)

  def embed_tokens(self, tokens: jax.Array) -> jax.Array:
    """[B, T] ids -> [B, T, D]."""
    return self.embedder(tokens)

  def encode(
    self,
    embeddings: jax.Array,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
  ) -> jax.Array:
    """Runs the encoder, where tokens of a segment see each other.

    Args:
      embeddings: [B, E, D], of `embed_tokens`, with soft tokens in it or not.
      positions: [B, E] int32; 0, 1, ... by default.
      segment_ids: [B, E] int32, of packed rows, 0 for padding; all one segment by default.

    Returns:
      [B, E, D] after the final norm.
    """
    self._require_encoder(True)
    tokens = attention.tokens_at(embeddings.shape[0], embeddings.shape[1], positions, segment_ids)
    mask = attention.visible(tokens, tokens, causal=False)
    places = tokens.positions if positions is not None else tokens.positions[:1]
    buckets = self._buckets(places, places, bidirectional=True)
    return self.encoder(embeddings, _Shared(mask, buckets))[0]

  def cross_cache(self, encoded: jax.Array) -> Any:
    """What `decode` makes of [B, E, D] in every call, once, for many calls.

    Returns:
      KeyValue [L, B, H, E, C]; where layers are not scanned, a list of L.
    """
    self._require_encoder(True)
    return self.decoder(None, _Shared(encoded=encoded))[1]

  def decode(
    self,
    embeddings: jax.Array,
    encoded: Any,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    encoder_segment_ids: jax.Array | None = None,
    mask: jax.Array | None = None,
    cache: Cache | None = None,
  ) -> tuple[jax.Array, NewTokens]:
    """Runs the decoder, whose tokens see those of their segment, backwards, and encoded ones.

    Args:
      embeddings: [B, T, D].
      encoded: [B or 1, E, D] of `encode`, or what `cross_cache` makes of it.
      positions: [B, T] int32; 0, 1, ... by default.
      segment_ids: [B, T] int32, of packed rows, 0 for padding; all one segment by default.
      encoder_segment_ids: [B or 1, E] int32, as given to `encode`: tokens see what is encoded of
        their segment.
      mask: [B or 1, T, T] bool, who sees whom among these tokens, in place of what positions and
        segments say: for trees of continuations.
      cache: tokens that come before, which these see.

    Returns:
      Hidden states [B, T, D] after the final norm, for `logits`; and the tokens as a cache takes
      them.
    """
    self._require_encoder(True)
    made = isinstance(encoded, (KeyValue, list))
    keys = jax.tree.leaves(encoded)[0]
    rows, length = (keys.shape[-4], keys.shape[-2]) if made else encoded.shape[:2]
    encoder_tokens = attention.tokens_at(rows, length, None, encoder_segment_ids)
    tokens = attention.tokens_at(embeddings.shape[0], embeddings.shape[1], positions, segment_ids)
    shared = self._causal(tokens, positions is None, None, mask, cache)._replace(
      encoded=None if made else encoded,
      cross_mask=attention.visible(tokens, encoder_tokens, causal=False),
    )
    return self._run_decoder(embeddings, tokens, shared, cache, encoded if made else None)

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
    """Runs a model that is a decoder only: arguments and results are those of `Decoder`.

    Args:
      embeddings: [B, T, D], of `embed_tokens`, with soft tokens in it or not.
      positions: [B, T] int32; 0, 1, ... by default.
      segment_ids: [B, T] int32, of packed rows, 0 for padding; all one segment by default.
      prefix_mask: [B, T], nonzero on tokens that see each other in both directions.
      mask: [B or 1, T, T] bool, as in `decode`; in place of the prefix, too.
      cache: tokens that come before, which these see.

    Returns:
      Hidden states [B, T, D] after the final norm, for `logits`; and the tokens as a cache takes
      them.
    """
    self._require_encoder(False)
    tokens = attention.tokens_at(embeddings.shape[0], embeddings.shape[1], positions, segment_ids)
    shared = self._causal(tokens, positions is None, prefix_mask, mask, cache)
    return self._run_decoder(embeddings, tokens, shared, cache)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """[..., D] after the final norm -> [..., V] float32. Ask for the positions that matter."""
    if not self.config.tied_head:
      return self.head.attend(hidden)
    return self.embedder.attend(hidden) / math.sqrt(self.config.d_model)

  def logits_at(self, hidden: jax.Array, at: jax.Array) -> jax.Array:
    """[B, T, D] and places in the rows [B, N] -> [B, N, V]."""
    return self.logits(jnp.take_along_axis(hidden, at[..., None], axis=1))

  def logits_of(
    self, tokens: jax.Array, encoder_tokens: jax.Array | None = None, **kwargs: Any
  ) -> jax.Array:
    """[B, T] ids -> [B, T, V]: everything at once, for small inputs and for `init`.

    Args:
      tokens: of the decoder.
      encoder_tokens: [B, E], where there is an encoder.
      **kwargs: of `decode` or `__call__`; encoder_segment_ids, of `encode` as well.
    """
    embeddings = self.embed_tokens(tokens)
    if encoder_tokens is None:
      return self.logits(self(embeddings, **kwargs)[0])
    segment_ids = kwargs.get('encoder_segment_ids')
    encoded = self.encode(self.embed_tokens(encoder_tokens), segment_ids=segment_ids)
    return self.logits(self.decode(embeddings, encoded, **kwargs)[0])

  def init_cache(self, batch: int, capacity: int) -> Cache:
    """An empty cache for `batch` rows of up to `capacity` tokens of the decoder."""
    c = self.config
    return attention.init_cache(
      c.num_decoder_layers,
      batch,
      capacity,
      c.num_heads,
      c.head_dim,
      dtype=self.compute.dtype,
      stacked=self.compute.scan_layers,
    )

  def _causal(
    self,
    tokens: Tokens,
    same_positions: bool,
    prefix_mask: jax.Array | None,
    mask: jax.Array | None,
    cache: Cache | None,
  ) -> _Shared:
    """Mask and buckets of the decoder's self-attention."""
    if mask is None:
      mask = attention.visible(tokens, tokens, prefix_mask=prefix_mask)
    places = tokens.positions[:1] if same_positions else tokens.positions
    buckets = self._buckets(places, places, bidirectional=False)
    if cache is not None:
      mask = attention.beside(attention.visible(tokens, cache.tokens), mask)
      before = self._buckets(places, cache.positions, bidirectional=False)
      buckets = attention.beside(before, buckets)
    return _Shared(mask, buckets)

  def _run_decoder(
    self,
    embeddings: jax.Array,
    tokens: Tokens,
    shared: _Shared,
    cache: Cache | None,
    source: Any = None,
  ) -> tuple[jax.Array, NewTokens]:
    cached = None if cache is None else cache.layers
    hidden, layers = self.decoder(embeddings, shared, cached, source)
    return hidden, NewTokens(layers, *tokens)

  def _buckets(self, queries: jax.Array, keys: jax.Array, *, bidirectional: bool) -> jax.Array:
    c = self.config
    return relative_buckets(
      queries,
      keys,
      bidirectional=bidirectional,
      num_buckets=c.relative_buckets,
      max_distance=c.relative_max_distance,
    )

  def _require_encoder(self, there: bool) -> None:
    if there != bool(self.config.num_encoder_layers):
      calls = 'encode() and decode()' if self.config.num_encoder_layers else '__call__()'
      raise ValueError(
        f'num_encoder_layers={self.config.num_encoder_layers}: this T5 runs by {calls}.'
      )


class _Stack(nn.Module):
  """Encoder or decoder. Without `hidden`, only what cross-attention makes of `shared.encoded`."""

  config: T5Config
  compute: Compute
  num_layers: int
  has_cross_attention: bool

  @nn.compact
  def __call__(
    self, hidden: Any, shared: _Shared, cached: Any = None, source: Any = None
  ) -> tuple[Any, Any]:
    c = self.config
    if hidden is not None:
      hidden = constrain(hidden.astype(self.compute.dtype), _HIDDEN)
      if c.shared_relative_bias:
        shared = shared._replace(bias=_relative_bias(c, self.compute)(shared.buckets))
    per_layer = cached, source
    if not self.compute.scan_layers:
      nothing = [None] * self.num_layers
      per_layer = list(zip(cached or nothing, source or nothing))
    layer = functools.partial(_Layer, c, self.compute, self.has_cross_attention)
    hidden, layers = run_layers(
      self, layer, self.num_layers, self.compute, hidden, per_layer, shared
    )
    if hidden is None:
      return None, layers
    return RMSNorm(c.norm_epsilon, self.compute.dtype, name='final_norm')(hidden), layers


class _Layer(nn.Module):
  config: T5Config
  compute: Compute
  has_cross_attention: bool

  @nn.compact
  def __call__(self, hidden, own, shared: _Shared):
    c = self.config
    cached, source = own

    def norm(name: str) -> jax.Array:
      return RMSNorm(c.norm_epsilon, self.compute.dtype, name=name)(hidden)

    if self.has_cross_attention:
      cross = _Attention(c, self.compute, name='cross_attention')
      source = shared.encoded if source is None else source
      if hidden is None:
        return cross(None, source)
    bias = shared.bias
    if bias is None:
      bias = _relative_bias(c, self.compute)(shared.buckets)
    attend = _Attention(c, self.compute, name='attention')
    normed = norm('attention_norm')
    attended, new = attend(normed, normed, shared.mask, cached, bias)
    hidden += attended
    if self.has_cross_attention:
      hidden += cross(norm('cross_attention_norm'), source, shared.cross_mask)[0]
    hidden += GatedMlp(c.d_mlp, c.activation, self.compute, name='mlp')(norm('mlp_norm'))
    return constrain(hidden, _HIDDEN), new


class _Attention(nn.Module):
  config: T5Config
  compute: Compute

  @nn.compact
  def __call__(self, x, source, mask: Any = None, cached=None, bias=None):
    """Returns what x attends to (None without x), and the keys and values of `source`."""
    c = self.config

    def project(name: str, inputs: jax.Array) -> jax.Array:
      shape, axes = (c.num_heads, c.head_dim), ('embed', 'heads', 'kv')
      projected = dense(name, shape, axes, self.compute)(inputs)
      return constrain(projected, ('batch', 'length', 'heads', 'kv')).swapaxes(1, 2)

    new = source
    if not isinstance(source, KeyValue):
      new = KeyValue(project('key', source), project('value', source))
    if x is None:
      return None, new
    # cuDNN has no keys that all rows share.
    shared = new.key.shape[0] < x.shape[0]
    attended = attention.attend(
      project('query', x),
      new,
      cached,
      mask,
      bias=bias,
      implementation='xla' if shared else self.compute.attention,
    )
    out = dense('out', c.d_model, ('heads', 'kv', 'embed'), self.compute, inputs=2)
    return out(attended.swapaxes(1, 2)), new


def _relative_bias(c: T5Config, compute: Compute) -> RelativeBias:
  return RelativeBias(c.num_heads, c.relative_buckets, compute.dtype, name='relative_bias')

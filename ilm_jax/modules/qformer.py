"""The Q-Former: learned queries that read an entity's encoder tokens, beside a text branch.

A BERT encoder (post-LN) over the sequence [queries; text] (Li et al. 2023, BLIP-2,
arXiv:2301.12597). Self-attention is shared by queries and text, and an attention mask says who sees
whom; queries and text have feed-forward layers of their own; in every n-th layer the queries, and
only they, cross-attend to the encoder tokens.

Letters: B batch, K queries, T text tokens, S = K + T, E encoder tokens, D model width.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ilm_jax.modules.backward import gelu
from ilm_jax.modules.dropout import Dropout
from ilm_jax.modules.layers import REMAT_POLICIES, LayerNorm
from ilm_jax.modules.precision import bf16_dot_general
from ilm_jax.runtime.sharding import constrain, gathered, with_axes

_INIT = nn.initializers.normal(0.02)  # BERT's, also of the queries
# Of what reads the encoder tokens: unit RMS in, unit RMS out. BLIP-2's normal(0.02) does that for
# its 1,408 wide image features, but would all but silence a CF vector of 32.
_ENCODER_INIT = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal', out_axis=(-2, -1))


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
  """Sizes of a Q-Former.

  Attributes:
    num_layers: a multiple of cross_attention_every.
    d_model: D, a multiple of num_heads.
    num_heads: attention heads.
    d_mlp: width of the feed-forward layers.
    num_queries: K.
    d_encoder: width of an encoder token (d_cf).
    vocab_size: of the text branch.
    max_text_length: positions of the text branch.
    cross_attention_every: n; layers 0, n, 2n, ... cross-attend.
    dropout_rate: of hidden states and attention probabilities.
    layer_norm_epsilon: BERT's.
    dtype: of activations; parameters are float32.
    bf16_matmul: multiply by kernels as a TPU does by default: operands rounded to bfloat16, sums
      in float32. Twice as fast on CPUs that have bfloat16 (`multiplies_bfloat16`).
    remat: 'none', or what of a layer is kept for the backward pass: 'dots' or nothing ('full').
    scan_layers: one compiled group of layers that runs n times; else the same parameters in n
      groups, which take longer to compile. XLA for CPUs copies what the backward pass of a loop
      needs: there, False is faster.
    has_text: False leaves the text branch's parameters out (phase 2).
  """

  num_layers: int
  d_model: int
  num_heads: int
  d_mlp: int
  num_queries: int = 8
  d_encoder: int = 32
  vocab_size: int = 30_522
  max_text_length: int = 512
  cross_attention_every: int = 2
  dropout_rate: float = 0.1
  layer_norm_epsilon: float = 1e-12
  dtype: Any = jnp.float32
  bf16_matmul: bool = False
  remat: str = 'none'
  scan_layers: bool = True
  has_text: bool = True

  def __post_init__(self):
    if self.remat not in ('none', *REMAT_POLICIES):
      raise ValueError(f"remat={self.remat!r}: 'none' or one of {sorted(REMAT_POLICIES)}.")
    if self.num_layers % self.cross_attention_every:
      raise ValueError(
        f'num_layers={self.num_layers} must be a multiple of'
        f' cross_attention_every={self.cross_attention_every}: layers repeat in groups of it.'
      )
    if self.d_model % self.num_heads:
      raise ValueError(f'd_model={self.d_model} must be a multiple of num_heads={self.num_heads}.')


# Fields that say how a Q-Former is run or trained, and not what its parameters mean.
HOW_IT_RUNS = frozenset(
  {'dropout_rate', 'dtype', 'bf16_matmul', 'remat', 'scan_layers', 'has_text'}
)

SIZES: Mapping[str, QFormerConfig] = {
  'tiny': QFormerConfig(num_layers=2, d_model=64, num_heads=4, d_mlp=128, num_queries=4),
  'minilm': QFormerConfig(num_layers=6, d_model=384, num_heads=12, d_mlp=1536),
  'bert8': QFormerConfig(num_layers=8, d_model=768, num_heads=12, d_mlp=3072),
  'blip2': QFormerConfig(num_layers=12, d_model=768, num_heads=12, d_mlp=3072, num_queries=32),
}


def attention_mask(kind: str, num_queries: int, text_mask: jax.Array) -> jax.Array:
  """Who attends to whom in [queries; text], for each loss.

  | kind       | loss        | q->q | q->t | t->q | t->t          |
  |------------|-------------|------|------|------|---------------|
  | unimodal   | ITC, II, UI | yes  | no   | no   | bidirectional |
  | multimodal | ITM         | yes  | yes  | yes  | bidirectional |
  | generation | ITG         | yes  | no   | yes  | causal        |

  Args:
    kind: 'unimodal', 'multimodal' or 'generation'.
    num_queries: K.
    text_mask: [B, T], nonzero on text, 0 on padding, which nobody attends to.

  Returns:
    [B, 1, S, S] bool, row attends to column.
  """
  batch, text = text_mask.shape
  is_query = jnp.arange(num_queries + text) < num_queries
  row, column = is_query[:, None], is_query[None, :]
  both = ~row & ~column
  place = jnp.arange(num_queries + text)
  rules = {
    'unimodal': row == column,
    'multimodal': jnp.ones((num_queries + text,) * 2, bool),
    'generation': (row & column) | (~row & column) | (both & (place[:, None] >= place[None, :])),
  }
  if kind not in rules:
    raise ValueError(f'kind={kind!r}: one of {sorted(rules)}.')
  present = jnp.concatenate([jnp.ones((batch, num_queries), bool), text_mask != 0], axis=1)
  return (rules[kind][None] & present[:, None, :])[:, None]


class QFormer(nn.Module):
  """Queries and text through the shared layers.

  Initialise with encoder tokens and text, so that every parameter is made; either may be left out
  afterwards.
  """

  config: QFormerConfig

  def setup(self):
    c = self.config
    queries = with_axes(_INIT, ('queries', 'embed'))
    self.queries: Any = self.param('queries', queries, (c.num_queries, c.d_model), jnp.float32)
    if c.has_text:
      init = with_axes(_INIT, ('vocab', 'embed'))
      self.word_embedder = nn.Embed(c.vocab_size, c.d_model, embedding_init=init, dtype=c.dtype)
      positions = with_axes(_INIT, ('length', 'embed'))
      self.positions: Any = self.param(
        'positions', positions, (c.max_text_length, c.d_model), jnp.float32
      )
    self.embedding_norm = _layer_norm(c)
    self.dropout = Dropout(c.dropout_rate)
    group: Any = _Group
    if c.remat != 'none':
      # Inside a scan nothing can be merged with the first computation, so prevent_cse only costs.
      group = nn.remat(
        _Group, policy=REMAT_POLICIES[c.remat], prevent_cse=False, static_argnums=(4, 5)
      )
    groups = c.num_layers // c.cross_attention_every
    self.layers = nn.scan(
      group,
      variable_axes={'params': 0},
      split_rngs={'params': True, 'dropout': True},
      in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
      length=groups,
      unroll=1 if c.scan_layers else groups,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )(c)

  def __call__(
    self,
    encoder_tokens: jax.Array | None,
    text_tokens: jax.Array | None,
    mask: jax.Array | None = None,
    *,
    encoder_mask: jax.Array | None = None,
    deterministic: bool = True,
  ) -> tuple[jax.Array | None, jax.Array | None]:
    """Runs the layers.

    Args:
      encoder_tokens: [B, E, d_encoder], or None to run the text alone.
      text_tokens: [B, T] int32, or None to run the queries alone.
      mask: [B or 1, 1, S, S] bool (`attention_mask`); None where everything attends to everything.
      encoder_mask: [B, E], nonzero on encoder tokens, 0 on padding; None where there is none.
      deterministic: False draws dropout from the 'dropout' rng.

    Returns:
      Queries [B, K, D] (None without encoder tokens) and text [B, T, D] (None without text), after
      the last layer.
    """
    c = self.config
    parts = []
    num_queries = 0
    if encoder_tokens is not None:
      num_queries = c.num_queries
      shape = (encoder_tokens.shape[0], *self.queries.shape)
      parts.append(jnp.broadcast_to(self.queries.astype(c.dtype), shape))
    if text_tokens is not None:
      length = text_tokens.shape[1]
      if length > c.max_text_length:
        raise ValueError(f'text of {length} tokens, but max_text_length={c.max_text_length}.')
      positions = self.positions[:length].astype(c.dtype)
      parts.append(self.word_embedder(text_tokens) + positions)
    if not parts:
      raise ValueError('neither encoder_tokens nor text_tokens are given.')
    hidden = self.embedding_norm(jnp.concatenate(parts, axis=1))
    hidden = self.dropout(hidden, deterministic=deterministic)
    hidden = constrain(hidden, ('batch', 'length', 'activation_embed'))
    if encoder_mask is not None:
      encoder_mask = (encoder_mask != 0)[:, None, None, :]
    encoder = encoder_tokens, encoder_mask
    hidden, _ = self.layers(hidden, encoder, mask, num_queries, deterministic)
    queries = hidden[:, :num_queries] if num_queries else None
    return queries, (hidden[:, num_queries:] if text_tokens is not None else None)

  def text_logits(self, text: jax.Array) -> jax.Array:
    """Next-token logits [..., vocab_size] of text states [..., D]: the tied word embedding."""
    return self.word_embedder.attend(text)


class _Group(nn.Module):
  """`cross_attention_every` layers, the first of which cross-attends: what the scan repeats."""

  config: QFormerConfig

  @nn.compact
  def __call__(self, hidden, encoder, mask, num_queries, deterministic):
    for i in range(self.config.cross_attention_every):
      layer = _Layer(self.config, has_cross_attention=i == 0, name=f'layer_{i}')
      hidden = layer(hidden, encoder, mask, num_queries, deterministic)
    return hidden, None


class _Layer(nn.Module):
  config: QFormerConfig
  has_cross_attention: bool

  @nn.compact
  def __call__(self, hidden, encoder, mask, num_queries, deterministic):
    c = self.config
    attend = _Attention(c, 'embed', name='attention')
    hidden = attend(hidden, hidden, mask, deterministic)
    queries, text = hidden[:, :num_queries], hidden[:, num_queries:]
    parts = []
    if num_queries:
      if self.has_cross_attention:
        cross = _Attention(c, 'cf', name='cross_attention')
        encoder_tokens, encoder_mask = encoder
        queries = cross(queries, encoder_tokens.astype(c.dtype), encoder_mask, deterministic)
      parts.append(_Mlp(c, name='query_mlp')(queries, deterministic))
    if text.shape[1]:
      parts.append(_Mlp(c, name='text_mlp')(text, deterministic))
    return jnp.concatenate(parts, axis=1)


class _Attention(nn.Module):
  """Multi-head attention, residual, LayerNorm. `source_axis`: logical axis of keys' inputs."""

  config: QFormerConfig
  source_axis: str

  @nn.compact
  def __call__(self, hidden, source, mask, deterministic):
    c = self.config
    heads = (c.num_heads, c.d_model // c.num_heads)

    def project(name: str, inputs: jax.Array, axis: str) -> jax.Array:
      init = _ENCODER_INIT if axis == 'cf' else _INIT
      return nn.DenseGeneral(
        heads,
        kernel_init=with_axes(init, (axis, 'heads', 'kv')),
        bias_init=with_axes(nn.initializers.zeros, ('heads', 'kv')),
        dtype=c.dtype,
        dot_general=_dot_general(c, (axis, 'heads', 'kv')),
        name=name,
      )(inputs)

    query = project('query', hidden, 'embed')
    key, value = (project(name, source, self.source_axis) for name in ('key', 'value'))
    weights = nn.dot_product_attention_weights(query, key, mask=mask, dtype=c.dtype)
    weights = Dropout(c.dropout_rate)(weights, deterministic=deterministic)
    attended = jnp.einsum('...hqk,...khc->...qhc', weights, value)
    out = nn.DenseGeneral(
      c.d_model,
      axis=(-2, -1),
      kernel_init=with_axes(_INIT, ('heads', 'kv', 'embed')),
      bias_init=with_axes(nn.initializers.zeros, ('embed',)),
      dtype=c.dtype,
      dot_general=_dot_general(c, ('heads', 'kv', 'embed')),
      name='out',
    )(attended)
    out = Dropout(c.dropout_rate)(out, deterministic=deterministic)
    return _layer_norm(c, 'norm')(out + hidden)


class _Mlp(nn.Module):
  """Feed-forward, residual, LayerNorm."""

  config: QFormerConfig

  @nn.compact
  def __call__(self, hidden, deterministic):
    c = self.config
    wide = _dense(c, c.d_mlp, ('embed', 'mlp'), 'wi')(hidden)
    out = _dense(c, c.d_model, ('mlp', 'embed'), 'wo')(
      gelu(wide, jnp.bfloat16 if c.bf16_matmul else wide.dtype)
    )
    out = Dropout(c.dropout_rate)(out, deterministic=deterministic)
    return _layer_norm(c, 'norm')(out + hidden)


def _dense(c: QFormerConfig, features: int, axes: tuple[str, str], name: str) -> nn.Module:
  return nn.Dense(
    features,
    kernel_init=with_axes(_INIT, axes),
    bias_init=with_axes(nn.initializers.zeros, axes[1:]),
    dtype=c.dtype,
    dot_general=_dot_general(c, axes),
    name=name,
  )


def _dot_general(c: QFormerConfig, axes: tuple[str, ...]) -> Callable[..., jax.Array]:
  return gathered(bf16_dot_general if c.bf16_matmul else jax.lax.dot_general, axes)


def _layer_norm(c: QFormerConfig, name: str | None = None) -> LayerNorm:
  return LayerNorm(c.layer_norm_epsilon, c.dtype, name=name)

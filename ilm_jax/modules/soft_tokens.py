"""From what is known of an entity to the soft tokens that stand for it in a prompt (phase 2).

  encoder tokens [U, E, d_cf]  ->  item encoder (Q-Former or MLP)  ->  adaptor  ->  [U, K, D]

Letters: U entities, E encoder tokens of an entity, K soft tokens, D width of the language model,
F width of the item encoder.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ilm_jax.modules.qformer import QFormer, QFormerConfig
from ilm_jax.runtime.sharding import fetch, with_axes

_INIT = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')
_LEAST_DEVIATION = 0.05  # of the features' RMS


@dataclasses.dataclass(frozen=True)
class MlpConfig:
  """CoLLM's and ELM's item encoder: Linear, ReLU, Linear (arXiv:2310.19488, arXiv:2310.04475).

  Attributes:
    num_queries: K.
    d_encoder: width of an encoder token (d_cf).
    width_factor: the hidden layer is so many times as wide.
  """

  num_queries: int = 1
  d_encoder: int = 32
  width_factor: int = 10


@dataclasses.dataclass(frozen=True)
class SoftTokenConfig:
  """What makes soft tokens.

  Attributes:
    item_encoder: its kind and size. A Q-Former needs no text branch here.
    d_model: D.
    normalise: LayerNorm with one learned gain after the adaptor, so that soft tokens have the
      scale of the language model's own embeddings; False is the paper's.
    gain: where the gain begins: the RMS of a token embedding, as it enters the layers.
    skip: whether the adaptor and `Encoded.vectors` read the encoder tokens (their mean) beside what
      a Q-Former made of them. Beyond the paper: interactions are learned much faster by what CF
      vectors say themselves, and phase 1 makes of them what texts say.
    standardise: of a Q-Former: the adaptor reads features of mean 0 and deviation 1 over the
      catalogue (`standardised`), and what all soft tokens have in common is a vector of its own,
      added after the LayerNorm. Beyond the paper: what is learned first is common to all items
      (how an answer ends, say), and would otherwise drown what tells them apart.
    max_encoder_tokens: E at most. With more than one an entity is a sequence (a user's last items,
      the oldest first), and what tells the places apart is learned, counted from the end.
  """

  item_encoder: QFormerConfig | MlpConfig
  d_model: int
  normalise: bool = True
  gain: float = 1.0
  skip: bool = False
  standardise: bool = False
  max_encoder_tokens: int = 1

  def __post_init__(self):
    if isinstance(self.item_encoder, MlpConfig) and self.skip:
      raise ValueError('skip=True: an MLP has nothing but the encoder token to read.')
    if self.standardise and (isinstance(self.item_encoder, MlpConfig) or not self.normalise):
      raise ValueError(
        'standardise=True is for a Q-Former with normalise=True: leave adaptor_text out, or take'
        ' one.'
      )
    if isinstance(self.item_encoder, MlpConfig) and self.max_encoder_tokens > 1:
      raise ValueError(
        f'max_encoder_tokens={self.max_encoder_tokens}: an MLP reads one encoder token, not a'
        ' sequence. Take a Q-Former, or 1.'
      )

  @property
  def num_soft_tokens(self) -> int:
    """K."""
    return self.item_encoder.num_queries

  @property
  def num_features(self) -> int:
    """F, the width of `Encoded.vectors`."""
    c = self.item_encoder
    if isinstance(c, MlpConfig):
      return c.width_factor * c.d_encoder
    return c.d_model + self.skip * c.d_encoder


class Encoded(NamedTuple):
  """Entities as a language model takes them, and as they are compared with each other.

  Attributes:
    soft_tokens: [U, K, D] float32.
    vectors: [U, F] float32: what the item encoder says of an entity, before the adaptor: the mean
      of its queries, or an MLP's hidden layer.
  """

  soft_tokens: jax.Array
  vectors: jax.Array


class SoftTokens(nn.Module):
  """Item encoder and adaptor."""

  config: SoftTokenConfig

  @nn.compact
  def __call__(
    self,
    encoder_tokens: jax.Array,
    encoder_mask: jax.Array | None = None,
    *,
    deterministic: bool = True,
  ) -> Encoded:
    """Encodes entities.

    Args:
      encoder_tokens: of entities; sequences begin at place 0 and are padded at the end.
      encoder_mask: [U, E], nonzero where there is a token; an entity has one at least.
      deterministic: False draws dropout from the 'dropout' rng.
    """
    c = self.config
    length = encoder_tokens.shape[1]
    if length > c.max_encoder_tokens:
      raise ValueError(f'{length} encoder tokens, but max_encoder_tokens={c.max_encoder_tokens}.')
    if c.max_encoder_tokens > 1:
      encoder_tokens += self._recency(encoder_tokens, encoder_mask)
    if isinstance(c.item_encoder, MlpConfig):
      vectors, adapted = self._mlp(encoder_tokens[:, 0], c.item_encoder)
    else:
      config = dataclasses.replace(c.item_encoder, has_text=False)
      item_encoder = QFormer(config, name='item_encoder')
      queries, _ = item_encoder(
        encoder_tokens, None, encoder_mask=encoder_mask, deterministic=deterministic
      )
      queries = jnp.asarray(queries, jnp.float32)
      if c.skip:
        mean = _mean(encoder_tokens, encoder_mask)[:, None]
        beside = jnp.broadcast_to(mean, (*queries.shape[:2], mean.shape[2]))
        queries = jnp.concatenate([queries, beside], axis=-1)
      if c.standardise:
        queries = self._standard(queries)
      vectors = queries.mean(axis=1)
      adapted = _dense(c.d_model, ('embed', None), 'adaptor', bias=not c.standardise)(queries)
    if c.normalise:
      gain: Any = self.param('gain', nn.initializers.constant(c.gain), (), jnp.float32)
      adapted = nn.LayerNorm(use_scale=False, use_bias=False)(adapted) * gain
    if c.standardise:
      init = with_axes(nn.initializers.zeros, ('queries', None))
      adapted += self.param('common', init, adapted.shape[1:], jnp.float32)
    return Encoded(adapted, vectors)

  def _standard(self, features: jax.Array) -> jax.Array:
    """[U, K, F], by constants that stand among the parameters and are not trained."""
    self.sow('intermediates', 'features', features)
    mean, deviation = (
      self.param(f'feature_{name}', with_axes(init, ('queries', None)), features.shape[1:])
      for name, init in (('mean', nn.initializers.zeros), ('deviation', nn.initializers.ones))
    )
    return (features - jax.lax.stop_gradient(mean)) / jax.lax.stop_gradient(deviation)

  def _recency(self, encoder_tokens: jax.Array, encoder_mask: jax.Array | None) -> jax.Array:
    """What is added to tokens [U, E, d_cf], by their distance from the last one."""
    shape = (self.config.max_encoder_tokens, encoder_tokens.shape[2])
    # Small beside encoder tokens, whose RMS is 1; those of a single token (an item) are near 0.
    init = with_axes(nn.initializers.normal(0.02), ('length', 'cf'))
    recency: Any = self.param('recency', init, shape, jnp.float32)
    here = jnp.ones(encoder_tokens.shape[:2], bool) if encoder_mask is None else encoder_mask != 0
    from_end = here.sum(axis=1, keepdims=True) - 1 - jnp.arange(here.shape[1])
    return recency[from_end.clip(0, shape[0] - 1)]

  def _mlp(self, vectors: jax.Array, config: MlpConfig) -> tuple[jax.Array, jax.Array]:
    hidden = config.width_factor * config.d_encoder
    hidden = nn.relu(_dense(hidden, ('cf', 'mlp'), 'item_encoder')(vectors))
    shape = (config.num_queries, self.config.d_model)
    adaptor = nn.DenseGeneral(
      shape,
      kernel_init=with_axes(_INIT, ('mlp', 'queries', None)),
      bias_init=with_axes(nn.initializers.zeros, ('queries', None)),
      name='adaptor',
    )
    return hidden, adaptor(hidden)


def standardised(config: SoftTokenConfig, params: Any, encoder_tokens: Any) -> Any:
  """Parameters whose features have mean 0 and deviation 1 over entities [U, 1, d_cf].

  A feature that hardly differs between entities is left small: it is divided by a twentieth of what
  is usual, not by its own deviation.
  """

  @jax.jit
  def features(params: Any, tokens: jax.Array) -> Any:
    module = SoftTokens(config)
    _, found = module.apply({'params': params}, tokens, mutable=['intermediates'])
    return found['intermediates']['features'][0]

  x = np.asarray(fetch(features(params, encoder_tokens)), np.float64)
  mean, deviation = x.mean(axis=0), x.std(axis=0)
  deviation = np.maximum(deviation, _LEAST_DEVIATION * np.sqrt(np.mean(deviation**2)))
  values = {'feature_mean': mean, 'feature_deviation': deviation}
  return params | {
    name: jax.device_put(value.astype(np.float32), params[name].sharding)
    for name, value in values.items()
  }


def _mean(tokens: jax.Array, mask: jax.Array | None) -> jax.Array:
  """[U, E, d] -> [U, d]."""
  if mask is None:
    return tokens.mean(axis=1)
  there = (mask != 0)[..., None]
  return (tokens * there).sum(axis=1) / jnp.maximum(there.sum(axis=1), 1)


def _dense(features: int, axes: tuple[str | None, ...], name: str, bias: bool = True) -> nn.Dense:
  return nn.Dense(
    features,
    use_bias=bias,
    kernel_init=with_axes(_INIT, axes),
    bias_init=with_axes(nn.initializers.zeros, axes[1:]),
    name=name,
  )

"""From what is known of an entity to the soft tokens that stand for it in a prompt (phase 2).

  encoder tokens [U, E, d_cf]  ->  item encoder (Q-Former or MLP)  ->  adaptor  ->  [U, K, D]

Letters: U entities, E encoder tokens of an entity, K soft tokens, D width of the language model.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ilm_jax.modules.qformer import QFormer, QFormerConfig
from ilm_jax.sharding import with_axes

_INIT = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')


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
    normalise: LayerNorm with one learned gain behind the adaptor, so that soft tokens have the
      scale of the language model's own embeddings; False is the paper's.
    gain: where the gain begins: the RMS of a token embedding, as it enters the layers.
    max_encoder_tokens: E at most. With more than one an entity is a sequence (a user's last items,
      the oldest first), and what tells the places apart is learned, counted from the end.
  """

  item_encoder: QFormerConfig | MlpConfig
  d_model: int
  normalise: bool = True
  gain: float = 1.0
  max_encoder_tokens: int = 1

  def __post_init__(self):
    if isinstance(self.item_encoder, MlpConfig) and self.max_encoder_tokens > 1:
      raise ValueError(
        f'max_encoder_tokens={self.max_encoder_tokens}: an MLP reads one encoder token, not a'
        ' sequence. Take a Q-Former, or 1.'
      )

  @property
  def num_soft_tokens(self) -> int:
    """K."""
    return self.item_encoder.num_queries


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
  ) -> jax.Array:
    """[U, E, d_cf] -> [U, K, D] float32.

    Args:
      encoder_tokens: of entities; sequences begin at place 0 and are padded behind.
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
      adapted = self._mlp(encoder_tokens[:, 0], c.item_encoder)
    else:
      config = dataclasses.replace(c.item_encoder, has_text=False)
      item_encoder = QFormer(config, name='item_encoder')
      queries, _ = item_encoder(
        encoder_tokens, None, encoder_mask=encoder_mask, deterministic=deterministic
      )
      adapted = _dense(c.d_model, ('embed', None), 'adaptor')(queries)
    if not c.normalise:
      return adapted
    gain: Any = self.param('gain', nn.initializers.constant(c.gain), (), jnp.float32)
    return nn.LayerNorm(use_scale=False, use_bias=False)(adapted) * gain

  def _recency(self, encoder_tokens: jax.Array, encoder_mask: jax.Array | None) -> jax.Array:
    """What is added to tokens [U, E, d_cf], by their distance from the last one."""
    shape = (self.config.max_encoder_tokens, encoder_tokens.shape[2])
    # Small beside encoder tokens, whose RMS is 1; those of a single token (an item) are near 0.
    init = with_axes(nn.initializers.normal(0.02), ('length', 'cf'))
    recency: Any = self.param('recency', init, shape, jnp.float32)
    here = jnp.ones(encoder_tokens.shape[:2], bool) if encoder_mask is None else encoder_mask != 0
    from_end = here.sum(axis=1, keepdims=True) - 1 - jnp.arange(here.shape[1])
    return recency[from_end.clip(0, shape[0] - 1)]

  def _mlp(self, vectors: jax.Array, config: MlpConfig) -> jax.Array:
    hidden = config.width_factor * config.d_encoder
    hidden = nn.relu(_dense(hidden, ('cf', 'mlp'), 'item_encoder')(vectors))
    shape = (config.num_queries, self.config.d_model)
    return nn.DenseGeneral(
      shape,
      kernel_init=with_axes(_INIT, ('mlp', 'queries', None)),
      bias_init=with_axes(nn.initializers.zeros, ('queries', None)),
      name='adaptor',
    )(hidden)


def _dense(features: int, axes: tuple[str | None, ...], name: str) -> nn.Dense:
  return nn.Dense(
    features,
    kernel_init=with_axes(_INIT, axes),
    bias_init=with_axes(nn.initializers.zeros, axes[1:]),
    name=name,
  )

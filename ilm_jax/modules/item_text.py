"""Phase 1's network: a Q-Former with heads for contrast, matching and generation.

Letters: B batch, K queries, T text tokens, F contrastive features, D width, V vocabulary.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ilm_jax.modules.qformer import QFormer, QFormerConfig, attention_mask
from ilm_jax.runtime.sharding import with_axes

_INIT = nn.initializers.normal(0.02)


class ItemTextEncoder(nn.Module):
  """A Q-Former and phase 1's heads (BLIP-2, section 3.1).

  Attributes:
    config: of the Q-Former.
    num_features: F.
    text_pooling: what of a text is compared with queries: the state of [CLS] ('cls', BLIP-2), or
      the mean over its tokens ('mean', what sentence encoders such as MiniLM were trained for).
    temperatures: initial temperature of each contrastive loss, by its name. Parameters are
      logarithms: a temperature is a scale.
  """

  config: QFormerConfig
  num_features: int
  temperatures: tuple[tuple[str, float], ...]
  text_pooling: str

  def setup(self):
    self.qformer: Any = QFormer(self.config)
    self.query_projection = self._head(self.num_features)
    self.text_projection = self._head(self.num_features)
    self.match = self._head(2)
    self.log_temperatures = {
      name: self.param(f'log_temperature_{name}', nn.initializers.constant(jnp.log(value)), ())
      for name, value in self.temperatures
    }

  def __call__(self, vectors: jax.Array, tokens: jax.Array) -> jax.Array:
    """Runs every parameter's layer once: for initialisation."""
    mask = attention_mask('multimodal', self.config.num_queries, jnp.ones_like(tokens))
    queries, text = self.qformer(vectors[:, None], tokens, mask, deterministic=True)
    parts = self.query_features(queries), self.text_projection(text), self.match(queries)
    return jnp.stack([part.sum() for part in parts]).sum()

  def queries(self, vectors: jax.Array, *, deterministic: bool) -> jax.Array:
    """Query outputs [B, K, D] of entities' vectors [B, d_encoder], without text."""
    queries, _ = self.qformer(vectors[:, None], None, deterministic=deterministic)
    return queries

  def query_features(self, queries: jax.Array) -> jax.Array:
    """[B, K, D] -> [B, K, F], not normalised."""
    return self.query_projection(queries)

  def text_features(
    self, tokens: jax.Array, text_mask: jax.Array, *, deterministic: bool
  ) -> jax.Array:
    """[B, F], not normalised, of texts [B, T] that begin with [CLS]."""
    mask = (text_mask != 0)[:, None, None, :]
    _, text = self.qformer(None, tokens, mask, deterministic=deterministic)
    if self.text_pooling == 'cls':
      return self.text_projection(text[:, 0])
    weights = (text_mask != 0)[:, :, None]
    mean = (text * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1)
    return self.text_projection(mean)

  def match_logits(
    self, vectors: jax.Array, tokens: jax.Array, text_mask: jax.Array, *, deterministic: bool
  ) -> jax.Array:
    """(no, yes) logits [B, 2], averaged over queries that see the text."""
    mask = attention_mask('multimodal', self.config.num_queries, text_mask)
    queries, _ = self.qformer(vectors[:, None], tokens, mask, deterministic=deterministic)
    return self.match(queries).mean(axis=1)

  def generation_states(
    self, vectors: jax.Array, tokens: jax.Array, text_mask: jax.Array, *, deterministic: bool
  ) -> jax.Array:
    """States [B, T, D] that predict the next token, of texts that begin with [DEC]."""
    mask = attention_mask('generation', self.config.num_queries, text_mask)
    _, text = self.qformer(vectors[:, None], tokens, mask, deterministic=deterministic)
    return text

  def _head(self, features: int) -> nn.Dense:
    return nn.Dense(
      features,
      kernel_init=with_axes(_INIT, ('embed', None)),
      bias_init=with_axes(nn.initializers.zeros, (None,)),
      dtype=self.config.dtype,
    )

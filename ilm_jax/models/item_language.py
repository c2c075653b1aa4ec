"""Phase 2: soft tokens of items and users in the prompts of a frozen language model.

The loss is that of the target tokens alone; what is trained is the item encoder and the adaptor
(paper section 3.3). The language model and the entity table are constants of the step.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ilm_jax.models.splice import splice, unique_entities
from ilm_jax.models.token_losses import token_nll
from ilm_jax.modules.decoder import Decoder
from ilm_jax.modules.soft_tokens import SoftTokenConfig, SoftTokens

Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
  """What is on the device and never trained.

  Attributes:
    lm: parameters of the language model.
    entity_vectors: [num_entities, d_cf], items first.
  """

  lm: Any
  entity_vectors: Any


class ItemLanguageModel:
  """The loss of phase 2 as a function of parameters and batches.

  A batch is what ItemLMFeatureConverter or ItemPrefixLMFeatureConverter makes, packed or not.
  """

  def __init__(
    self,
    lm: Decoder,
    soft_tokens: SoftTokenConfig,
    *,
    slot_id: int,
    max_targets: int | None = None,
    chunk: int = 256,
  ):
    """Puts the parts together; no parameter is made.

    Args:
      lm: the language model.
      soft_tokens: item encoder and adaptor; d_model is the language model's.
      slot_id: the token whose places soft tokens take.
      max_targets: target tokens of a row, at most; logits are taken for so many positions. None:
        of every position, which is a waste where prompts are long.
      chunk: positions of which logits are held at once.
    """
    if soft_tokens.d_model != lm.config.d_model:
      raise ValueError(
        f'soft tokens of width {soft_tokens.d_model}, but the language model has d_model='
        f'{lm.config.d_model}.'
      )
    self.lm = lm
    self.module = SoftTokens(soft_tokens)
    self.slot_id = slot_id
    self.max_targets = max_targets
    self.chunk = chunk

  def init(self, key: jax.Array) -> Any:
    """Parameters, boxed with their logical axes."""
    c = self.module.config
    tokens = jnp.zeros((1, c.max_encoder_tokens, c.item_encoder.d_encoder))
    return self.module.init(key, tokens)['params']

  def loss(
    self,
    params: Any,
    frozen: Frozen,
    batch: Mapping[str, jax.Array],
    key: jax.Array,
    *,
    deterministic: bool = False,
  ) -> tuple[jax.Array, Metrics]:
    """The mean over target tokens, in nats, and metrics.

    Raises:
      ValueError: while tracing, where the batch lacks a feature.
    """
    hidden = self.hidden(params, frozen, batch, None if deterministic else key)
    weights = batch['decoder_loss_weights'].astype(jnp.float32)
    targets = batch['decoder_target_tokens']
    if self.max_targets is not None and self.max_targets < weights.shape[1]:
      # Those that count come first, in their order.
      places = jnp.argsort(weights == 0, axis=1, stable=True)[:, : self.max_targets]
      left_out = (weights > 0).sum() - (jnp.take_along_axis(weights, places, 1) > 0).sum()
      hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)
      weights, targets = (jnp.take_along_axis(x, places, axis=1) for x in (weights, targets))
    else:
      left_out = jnp.zeros((), jnp.int32)
    nll = token_nll(
      lambda x: self._lm(frozen, x, method='logits'),
      hidden.reshape(-1, hidden.shape[-1]),
      targets.reshape(-1),
      chunk=self.chunk,
    ).reshape(targets.shape)
    total = weights.sum()
    loss = (nll * weights).sum() / jnp.maximum(total, 1e-9)
    return loss, {'loss': loss, 'target_tokens': total, 'targets_left_out': left_out}

  def hidden(
    self,
    params: Any,
    frozen: Frozen,
    batch: Mapping[str, jax.Array],
    key: jax.Array | None = None,
  ) -> jax.Array:
    """States [B, T, D] of the language model that predict `decoder_target_tokens`.

    Args:
      params: of `init`, unboxed.
      frozen: constants.
      batch: see the class.
      key: of dropout; None: no dropout.
    """
    tokens, entity_ids = batch['decoder_input_tokens'], batch['entity_ids']
    embeddings = self._lm(frozen, tokens, method='embed_tokens')
    num_entities = frozen.entity_vectors.shape[0]
    # Every entity of the batch once: items that many users have seen, most of all.
    unique = unique_entities(entity_ids, min(entity_ids.size, num_entities))
    soft = self.encode(params, frozen.entity_vectors[jnp.maximum(unique.ids, 0)], key)
    spliced = splice(embeddings, tokens == self.slot_id, soft, unique.index)
    hidden, _ = self._lm(
      frozen,
      spliced,
      batch.get('decoder_positions'),
      batch.get('decoder_segment_ids'),
      prefix_mask=batch.get('decoder_causal_attention'),
    )
    return hidden

  def encode(self, params: Any, vectors: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Soft tokens [U, K, D] of CF vectors [U, d_cf]."""
    rngs = None if key is None else {'dropout': key}
    soft: Any = self.module.apply(
      {'params': params}, vectors[:, None], deterministic=key is None, rngs=rngs
    )
    return soft

  def _lm(self, frozen: Frozen, *args: Any, **kwargs: Any) -> Any:
    return self.lm.apply({'params': frozen.lm}, *args, **kwargs)

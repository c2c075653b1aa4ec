"""What phase 1 runs on the devices: functions of parameters and batches, made without data.

`ItemTextPhase` jits them for real arrays, `ilm compile` for shapes of them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ilm_jax.data.input.model_features import entity_text_lengths
from ilm_jax.models import losses
from ilm_jax.models.item_text import ITEM_TEXT, Frozen, ItemTextConfig, ItemTextModel, SpecialTokens
from ilm_jax.modules.qformer import QFormerConfig
from ilm_jax.phases.qformer_options import qformer_config
from ilm_jax.runtime.flops import matmul_flops
from ilm_jax.runtime.tensorflow import import_tensorflow

# The word embedding is cut over devices, so its rows are a multiple of this.
_VOCAB_MULTIPLE = 64
# Temperatures for the raw CF vectors, the best of which is their ceiling.
_CF_TEMPERATURES = np.geomspace(0.02, 2.0, 15)


class ItemTextSteps:
  """The steps of phase 1.

  Attributes:
    model: the losses.
  """

  def __init__(
    self,
    encoder: QFormerConfig,
    config: ItemTextConfig,
    tokens: SpecialTokens,
    *,
    num_items: int,
    max_text_tokens: int,
  ):
    self.model = ItemTextModel(encoder, config, tokens, num_items)
    self._encoder = encoder
    self._max_text_tokens = max_text_tokens

  def init(self, key: jax.Array) -> Any:
    """Random parameters, boxed with their logical axes."""
    return self.model.init(key)

  def loss(
    self, params: Any, frozen: Frozen, batch: Mapping[str, jax.Array], key: jax.Array, source: str
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a batch of a source, and metrics."""
    return self.model.loss(params, frozen, batch, key, source=source)

  def flops(self, params: Any, frozen: Frozen, batch: Mapping[str, Any], source: str) -> int:
    """FLOPs of the matrix products of one training step, nothing computed twice."""
    old = self.model
    encoder = dataclasses.replace(self._encoder, remat='none')
    model = ItemTextModel(encoder, old.config, old.tokens, old.num_items)

    def gradient(params, frozen, batch, key):
      return jax.grad(lambda p: model.loss(p, frozen, batch, key, source=source)[0])(params)

    return matmul_flops(gradient, params, frozen, dict(batch), jax.random.key(0))

  def item_features(
    self, params: Any, frozen: Frozen, batch: Mapping[str, jax.Array]
  ) -> dict[str, jax.Array]:
    """What retrieval of items and texts compares; -log p of the texts, and with other items."""
    ids = jnp.maximum(batch['entity_ids'][:, 0], 0)
    vectors = frozen.entity_vectors[ids]
    # Items are in random order, so the next one is any.
    others = frozen.entity_vectors[(ids + 1) % self.model.num_items]
    text = batch['text_tokens'], batch['text_mask']
    nll, tokens = self.model.text_nll(params, vectors, *text)
    return {
      'items': self.model.encode_entities(params, vectors)[1],
      'texts': self.model.encode_texts(params, *text),
      'tokens_of_text': batch['text_tokens'],
      'nll': nll,
      'nll_shuffled': self.model.text_nll(params, others, *text)[0],
      'tokens': tokens,
    }

  def pair_metrics(
    self, params: Any, frozen: Frozen, batch: Mapping[str, jax.Array], source: str
  ) -> dict[str, jax.Array]:
    """Metrics of a batch of pairs, and gains of the raw CF vectors at each temperature."""
    _, found = self.model.loss(
      params, frozen, batch, jax.random.key(0), source=source, deterministic=True
    )
    left, right, users = batch['entity_ids'].T
    unit = [losses.normalise(frozen.entity_vectors[ids]) for ids in (left, right)]
    cosine = unit[0] @ unit[1].T
    false_negatives = self.model.pair_false_negatives(frozen, left, right, users)
    raw = [losses.contrastive(cosine / t, false_negatives)[1] for t in _CF_TEMPERATURES]
    gains = jnp.stack([each['gain'] for each in raw])
    return {**found, 'raw_cf/accuracy': raw[0]['accuracy'], 'cf_gains': gains}

  # ---- what they take

  def lengths(self, source: str) -> dict[str, int]:
    """SeqIO's task_feature_lengths of a source."""
    if source == ITEM_TEXT:
      return {'targets': self._max_text_tokens, 'entity_ids': 1}
    return {'targets': 0, 'entity_ids': 3}

  def converter(self) -> Any:
    """SeqIO's feature converter of all sources."""
    import_tensorflow()
    from ilm_jax.data.input.feature_converter import EntityTextFeatureConverter

    return EntityTextFeatureConverter(apply_length_check=False)

  def batch_shapes(self, source: str, rows: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a batch of a source; all arrays are int32."""
    lengths = entity_text_lengths(self.lengths(source))
    return {name: (rows, length) for name, length in lengths.items()}


def encoder_config(
  options: Mapping[str, Any], *, d_cf: int, vocab_size: int, platform: str | None = None
) -> QFormerConfig:
  """The Q-Former of `train.item_encoder`, with its text branch.

  Args:
    options, platform: of `qformer_config`.
    d_cf: width of the entity table.
    vocab_size: of the vocabulary; [DEC] comes after it.
  """
  rows = -(-(vocab_size + 1) // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
  return qformer_config(options, platform, d_encoder=d_cf, vocab_size=rows)

"""What phase 2 runs on the devices: functions of parameters and batches, made without data.

`ItemLanguagePhase` jits them for real arrays, `ilm compile` for shapes of them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ilm_jax.catalogue.trie import Trie
from ilm_jax.data.input import model_features
from ilm_jax.decoding.beam import Beams, beam_search
from ilm_jax.errors import UsageError
from ilm_jax.lm.load import init_params
from ilm_jax.models.item_language import Frozen, ItemLanguageConfig, ItemLanguageModel
from ilm_jax.modules.decoder import Decoder, LayerByLayer
from ilm_jax.modules.soft_tokens import SoftTokenConfig
from ilm_jax.modules.t5 import T5
from ilm_jax.phases.item_language_options import ItemLanguageData, LmOptions
from ilm_jax.runtime.flops import matmul_flops
from ilm_jax.runtime.sharding import constrain
from ilm_jax.runtime.tensorflow import import_tensorflow

ITEM_SEQUENCE = 'item_sequence'
_ITEMS = 1 << 16  # of a large catalogue, encoded at once


class ItemLanguageSteps:
  """The steps of phase 2.

  Attributes:
    model: the losses.
  """

  def __init__(
    self,
    lm: Decoder | T5,
    soft_tokens: SoftTokenConfig | None,
    *,
    config: ItemLanguageConfig,
    text: ItemLanguageData,
    lm_options: LmOptions,
    slot_id: int,
    num_items: int,
    first_token: int,
    prefix_tokens: tuple[int, ...] = (),
  ):
    """Makes the model; no parameter is made.

    Args:
      lm: the language model.
      soft_tokens: item encoder and adaptor; None: text only.
      config, text, lm_options: of the run.
      slot_id, num_items, prefix_tokens: as of ItemLanguageModel.
      first_token: what every example begins with, after the prefix.

    Raises:
      UsageError: the parts do not fit together.
    """
    self.config = config
    self._text = text
    self._lm_options = lm_options
    self._first_token = first_token
    self._parts: dict[str, Any] = dict(
      soft_tokens=soft_tokens,
      slot_id=slot_id,
      num_items=num_items,
      config=dataclasses.replace(config, max_targets=text.max_targets),
      prefix_tokens=prefix_tokens,
    )
    self.model = self._make_model(lm)

  def init(self, key: jax.Array) -> Any:
    """Random parameters of what is trained, boxed with their logical axes."""
    params = self.model.init(key)
    if self._lm_options.trained:
      params['lm'] = init_params(self.model.lm, key)
    return params

  def loss(
    self, params: Any, frozen: Frozen, batch: Mapping[str, jax.Array], key: jax.Array, source: str
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a batch of a source, and metrics."""
    return self._loss(self.model, params, frozen, batch, key, source)

  def target_loss(self, source: str) -> Any:
    """'vocabulary' or 'catalogue'."""
    chosen = self.config.target_loss
    if isinstance(chosen, str):
      return chosen
    return chosen.get(source, 'vocabulary')

  def flops(self, params: Any, frozen: Frozen, batch: Mapping[str, Any], source: str) -> int:
    """FLOPs of the matrix products of one training step, nothing computed twice.

    Fused attention is counted as what it computes without the fusion.
    """
    compute = dataclasses.replace(self.model.lm.compute, remat='none', attention='xla')
    model = self._make_model(self.model.lm.clone(compute=compute))

    def gradient(params, frozen, batch, key):
      return jax.grad(lambda p: self._loss(model, p, frozen, batch, key, source)[0])(params)

    return matmul_flops(gradient, params, frozen, dict(batch), jax.random.key(0))

  def task_nll(
    self, params: Any, frozen: Frozen, batch: Mapping[str, jax.Array], target_loss: Any
  ) -> tuple[jax.Array, jax.Array]:
    """Of each row: the sum of -log p of its target tokens, and their number."""
    nll, weights, _ = self.model.target_nll(params, frozen, batch, target_loss=target_loss)
    return (nll * weights).sum(axis=1), weights.sum(axis=1)

  @property
  def splits_catalogue(self) -> bool:
    """Whether `item_vectors` are split over devices."""
    return self.model.num_items > _ITEMS

  def item_vectors(self, params: Any, frozen: Frozen) -> jax.Array:
    """What a readout compares with, of all items: [I, F]; of large catalogues [I or more, F],
    split over devices by rows."""

    def encode(ids: jax.Array) -> jax.Array:
      return self.model.encode(params, frozen, ids).vectors

    ids = jnp.arange(self.model.num_items)
    if not self.splits_catalogue:
      return encode(ids)
    parts = -(-len(ids) // _ITEMS)
    ids = jnp.minimum(jnp.arange(parts * _ITEMS), len(ids) - 1).reshape(parts, _ITEMS)
    vectors = jax.lax.map(encode, ids).reshape(parts * _ITEMS, -1)
    return constrain(vectors, ('entities', 'cf'))

  def readout(
    self, params: Any, frozen: Frozen, entity_ids: jax.Array, vectors: jax.Array
  ) -> jax.Array:
    """Scores of all items [B, I] after histories [B, S], padded at the end with -1.

    Args:
      params, frozen: of the model.
      entity_ids: histories; their items are encoded here.
      vectors: of `item_vectors`, made once for a model.
    """
    vectors = vectors[: self.model.num_items]
    return self.model.readout_scores(params, frozen, entity_ids, vectors)

  def readout_by_layer(
    self, layers: LayerByLayer
  ) -> Callable[[Any, Frozen, jax.Array, jax.Array], jax.Array]:
    """`readout` for calls outside of jit, where the language model is frozen."""
    inputs, scores = jax.jit(self.model.history_inputs), jax.jit(self.model.scores_of_states)

    def run(params, frozen, entity_ids, vectors):
      read = inputs(params, frozen, entity_ids)
      hidden, _ = layers(frozen.lm, *read, cache=frozen.prefix)
      return scores(params, frozen, hidden, entity_ids, vectors[: self.model.num_items])

    return run

  def beams(
    self,
    params: Any,
    frozen: Frozen,
    trie: Trie,
    bias: jax.Array | None,
    forbidden: jax.Array | None,
    tokens: jax.Array,
    lengths: jax.Array,
    entity_ids: jax.Array,
    size: int,
  ) -> Beams:
    """The items that go on best from prompts: see `beam_search`.

    Args:
      params, frozen: of the model.
      trie, bias, forbidden: of the search.
      tokens, lengths, entity_ids: [B, T], [B] and [B, E], prompts after the prefix.
      size: of the beam.
    """
    inputs, lengths = self.prompt_embeddings(params, frozen, tokens, lengths, entity_ids)
    lm = self.model.lm
    assert isinstance(lm, Decoder)
    return beam_search(
      lm, self.model.lm_params(params, frozen), trie, inputs, lengths,
      beam_size=size, forbidden=forbidden, bias=bias,
    )  # fmt: skip

  def prompt_embeddings(
    self,
    params: Any,
    frozen: Frozen,
    tokens: jax.Array,
    lengths: jax.Array,
    entity_ids: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """Embeddings and lengths of prompts with the prefix before them."""
    model = self.model
    embeddings = model.embed(params, frozen, tokens, entity_ids)
    if model.prefix_tokens:
      prefix = jnp.broadcast_to(
        jnp.asarray(model.prefix_tokens, jnp.int32), (tokens.shape[0], len(model.prefix_tokens))
      )
      before = model.lm.apply(
        {'params': model.lm_params(params, frozen)}, prefix, method='embed_tokens'
      )
      embeddings = jnp.concatenate([jnp.asarray(before), embeddings], axis=1)
    # A row without a prompt stays one.
    return embeddings, jnp.where(lengths > 0, lengths + len(model.prefix_tokens), 0)

  # ---- what they take

  def lengths(self, source: str) -> dict[str, int]:
    """SeqIO's task_feature_lengths of a source."""
    t = self._text
    if source == ITEM_SEQUENCE:
      return {'targets': 0, 'entity_ids': t.sequence_length + 1}
    return {'inputs': t.max_inputs, 'targets': t.max_targets, 'entity_ids': t.max_entities}

  def converter(self, source: str, *, pack: bool) -> Any:
    """SeqIO's feature converter of a source."""
    import_tensorflow()
    from ilm_jax.data.input import feature_converter

    if source == ITEM_SEQUENCE:
      return feature_converter.EntityTextFeatureConverter(apply_length_check=False)
    of_lm = feature_converter.ItemLMFeatureConverter
    kind = feature_converter.ItemEncDecFeatureConverter if self.model.has_encoder else of_lm
    return kind(
      slot_id=self.model.slot_id,
      num_soft_tokens=self.model.num_soft_tokens,
      bos_id=self._first_token,
      pack=pack,
      apply_length_check=False,
    )

  def batch_shapes(self, source: str, rows: int, *, pack: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of a batch of a source; all arrays are int32."""
    given = self.lengths(source)
    if source == ITEM_SEQUENCE:
      lengths = model_features.entity_text_lengths(given)
    elif self.model.has_encoder:
      packed = model_features.ENC_DEC_PACKED if pack else ()
      features = (*model_features.ENC_DEC_FEATURES, *packed)
      lengths = model_features.enc_dec_lengths(features, given)
    else:
      packed = model_features.LM_PACKED if pack else ()
      lengths = model_features.lm_lengths((*model_features.LM_FEATURES, *packed), given)
    return {name: (rows, length) for name, length in lengths.items()}

  # ---- inside

  def _make_model(self, lm: Any) -> ItemLanguageModel:
    try:
      return ItemLanguageModel(lm, **self._parts)
    except ValueError as error:
      raise UsageError(f'train.losses: {error}') from error

  def _loss(self, model, params, frozen, batch, key, source):
    if source == ITEM_SEQUENCE:
      loss, metrics = model.readout_loss(params, frozen, batch['entity_ids'], key)
    else:
      target_loss = self.target_loss(source)
      loss, metrics = model.loss(params, frozen, batch, key, target_loss=target_loss)
    return loss * self.config.weights.get(source, 1.0), metrics

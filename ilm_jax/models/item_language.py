"""Phase 2: soft tokens of items and users in the prompts of a frozen language model.

What is trained is the item encoder, the adaptor and, where there is one, the readout (paper section
3.3); the language model and the entity table are constants of the step. Three losses:

  vocabulary   -log p of the target tokens, over all of the vocabulary: the paper's
  catalogue    the same over those tokens that may follow in the catalogue: what is to be learned is
               which item, not what a title looks like (models/catalogue_loss.py)
  readout      over items, at every item of a history, by one forward pass (modules/readout.py)

Letters: B rows, T tokens, S items of a history, E entities of a row, K soft tokens of an entity,
U entities, I items, D width of the language model, M positions.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from ilm_jax.catalogue.trie import Trie
from ilm_jax.models.catalogue_loss import catalogue_nll
from ilm_jax.modules.attention import SHARED, Cache
from ilm_jax.modules.decoder import Decoder, LayerByLayer
from ilm_jax.modules.readout import Readout
from ilm_jax.modules.soft_tokens import Encoded, SoftTokenConfig, SoftTokens
from ilm_jax.modules.splice import splice, unique_entities
from ilm_jax.modules.t5 import T5
from ilm_jax.modules.token_losses import token_nll
from ilm_jax.modules.user_states import UserStates
from ilm_jax.runtime.sharding import batch_parts

Metrics = dict[str, jax.Array]
TargetLoss = Literal['vocabulary', 'catalogue']


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
  """What is on the device and never trained.

  Attributes:
    lm: parameters of the language model; None where it is trained too.
    entity_vectors: [num_entities or more, d_cf], items first.
    log_popularity: [I], of the training rows.
    user_states: histories, where users are encoded from their last items.
    prefix: the beginning of all prompts as a cache of one row; None where there is none.
    trie, bias: the catalogue's texts, and what is added to the logits of its edges [nodes].
  """

  lm: Any
  entity_vectors: Any
  log_popularity: Any = None
  user_states: UserStates | None = None
  prefix: Cache | None = None
  trie: Trie | None = None
  bias: Any = None


@dataclasses.dataclass(frozen=True)
class ItemLanguageConfig:
  """How phase 2 is trained.

  Attributes:
    target_loss: 'vocabulary' or 'catalogue', for all sources, or one for each: {source: loss}.
    weights: of the sources' losses: {source: factor}; 1 where there is none. Adam takes the larger
      gradients of two sources for the scale of both, and those of a readout are large.
    readout: whether there is a readout. (The source 'item_sequence' trains it.)
    popularity_weight: of the readout, where training begins.
    max_targets: target tokens of a row, at most; logits are taken for so many positions. None: of
      every position, which is a waste where prompts are long.
    chunk: positions of each device of which logits are held at once.
    whole_catalogue: the readout is trained on all items of a catalogue up to this size: all are
      encoded in every step, in time and memory (docs/performance.md).
    num_negatives: items that stand for the others in larger ones.
  """

  target_loss: str | Mapping[str, str] = 'vocabulary'
  weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
  readout: bool = True
  popularity_weight: float = 0.0
  max_targets: int | None = None
  chunk: int = 256
  whole_catalogue: int = 10_000
  num_negatives: int = 8192

  @property
  def target_losses(self) -> set[str]:
    """All that some source has."""
    chosen = self.target_loss
    return {chosen} if isinstance(chosen, str) else {'vocabulary', *chosen.values()}

  def __post_init__(self):
    if wrong := self.target_losses - set(get_args(TargetLoss)):
      raise ValueError(f"target_loss={min(wrong)!r}: 'vocabulary' or 'catalogue'.")


class _Parts:
  """The different entities of [B, E], padded with -1, each to be encoded once in a part of B.

  Not once for all parts: the soft tokens of all would then have to be on every device.

  Attributes:
    ids: [P * U], P parts of the batch after each other; what is not needed is 0.
    index: [P, B / P, E], which of a part's ids each entity is.
  """

  def __init__(self, entity_ids: jax.Array, num_entities: int):
    self._parts = batch_parts(len(entity_ids))
    capacity = min(entity_ids.size // self._parts, num_entities)
    unique = jax.vmap(lambda part: unique_entities(part, capacity))(self.split(entity_ids))
    self.ids = jnp.maximum(unique.ids, 0).reshape(-1)
    self.index = unique.index

  def split(self, x: jax.Array) -> jax.Array:
    """[n, ...] -> [P, n / P, ...]."""
    return x.reshape(self._parts, -1, *x.shape[1:])

  def take(self, of_ids: jax.Array) -> jax.Array:
    """[P * U, ...] of `ids` -> [B, E, ...]; of padding, of any entity."""
    found = jax.vmap(lambda x, index: x[index])(self.split(of_ids), self.index)
    return found.reshape(-1, *found.shape[2:])


class ItemLanguageModel:
  """The losses of phase 2 as functions of parameters and batches.

  A batch is what a converter of `ilm_jax.data.input.feature_converter` makes, packed or not:
  prompts (ItemLM, ItemPrefixLM, ItemEncDec), or histories (EntityText: `entity_ids`).
  """

  def __init__(
    self,
    lm: Decoder | T5,
    soft_tokens: SoftTokenConfig | None,
    *,
    slot_id: int,
    num_items: int,
    config: ItemLanguageConfig = ItemLanguageConfig(),
    prefix_tokens: tuple[int, ...] = (),
  ):
    """Puts the parts together; no parameter is made.

    Args:
      lm: the language model.
      soft_tokens: item encoder and adaptor; d_model is the language model's. None: text only.
      slot_id: the token whose places soft tokens take.
      num_items: I.
      config: see there.
      prefix_tokens: what comes before all prompts. It is run once, by `run_prefix`.
    """
    if soft_tokens is None and config.readout:
      raise ValueError(
        'a readout compares with what an item encoder says: without one, readout=False.'
      )
    if soft_tokens is not None and soft_tokens.d_model != lm.config.d_model:
      raise ValueError(
        f'soft tokens of width {soft_tokens.d_model}, but the language model has d_model='
        f'{lm.config.d_model}.'
      )
    self.has_encoder = isinstance(lm, T5) and lm.config.num_encoder_layers > 0
    if self.has_encoder and (config.readout or prefix_tokens):
      raise ValueError(
        'an encoder-decoder has neither a readout nor a prefix: its encoder sees both ways, so that'
        ' a state at an item would know what comes after.'
      )
    if not isinstance(lm, Decoder) and 'catalogue' in config.target_losses:
      raise ValueError("target_loss='catalogue' is for decoder-only language models but T5's.")
    self.lm = lm
    self.soft_tokens = soft_tokens
    self.config = config
    self.slot_id = slot_id
    self.num_items = num_items
    self.prefix_tokens = prefix_tokens

  @property
  def num_soft_tokens(self) -> int:
    """K."""
    return 0 if self.soft_tokens is None else self.soft_tokens.num_soft_tokens

  def init(self, key: jax.Array) -> Any:
    """Parameters, boxed with their logical axes; the language model's are not among them."""
    if self.soft_tokens is None:
      return {}
    c = self.soft_tokens
    tokens = jnp.zeros((1, c.max_encoder_tokens, c.item_encoder.d_encoder))
    params = dict(SoftTokens(c).init(key, tokens)['params'])
    if self.config.readout:
      items = jnp.zeros((1, c.num_features)), jnp.zeros(1)
      params['readout'] = self._readout.init(key, jnp.zeros((1, c.d_model)), *items)['params']
    return params

  # ---- prompts

  def loss(
    self,
    params: Any,
    frozen: Frozen,
    batch: Mapping[str, jax.Array],
    key: jax.Array,
    *,
    target_loss: TargetLoss = 'vocabulary',
    deterministic: bool = False,
  ) -> tuple[jax.Array, Metrics]:
    """The mean over target tokens, in nats, and metrics.

    Raises:
      ValueError: while tracing, where the batch lacks a feature, or there is no trie.
    """
    nll, weights, metrics = self.target_nll(
      params, frozen, batch, None if deterministic else key, target_loss=target_loss
    )
    total = weights.sum()
    loss = (nll * weights).sum() / jnp.maximum(total, 1e-9)
    return loss, {'loss': loss, 'target_tokens': total, **metrics}

  def target_nll(
    self,
    params: Any,
    frozen: Frozen,
    batch: Mapping[str, jax.Array],
    key: jax.Array | None = None,
    *,
    target_loss: TargetLoss = 'vocabulary',
  ) -> tuple[jax.Array, jax.Array, Metrics]:
    """-log p of the target tokens and their weights, [B, max_targets] each, and metrics.

    A catalogue's nll is 0, and so is its weight, where the target is no item of it.
    """
    hidden = self.hidden(params, frozen, batch, key)
    weights = batch['decoder_loss_weights'].astype(jnp.float32)
    targets = batch['decoder_target_tokens']
    starts = _starts(weights, batch.get('decoder_segment_ids'))
    most = self.config.max_targets
    left_out = jnp.zeros((), jnp.int32)
    if most is not None and most < weights.shape[1]:
      # Those that count come first, in their order.
      places = jnp.argsort(weights == 0, axis=1, stable=True)[:, :most]
      left_out = (weights > 0).sum() - (jnp.take_along_axis(weights, places, 1) > 0).sum()
      hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)
      weights, targets, starts = (
        jnp.take_along_axis(x, places, axis=1) for x in (weights, targets, starts)
      )
    metrics = {'targets_left_out': left_out}
    if target_loss == 'catalogue':
      if frozen.trie is None:
        raise ValueError('the catalogue loss needs a trie.')
      decoder, lm = self.lm, self.lm_params(params, frozen)
      assert isinstance(decoder, Decoder)
      nll, is_item = catalogue_nll(
        decoder, lm, frozen.trie, hidden, targets, starts, weights, bias=frozen.bias,
        chunk=self.config.chunk,
      )  # fmt: skip
      metrics['targets_no_item'] = ((weights > 0) & ~is_item).sum()
      return nll, weights * is_item, metrics
    nll = token_nll(
      functools.partial(self._apply, params, frozen, method='logits'),
      hidden.reshape(-1, hidden.shape[-1]),
      targets.reshape(-1),
      chunk=self.config.chunk,
    ).reshape(targets.shape)
    return nll, weights, metrics

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
    run = functools.partial(self._apply, params, frozen)
    positions, segment_ids = (batch.get(f'decoder_{x}') for x in ('positions', 'segment_ids'))
    if self.has_encoder:
      encoder_segments = batch.get('encoder_segment_ids')
      if encoder_segments is None:
        encoder_segments = (batch['encoder_input_tokens'] != 0).astype(jnp.int32)
      inputs = self.embed(params, frozen, batch['encoder_input_tokens'], batch['entity_ids'], key)
      encoded = run(inputs, batch.get('encoder_positions'), encoder_segments, method='encode')
      hidden, _ = run(
        run(batch['decoder_input_tokens'], method='embed_tokens'),
        encoded,
        positions=positions,
        segment_ids=segment_ids,
        encoder_segment_ids=encoder_segments,
        method='decode',
      )
      return hidden
    tokens = batch['decoder_input_tokens']
    embeddings = self.embed(params, frozen, tokens, batch['entity_ids'], key)
    prefix = self._prefix(params, frozen)
    if prefix is not None:
      if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
      positions = positions + prefix.capacity  # not in place: batches may be NumPy's
    hidden, _ = run(
      embeddings,
      positions,
      segment_ids,
      prefix_mask=batch.get('decoder_causal_attention'),
      cache=prefix,
    )
    return hidden

  def embed(
    self,
    params: Any,
    frozen: Frozen,
    tokens: jax.Array,
    entity_ids: jax.Array,
    key: jax.Array | None = None,
  ) -> jax.Array:
    """Embeddings [B, T, D] of tokens [B, T], soft tokens of entities [B, E] in their slots."""
    embeddings = self._apply(params, frozen, tokens, method='embed_tokens')
    if self.soft_tokens is None:
      return embeddings
    is_table = frozen.user_states is None
    capacity = frozen.entity_vectors.shape[0] if is_table else entity_ids.size
    parts = _Parts(entity_ids, capacity)
    soft = parts.split(self.encode(params, frozen, parts.ids, key).soft_tokens)
    spliced = jax.vmap(splice)(
      parts.split(embeddings), parts.split(tokens == self.slot_id), soft, parts.index
    )
    return spliced.reshape(embeddings.shape)

  def encode(
    self, params: Any, frozen: Frozen, entity_ids: jax.Array, key: jax.Array | None = None
  ) -> Encoded:
    """Entities [U] by id, 0 or more, encoded."""
    assert self.soft_tokens is not None
    if frozen.user_states is None:
      tokens, mask = frozen.entity_vectors[entity_ids][:, None], None
    else:
      tokens, mask = frozen.user_states.encoder_tokens(
        frozen.entity_vectors, entity_ids, self.soft_tokens.max_encoder_tokens
      )
    own = {name: x for name, x in params.items() if name not in ('readout', 'lm')}
    rngs = None if key is None else {'dropout': key}
    encoded: Any = SoftTokens(self.soft_tokens).apply(
      {'params': own}, tokens, mask, deterministic=key is None, rngs=rngs
    )
    return encoded

  # ---- histories

  def readout_loss(
    self,
    params: Any,
    frozen: Frozen,
    entity_ids: jax.Array,
    key: jax.Array,
    *,
    deterministic: bool = False,
  ) -> tuple[jax.Array, Metrics]:
    """The mean of -log p(next item) over all items of histories but the first, in nats.

    Args:
      entity_ids: [B, S + 1], items, oldest first, padded at the end with -1.
    """
    dropout, draw = jax.random.split(key)
    dropout = None if deterministic else dropout
    inputs, targets = entity_ids[:, :-1], entity_ids[:, 1:]
    weights = (targets.reshape(-1) >= 0).astype(jnp.float32)
    if self.num_items <= self.config.whole_catalogue:
      encoded = self.encode(params, frozen, jnp.arange(self.num_items), dropout)
      soft = encoded.soft_tokens[jnp.maximum(inputs, 0)]
      hidden = self._states(params, frozen, soft, inputs)
      nll = token_nll(
        lambda x: self._scores(params, x, encoded.vectors, frozen.log_popularity),
        hidden.reshape(-1, hidden.shape[-1]),
        targets.reshape(-1),
        chunk=self.config.chunk,
      )
    else:
      parts = _Parts(entity_ids, self.num_items)
      negatives = jax.random.randint(draw, (self.config.num_negatives,), 0, self.num_items)
      keys = (None, None) if dropout is None else jax.random.split(dropout)
      own = self.encode(params, frozen, parts.ids, keys[0])
      sampled = self.encode(params, frozen, negatives, keys[1]).vectors
      hidden = self._states(params, frozen, parts.take(own.soft_tokens)[:, :-1], inputs)
      nll = self._sampled_nll(
        params, frozen, hidden.reshape(-1, hidden.shape[-1]),
        parts.take(own.vectors)[:, 1:].reshape(-1, own.vectors.shape[-1]), targets.reshape(-1),
        sampled, negatives,
      )  # fmt: skip
    total = weights.sum()
    loss = (nll * weights).sum() / jnp.maximum(total, 1e-9)
    return loss, {'loss': loss, 'targets': total}

  def readout_scores(
    self, params: Any, frozen: Frozen, entity_ids: jax.Array, vectors: jax.Array
  ) -> jax.Array:
    """Scores of all items [B, I] after histories [B, S], padded with -1, one item at least.

    Args:
      vectors: [I, F], of `encode` of all items: made once for a model.
    """
    inputs = self.history_inputs(params, frozen, entity_ids)
    hidden, _ = self._apply(params, frozen, *inputs, cache=self._prefix(params, frozen))
    return self.scores_of_states(params, frozen, hidden, entity_ids, vectors)

  def history_inputs(
    self, params: Any, frozen: Frozen, entity_ids: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the language model reads of histories [B, S]: embeddings, positions, segments."""
    parts = _Parts(entity_ids, self.num_items)
    soft = parts.take(self.encode(params, frozen, parts.ids).soft_tokens)
    return self._inputs(soft, entity_ids)

  def scores_of_states(
    self,
    params: Any,
    frozen: Frozen,
    hidden: jax.Array,
    entity_ids: jax.Array,
    vectors: jax.Array,
  ) -> jax.Array:
    """`readout_scores` of the states [B, S * K, D] that the language model makes of its inputs."""
    last = jnp.maximum((entity_ids >= 0).sum(axis=1) - 1, 0)
    k = self.num_soft_tokens
    hidden = jnp.take_along_axis(hidden, (last * k + k - 1)[:, None, None], axis=1)[:, 0]
    return self._scores(params, hidden, vectors, frozen.log_popularity)

  def _states(
    self, params: Any, frozen: Frozen, soft_tokens: jax.Array, entity_ids: jax.Array
  ) -> jax.Array:
    """States [B, S, D] after each item of histories [B, S], of soft tokens [B, S, K, D]."""
    inputs = self._inputs(soft_tokens, entity_ids)
    hidden, _ = self._apply(params, frozen, *inputs, cache=self._prefix(params, frozen))
    k = soft_tokens.shape[2]
    return hidden[:, k - 1 :: k]

  def _inputs(
    self, soft_tokens: jax.Array, entity_ids: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    batch, items, k, _ = soft_tokens.shape
    embeddings = soft_tokens.reshape(batch, items * k, -1)
    segment_ids = jnp.repeat(entity_ids >= 0, k, axis=1).astype(jnp.int32)
    first = len(self.prefix_tokens)
    positions = jnp.broadcast_to(first + jnp.arange(items * k), (batch, items * k))
    return embeddings, positions, segment_ids

  @property
  def _readout(self) -> Readout:
    assert self.soft_tokens is not None
    return Readout(self.soft_tokens.num_features, self.config.popularity_weight)

  def _scores(self, params: Any, hidden: jax.Array, vectors: Any, log_popularity: Any) -> Any:
    return self._readout.apply({'params': params['readout']}, hidden, vectors, log_popularity)

  def _sampled_nll(self, params, frozen, hidden, own, targets, sampled, negatives) -> jax.Array:
    """[M]; the sum over the other items by a uniform sample of them, without a target's own.

    Args:
      hidden: [M, D].
      own, targets: vectors [M, F] and ids [M] of the targets; -1 is none.
      sampled, negatives: vectors [N, F] and ids [N] of the sample.
    """
    popularity = frozen.log_popularity
    of_target = popularity[jnp.maximum(targets, 0)][:, None]
    target = self._scores(params, hidden, own[:, None], of_target)
    others = self._scores(params, hidden, sampled, popularity[negatives])
    is_target = negatives == targets[:, None]
    drawn = jnp.maximum((~is_target).sum(axis=1, keepdims=True), 1)
    others = jnp.where(is_target, -jnp.inf, others + jnp.log((self.num_items - 1) / drawn))
    return jax.nn.logsumexp(jnp.concatenate([target, others], axis=1), axis=1) - target[:, 0]

  # ---- the language model

  def run_prefix(self, lm_params: Any, layers: LayerByLayer | None = None) -> Cache | None:
    """The prefix as a cache that all prompts share: once, where the language model is frozen.

    With `layers` it is for calls outside of jit, see there.
    """
    if not self.prefix_tokens:
      return None
    run = functools.partial(self.lm.apply, {'params': lm_params})
    tokens = jnp.asarray([self.prefix_tokens], jnp.int32)

    @jax.jit
    def as_cache(new: Any) -> Cache:
      cache = self.lm.init_cache(1, tokens.shape[1]).append(new)
      return cache._replace(segment_ids=jnp.full_like(cache.segment_ids, SHARED))

    embeddings: Any = run(tokens, method='embed_tokens')
    new: Any = (run(embeddings) if layers is None else layers(lm_params, embeddings))[1]
    return as_cache(new)

  def _prefix(self, params: Any, frozen: Frozen) -> Cache | None:
    return self.run_prefix(params['lm']) if frozen.lm is None else frozen.prefix

  def lm_params(self, params: Any, frozen: Frozen) -> Any:
    """The language model's, wherever they are."""
    return params['lm'] if frozen.lm is None else frozen.lm

  def _apply(self, params: Any, frozen: Frozen, *args: Any, **kwargs: Any) -> Any:
    return self.lm.apply({'params': self.lm_params(params, frozen)}, *args, **kwargs)


def _starts(weights: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
  """[B, T] bool, where a run of targets begins: weights, segments."""
  here = weights > 0
  goes_on = jnp.pad(here[:, :-1], ((0, 0), (1, 0)))
  if segment_ids is not None:
    before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    goes_on &= segment_ids == before
  return here & ~goes_on

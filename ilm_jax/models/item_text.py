"""Phase 1: an item encoder learns to say in language what the CF vectors know.

Item-text batches train ITC + ITM + ITG, pair batches train II or UI (paper sections 3.1, 3.2).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ilm_jax.models import losses
from ilm_jax.models.losses import Metrics
from ilm_jax.modules.histories import UserHistories
from ilm_jax.modules.item_text import ItemTextEncoder
from ilm_jax.modules.qformer import QFormerConfig

ITEM_TEXT, ITEM_ITEM, USER_ITEM = 'item_text', 'item_item', 'user_item'
# Metric names of the pair losses.
_PAIR_LOSSES = {ITEM_ITEM: 'ii', USER_ITEM: 'ui'}


@dataclasses.dataclass(frozen=True)
class ItemTextConfig:
  """What phase 1 trains on; weights of 0 leave a loss out.

  Attributes:
    itc_weight, itm_weight, itg_weight, pair_weight: of the losses.
    itc_smoothing, itg_smoothing: label smoothing.
    itc_temperature, pair_temperature: where the learned temperatures begin. .07 is worse than
      chance for pairs of CF vectors; .2 to .5 works.
    min_temperature, max_temperature: the learned temperatures are clamped to these.
    num_features: width of the contrastive features.
    text_pooling: what of a text is compared with queries: the state of [CLS] ('cls', BLIP-2's way),
      or the mean over its tokens ('mean', which sentence encoders such as MiniLM were trained for).
    false_negatives: of pairs: 'batch' masks items of the same user in the batch; 'history' masks
      every item of the user's training history, which needs the histories on every device.
  """

  itc_weight: float = 1.0
  itm_weight: float = 1.0
  itg_weight: float = 1.0
  pair_weight: float = 1.0
  itc_smoothing: float = 0.1
  itg_smoothing: float = 0.1
  itc_temperature: float = 0.07
  pair_temperature: float = 0.2
  min_temperature: float = 0.01
  max_temperature: float = 1.0
  num_features: int = 256
  text_pooling: str = 'cls'
  false_negatives: str = 'history'

  def __post_init__(self):
    for name, allowed in (
      ('text_pooling', ('mean', 'cls')),
      ('false_negatives', ('batch', 'history')),
    ):
      if getattr(self, name) not in allowed:
        raise ValueError(f'{name}={getattr(self, name)!r}: one of {", ".join(map(repr, allowed))}.')


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
  """Token ids that the text branch adds: `cls` begins a text, `dec` a text to be generated."""

  cls: int
  dec: int
  eos: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
  """What is on the device and never trained.

  Attributes:
    entity_vectors: [num_entities or more, d_cf], items first.
    histories: None where `false_negatives` is 'batch'.
  """

  entity_vectors: Any
  histories: UserHistories | None


class ItemTextModel:
  """Losses and features of phase 1 as functions of parameters and batches.

  A batch of source 'item_text' has text_tokens, text_mask [B, T] and entity_ids [B, 1]; one of
  'item_item' or 'user_item' has entity_ids [B, 3]: left, right, and the user they come from
  (EntityTextFeatureConverter).
  """

  def __init__(
    self, encoder: QFormerConfig, config: ItemTextConfig, tokens: SpecialTokens, num_items: int
  ):
    self.config = config
    self.tokens = tokens
    self.num_items = num_items
    temperatures = {'itc': config.itc_temperature}
    temperatures |= dict.fromkeys(_PAIR_LOSSES.values(), config.pair_temperature)
    self.module = ItemTextEncoder(
      encoder, config.num_features, tuple(temperatures.items()), config.text_pooling
    )

  def init(self, key: jax.Array) -> Any:
    """Parameters, boxed with their logical axes."""
    encoder = self.module.config
    vectors = jnp.zeros((1, encoder.d_encoder))
    return self.module.init(key, vectors, jnp.zeros((1, 2), jnp.int32))['params']

  def loss(
    self,
    params: Any,
    frozen: Frozen,
    batch: Mapping[str, jax.Array],
    key: jax.Array,
    *,
    source: str,
    deterministic: bool = False,
  ) -> tuple[jax.Array, Metrics]:
    """The loss of a batch and its metrics, all scalars.

    Args:
      params: as of `init`, unboxed.
      frozen: constants.
      batch: global arrays; see the class.
      key: of dropout and of the hard negatives.
      source: 'item_text', 'item_item' or 'user_item'.
      deterministic: without dropout.
    """
    if source == ITEM_TEXT:
      return self._item_text_loss(params, frozen, batch, key, deterministic)
    return self._pair_loss(params, frozen, batch, key, _PAIR_LOSSES[source], deterministic)

  def encode_entities(self, params: Any, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Query outputs [B, K, D] and unit features [B, K, F] of vectors [B, d_cf]."""
    queries = self._apply(params, None, 'queries', vectors)
    return queries, self._query_features(params, queries)

  def encode_texts(self, params: Any, text_tokens: jax.Array, text_mask: jax.Array) -> jax.Array:
    """Unit features [B, F] of texts [B, T]."""
    tokens, mask, _ = self.with_special_tokens(text_tokens, text_mask)
    return losses.normalise(self._apply(params, None, 'text_features', tokens, mask))

  def text_nll(
    self, params: Any, vectors: jax.Array, text_tokens: jax.Array, text_mask: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Sum of -log p of the texts' tokens (EOS included) given the entities, and their number."""
    tokens, mask, targets = self.with_special_tokens(text_tokens, text_mask)
    weights = mask * (text_mask.sum(axis=1, keepdims=True) > 0)
    _, metrics = self._generate(params, None, vectors, tokens, weights, targets)
    count = weights[:, 1:].sum()
    return metrics['nll'] * count, count

  def _item_text_loss(self, params, frozen, batch, key, deterministic):
    c = self.config
    items = batch['entity_ids'][:, 0]
    vectors = frozen.entity_vectors[items]
    tokens, mask, targets = self.with_special_tokens(batch['text_tokens'], batch['text_mask'])
    itc_key, itm_key, itg_key, entity_key, text_key = jax.random.split(key, 5)
    dropout = _dropout(None if deterministic else itc_key)

    queries = self._apply(params, dropout('queries'), 'queries', vectors)
    text = self._apply(params, dropout('text'), 'text_features', tokens, mask)
    same = items[:, None] == items[None, :]
    scores = losses.similarity(
      self._query_features(params, queries), losses.normalise(text)[:, None]
    ) / self._temperature(params, 'itc')
    itc, metrics = losses.contrastive(scores, same, label_smoothing=c.itc_smoothing)
    parts = {'itc': (c.itc_weight, itc, metrics)}

    if c.itm_weight:
      # Easy negatives would be told apart by anything: take those that ITC confuses.
      fixed = jax.lax.stop_gradient(scores)
      texts, has_text = losses.sample_hard_negatives(text_key, fixed, same)
      entities, has_entity = losses.sample_hard_negatives(entity_key, fixed.T, same)
      logits = self._apply(
        params,
        None if deterministic else itm_key,
        'match_logits',
        jnp.concatenate([vectors, vectors[entities], vectors]),
        jnp.concatenate([tokens, tokens, tokens[texts]]),
        jnp.concatenate([mask, mask, mask[texts]]),
      )
      everywhere = jnp.ones(items.shape, bool)
      parts['itm'] = (
        c.itm_weight,
        *losses.matching(
          logits,
          jnp.concatenate([everywhere, ~everywhere, ~everywhere]),
          jnp.concatenate([everywhere, has_entity, has_text]).astype(jnp.float32),
        ),
      )
    if c.itg_weight:
      generation = self._generate(
        params, None if deterministic else itg_key, vectors, tokens, mask, targets
      )
      parts['itg'] = (c.itg_weight, *generation)
    extra = {
      'itc/temperature': self._temperature(params, 'itc'),
      'query_collapse': losses.query_collapse(queries),
    }
    return _total(parts, extra)

  def _pair_loss(self, params, frozen, batch, key, name, deterministic):
    left, right, users = batch['entity_ids'].T
    dropout = _dropout(None if deterministic else key)
    features = [
      self._query_features(
        params, self._apply(params, dropout(side), 'queries', frozen.entity_vectors[entities])
      )
      for side, entities in (('left', left), ('right', right))
    ]
    temperature = self._temperature(params, name)
    loss, metrics = losses.contrastive(
      losses.similarity(*features) / temperature,
      self.pair_false_negatives(frozen, left, right, users),
    )
    return _total(
      {name: (self.config.pair_weight, loss, metrics)}, {f'{name}/temperature': temperature}
    )

  def pair_false_negatives(
    self, frozen: Frozen, left: jax.Array, right: jax.Array, users: jax.Array
  ) -> jax.Array:
    """[B, B]: whether right[j] is no negative of left[i]: another positive, as far as is known."""
    same = [
      left[:, None] == left[None, :],
      right[:, None] == right[None, :],
      users[:, None] == users[None, :],
    ]
    if frozen.histories is not None:
      same.append(frozen.histories.contains(users - self.num_items, right))
    return jnp.stack(same).any(axis=0)

  def with_special_tokens(
    self, text_tokens: jax.Array, text_mask: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[CLS] t1 .. tn [EOS] with its mask, and the targets of its positions when [DEC] is first.

    text_tokens  [7, 8, 0]   ->   tokens [CLS, 7, 8, EOS, 0]   mask [1, 1, 1, 1, 0]
                                  targets [7, 8, EOS, 0, 0], counted where mask[:, 1:] is 1
    """
    rows = len(text_tokens)
    lengths = text_mask.sum(axis=1)
    body = jnp.pad(jnp.where(text_mask != 0, text_tokens, 0), ((0, 0), (0, 1)))
    body = jnp.where(jnp.arange(body.shape[1]) == lengths[:, None], self.tokens.eos, body)
    tokens = jnp.concatenate([jnp.full((rows, 1), self.tokens.cls), body], axis=1)
    mask = jnp.arange(tokens.shape[1]) < lengths[:, None] + 2
    return tokens, mask.astype(jnp.int32), body

  def _generate(self, params, key, vectors, tokens, mask, targets):
    """ITG on what `with_special_tokens` made; `mask` says what counts."""
    inputs = tokens[:, :-1].at[:, 0].set(self.tokens.dec)
    states = self._apply(params, key, 'generation_states', vectors, inputs, mask[:, :-1])
    return losses.generation(
      states,
      params['qformer']['word_embedder']['embedding'],
      targets,
      mask[:, 1:],
      label_smoothing=self.config.itg_smoothing,
      bf16_matmul=self.module.config.bf16_matmul,
    )

  def _query_features(self, params: Any, queries: jax.Array) -> jax.Array:
    return losses.normalise(self._apply(params, None, 'query_features', queries))

  def _temperature(self, params, name):
    low, high = jnp.log(self.config.min_temperature), jnp.log(self.config.max_temperature)
    return jnp.exp(losses.clamp(params[f'log_temperature_{name}'], low, high))

  def _apply(self, params: Any, key: jax.Array | None, method: str, *inputs: jax.Array) -> Any:
    """Runs one method of the module, with dropout if there is a key."""
    kwargs = {} if method == 'query_features' else {'deterministic': key is None}
    rngs = None if key is None else {'dropout': key}
    return self.module.apply({'params': params}, *inputs, method=method, rngs=rngs, **kwargs)


def _dropout(key: jax.Array | None):
  """Returns a function that gives each pass, by its name, a key of its own (or no dropout)."""
  names = {'queries': 0, 'text': 1, 'left': 0, 'right': 1}
  return lambda name: None if key is None else jax.random.fold_in(key, names[name])


def _total(
  parts: Mapping[str, tuple[float, jax.Array, Metrics]], extra: Metrics
) -> tuple[jax.Array, Metrics]:
  """The weighted sum, and all metrics under the names of their losses."""
  total = sum((weight * loss for weight, loss, _ in parts.values()), jnp.zeros(()))
  metrics = {'loss': total, **extra}
  for name, (_, loss, details) in parts.items():
    metrics |= {f'{name}/loss': loss} | {f'{name}/{key}': value for key, value in details.items()}
  return total, metrics

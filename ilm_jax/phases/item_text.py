"""Phase 1 put together: item texts and pairs, the item encoder, retrieval of held-out items."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ilm_jax.checkpoints import bert
from ilm_jax.config.types import make_dataclass
from ilm_jax.data.prepared_records import load_prepared
from ilm_jax.data.text import vocabularies
from ilm_jax.data.text.entity_text import check_form
from ilm_jax.errors import UsageError, did_you_mean
from ilm_jax.metrics.retrieval import Retrieval, retrieval_from_features
from ilm_jax.models.item_text import (
  ITEM_ITEM,
  ITEM_TEXT,
  USER_ITEM,
  Frozen,
  ItemTextConfig,
  SpecialTokens,
)
from ilm_jax.modules.histories import UserHistories
from ilm_jax.modules.qformer import HOW_IT_RUNS
from ilm_jax.phases.item_text_steps import ItemTextSteps, encoder_config
from ilm_jax.phases.phase import (
  HostBatch,
  InputOptions,
  Phase,
  Reader,
  boxed_vectors,
  input_shards,
  load_table,
  open_reader,
)
from ilm_jax.runtime.sharding import fetch, place_batch
from ilm_jax.runtime.tensorflow import import_tensorflow


@dataclasses.dataclass(frozen=True)
class ItemTextData:
  """What phase 1 reads.

  Attributes:
    item_text: the text of an item, of `{title}` and the other text fields.
    vocabulary: of the text branch: 'minilm', a tokenizer.json, a SentencePiece .model, or 'bytes'.
    max_text_tokens: longer texts are cut.
    eval_pairs: most pairs of each kind that an evaluation looks at.
    eval_batch_size: rows of an evaluation's batches, among which pairs find their negatives; the
      largest of the training's by default.
  """

  item_text: str = '{title}'
  vocabulary: str = 'minilm'
  max_text_tokens: int = 64
  eval_pairs: int = 1024
  eval_batch_size: int | None = None


class ItemTextPhase(Phase):
  """Phase 1. Sources: item_text (ITC, ITM, ITG), item_item (II), user_item (UI)."""

  name = 'item_text'
  OPTIONS = ('item_encoder', 'losses', 'text')
  best_metric = 'item_text/item_to_text/R@10'
  best_mode = 'max'
  headline = (
    'item_text/item_to_text/R@10',
    'item_text/item_to_text/R@10/chance',
    'item_text/text_to_item/R@10',
    'item_text/itg/perplexity',
    'item_text/itg/perplexity/shuffled',
  )

  def __init__(
    self,
    inputs: InputOptions,
    *,
    item_encoder: Mapping[str, Any],
    losses: Mapping[str, Any],
    text: Mapping[str, Any],
  ):
    """Loads the data; its SeqIO tasks are registered when one is read.

    Args:
      inputs: data set, entity table, batch sizes.
      item_encoder: 'size' (one of `qformer.SIZES`), any field of QFormerConfig but those that the
        data decide, and 'init_from': a BERT checkpoint ('minilm' or a path).
      losses: fields of ItemTextConfig.
      text: fields of ItemTextData.

    Raises:
      UsageError: an option is unknown, or does not fit the data.
    """
    self._inputs = inputs
    self.prepared = load_prepared(inputs.data)
    self.table = load_table(inputs, self.prepared)
    self._text = make_dataclass(ItemTextData, text, 'train.text')
    self._vocabulary = text_vocabulary(self._text.vocabulary)
    encoder = dict(item_encoder)
    self._init_from = encoder.pop('init_from', None)
    vocab_size = self._vocabulary.vocab_size
    self._encoder = encoder_config(encoder, d_cf=self.table.dim, vocab_size=vocab_size)
    self._config = make_dataclass(ItemTextConfig, losses, 'train.losses')
    vocabulary = self._vocabulary
    self.steps = ItemTextSteps(
      self._encoder,
      self._config,
      SpecialTokens(cls=vocabulary.bos_id, dec=vocab_size, eos=vocabulary.eos_id),
      num_items=self.prepared.num_items,
      max_text_tokens=self._text.max_text_tokens,
    )
    self.model = self.steps.model
    check_form(self._text.item_text, self.prepared)
    use_histories = self._config.false_negatives == 'history'
    self.frozen = Frozen(
      boxed_vectors(self.table, inputs),
      UserHistories.of(self.prepared.offsets, self.prepared.items) if use_histories else None,
    )
    self.identity = self._identity()

  def sources(self) -> tuple[str, ...]:
    return (ITEM_TEXT, ITEM_ITEM, USER_ITEM)

  def reader(self, source: str, start_step: int, position: np.ndarray | None) -> Reader:
    return open_reader(
      self._task(source),
      self._inputs,
      source,
      lengths=self.steps.lengths(source),
      converter=self.steps.converter(),
      start_step=start_step,
      position=position,
    )

  def batch_shapes(self, source: str, rows: int) -> dict[str, tuple[int, ...]]:
    return self.steps.batch_shapes(source, rows)

  def init(self, key: jax.Array) -> Any:
    return self.model.init(key)

  def load_pretrained(self, params: Any, report: Callable[[str], None]) -> Any:
    if self._init_from is None:
      return params
    files = bert.bert_files(self._init_from)
    qformer, loaded = bert.init_qformer_from_bert(
      params['qformer'], bert.load_bert(files.weights), files.config, str(files.weights)
    )
    report(str(loaded))
    return {**params, 'qformer': qformer}

  def loss(self, params, frozen, batch, key, source):
    return self.model.loss(params, frozen, batch, key, source=source)

  def count(self, source: str, batch: HostBatch) -> dict[str, int]:
    # A text is predicted with its EOS.
    tokens = int(batch['text_mask'].sum()) + len(batch['text_mask']) if source == ITEM_TEXT else 0
    return {'examples': len(batch['entity_ids']), 'target_tokens': tokens}

  def flops(self, params: Any, frozen: Any, batch: HostBatch, source: str) -> int:
    return self.steps.flops(params, frozen, batch, source)

  def evaluate(self, params: Any, frozen: Any) -> dict[str, float]:
    """Held-out items: retrieval among them, perplexity of their texts; held-out pairs.

    Chance, the raw CF vectors' own scores, and the perplexity with the vectors of other items stand
    beside what they are to be compared with.
    """
    ways, perplexities = self.evaluate_items(params, frozen)
    metrics = {f'item_text/itg/{name}': value for name, value in perplexities.items()}
    for way, result in ways.items():
      for name, values in result.metrics.items():
        metrics[f'item_text/{way}/{name}'] = float(values.mean())
        metrics[f'item_text/{way}/{name}/chance'] = result.chance[name]
    for source in (ITEM_ITEM, USER_ITEM):
      metrics |= self._evaluate_pairs(params, frozen, source)
    return metrics

  def evaluate_items(
    self, params: Any, frozen: Any, split: str = 'validation'
  ) -> tuple[dict[str, Retrieval], dict[str, float]]:
    """Retrieval between the items of a split and their texts, and ITG's perplexity.

    Returns:
      Results by direction, 'item_to_text' and 'text_to_item'; and a token's 'perplexity', given its
      own item and ('perplexity/shuffled') another one. What they have in common is of the language
      model alone.
    """
    items, texts, rows, sums = [], [], [], np.zeros(3)
    for batch, mask in self._read_once(ITEM_TEXT, split):
      outputs = fetch(self._item_features(params, frozen, batch))
      items.append(outputs['items'][mask])
      texts.append(outputs['texts'][mask])
      rows.extend(outputs['tokens_of_text'][mask].tolist())
      sums += [outputs['nll'], outputs['nll_shuffled'], outputs['tokens']]
    results = retrieval_from_features(
      np.concatenate(items), np.concatenate(texts), same=[str(row) for row in rows]
    )
    own, shuffled = np.exp(sums[:2] / max(sums[2], 1)).tolist()
    return results, {'perplexity': own, 'perplexity/shuffled': shuffled}

  @functools.cached_property
  def _item_features(self):
    return jax.jit(self.steps.item_features)

  def _evaluate_pairs(self, params: Any, frozen: Any, source: str) -> dict[str, float]:
    found = []
    for batch, mask in self._read_once(source, 'validation'):
      # Only whole batches: chance, log(batch size), is part of what is measured.
      if not mask.all() or len(found) * len(mask) >= self._text.eval_pairs:
        break
      found.append(fetch(self._pair_metrics(params, frozen, batch, source)))
    if not found:
      warnings.warn(
        f'no metrics of {source}: its validation split has fewer pairs than a batch. Set'
        ' train.text.eval_batch_size to fewer.',
        stacklevel=2,
      )
      return {}
    mean = {name: float(np.mean([each[name] for each in found])) for name in found[0]}
    by_temperature = np.mean([each['cf_gains'] for each in found], axis=0)
    del mean['cf_gains']
    return {f'{source}/{name}': value for name, value in mean.items()} | {
      f'{source}/raw_cf/gain': float(by_temperature.max())
    }

  @functools.cached_property
  def _pair_metrics(self):
    return jax.jit(self.steps.pair_metrics, static_argnames='source')

  def _read_once(
    self, source: str, split: str
  ) -> Iterator[tuple[dict[str, jax.Array], np.ndarray]]:
    """Global batches, and which of their rows are no padding."""
    if (source, split) not in self._batches_read:
      task = self._task(source)
      from ilm_jax.data.input.reader import Kept, read_once

      rows = self._text.eval_batch_size or max(self._inputs.batch_size.values())
      self._batches_read[source, split] = Kept(
        read_once(
          task,
          split=split,
          task_feature_lengths=self.steps.lengths(source),
          converter=self.steps.converter(),
          shards=input_shards(rows, self._inputs.mesh),
        )
      )
    for batch in self._batches_read[source, split]:
      placed = place_batch(batch, self._inputs.mesh)
      yield placed, fetch(placed.pop('example_mask'))

  @functools.cached_property
  def _batches_read(self) -> dict[tuple[str, str], Iterable[dict[str, np.ndarray]]]:
    return {}

  def _task(self, source: str) -> str:
    """The SeqIO task of a source."""
    return f'{self._registered}_{source}'

  @functools.cached_property
  def _registered(self) -> str:
    """The data set whose SeqIO tasks are registered. It imports TensorFlow, which takes seconds."""
    import_tensorflow()
    from ilm_jax.tasks.recommendation import register_item_language_tasks

    register_item_language_tasks(
      self.prepared,
      self._vocabulary,
      item_text=self._text.item_text,
      max_text_tokens=self._text.max_text_tokens,
    )
    return self.prepared.name

  def _identity(self) -> dict[str, Any]:
    encoder = dataclasses.asdict(self._encoder)
    return {
      'model': {
        'name': self.name,
        'item_encoder': {k: v for k, v in encoder.items() if k not in HOW_IT_RUNS},
        'num_features': self._config.num_features,
        'text_pooling': self._config.text_pooling,
        'vocabulary': self._text.vocabulary,
      },
      'data': {'name': self.prepared.name, 'fingerprint': self.prepared.fingerprint},
      'entity_table': {'content_hash': self.table.content_hash},
    }


def text_vocabulary(name: str) -> Any:
  """The vocabulary of the text branch: see ItemTextData.

  Raises:
    UsageError: there is none by that name.
  """
  if name == 'bytes':
    return vocabularies.ByteVocabulary()
  if name.endswith('.model'):
    return vocabularies.SentencePieceVocabulary(name)
  if name in bert.PACKAGES:
    return vocabularies.HuggingFaceVocabulary(str(bert.bert_files(name).tokenizer))
  if name.endswith('.json'):
    return vocabularies.HuggingFaceVocabulary(name)
  known = ['bytes', *bert.PACKAGES]
  raise UsageError(
    f'train.text.vocabulary={name!r}: one of {", ".join(known)}, or a file: a tokenizer.json, a'
    f' SentencePiece .model.{did_you_mean(name, known)}'
  )

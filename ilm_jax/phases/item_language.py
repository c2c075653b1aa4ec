"""Phase 2 put together: prompts and histories, a frozen language model, soft tokens, ranking."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ilm_jax.catalogue.trie import Trie, build_trie
from ilm_jax.cf import rankers
from ilm_jax.cf.rankers import Sequences
from ilm_jax.checkpoints.handoff import hand_over
from ilm_jax.config.types import make_dataclass
from ilm_jax.data.input.row_table import RowTable
from ilm_jax.data.input.trimming import without_padding
from ilm_jax.data.prepared_records import load_prepared
from ilm_jax.data.text import prompts
from ilm_jax.data.text.entity_text import EntityText
from ilm_jax.data.text.text_tokens import TextTokens
from ilm_jax.decoding.calibration import edge_bias, neutral_log_probs, popularity_bias
from ilm_jax.decoding.exact import ScoringPlan, scoring_plan
from ilm_jax.decoding.generator import bucket
from ilm_jax.errors import UsageError, did_you_mean
from ilm_jax.lm.load import LanguageModel, load_lm
from ilm_jax.models.item_language import Frozen, ItemLanguageConfig
from ilm_jax.modules.attention import Cache
from ilm_jax.modules.decoder import Decoder, LayerByLayer
from ilm_jax.modules.qformer import HOW_IT_RUNS
from ilm_jax.modules.readout import log_popularity
from ilm_jax.modules.user_states import UserStates
from ilm_jax.phases.adaptor_start import begin_at_words, words_of_items
from ilm_jax.phases.item_language_options import (
  ItemLanguageData,
  LmOptions,
  lm_compute,
  soft_token_config,
  template_file,
)
from ilm_jax.phases.item_language_steps import ITEM_SEQUENCE, ItemLanguageSteps
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
from ilm_jax.runtime.progress import Done, ignore
from ilm_jax.runtime.sharding import fetch, place_batch, place_rows, rows_for
from ilm_jax.runtime.tensorflow import import_tensorflow
from ilm_jax.tasks.names import FORMS, names_of

_TEXT_BRANCH = {'vocab_size', 'max_text_length'}


class ItemLanguagePhase(Phase):
  """Phase 2. Sources: 'item_sequence' (the readout), and every SeqIO task or mixture.

  `sequential_seen_title` stands for the data set's own `<name>_sequential_seen_title`.
  """

  name = 'item_language'
  OPTIONS = ('item_encoder', 'losses', 'text', 'lm')

  def __init__(
    self,
    inputs: InputOptions,
    *,
    item_encoder: Mapping[str, Any],
    losses: Mapping[str, Any],
    text: Mapping[str, Any],
    lm: Mapping[str, Any],
  ):
    """Loads the data and the language model; SeqIO's tasks are registered when one is asked for.

    Args:
      inputs: data set, entity table, batch sizes, mesh.
      item_encoder: 'kind' ('qformer', 'mlp', or 'none': text only); 'init_from', a run of phase 1;
        'normalise' and 'skip' (see SoftTokenConfig); 'adaptor_text', text fields at whose words the
        adaptor begins (adaptor_start.py); 'size' and the fields of QFormerConfig, or the fields of
        MlpConfig.
      losses: fields of ItemLanguageConfig.
      text: fields of ItemLanguageData.
      lm: fields of LmOptions.

    Raises:
      UsageError: an option is unknown, or does not fit the data or the language model.
    """
    self.inputs = inputs
    self.prepared = load_prepared(inputs.data)
    self.table = load_table(inputs, self.prepared)
    self.text = make_dataclass(ItemLanguageData, text, 'train.text')
    self.config = make_dataclass(ItemLanguageConfig, losses, 'train.losses')
    if 'name' not in lm:
      raise UsageError("train.lm: {'name': ...} is missing: which language model?")
    self._lm_options = make_dataclass(LmOptions, lm, 'train.lm')
    self.lm = self._load_lm()
    self.vocabulary = self.lm.vocabulary
    encoder = dict(item_encoder)
    self._init_from = encoder.pop('init_from', None)
    self._adaptor_text = tuple(encoder.get('adaptor_text', ()))
    self.soft_tokens = soft_token_config(
      encoder,
      self.text,
      self._lm_options,
      d_model=self.lm.module.config.d_model,
      gain=self.lm.embedding_rms,
      d_cf=self.table.dim,
    )
    begin = self.lm.prompt_tokens(self.text.prefix)
    if not begin:
      begin = [self.vocabulary.bos_id]
    # Every example begins with one token that predicts its first: the last of the prefix.
    self.first_token, self._prefix_tokens = begin[-1], tuple(begin[:-1])
    if self.lm.has_encoder:
      if self.text.prefix:
        raise UsageError('train.text.prefix: an encoder-decoder has none; put it into templates.')
      self.first_token, self._prefix_tokens = self.vocabulary.bos_id, ()
    self.steps = ItemLanguageSteps(
      self.lm.module,
      self.soft_tokens,
      config=self.config,
      text=self.text,
      lm_options=self._lm_options,
      slot_id=self.vocabulary.slot_id,
      num_items=self.prepared.num_items,
      first_token=self.first_token,
      prefix_tokens=self._prefix_tokens,
    )
    self.model = self.steps.model
    self.texts = TextTokens(
      self.prepared,
      self.vocabulary,
      dataset=self.text.dataset,
      max_text_tokens=self.text.max_text_tokens,
    )
    self.entity_text: EntityText = FORMS[self.text.form]
    self._check_sources_of_options()
    self.counts = np.bincount(self.prepared.items, minlength=self.prepared.num_items)
    self.frozen = self._freeze()
    self.identity = self._identity()
    self.best_metric, self.best_mode, self.headline = self._best()

  # ---- what the train loop asks for

  def sources(self) -> tuple[str, ...]:
    own = f'{self.prepared.name}_'
    found = [name.removeprefix(own) for name in self._prompts()]
    return (*([ITEM_SEQUENCE] if self.config.readout else []), *found)

  def has_source(self, name: str) -> bool:
    if name == ITEM_SEQUENCE:
      return self.config.readout
    own = names_of(
      self.prepared.name, self.templates, has_ratings=self.prepared.ratings is not None
    )
    mine = f'{self.prepared.name}_{name}'
    return mine in own.tasks or mine in own.mixtures or name in self.sources()

  def reader(self, source: str, start_step: int, position: np.ndarray | None) -> Reader:
    return open_reader(
      self._provider(source),
      self.inputs,
      source,
      lengths=self.steps.lengths(source),
      converter=self.steps.converter(source, pack=self.text.pack),
      start_step=start_step,
      position=position,
    )

  def batch_shapes(self, source: str, rows: int) -> dict[str, tuple[int, ...]]:
    return self.steps.batch_shapes(source, rows, pack=self.text.pack)

  def init(self, key: jax.Array) -> Any:
    return self.steps.init(key)

  def load_pretrained(self, params: Any, report: Callable[[str], None]) -> Any:
    if self._lm_options.trained:
      params = {**params, 'lm': jax.tree.map(_like, self.lm.params, params['lm'])}
      report(f'{self.lm.name}: trained too')
    if self._init_from is not None:
      params, what = hand_over(self._init_from, params, identity=self.identity)
      report(what)
    if self._adaptor_text:
      assert self.soft_tokens is not None
      params = begin_at_words(
        self.soft_tokens,
        params,
        self.table.encoder_tokens[: self.prepared.num_items],
        words_of_items(self.prepared, self._adaptor_text, self.vocabulary),
        lambda ids: self.lm.embed(ids[None])[0],
      )
      report(f'adaptor: begins at the words of {", ".join(self._adaptor_text)}')
    return params

  def loss(self, params, frozen, batch, key, source):
    return self.steps.loss(params, frozen, batch, key, source)

  def count(self, source: str, batch: HostBatch) -> dict[str, int]:
    if source == ITEM_SEQUENCE:
      ids = batch['entity_ids']
      return {'examples': len(ids), 'target_tokens': int((ids[:, 1:] >= 0).sum())}
    segments = batch.get('decoder_segment_ids')
    examples = len(batch['entity_ids']) if segments is None else segments.max(axis=1).sum()
    tokens = int(batch['decoder_loss_weights'].sum())
    return {'examples': int(examples), 'target_tokens': tokens}

  def flops(self, params: Any, frozen: Any, batch: HostBatch, source: str) -> int:
    return self.steps.flops(params, frozen, batch, source)

  def evaluate(self, params: Any, frozen: Any) -> dict[str, float]:
    """The ranking of validation items by the readout, and the loss of each task of the schedule."""
    metrics: dict[str, float] = {}
    for source in self.inputs.batch_size:
      if source == ITEM_SEQUENCE:
        found = self.evaluate_readout(params, frozen, 'validation')
        metrics |= {f'readout/{name}': i.mean for name, i in found.intervals.items()}
      else:
        for task in self.tasks_of(source):
          loss = self.steps.target_loss(source)
          nll, tokens = self.task_nll(params, frozen, task, 'validation', target_loss=loss)
          own = task.removeprefix(f'{self.prepared.name}_')
          metrics[f'{own}/loss'] = float(nll.sum() / max(tokens.sum(), 1))
    losses = [value for name, value in metrics.items() if name.endswith('/loss')]
    if losses:
      metrics['loss'] = float(np.mean(losses))
    return metrics

  # ---- what evaluation and recommendation ask for as well

  def evaluate_readout(self, params: Any, frozen: Any, split: str) -> rankers.Evaluation:
    """Ranks by the readout, seen items removed."""
    scores = self.readout_scorer(params, frozen)
    history = rankers.histories(self.prepared, split)
    return rankers.evaluate_scores(
      'readout', lambda users: scores(history, users), self.prepared, split
    )[0]

  def readout_scorer(
    self,
    params: Any,
    frozen: Any,
    *,
    candidates: tuple[Any, Any] | None = None,
    done: Done = ignore,
  ) -> Callable[[Sequences, np.ndarray], np.ndarray]:
    """(histories, users [n]) -> scores [n, num_items]; a history that is empty gets popularity.

    Args:
      params, frozen: the model's.
      candidates: parameters and constants that encode what is compared with, where a control is
        to change the soft tokens alone.
      done: is told how many more users have their scores.
    """
    vectors = self._item_vectors(*(candidates or (params, frozen)))
    length, most = self.text.sequence_length, self._eval_rows()

    def scores(history: Sequences, users: np.ndarray) -> np.ndarray:
      found = np.empty((len(users), self.prepared.num_items), np.float32)
      # One history does not wait for rows of padding.
      rows = min(most, rows_for(bucket(len(users), least=1), self.inputs.mesh))
      for start in range(0, len(users), rows):
        some = users[start : start + rows]
        ids = np.full((rows, length), -1, np.int32)
        for row, user in zip(ids, some):
          items = history.items[history.offsets[user] : history.offsets[user + 1]][-length:]
          row[: len(items)] = items
        placed = place_rows(ids, self.inputs.mesh)
        out = fetch(self._readout(params, frozen, placed, vectors))[: len(some)]
        empty = np.all(ids[: len(some)] < 0, axis=1)
        found[start : start + rows] = np.where(empty[:, None], np.log(self.counts + 1.0), out)
        done(len(some))
      return found

    return scores

  @functools.cached_property
  def _item_vectors(self):
    return jax.jit(self.steps.item_vectors)

  @functools.cached_property
  def _readout(self):
    if self._layers is None:
      return jax.jit(self.steps.readout)
    return self.steps.readout_by_layer(self._layers)

  @functools.cached_property
  def _layers(self) -> LayerByLayer | None:
    """How what runs the language model once or a few times does it; None: in one program."""
    lm = self.lm.module
    if not isinstance(lm, Decoder) or lm.compute.scan_layers or self._lm_options.trained:
      return None
    return LayerByLayer(lm)

  def task_nll(
    self,
    params: Any,
    frozen: Any,
    task: str,
    split: str,
    *,
    most: int | None = None,
    target_loss: str,
    done: Done = ignore,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Of each example of a task: the sum of -log p of its target tokens, and their number.

    Args:
      params, frozen: the model's.
      task: a SeqIO task of prompts.
      split: of it.
      most: examples, at most; by default `eval_examples`.
      target_loss: 'vocabulary' or 'catalogue'.
      done: is told how many more examples are measured.
    """
    most = most or self.text.eval_examples
    nll, tokens, measured = [], [], 0
    for batch, mask in self.read_once(task, split):
      found = fetch(self._task_nll(params, frozen, batch, target_loss=target_loss))
      nll.append(found[0][mask])
      tokens.append(found[1][mask])
      done(min(len(nll[-1]), most - measured))
      measured += len(nll[-1])
      if measured >= most:
        break
    return np.concatenate(nll), np.concatenate(tokens)

  @functools.cached_property
  def _task_nll(self):
    return jax.jit(self.steps.task_nll, static_argnames='target_loss')

  def read_once(self, task: str, split: str) -> Iterator[tuple[dict[str, jax.Array], np.ndarray]]:
    """Global batches of a task, not packed, and which of their rows are no padding."""
    if (task, split) not in self._batches_read:
      seqio_name = self._provider(task)
      from ilm_jax.data.input.reader import Kept, read_once

      self._batches_read[task, split] = Kept(
        read_once(
          seqio_name,
          split=split,
          task_feature_lengths=self.steps.lengths(task),
          converter=self.steps.converter(task, pack=False),
          shards=input_shards(self._eval_rows(), self.inputs.mesh),
        )
      )
    for batch in self._batches_read[task, split]:
      placed = place_batch(without_padding(batch), self.inputs.mesh)
      yield placed, fetch(placed.pop('example_mask'))

  @functools.cached_property
  def _batches_read(self) -> dict[tuple[str, str], Iterable[dict[str, np.ndarray]]]:
    return {}

  def own_prompts(self) -> tuple[str, ...]:
    """Sources of prompts about this data set, without its name."""
    own = f'{self.prepared.name}_'
    return tuple(x.removeprefix(own) for x in self._prompts() if x.startswith(own))

  def tasks_of(self, source: str, split: str = 'validation') -> list[str]:
    """The SeqIO tasks of a source that have a split with examples."""
    provider = self.seqio.get_mixture_or_task(self._provider(source))
    tasks = provider.tasks if isinstance(provider, self.seqio.Mixture) else [provider]
    return [
      task.name
      for task in tasks
      if split in task.splits and task.num_input_examples(split) not in (None, 0)
    ]

  @functools.cached_property
  def trie(self) -> Trie:
    """The catalogue's texts as targets: with a space before, and EOS."""
    spaced = not self.lm.has_encoder
    rows = self.texts.rows('item', self.entity_text, spaced=spaced, first=not spaced)
    eos = self.vocabulary.eos_id
    texts = [
      [*rows.tokens[start:end].tolist(), eos]
      for start, end in zip(rows.offsets[:-1], rows.offsets[1:])
    ]
    return build_trie(texts, eos)

  @functools.cached_property
  def plan(self) -> ScoringPlan:
    """How all of the catalogue is scored."""
    return scoring_plan(self.trie)

  @functools.cached_property
  def templates(self) -> list[prompts.Template]:
    """All prompt templates of the run."""
    return prompts.read_templates(
      template_file(self.text.templates),
      dataset=self.texts.dataset,
      fields=self.prepared.item_text,
    )

  def item_prompts(self) -> dict[str, str]:
    """Text field -> the first prompt that asks for it, of the soft tokens of one '{item}'."""
    found: dict[str, str] = {}
    for template in self.templates:
      slots = [part for part in template.prompt if not isinstance(part, str)]
      asked = [part.name for part in template.target if not isinstance(part, str)]
      about_one = [(slot.name, slot.mode) for slot in slots] == [('item', 'soft')]
      if about_one and len(asked) == 1 and asked[0].startswith('item.'):
        text = ''.join(
          p if isinstance(p, str) else ' ' * p.spaced + '{item}' for p in template.prompt
        )
        found.setdefault(asked[0].removeprefix('item.'), text)
    return found

  # ---- inside

  def _load_lm(self) -> LanguageModel:
    options = self._lm_options
    return load_lm(
      options.name,
      tokenizer=options.tokenizer,
      compute=lm_compute(options),
      mesh=self.inputs.mesh,
      rules=self.inputs.rules,
    )

  @functools.cached_property
  def seqio(self) -> Any:
    """SeqIO, with the tasks of the data set registered. TensorFlow takes seconds to import."""
    import_tensorflow()
    import seqio

    from ilm_jax.tasks import recommendation

    recommendation.register_recommendation_tasks(
      self.prepared,
      self.vocabulary,
      num_soft_tokens=self.model.num_soft_tokens,
      dataset=self.text.dataset,
      templates=template_file(self.text.templates),
      history_length=self.text.history_length,
      max_text_tokens=self.text.max_text_tokens,
      encoder_decoder=self.lm.has_encoder,
      user_states=self.text.users == 'items',
    )
    recommendation.register_history_task(self.prepared, length=self.text.sequence_length)
    return seqio

  def _check_sources_of_options(self) -> None:
    for name in ('target_loss', 'weights'):
      value = getattr(self.config, name)
      for source in () if isinstance(value, str) else value:
        if not self.has_source(source):
          known = self.sources()
          raise UsageError(
            f'train.losses.{name}: no source {source!r}.{did_you_mean(source, known)} Sources:'
            f' {", ".join(known)}.'
          )

  def _freeze(self) -> Frozen:
    uses_trie = 'catalogue' in self.config.target_losses
    rows = RowTable(self.prepared)
    num_entities = self.prepared.num_entities
    states = UserStates.of(rows.items, rows.offsets, num_entities)
    lm = None if self._lm_options.trained else self.lm.params
    return Frozen(
      lm=lm,
      entity_vectors=boxed_vectors(self.table, self.inputs),
      log_popularity=log_popularity(self.counts),
      user_states=states if self.text.users == 'items' else None,
      prefix=None if lm is None else self._run_prefix(lm),
      trie=self.trie if uses_trie else None,
      bias=self.catalogue_bias() if uses_trie else None,
    )

  def _run_prefix(self, lm: Any) -> Cache | None:
    if self._layers is None:
      return jax.jit(self.model.run_prefix)(lm)
    return self.model.run_prefix(lm, self._layers)

  def catalogue_bias(self) -> jax.Array:
    """[nodes]: popularity, less what the language model says without a user (if it is frozen)."""
    popularity = popularity_bias(self.trie, self.counts)
    if self._lm_options.trained:
      return popularity
    tokens = self.neutral_tokens()
    embeddings = self.lm.embed(tokens[None])
    lengths = jnp.array([len(tokens)], jnp.int32)
    assert isinstance(self.lm.module, Decoder)
    run = jax.jit(functools.partial(neutral_log_probs, self.lm.module))
    return edge_bias(popularity, run(self.lm.params, self.plan, embeddings, lengths))

  def neutral_tokens(self) -> np.ndarray:
    """The prompt that says nothing of a user."""
    begin = [*self._prefix_tokens, self.first_token]
    first = not self.text.prefix
    text = self.text.neutral_prompt
    return np.array([*begin, *self.vocabulary.encode_segment(text, first=first)], np.int32)

  def lengths(self, source: str) -> dict[str, int]:
    """SeqIO's task_feature_lengths of a source."""
    return self.steps.lengths(source)

  def _provider(self, source: str) -> str:
    own = f'{self.prepared.name}_{source}'
    names = {*self.seqio.TaskRegistry.names(), *self.seqio.MixtureRegistry.names()}
    return own if own in names else source

  def _prompts(self) -> list[str]:
    """All tasks and mixtures of prompts for this language model."""

    def fits(name: str) -> bool:
      features = self.seqio.get_mixture_or_task(name).output_features
      return {'inputs', 'targets', 'entity_ids'} <= set(features) and (
        features['targets'].vocabulary == self.vocabulary
      )

    names = [*self.seqio.TaskRegistry.names(), *self.seqio.MixtureRegistry.names()]
    return [name for name in names if fits(name)]

  def _eval_rows(self) -> int:
    return self.text.eval_batch_size or max(self.inputs.batch_size.values())

  def _best(self) -> tuple[str, Literal['max', 'min'], tuple[str, ...]]:
    if ITEM_SEQUENCE in self.inputs.batch_size:
      return 'readout/NDCG@10', 'max', ('readout/HR@10', 'readout/NDCG@10', 'readout/rank_pct')
    return 'loss', 'min', ('loss',)

  def _identity(self) -> dict[str, Any]:
    encoder: dict[str, Any] = {}
    c = self.soft_tokens
    if c is not None:
      values = dataclasses.asdict(c.item_encoder)
      encoder = {k: v for k, v in values.items() if k not in HOW_IT_RUNS | _TEXT_BRANCH}
      encoder |= {'normalise': c.normalise, 'skip': c.skip}
      encoder |= {'standardise': True} if c.standardise else {}
      encoder |= {'max_encoder_tokens': c.max_encoder_tokens}
    lm = {**self.lm.identity, 'trained': self._lm_options.trained}
    return {
      'model': {
        'name': self.name,
        'item_encoder': encoder,
        'lm': lm,
        'readout': self.config.readout,
      },
      'data': {'name': self.prepared.name, 'fingerprint': self.prepared.fingerprint},
      'entity_table': {'content_hash': self.table.content_hash},
    }


def _like(x: Any, like: jax.Array) -> jax.Array:
  return jax.device_put(x.astype(like.dtype), like.sharding)

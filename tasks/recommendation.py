"""The standard SeqIO tasks and mixtures of a prepared data set.

Phase 1, `register_item_language_tasks`: tasks `<name>_item_text`, `<name>_item_item` and
`<name>_user_item`; mixtures `<name>_it`, `<name>_it_ii` and `<name>_it_ui`.

Phase 2, `register_history_task`: `<name>_item_sequence`, for the readout.

Phase 2, `register_recommendation_tasks`: for the forms `title` and `id`, tasks
`<name>_sequential_seen_<form>`, `..._sequential_unseen_...`, `..._straightforward_seen_...`,
`..._straightforward_unseen_...`, `..._rating_seen_...`, `..._item_description_seen_...` and so on;
mixtures `<name>_openp5_<form>` (sequential, straightforward), `<name>_items_<form>` (about items)
and `<name>_multitask_<form>` (all). A task of a template file by any other name is about an item.

A domain adds a task of its own with `add_prompt_task` (docs/add_a_domain.md). Registering twice is
harmless: the same settings change nothing, other settings replace the task.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import seqio
import tensorflow as tf

from ilm_jax.data.input.sources import (
  Columns,
  ColumnsPreprocessor,
  HistorySource,
  IndexedSource,
  InteractionSource,
  ItemSource,
  PairSource,
  ragged_range_gather,
)
from ilm_jax.data.prepared import PreparedData
from ilm_jax.data.text import prompts
from ilm_jax.data.text.entity_text import TITLE_FORM, EntityText
from ilm_jax.data.text.rendering import Renderer
from ilm_jax.data.text.slot_vocabulary import SlotVocabulary
from ilm_jax.data.text.text_tokens import TextTokens
from ilm_jax.errors import UsageError
from ilm_jax.metrics import ranking
from ilm_jax.tasks.names import FORMS, TEMPLATES, names_of

# By what it does, not by inheritance: it is used where TensorFlow is not imported.
seqio.Vocabulary.register(SlotVocabulary)


def register_item_language_tasks(
  prepared: PreparedData,
  vocabulary: Any,
  *,
  item_text: str = '{title}',
  max_text_tokens: int = 64,
) -> list[str]:
  """Registers phase 1's tasks and mixtures; returns the names of the mixtures.

  Features: `entity_ids` ([item], or [left, right, user] of a pair) and `targets` (the item's text
  as tokens, without special tokens; empty for pairs).

  Args:
    prepared: the data set.
    vocabulary: of the item encoder's text branch (ilm_jax.data.text.vocabularies).
    item_text: the text of an item, of `{title}` and the other text fields.
    max_text_tokens: longer texts are cut to this many tokens.
  """
  texts = TextTokens(prepared, vocabulary, dataset=prepared.name, max_text_tokens=max_text_tokens)
  form = EntityText(item=item_text, user='')
  rows = texts.rows('item', form, spaced=False, first=True)
  tokens, offsets = tf.constant(rows.tokens), tf.constant(rows.offsets)

  def look_up_text(columns: Columns, lengths: Mapping[str, int]) -> Columns:
    del lengths  # texts are cut by SeqIO, or by the reader
    item = columns['item']
    texts = ragged_range_gather(tokens, tf.gather(offsets, item), tf.gather(offsets, item + 1))
    return {'entity_ids': item[:, tf.newaxis], 'targets': texts}

  features = {
    'targets': seqio.Feature(vocabulary, add_eos=False),
    'entity_ids': _entity_feature(prepared),
  }
  name = prepared.name
  settings = (prepared.fingerprint, vocabulary, item_text, max_text_tokens)
  _add_task(
    f'{name}_item_text',
    ItemSource(prepared),
    [ColumnsPreprocessor(look_up_text)],
    features,
    settings,
  )
  for kind in ('item_item', 'user_item'):
    _add_task(f'{name}_{kind}', PairSource(prepared, kind), [], features, settings)
  mixtures = {'it': [], 'it_ii': ['item_item'], 'it_ui': ['user_item']}
  for mixture, pairs in mixtures.items():
    # Item-text and pair batches alternate, so pairs count as much as texts.
    _add_mixture(f'{name}_{mixture}', [(f'{name}_{task}', 1.0) for task in ['item_text', *pairs]])
  return [f'{name}_{mixture}' for mixture in mixtures]


def register_history_task(prepared: PreparedData, *, length: int) -> str:
  """Registers `<name>_item_sequence`, the histories of users, and returns its name.

  Features: `entity_ids`, up to length + 1 items, the oldest first; `targets` is empty.
  """
  name = f'{prepared.name}_item_sequence'
  features = {
    'targets': seqio.Feature(seqio.PassThroughVocabulary(1), add_eos=False),
    'entity_ids': _entity_feature(prepared),
  }
  _add_task(
    name, HistorySource(prepared, length=length), [], features, (prepared.fingerprint, length)
  )
  return name


def register_recommendation_tasks(
  prepared: PreparedData,
  vocabulary: Any,
  *,
  num_soft_tokens: int,
  dataset: str | None = None,
  templates: str | Path = TEMPLATES,
  history_length: int = 20,
  max_text_tokens: int = 64,
  encoder_decoder: bool = False,
  user_states: bool = False,
) -> list[str]:
  """Registers phase 2's tasks and mixtures; returns the names of the mixtures.

  Features: `inputs`, `targets` (ending with EOS), `entity_ids`: see `ilm_jax.data.text.rendering`.

  Args:
    prepared: the data set.
    vocabulary: the LM's (ilm_jax.data.text.vocabularies).
    num_soft_tokens: K, soft tokens an entity; 0 for text only.
    dataset: display name in prompts and ids, e.g. 'ML100K'; by default the name in capitals.
    templates: a template file, ours or OpenP5's `prompt.txt`; only the tasks that it has
      templates for are registered.
    history_length: most items of a history, the newest ones.
    max_text_tokens: longer texts of entities are cut to this many tokens.
    encoder_decoder: whether the LM is an encoder-decoder.
    user_states: whether a user is encoded from its last items, as of each row.

  Raises:
    UsageError: a template asks for what the data set or the task does not have.
  """
  texts = TextTokens(prepared, vocabulary, dataset=dataset, max_text_tokens=max_text_tokens)
  parsed = prompts.read_templates(templates, dataset=texts.dataset, fields=prepared.item_text)
  rows = functools.partial(InteractionSource, prepared, user_states=user_states)
  makers: dict[str, Callable[[], IndexedSource]] = {
    'sequential': lambda: rows(history_length=history_length, min_history=1),
    'straightforward': lambda: rows(history_length=0),
    'item_description': lambda: ItemSource(prepared),
  }
  if prepared.ratings is not None:
    makers['rating'] = lambda: rows(predict='rating', history_length=history_length, min_history=1)
  names = names_of(prepared.name, parsed, has_ratings=prepared.ratings is not None)
  sources: dict[str, IndexedSource] = {}
  for name, (task, group, form) in names.tasks.items():
    if task not in sources:  # a task by any other name is about an item
      sources[task] = makers.get(task, makers['item_description'])()
    add_prompt_task(
      name,
      sources[task],
      prompts.select(parsed, task, group),
      texts,
      num_soft_tokens=num_soft_tokens,
      entity_text=FORMS[form],
      encoder_decoder=encoder_decoder,
      metric=_METRICS.get(task),
    )
  for mixture, members in names.mixtures.items():
    # In proportion to the number of training examples, as one shuffled pool would have it.
    sizes = [_train_size(sources[names.tasks[member].task]) for member in members]
    _add_mixture(mixture, [*zip(members, map(float, sizes))])
  _forget_others(prepared.name, {*names.tasks, *names.mixtures})
  return list(names.mixtures)


def add_prompt_task(
  name: str,
  source: IndexedSource,
  templates: Sequence[prompts.Template],
  texts: TextTokens,
  *,
  num_soft_tokens: int,
  entity_text: EntityText = TITLE_FORM,
  encoder_decoder: bool = False,
  metric: 'EvaluationMetric | None' = None,
) -> None:
  """Registers one SeqIO task that renders examples of `source` with `templates`.

  Args:
    name: the task's name.
    source: gives the columns that the templates' slots name.
    templates: one of them is drawn for each example.
    texts: the data set's texts in the LM's vocabulary.
    num_soft_tokens: K, soft tokens an entity.
    entity_text: how entities are written.
    encoder_decoder: whether the LM is an encoder-decoder.
    metric: what seqio.Evaluator measures; without one, it leaves the task out.

  Raises:
    UsageError: a slot that the source has no column for.
  """
  columns = set(source.columns)
  for template in templates:
    for slot in template.slots():
      column = slot.name.partition('.')[0]
      if column not in columns:
        raise UsageError(
          f'task {name}: a template has the slot {{{slot.name}}}, but its examples have only'
          f' {sorted(columns)}. (What the task is to predict cannot be shown in the prompt.)'
        )
  features = {
    'inputs': seqio.Feature(texts.vocabulary, add_eos=encoder_decoder),
    'targets': seqio.Feature(texts.vocabulary, add_eos=True),
    'entity_ids': _entity_feature(texts.prepared, user_states='user_entity' in columns),
  }

  @functools.cache  # a task that is registered but not read tokenises nothing
  def renderer() -> Renderer:
    with tf.init_scope():  # its constants belong to no graph that happens to ask for them first
      return Renderer(
        templates,
        texts,
        num_soft_tokens=num_soft_tokens,
        entity_text=entity_text,
        target_continues_prompt=not encoder_decoder,
      )

  settings = (
    texts,
    num_soft_tokens,
    entity_text,
    encoder_decoder,
    tuple(templates),
    type(source),
    source.num_input_examples('train'),
    metric,
  )
  # Cached is the example before rendering: rendering depends on lengths known at run time only.
  rendered = ColumnsPreprocessor(functools.partial(render, renderer=renderer))
  _add_task(name, source, [seqio.CacheDatasetPlaceholder(), rendered], features, settings, metric)


class EvaluationMetric(NamedTuple):
  """What seqio.Evaluator measures of a task.

  Attributes:
    column: of the examples, that is to be predicted.
    function: (targets, scores) -> {name: value}; or (targets, predictions), which SeqIO decodes to
      text if they are rows of numbers.
  """

  column: str
  function: Callable[..., dict[str, float]]


def ranking_metrics(targets: Sequence[int], scores: np.ndarray) -> dict[str, float]:
  """Means of the ranking metrics, seen items kept.

  Args:
    targets: [n] items.
    scores: [n, num_items].
  """
  found = ranking.ranking_metrics(ranking.ranks(scores, np.asarray(targets)))
  return {name: float(values.mean()) for name, values in found.items()}


def rating_metrics(targets: Sequence[float], predictions: np.ndarray) -> dict[str, float]:
  """RMSE and MAE of predicted ratings [n]."""
  errors = np.asarray(predictions, np.float64) - np.asarray(targets)
  return {'RMSE': float(np.sqrt(np.mean(errors**2))), 'MAE': float(np.abs(errors).mean())}


RANKING = EvaluationMetric('target', ranking_metrics)
RATING = EvaluationMetric('rating', rating_metrics)
_METRICS = {'sequential': RANKING, 'straightforward': RANKING, 'rating': RATING}


def render(
  columns: Columns, lengths: Mapping[str, int], *, renderer: Callable[[], Renderer]
) -> Columns:
  """Columns of entity ids -> `inputs`, `targets`, `entity_ids`.

  The scalar columns (user, item, target, rating) are kept beside them for evaluation.
  """
  renderer().check_lengths(lengths)
  seed = columns['seed']
  if isinstance(seed, tf.RaggedTensor):  # SeqIO's caches forget sizes
    seed = seed.to_tensor()
  columns = {**columns, 'seed': tf.ensure_shape(seed, [None, 2])}
  rendered = renderer().traced(
    columns, max_inputs=lengths.get('inputs'), max_entities=lengths.get('entity_ids')
  )
  scalars = {name: column for name, column in columns.items() if column.shape.rank == 1}
  return {**scalars, **rendered}


# ---- the registry

_registered: dict[str, tuple[Any, ...]] = {}
_names_of: dict[str, set[str]] = {}  # data set -> tasks and mixtures


def _add_task(name, source, preprocessors, features, settings, metric=None) -> None:
  if name in seqio.TaskRegistry.names():
    if _registered.get(name) == settings:
      return
    seqio.TaskRegistry.remove(name)
  column = '' if metric is None else metric.column

  def postprocess(output: Any, *, example: Mapping[str, Any], is_target: bool = False) -> Any:
    return example[column] if is_target else output

  seqio.TaskRegistry.add(
    name,
    source=source,
    preprocessors=preprocessors,
    output_features=features,
    metric_fns=[] if metric is None else [metric.function],
    postprocess_fn=None if metric is None else postprocess,
  )
  _registered[name] = settings


def _add_mixture(name: str, tasks: list[tuple[str, float]]) -> None:
  if name in seqio.MixtureRegistry.names():
    seqio.MixtureRegistry.remove(name)  # its tasks may have been replaced
  seqio.MixtureRegistry.add(name, tasks)


def _forget_others(data_set: str, names: set[str]) -> None:
  """Removes what was registered for a data set with other templates, and is not any more."""
  for name in _names_of.get(data_set, set()) - names:
    for registry in (seqio.TaskRegistry, seqio.MixtureRegistry):
      if name in registry.names():
        registry.remove(name)
  _names_of[data_set] = names


def _entity_feature(prepared: PreparedData, *, user_states: bool = False) -> Any:
  size = prepared.num_entities + (prepared.num_interactions if user_states else 0)
  return seqio.Feature(seqio.PassThroughVocabulary(size), add_eos=False)


def _train_size(source: IndexedSource) -> int:
  return source.num_input_examples('train') or 0

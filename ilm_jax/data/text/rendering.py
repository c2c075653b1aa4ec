"""Rendering: an example of entity ids becomes a prompt and a target of token ids.

Texts of entities and literals of templates are tokenised once, when a task is registered, into one
bank of token rows; a prompt is then a list of row numbers, and a batch of prompts one gather. That
is what makes the input pipeline fast: no tokenizer and no Python runs while training.

A worked example, K = 2, slot token 9, with the template
`{user} watched {history}. Next?; {target}` and one letter a token:

    example   user 0 (entity 100), history [4, 7], target 5
    inputs    u 0 9 9 _ w a t c h e d _ F 9 9 , _ H 9 9 . _ N e x t ?
    entity_ids    100                      4         7
    targets   _ T </s>

where `F`, `H`, `T` are the texts of items 4, 7 and 5. There are K slots an entity, in order:
slots == K * len(entity_ids), always. If `inputs` is too long, whole entities are dropped from the
history, oldest first, each with its text and its slots.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from ilm_jax.data.input.sources import Columns, ragged_range_gather
from ilm_jax.data.text.entity_text import EntityText
from ilm_jax.data.text.prompts import Template
from ilm_jax.data.text.template_programs import Program, TemplatePrograms
from ilm_jax.data.text.text_tokens import TextTokens

_PICK = np.int64(1)  # tells the draw of a template from other uses of a seed


class Renderer(TemplatePrograms):
  """Renders batches of examples with a set of templates, one of which each example's seed picks.

  Examples are columns of n rows, of which the templates' slots name the ones that are needed:
  `user`, `item`, `target` [n] int32, `rating` [n] float32, `history` ragged int32; and always
  `seed` [n, 2] int64. A column `user_entity` is the entity of the user, in place of its own.
  """

  def __init__(
    self,
    templates: Sequence[Template],
    texts: TextTokens,
    *,
    num_soft_tokens: int,
    entity_text: EntityText,
    target_continues_prompt: bool = True,
  ):
    """As TemplatePrograms."""
    super().__init__(
      templates,
      texts,
      num_soft_tokens=num_soft_tokens,
      entity_text=entity_text,
      target_continues_prompt=target_continues_prompt,
    )
    # Constants made here, eagerly, are captured by the graphs of tf.data, not copied into them.
    self._tokens = tf.constant(self._merged.tokens)
    self._offsets = tf.constant(self._merged.offsets)

  def __call__(
    self, examples: Columns, *, max_inputs: int | None = None, max_entities: int | None = None
  ) -> dict[str, tf.RaggedTensor]:
    """Renders n examples. TensorFlow ops only.

    Args:
      examples: columns, see the class.
      max_inputs: longest `inputs` in tokens; None is unlimited.
      max_entities: longest `entity_ids`; None is unlimited.

    Returns:
      `inputs`, `targets` (ending with EOS) and `entity_ids`: [n, None] int32 each.
    """
    seed = examples['seed']
    here = tf.zeros_like(seed[:, 0])
    # A permutation of the templates for each seed, of which we take the first.
    pick = tf.raw_ops.RandomIndexShuffle(
      index=here,
      seed=tf.concat([seed, tf.fill([tf.shape(seed)[0], 1], _PICK)], axis=1),
      max_index=here + len(self._templates) - 1,
      rounds=4,
    )
    rows, entities = self._fillings(examples)
    before, after = self._rows(self._prompts, pick, rows)
    entities_before, entities_after = self._entity_ids(pick, entities)
    history_rows, history_entities = self._history(
      examples.get('history'),
      pick,
      None if max_inputs is None else max_inputs - self._total(before) - self._total(after),
      None
      if max_entities is None
      else max_entities - entities_before.row_lengths() - entities_after.row_lengths(),
    )
    target, _ = self._rows(self._targets, pick, rows)
    inputs = tf.concat([before, history_rows, after], axis=1)
    entity_ids = tf.concat([entities_before, history_entities, entities_after], axis=1)
    return {
      'inputs': self._gather_tokens(inputs),
      'targets': self._gather_tokens(target),
      'entity_ids': tf.cast(entity_ids, tf.int32),
    }

  @functools.cached_property
  def traced(self) -> Callable[..., dict[str, tf.RaggedTensor]]:
    """The same as a call, traced once for each kind of arguments and shared by all pipelines."""
    return tf.function(self.__call__, autograph=False, reduce_retracing=True)

  # ---- rendering a batch

  def _fillings(self, examples: Columns) -> tuple[tf.Tensor, tf.Tensor]:
    """Bank rows and entity ids of every filler for every example: [n, fillers] int64 each."""
    rows, entities = [], []
    for filler in self._fillers:
      column = examples[filler.column]
      if filler.column == 'rating':
        column = tf.searchsorted(tf.constant(self._text_tokens.ratings), column)
      column = tf.cast(column, tf.int64)
      rows.append(column + filler.base)
      if filler.column == 'user' and 'user_entity' in examples:
        entities.append(tf.cast(examples['user_entity'], tf.int64))
      else:
        entities.append(column + filler.entity_base)
    if not rows:
      nothing = tf.zeros([tf.shape(examples['seed'])[0], 0], tf.int64)
      return nothing, nothing
    return tf.stack(rows, axis=1), tf.stack(entities, axis=1)

  def _rows(
    self, programs: Sequence[Program], pick: tf.Tensor, rows: tf.Tensor
  ) -> tuple[tf.RaggedTensor, tf.RaggedTensor]:
    """Bank rows before and after the history, of each example's program: [n, None] int64."""
    before = tf.ragged.constant([p.before for p in programs], tf.int64, ragged_rank=1)
    after = tf.ragged.constant([p.after for p in programs], tf.int64, ragged_rank=1)
    return _resolve(before, pick, rows), _resolve(after, pick, rows)

  def _entity_ids(
    self, pick: tf.Tensor, entities: tf.Tensor
  ) -> tuple[tf.RaggedTensor, tf.RaggedTensor]:
    """The entities of a prompt before and after its history: [n, None] int64."""
    soft_only = [
      Program(before=self._soft(p.before), after=self._soft(p.after)) for p in self._prompts
    ]
    return self._rows(soft_only, pick, entities)

  def _history(
    self,
    history: tf.RaggedTensor | None,
    pick: tf.Tensor,
    room: tf.Tensor | None,
    entity_room: tf.Tensor | None,
  ) -> tuple[tf.RaggedTensor, tf.RaggedTensor]:
    """Bank rows and entity ids of the newest items that fit, oldest first."""
    if history is None:
      nothing = tf.RaggedTensor.from_row_lengths(
        tf.zeros([0], tf.int64), tf.zeros_like(pick), validate=False
      )
      return nothing, nothing
    base_first, base_next, separator, present, soft = (
      tf.gather(tf.constant([getattr(p, field) for p in self._prompts], tf.int64), pick)
      for field in (
        'history_first', 'history_next', 'separator_length', 'has_history', 'history_is_soft',
      )
    )  # fmt: skip
    count = history.row_lengths() * present
    newest_first = tf.cast(
      tf.reverse_sequence(history.to_tensor(), history.row_lengths(), seq_axis=1), tf.int64
    )
    place = tf.range(tf.shape(newest_first, tf.int64)[1])[tf.newaxis, :]
    fits = place < count[:, tf.newaxis]
    if room is not None:
      # k items take the length of k rows that begin with the separator, less one separator.
      needed = tf.cumsum(self._row_lengths(newest_first + base_next[:, tf.newaxis]), axis=1)
      fits &= needed - separator[:, tf.newaxis] <= room[:, tf.newaxis]
    if entity_room is not None:
      fits &= (place < entity_room[:, tf.newaxis]) | (soft[:, tf.newaxis] == 0)
    kept = tf.reduce_sum(tf.cast(fits, tf.int64), axis=1)
    ends = history.row_limits()
    items = tf.cast(ragged_range_gather(history.values, ends - kept, ends), tf.int64)
    is_oldest = tf.ragged.range(kept).values == 0
    example = items.value_rowids()
    base = tf.where(is_oldest, tf.gather(base_first, example), tf.gather(base_next, example))
    entities = tf.ragged.boolean_mask(items, items.with_values(tf.gather(soft, example) > 0))
    return items.with_values(items.values + base), entities

  def _row_lengths(self, rows: tf.Tensor) -> tf.Tensor:
    return tf.gather(self._offsets, rows + 1) - tf.gather(self._offsets, rows)

  def _total(self, rows: tf.RaggedTensor) -> tf.Tensor:
    return tf.reduce_sum(rows.with_values(self._row_lengths(rows.values)), axis=1)

  def _gather_tokens(self, rows: tf.RaggedTensor) -> tf.RaggedTensor:
    starts = tf.gather(self._offsets, rows.values)
    ends = tf.gather(self._offsets, rows.values + 1)
    pieces = ragged_range_gather(self._tokens, starts, ends)
    return rows.with_values(pieces).merge_dims(1, 2)


def _resolve(codes: tf.RaggedTensor, pick: tf.Tensor, fillings: tf.Tensor) -> tf.RaggedTensor:
  """The codes of each example's template, with fillers replaced by the example's own numbers."""
  chosen = tf.gather(codes, pick)
  if not fillings.shape[1]:
    return chosen
  flat = chosen.values
  filled = tf.gather_nd(
    fillings, tf.stack([chosen.value_rowids(), tf.maximum(-flat - 1, 0)], axis=1)
  )
  return chosen.with_values(tf.where(flat < 0, filled, flat))

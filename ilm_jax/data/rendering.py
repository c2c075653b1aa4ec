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

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from ilm_jax.data.entity_text import EntityText
from ilm_jax.data.prompts import Part, Slot, Template
from ilm_jax.data.sources import Columns, ragged_range_gather
from ilm_jax.data.text_tokens import TextTokens
from ilm_jax.data.token_bank import TokenBank, TokenRows
from ilm_jax.errors import UsageError

HISTORY_SEPARATOR, OPENP5_SEPARATOR = ',', ' ,'  # the space after it belongs to the next item
_PICK = np.int64(1)  # tells the draw of a template from other uses of a seed


@dataclasses.dataclass(frozen=True)
class _Filler:
  """A slot made ready: row `base + column` of the bank, K slots behind its text where it is soft.

  The example's column is `user`, `item`, `target` or `rating`; `entity_base + column` is the
  entity id of a soft slot.
  """

  column: str
  base: int
  longest: int
  soft: bool
  entity_base: int


@dataclasses.dataclass
class _Program:
  """A compiled template side: rows before and after the history. Fillers are -(index + 1)."""

  before: list[int] = dataclasses.field(default_factory=list)
  after: list[int] = dataclasses.field(default_factory=list)
  history_first: int = 0  # base of the rows of a history's oldest item
  history_next: int = 0  # of the others, which begin with the separator
  separator_length: int = 0
  has_history: bool = False
  history_is_soft: bool = False


class Renderer:
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
    """Puts the literals of the templates and every text that they refer to into one bank.

    Args:
      templates: of one task; all of them are used, with equal probability.
      texts: the tokens of the data set's texts.
      num_soft_tokens: K, the slots of one entity; 0 renders text only.
      entity_text: how entities are written.
      target_continues_prompt: whether prompt and target are one string for the LM (decoder-only),
        so that the target starts with a space, or two (encoder-decoder), which both end with EOS.
    """
    self._templates = tuple(templates)
    self._text_tokens = texts
    self._prepared = texts.prepared
    self._entity_text = entity_text
    vocabulary = texts.vocabulary
    self._slots = np.full(num_soft_tokens, vocabulary.slot_id, np.int32)
    self._bank = TokenBank()
    self._fillers: list[_Filler] = []
    end = [self._literal_tokens(np.array([vocabulary.eos_id], np.int32))]
    prompt_end = [] if target_continues_prompt else end
    self._prompts = [self._compile(t, t.prompt, True, prompt_end) for t in templates]
    self._targets = [
      self._compile(
        t, _with_space(t.target, target_continues_prompt), not target_continues_prompt, end
      )
      for t in templates
    ]
    rows = self._bank.merged()
    # Constants made here, eagerly, are captured by the graphs of tf.data, not copied into them.
    self._tokens = tf.constant(rows.tokens)
    self._offsets = tf.constant(rows.offsets)
    self._lengths = np.diff(rows.offsets)

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

  def check_lengths(self, lengths: Mapping[str, int]) -> None:
    """Checks that every example fits once its whole history is dropped.

    Args:
      lengths: the longest allowed `inputs`, `targets` and `entity_ids`.

    Raises:
      UsageError: naming the template, the feature, its length and what it may need.
    """
    for template, prompt, target in zip(self._templates, self._prompts, self._targets):
      needed = {
        'inputs': self._longest(prompt),
        'targets': self._longest(target),
        'entity_ids': len(self._soft(prompt.before + prompt.after)),
      }
      for feature, tokens in needed.items():
        if feature in lengths and tokens > lengths[feature]:
          raise UsageError(
            f'task {template.task!r}: {feature} of length {lengths[feature]} cannot hold every'
            f' example: the longest has {tokens}, before any history. Raise'
            f' task_feature_lengths[{feature!r}] to at least {tokens}, shorten the template, or'
            f' lower max_text_tokens (now {self._text_tokens.max_text_tokens}).'
          )

  def _longest(self, program: _Program) -> int:
    """Most tokens that a program can render to without any history."""
    return sum(
      int(self._lengths[code]) if code >= 0 else self._fillers[-code - 1].longest
      for code in program.before + program.after
    )

  # ---- compiling a template into row numbers

  def _compile(
    self, template: Template, parts: Sequence[Part], first: bool, end: Sequence[int]
  ) -> _Program:
    program = _Program()
    rows = program.before
    for part in parts:
      if isinstance(part, str):
        rows.append(self._literal(part, first))
      elif part.name == 'history':
        self._compile_history(program, part, template.openp5)
        rows = program.after
      else:
        rows.append(-1 - self._filler(part, first))
      first = False
    rows.extend(end)
    return program

  def _literal(self, text: str, first: bool) -> int:
    return self._literal_tokens(self._text_tokens.encode(text, first=first))

  def _literal_tokens(self, tokens: np.ndarray) -> int:
    return self._bank.add(('literal', tokens.tobytes()), lambda: TokenRows.of([tokens]))

  def _compile_history(self, program: _Program, slot: Slot, openp5: bool) -> None:
    separator = self._text_tokens.encode(OPENP5_SEPARATOR if openp5 else HISTORY_SEPARATOR)
    # The space before an item belongs to it, wherever the history stands in the prompt.
    table = 'item of openp5' if openp5 else 'item'
    text = self._rows_of(table, True, False) if slot.mode != 'soft' else None
    empty = TokenRows(np.zeros(0, np.int32), np.zeros(self._prepared.num_items + 1, np.int64))
    slots = self._slots if slot.mode != 'text' else self._slots[:0]
    for name, before in (('history_first', separator[:0]), ('history_next', separator)):
      base = self._bank.add(
        (name, table, slot.mode), lambda before=before: (text or empty).surround(before, slots)
      )
      setattr(program, name, base)
    program.separator_length = len(separator)
    program.has_history = True
    program.history_is_soft = len(slots) > 0

  def _filler(self, slot: Slot, first: bool) -> int:
    column = slot.name.partition('.')[0]
    slots = self._slots if slot.mode != 'text' else self._slots[:0]
    rows = self._prepared.num_users if column == 'user' else self._prepared.num_items
    table = 'item' if slot.name == 'target' else slot.name

    def make() -> TokenRows:
      if slot.mode == 'soft':
        return TokenRows(np.zeros(0, np.int32), np.zeros(rows + 1, np.int64)).surround(
          slots[:0], slots
        )
      return self._rows_of(table, slot.spaced, first).surround(slots[:0], slots)

    key = (table, slot.mode, slot.spaced, first)
    base = self._bank.add(key, make)
    filler = _Filler(
      column=column,
      base=base,
      longest=self._bank.table(key).longest,
      soft=len(slots) > 0,
      entity_base=self._prepared.num_items if column == 'user' else 0,
    )
    if filler not in self._fillers:
      self._fillers.append(filler)
    return self._fillers.index(filler)

  def _rows_of(self, table: str, spaced: bool, first: bool) -> TokenRows:
    return self._text_tokens.rows(table, self._entity_text, spaced=spaced, first=first)

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
    self, programs: Sequence[_Program], pick: tf.Tensor, rows: tf.Tensor
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
      _Program(before=self._soft(p.before), after=self._soft(p.after)) for p in self._prompts
    ]
    return self._rows(soft_only, pick, entities)

  def _soft(self, codes: Sequence[int]) -> list[int]:
    return [c for c in codes if c < 0 and self._fillers[-c - 1].soft]

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


def _with_space(parts: tuple[Part, ...], spaced: bool) -> tuple[Part, ...]:
  if not spaced:
    return parts
  head = parts[0]
  head = ' ' + head if isinstance(head, str) else dataclasses.replace(head, spaced=True)
  return (head, *parts[1:])

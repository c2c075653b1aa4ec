"""Templates made ready to be rendered, and one prompt rendered with them: without TensorFlow.

Texts of entities and literals of templates are tokenised once into one bank of token rows; a prompt
is then a list of row numbers. `ilm_jax.data.text.rendering` renders batches of such programs inside
tf.data; importing that takes seconds, which who asks for one recommendation should not wait.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ilm_jax.data.text.entity_text import EntityText
from ilm_jax.data.text.prompts import Part, Slot, Template
from ilm_jax.data.text.text_tokens import TextTokens
from ilm_jax.data.text.token_bank import TokenBank, TokenRows
from ilm_jax.errors import UsageError

HISTORY_SEPARATOR, OPENP5_SEPARATOR = ',', ' ,'  # the space after it belongs to the next item


@dataclasses.dataclass(frozen=True)
class Filler:
  """A slot made ready: row `base + column` of the bank, K slots after its text where it is soft.

  The example's column is `user`, `item`, `target` or `rating`; `entity_base + column` is the
  entity id of a soft slot.
  """

  column: str
  base: int
  longest: int
  soft: bool
  entity_base: int


@dataclasses.dataclass
class Program:
  """A compiled template side: rows before and after the history. Fillers are -(index + 1)."""

  before: list[int] = dataclasses.field(default_factory=list)
  after: list[int] = dataclasses.field(default_factory=list)
  history_first: int = 0  # base of the rows of a history's oldest item
  history_next: int = 0  # of the others, which begin with the separator
  separator_length: int = 0
  has_history: bool = False
  history_is_soft: bool = False


class Prompt(NamedTuple):
  """Tokens of a prompt, and the entities of its slots in order."""

  inputs: list[int]
  entity_ids: list[int]


class TemplatePrograms:
  """The templates of one task as programs over one bank of token rows."""

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
    self._fillers: list[Filler] = []
    end = [self._literal_tokens(np.array([vocabulary.eos_id], np.int32))]
    prompt_end = [] if target_continues_prompt else end
    self._prompts = [self._compile(t, t.prompt, True, prompt_end) for t in templates]
    self._targets = [
      self._compile(
        t, _with_space(t.target, target_continues_prompt), not target_continues_prompt, end
      )
      for t in templates
    ]
    self._merged = self._bank.merged()
    self._lengths = np.diff(self._merged.offsets)

  def prompt(
    self,
    example: Mapping[str, Any],
    *,
    template: int = 0,
    max_inputs: int | None = None,
    max_entities: int | None = None,
  ) -> Prompt:
    """Renders one prompt: what `ilm_jax.data.text.rendering.Renderer` makes of it in a batch.

    Args:
      example: one value for each slot that the template has: see the Renderer.
      template: which one.
      max_inputs: longest `inputs` in tokens; None is unlimited.
      max_entities: longest `entity_ids`; None is unlimited.
    """
    program = self._prompts[template]
    (before, entities_before), (after, entities_after) = (
      self._fill(codes, example) for codes in (program.before, program.after)
    )
    room = entity_room = None
    if max_inputs is not None:
      room = max_inputs - int(self._lengths[before + after].sum())
    if max_entities is not None:
      entity_room = max_entities - len(entities_before + entities_after)
    history = self._newest(program, list(example.get('history', ())), room, entity_room)
    bases = [program.history_first, *[program.history_next] * len(history)]
    rows = [*before, *(base + item for base, item in zip(bases, history)), *after]
    tokens, offsets = self._merged.tokens, self._merged.offsets
    inputs = [token for row in rows for token in tokens[offsets[row] : offsets[row + 1]].tolist()]
    entities = history if program.history_is_soft else []
    return Prompt(inputs, [*entities_before, *entities, *entities_after])

  def _fill(self, codes: Sequence[int], example: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Bank rows of a part of a program, and the entities of its slots."""
    rows, entities = [], []
    for code in codes:
      if code >= 0:
        rows.append(code)
        continue
      filler = self._fillers[-code - 1]
      value = example[filler.column]
      if filler.column == 'rating':
        value = np.searchsorted(self._text_tokens.ratings, value)
      rows.append(filler.base + int(value))
      if filler.soft:
        own = filler.entity_base + int(value)
        entities.append(int(example.get('user_entity', own)) if filler.column == 'user' else own)
    return rows, entities

  def _newest(
    self, program: Program, history: list[int], room: int | None, entity_room: int | None
  ) -> list[int]:
    """The newest items of a history that fit, oldest first."""
    kept, needed = 0, -program.separator_length
    for item in reversed(history if program.has_history else []):
      needed += int(self._lengths[program.history_next + item])
      too_long = room is not None and needed > room
      too_many = entity_room is not None and program.history_is_soft and kept >= entity_room
      if too_long or too_many:
        break
      kept += 1
    return [int(item) for item in history[len(history) - kept :]]

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

  def _soft(self, codes: Sequence[int]) -> list[int]:
    return [c for c in codes if c < 0 and self._fillers[-c - 1].soft]

  def _longest(self, program: Program) -> int:
    """Most tokens that a program can render to without any history."""
    return sum(
      int(self._lengths[code]) if code >= 0 else self._fillers[-code - 1].longest
      for code in program.before + program.after
    )

  # ---- compiling a template into row numbers

  def _compile(
    self, template: Template, parts: Sequence[Part], first: bool, end: Sequence[int]
  ) -> Program:
    program = Program()
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

  def _compile_history(self, program: Program, slot: Slot, openp5: bool) -> None:
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
    filler = Filler(
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


def _with_space(parts: tuple[Part, ...], spaced: bool) -> tuple[Part, ...]:
  if not spaced:
    return parts
  head = parts[0]
  head = ' ' + head if isinstance(head, str) else dataclasses.replace(head, spaced=True)
  return (head, *parts[1:])

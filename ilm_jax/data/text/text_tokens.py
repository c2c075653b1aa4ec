"""Token ids of the texts of a data set's items and users, for all tasks that render them."""

from typing import Any

import numpy as np

from ilm_jax.data.prepared import PreparedData
from ilm_jax.data.text.entity_text import EntityText, item_texts, user_texts
from ilm_jax.data.text.token_bank import TokenRows


class TextTokens:
  """The texts of one data set in one vocabulary, each kind tokenised once, at first use.

  Attributes:
    prepared: the data set.
    vocabulary: with `encode_segment`, `slot_id` and `eos_id` (ilm_jax.data.text.vocabularies).
    dataset: display name of the domain in texts, e.g. 'ML100K'; by default the data set's name in
      capitals.
    max_text_tokens: longer texts are cut to this many tokens.
    ratings: [n] float32, the distinct ratings, ascending.
  """

  def __init__(
    self,
    prepared: PreparedData,
    vocabulary: Any,
    *,
    dataset: str | None = None,
    max_text_tokens: int = 64,
  ):
    self.prepared = prepared
    self.vocabulary = vocabulary
    self.dataset = dataset or prepared.name.upper()
    self.max_text_tokens = max_text_tokens
    self.ratings = _distinct_ratings(prepared)
    self._rows: dict[tuple[str, str, bool, bool], TokenRows] = {}

  def __eq__(self, other: object) -> bool:
    return isinstance(other, TextTokens) and self._identity() == other._identity()

  def __hash__(self) -> int:
    return hash(self._identity())

  def _identity(self) -> tuple[Any, ...]:
    return self.prepared.fingerprint, self.vocabulary, self.dataset, self.max_text_tokens

  def encode(self, text: str, *, first: bool = False) -> np.ndarray:
    """Tokens of a piece of a prompt: [n] int32. `first`: whether it begins the prompt."""
    return np.asarray(self.vocabulary.encode_segment(text, first=first), np.int32)

  def rows(self, table: str, entity_text: EntityText, *, spaced: bool, first: bool) -> TokenRows:
    """Tokens of every row of a table.

    Args:
      table: 'user', 'item', 'item of openp5' (the prompt has said the data set's name already),
        'rating', or 'item.FIELD'.
      entity_text: how entities are written.
      spaced: whether a space is before each text.
      first: whether the texts begin a prompt.
    """
    form = {
      'user': entity_text.user,
      'item': entity_text.item,
      'item of openp5': entity_text.item.removeprefix('{dataset} '),
    }.get(table, '')
    key = (table.removesuffix(' of openp5'), form, spaced, first)
    if key not in self._rows:
      texts = self._texts(key[0], form)
      self._rows[key] = TokenRows.of(
        [
          self.encode(f'{" " * spaced}{text}', first=first)[: self.max_text_tokens]
          for text in texts
        ]
      )
    return self._rows[key]

  def _texts(self, table: str, form: str) -> list[str]:
    if table == 'user':
      return user_texts(self.prepared, form, self.dataset)
    if table == 'item':
      return item_texts(self.prepared, form, self.dataset)
    if table == 'rating':
      return [f'{rating:g}' for rating in self.ratings]
    return self.prepared.item_text[table.removeprefix('item.')]


def _distinct_ratings(prepared: PreparedData) -> np.ndarray:
  columns = (prepared.ratings, prepared.validation_ratings, prepared.test_ratings)
  found = [c[np.isfinite(c)] for c in columns if c is not None]
  return np.unique(np.concatenate(found)) if found else np.zeros(0, np.float32)

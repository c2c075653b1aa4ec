"""Many token sequences in one flat array, so that a batch of prompts is one gather."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class TokenRows:
  """Rows of token ids: one flat array and offsets, so that ten million items fit."""

  tokens: np.ndarray  # [total] int32
  offsets: np.ndarray  # [rows + 1] int64

  @classmethod
  def of(cls, rows: Sequence[np.ndarray]) -> 'TokenRows':
    offsets = np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64)
    return cls(np.concatenate([np.zeros(0, np.int32), *rows]), offsets)

  def __len__(self) -> int:
    return len(self.offsets) - 1

  @property
  def longest(self) -> int:
    return int(np.diff(self.offsets).max(initial=0))

  def surround(self, before: np.ndarray, after: np.ndarray) -> 'TokenRows':
    """Every row with the same tokens put before and after it."""
    added = len(before) + len(after)
    row = np.repeat(np.arange(len(self)), np.diff(self.offsets))
    offsets = self.offsets + added * np.arange(len(self) + 1)
    tokens = np.empty(offsets[-1], np.int32)
    tokens[np.arange(len(self.tokens)) + added * row + len(before)] = self.tokens
    for i, token in enumerate(before):
      tokens[offsets[:-1] + i] = token
    for i, token in enumerate(after):
      tokens[offsets[1:] - len(after) + i] = token
    return TokenRows(tokens, offsets)


class TokenBank:
  """Tables of token rows that become one table; it remembers where each begins."""

  def __init__(self):
    self._tables: list[TokenRows] = []
    self._bases: dict[Any, int] = {}
    self._rows = 0

  def add(self, key: Any, make: Callable[[], TokenRows]) -> int:
    """Adds the table `key` if it is new; returns the number of its first row."""
    if key not in self._bases:
      table = make()
      self._bases[key] = self._rows
      self._tables.append(table)
      self._rows += len(table)
    return self._bases[key]

  def table(self, key: Any) -> TokenRows:
    return self._tables[list(self._bases).index(key)]

  def merged(self) -> TokenRows:
    lengths = np.concatenate([np.diff(t.offsets) for t in self._tables])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenRows(np.concatenate([t.tokens for t in self._tables]), offsets)

"""A trained run in Python: items by title or id, plain lists and NumPy arrays in and out.

  import ilm_jax

  model = ilm_jax.load('runs/ilm')
  model.recommend(history=['Heat (1995)', 'Alien (1979)'], k=10)
  model.recommend(user='196')
  model.complete('I loved {Heat (1995)} because')

An item is named as in `ilm recommend`: by its title, as people write it, by the source's id
('#50'), or by that id where it is a number.

Letters: I items of the catalogue, K soft tokens of an item, D width of the language model.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ilm_jax.errors import UsageError
from ilm_jax.serving.recommender import Recommender
from ilm_jax.serving.requests import Reader


class Recommendation(NamedTuple):
  """One item of a ranking.

  Attributes:
    title: of the item.
    item: its id in the source.
    score: of the method; higher is better.
  """

  title: str
  item: str
  score: float


class Model:
  """See the top of the file.

  Attributes:
    recommender: the same model by item numbers, and its parts.
    titles: [I], of all items, in the order of `score`.
  """

  def __init__(self, recommender: Recommender):
    self.recommender = recommender
    self.titles: tuple[str, ...] = tuple(recommender.prepared.item_text['title'])

  @property
  def methods(self) -> tuple[str, ...]:
    """What it can rank by, the default first: 'readout', 'exact', 'beam'."""
    return self.recommender.methods

  def recommend(
    self,
    *,
    history: Sequence[str | int] | None = None,
    user: str | int | None = None,
    prompt: str | None = None,
    k: int = 10,
    method: str | None = None,
    exclude_seen: bool = True,
  ) -> list[Recommendation]:
    """The best k items, best first.

    Args:
      history: items, oldest first.
      user: of the data set, by the source's id; everything the data set has of the user counts.
      prompt: a text with items in braces; methods 'exact' and 'beam' read it, 'readout' its items.
      k: at most so many.
      method: one of `methods`.
      exclude_seen: whether the items of the history itself are left out.

    Raises:
      UsageError: not one of `history`, `user` and `prompt`; an unknown item, user or method.
    """
    if k < 1:
      raise UsageError(f'recommend: k={k}: at least 1.')
    options: Any = {'k': k, 'method': method, 'exclude_seen': exclude_seen}
    items, text = self._asked(history, user, prompt)
    if text is None:
      (ranking,) = self.recommender.top([items], **options)
    else:
      (ranking,) = self.recommender.top_for_prompts([(text, items)], **options)
    keys = self.recommender.prepared.item_keys
    return [Recommendation(self.titles[i], keys[i], score) for i, score in ranking]

  def score(
    self,
    items: Sequence[str | int] | None = None,
    *,
    history: Sequence[str | int] | None = None,
    user: str | int | None = None,
    method: str | None = None,
  ) -> np.ndarray:
    """Scores [len(items)], or [I] of all items, after a history: of 'readout' or 'exact'.

    Raises:
      UsageError: as of `recommend`; or the method is 'beam', which scores a few items only.
    """
    asked, _ = self._asked(history, user, None)
    (scores,) = self.recommender.scores([asked], method=method)
    return scores if items is None else scores[[self._reader.item(name) for name in items]]

  def complete(self, prompt: str, *, max_new_tokens: int = 32) -> str:
    """What the language model goes on with after a text with items in braces.

    Raises:
      UsageError: an unknown item, or a run without soft tokens.
    """
    items, text = self._asked(None, None, prompt)
    assert text is not None
    return self.recommender.complete(text, items, max_new_tokens=max_new_tokens)

  def soft_tokens(self, items: Sequence[str | int]) -> np.ndarray:
    """[len(items), K, D] float32: what stands for items in a prompt.

    Raises:
      UsageError: an unknown item, or a run without soft tokens.
    """
    return self.recommender.soft_tokens(np.array([self._reader.item(x) for x in items], np.int32))

  @functools.cached_property
  def _reader(self) -> Reader:
    return Reader(self.recommender.prepared)

  def _asked(
    self, history: Sequence[str | int] | None, user: str | int | None, prompt: str | None
  ) -> tuple[list[int], str | None]:
    """Items, and the text with '{item}' for each where there is one."""
    if isinstance(history, str):
      raise UsageError(f'history={history!r}: a list of items; write [{history!r}].')
    values = {'user': user, 'prompt': prompt}
    values['history'] = None if history is None else [_plain(name) for name in history]
    request = self._reader.request({k: _plain(v) for k, v in values.items() if v is not None})
    return request.items, request.prompt


def load(
  model_dir: str | Path,
  *,
  checkpoint: str | int = 'best',
  data: str | Path | None = None,
  mesh: Mapping[str, int] | None = None,
) -> Model:
  """Loads a run of phase 2.

  Args:
    model_dir: of `ilm train`.
    checkpoint: 'best' (on the validation items), 'latest', or a step.
    data: the prepared data set, where it is no longer where the model was trained.
    mesh: as of `ilm train`; by default all devices share the rows.

  Raises:
    UsageError: there is no such run or checkpoint, or it is of phase 1.
  """
  return Model(
    Recommender.load(
      Path(model_dir).expanduser(),
      checkpoint=checkpoint,
      data=None if data is None else Path(data).expanduser(),
      mesh=mesh,
    )
  )


def _plain(value: Any) -> Any:
  """A NumPy number as Python's."""
  return value.item() if isinstance(value, np.generic) else value

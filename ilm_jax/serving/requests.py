"""Requests for recommendations, as people write them: JSON lines that name users and items."""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from ilm_jax.catalogue.titles import TitleIndex
from ilm_jax.data.prepared import PreparedData
from ilm_jax.errors import UsageError, did_you_mean

KINDS = ('user', 'history', 'prompt')  # a line has one of these
RESULTS = ('recommendations', 'next', 'error')  # what a line must not have: it is put in
_IN_BRACES = re.compile(r'\{([^{}]*)\}')


@dataclasses.dataclass(frozen=True)
class Request:
  """One line of the input.

  Attributes:
    where: the file and the line, for messages.
    line: what it says.
    items: of the history, oldest first, or of the prompt, in order.
    prompt: the text with '{item}' for each item; None of a history.
    next_item: the item that the user had next, where it is known and hidden.
    error: what is wrong with the line; nothing is ranked then.
  """

  where: str
  line: dict[str, Any]
  items: list[int] = dataclasses.field(default_factory=list)
  prompt: str | None = None
  next_item: int | None = None
  error: str | None = None


class Reader:
  """Reads requests: what they name is looked up in a prepared data set."""

  def __init__(self, prepared: PreparedData, *, hide_last: bool = False):
    self._prepared = prepared
    self._hide_last = hide_last
    self._titles = TitleIndex(prepared.item_text['title'], prepared.item_keys)
    self._users = {key: user for user, key in enumerate(prepared.user_keys)}

  def read(self, lines: Iterable[str], name: str, on_error: str = 'stop') -> Iterator[Request]:
    """Yields the request of each line that is not blank; `name` of the input is for messages.

    Raises:
      UsageError: a mistake in a line, unless `on_error` is 'report': it is in the request then.
    """
    for number, text in enumerate(lines, start=1):
      if not text.strip():
        continue
      where = f'{name}, line {number}'
      line: dict[str, Any] = {'line': number}  # says which one, if it cannot be read
      try:
        line = _json_object(text)
        request = self.request(line, where)
      except UsageError as error:
        if on_error == 'stop':
          raise UsageError(f'{where}: {error}') from error
        request = Request(where, line, error=str(error))
      yield request

  def request(self, line: dict[str, Any], where: str = '') -> Request:
    """Returns the request that a line makes.

    Raises:
      UsageError: an unknown user or item, or the line is not such as `recommend` tells.
    """
    kinds = [kind for kind in KINDS if kind in line]
    if len(kinds) != 1:
      found = ' and '.join(kinds) if kinds else f'the keys {", ".join(line) or "(none)"}'
      hints = (did_you_mean(key, KINDS) for key in line) if not kinds else ()
      raise UsageError(
        f'one of {", ".join(KINDS)} is needed, but there are {found}.{"".join(hints)}'
      )
    for key in RESULTS:
      if key in line:
        raise UsageError(f'{key!r} is a key of the output: rename it or leave it out.')
    value = line[kinds[0]]
    if kinds[0] == 'user':
      items, next_item = self._history_of(value)
      return Request(where, line, items, next_item=next_item)
    if kinds[0] == 'history':
      if not isinstance(value, list) or not value:
        raise UsageError(f'history is a list of titles, but here it is {json.dumps(value)}.')
      return Request(where, line, [self.item(name) for name in value])
    if not isinstance(value, str) or not value.strip():
      raise UsageError(f'prompt is a text, but here it is {json.dumps(value)}.')
    return Request(where, line, *self.prompt(value))

  def item(self, name: Any) -> int:
    """Returns the item with this title, or with this id of the source.

    Raises:
      UsageError: there is none, or several; or `name` is neither text nor a whole number.
    """
    if isinstance(name, bool) or not isinstance(name, (str, int)):
      raise UsageError(f'an item is a title or an id, but here it is {json.dumps(name)}.')
    return self._titles.find(name if isinstance(name, str) else f'#{name}')

  def prompt(self, text: str) -> tuple[list[int], str]:
    """Returns the items in braces, and the text with '{item}' for each.

    'I loved {Heat (1995)}.' -> [17], 'I loved {item}.'

    Raises:
      UsageError: an unknown item, or a brace without its other one.
    """
    if re.search('[{}]', _IN_BRACES.sub('', text)):
      raise UsageError(f'prompt {text!r}: a brace without its other one; write "{{TITLE}}".')
    return [self.item(name) for name in _IN_BRACES.findall(text)], _IN_BRACES.sub('{item}', text)

  def _history_of(self, key: Any) -> tuple[list[int], int | None]:
    prepared = self._prepared
    user = self._users.get(key if isinstance(key, str) else json.dumps(key))
    if user is None:
      some = ', '.join(json.dumps(key) for key in prepared.user_keys[:3])
      raise UsageError(
        f'no user {json.dumps(key)} in {prepared.name}, which has {prepared.num_users:,} users,'
        f" by the source's ids: {some} ..."
      )
    items = prepared.history(user, 'test').tolist()
    last = int(prepared.test_items[user])
    if last < 0:
      return items, None
    return (items, last) if self._hide_last else ([*items, last], None)


def _json_object(text: str) -> dict[str, Any]:
  try:
    line = json.loads(text, parse_constant=_refuse)
  except ValueError as error:
    raise UsageError(f'not JSON ({error}): {text.strip()[:80]!r}.') from error
  if not isinstance(line, dict):
    raise UsageError(f'not an object such as {{"user": "196"}}: {text.strip()[:80]!r}.')
  return line


def _refuse(constant: str) -> None:
  raise ValueError(f'{constant} is not allowed')  # and could not be written again

"""How entities are written: the text of every item and user of a data set."""

import dataclasses
import string

from ilm_jax.data.prepared import PreparedData
from ilm_jax.errors import UsageError, did_you_mean

FIRST_ITEM_ID = 1001  # OpenP5 numbers its random item ids from 1001
FIRST_USER_ID = 1


@dataclasses.dataclass(frozen=True)
class EntityText:
  """How entities are written in prompts and targets: format strings.

  Attributes:
    item: of `{dataset}`, `{id}` (the dense id, from 1001), `{key}` (the source's id) and the
      items' text fields, e.g. '{title}' or '{dataset} item_{id}'.
    user: of `{dataset}`, `{id}` (from 1) and `{key}`.
  """

  item: str
  user: str


TITLE_FORM = EntityText(item='{title}', user='user {id}')
ID_FORM = EntityText(item='{dataset} item_{id}', user='{dataset} user_{id}')


def item_texts(prepared: PreparedData, form: str, dataset: str) -> list[str]:
  """The text of every item in one form.

  Raises:
    UsageError: the form names a field that items do not have.
  """
  check_form(form, prepared)
  columns = prepared.item_text
  return [
    form.format(
      dataset=dataset,
      id=FIRST_ITEM_ID + i,
      key=prepared.item_keys[i],
      **{field: values[i] for field, values in columns.items()},
    )
    for i in range(prepared.num_items)
  ]


def user_texts(prepared: PreparedData, form: str, dataset: str) -> list[str]:
  """The text of every user in one form."""
  _check_form(form, {'dataset', 'id', 'key'})
  return [
    form.format(dataset=dataset, id=FIRST_USER_ID + u, key=key)
    for u, key in enumerate(prepared.user_keys)
  ]


def check_form(form: str, prepared: PreparedData) -> None:
  """Raises UsageError where the text of an item names a field that items do not have."""
  _check_form(form, {'dataset', 'id', 'key', *prepared.item_text})


def _check_form(form: str, allowed: set[str]) -> None:
  names = [name for _, name, _, _ in string.Formatter().parse(form) if name is not None]
  for name in names:
    if name not in allowed:
      raise UsageError(
        f'entity text {form!r}: unknown field {{{name}}}; allowed are'
        f' {", ".join(f"{{{n}}}" for n in sorted(allowed))}.{did_you_mean(name, allowed)}'
      )

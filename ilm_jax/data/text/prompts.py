"""Prompt templates: text with slots for entities, and the files that hold them.

A template has a prompt and a target, both with slots in braces:

| slot | in the prompt | in the target |
|---|---|---|
| `{user}` | the user: text, then K soft-token slots | - |
| `{item}` | the example's item: text, then K slots | - |
| `{history}` | the user's last items, oldest first, each text then K slots | - |
| `{item.FIELD}` | the item's text field, e.g. `{item.genres}`; no soft tokens | the same |
| `{rating}` | the rating, e.g. `4` | the same |
| `{target}` | - | the text of the item to predict |

`{user}`, `{item}` and `{history}` take a mode after a colon: `{user:soft}` is the soft tokens
without the text, `{history:text}` the text without soft tokens. `{dataset}` stands for the domain's
display name in either.

A template file has one template a line, four parts separated by semicolons, in the manner of
OpenP5's `prompt.txt` (which can be read as it is):

    sequential; seen; {user} watched {history}. What comes next?; {target}

The second part tells prompts of the training mixture (`seen`) from those kept for evaluation
(`unseen`). Empty lines and lines that start with `#` are skipped.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from ilm_jax.errors import UsageError, did_you_mean

SEEN, UNSEEN = 'seen', 'unseen'
ENTITY_SLOTS = ('user', 'item', 'history')
_MODES = ('both', 'text', 'soft')
_SLOT = re.compile(r'\{([^{}]*)\}')

# OpenP5 writes "{dataset} user_{user_id}" and "{dataset} {target}" where we write {user} and
# {target}: our entity text carries the data set's name itself.
_OPENP5_USER = re.compile(r'(\{dataset\} )?user_\{user_id\}')
_OPENP5_TARGET = re.compile(r'\{dataset\} \{target\}')


@dataclasses.dataclass(frozen=True)
class Slot:
  """One slot: `name` with `mode` ('both', 'text' or 'soft'); `spaced` if white space precedes it.

  The space belongs to what fills the slot, because tokenizers merge a space with the word after
  it, never with the word before it.
  """

  name: str
  mode: str = 'both'
  spaced: bool = False


Part = str | Slot


@dataclasses.dataclass(frozen=True)
class Template:
  """A prompt and its target, each a sequence of literal text and slots.

  Attributes:
    task: the task it belongs to, e.g. 'sequential'.
    group: 'seen' or 'unseen'.
    prompt, target: the parts.
    openp5: whether it is spelled as in OpenP5, which writes a history as `ML100K items item_1001 ,
      item_1002`: the data set's name once, and a space before the comma.
  """

  task: str
  group: str
  prompt: tuple[Part, ...]
  target: tuple[Part, ...]
  openp5: bool = False

  def slots(self) -> list[Slot]:
    return [part for part in self.prompt + self.target if isinstance(part, Slot)]


def parse_template(
  task: str,
  group: str,
  prompt: str,
  target: str,
  *,
  dataset: str,
  where: str,
  fields: Iterable[str],
) -> Template:
  """Parses one template.

  Args:
    task: the task it belongs to, e.g. 'sequential'.
    group: 'seen' or 'unseen'.
    prompt: the prompt's text with slots.
    target: the target's text with slots.
    dataset: display name of the domain, put in for `{dataset}`.
    where: file and line, for errors.
    fields: the text fields that items have.

  Raises:
    UsageError: an unknown slot, mode, field or group, or a slot on the wrong side.
  """
  if group not in (SEEN, UNSEEN):
    raise UsageError(f'{where}: the second part is {group!r}; allowed are {SEEN!r} and {UNSEEN!r}.')
  allowed = {f'item.{field}' for field in fields} | {'rating'}
  openp5 = '{user_id}' in prompt
  if len(re.findall(r'\{history\b', prompt)) > 1:
    raise UsageError(f'{where}: the prompt has {{history}} twice; once is what can be cut to fit.')
  sides = (
    ('prompt', prompt, allowed | set(ENTITY_SLOTS)),
    ('target', target, allowed | {'target'}),
  )
  parts = [
    tuple(_split(text, names, dataset=dataset, where=f'{where} ({side})'))
    for side, text, names in sides
  ]
  if not parts[0] or not parts[1]:
    raise UsageError(f'{where}: the prompt and the target must not be empty.')
  return Template(task=task, group=group, prompt=parts[0], target=parts[1], openp5=openp5)


def _split(text: str, allowed: set[str], *, dataset: str, where: str) -> list[Part]:
  text = _OPENP5_TARGET.sub('{target}', _OPENP5_USER.sub('{user}', text))
  text = text.strip().replace('{dataset}', dataset)
  parts: list[Part] = []
  end = 0
  for match in _SLOT.finditer(text):
    literal, spaced = _take_space(text[end : match.start()])
    if literal:
      parts.append(literal)
    parts.append(_slot(match.group(1), allowed, spaced=spaced, where=where))
    end = match.end()
  if text[end:]:
    parts.append(text[end:])
  for part in parts:
    if isinstance(part, str) and ('{' in part or '}' in part):
      raise UsageError(f'{where}: unpaired brace in {part!r}.')
  return parts


def _take_space(literal: str) -> tuple[str, bool]:
  """Moves the white space before a slot into the slot."""
  stripped = literal.rstrip(' ')
  return stripped, len(stripped) < len(literal)


def _slot(text: str, allowed: set[str], *, spaced: bool, where: str) -> Slot:
  name, _, mode = text.partition(':')
  if name not in allowed:
    raise UsageError(
      f'{where}: unknown slot {{{text}}}; allowed here are'
      f' {", ".join(f"{{{n}}}" for n in sorted(allowed))}.{did_you_mean(name, allowed)}'
    )
  mode = mode or ('both' if name in ENTITY_SLOTS else 'text')
  if mode not in _MODES or (name not in ENTITY_SLOTS and mode != 'text'):
    raise UsageError(
      f'{where}: slot {{{text}}} has mode {mode!r}; {{user}}, {{item}} and {{history}} take'
      f" 'both', 'text' or 'soft', the other slots take none.{did_you_mean(mode, _MODES)}"
    )
  return Slot(name=name, mode=mode, spaced=spaced)


def read_templates(path: str | Path, *, dataset: str, fields: Iterable[str]) -> list[Template]:
  """Reads a template file (ours or OpenP5's).

  Args:
    path: the file.
    dataset: display name of the domain, e.g. 'ML100K'.
    fields: text fields that items have.

  Raises:
    UsageError: naming the file and the line.
  """
  path = Path(path)
  if not path.is_file():
    raise UsageError(f'no template file {path}.')
  fields = tuple(fields)
  templates = []
  for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), start=1):
    if not line.strip() or line.lstrip().startswith('#'):
      continue
    where = f'{path}:{number}'
    cells = [cell.strip() for cell in line.split(';')]
    if len(cells) != 4:
      raise UsageError(
        f'{where}: {len(cells)} parts separated by semicolons; 4 are expected:'
        ' task; seen or unseen; prompt; target. (A template text may not contain a semicolon.)'
      )
    task, group, prompt, target = cells
    templates.append(
      parse_template(task, group, prompt, target, dataset=dataset, where=where, fields=fields)
    )
  return templates


def select(templates: Sequence[Template], task: str, group: str) -> list[Template]:
  """The templates of one task and group, in file order.

  Raises:
    UsageError: there are none.
  """
  chosen = [t for t in templates if t.task == task and t.group == group]
  if not chosen:
    tasks = sorted({t.task for t in templates})
    raise UsageError(
      f'no {group} template for task {task!r}; the template file has tasks {tasks}.'
      f'{did_you_mean(task, tasks)}'
    )
  return chosen

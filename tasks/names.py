"""What the tasks and mixtures of a data set are called, which imports no TensorFlow."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ilm_jax.data.text.entity_text import ID_FORM, TITLE_FORM, EntityText
from ilm_jax.data.text.prompts import SEEN, Template

TEMPLATES = Path(__file__).parent / 'templates.txt'
FORMS: Mapping[str, EntityText] = {'title': TITLE_FORM, 'id': ID_FORM}


class TaskName(NamedTuple):
  """Which task of a template file, of which group of templates, in which of FORMS."""

  task: str
  group: str
  form: str


class Names(NamedTuple):
  """Of a data set.

  Attributes:
    tasks: by the name they are registered under.
    mixtures: name -> names of its tasks.
  """

  tasks: Mapping[str, TaskName]
  mixtures: Mapping[str, Sequence[str]]


def names_of(data_set: str, templates: Sequence[Template], *, has_ratings: bool) -> Names:
  """Only the tasks that there are templates for; 'rating' only where there are ratings."""
  present = {(template.task, template.group) for template in templates}
  kinds = [
    'sequential',
    'straightforward',
    'item_description',
    *(['rating'] if has_ratings else []),
  ]
  # Tasks by any other name are about an item: its text fields, to be told from its soft tokens.
  kinds += sorted({task for task, _ in present} - {*kinds, 'rating'})
  members = {
    'openp5': ['sequential', 'straightforward'],
    'items': [t for t in kinds if t not in ('sequential', 'straightforward', 'rating')],
    'multitask': kinds,
  }
  tasks: dict[str, TaskName] = {}
  mixtures: dict[str, list[str]] = {}
  for form in FORMS:
    tasks |= {
      f'{data_set}_{task}_{group}_{form}': TaskName(task, group, form)
      for task, group in sorted(present)
      if task in kinds
    }
    for mixture, of in members.items():
      if trained := [f'{data_set}_{t}_{SEEN}_{form}' for t in of if (t, SEEN) in present]:
        mixtures[f'{data_set}_{mixture}_{form}'] = trained
  return Names(tasks, mixtures)

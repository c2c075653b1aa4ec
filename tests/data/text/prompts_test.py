"""Templates: parsing, OpenP5's spelling, and what a typo says."""

from pathlib import Path

import pytest

from ilm_jax.data.text import prompts
from ilm_jax.data.text.prompts import Slot
from ilm_jax.errors import UsageError

FIELDS = ('title', 'genres')


def parse(prompt, target='{target}', **overrides):
  arguments = {'dataset': 'Books', 'where': 't.txt:3', 'fields': FIELDS, **overrides}
  group = arguments.pop('group', 'seen')
  return prompts.parse_template('sequential', group, prompt, target, **arguments)


def test_space_before_a_slot_belongs_to_the_slot():
  template = parse('{user} read {history}, then ({item.genres}) in {dataset}?')
  assert template.prompt == (
    Slot('user', 'both', spaced=False),
    ' read',
    Slot('history', 'both', spaced=True),
    ', then (',
    Slot('item.genres', 'text', spaced=False),
    ') in Books?',
  )
  assert template.target == (Slot('target', 'text', spaced=False),)


def test_modes():
  template = parse('{user:soft} and {history:text}')
  assert [(s.name, s.mode) for s in template.slots()] == [
    ('user', 'soft'),
    ('history', 'text'),
    ('target', 'text'),
  ]


@pytest.mark.parametrize(
  ('prompt', 'target', 'group', 'message'),
  [
    ('{usr} read', '{target}', 'seen', r"t\.txt:3 \(prompt\).*\{usr\}.*Did you mean 'user'"),
    ('{target} read', '{target}', 'seen', r'unknown slot \{target\}'),
    ('{user}', '{user}', 'seen', r'\(target\): unknown slot \{user\}'),
    ('{user:hard}', '{target}', 'seen', r"mode 'hard'"),
    ('{rating:soft}', '{target}', 'seen', r"mode 'soft'"),
    ('{user} {', '{target}', 'seen', 'unpaired brace'),
    ('{item.autor}', '{target}', 'seen', r'unknown slot \{item.autor\}'),
    ('{user}', '', 'seen', 'must not be empty'),
    ('{user}', '{target}', 'sen', "'sen'; allowed are 'seen' and 'unseen'"),
  ],
)
def test_mistakes_name_the_line_and_what_is_allowed(prompt, target, group, message):
  with pytest.raises(UsageError, match=message):
    parse(prompt, target, group=group)


def test_reads_openp5_files(tmp_path: Path):
  # The format of OpenP5's prompt.txt, with texts of our own.
  path = tmp_path / 'prompt.txt'
  path.write_text(
    'sequential; seen; {dataset} user_{user_id} took {dataset} items {history} . Next ?;'
    ' {dataset} {target}\n'
    'straightforward; unseen; Anything for {dataset} user_{user_id} ?; {dataset} {target}'
  )
  sequential, straightforward = prompts.read_templates(path, dataset='ML100K', fields=FIELDS)
  assert sequential.prompt == (
    Slot('user'),
    ' took ML100K items',
    Slot('history', spaced=True),
    ' . Next ?',
  )
  assert sequential.target == (Slot('target', 'text'),)
  assert straightforward.group == 'unseen'
  assert sequential.openp5


def test_a_line_with_the_wrong_number_of_parts_is_named(tmp_path: Path):
  path = tmp_path / 'p.txt'
  path.write_text('# a comment\n\nsequential; seen; {user} ; likes; {target}\n')
  with pytest.raises(UsageError, match=r'p\.txt:3: 5 parts'):
    prompts.read_templates(path, dataset='B', fields=FIELDS)


def test_a_missing_file_and_an_unknown_task():
  with pytest.raises(UsageError, match='no template file'):
    prompts.read_templates('/nowhere/p.txt', dataset='B', fields=FIELDS)
  with pytest.raises(UsageError, match=r"'seqential'.*Did you mean 'sequential'"):
    prompts.select([parse('{user}')], 'seqential', 'seen')


def test_the_shipped_templates_have_ten_seen_and_one_unseen():
  from ilm_jax.tasks import recommendation

  templates = prompts.read_templates(recommendation.TEMPLATES, dataset='D', fields=FIELDS)
  for task in ('sequential', 'straightforward'):
    assert len(prompts.select(templates, task, prompts.SEEN)) == 10
    assert len(prompts.select(templates, task, prompts.UNSEEN)) == 1
  texts = [(t.prompt, t.target) for t in templates]
  assert len(set(texts)) == len(texts)

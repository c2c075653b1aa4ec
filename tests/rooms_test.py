"""The rooms of the house: imports run down, from a command to what any program needs."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the bottom up: a file imports from its own room, and from those before it.
ROOMS = (
  'errors',
  'runtime',
  'config',
  'modules',
  'data',
  'data.prepare',
  'data.input',
  'data.text',
  'catalogue',
  'checkpoints',
  'models',
  'lm',
  'metrics',
  'cf',
  'decoding',
  'tasks',
  'phases',
  'aot',
  'serving',
  'evaluation',
  'commands',
)


def room_of(module: str) -> str:
  """Of a module's name without `ilm_jax.`; files at the top are commands."""
  parts = module.split('.')
  for size in (2, 1):
    if (room := '.'.join(parts[:size])) in ROOMS:
      return room
  return 'commands'


def imported(path: Path) -> set[str]:
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('ilm_jax'):
      found |= {f'{node.module}.{alias.name}' for alias in node.names}
  return {name.removeprefix('ilm_jax.') for name in found}


FILES = {
  '.'.join((base.name, *path.relative_to(base).with_suffix('').parts)).removeprefix(
    'ilm_jax.'
  ): path
  for base in (ROOT / 'ilm_jax', ROOT / 'tasks')
  for path in base.rglob('*.py')
  if path.name != '__init__.py'
}


@pytest.mark.parametrize('room', ROOMS)
def test_no_import_runs_up(room):
  files = [name for name in FILES if room_of(name) == room]
  assert files
  wrong = {
    f'{name} imports {other}'
    for name in files
    for other in imported(FILES[name])
    if ROOMS.index(room_of(other)) > ROOMS.index(room)
  }
  assert not wrong

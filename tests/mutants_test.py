"""The table of `make mutants` does not rot: its lines are there, and so are its tests."""

import ast

import pytest

from tests.mutants import table

MUTANTS = table.read()


def test_there_are_faults_in_all_rooms():
  assert len(MUTANTS) >= 90
  rooms = {mutant.file.rpartition('/')[0] for mutant in MUTANTS}
  folders = {path.parent.relative_to(table.ROOT) for path in table.ROOT.glob('ilm_jax/**/*.py')}
  assert rooms == {*map(str, folders), 'tasks', 'launch'}
  assert len({mutant[1:4] for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize('file', sorted({mutant.file for mutant in MUTANTS}))
def test_lines_are_there_once_and_faults_are_python(file):
  text = (table.ROOT / file).read_text()
  for mutant in MUTANTS:
    if mutant.file == file:
      changed = mutant.change(text)
      assert changed != text
      if file.endswith('.py'):
        ast.parse(changed, mutant.where)


def test_the_tests_are_there():
  for mutant in MUTANTS:
    for test in mutant.tests:
      assert (table.ROOT / test.partition('::')[0]).is_file(), mutant.where

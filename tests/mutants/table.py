"""The table of deliberate faults: the files *.txt beside this one, a room of the library each.

  @ ilm_jax/modules/splice.py                      the file that the faults below are made in
  $ tests/modules/splice_test.py                   tests that `make test` has for it, cheapest first

  - number = jnp.cumsum(is_slot, axis=1) - 1      a line of it, or a part that is there once
  + number = jnp.cumsum(is_slot, axis=1)          what a slip would make of it
  ! Slot number i takes soft token i % K.         the promise that is broken; may go on below
  $ tests/modules/splice_test.py                   where other tests are better for this fault

Lines that begin with '#' say something to the reader. '~' in place of '$' says the same of a fault
that makes tests hang: one that is stopped for it is caught.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]


class Mutant(NamedTuple):
  """A fault.

  Attributes:
    where: file and line of the table.
    file: of the library, from the root of the repository.
    line, fault: what is there once, and what is put in its place.
    promise: that it breaks.
    tests: files, or tests of them (FILE::TEST), from the root.
    may_hang: whether a test that takes too long has found it.
  """

  where: str
  file: str
  line: str
  fault: str
  promise: str
  tests: tuple[str, ...]
  may_hang: bool

  def change(self, text: str) -> str:
    """The text of the file with the fault in it.

    Raises:
      ValueError: the line is not there, or more than once.
    """
    found = text.count(self.line)
    if found != 1:
      raise ValueError(f'{self.where}: {self.file} has {found} times {self.line!r}; 1 is needed.')
    return text.replace(self.line, self.fault)


def read() -> list[Mutant]:
  """All faults.

  Raises:
    ValueError: a line of the table is not as above.
  """
  return [mutant for path in sorted(FOLDER.glob('*.txt')) for mutant in _read(path)]


def _read(path: Path) -> Iterator[Mutant]:
  file, tests_of_file = '', ()
  found: Mutant | None = None
  for number, line in enumerate(path.read_text().splitlines(), start=1):
    mark, _, rest = line.partition(' ')
    where = f'{path.relative_to(ROOT)}:{number}'
    if mark in ('@', '-') and found:
      yield _checked(found)
      found = None
    if mark == '@':
      file, tests_of_file = rest, ()
    elif mark == '-':
      found = Mutant(where, file, rest, '', '', tests_of_file, False)
    elif mark in ('$', '~') and not found:
      tests_of_file = tuple(rest.split())
    elif mark == '+' and found:
      found = found._replace(fault=rest)
    elif mark == '!' and found:
      found = found._replace(promise=f'{found.promise} {rest}'.strip())
    elif mark in ('$', '~') and found:
      found = found._replace(tests=tuple(rest.split()), may_hang=mark == '~')
    elif line and not line.startswith('#'):
      raise ValueError(f'{where}: {line!r} begins with none of @ - + ! $ ~ #, or in a wrong place.')
  if found:
    yield _checked(found)


def _checked(mutant: Mutant) -> Mutant:
  for name in ('file', 'line', 'promise', 'tests'):
    if not getattr(mutant, name):
      raise ValueError(f'{mutant.where}: {name} is missing.')
  return mutant

"""`make mutants`: whether the tests see deliberate faults. It is not told by what is covered.

Each fault of the table (`tests/mutants/*.txt`, read by table.py) is put into a copy of the
repository, where the tests that are named for it run up to the first that fails:

  caught     a test failed, as it should
  SURVIVED   all passed, or are skipped here: nothing tells that the promise is broken
  invalid    no test came to run, or pytest could not begin: the row of the table is wrong
  too long   stopped after ten minutes; caught, where the row says so

Before, the same tests run without a fault, and must pass. What was found is in runs/mutants.json;
a second call goes on where the first was stopped, as long as no tracked file has changed.
"""

import argparse
import contextlib
import hashlib
import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from ilm_jax.data.prepare.fetch import cache_dir
from tests.mutants.isolation import Copy
from tests.mutants.table import ROOT, Mutant, read

RESULTS = ROOT / 'runs' / 'mutants.json'
_SECONDS = 600  # for the tests of one fault
_PYTEST = ('-q', '-p', 'no:cacheprovider')
_FOUND = {0: 'SURVIVED', 1: 'caught', 5: 'SURVIVED'}  # by pytest's exit status; 5: no test was run
_LINES = 15  # of what pytest said


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--only', default='', help='faults whose file, promise or row has this in it')
  parser.add_argument('--jobs', type=int, default=2, help='faults at a time')
  parser.add_argument('--unchecked', action='store_true', help='do not run the tests without fault')
  parser.add_argument('--again', action='store_true', help='also those that were judged before')
  flags = parser.parse_args()
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which stops what runs
  mutants = [m for m in read() if flags.only in ' '.join((m.where, m.file, m.promise))]
  if not mutants:
    parser.error(f'--only={flags.only}: there is no such fault.')
  record = _Record(mutants, again=flags.again)
  with tempfile.TemporaryDirectory(prefix='ilm_mutants_') as folder:
    _make_cache(Path(folder))
    with contextlib.ExitStack() as stack:
      copies = []
      for i in range(flags.jobs if record.left else 0):
        copies.append(Copy(Path(folder, f'copy_{i}'), _tracked()))
        stack.callback(copies[-1].stop)
      if not flags.unchecked and not _check(copies, record):
        return 2
      judge = lambda copy, mutant: record.add(mutant, _judge(copy, mutant))  # noqa: E731
      _in_parallel(copies, record.left, judge)
  return record.tell()


def _tracked() -> list[str]:
  return _git('ls-files', '-z').rstrip('\0').split('\0')


def _git(*words: str) -> str:
  done = subprocess.run(['git', *words], cwd=ROOT, check=True, capture_output=True, text=True)
  return done.stdout


def _make_cache(folder: Path) -> None:
  """A cache for all copies; what was fetched once is not fetched again."""
  packages = cache_dir() / 'packages'
  packages.mkdir(parents=True, exist_ok=True)
  (folder / 'cache').mkdir()
  (folder / 'cache' / 'packages').symlink_to(packages)


class _Record:
  """What was found; on disk after each fault."""

  def __init__(self, mutants: Sequence[Mutant], *, again: bool):
    # The table is no part of what was judged: its rows are.
    where = ('--', '.', ':!tests/mutants')
    state = _git('ls-files', '-s', *where) + _git('diff', *where)
    self.state = hashlib.sha256(state.encode()).hexdigest()
    self._mutants = mutants
    self._values: dict[str, Any] = {'state': self.state, 'passed': [], 'faults': {}}
    if RESULTS.exists():
      found = json.loads(RESULTS.read_text())
      self._values = found if found['state'] == self.state else self._values
    known = {} if again else self._values['faults']
    self.left = [m for m in mutants if _key(m) not in known]
    self._total, self._done, self._start = len(self.left), 0, time.monotonic()
    self._lock = threading.Lock()

  @property
  def passed(self) -> set[str]:
    """Tests that passed without a fault."""
    return set(self._values['passed'])

  def add_passed(self, tests: Sequence[str]) -> None:
    with self._lock:
      self._values['passed'] = sorted({*self._values['passed'], *tests})
      self._write()
      self._start = time.monotonic()

  def add(self, mutant: Mutant, found: dict[str, Any]) -> None:
    """Notes what became of a fault, and says so."""
    with self._lock:
      about = {'file': mutant.file, 'fault': mutant.fault, 'promise': mutant.promise}
      self._values['faults'][_key(mutant)] = {**found, 'row': mutant.where, **about}
      self._write()
      self._done += 1
      seconds = time.monotonic() - self._start
      rate = 60 * self._done / seconds
      left = (self._total - self._done) / rate
      print(
        f'[{self._done:>3}/{self._total}] {found["outcome"]:<8} {found["seconds"]:>4.0f} s '
        f' {mutant.file}: {mutant.fault.strip()[:60]}   {rate:.1f} a minute, {left:.0f} min left',
        flush=True,
      )
      if found['outcome'] != 'caught':
        print(found['said'], flush=True)

  def tell(self) -> int:
    """Prints what was not caught, and the score; returns the exit status."""
    found = [(mutant, self._values['faults'][_key(mutant)]) for mutant in self._mutants]
    missed = [(mutant, one) for mutant, one in found if one['outcome'] != 'caught']
    for mutant, one in missed:
      print(f'\n{one["outcome"]}: {mutant.where}\n  {mutant.file}\n  - {mutant.line}')
      print(f'  + {mutant.fault}\n  ! {mutant.promise}\n  $ {" ".join(mutant.tests)}')
    print(f'\n{len(found) - len(missed)} of {len(found)} faults are caught; {RESULTS}')
    return 1 if missed else 0

  def _write(self) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    unfinished = RESULTS.with_suffix('.incomplete')
    unfinished.write_text(json.dumps(self._values, indent=1) + '\n')
    unfinished.replace(RESULTS)


def _key(mutant: Mutant) -> str:
  """What a row says, wherever it stands in the table."""
  text = json.dumps([mutant.file, mutant.line, mutant.fault, mutant.tests, mutant.may_hang])
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check(copies: Sequence[Copy], record: _Record) -> bool:
  """Runs all tests without a fault; whether they pass."""
  tests = sorted({test for mutant in record.left for test in mutant.tests} - record.passed)
  failed = []

  def run(copy: Copy, part: list[str]) -> None:
    start = time.monotonic()
    status, said = copy.pytest([*_PYTEST, *part])
    seconds = time.monotonic() - start
    print(f'without a fault: {len(part)} files of tests, {seconds:.0f} s', flush=True)
    record.add_passed(part) if not status else failed.append(_end_of(said))

  # Neighbours share what they need to begin, which is made once in each process.
  size = max(1, -(-len(tests) // max(1, len(copies))))
  _in_parallel(copies, [tests[i : i + size] for i in range(0, len(tests), size)], run)
  if failed:
    print('\n'.join(failed), '\nThese tests fail without any fault: mend them first.', sep='\n')
  return not failed


def _judge(copy: Copy, mutant: Mutant) -> dict[str, Any]:
  before = (ROOT / mutant.file).read_text()
  start = time.monotonic()
  copy.write(mutant.file, mutant.change(before))
  try:
    status, said = copy.pytest([*_PYTEST, '-x', *mutant.tests], _SECONDS)
  finally:
    copy.write(mutant.file, before)
  found = _FOUND.get(status, 'invalid') if status is not None else 'too long'
  if found == 'too long' and mutant.may_hang:
    found = 'caught'
  failed = [line.split()[1] for line in said.splitlines() if line.startswith(('FAILED ', 'ERROR '))]
  return {
    'outcome': found,
    'seconds': round(time.monotonic() - start, 1),
    'by': failed[:1],
    'said': _end_of(said),
  }


def _end_of(said: str) -> str:
  return '\n'.join(said.splitlines()[-_LINES:])


def _in_parallel(copies: Sequence[Copy], work: Sequence[Any], run: Any) -> None:
  """run(copy, one) for all work, each copy doing one after the other."""
  waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
  for one in work:
    waiting.put(one)
  errors: list[BaseException] = []

  def serve(copy: Copy) -> None:
    try:
      while not errors:
        run(copy, waiting.get_nowait())
    except queue.Empty:
      pass
    except BaseException as error:
      errors.append(error)

  threads = [threading.Thread(target=serve, args=(copy,), daemon=True) for copy in copies]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  if errors:
    raise errors[0]


if __name__ == '__main__':
  sys.exit(main())

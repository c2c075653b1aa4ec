"""A copy of the repository whose own files are what its Python imports, in every process.

It has a virtual environment of its own, in which the copy is installed as the repository is in
this one, and other packages are this one's. A process that would read a Python file of the
original ends, and leaves a mark.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import venv
from collections.abc import Sequence
from pathlib import Path

from ilm_jax.data.prepare.fetch import cache_dir
from tests.mutants.table import ROOT

_GUARD = """
import os, sys

def hook(event, args, folders={folders!r}, mark={mark!r}):
  if event == 'open' and isinstance(args[0], str) and args[0].startswith(folders):
    with open(mark, 'a') as file:
      file.write(args[0] + '\\n')
    os._exit(70)

sys.addaudithook(hook)
"""
_SHOW = """
import ilm_jax.main, ilm_jax.tasks.sources
from ilm_jax.config import files as config_files
print(ilm_jax.main.__file__, ilm_jax.tasks.sources.__file__, config_files.gin_root())
"""


class Copy:
  """See the top of the file; `stop` it when it is done."""

  def __init__(self, folder: Path, tracked: Sequence[str]):
    """Makes it.

    Args:
      folder: to be made; what runs in it leaves its files beside it.
      tracked: files of the repository, from its root.

    Raises:
      RuntimeError: something else than the copy is imported there.
    """
    self._folder = folder.resolve()
    for name in tracked:
      (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(ROOT / name, self._folder / name, follow_symlinks=False)
    self._environment = self._folder / '.venv'
    self._python = self._environment / 'bin' / 'python'
    self._mark = self._beside('original_was_read')
    self._install()
    self._check()
    self._server = self._start(['tests/mutants/server.py'], stdin=subprocess.PIPE)
    self._running: int | None = None

  def write(self, name: str, text: str) -> None:
    """Replaces a file; what Python has compiled of it does not stay."""
    path = self._folder / name
    path.write_text(text)
    for compiled in path.parent.glob(f'__pycache__/{path.stem}.*.pyc'):
      compiled.unlink()

  def pytest(self, words: Sequence[str], seconds: float | None = None) -> tuple[int | None, str]:
    """Runs pytest; its exit status (None: it took too long and was stopped), and what it said.

    Raises:
      RuntimeError: a process has read a file of the original.
    """
    said = self._beside('said')
    words = [*words, f'--basetemp={self._beside("tmp")}']
    print(json.dumps({'words': words, 'said': str(said)}), file=self._server.stdin, flush=True)
    self._running = self._answer()
    slow = threading.Event()
    timer = threading.Timer(seconds or 0, lambda: (slow.set(), self._kill()))
    if seconds:
      timer.start()
    status = self._answer()
    timer.cancel()
    self._kill()  # what a test has left
    if self._mark.exists():
      raise RuntimeError(f'not the copy was read, but {self._mark.read_text()}')
    return None if slow.is_set() else status, said.read_text(errors='replace')

  def stop(self) -> None:
    """Ends what runs there."""
    self._kill()
    self._server.kill()
    self._server.wait()

  def _answer(self) -> int:
    assert self._server.stdout
    line = self._server.stdout.readline()
    if not line:
      raise RuntimeError(f'{self._folder}: the process that runs tests has ended.')
    return int(line)

  def _kill(self) -> None:
    if self._running:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(self._running, signal.SIGKILL)

  def _beside(self, what: str) -> Path:
    return self._folder.with_name(f'{self._folder.name}_{what}')

  def _start(self, words: Sequence[str], **options: object) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'PYTHONHOME')}
    environment |= {
      'PATH': f'{self._python.parent}:{environment["PATH"]}',
      'VIRTUAL_ENV': str(self._environment),
      # What a fault writes into the cache, no other finds. Programs are found by what they are.
      'ILM_CACHE': str(self._folder.parent / 'cache'),
      'JAX_COMPILATION_CACHE_DIR': str(cache_dir() / 'xla'),
    }
    return subprocess.Popen(
      [str(self._python), *words],
      env=environment,
      stdout=subprocess.PIPE,
      text=True,
      start_new_session=True,  # Ctrl-C is for the runner, which stops the rest
      **{'cwd': self._folder, **options},  # pyright: ignore[reportCallIssue, reportArgumentType]
    )

  def _install(self) -> None:
    venv.create(self._environment, symlinks=True)
    original = Path(sysconfig.get_path('purelib'))
    site = self._environment / original.relative_to(sys.prefix)
    finders = list(original.glob('__editable__*ilm_jax*.py'))
    if not finders:
      raise RuntimeError(f'ilm_jax is not installed in {sys.prefix} with `pip install --editable`.')
    for path in (*original.glob('*.pth'), *finders):
      (site / path.name).write_text(self._moved(path))
    (site / '_original.pth').write_text(f'{original}\n')  # whose own .pth files nobody reads
    folders = tuple(f'{ROOT / name}{os.sep}' for name in ('ilm_jax', 'tasks', 'tests', 'launch'))
    (site / 'guard.py').write_text(_GUARD.format(folders=folders, mark=str(self._mark)))
    (site / 'guard.pth').write_text('import guard\n')
    for script in Path(sys.prefix, 'bin').iterdir():
      target = self._python.with_name(script.name)
      if target.exists() or not script.is_file():
        continue
      if script.read_bytes()[:2] == b'#!':
        target.write_text(self._moved(script))
        target.chmod(0o755)
      else:
        target.symlink_to(script)

  def _moved(self, file: Path) -> str:
    return file.read_text().replace(str(ROOT), str(self._folder))

  def _check(self) -> None:
    shown = self._start(['-c', _SHOW], cwd='/').communicate()[0].split()
    if len(shown) != 3 or not all(Path(x).is_relative_to(self._folder) for x in shown):
      raise RuntimeError(f'{self._folder}: what is imported there is {shown or "nothing"}.')
    reader = self._start(['-c', f'open({str(ROOT / "ilm_jax/main.py")!r})'])
    reader.communicate()
    if reader.returncode != 70 or not self._mark.exists():
      raise RuntimeError(f'{self._folder}: a process there can read the original.')
    self._mark.unlink()

"""The configuration from a clone and from a wheel, and what importing it imports."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import gin
import pytest

import ilm_jax
from tests.support.config_helpers import write

PACKAGE = Path(ilm_jax.__file__).parent


def python(code: str, cwd: Path, path: Path | None = None) -> str:
  environment = {**os.environ, **({'PYTHONPATH': str(path)} if path else {})}
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=cwd, env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert 'Path not found' not in done.stderr
  return done.stdout


def test_imports_are_light(tmp_path):
  code = (
    'import sys, ilm_jax\n'
    'assert "gin" not in sys.modules\n'
    'import ilm_jax.config.reader, ilm_jax.config.flags\n'
    'print([m for m in ("tensorflow", "jax", "jaxlib", "flax", "seqio") if m in sys.modules])'
  )
  assert python(code, tmp_path) == '[]\n'


def test_no_other_file_of_the_library_imports_gin():
  found = [
    path.relative_to(PACKAGE).as_posix()
    for path in PACKAGE.rglob('*.py')
    for line in path.read_text().splitlines()
    if line.split()[:2] in (['import', 'gin'], ['from', 'gin'])
  ]
  assert set(found) == {'config/reader.py'}


@pytest.mark.parametrize('layout', ['clone', 'wheel'])
def test_shipped_gin_files_are_found_from_any_directory(tmp_path, layout):
  root = tmp_path / 'root'
  for path in [*PACKAGE.glob('*.py'), *(PACKAGE / 'config').glob('*.py')]:
    copy = root / 'ilm_jax' / path.relative_to(PACKAGE)
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, copy)
  folder = root / 'gin'
  if layout == 'wheel':  # gin-config lies beside the package, our files inside it
    shutil.copytree(Path(gin.__file__).parent, root / 'gin')
    folder = root / 'ilm_jax/gin'
  write(
    folder,
    models__base='take.value = %SIZE\nSIZE = 1',
    jobs__x="include 'models/base.gin'\nSIZE = 2",
    jobs__bad='SIZE 2',
  )
  code = (
    'from ilm_jax.config import files, reader\n'
    'def take(*, value: int): print(value, files.__file__)\n'
    'parsed = reader.parse(take, ["jobs/x.gin"])\n'
    'parsed.call()\n'
    'print(parsed.operative_text)\n'
    'try: reader.parse(take, ["jobs/bad.gin"])\n'
    'except ValueError as error: print(error)\n'
  )
  for name in ('elsewhere', 'root'):
    (tmp_path / name).mkdir(exist_ok=True)
    out = python(code, cwd=tmp_path / name, path=root)
    assert out.startswith(f'2 {root}')
    assert 'take.value = 2  # SIZE, gin/jobs/x.gin' in out
    assert 'gin/jobs/bad.gin:1: ' in out

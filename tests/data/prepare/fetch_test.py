"""Fetching from wheels that are really built, with the real pip, and really killed."""

import hashlib
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile

import pytest

from ilm_jax.data.prepare.fetch import cache_dir, fetch_package_file, fetch_package_files
from ilm_jax.errors import UsageError

SMALL = b'user item\n1 2\n'
LARGE = bytes(96 << 20)  # compresses to 100 KB, takes long enough to write to be killed meanwhile
REQUIREMENT = 'demo_data==1.0'


def sha256(data):
  return hashlib.sha256(data).hexdigest()


def build_wheel(folder, files):
  path = folder / 'demo_data-1.0-py3-none-any.whl'
  meta = 'demo_data-1.0.dist-info/'
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as wheel:
    wheel.writestr(meta + 'METADATA', 'Metadata-Version: 2.1\nName: demo_data\nVersion: 1.0\n')
    wheel.writestr(meta + 'WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
    wheel.writestr(meta + 'RECORD', '')
    for name, data in files.items():
      wheel.writestr(name, data)
  return path


@pytest.fixture(scope='module')
def built(tmp_path_factory):
  """The wheel: to compress its large file takes half a second."""
  files = {'demo/a.txt': SMALL, 'demo/b.txt': b'b', 'demo/large.bin': LARGE}
  return build_wheel(tmp_path_factory.mktemp('built'), files)


@pytest.fixture
def wheels(built, tmp_path, monkeypatch):
  """A directory that is pip's only index, an empty cache, and one wheel."""
  monkeypatch.setenv('PIP_NO_INDEX', '1')
  monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path / 'wheels'))
  monkeypatch.setenv('ILM_CACHE', str(tmp_path / 'cache'))
  (tmp_path / 'wheels').mkdir()
  shutil.copy(built, tmp_path / 'wheels')
  return tmp_path / 'wheels'


def files_in_cache():
  """Whatever lies in the cache, the (empty) lock files apart."""
  files = [p for p in cache_dir().rglob('*') if p.is_file() and p.suffix != '.lock']
  return sorted(str(p.relative_to(cache_dir())) for p in files)


def start_fetch(member, data, before=''):
  code = (
    f'import resource, signal; {before}\n'
    'from ilm_jax.data.prepare.fetch import fetch_package_file\n'
    f'fetch_package_file({REQUIREMENT!r}, {member!r}, {sha256(data)!r})'
  )
  return subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.PIPE, text=True)


def test_fetches_members_once(wheels, capfd):
  wanted = {'demo/a.txt': sha256(SMALL), 'demo/b.txt': sha256(b'b')}
  paths = fetch_package_files(REQUIREMENT, wanted)
  assert {member: path.read_bytes() for member, path in paths.items()} == {
    'demo/a.txt': SMALL,
    'demo/b.txt': b'b',
  }
  assert files_in_cache() == [
    'packages/demo-data-1.0/demo/a.txt',
    'packages/demo-data-1.0/demo/b.txt',
  ]
  assert REQUIREMENT in capfd.readouterr().err
  (wheels / 'demo_data-1.0-py3-none-any.whl').unlink()  # from here on only the cache can answer
  assert fetch_package_file(REQUIREMENT, 'demo/a.txt', sha256(SMALL)) == paths['demo/a.txt']
  assert capfd.readouterr().err == ''


def test_default_cache_is_under_home(monkeypatch, tmp_path):
  monkeypatch.delenv('ILM_CACHE', raising=False)
  monkeypatch.setenv('HOME', str(tmp_path))
  assert cache_dir() == tmp_path / '.cache' / 'ilm_jax'


def test_wrong_hash_keeps_nothing(wheels):
  wanted = {'demo/a.txt': sha256(SMALL), 'demo/b.txt': sha256(b'another')}
  with pytest.raises(UsageError, match='Nothing was kept') as error:
    fetch_package_files(REQUIREMENT, wanted)
  for part in ('demo/b.txt', sha256(b'b'), sha256(b'another'), REQUIREMENT):
    assert part in str(error.value)
  assert files_in_cache() == []


def test_changed_file_in_the_cache_is_refused(wheels):
  path = fetch_package_file(REQUIREMENT, 'demo/a.txt', sha256(SMALL))
  path.write_bytes(SMALL[:-1])
  with pytest.raises(UsageError, match='Delete it') as error:
    fetch_package_file(REQUIREMENT, 'demo/a.txt', sha256(SMALL))
  for part in (str(path), sha256(SMALL), sha256(SMALL[:-1])):
    assert part in str(error.value)
  path.unlink()
  assert fetch_package_file(REQUIREMENT, 'demo/a.txt', sha256(SMALL)).read_bytes() == SMALL


def test_member_not_in_the_wheel(wheels):
  with pytest.raises(UsageError, match=r"no file 'demo/aa.txt'.*Did you mean 'demo/a.txt'"):
    fetch_package_file(REQUIREMENT, 'demo/aa.txt', sha256(SMALL))
  assert files_in_cache() == []


@pytest.mark.parametrize('member', ['../evil.txt', '/etc/passwd', 'a/../../b', '', 'c:\\x', 'a\\b'])
def test_member_may_not_leave_the_cache(wheels, member):
  with pytest.raises(UsageError, match='a relative path inside the wheel'):
    fetch_package_file(REQUIREMENT, member, sha256(SMALL))


def test_wheel_with_path_traversal_writes_nothing_outside(wheels, tmp_path):
  evil = {'../../evil.txt': b'x', str(tmp_path / 'absolute.txt'): b'x', 'demo/a.txt': SMALL}
  build_wheel(wheels, evil)
  fetch_package_file(REQUIREMENT, 'demo/a.txt', sha256(SMALL))
  assert files_in_cache() == ['packages/demo-data-1.0/demo/a.txt']
  assert sorted(p.name for p in tmp_path.iterdir()) == ['cache', 'wheels']


@pytest.mark.parametrize('requirement', ['demo_data', 'demo_data>=1.0', 'demo_data==1.*', '--help'])
def test_requirement_must_be_pinned(wheels, requirement):
  with pytest.raises(UsageError, match='pinned'):
    fetch_package_file(requirement, 'demo/a.txt', sha256(SMALL))


def test_sha256_must_be_one(wheels):
  with pytest.raises(UsageError, match='64 hex digits'):
    fetch_package_file(REQUIREMENT, 'demo/a.txt', 'abc')


def test_offline_says_which_file_to_put_where(wheels, tmp_path):
  wheel = (wheels / 'demo_data-1.0-py3-none-any.whl').rename(tmp_path / 'elsewhere.whl')
  with pytest.raises(UsageError, match='pip could not download it') as error:
    fetch_package_file(REQUIREMENT, 'demo/a.txt', sha256(SMALL))
  message = str(error.value)
  assert 'No matching distribution found for demo_data==1.0' in message  # pip's own last lines
  assert 'pip download --no-deps --only-binary=:all: demo_data==1.0' in message
  # Following the advice works: its last line is the unzip command, here without unzip.
  folder = message.rsplit("-d '", 1)[1].removesuffix("'")
  with zipfile.ZipFile(wheel) as archive:
    archive.extract('demo/a.txt', folder)
  path = fetch_package_file(REQUIREMENT, 'demo/a.txt', sha256(SMALL))
  assert path.read_bytes() == SMALL


def test_damaged_wheel(wheels):
  path = wheels / 'demo_data-1.0-py3-none-any.whl'
  data = bytearray(path.read_bytes())
  at = data.index(b'demo/large.bin') + 500  # inside the compressed bytes; pip reads METADATA only
  data[at : at + 100] = b'\xff' * 100
  path.write_bytes(data)
  with pytest.raises(UsageError, match='is damaged'):
    fetch_package_file(REQUIREMENT, 'demo/large.bin', sha256(LARGE))
  assert files_in_cache() == []


def test_kill_in_the_middle_leaves_nothing_that_passes_for_complete(wheels):
  process = start_fetch('demo/large.bin', LARGE)
  partial = cache_dir() / 'packages' / '.demo-data-1.0.partial'
  deadline = time.monotonic() + 60
  while not any(p.stat().st_size for p in partial.glob('*/0')):
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline
    time.sleep(0.001)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  left = [p for p in partial.glob('*/0')]
  assert len(left) == 1
  assert 0 < left[0].stat().st_size < len(LARGE)
  assert not (cache_dir() / 'packages' / 'demo-data-1.0').exists()

  path = fetch_package_file(REQUIREMENT, 'demo/large.bin', sha256(LARGE))
  assert path.stat().st_size == len(LARGE)
  assert files_in_cache() == ['packages/demo-data-1.0/demo/large.bin']  # and the leftover is gone


def test_full_disk(wheels):
  # Files beyond 4 MB cannot be written: the wheel (100 KB) can be, its member cannot.
  limit = 'resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))'
  process = start_fetch('demo/large.bin', LARGE, limit)
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == 1
  assert 'UsageError' in stderr
  assert 'File too large' in stderr
  assert 'set ILM_CACHE to another directory' in stderr
  assert files_in_cache() == []


def test_cache_that_is_a_file(wheels, tmp_path):
  (tmp_path / 'cache').write_text('')
  with pytest.raises(UsageError, match='cannot use the cache'):
    fetch_package_file(REQUIREMENT, 'demo/a.txt', sha256(SMALL))


def test_processes_at_the_same_time(wheels):
  processes = [start_fetch('demo/large.bin', LARGE) for _ in range(3)]
  said = [process.communicate(timeout=120)[1] for process in processes]
  assert [process.returncode for process in processes] == [0, 0, 0], said
  assert sum('fetching' in text for text in said) == 1  # the others waited and found it
  assert files_in_cache() == ['packages/demo-data-1.0/demo/large.bin']


def test_threads_at_the_same_time(wheels):
  paths = []

  def fetch():
    paths.append(fetch_package_file(REQUIREMENT, 'demo/a.txt', sha256(SMALL)))

  threads = [threading.Thread(target=fetch) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(paths) == 4
  assert len(set(paths)) == 1


def test_import_is_light():
  code = (
    'import sys, ilm_jax.data.prepare.fetch;'
    'print(sorted({"numpy", "jax", "pandas"} & set(sys.modules)))'
  )
  assert subprocess.check_output([sys.executable, '-c', code], text=True).strip() == '[]'

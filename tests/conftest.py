"""What tests share: which of them run, and data to run on."""

import fcntl
import gc
import os
import subprocess
import sys
from pathlib import Path

# What is equal is equal in float32: tests do not depend on what a CPU is fast at.
os.environ.setdefault('ILM_CPU_BFLOAT16', '0')
# Before anything imports TensorFlow or NumPy's BLAS.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

from ilm_jax.data.prepare.fetch import cache_dir

# Before anything imports JAX: what one test, process or run has compiled, the others find.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(cache_dir() / 'xla'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')
# Most of the time goes into compiling programs that then run for moments. Not for `make parity`.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
if os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] == '1':
  # XLA's older emitters make slower code in a third of the time.
  os.environ.setdefault('XLA_FLAGS', '--xla_cpu_use_fusion_emitters=false')

import numpy as np
import pytest

from ilm_jax.data.prepare.preparation import PreparationOptions, prepare
from ilm_jax.data.prepare.raw import RawData
from ilm_jax.data.prepared import PreparedData
from tests.support import eight_devices

gc.set_threshold(100_000, 20, 100)  # as the command does (main.py)


# Files that take longest, which come first: none is begun when the other worker has ended.
LONG = ('demo', 'eight_devices', 'processes', 'train', 'jobs', 'evaluate', 'reader')


def pytest_collection_modifyitems(config, items):
  if not eight_devices.ARE_HERE:
    left_out = [item for item in items if 'eight_devices' in item.keywords]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if 'eight_devices' not in item.keywords]
  names = [f'{name}_test' for name in LONG]
  items.sort(
    key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names)
  )
  if os.environ.get('ILM_OFFLINE') == '1':
    for item in items:
      if 'network' in item.keywords:
        item.add_marker(pytest.mark.skip(reason='ILM_OFFLINE=1'))


@pytest.fixture(scope='module', autouse=True)
def forget_programs():
  """A process may have 65,530 memory maps. Thousands of programs hold more, and it crashes."""
  yield
  if 'jax' in sys.modules:
    sys.modules['jax'].clear_caches()


@pytest.fixture(scope='session')
def ml100k_directory(tmp_path_factory) -> Path:
  """MovieLens-100K as `ilm prepare` makes it, once for all workers; its output is in ../stdout.

  Tests that use it are marked `network`: the data are fetched where they are not in the cache.
  """
  base = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    base = base.parent  # the workers' common directory
  directory = base / 'shared' / 'ml100k'
  directory.parent.mkdir(exist_ok=True)
  with open(directory.parent / 'lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not directory.exists():
      command = [sys.executable, '-m', 'ilm_jax.main', 'prepare']
      done = subprocess.run(
        [*command, '--dataset=ml100k', f'--output={directory}'], capture_output=True, text=True
      )
      (directory.parent / 'stdout').write_text(done.stdout)
      assert done.returncode == 0, done.stderr
  return directory


@pytest.fixture(scope='session')
def small_prepared() -> PreparedData:
  """A small data set with the traits of a real one: 60 users, up to 40 items, ratings, text.

  Popularity is skewed, some rows of a user have equal times, one item has no genres, and two have
  one title.
  """
  rng = np.random.default_rng(0)
  num_users, num_items = 60, 40
  weights = 1 / np.arange(1, num_items + 1) ** 0.7
  users, items, times = [], [], []
  for user in range(num_users):
    count = int(rng.integers(5, 20))
    chosen = rng.choice(num_items, count, replace=False, p=weights / weights.sum())
    users += [f'u{user:02}'] * count
    items += [f'i{item:02}' for item in chosen]
    times += (1_000_000 + np.cumsum(rng.integers(0, 3, count))).tolist()
  order = rng.permutation(len(users))
  genres = ['Action', 'Comedy', 'Drama', 'Sci-Fi']
  titles = [f'Film Number {i} ({1950 + i})' for i in range(num_items)]
  titles[7] = titles[8]
  raw = RawData(
    name='small',
    users=np.array(users, dtype=object)[order],
    items=np.array(items, dtype=object)[order],
    timestamps=np.array(times, np.int64)[order],
    ratings=rng.integers(1, 6, len(users)).astype(np.float32),
    order='timestamp',
    item_ids=np.array([f'i{item:02}' for item in range(num_items)], dtype=object),
    item_text={
      'title': titles,
      'genres': ['' if i == 3 else f'{genres[i % 4]}, {genres[i // 4 % 4]}' for i in range(40)],
      'year': [str(1950 + i) for i in range(num_items)],
    },
    provenance={'source': 'tests/conftest.py', 'licence': 'Apache-2.0'},
  )
  return prepare(raw, PreparationOptions(k_core=3))


@pytest.fixture(scope='session')
def books_directory(tmp_path_factory) -> Path:
  """What `ilm prepare` makes of two CSV files: 30 users who read 24 books of four genres.

  A user keeps to one genre, mostly, so that vectors of items and their texts have to do with each
  other.
  """
  from ilm_jax.prepare import prepare

  rng = np.random.default_rng(0)
  folder = tmp_path_factory.mktemp('books')
  genres = ['Crime', 'Poetry', 'Travel', 'Science']
  books = [f'b{i},The {genres[i % 4]} Book {i},{genres[i % 4]}' for i in range(24)]
  (folder / 'items.csv').write_text('\n'.join(['item,title,genres', *books]) + '\n')
  rows = ['user,item,timestamp']
  for user in range(30):
    liked = [i for i in range(24) if i % 4 == user % 4 or rng.random() < 0.2]
    rows += [f'u{user},b{i},{t}' for t, i in enumerate(rng.permutation(liked))]
  (folder / 'interactions.csv').write_text('\n'.join(rows) + '\n')
  return prepare(
    dataset='csv',
    output=folder / 'prepared',
    source={
      'name': 'books',
      'interactions': str(folder / 'interactions.csv'),
      'items': str(folder / 'items.csv'),
    },
    k_core=3,
    heldout_items=0.2,
    ials_factors=8,
    rankers=False,
  )


# ---------------------------------------------------------------- a tiny run of phase 2


@pytest.fixture(scope='session')
def run(tmp_path_factory) -> Path:
  """What `tiny_run.trained` leaves."""
  from tests.support import tiny_run

  return tiny_run.trained(tmp_path_factory)


@pytest.fixture(scope='module')
def model(run):
  """The run as a Recommender, in float32."""
  from ilm_jax.serving.recommender import Recommender

  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('ILM_CPU_BFLOAT16', '0')
    return Recommender.load(run)


@pytest.fixture(scope='module')
def plain(model):
  """Its language model and soft tokens in a few lines of their own."""
  from tests.support.plain_lm import PlainLm

  return PlainLm(model)


@pytest.fixture(scope='session')
def evaluated(tmp_path_factory) -> Path:
  """What `ilm evaluate` says of the run."""
  from tests.support import evaluations

  return evaluations.evaluated(tmp_path_factory)


@pytest.fixture(scope='module')
def results(evaluated):
  """The same, read."""
  from ilm_jax.evaluation.results import Results

  return Results.load(evaluated)

"""`ilm prepare` from the command line to the directory, and what may go wrong between."""

import dataclasses
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import ilm_jax.prepare
from ilm_jax.cf import rankers
from ilm_jax.cf.entity_table import EntityTable
from ilm_jax.data.prepare import preparation, tfds_io
from ilm_jax.data.prepared_records import load_prepared
from ilm_jax.errors import UsageError
from ilm_jax.main import main
from ilm_jax.metrics import ranking
from ilm_jax.runtime.atomic_directory import leftovers
from ilm_jax.tasks import sources

ILM = Path(sys.executable).with_name('ilm')
FILES = [
  'config.gin',
  'dataset.json',
  'entity_table',
  'operative_config.gin',
  'rankers.json',
  'rankers.txt',
  'statistics.json',
  'statistics.png',
  'statistics.txt',
  'tfds',
]


@pytest.fixture
def books(tmp_path, small_prepared):
  """A folder with the files of a domain: the rows of `small_prepared`, with columns of its own."""
  p = small_prepared
  rows = ['reader_id,book,date,stars']
  for user in range(p.num_users):
    span = slice(p.offsets[user], p.offsets[user + 1])
    parts = [(p.items[span], p.timestamps[span], p.ratings[span])]
    for split in ('validation', 'test'):
      columns = (
        getattr(p, f'{split}_{name}')[[user]] for name in ('items', 'timestamps', 'ratings')
      )
      parts.append(tuple(columns))
    for item, timestamp, rating in zip(*map(np.concatenate, zip(*parts))):
      rows.append(f'{p.user_keys[user]},{p.item_keys[item]},{timestamp},{rating:g}')
  items = ['book,name,genres'] + [
    f'{key},"{title}","{genres}"'
    for key, title, genres in zip(p.item_keys, p.item_text['title'], p.item_text['genres'])
  ]
  (tmp_path / 'reviews.csv').write_text('\n'.join(rows) + '\n')
  (tmp_path / 'books.csv').write_text('\n'.join(items) + '\n')
  return tmp_path


FLAGS = (
  '--dataset=tabular',
  '--source.name=books',
  '--source.interactions=reviews.csv',
  '--source.items=books.csv',
  '--source.user=reader_id',
  '--source.item=book',
  '--source.timestamp=date',
  '--source.rating=stars',
  '--source.title=name',
  '--k_core=3',
  '--ials_regularization=0.5',
)


@pytest.mark.network
def test_movielens_100k(ml100k_directory):
  assert sorted(path.name for path in ml100k_directory.iterdir()) == FILES
  prepared = load_prepared(ml100k_directory)
  metadata = json.loads((ml100k_directory / 'dataset.json').read_text())
  assert metadata['counts'] == {
    'users': 943,
    'items': 1349,
    'interactions': 99_287,
    'train': 99_287 - 2 * 943,
    'validation': 943,
    'test': 943,
    'heldout_items': 135,
  }
  golden = Path(__file__).parent / 'golden' / 'ml100k_fingerprint.txt'
  assert metadata['fingerprint'] == prepared.fingerprint == golden.read_text().strip()
  assert metadata['settings']['source']['tie_order'] == 'item id'
  assert metadata['creation']['dataset'] == 'ml100k'
  assert metadata['versions']['ilm_jax'] == ilm_jax.__version__
  config = (ml100k_directory / 'operative_config.gin').read_text()
  assert 'prepare.k_core = 5  # default' in config
  table = EntityTable.load(ml100k_directory / 'entity_table', prepared)
  assert table.vectors.shape == (1349 + 943, 32)
  printed = (ml100k_directory.parent / 'stdout').read_text()
  assert 'ml100k: 943 users, 1,349 items, 99,287 interactions (density 7.80%)' in printed
  assert (ml100k_directory / 'statistics.txt').read_text() in printed
  assert 'the test item\n                of 44.1% of users is decided by a tie' in printed
  assert 'Downloading and preparing' not in printed
  assert f'prepared: {ml100k_directory}' in printed
  assert oct(ml100k_directory.stat().st_mode & 0o777 | os.umask(0o022)) == '0o777'


@pytest.mark.network
def test_reference_figures_of_movielens_100k(ml100k_directory):
  """HR@5, NDCG@5, HR@10, NDCG@10 of an independent implementation; see tests/cf/rankers_test.py."""
  results = json.loads((ml100k_directory / 'rankers.json').read_text())['results']
  names = ('HR@5', 'NDCG@5', 'HR@10', 'NDCG@10')
  found = {
    (r['ranker'], r['seen_items']): [round(r['metrics'][name]['mean'], 4) for name in names]
    for r in results
    if r['split'] == 'test'
  }
  assert found['itemknn_recency', 'removed'] == [0.0764, 0.0498, 0.1156, 0.0627]
  assert found['itemknn_recency', 'kept'] == [0.0308, 0.0201, 0.0615, 0.0299]
  assert found['itemknn', 'removed'] == [0.0339, 0.0199, 0.0604, 0.0285]
  assert found['ease', 'removed'] == [0.0456, 0.0278, 0.0912, 0.0426]
  prepared = load_prepared(ml100k_directory)
  popularity, _ = rankers.evaluate_rankers(prepared, rankers=['popularity'], splits=['test'])
  metrics = ranking.ranking_metrics(popularity.ranks.optimistic())
  means = [round(float(metrics[name].mean()), 4) for name in names]
  assert means == [0.0339, 0.0207, 0.0498, 0.0257]


def test_a_csv_domain(books, small_prepared, monkeypatch, capsys):
  monkeypatch.chdir(books)
  assert main(['prepare', *FLAGS, '--output=out/books']) == 0
  done = capsys.readouterr()
  directory = books / 'out' / 'books'
  assert sorted(path.name for path in directory.iterdir()) == FILES
  assert [path.name for path in (books / 'out').iterdir()] == ['books']
  prepared = load_prepared(directory)
  assert prepared.name == 'books'
  assert prepared.num_interactions == small_prepared.num_interactions
  # The same rows from memory and from files, under ids of two random orders.
  titles = small_prepared.item_text['title']
  by_key = dict(zip(small_prepared.user_keys, range(prepared.num_users)))
  for user, key in enumerate(prepared.user_keys):
    expected = [titles[i] for i in small_prepared.history(by_key[key])]
    assert [prepared.item_text['title'][i] for i in prepared.history(user)] == expected
  assert 'broken by row of the source' in done.out
  assert 'Traceback' not in done.err
  # The saved configuration makes the same data again.
  assert (
    main(['prepare', '--gin_file=out/books/config.gin', '--output=again', '--rankers=false']) == 0
  )
  assert load_prepared(books / 'again').fingerprint == prepared.fingerprint
  assert not (books / 'again' / 'rankers.json').exists()


MODULE = """
from ilm_jax.tasks import sources, tabular

@sources.source('my_books')
def my_books(folder: str, min_stars: float = 0.0):
  return tabular.tabular(
    'books', f'{folder}/reviews.csv', f'{folder}/books.csv', user='reader_id', item='book',
    timestamp='date', rating='stars', title='name')
"""


def test_a_module_of_the_user(books, monkeypatch, capsys):
  (books / 'my_books.py').write_text(MODULE)
  monkeypatch.chdir(books)
  monkeypatch.setattr(sys, 'path', [*sys.path])  # the command adds the folder
  monkeypatch.delitem(sys.modules, 'my_books', raising=False)
  argv = ['--modules=my_books', '--dataset=my_books', '--output=out', '--ials_regularization=0.5']
  argv += ['--rankers=false']
  assert main(['prepare', *argv, '--source.folder=.', '--k_core=3', '--use_beam']) == 0
  metadata = json.loads((books / 'out' / 'dataset.json').read_text())
  assert metadata['creation']['modules'] == ['my_books']
  assert metadata['creation']['source'] == {'folder': '.'}
  assert load_prepared(books / 'out').num_users == metadata['counts']['users']

  capsys.readouterr()
  assert main(['prepare', *argv, '--output=other', '--source.foldr=.']) == 2
  assert capsys.readouterr().err == (
    "ilm: dataset='my_books' has no option 'foldr'; allowed: folder, min_stars. Did you mean"
    " 'folder'?\n"
  )


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    (
      ['--modules=my_boks'],
      "modules: no module 'my_boks'; looked for in .*Did you mean 'my_books'",
    ),
    (['--dataset=tabuler'], "dataset='tabuler': unknown.*Did you mean 'tabular'"),
    (['--source.usr=x'], "no option 'usr'; .*Did you mean 'user'"),
    (['--source.user=5'], "'user' takes str, and 5 is int.*--source.user=\"'5'\""),
    (['--source.user=reader'], "user='reader': .*no such column.*Did you mean 'reader_id'"),
    (['--source.interactions=review.csv'], "no such file. Did you mean 'reviews.csv'"),
    (['--duplicates=frist'], "duplicates .*'first', 'last'.*Did you mean 'first'"),
    (['--k_core=many'], 'k_core .* takes int'),
    (['--k_core=50'], 'nothing is left'),
    (['--heldout_items=1.5'], 'heldout_items=1.5'),
    (['--ials_factors=0'], 'iALS: factors=0'),
    (['--ials_regularization=1e6'], 'so strong that the vectors are all zero'),
    (['--output=gs://bucket/books'], 'remote'),
    (['--output=reviews.csv/books'], 'cannot be made'),
    (['--output=.'], 'exists already'),
  ],
)
def test_mistakes_are_told_and_leave_nothing(books, monkeypatch, capsys, argv, message):
  monkeypatch.chdir(books)
  (books / 'my_books.py').write_text(MODULE)
  before = sorted(books.rglob('*'))
  assert main(['prepare', *FLAGS, '--output=out', *argv]) == 2
  error = capsys.readouterr().err
  assert error.startswith('ilm: ')
  assert re.search(message, error), error
  assert sorted(books.rglob('*')) == before


def test_an_existing_output_is_refused_before_any_work(tmp_path, monkeypatch):
  def no_work(*args, **kwargs):
    raise AssertionError('work was begun')

  monkeypatch.setattr(sources, 'load_raw', no_work)
  (tmp_path / 'out').mkdir()
  with pytest.raises(UsageError, match='exists already, and a prepared data set is never over'):
    ilm_jax.prepare.prepare(dataset='ml100k', output=tmp_path / 'out')
  assert list(tmp_path.iterdir()) == [tmp_path / 'out']


def test_an_output_that_appears_meanwhile_is_kept(books, monkeypatch, capsys):
  monkeypatch.chdir(books)
  prepare_splits = preparation.prepare

  def another_process(*args):
    (books / 'out').mkdir(exist_ok=True)
    (books / 'out' / 'precious').write_text('x')
    return prepare_splits(*args)

  monkeypatch.setattr(preparation, 'prepare', another_process)
  assert main(['prepare', *FLAGS, '--output=out', '--rankers=false']) == 2
  assert 'exists already' in capsys.readouterr().err
  assert [path.name for path in (books / 'out').iterdir()] == ['precious']
  assert list(books.glob('.out*')) == []


def test_records_that_read_back_differently_are_no_result(books, monkeypatch):
  monkeypatch.chdir(books)
  write = tfds_io.write

  def swapped(prepared, directory, **options):
    write(prepared, directory, **options)
    (a,) = directory.rglob('*-validation.tfrecord*')
    (b,) = directory.rglob('*-test.tfrecord*')
    data = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(data)

  monkeypatch.setattr(tfds_io, 'write', swapped)
  with pytest.raises(RuntimeError, match='not those that were written'):
    main(['prepare', *FLAGS, '--output=out', '--rankers=false'])
  assert list(books.glob('*out*')) == []


# Early and late; what lies between is no other directory.
@pytest.mark.parametrize(
  'sign',
  [
    pytest.param('', marks=pytest.mark.slow),
    '/statistics.json',
    pytest.param('/entity_table', marks=pytest.mark.slow),
    pytest.param('/tfds', marks=pytest.mark.slow),
    '/dataset.json',
  ],
)
def test_kill_9_leaves_nothing_at_output(books, sign):
  """Kills the process as soon as the named thing exists in the temporary directory."""
  command = [str(ILM), 'prepare', *FLAGS, '--output=out', '--rankers=false']
  with subprocess.Popen(
    command, cwd=books, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  ) as process:
    limit = time.monotonic() + 120
    while not list(books.glob(f'.out.incomplete-*{sign}')) and process.poll() is None:
      assert time.monotonic() < limit
      time.sleep(0.0005)
    process.kill()
  if (books / 'out').exists():  # 'dataset.json' is the last file: the rename may come first
    assert sign == '/dataset.json'
    load_prepared(books / 'out')
    return
  assert process.returncode == -signal.SIGKILL
  (left,) = books.glob('*out*')
  assert leftovers(books / 'out') == [left]
  with pytest.raises(UsageError, match='not a complete prepared data set'):
    load_prepared(left)
  with pytest.raises(UsageError, match='not a complete prepared data set'):
    load_prepared(books / 'out')


@pytest.mark.network
@pytest.mark.parametrize(
  ('kilobytes', 'during'),
  [(20, 'writing statistics'), (200, 'fitting iALS'), (500, 'writing records')],
)
def test_full_disk_leaves_nothing(tmp_path, ml100k_directory, capsys, kilobytes, during):
  """No file may grow beyond a size, which a write sees as it sees a full disk."""
  argv = ['prepare', '--dataset=ml100k', f'--output={tmp_path}/out', '--rankers=false']
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes << 10, limits[1]))
  try:
    with pytest.raises(Exception, match='File too large'):
      main(argv)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert during in capsys.readouterr().out.splitlines()[-1]
  assert list(tmp_path.iterdir()) == []


def test_rankers_that_do_not_fit_are_skipped_with_a_reason(small_prepared, tmp_path, monkeypatch):
  def write(prepared):
    vectors = np.ones((prepared.num_users, 2)), np.ones((prepared.num_items, 2))
    return ilm_jax.prepare.write_rankers(prepared, vectors, 0, tmp_path)

  monkeypatch.setattr(rankers, 'EASE_MAX_ITEMS', 10)
  text = write(small_prepared)
  assert f'skipped ease: needs a dense items x items matrix: {small_prepared.num_items}' in text
  values = json.loads((tmp_path / 'rankers.json').read_text())
  assert list(values['skipped']) == ['ease']
  assert 'itemknn' in {r['ranker'] for r in values['results']}
  monkeypatch.setattr(rankers, 'ITEM_KNN_MAX_PAIRS', 10)
  assert 'skipped itemknn_recency: up to' in write(small_prepared)
  assert list(json.loads((tmp_path / 'rankers.json').read_text())['skipped']) == [
    'ease',
    'itemknn',
    'itemknn_recency',
  ]

  nothing = np.full(small_prepared.num_users, -1, np.int32)
  untested = dataclasses.replace(small_prepared, validation_items=nothing, test_items=nothing)
  assert 'no user has the three interactions' in write(untested)

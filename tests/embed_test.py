"""`ilm embed`: fitted and imported tables for a prepared directory."""

import json

import numpy as np
import pytest

from ilm_jax import embed as embed_module
from ilm_jax.cf.entity_table import EntityTable, from_ials
from ilm_jax.data.prepare import tfds_io
from ilm_jax.main import main


@pytest.fixture
def data(small_prepared, tmp_path):
  tfds_io.write(small_prepared, tmp_path / 'small' / 'tfds')
  metadata = {
    'format_version': 1,
    'name': small_prepared.name,
    'fingerprint': small_prepared.fingerprint,
    'tfds_dir': 'tfds',
    'text_fields': list(small_prepared.item_text),
    'settings': dict(small_prepared.settings),
  }
  (tmp_path / 'small' / 'dataset.json').write_text(json.dumps(metadata))
  return tmp_path / 'small'


def run(data, *argv):
  return main(['embed', f'--data={data}', f'--output={data.parent}/table', *argv])


def test_ials(data, small_prepared, capsys):
  argv = ('--ials_factors=5', '--ials_regularization=0.5', '--seed=3', '--normalize=false')
  assert run(data, *argv) == 0
  table = EntityTable.load(data.parent / 'table', small_prepared)
  expected = from_ials(
    small_prepared, factors=5, regularization=0.5, seed=3, normalize=False, progress=False
  )
  np.testing.assert_array_equal(table.vectors, expected.vectors)
  assert table.settings['alpha'] == 4.0
  assert f"embed.data = '{data}'" in (data.parent / 'table' / 'config.gin').read_text()
  assert f'{small_prepared.num_items} items (0 cold) and 60 users (0 cold) of small, d_cf 5' in (
    capsys.readouterr().out
  )


def test_import_by_ids(data, small_prepared):
  rng = np.random.default_rng(0)
  order = rng.permutation(small_prepared.num_items)[3:]
  vectors = rng.normal(size=(len(order), 6))
  np.save(data.parent / 'items.npy', vectors)
  (data.parent / 'ids.txt').write_text('\n'.join(small_prepared.item_keys[i] for i in order) + '\n')
  argv = (
    f'--item_vectors={data.parent}/items.npy',
    f'--item_ids={data.parent}/ids.txt',
    '--missing=cold',
    '--users_from=cold',
    '--normalize=false',
  )
  assert run(data, *argv) == 0
  table = EntityTable.load(data.parent / 'table', small_prepared)
  assert table.method == 'import'
  assert table.cold.sum() == 3 + small_prepared.num_users
  np.testing.assert_array_equal(table.item_vectors[order], vectors.astype(np.float32))


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    (['--missing=cold'], 'missing given without item_vectors'),
    (['--user_vectors=a.npy', '--item_ids=b'], 'user_vectors, item_ids given without item_vectors'),
    (['--item_vectors=a.npy', '--ials_factors=3'], 'iALS settings are given (factors)'),
    (['--item_vectors=nowhere.npy'], 'nowhere.npy: no such file of vectors'),
    (['--missing=clod'], "Did you mean 'cold'"),
    (['--ials_alpha=-1'], 'iALS: alpha=-1'),
    (['--data=nowhere'], 'nowhere is not a complete prepared data set'),
  ],
)
def test_mistakes_leave_nothing(data, capsys, argv, message):
  assert run(data, *argv) == 2
  assert message in capsys.readouterr().err
  assert [path.name for path in data.parent.iterdir()] == ['small']


def test_an_existing_output_is_refused_before_any_work(data, capsys, monkeypatch):
  def no_work(directory):
    raise AssertionError('work was begun')

  monkeypatch.setattr(embed_module, 'load_prepared', no_work)
  (data.parent / 'table').mkdir()
  assert run(data) == 2
  assert 'an entity table is never overwritten' in capsys.readouterr().err

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy

from ilm_jax.cf import entity_table, ials
from ilm_jax.cf.entity_table import EntityTable
from ilm_jax.data.prepared import PreparedData
from ilm_jax.errors import UsageError


def _prepared(rows, num_items, name='toy', item_keys=None):
  """A data set with these training rows (one list of items a user) and no held-out rows."""
  none = np.full(len(rows), -1, np.int32)
  return PreparedData(
    name=name,
    offsets=np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64),
    items=np.array([item for row in rows for item in row], np.int32),
    ratings=None,
    timestamps=None,
    validation_items=none,
    validation_ratings=None,
    validation_timestamps=None,
    test_items=none,
    test_ratings=None,
    test_timestamps=None,
    user_keys=[f'u{i}' for i in range(len(rows))],
    item_keys=item_keys or [f'film {i}' for i in range(num_items)],
    item_text={'title': [f'Film {i}' for i in range(num_items)]},
    heldout_items=np.zeros(num_items, bool),
    settings={},
  )


@pytest.fixture
def prepared():
  return _prepared([[0, 1, 2], [2, 1, 2], [4, 0], []], num_items=5)


@pytest.fixture
def vectors():
  return np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


@pytest.fixture
def table(prepared):
  settings = {'factors': 2, 'regularization': 0.1, 'progress': False}
  return entity_table.from_ials(prepared, **settings)


def _unit(rows):
  return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_from_ials_is_items_then_users_and_marks_the_cold(prepared, table):
  users, items, _ = ials.fit(
    prepared.offsets, prepared.items, 5, factors=2, regularization=0.1, progress=False
  )
  warm_items, warm_users = [0, 1, 2, 4], [0, 1, 2]
  np.testing.assert_allclose(table.item_vectors[warm_items], _unit(items[warm_items]), rtol=1e-5)
  np.testing.assert_allclose(table.user_vectors[warm_users], _unit(users[warm_users]), rtol=1e-5)
  assert table.cold.nonzero()[0].tolist() == [3, 5 + 3]
  assert not table.vectors[table.cold].any()
  assert (table.num_entities, table.dim, table.method) == (9, 2, 'ials')
  assert table.settings['regularization'] == 0.1
  assert table.settings['seed'] == 0
  raw = entity_table.from_ials(
    prepared, normalize=False, factors=2, regularization=0.1, progress=False
  )
  np.testing.assert_array_equal(raw.item_vectors, items)


def test_from_ials_does_not_read_held_out_items(prepared, table):
  other = PreparedData(
    **{
      **{key: getattr(prepared, key) for key in PreparedData.__dataclass_fields__},
      'validation_items': np.array([4, 0, 1, 2], np.int32),
      'test_items': np.array([3, 3, 3, 3], np.int32),
    }
  )
  settings = {'factors': 2, 'regularization': 0.1, 'progress': False}
  np.testing.assert_array_equal(entity_table.from_ials(other, **settings).vectors, table.vectors)


def test_saved_and_loaded_is_the_same(tmp_path, prepared, table):
  directory = tmp_path / 'deep' / 'cf'
  table.save(directory)
  loaded = EntityTable.load(directory, prepared)
  np.testing.assert_array_equal(loaded.vectors, table.vectors)
  np.testing.assert_array_equal(loaded.cold, table.cold)
  assert loaded.content_hash == table.content_hash
  for field in ('num_items', 'method', 'settings', 'data_name', 'data_fingerprint'):
    assert getattr(loaded, field) == getattr(table, field)
  assert [path.name for path in directory.parent.iterdir()] == ['cf']


def test_save_refuses_an_existing_directory(tmp_path, table):
  table.save(tmp_path / 'cf')
  before = (tmp_path / 'cf' / entity_table.VECTORS_FILE).read_bytes()
  with pytest.raises(UsageError, match='exists already'):
    table.save(tmp_path / 'cf')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UsageError, match='exists already'):
    table.save(tmp_path / 'empty')
  assert (tmp_path / 'cf' / entity_table.VECTORS_FILE).read_bytes() == before


def test_a_failed_save_leaves_nothing(tmp_path, table):
  unserialisable = EntityTable(
    **{
      **{key: getattr(table, key) for key in EntityTable.__dataclass_fields__},
      'settings': {'when': object()},
    }
  )
  with pytest.raises(TypeError):
    unserialisable.save(tmp_path / 'cf')
  assert list(tmp_path.iterdir()) == []


def test_load_names_both_data_sets_when_they_differ(tmp_path, prepared, table):
  table.save(tmp_path / 'cf')
  other = _prepared([[0, 1, 2], [2, 1, 2], [4, 1], []], num_items=5, name='other')
  with pytest.raises(UsageError) as error:
    EntityTable.load(tmp_path / 'cf', other)
  for part in ('toy', prepared.fingerprint[:12], 'other', other.fingerprint[:12], str(tmp_path)):
    assert part in str(error.value)


def test_load_refuses_what_was_changed_or_cut(tmp_path, table):
  def saved(name):
    table.save(tmp_path / name)
    return tmp_path / name

  flipped = saved('flipped') / entity_table.VECTORS_FILE
  content = bytearray(flipped.read_bytes())
  content[-20] ^= 1
  flipped.write_bytes(content)
  with pytest.raises(UsageError, match='changed or damaged'):
    EntityTable.load(flipped.parent)

  cut = saved('cut') / entity_table.VECTORS_FILE
  cut.write_bytes(cut.read_bytes()[:-1])
  with pytest.raises(UsageError, match='missing or damaged'):
    EntityTable.load(cut.parent)

  reshaped = saved('reshaped') / entity_table.METADATA_FILE
  reshaped.write_text(json.dumps(json.loads(reshaped.read_text()) | {'dim': 7}))
  with pytest.raises(UsageError, match='says'):
    EntityTable.load(reshaped.parent)

  future = saved('future') / entity_table.METADATA_FILE
  future.write_text(json.dumps(json.loads(future.read_text()) | {'format_version': 2}))
  with pytest.raises(UsageError, match='format version 2'):
    EntityTable.load(future.parent)

  (saved('bare') / entity_table.VECTORS_FILE).unlink()
  with pytest.raises(UsageError, match='missing or damaged'):
    EntityTable.load(tmp_path / 'bare')
  with pytest.raises(UsageError, match='not a complete entity table'):
    EntityTable.load(tmp_path / 'nowhere')
  with pytest.raises(UsageError, match='interrupted save'):  # all written, never published
    EntityTable.load(saved('whole').rename(tmp_path / '.cf.incomplete-x1'))


_SAVE = """
import sys
import numpy as np
from ilm_jax.cf.entity_table import EntityTable
vectors = np.random.default_rng(0).random((400_000, 32), np.float32)
table = EntityTable(vectors, np.zeros(len(vectors), bool), 1000, 'import', {}, 'toy', 'f' * 64)
print('ready', flush=True)
table.save(sys.argv[1])
"""


@pytest.mark.parametrize('sign', ['directory', 'vectors', 'metadata'])
def test_kill_9_during_save_leaves_nothing_that_loads(tmp_path, sign):
  """Kills the saving process as soon as the named thing exists; the directory never does."""
  pattern = {
    'directory': '.cf.incomplete-*',
    'vectors': f'.cf.incomplete-*/{entity_table.VECTORS_FILE}',
    'metadata': f'.cf.incomplete-*/{entity_table.METADATA_FILE}',
  }[sign]
  command = [sys.executable, '-c', _SAVE, str(tmp_path / 'cf')]
  with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
    assert process.stdout.readline() == b'ready\n'
    limit = time.monotonic() + 30
    while not list(tmp_path.glob(pattern)) and process.poll() is None:
      assert time.monotonic() < limit
    process.kill()
  if process.returncode == 0 or (tmp_path / 'cf').exists():  # it finished before the signal came
    assert EntityTable.load(tmp_path / 'cf').num_entities == 400_000
    return
  assert process.returncode == -signal.SIGKILL
  left = list(tmp_path.iterdir())
  assert [path.name.startswith('.cf.incomplete-') for path in left] == [True]
  with pytest.raises(UsageError, match='not a complete entity table'):
    EntityTable.load(left[0])
  with pytest.raises(UsageError, match='not a complete entity table'):
    EntityTable.load(tmp_path / 'cf')


def test_constructor_refuses_inconsistent_parts(table):
  parts = {key: getattr(table, key) for key in EntityTable.__dataclass_fields__}
  for change, message in (
    ({'vectors': table.vectors.astype(np.float64)}, 'float32'),
    ({'cold': table.cold[1:]}, 'cold'),
    ({'cold': ~table.cold}, 'not zero'),
    ({'num_items': 10}, 'num_items=10'),
  ):
    with pytest.raises(ValueError, match=message):
      EntityTable(**(parts | change))


def test_import_in_prepared_order_and_users_from_items(prepared, vectors):
  table = entity_table.import_vectors(prepared, vectors, normalize=False)
  np.testing.assert_array_equal(table.item_vectors, vectors)
  expected = [vectors[[0, 1, 2]].mean(0), vectors[[2, 1, 2]].mean(0), vectors[[4, 0]].mean(0)]
  np.testing.assert_allclose(table.user_vectors[:3], expected, rtol=1e-5)
  assert table.cold.nonzero()[0].tolist() == [5 + 3]  # the user without training rows
  assert table.settings['users_from'] == 'items'

  unit = entity_table.import_vectors(prepared, vectors)
  np.testing.assert_allclose(unit.item_vectors, _unit(vectors), rtol=1e-5)
  expected = [_unit(vectors)[row].mean(0) for row in ([0, 1, 2], [2, 1, 2], [4, 0])]
  np.testing.assert_allclose(unit.user_vectors[:3], _unit(np.array(expected)), rtol=1e-5)

  cold = entity_table.import_vectors(prepared, vectors, users_from='cold')
  assert cold.cold.nonzero()[0].tolist() == [5, 6, 7, 8]


def test_users_do_not_average_over_cold_items(prepared, vectors):
  vectors[2] = 0
  table = entity_table.import_vectors(prepared, vectors, normalize=False, missing='cold')
  np.testing.assert_allclose(table.user_vectors[0], vectors[[0, 1]].mean(0), rtol=1e-5)
  np.testing.assert_allclose(table.user_vectors[1], vectors[1], rtol=1e-5)
  assert table.cold.nonzero()[0].tolist() == [2, 5 + 3]


def test_import_by_id_from_every_kind_of_file(tmp_path, prepared, vectors, caplog):
  order = np.array([3, 0, 4, 2, 1])
  rows = np.concatenate([vectors[order], np.full((1, 3), np.nan, np.float32)])
  ids = [prepared.item_keys[i] for i in order] + ['unknown film']
  np.save(tmp_path / 'rows.npy', rows)
  np.savez(tmp_path / 'rows.npz', item_vectors=rows, epoch=np.array(3))
  safetensors.numpy.save_file({'anything': rows}, tmp_path / 'one.safetensors')
  users = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float16)
  safetensors.numpy.save_file(
    {'item_vectors': rows, 'user_vectors': users}, tmp_path / 'two.safetensors'
  )
  (tmp_path / 'ids.txt').write_text('\r\n'.join(ids) + '\r\n')
  np.save(tmp_path / 'ids.npy', np.array(ids))
  np.save(tmp_path / 'bytes.npy', np.array(ids).astype('S'))
  for file in ('rows.npy', 'rows.npz', 'one.safetensors', 'two.safetensors'):
    for row_ids in (ids, tmp_path / 'ids.txt', tmp_path / 'ids.npy', tmp_path / 'bytes.npy'):
      table = entity_table.import_vectors(
        prepared, tmp_path / file, item_ids=row_ids, normalize=False
      )
      np.testing.assert_array_equal(table.item_vectors, vectors)
      assert table.settings['extra_item_ids'] == 1
  assert 'unknown film' in caplog.text
  both = tmp_path / 'two.safetensors'
  table = entity_table.import_vectors(prepared, both, both, item_ids=ids, normalize=False)
  np.testing.assert_array_equal(table.user_vectors, users.astype(np.float32))
  assert table.settings['users_from'] == 'file'


def test_integer_ids_match_their_spelling(vectors):
  prepared = _prepared([[0]], 5, item_keys=['10', '9', '100', '8', '7'])
  table = entity_table.import_vectors(
    prepared, vectors, item_ids=np.array([7, 8, 9, 10, 100]), normalize=False
  )
  np.testing.assert_array_equal(table.item_vectors, vectors[[3, 2, 4, 1, 0]])


def test_missing_and_zero_rows_are_named_or_cold(prepared, vectors):
  ids = prepared.item_keys[:4]
  vectors[1] = 0
  with pytest.raises(UsageError) as error:
    entity_table.import_vectors(prepared, vectors[:4], item_ids=ids)
  assert "1 items have no row: 'film 4'" in str(error.value)
  assert "1 items have an all-zero row: 'film 1'" in str(error.value)
  table = entity_table.import_vectors(prepared, vectors[:4], item_ids=ids, missing='cold')
  assert table.cold[:5].nonzero()[0].tolist() == [1, 4]


@pytest.mark.parametrize('value', [np.nan, np.inf, 1e39])
def test_rows_that_are_not_finite_in_float32_are_named(prepared, vectors, value):
  wide = vectors.astype(np.float64)
  wide[3, 1] = value
  with pytest.raises(UsageError, match=r"1 item vectors have NaN or infinite .* 'film 3'"):
    entity_table.import_vectors(prepared, wide)


def test_import_refuses_other_shapes_types_and_ids(prepared, vectors):
  def refused(message, *args, **kwargs):
    with pytest.raises(UsageError, match=message):
      entity_table.import_vectors(prepared, *args, **kwargs)

  refused('int64', np.ones((5, 3), np.int64))
  refused('expected float16', np.ones(5, np.float32))
  refused('4 rows, but the data set has 5 items', vectors[:4])
  refused('item_ids has 4 ids', vectors, item_ids=prepared.item_keys[:4])
  refused("1 ids occur again: 'film 0'", vectors, item_ids=[*prepared.item_keys[:4], 'film 0'])
  refused('none of the ids', vectors, item_ids=list('abcde'), missing='cold')
  refused('float64', vectors, item_ids=np.arange(5.0))
  refused('same width', vectors, np.ones((4, 2), np.float32))
  refused('user_vectors has 3 rows', vectors, np.ones((3, 3), np.float32))
  refused('user_ids is given without', vectors, user_ids=['u0'])
  refused("missing='drop'; allowed: 'error', 'cold'", vectors, missing='drop')
  refused("users_from='mean'", vectors, users_from='mean')


def test_import_refuses_pickles_and_unknown_files(tmp_path, prepared, vectors):
  def refused(message, name):
    with pytest.raises(UsageError, match=message):
      entity_table.import_vectors(prepared, tmp_path / name)

  class Bomb:
    def __reduce__(self):
      return (open, (str(tmp_path / 'exploded'), 'w'))

  np.save(tmp_path / 'pickled.npy', np.array([Bomb()], object), allow_pickle=True)
  np.savez(tmp_path / 'pickled.npz', item_vectors=np.array([Bomb()], object))
  refused('Pickled objects are refused', 'pickled.npy')
  refused('Pickled objects are refused', 'pickled.npz')
  assert not (tmp_path / 'exploded').exists()
  np.save(tmp_path / 'cut.npy', vectors)
  (tmp_path / 'cut.npy').write_bytes((tmp_path / 'cut.npy').read_bytes()[:-4])
  refused('cannot be read', 'cut.npy')
  (tmp_path / 'empty.safetensors').write_bytes(b'')
  refused('cannot be read', 'empty.safetensors')
  (tmp_path / 'not_zip.npz').write_bytes(b'text')
  refused('cannot be read', 'not_zip.npz')
  (tmp_path / 'vectors.pt').write_bytes(b'')
  refused("unknown kind of file '.pt'; expected .npy", 'vectors.pt')
  np.savez(tmp_path / 'named.npz', a=vectors, b=vectors)
  refused(r"tensors \['a', 'b'\]; call the one to read 'item_vectors'", 'named.npz')
  refused('no such file', 'absent.npy')


def test_many_rows_by_id_take_seconds():
  count = 300_000
  rng = np.random.default_rng(0)
  order = rng.permutation(count)
  prepared = _prepared([[0, 1]], count, item_keys=[f'i{i}' for i in range(count)])
  rows = rng.random((count, 8), np.float32) + 0.1
  start = time.monotonic()
  table = entity_table.import_vectors(
    prepared, rows, item_ids=np.char.add('i', order.astype(str)), normalize=False
  )
  assert time.monotonic() - start < 10  # a loop over rows would be far slower
  np.testing.assert_array_equal(table.item_vectors[order], rows)

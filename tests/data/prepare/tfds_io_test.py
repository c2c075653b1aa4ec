"""Records on disk: what is written is what is read, by us and by TFDS itself, Beam or not."""

import dataclasses
import json

import numpy as np
import pytest
import tensorflow_datasets as tfds

from ilm_jax.data import prepared_records
from ilm_jax.data.prepare import tfds_io
from ilm_jax.data.prepare.preparation import PreparationOptions, prepare
from ilm_jax.data.prepare.raw import RawData
from ilm_jax.data.prepared_records import load_prepared
from ilm_jax.errors import UsageError


def metadata_of(prepared):
  return {
    'format_version': 1,
    'name': prepared.name,
    'fingerprint': prepared.fingerprint,
    'tfds_dir': 'tfds',
    'text_fields': list(prepared.item_text),
    'settings': dict(prepared.settings),
  }


def round_trip(prepared, directory, **options):
  tfds_io.write(prepared, directory, **options)
  return prepared_records.read(directory, metadata_of(prepared))


def assert_equal(a, b):
  for field in dataclasses.fields(a):
    left, right = getattr(a, field.name), getattr(b, field.name)
    if isinstance(left, np.ndarray):
      assert left.dtype == right.dtype, field.name
      np.testing.assert_array_equal(left, right, err_msg=field.name)
    else:
      assert left == right, field.name
  assert a.fingerprint == b.fingerprint


def few_interactions():
  """Users with one, two and three interactions; no ratings, no timestamps; letters of all sorts."""
  rows = [('ä', 'x'), ('b', 'x'), ('b', '7'), ('c', '7'), ('c', 'x'), ('c', 'ß/ "q"')]
  users, items = zip(*rows)
  raw = RawData(
    name='few',
    users=np.array(users, dtype=object),
    items=np.array(items, dtype=object),
    timestamps=None,
    ratings=None,
    order='file',
    item_ids=np.array(['x', '7', 'ß/ "q"'], dtype=object),
    item_text={'title': ['X', '七人の侍', 'a\nb\t\x00'], 'empty': ['', '', '']},
  )
  return prepare(raw, PreparationOptions(k_core=1, heldout_items=0.0))


def test_round_trip(small_prepared, tmp_path):
  assert_equal(small_prepared, round_trip(small_prepared, tmp_path))
  assert sorted(p.name for p in tmp_path.iterdir()) == ['recommendation']  # no empty 'downloads'


def test_short_users_no_ratings_no_timestamps_nothing_held_out(tmp_path):
  prepared = few_interactions()
  assert prepared.test_items.tolist().count(-1) == 2
  assert_equal(prepared, round_trip(prepared, tmp_path))


def test_no_user_with_a_test_item(tmp_path):
  prepared = few_interactions()
  nothing = np.full(prepared.num_users, -1, np.int32)
  prepared = dataclasses.replace(prepared, validation_items=nothing, test_items=nothing)
  assert_equal(prepared, round_trip(prepared, tmp_path))


def test_tfds_reads_it_without_us(small_prepared, tmp_path):
  tfds_io.write(small_prepared, tmp_path)
  base = tmp_path / 'recommendation'
  interactions = tfds.builder_from_directory(base / 'small_interactions' / '1.0.0')
  assert set(interactions.info.splits) == {'train', 'validation', 'test'}
  records = list(tfds.as_numpy(interactions.as_dataset(split='train')))
  assert [r['user'] for r in records] == list(range(small_prepared.num_users))
  user = records[11]
  rows = slice(small_prepared.offsets[11], small_prepared.offsets[12])
  assert user['user_key'].decode() == small_prepared.user_keys[11]
  assert user['items'].tolist() == small_prepared.items[rows].tolist()
  assert user['ratings'].tolist() == small_prepared.ratings[rows].tolist()
  assert user['timestamps'].tolist() == small_prepared.timestamps[rows].tolist()
  # From a data directory by name, and by a slice of a split.
  items = tfds.load('recommendation/small_items', data_dir=tmp_path, split='heldout[:2]')
  held = np.flatnonzero(small_prepared.heldout_items)[:2]
  assert [r['title'].decode() for r in tfds.as_numpy(items)] == [
    small_prepared.item_text['title'][i] for i in held
  ]


def test_beam_writes_the_same_records(small_prepared, tmp_path):
  tfds_io.write(small_prepared, tmp_path / 'local')
  assert_equal(small_prepared, round_trip(small_prepared, tmp_path / 'beam', use_beam=True))
  contents = {}
  for way in ('local', 'beam'):
    builder = tfds.builder_from_directory(
      tmp_path / way / 'recommendation' / 'small_interactions' / '1.0.0'
    )
    contents[way] = [
      (split, {k: np.asarray(v).tolist() for k, v in record.items()})
      for split in ('train', 'validation', 'test')
      for record in tfds.as_numpy(builder.as_dataset(split=split))
    ]
  assert contents['beam'] == contents['local']


def test_reserved_names_of_text_fields(small_prepared, tmp_path):
  text = {**small_prepared.item_text, 'item_key': ['x'] * small_prepared.num_items}
  with pytest.raises(UsageError, match=r"text fields may not be called \['item_key'\]"):
    tfds_io.write(dataclasses.replace(small_prepared, item_text=text), tmp_path)


@pytest.fixture
def directory(small_prepared, tmp_path):
  tfds_io.write(small_prepared, tmp_path / 'small' / 'tfds')
  (tmp_path / 'small' / 'dataset.json').write_text(json.dumps(metadata_of(small_prepared)))
  assert_equal(small_prepared, load_prepared(tmp_path / 'small'))
  return tmp_path / 'small'


def records_of(directory, split):
  folder = directory / 'tfds' / 'recommendation' / 'small_interactions' / '1.0.0'
  (path,) = folder.glob(f'*-{split}.tfrecord*')
  return path


def test_damaged_records(directory):
  path = records_of(directory, 'train')
  data = path.read_bytes()
  key = bytearray(data)
  key[data.index(b'u00') + 1] ^= 1
  for damaged in (bytes(key), data[: len(data) // 2], data[:-1]):
    path.write_bytes(damaged)
    with pytest.raises(UsageError, match='prepare it again'):
      load_prepared(directory)
  path.unlink()
  with pytest.raises(UsageError, match='prepare it again'):
    load_prepared(directory)


def test_a_bit_that_is_another_one(directory):
  """Wherever it is: an error that helps; or, in a checksum, what was written."""
  path = records_of(directory, 'train')
  data = path.read_bytes()
  refused = 0
  for at in range(0, len(data), len(data) // 60):
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    try:
      load_prepared(directory)  # which compares the fingerprint of all content
    except UsageError as error:
      assert 'prepare it again' in str(error)  # noqa: PT017
      refused += 1
  assert refused > 30


def test_records_of_another_split_are_noticed(directory):
  """Whole, readable records, but not those that were written."""
  validation, test = records_of(directory, 'validation'), records_of(directory, 'test')
  data = validation.read_bytes()
  validation.write_bytes(test.read_bytes())
  test.write_bytes(data)
  with pytest.raises(UsageError, match='do not match the fingerprint'):
    load_prepared(directory)


def test_directories_that_are_no_prepared_data(directory):
  metadata = directory / 'dataset.json'
  text = metadata.read_text()
  metadata.write_text(text[:-5])
  with pytest.raises(UsageError, match='damaged'):
    load_prepared(directory)
  metadata.write_text(json.dumps({**json.loads(text), 'format_version': 99}))
  with pytest.raises(UsageError, match='format version 99, but this release reads 1'):
    load_prepared(directory)
  metadata.write_text(text)
  unfinished = directory.rename(directory.parent / '.small.incomplete-1-ab')
  with pytest.raises(UsageError, match='not a complete prepared data set'):
    load_prepared(unfinished)
  with pytest.raises(UsageError, match='not a complete prepared data set'):
    load_prepared(directory)

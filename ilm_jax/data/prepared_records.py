"""Reads the records of a prepared data set, without TensorFlow, whose import takes seconds.

`ilm_jax.data.prepare.tfds_io` writes them, as TFDS does: TFRecord files of tf.train.Example. The
checksums in the files are not looked at: the fingerprint of `dataset.json` is one of all content.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from ilm_jax.data.prepared import DATASET_FILE, PreparedData, read_metadata
from ilm_jax.errors import UsageError

BUILDER = 'recommendation'
VERSION = '1.0.0'

# What a byte that is another one can lead to: another kind of value, or number of values.
_DAMAGED = (ValueError, LookupError, ArithmeticError, TypeError, AttributeError)

# tensorflow/core/example: message -> its fields: (name, number, type, whether it is repeated).
_FIELDS: Mapping[str, tuple[tuple[str, int, str, bool], ...]] = {
  'BytesList': (('value', 1, 'BYTES', True),),
  'FloatList': (('value', 1, 'FLOAT', True),),
  'Int64List': (('value', 1, 'INT64', True),),
  'Feature': (
    ('bytes_list', 1, 'BytesList', False),
    ('float_list', 2, 'FloatList', False),
    ('int64_list', 3, 'Int64List', False),
  ),
  'Entry': (('key', 1, 'STRING', False), ('value', 2, 'Feature', False)),
  'Features': (('feature', 1, 'Entry', True),),  # a map is a list of entries
  'Example': (('features', 1, 'Features', False),),
}


def load_prepared(directory: str | Path) -> PreparedData:
  """Loads a prepared directory and checks it against the fingerprint in its `dataset.json`.

  Raises:
    UsageError: as `read_metadata`; or the records are not those that were written.
  """
  metadata = read_metadata(directory)
  prepared = read(Path(directory) / metadata['tfds_dir'], metadata)
  if prepared.fingerprint != metadata['fingerprint']:
    raise UsageError(
      f'{directory}: the records do not match the fingerprint in {DATASET_FILE} (a prepared data'
      ' set is immutable). Something changed or damaged it: prepare it again.'
    )
  return prepared


def read(directory: Path, metadata: Mapping[str, Any]) -> PreparedData:
  """Reads what `ilm_jax.data.prepare.tfds_io.write` wrote.

  Args:
    directory: the TFDS data directory.
    metadata: `dataset.json`.

  Raises:
    UsageError: a file is missing or damaged.
  """
  try:
    return _read(directory, metadata)
  except (*_DAMAGED, OSError, struct.error, message.Error) as error:
    raise UsageError(
      f'{directory}: the records cannot be read ({error}). Something changed or damaged the'
      ' prepared data set: prepare it again.'
    ) from error


def _read(directory: Path, metadata: Mapping[str, Any]) -> PreparedData:
  name = metadata['name']
  interactions = _Table(directory / BUILDER / f'{name}_interactions' / VERSION)
  train = interactions.columns('train')
  num_users = len(train['user'])
  held: dict[str, np.ndarray | None] = {}
  for split in ('validation', 'test'):
    columns = interactions.columns(split)
    users = _numbers(columns, 'user', np.int64)
    for column, dtype, absent in (
      ('items', np.int32, -1),
      ('ratings', np.float32, np.nan),
      ('timestamps', np.int64, -1),
    ):
      values = None
      if column in train:
        values = np.full(num_users, absent, dtype)
        values[users] = _numbers(columns, column, dtype)
      held[f'{split}_{column}'] = values
  items = _Table(directory / BUILDER / f'{name}_items' / VERSION)
  parts = [items.columns(split) for split in ('train', 'heldout')]
  ids = np.concatenate([_numbers(part, 'item', np.int64) for part in parts])
  order = np.argsort(ids)
  heldout = np.zeros(len(ids), bool)
  heldout[_numbers(parts[1], 'item', np.int64)] = True

  def item_column(field: str) -> list[str]:
    values = [value for part in parts for value in _texts(part, field)]
    return [values[i] for i in order]

  return PreparedData(
    name=name,
    offsets=np.concatenate([[0], np.cumsum([len(r) for r in train['items']])]).astype(np.int64),
    items=_numbers(train, 'items', np.int32),
    ratings=_numbers(train, 'ratings', np.float32) if 'ratings' in train else None,
    timestamps=_numbers(train, 'timestamps', np.int64) if 'timestamps' in train else None,
    user_keys=_texts(train, 'user_key'),
    item_keys=item_column('item_key'),
    item_text={field: item_column(field) for field in metadata['text_fields']},
    heldout_items=heldout,
    settings=metadata['settings'],
    **held,  # type: ignore[arg-type]
  )


Columns = Mapping[str, list[Any]]  # feature -> its values, a list of numbers or bytes a record


def _numbers(columns: Columns, name: str, dtype: Any) -> np.ndarray:
  """All numbers of a feature, record by record."""
  rows = columns.get(name, [])
  return np.concatenate([np.zeros(0, dtype), *(np.fromiter(r, dtype, len(r)) for r in rows)])


def _texts(columns: Columns, name: str) -> list[str]:
  return [value.decode() for (value,) in columns.get(name, [])]


class _Table:
  """One TFDS data set."""

  def __init__(self, directory: Path):
    self._directory = directory
    splits = json.loads((directory / 'dataset_info.json').read_text())['splits']
    self._shards = {split['name']: [int(n) for n in split['shardLengths']] for split in splits}

  def columns(self, split: str) -> Columns:
    """A split in the order of its records; empty where there is no such split."""
    found: dict[str, list[Any]] = {}
    lengths = self._shards.get(split, [])
    for shard, length in enumerate(lengths):
      end = f'{shard:05}-of-{len(lengths):05}'
      path = self._directory / f'{BUILDER}-{split}.tfrecord-{end}'
      records = 0
      for record in _records(path.read_bytes()):
        records += 1
        for entry in _Example.FromString(record).features.feature:
          value = entry.value
          found.setdefault(entry.key, []).append(
            value.int64_list.value or value.float_list.value or value.bytes_list.value
          )
      if records != length:
        raise ValueError(f'{path.name} has {records} records in place of {length}')
    return found


def _records(data: bytes) -> Iterator[bytes]:
  """The records of a TFRecord file: each is its length (8 bytes), 4, itself, 4."""
  start = 0
  while start < len(data):
    (length,) = struct.unpack_from('<Q', data, start)
    start += 12
    if start + length + 4 > len(data):
      raise ValueError('a file ends within a record')
    yield data[start : start + length]
    start += length + 4


def _example_class() -> Any:
  """tf.train.Example. In a pool of its own: TensorFlow, where it comes, registers its own."""
  file = descriptor_pb2.FileDescriptorProto(name='example.proto', package='ilm', syntax='proto3')
  for name, fields in _FIELDS.items():
    made = file.message_type.add(name=name)
    for field, number, kind, repeated in fields:
      of_message = kind in _FIELDS
      made.field.add(
        name=field,
        number=number,
        label=3 if repeated else 1,
        type=getattr(
          descriptor_pb2.FieldDescriptorProto, f'TYPE_{"MESSAGE" if of_message else kind}'
        ),
        type_name=f'.ilm.{kind}' if of_message else None,
      )
  pool = descriptor_pool.DescriptorPool()
  pool.AddSerializedFile(file.SerializeToString())
  return message_factory.GetMessageClass(pool.FindMessageTypeByName('ilm.Example'))


_Example = _example_class()

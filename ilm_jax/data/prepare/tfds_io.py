"""Prepared data as TensorFlow Datasets: the builder that writes it.

Two data sets lie under one directory, because all splits of a TFDS data set share their features:

* `recommendation/<name>_interactions`, splits train / validation / test, one record a user:
  {user, user_key, items [n], ratings [n]?, timestamps [n]?}; n is 1 in validation and test, and
  users without a held-out item have no record there.
* `recommendation/<name>_items`, splits train / heldout, one record an item:
  {item, item_key, title, <text fields>}; `heldout` is phase 1's item-level hold-out.

`ilm_jax.data.prepared_records` reads them.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from ilm_jax.data.prepared import PreparedData
from ilm_jax.data.prepared_records import BUILDER, VERSION
from ilm_jax.errors import UsageError


@dataclasses.dataclass(kw_only=True)
class RecommendationConfig(tfds.core.BuilderConfig):
  """One of the two tables of a prepared data set.

  Attributes:
    prepared: what to write.
    table: 'interactions' or 'items'.
    use_beam: write through an Apache Beam pipeline (the runner is the download config's).
  """

  prepared: PreparedData = dataclasses.field(repr=False)  # TFDS prints the config when it fails
  table: str
  use_beam: bool = False


class Recommendation(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Writes a `PreparedData` as TFDS records. Local and Beam runs write the same records."""

  name = BUILDER
  VERSION = tfds.core.Version(VERSION)

  @property
  def config(self) -> RecommendationConfig:
    config = self.builder_config
    assert isinstance(config, RecommendationConfig)
    return config

  # TFDS would warn that the config is none of a published list, speak of a download where there is
  # none, and name a directory that is about to be renamed.
  def _create_builder_config(self, builder_config: Any, version: Any) -> RecommendationConfig:
    return builder_config

  def _log_download_bytes(self) -> None:
    pass

  def _log_download_done(self) -> None:
    pass

  def _info(self) -> tfds.core.DatasetInfo:
    config = self.config
    prepared = config.prepared
    source = prepared.settings.get('source', {})
    features = {
      'interactions': _interaction_features(prepared),
      'items': _item_features(prepared),
    }[config.table]
    return tfds.core.DatasetInfo(
      builder=self,
      description=f'{prepared.name}: {config.table}, prepared for item-language models.',
      homepage=source.get('homepage'),
      citation=source.get('citation'),
      features=tfds.features.FeaturesDict(features),
      disable_shuffling=True,  # records in id order, whoever writes them
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> Mapping[str, Any]:
    del dl_manager
    prepared = self.config.prepared
    splits: dict[str, tuple[np.ndarray, Callable[[int], dict[str, Any]]]]
    if self.config.table == 'items':
      train = np.flatnonzero(~prepared.heldout_items)
      heldout = np.flatnonzero(prepared.heldout_items)
      record = _ItemRecord(prepared)
      splits = {'train': (train, record), 'heldout': (heldout, record)}
    else:
      splits = {'train': (np.arange(prepared.num_users), _TrainRecord(prepared))}
      for split in ('validation', 'test'):
        users = np.flatnonzero(getattr(prepared, f'{split}_items') >= 0)
        splits[split] = (users, _HeldOutRecord(prepared, split))
    return {
      split: self._generate_examples(ids, record)
      for split, (ids, record) in splits.items()
      if len(ids)
    }

  def _generate_examples(self, ids: np.ndarray, record: Callable[[int], dict]) -> Any:
    if self.config.use_beam:
      import apache_beam as beam

      return beam.Create([int(i) for i in ids]) | beam.Map(lambda i: (i, record(i)))
    return self._local_examples(ids, record)

  @staticmethod
  def _local_examples(ids, record) -> Iterator[tuple[int, dict[str, Any]]]:
    for i in ids:
      yield int(i), record(int(i))


@dataclasses.dataclass(frozen=True)
class _TrainRecord:
  prepared: PreparedData

  def __call__(self, user: int) -> dict[str, Any]:
    p = self.prepared
    rows = slice(p.offsets[user], p.offsets[user + 1])
    return _interaction_record(p, user, p.items[rows], p.ratings, p.timestamps, rows)


@dataclasses.dataclass(frozen=True)
class _HeldOutRecord:
  prepared: PreparedData
  split: str

  def __call__(self, user: int) -> dict[str, Any]:
    p = self.prepared
    items, ratings, timestamps = (
      getattr(p, f'{self.split}_{column}') for column in ('items', 'ratings', 'timestamps')
    )
    rows = slice(user, user + 1)
    return _interaction_record(p, user, items[rows], ratings, timestamps, rows)


@dataclasses.dataclass(frozen=True)
class _ItemRecord:
  prepared: PreparedData

  def __call__(self, item: int) -> dict[str, Any]:
    p = self.prepared
    text = {field: values[item] for field, values in p.item_text.items()}
    return {'item': item, 'item_key': p.item_keys[item], **text}


def _interaction_record(prepared, user, items, ratings, timestamps, rows) -> dict[str, Any]:
  record = {'user': user, 'user_key': prepared.user_keys[user], 'items': items}
  if ratings is not None:
    record['ratings'] = ratings[rows]
  if timestamps is not None:
    record['timestamps'] = timestamps[rows]
  return record


def _interaction_features(prepared: PreparedData) -> dict[str, Any]:
  features: dict[str, Any] = {
    'user': np.int32,
    'user_key': tfds.features.Text(),
    'items': tfds.features.Tensor(shape=(None,), dtype=np.int32),
  }
  if prepared.ratings is not None:
    features['ratings'] = tfds.features.Tensor(shape=(None,), dtype=np.float32)
  if prepared.timestamps is not None:
    features['timestamps'] = tfds.features.Tensor(shape=(None,), dtype=np.int64)
  return features


def _item_features(prepared: PreparedData) -> dict[str, Any]:
  reserved = {'item', 'item_key'} & set(prepared.item_text)
  if reserved:
    raise UsageError(f'{prepared.name}: text fields may not be called {sorted(reserved)}.')
  text = {field: tfds.features.Text() for field in prepared.item_text}
  return {'item': np.int32, 'item_key': tfds.features.Text(), **text}


def write(prepared: PreparedData, directory: Path, *, use_beam: bool = False) -> None:
  """Writes both tables below `directory`, which becomes a TFDS data directory.

  Turns TFDS's progress bars off in this process.
  """
  tfds.disable_progress_bar()
  download_config = None
  if use_beam:
    from apache_beam.options.pipeline_options import PipelineOptions

    download_config = tfds.download.DownloadConfig(beam_options=PipelineOptions())
  for table in ('interactions', 'items'):
    config = RecommendationConfig(
      name=f'{prepared.name}_{table}', prepared=prepared, table=table, use_beam=use_beam
    )
    builder = Recommendation(data_dir=str(directory), config=config)
    builder.download_and_prepare(download_config=download_config)
  # TFDS makes these for every builder; they are empty, for nothing was downloaded.
  for folder in ('downloads/extracted', 'downloads'):
    (directory / folder).rmdir()

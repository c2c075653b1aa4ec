"""`ilm prepare`: a data source -> a prepared directory with everything training reads.

  OUTPUT/
    dataset.json                 name, fingerprint, every choice and its seed, provenance, versions
    tfds/                        the records (ilm_jax.data.prepare.tfds_io)
    statistics.json, .txt, .png  counts, density, history lengths, popularity, text coverage
    entity_table/                iALS vectors of the training rows (ilm_jax.cf.entity_table)
    rankers.json, .txt           what a language model has to beat (ilm_jax.cf.rankers)
    config.gin, operative_config.gin

The directory is complete or absent, and immutable.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import ilm_jax
from ilm_jax.cf import entity_table, ials
from ilm_jax.cf import rankers as reference_rankers
from ilm_jax.config import files as config_files
from ilm_jax.config.plugins import import_modules, module_names
from ilm_jax.data import prepared_records
from ilm_jax.data.prepare import preparation, statistics
from ilm_jax.data.prepared import DATASET_FILE, FORMAT_VERSION, PreparedData
from ilm_jax.errors import UsageError
from ilm_jax.runtime.atomic_directory import complete_or_absent, leftovers
from ilm_jax.runtime.tensorflow import import_tensorflow

TFDS_DIR = 'tfds'
ENTITY_TABLE_DIR = 'entity_table'
_VERSIONS_OF = ('implicit', 'numpy', 'tensorflow', 'tensorflow-datasets')


def prepare(
  *,
  dataset: str,
  output: Path,
  source: dict[str, Any] | None = None,
  modules: str | Sequence[str] = (),
  k_core: int = 5,
  duplicates: Literal['error', 'first', 'last', 'keep'] = 'error',
  missing_text: Literal['error', 'drop', 'id'] = 'error',
  heldout_items: float = 0.1,
  seed: int = 0,
  ials_factors: int = ials.FACTORS,
  ials_regularization: float = ials.REGULARIZATION,
  ials_alpha: float = ials.ALPHA,
  ials_iterations: int = ials.ITERATIONS,
  rankers: bool = True,
  use_beam: bool = False,
) -> Path:
  """Prepares a data set: splits and ids fixed once, statistics, entity table, reference rankers.

    ilm prepare --dataset=ml100k --output=data/ml100k
    ilm prepare --dataset=tabular --output=data/books --source.name=books \\
        --source.interactions=reviews.csv --source.items=books.csv --source.user=reader

  Args:
    dataset: a source by name: ml100k, ml1m, ml25m, beauty, clothing, openp5, tabular, or one that a
      module of `modules` registers.
    output: the directory to make. It is complete or absent, and never overwritten.
    source: the options of the source (the arguments of its function in `tasks/`).
    modules: Python modules to import first, for sources of your own: a list, or 'one,two'.
    k_core: drop users and items with fewer interactions than this, until none is left.
    duplicates: repeated (user, item) pairs: refuse, keep the first or the last, or keep all.
    missing_text: items without a title: refuse, drop them, or use the id as title.
    heldout_items: fraction of the items whose text phase 1 never sees.
    seed: of the random item ids, the held-out items, iALS and the bootstrap.
    ials_factors: width of the entity vectors, d_cf.
    ials_regularization: see ilm_jax/cf/ials.py; its useful size grows with the data.
    ials_alpha: weight of an observed pair; an unobserved one weighs 1.
    ials_iterations: of alternating least squares.
    rankers: measure the reference rankers.
    use_beam: write the records through Apache Beam; they are the same.

  Returns:
    The directory.

  Raises:
    UsageError: the output exists, or something is wrong with the options or the data.
  """
  creation = _json_values(locals() | {'modules': module_names(modules)})
  del creation['output']  # the directory may be moved
  output = output.expanduser()
  options = preparation.PreparationOptions(
    k_core=k_core,
    duplicates=duplicates,
    missing_text=missing_text,
    heldout_items=heldout_items,
    seed=seed,
  )
  if use_beam and importlib.util.find_spec('apache_beam') is None:
    raise UsageError("use_beam: Apache Beam is not installed: pip install 'ilm_jax[beam]'.")
  for left in leftovers(output):
    print(f'note: {left} is of a run that was killed, or is still at work')

  with complete_or_absent(output, 'a prepared data set') as directory:
    with _step(f'reading {dataset}'):
      raw = _load_raw(dataset, source or {}, modules)
    with _step(f'splitting {len(raw.users):,} interactions'):
      prepared = preparation.prepare(raw, options)
      del raw
    with _step('writing statistics'):
      report = _write_statistics(prepared, directory)
    print(f'\n{report}\n', flush=True)
    with _step(f'fitting iALS on {len(prepared.items):,} training rows'):
      fitted = ials.fit(
        prepared.offsets,
        prepared.items,
        prepared.num_items,
        factors=ials_factors,
        regularization=ials_regularization,
        alpha=ials_alpha,
        iterations=ials_iterations,
        seed=seed,
        progress=sys.stderr.isatty(),
      )
      entity_table.from_fitted(prepared, fitted).save(directory / ENTITY_TABLE_DIR)
    if rankers:
      with _step('measuring the reference rankers'):
        table = write_rankers(prepared, fitted[:2], seed, directory)
      print(f'\n{table}\nmore in {output / "rankers.txt"}\n', flush=True)
    with _step('loading TensorFlow'):  # after whatever may be wrong
      import_tensorflow()
      from ilm_jax.data.prepare import tfds_io

    with _step('writing records'):
      tfds_io.write(prepared, directory / TFDS_DIR, use_beam=use_beam)
    metadata = _metadata(prepared, creation)
    with _step('reading them back'):
      read = prepared_records.read(directory / TFDS_DIR, metadata)
      if read.fingerprint != prepared.fingerprint:
        raise RuntimeError(f'{output}: the records read back are not those that were written.')
    running = config_files.running()
    if running is not None:
      running.save(directory)
    (directory / DATASET_FILE).write_text(json.dumps(metadata, indent=2) + '\n')

  print(f'\nprepared: {output} (plot: {output / "statistics.png"})')
  print(
    'next: `ilm train --gin_file=architectures/qformer_minilm.gin --gin_file=runs/phase1.gin'
    f' --gin.DATA={output}\n      --gin.MODEL_DIR=DIR --gin.TOTAL_STEPS=N` trains the item encoder;'
    f' `ilm embed --data={output} --output=DIR`\n      makes another entity table'
  )
  return output


@contextlib.contextmanager
def _step(title: str) -> Iterator[None]:
  """Prints what is being done, and the seconds it took."""
  print(f'{title} ...', end='', flush=True)
  start = time.monotonic()
  try:
    yield
  except BaseException:
    print(flush=True)  # the error begins on a line of its own
    raise
  print(f' {time.monotonic() - start:.1f} s', flush=True)


def _load_raw(dataset: str, source: Mapping[str, Any], modules: str | Sequence[str]) -> Any:
  from ilm_jax.tasks.sources import load_raw

  import_modules(modules)
  return load_raw(dataset, **source)


def _write_statistics(prepared: PreparedData, directory: Path) -> str:
  values = statistics.compute(prepared)
  (directory / 'statistics.json').write_text(json.dumps(values, indent=2) + '\n')
  statistics.plot(prepared, directory / 'statistics.png')
  report = statistics.format_report(prepared.name, values)
  (directory / 'statistics.txt').write_text(report + '\n')
  return report


def write_rankers(prepared: PreparedData, ials_vectors: Any, seed: int, directory: Path) -> str:
  """Writes rankers.json and rankers.txt; returns the part of it that people want first."""
  names, skipped = reference_rankers.affordable(prepared)
  held = {'validation': prepared.validation_items, 'test': prepared.test_items}
  splits = [split for split, items in held.items() if (items >= 0).any()]
  evaluations = reference_rankers.evaluate_rankers(
    prepared, rankers=names, splits=splits, ials_vectors=ials_vectors, seed=seed
  )
  notes = [f'skipped {name}: {reason}' for name, reason in skipped.items()]
  if not splits:
    notes.append('no rankers measured: no user has the three interactions that a split needs')
  results = [
    {
      'split': e.split,
      'ranker': e.ranker,
      'seen_items': 'removed' if e.seen_removed else 'kept',
      'users': len(e.users),
      'metrics': {
        name: {'mean': i.mean, 'low': i.low, 'high': i.high} for name, i in e.intervals.items()
      },
    }
    for e in evaluations
  ]
  values = {'intervals': '95 % bootstrap over users', 'results': results, 'skipped': skipped}
  (directory / 'rankers.json').write_text(json.dumps(values, indent=2) + '\n')
  table = reference_rankers.format_table(evaluations) if evaluations else ''
  (directory / 'rankers.txt').write_text('\n'.join([table, *notes]) + '\n')
  return '\n'.join([*_summary(evaluations), *notes])


def _summary(evaluations: Sequence[reference_rankers.Evaluation]) -> list[str]:
  """Lines for the screen: the test split with seen items removed, and the metrics of papers."""
  shown = [e for e in evaluations if e.split == 'test' and e.seen_removed]
  if not shown:
    return []
  names = ['HR@5', 'NDCG@5', 'HR@10', 'NDCG@10']
  head = f'reference rankers, test split, {len(shown[0].users):,} users, seen items removed'
  lines = [f'{head}: mean [95 % bootstrap interval]']
  lines.append(' ' * 18 + ''.join(f'{name:<26}' for name in names).rstrip())
  for e in shown:
    cells = ''.join(f'{e.intervals[name]!s:<26}' for name in names)
    lines.append(f'  {e.ranker:<16}{cells}'.rstrip())
  return lines


def _metadata(prepared: PreparedData, creation: Mapping[str, Any]) -> dict[str, Any]:
  """The content of `dataset.json`."""
  return {
    'format_version': FORMAT_VERSION,
    'name': prepared.name,
    'fingerprint': prepared.fingerprint,
    'tfds_dir': TFDS_DIR,
    'entity_table_dir': ENTITY_TABLE_DIR,
    'text_fields': list(prepared.item_text),
    'counts': {
      'users': prepared.num_users,
      'items': prepared.num_items,
      'interactions': prepared.num_interactions,
      'train': len(prepared.items),
      'validation': int((prepared.validation_items >= 0).sum()),
      'test': int((prepared.test_items >= 0).sum()),
      'heldout_items': int(prepared.heldout_items.sum()),
    },
    'settings': _json_values(prepared.settings),
    'creation': dict(creation),
    'versions': {
      'ilm_jax': ilm_jax.__version__,
      'python': platform.python_version(),
      **{name: importlib.metadata.version(name) for name in _VERSIONS_OF},
    },
  }


def _json_values(values: Mapping[str, Any]) -> dict[str, Any]:
  """The values as JSON has them; a path is its text."""
  return json.loads(json.dumps(dict(values), default=str))

"""`ilm embed`: another entity table for a prepared data set, fitted or imported."""

import sys
from pathlib import Path
from typing import Any, Literal

from ilm_jax.cf import entity_table
from ilm_jax.config import files as config_files
from ilm_jax.data.prepared_records import load_prepared
from ilm_jax.errors import UsageError
from ilm_jax.runtime.atomic_directory import complete_or_absent


def embed(
  *,
  data: Path,
  output: Path,
  ials_factors: int | None = None,
  ials_regularization: float | None = None,
  ials_alpha: float | None = None,
  ials_iterations: int | None = None,
  seed: int | None = None,
  item_vectors: Path | None = None,
  user_vectors: Path | None = None,
  item_ids: Path | None = None,
  user_ids: Path | None = None,
  missing: Literal['error', 'cold'] | None = None,
  users_from: Literal['items', 'cold'] | None = None,
  normalize: bool = True,
) -> Path:
  """Makes an entity table of a prepared data set: by iALS, or from vectors trained elsewhere.

    ilm embed --data=data/ml100k --output=data/ml100k_64 --ials_factors=64
    ilm embed --data=data/ml100k --output=data/ml100k_mine \\
        --item_vectors=items.npy --item_ids=items.txt --missing=cold

  Vectors trained elsewhere must come from training rows only: what saw the test items makes every
  metric meaningless, and nothing here can tell.

  Args:
    data: the prepared directory.
    output: the directory to make; never overwritten.
    ials_factors: width of the vectors (default 32). Each `ials_*` and `seed`: only without
      item_vectors; see ilm_jax/cf/ials.py.
    ials_regularization: default 5; its useful size grows with the data.
    ials_alpha: weight of an observed pair (default 4); an unobserved one weighs 1.
    ials_iterations: of alternating least squares (default 15).
    seed: of the random start (default 0).
    item_vectors: .npy, .npz or .safetensors with [rows, d_cf] floats, to import.
    user_vectors: the same for users; may be the same file.
    item_ids: the source's own id of each row, one a line, or .npy. Without ids, row i is item i of
      the prepared data set.
    user_ids: the same for users.
    missing: items and users without a row: an error (the default), or cold.
    users_from: without user_vectors: 'items', the mean of the user's training items (the default),
      or 'cold'.
    normalize: scale every vector to length 1.

  Returns:
    The directory.

  Raises:
    UsageError: the output exists, options of both kinds, or something is wrong with the files.
  """
  output = output.expanduser()
  fitting = _given(
    factors=ials_factors,
    regularization=ials_regularization,
    alpha=ials_alpha,
    iterations=ials_iterations,
    seed=seed,
  )
  importing = _given(
    user_vectors=user_vectors,
    item_ids=item_ids,
    user_ids=user_ids,
    missing=missing,
    users_from=users_from,
  )
  if item_vectors is None and importing:
    raise UsageError(
      f'embed: {", ".join(importing)} given without item_vectors. To import vectors, give'
      ' --item_vectors=FILE; to fit iALS, leave these out.'
    )
  if item_vectors is not None and fitting:
    raise UsageError(
      f'embed: item_vectors are imported, nothing is fitted, but iALS settings are given'
      f' ({", ".join(fitting)}). Leave out the one or the other.'
    )
  with complete_or_absent(output, 'an entity table') as directory:
    prepared = load_prepared(data.expanduser())
    if item_vectors is None:
      table = entity_table.from_ials(
        prepared, normalize=normalize, progress=sys.stderr.isatty(), **fitting
      )
    else:
      table = entity_table.import_vectors(prepared, item_vectors, normalize=normalize, **importing)
    table.write_files(directory)
    running = config_files.running()
    if running is not None:
      running.save(directory)
  cold_items = int(table.cold[: table.num_items].sum())
  print(
    f'{output}: {table.num_items:,} items ({cold_items:,} cold) and'
    f' {table.num_entities - table.num_items:,} users ({int(table.cold.sum()) - cold_items:,} cold)'
    f' of {prepared.name}, d_cf {table.dim}, method {table.method!r}'
  )
  return output


def _given(**arguments: Any) -> dict[str, Any]:
  return {name: value for name, value in arguments.items() if value is not None}

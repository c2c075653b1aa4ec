"""iALS: ours, which is implicit's solver with checks and a report around it, and implicit itself.

  python tests/benchmarks/bench.py --only ials

So what is measured is what the rest costs: checks, and the loss at the end. Both have the same
interactions, settings and start, and end with the same vectors.
"""

import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml100k
import numpy as np
from paired import Run, Side, Workers
from table import Row, timed

USERS, ITEMS, INTERACTIONS = 20_000, 20_000, 2_000_000  # synthetic
_FACTORS, _REGULARIZATION, _ALPHA = 32, 5.0, 4.0  # our defaults, which are not implicit's
ITERATIONS = 15  # ours and implicit's
_COMPARED = 1 << 16  # interactions whose scores are compared


def ours(file: str, iterations: int) -> Run:
  from ilm_jax.cf import ials

  found = np.load(file)
  offsets, items = found['offsets'], found['items']

  def run() -> dict[str, float]:
    user_vectors, item_vectors, _ = ials.fit(
      offsets,
      items,
      int(items.max()) + 1,
      factors=_FACTORS,
      regularization=_REGULARIZATION,
      alpha=_ALPHA,
      iterations=iterations,
      progress=False,
    )
    return {'score': _mean_score(offsets, items, user_vectors, item_vectors)}

  return run


def peer(file: str, iterations: int) -> Run:
  import threadpoolctl
  from implicit.als import AlternatingLeastSquares
  from scipy import sparse

  found = np.load(file)
  offsets, items = found['offsets'], found['items']

  def run() -> dict[str, float]:
    ones = np.ones(len(items), np.float32)
    matrix = sparse.csr_matrix((ones, items, offsets))
    # implicit warns of more threads of BLAS than one.
    with threadpoolctl.threadpool_limits(1, user_api='blas'):
      model = AlternatingLeastSquares(
        factors=_FACTORS,
        regularization=_REGULARIZATION,
        alpha=_ALPHA,
        iterations=iterations,
        random_state=0,
      )
      model.fit(matrix, show_progress=False)
    user_vectors, item_vectors = np.asarray(model.user_factors), np.asarray(model.item_factors)
    return {'score': _mean_score(offsets, items, user_vectors, item_vectors)}

  return run


def rows(rounds: int, peaks: Mapping[str, float]) -> Iterator[Row]:
  del peaks
  with tempfile.TemporaryDirectory() as directory, Workers() as workers:
    synthetic = Path(directory) / 'synthetic.npz'
    _write_synthetic(synthetic)
    for name, file in (
      ('MovieLens-100K, 97,401 interactions', ml100k.arrays()),
      (f'{INTERACTIONS:,} interactions, {USERS:,} users, {ITEMS:,} items', synthetic),
    ):
      options = {'file': str(file), 'iterations': ITERATIONS}
      found = workers.compare(
        {side: Side(__file__, side, options) for side in ('ours', 'peer')}, rounds
      )
      scores = [side.numbers['score'] for side in found.values()]
      assert math.isclose(*scores, rel_tol=1e-4), scores
      yield timed(
        f'iALS, {name}, {_FACTORS} factors, {ITERATIONS} iterations, float32',
        found,
        goal=0.95,
        note='ours is implicit, with checks and the loss at the end besides',
      )


def _mean_score(
  offsets: np.ndarray, items: np.ndarray, user_vectors: np.ndarray, item_vectors: np.ndarray
) -> float:
  """Of interactions; 1 where vectors fit them perfectly."""
  places = np.linspace(0, len(items) - 1, _COMPARED).astype(np.int64)
  users = np.searchsorted(offsets, places, side='right') - 1
  return float((user_vectors[users] * item_vectors[items[places]]).sum(axis=1).mean())


def _write_synthetic(file: Path) -> None:
  """Interactions of independent users and items, items by Zipf's law; no pair comes twice."""
  rng = np.random.default_rng(0)
  popularity = 1.0 / np.arange(1, ITEMS + 1)
  drawn = 2 * INTERACTIONS
  items = rng.choice(ITEMS, drawn, p=popularity / popularity.sum())
  pairs = np.unique(rng.integers(USERS, size=drawn) * ITEMS + items)
  pairs = np.sort(rng.choice(pairs, INTERACTIONS, replace=False))
  counts = np.bincount(pairs // ITEMS, minlength=USERS)
  offsets = np.concatenate([[0], np.cumsum(counts)])
  np.savez(file, offsets=offsets, items=(pairs % ITEMS).astype(np.int32))

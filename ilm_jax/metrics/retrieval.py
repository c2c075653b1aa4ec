"""Retrieval between items and their texts, both ways: R@k and ranks, with intervals and chance.

  ours = retrieval_from_features(item_features, text_features, same=texts)
  print(ours['item_to_text'].intervals['R@1'], 'chance', ours['item_to_text'].chance['R@1'])

Ties, ranks and intervals are those of `ilm_jax.metrics.ranking`; its `paired_bootstrap` compares
the `metrics` of two systems. Another item with the same text (a second edition) is neither right
nor wrong as an answer, and is left out of the candidates.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from ilm_jax.metrics import ranking

_BLOCK = 256  # queries ranked at once


@dataclasses.dataclass(frozen=True, eq=False)
class Retrieval:
  """One direction.

  Attributes:
    ranks: of each query's match among its candidates, in the order of the queries.
    ks: the k of R@k.
    seed: of the bootstrap.
  """

  ranks: ranking.Ranks
  ks: tuple[int, ...]
  seed: int

  @functools.cached_property
  def metrics(self) -> dict[str, np.ndarray]:
    """By name, [queries] float64: 'R@k', is the match among the first k; 'rank', 0 is best."""
    hits = {f'R@{k}': ranking.hit_rate(self.ranks, k) for k in self.ks}
    return hits | {'rank': self.ranks.mean}

  @functools.cached_property
  def intervals(self) -> dict[str, ranking.Interval]:
    """Mean and 95 % bootstrap interval of each metric."""
    columns = np.stack(list(self.metrics.values()), axis=1)
    return dict(zip(self.metrics, ranking.bootstrap_intervals(columns, seed=self.seed)))

  @property
  def chance(self) -> dict[str, float]:
    """Each metric of a random order: R@k is k / candidates, rank is (candidates - 1) / 2."""
    candidates = self.ranks.candidates
    hits = {f'R@{k}': float(np.minimum(k / candidates, 1).mean()) for k in self.ks}
    return hits | {'rank': float((candidates - 1).mean() / 2)}


def retrieval(
  scores: np.ndarray,
  *,
  ks: Sequence[int] = (1, 5, 10),
  same: Sequence | np.ndarray | None = None,
  queries: np.ndarray | None = None,
  seed: int = 0,
) -> dict[str, Retrieval]:
  """Retrieval by a matrix of scores.

  Args:
    scores: [n, n], higher is better; the match of row (item) i is column (text) i.
    ks: the k of R@k.
    same: [n] labels, for instance the texts: i and j of one label are no candidates of each other.
    queries: the rows, and columns, that are asked; all by default. All n are candidates always.
    seed: of the bootstrap.

  Returns:
    'item_to_text', where rows rank the columns, and 'text_to_item', where columns rank the rows.

  Raises:
    ValueError: shapes disagree, or a score is NaN.
  """
  if scores.ndim != 2 or scores.shape[0] != scores.shape[1]:
    raise ValueError(f'scores has shape {scores.shape}; row i and column i must be a pair')
  ways = {'item_to_text': lambda rows: scores[rows], 'text_to_item': lambda rows: scores[:, rows].T}
  return _rank(ways, len(scores), _BLOCK, ks, same, queries, seed)


def retrieval_from_features(
  item_features: np.ndarray,
  text_features: np.ndarray,
  *,
  ks: Sequence[int] = (1, 5, 10),
  same: Sequence | np.ndarray | None = None,
  queries: np.ndarray | None = None,
  seed: int = 0,
  block: int = _BLOCK,
) -> dict[str, Retrieval]:
  """As `retrieval`, the score of item i and text j being max over k of <items[i, k], texts[j]>.

  Args:
    item_features: [n, K, F], or [n, F] where K = 1.
    text_features: [n, F].
    block: queries that are scored at once: [block, n] scores are held, never [n, n].
  """
  views = np.moveaxis(item_features.reshape(len(item_features), -1, item_features.shape[-1]), 1, 0)
  if text_features.shape != views.shape[1:]:
    raise ValueError(f'item_features {item_features.shape}, text_features {text_features.shape}')
  ways = {
    'item_to_text': lambda rows: _best([view[rows] @ text_features.T for view in views]),
    'text_to_item': lambda rows: _best([text_features[rows] @ view.T for view in views]),
  }
  return _rank(ways, len(text_features), block, ks, same, queries, seed)


def _best(scores: list[np.ndarray]) -> np.ndarray:
  return functools.reduce(np.maximum, scores)


def _rank(
  ways: dict[str, Callable[[np.ndarray], np.ndarray]],
  n: int,
  block: int,
  ks: Sequence[int],
  same: Sequence | np.ndarray | None,
  queries: np.ndarray | None,
  seed: int,
) -> dict[str, Retrieval]:
  """Ranks i's match for each query i. A way maps queries [b] to scores [b, n] of the candidates."""
  queries = np.arange(n) if queries is None else np.asarray(queries)
  _, labels = np.unique(np.arange(n) if same is None else np.asarray(same), return_inverse=True)
  if len(labels) != n:
    raise ValueError(f'same has {len(labels)} labels for {n} pairs')
  groups = np.split(np.argsort(labels), np.cumsum(np.bincount(labels))[:-1])
  results = {}
  for way, score in ways.items():
    blocks = []
    for start in range(0, len(queries), block):
      rows = queries[start : start + block]
      alike = [groups[label] for label in labels[rows]]
      exclude = np.cumsum([0, *map(len, alike)]), np.concatenate(alike)
      blocks.append(dataclasses.astuple(ranking.ranks(score(rows), rows, exclude)))
    ranks = ranking.Ranks(*map(np.concatenate, zip(*blocks)))
    results[way] = Retrieval(ranks, tuple(ks), seed)
  return results

"""Ranking metrics of one target per row, and bootstrap intervals of their means.

Tie rule. A score shared by several candidates fixes no order among them, so every metric here is
its EXPECTATION over a uniformly random order of the tied candidates. No item id is favoured, and a
model that gives every item one score gets exactly chance (HR@k = k / candidates). Many published
figures count only strictly better candidates instead, which such a model passes with a perfect
score; `Ranks.optimistic` gives that rule for comparison.

Metrics are arrays with one value per row (user), never means: the mean goes through
`bootstrap_interval`, and two models are compared by `paired_bootstrap` on the same users.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

# Values held at once by one chunk of bootstrap resamples: 32 MB of float64.
_BOOTSTRAP_CHUNK = 4_000_000


@dataclasses.dataclass(frozen=True, eq=False)
class Ranks:
  """Where each row's target stands among that row's candidates.

  Attributes:
    better: [n] int64, candidates that score strictly higher than the target.
    tied: [n] int64, other candidates that score exactly the same.
    candidates: [n] int64, candidates in all, the target among them.
  """

  better: np.ndarray
  tied: np.ndarray
  candidates: np.ndarray

  @property
  def mean(self) -> np.ndarray:
    """[n] float64: the expected 0-based rank; 0 is best."""
    return self.better + self.tied / 2

  def optimistic(self) -> 'Ranks':
    """The same ranks with the target put before everything that ties with it."""
    return dataclasses.replace(self, tied=np.zeros_like(self.tied))


def ranks(
  scores: np.ndarray,
  targets: np.ndarray,
  exclude: tuple[np.ndarray, np.ndarray] | None = None,
) -> Ranks:
  """Ranks each row's target among all items, or among the items that are not excluded.

  Worked example: scores [[.9, .5, .5, .1]], target [1], item 0 excluded: candidates are 1, 2, 3;
  none is better, item 2 ties, so better = [0], tied = [1], candidates = [3].

  Args:
    scores: [n, num_items] float, higher is better; -inf means "never".
    targets: [n] int, the item to be found. A target is a candidate even if it is excluded.
    exclude: (offsets [n + 1], items): items[offsets[r]:offsets[r + 1]] are not candidates of row r
      (the seen items of its user). Repeats are allowed.

  Raises:
    ValueError: a score is NaN, a target is no item, or shapes disagree.
  """
  n, num_items = scores.shape
  targets = np.asarray(targets)
  if targets.shape != (n,):
    raise ValueError(f'targets has shape {targets.shape}; scores {scores.shape} need ({n},)')
  if n and (targets.min() < 0 or targets.max() >= num_items):
    raise ValueError(
      f'targets span {targets.min()}..{targets.max()}, but items are 0..{num_items - 1}'
      ' (leave out the users that have no target)'
    )
  bad = np.flatnonzero(np.isnan(scores).any(axis=1))
  if len(bad):
    raise ValueError(f'{len(bad)} of {n} rows of scores have NaN, the first is row {bad[0]}')

  target_scores = scores[np.arange(n), targets]
  better = (scores > target_scores[:, None]).sum(axis=1)
  tied = (scores == target_scores[:, None]).sum(axis=1) - 1
  candidates = np.full(n, num_items, np.int64)

  if exclude is not None:
    # Counting the excluded items out is exact and spares a masked copy of the scores.
    offsets, items = (np.asarray(part, np.int64) for part in exclude)
    if offsets.shape != (n + 1,) or offsets[-1] > len(items):
      raise ValueError(
        f'exclude: offsets of shape {offsets.shape} for {n} rows, {len(items)} items'
      )
    items = items[offsets[0] : offsets[-1]]
    if len(items) and (items.min() < 0 or items.max() >= num_items):
      raise ValueError(
        f'exclude: items span {items.min()}..{items.max()}, but items are 0..{num_items - 1}'
      )
    cells = np.unique(np.repeat(np.arange(n), np.diff(offsets)) * num_items + items)
    rows, columns = np.divmod(cells, num_items)
    others = columns != targets[rows]
    rows, columns = rows[others], columns[others]
    excluded = scores[rows, columns]
    better -= np.bincount(rows[excluded > target_scores[rows]], minlength=n)
    tied -= np.bincount(rows[excluded == target_scores[rows]], minlength=n)
    candidates -= np.bincount(rows, minlength=n)
  return Ranks(better, tied, candidates)


def hit_rate(ranks: Ranks, k: int) -> np.ndarray:
  """HR@k: [n] float64, the probability that the target is among the first k."""
  return np.clip((k - ranks.better) / (ranks.tied + 1), 0.0, 1.0)


def ndcg(ranks: Ranks, k: int) -> np.ndarray:
  """NDCG@k with one relevant item: [n] float64, 1 / log2(rank + 2) within the first k, else 0.

  The ideal gain is 1 (Jarvelin & Kekalainen 2002, binary gains). Ties are averaged as in McSherry &
  Najork, "Computing Information Retrieval Performance Measures Efficiently in the Presence of Tied
  Scores" (2008).
  """
  gain = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(k) + 2))])
  first, last = ranks.better, ranks.better + ranks.tied + 1
  return (gain[np.minimum(last, k)] - gain[np.minimum(first, k)]) / (ranks.tied + 1)


def reciprocal_rank(ranks: Ranks) -> np.ndarray:
  """[n] float64: 1 / (rank + 1) over all candidates; its mean is MRR."""
  from scipy import special  # a quarter of a second, which who recommends need not wait

  # A sum of 1/(rank+1) over tied places is a difference of harmonic numbers; where nothing ties
  # the direct form is exact.
  harmonic = special.digamma(ranks.better + ranks.tied + 2) - special.digamma(ranks.better + 1)
  return np.where(ranks.tied == 0, 1 / (ranks.better + 1), harmonic / (ranks.tied + 1))


def rank_percentile(ranks: Ranks) -> np.ndarray:
  """[n] float64: expected rank / (candidates - 1): 0 is best, .5 is chance.

  A row whose only candidate is its target tells nothing, and counts as .5.
  """
  alone = ranks.candidates == 1
  return np.where(alone, 0.5, ranks.mean / np.maximum(ranks.candidates - 1, 1))


def ranking_metrics(ranks: Ranks, ks: tuple[int, ...] = (5, 10)) -> dict[str, np.ndarray]:
  """All metrics by name: 'HR@k' and 'NDCG@k' for each k, 'MRR', 'rank_pct'; each [n] float64."""
  metrics = {}
  for k in ks:
    metrics[f'HR@{k}'] = hit_rate(ranks, k)
    metrics[f'NDCG@{k}'] = ndcg(ranks, k)
  return metrics | {'MRR': reciprocal_rank(ranks), 'rank_pct': rank_percentile(ranks)}


@dataclasses.dataclass(frozen=True)
class Interval:
  """A mean and its bootstrap interval; floats.

  Attributes:
    mean: the mean of the sample itself.
    low, high: the percentile interval.
    standard_error: standard deviation of the resampled means.
  """

  mean: float
  low: float
  high: float
  standard_error: float

  def __str__(self) -> str:
    return f'{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]'


def bootstrap_intervals(
  values: np.ndarray, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> list[Interval]:
  """Percentile bootstrap of the mean of each column; rows (users) are resampled whole.

  Columns share the resamples, so m metrics cost little more than one.

  Args:
    values: [n, m] float, one row per user.
    confidence: of the interval, between 0 and 1.
    resamples: number of bootstrap samples.
    seed: the same seed and values give the same intervals.

  Returns:
    m intervals.

  Raises:
    ValueError: no rows, a value is not finite, or confidence is outside (0, 1).
  """
  return bootstrap_statistic(
    lambda means: means, values, confidence=confidence, resamples=resamples, seed=seed
  )


def bootstrap_statistic(
  statistic: Callable[[np.ndarray], np.ndarray],
  values: np.ndarray,
  *,
  confidence: float = 0.95,
  resamples: int = 2000,
  seed: int = 0,
) -> list[Interval]:
  """As `bootstrap_intervals`, of k functions of the means: [r, m] means of columns -> [r, k].

  The `mean` of an interval is the function of the sample itself.
  """
  values = np.asarray(values, np.float64)
  if values.ndim != 2 or not len(values):
    raise ValueError(f'values has shape {values.shape}; expected [rows >= 1, columns]')
  if not np.isfinite(values).all():
    raise ValueError(f'{np.count_nonzero(~np.isfinite(values))} values are not finite')
  if not 0 < confidence < 1:
    raise ValueError(f'confidence={confidence}; expected a number between 0 and 1, such as 0.95')
  n, m = values.shape
  rng = np.random.default_rng(seed)
  means = np.empty((resamples, m))
  chunk = max(1, _BOOTSTRAP_CHUNK // n)
  for start in range(0, resamples, chunk):
    size = min(chunk, resamples - start)
    draws = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
    counts = np.bincount(draws.ravel(), minlength=size * n).reshape(size, n)
    means[start : start + size] = counts @ values / n
  resampled = statistic(means)
  low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
  own, errors = statistic(values.mean(axis=0)[None])[0], resampled.std(axis=0, ddof=1)
  return [Interval(*map(float, column)) for column in zip(own, low, high, errors)]


def bootstrap_interval(
  values: np.ndarray, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
  """`bootstrap_intervals` of one metric, values [n]."""
  columns = np.asarray(values)[:, None]
  return bootstrap_intervals(columns, confidence=confidence, resamples=resamples, seed=seed)[0]


def paired_bootstrap(
  a: np.ndarray,
  b: np.ndarray,
  *,
  confidence: float = 0.95,
  resamples: int = 2000,
  seed: int = 0,
) -> Interval:
  """Interval of mean(a) - mean(b) for two models measured on the same users in the same order.

  Resampling users keeps each pair together: what makes a user hard for both models cancels, and the
  interval is narrower than two separate ones suggest.

  Args:
    a, b: [n] float, one metric of the two models.

  Raises:
    ValueError: the lengths differ, or as `bootstrap_intervals`.
  """
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  if a.shape != b.shape:
    raise ValueError(f'a has shape {a.shape}, b {b.shape}: pair the same users in the same order')
  return bootstrap_interval(a - b, confidence=confidence, resamples=resamples, seed=seed)

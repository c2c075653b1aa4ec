"""Reference rankers: what a language model has to beat, on the same users and the same metrics.

Every ranker is a function from users [n] to scores [n, num_items], so that all users times all
items are never in memory at once.

Conventions of `evaluate_rankers` (leave-one-out, over ALL items):
* The history of the validation target is the training rows; the history of the test target is the
  training rows and the validation item. Popularity, itemKNN and EASE are fitted anew on the
  histories of the split they are measured on. iALS alone is fitted on the training rows for both
  splits, since its vectors are the ones the language model reads; its recency ranker does read the
  validation item as the last row of the test history.
* 'seen removed': the items of the user's history are no candidates.
* Ties: expected metrics, see `ilm_jax.metrics.ranking`.

The split decides as much as the ranker. 44 % of MovieLens-100K's users rated their last two films
in the same second, so that the order of equal timestamps picks their test item: with ties in the
order of the source's numeric item ids (which puts rarer films last) popularity has HR@10 .050, in
the order of the file .087, in random order .082 +- .005. Compare figures of one split only.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import sparse

from ilm_jax.cf import ials
from ilm_jax.data.prepared import PreparedData
from ilm_jax.errors import UsageError, did_you_mean
from ilm_jax.metrics import ranking

# users [n] int -> scores [n, num_items] float, higher is better, -inf for "never".
Scores = Callable[[np.ndarray], np.ndarray]

RANKERS = ('popularity', 'itemknn', 'itemknn_recency', 'ease', 'ials_dot', 'ials_recency')
SPLITS = ('validation', 'test')

EASE_MAX_ITEMS = 20_000  # a dense float64 inverse of that size: 3.2 GB, some minutes
ITEM_KNN_MAX_PAIRS = 200_000_000  # a sparse matrix with that many cosines: 2.4 GB


@dataclasses.dataclass(frozen=True, eq=False)
class Sequences:
  """Each user's items in time order.

  Attributes:
    offsets: [num_users + 1] int64, user u's items are items[offsets[u]:offsets[u + 1]].
    items: [rows] int, oldest first.
    num_items: size of the catalogue.
  """

  offsets: np.ndarray
  items: np.ndarray
  num_items: int

  @property
  def num_users(self) -> int:
    return len(self.offsets) - 1

  def append(self, last: np.ndarray) -> 'Sequences':
    """The sequences with item last[u] at the end of user u's, where it is not -1."""
    has = last >= 0
    grown = np.insert(self.items, self.offsets[1:][has], last[has])
    offsets = self.offsets + np.concatenate([[0], np.cumsum(has)])
    return Sequences(offsets, grown, self.num_items)

  def of(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(offsets [n + 1], items) of some users."""
    lengths = self.offsets[users + 1] - self.offsets[users]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = np.arange(offsets[-1]) + np.repeat(self.offsets[users] - offsets[:-1], lengths)
    return offsets, self.items[rows]

  def binary(self) -> sparse.csr_matrix:
    """[num_users, num_items] float64: 1 where the user has the item, however often."""
    matrix = self._weighted(np.ones(len(self.items)))
    matrix.data[:] = 1
    return matrix

  def recency(self, last: int, decay: float) -> sparse.csr_matrix:
    """[num_users, num_items] float64: decay^j for the j-th row from the end, j < last, else 0."""
    age = np.repeat(self.offsets[1:], np.diff(self.offsets)) - 1 - np.arange(len(self.items))
    return self._weighted(np.where(age < last, decay ** np.minimum(age, last), 0.0))

  def _weighted(self, weights: np.ndarray) -> sparse.csr_matrix:
    shape = (self.num_users, self.num_items)
    matrix = sparse.csr_matrix((weights, self.items, self.offsets), shape=shape, copy=True)
    matrix.sum_duplicates()
    return matrix


def affordable(prepared: PreparedData) -> tuple[tuple[str, ...], dict[str, str]]:
  """Returns the rankers whose matrices one machine holds, and the reason for each other one."""
  skipped = {}
  if prepared.num_items > EASE_MAX_ITEMS:
    skipped['ease'] = (
      f'needs a dense items x items matrix: {prepared.num_items:,} items, limit {EASE_MAX_ITEMS:,}'
    )
  lengths = np.diff(histories(prepared, 'test').offsets)
  pairs = min(prepared.num_items**2, int(np.sum(lengths**2)))
  if pairs > ITEM_KNN_MAX_PAIRS:
    reason = f'up to {pairs:,} pairs of items have a user in common, limit {ITEM_KNN_MAX_PAIRS:,}'
    skipped.update(itemknn=reason, itemknn_recency=reason)
  return tuple(name for name in RANKERS if name not in skipped), skipped


def histories(prepared: PreparedData, split: str) -> Sequences:
  """The items before the target of `split`, 'validation' or 'test'."""
  train = Sequences(prepared.offsets, prepared.items, prepared.num_items)
  return train.append(prepared.validation_items) if split == 'test' else train


def popularity(history: Sequences) -> Scores:
  """Scores an item by its number of rows in all users' histories."""
  counts = np.bincount(history.items, minlength=history.num_items).astype(np.float64)
  return lambda users: np.broadcast_to(counts, (len(users), history.num_items))


def item_knn(history: Sequences) -> Scores:
  """Scores item i by the summed cosines of i's users with those of the user's items.

  cos(i, j) = |users of both| / sqrt(|users of i| |users of j|), 0 for i = j; all neighbours count
  (Sarwar et al. 2001; Deshpande & Karypis 2004).
  """
  return _profile_times_matrix(history.binary(), _cosines(history))


def item_knn_recency(history: Sequences, *, last: int = 20, decay: float = 0.8) -> Scores:
  """`item_knn` over the user's last rows; the j-th from the end weighs decay^j."""
  return _profile_times_matrix(history.recency(last, decay), _cosines(history))


def ease(history: Sequences, *, regularization: float = 300.0) -> Scores:
  """EASE (Steck 2019, "Embarrassingly Shallow Autoencoders for Sparse Data"), in closed form.

  B minimises |X - X B|^2 + regularization |B|^2 subject to diag(B) = 0, where X is the binary
  history matrix: with P = (X'X + regularization I)^-1, B_ij = -P_ij / P_jj off the diagonal
  (eq. 8). Scores are X B.

  Raises:
    UsageError: more than EASE_MAX_ITEMS items (the inverse is dense).
  """
  if history.num_items > EASE_MAX_ITEMS:
    raise UsageError(
      f"rankers: 'ease' inverts a dense num_items x num_items matrix, and {history.num_items} items"
      f" are over the limit of {EASE_MAX_ITEMS}. Leave 'ease' out of the rankers."
    )
  import scipy.linalg  # which only this ranker needs

  matrix = history.binary()
  gram = (matrix.T @ matrix).toarray()
  gram[np.diag_indices_from(gram)] += regularization
  precision = scipy.linalg.inv(gram, overwrite_a=True)
  weights = precision / -np.diag(precision)
  np.fill_diagonal(weights, 0)
  return _profile_times_matrix(matrix, weights)


def dot_product(user_vectors: np.ndarray, item_vectors: np.ndarray) -> Scores:
  """Scores by user vector . item vector ([num_users, d] and [num_items, d], not normalised).

  Items whose vector is zero (cold) score -inf: nothing is known of them, and a 0 would place them
  above everything with a negative score.
  """
  cold = ~item_vectors.any(axis=1)
  return lambda users: np.where(cold, -np.inf, user_vectors[users] @ item_vectors.T)


def recency_cosine(
  history: Sequences, item_vectors: np.ndarray, *, last: int = 20, decay: float = 0.8
) -> Scores:
  """Scores by the cosine of an item's vector and the user's recent taste.

  The taste is the sum of the unit vectors of the user's last rows, the j-th from the end times
  decay^j. Its own length is not divided out: it does not change a user's order. Cold items score
  -inf as in `dot_product`.

  Args:
    item_vectors: [num_items, d], normalised here.
  """
  lengths = np.linalg.norm(item_vectors, axis=1, keepdims=True)
  units = item_vectors / np.where(lengths > 0, lengths, 1)
  taste = history.recency(last, decay)
  cold = lengths[:, 0] == 0
  return lambda users: np.where(cold, -np.inf, (taste[users] @ units) @ units.T)


def _cosines(history: Sequences) -> sparse.csr_matrix:
  matrix = history.binary()
  lengths = np.sqrt(np.asarray(matrix.sum(axis=0)).ravel())
  scaled = matrix @ sparse.diags(1 / np.where(lengths > 0, lengths, 1))
  cosines = sparse.csr_matrix(scaled.T @ scaled)
  # An item is no neighbour of itself; else, with seen items kept, a user's own items come first.
  return cosines - sparse.diags(cosines.diagonal(), format='csr')


def _profile_times_matrix(
  profiles: sparse.csr_matrix, matrix: sparse.csr_matrix | np.ndarray
) -> Scores:
  def score(users: np.ndarray) -> np.ndarray:
    scores = profiles[users] @ matrix
    return scores.toarray() if sparse.issparse(scores) else scores

  return score


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
  """One ranker on one split.

  Attributes:
    ranker: one of RANKERS, or the name given to another scorer.
    split: 'validation' or 'test'.
    seen_removed: whether the items of the user's history were no candidates.
    users: [n] int, the users that have a target, in the order of the ranks.
    ranks: of their targets; `ranking.paired_bootstrap` compares two evaluations user by user.
    seed: of the bootstrap.
  """

  ranker: str
  split: str
  seen_removed: bool
  users: np.ndarray
  ranks: ranking.Ranks
  seed: int = 0

  @functools.cached_property
  def metrics(self) -> dict[str, np.ndarray]:
    """Per-user metrics by name, each [n]."""
    return ranking.ranking_metrics(self.ranks)

  @functools.cached_property
  def intervals(self) -> dict[str, ranking.Interval]:
    """Mean and 95 % bootstrap interval of each metric."""
    columns = np.stack(list(self.metrics.values()), axis=1)
    return dict(zip(self.metrics, ranking.bootstrap_intervals(columns, seed=self.seed)))


def evaluate_scores(
  ranker: str,
  scores: Scores,
  prepared: PreparedData,
  split: str,
  *,
  seed: int = 0,
  max_scores: int = 20_000_000,
) -> list[Evaluation]:
  """Ranks every user's target of a split, in batches of users.

  Args:
    ranker: its name in the table.
    scores: users [n] -> [n, num_items]; a trained model fits here as well as a reference ranker.
    split: 'validation' or 'test'.
    seed: of the bootstrap.
    max_scores: that are held at once, by default 160 MB of float64; a user is the least.

  Returns:
    Two evaluations: seen items removed, and kept.

  Raises:
    UsageError: no user has a target.
  """
  targets = {'validation': prepared.validation_items, 'test': prepared.test_items}[split]
  users = np.flatnonzero(targets >= 0)
  if not len(users):
    raise UsageError(f'{prepared.name}: no user has a {split} item; prepare with shorter k-core.')
  history = histories(prepared, split)
  batch_size = int(np.clip(max_scores // prepared.num_items, 1, 4096))
  removed, kept = [], []
  for start in range(0, len(users), batch_size):
    batch = users[start : start + batch_size]
    batch_scores = scores(batch)
    removed.append(ranking.ranks(batch_scores, targets[batch], history.of(batch)))
    kept.append(ranking.ranks(batch_scores, targets[batch]))
  return [
    Evaluation(ranker, split, seen_removed, users, _concatenate(parts), seed)
    for seen_removed, parts in ((True, removed), (False, kept))
  ]


def evaluate_rankers(
  prepared: PreparedData,
  *,
  rankers: Sequence[str] = RANKERS,
  splits: Sequence[str] = SPLITS,
  ials_settings: Mapping[str, Any] | None = None,
  ials_vectors: tuple[np.ndarray, np.ndarray] | None = None,
  seed: int = 0,
  done: Callable[[int], object] = lambda count: None,
) -> list[Evaluation]:
  """Measures the reference rankers on a prepared data set.

  Args:
    prepared: the data set.
    rankers: some of RANKERS.
    splits: some of SPLITS. Choose settings on 'validation', report 'test'.
    ials_settings: for `ials.fit`; its defaults where absent.
    ials_vectors: (user, item) vectors that `ials.fit` gave for the training rows of this data set,
      where they are at hand; nothing is fitted then.
    seed: of the bootstrap; also of iALS, unless its settings say otherwise.
    done: is told that one more ranker is measured on one more split.

  Returns:
    Evaluations by split, ranker, and seen items removed or kept.

  Raises:
    UsageError: an unknown ranker or split, or as `ease`, `ials.fit` and `evaluate_scores`.
  """
  for key, values, allowed in (('rankers', rankers, RANKERS), ('splits', splits, SPLITS)):
    for value in values:
      if value not in allowed:
        hint = did_you_mean(value, allowed)
        raise UsageError(f'{key}: {value!r} is none of {", ".join(allowed)}.{hint}')
  user_vectors = item_vectors = np.empty((0, 0), np.float32)
  if ials_vectors is not None:
    user_vectors, item_vectors = ials_vectors
  elif {'ials_dot', 'ials_recency'} & set(rankers):
    settings: dict[str, Any] = {'seed': seed, **(ials_settings or {})}
    user_vectors, item_vectors, _ = ials.fit(
      prepared.offsets, prepared.items, prepared.num_items, **settings
    )
  evaluations = []
  for split in splits:
    history = histories(prepared, split)
    makers = {
      'popularity': lambda history=history: popularity(history),
      'itemknn': lambda history=history: item_knn(history),
      'itemknn_recency': lambda history=history: item_knn_recency(history),
      'ease': lambda history=history: ease(history),
      'ials_dot': lambda: dot_product(user_vectors, item_vectors),
      'ials_recency': lambda history=history: recency_cosine(history, item_vectors),
    }
    for ranker in rankers:
      evaluations += evaluate_scores(ranker, makers[ranker](), prepared, split, seed=seed)
      done(1)
  return evaluations


def format_table(evaluations: Sequence[Evaluation]) -> str:
  """A Markdown table, one row per evaluation: means with their 95 % bootstrap intervals."""
  names = list(evaluations[0].intervals)
  header = ['split', 'seen items', 'ranker', 'users', *names]
  rows = [header, ['---'] * len(header)]
  for evaluation in evaluations:
    seen = 'removed' if evaluation.seen_removed else 'kept'
    values = [str(interval) for interval in evaluation.intervals.values()]
    row = [evaluation.split, seen, evaluation.ranker, str(len(evaluation.users)), *values]
    rows.append(row)
  widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
  lines = ['| ' + ' | '.join(c.ljust(w) for c, w in zip(row, widths)) + ' |' for row in rows]
  return '\n'.join(lines) + '\n'


def _concatenate(parts: list[ranking.Ranks]) -> ranking.Ranks:
  return ranking.Ranks(
    *(
      np.concatenate([getattr(part, field.name) for part in parts])
      for field in dataclasses.fields(ranking.Ranks)
    )
  )

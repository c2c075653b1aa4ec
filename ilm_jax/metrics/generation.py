"""Metrics of generated text and of predicted ratings.

  vocabulary = labels_of(prepared.item_text['genres'])
  predicted = [parse_labels(text, vocabulary) for text in generated]
  f1 = set_f1(predicted, [split_labels(prepared.item_text['genres'][item]) for item in items])
  print('genre F1', ranking.bootstrap_interval(f1))

As in `ilm_jax.metrics.ranking`, a metric is an array with one value per row: its mean goes through
`bootstrap_interval`, and two models are compared by `paired_bootstrap` on the same rows. What is no
mean over rows has an interval of its own here: `corpus_perplexity`, `rmse`.
"""

import functools
import re
from collections.abc import Sequence, Set

import numpy as np
from scipy import special

from ilm_jax.metrics.ranking import Interval, bootstrap_statistic
from ilm_jax.metrics.sentence_embedding import SentenceEmbedder

# '4', '4.5', '.5', '-1'. The hyphen of '3-4' and the dots of 'say...4' belong to no number.
_NUMBER = re.compile(r'(?:(?<!\w)-)?(?:[0-9]+(?:\.[0-9]+)?|(?<![.\w])\.[0-9]+)')


def semantic_consistency(
  generated: Sequence[str], references: Sequence[str], embedder: SentenceEmbedder
) -> np.ndarray:
  """How alike generated and reference text mean (Tennenholtz et al. 2023, arXiv:2310.04475).

  Args:
    generated, references: n texts each; an empty generated text counts as 0.
    embedder: of both.

  Returns:
    [n] float64, the cosine of the embeddings of each pair; 1 for the same text.

  Raises:
    ValueError: the lengths differ, or a reference is empty.
  """
  _check_lengths(generated=generated, references=references)
  empty = [row for row, text in enumerate(references) if not text.strip()]
  if empty:
    raise ValueError(
      f'{len(empty)} of {len(references)} references are empty, the first is row {empty[0]} (leave'
      ' out the rows that have no reference)'
    )
  rows = [row for row, text in enumerate(generated) if text.strip()]
  pairs = [(generated[row], references[row]) for row in rows]
  # Many generated texts share a reference, or say the same.
  texts = list(dict.fromkeys(text for pair in pairs for text in pair))
  place = {text: i for i, text in enumerate(texts)}
  vectors = embedder.embed(texts).astype(np.float64)
  consistency = np.zeros(len(generated))
  for row, (ours, theirs) in zip(rows, pairs):
    consistency[row] = vectors[place[ours]] @ vectors[place[theirs]]
  return consistency


def split_labels(value: str) -> set[str]:
  """The labels of one text field: 'Comedy, Sci-Fi' -> {'Comedy', 'Sci-Fi'}; '' -> {}."""
  return {part.strip() for part in value.split(',')} - {''}


def labels_of(field_values: Sequence[str]) -> list[str]:
  """Every label that occurs in a text field of the items, sorted."""
  return sorted(set().union(*map(split_labels, field_values)))


def parse_labels(text: str, labels: Sequence[str]) -> set[str]:
  """The labels that a text names.

  Whole words in any case; a hyphen and a space are the same, so that 'film noir' names 'Film-Noir'.
  A longer label goes before a shorter one within it: 'film noir' does not name 'Noir' as well.

  Raises:
    ValueError: a label has nothing in it.
  """
  pattern, by_key = _label_pattern(tuple(labels))
  return {label for key in pattern.findall(_fold(text)) for label in by_key[key]}


def set_f1(predicted: Sequence[Set[str]], truth: Sequence[Set[str]]) -> np.ndarray:
  """Example-based F1 of sets: [n] float64, 2 |P and T| / (|P| + |T|); 1 where both are empty.

  Raises:
    ValueError: the lengths differ.
  """
  _check_lengths(predicted=predicted, truth=truth)
  both = np.array([len(p & t) for p, t in zip(predicted, truth)], np.float64)
  sizes = np.array([len(p) + len(t) for p, t in zip(predicted, truth)], np.float64)
  return np.where(sizes == 0, 1.0, 2 * both / np.maximum(sizes, 1))


def bootstrap_ratio(
  numerators: np.ndarray,
  denominators: np.ndarray,
  *,
  confidence: float = 0.95,
  resamples: int = 2000,
  seed: int = 0,
) -> Interval:
  """Percentile bootstrap of sum(numerators) / sum(denominators); rows are resampled whole.

  Two models on the same rows and tokens: bootstrap_ratio(nll_a - nll_b, tokens).

  Args:
    numerators: [n] float.
    denominators: [n] float, all positive.
    confidence, resamples, seed: as of `ranking.bootstrap_intervals`, whose resamples these are.

  Returns:
    The interval; its `mean` is the ratio of the sample itself.

  Raises:
    ValueError: the lengths differ, there are no rows, a value is not finite, a denominator is not
      positive, or confidence is outside (0, 1).
  """
  _check_lengths(numerators=numerators, denominators=denominators)
  denominators = np.asarray(denominators, np.float64)
  bad = np.flatnonzero(denominators <= 0)
  if len(bad):
    raise ValueError(
      f'{len(bad)} of {len(denominators)} denominators are not positive, the first is row {bad[0]}:'
      f' {denominators[bad[0]]:g} (leave out the rows without tokens)'
    )
  columns = np.stack([np.asarray(numerators, np.float64), denominators], axis=1)
  (interval,) = bootstrap_statistic(
    lambda means: means[:, :1] / means[:, 1:],
    columns,
    confidence=confidence,
    resamples=resamples,
    seed=seed,
  )
  return interval


def corpus_perplexity(
  nll: np.ndarray,
  tokens: np.ndarray,
  *,
  confidence: float = 0.95,
  resamples: int = 2000,
  seed: int = 0,
) -> Interval:
  """LOG perplexity of a corpus, in nats per token: every token counts the same, not every example.

  Args:
    nll: [n] float, negative log-likelihood of each example, summed over its tokens, in nats.
    tokens: [n], how many tokens that is; all positive.

  Returns:
    The interval of sum(nll) / sum(tokens), examples resampled whole. The exponentials of its mean,
    low and high are the perplexity and its interval.

  Raises:
    ValueError: as `bootstrap_ratio`.
  """
  return bootstrap_ratio(nll, tokens, confidence=confidence, resamples=resamples, seed=seed)


def rating_error(
  predicted: Sequence[str], truth: np.ndarray, known: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Squared errors of ratings that were generated as text.

  The prediction is the first number of a text: '4.5 out of 5' is 4.5. A text without a number, or
  with one outside the scale (min to max of the known ratings: 'Made in 1995'), counts as the mean
  of the known ratings.

  Args:
    predicted: n texts.
    truth: [n] float.
    known: [m >= 1] float, the ratings of the training rows.

  Returns:
    [n] float64 squared errors, and [n] bool: is the prediction the text's own number?

  Raises:
    ValueError: the lengths differ, known is no list of ratings, or a rating is not finite.
  """
  _check_lengths(predicted=predicted, truth=truth)
  truth, known = np.asarray(truth, np.float64), np.asarray(known, np.float64)
  if known.ndim != 1 or not len(known):
    raise ValueError(f'known has shape {known.shape}; expected [ratings >= 1], not their mean')
  for name, values in (('truth', truth), ('known', known)):
    if not np.isfinite(values).all():
      raise ValueError(f'{name}: {np.count_nonzero(~np.isfinite(values))} ratings are not finite')
  found = [_NUMBER.search(text) for text in predicted]
  numbers = np.array([float(match[0]) if match else np.nan for match in found], np.float64)
  is_number = (numbers >= known.min()) & (numbers <= known.max())
  return (np.where(is_number, numbers, known.mean()) - truth) ** 2, is_number


def expected_rating(log_probs: np.ndarray, ratings: np.ndarray) -> np.ndarray:
  """[n] float64: the mean rating under a model that scores every rating.

  Args:
    log_probs: [n, R] float; a row is normalised over the R ratings. -inf means "never".
    ratings: [R] float, the ratings themselves.

  Raises:
    ValueError: shapes disagree, or a row has no probabilities (NaN, inf, nothing but -inf).
  """
  log_probs, ratings = np.asarray(log_probs, np.float64), np.asarray(ratings, np.float64)
  if log_probs.ndim != 2 or ratings.shape != log_probs.shape[1:]:
    raise ValueError(f'log_probs has shape {log_probs.shape}, ratings {ratings.shape}')
  bad = np.flatnonzero(~np.isfinite(log_probs.max(axis=1)))
  if len(bad):
    raise ValueError(
      f'{len(bad)} of {len(log_probs)} rows have no probabilities, the first is row {bad[0]}:'
      f' {log_probs[bad[0]]}'
    )
  return special.softmax(log_probs, axis=1) @ ratings


def rmse(
  squared_errors: np.ndarray, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
  """Root of the mean of squared errors [n], with its percentile bootstrap.

  To compare two models, give their squared errors to `ranking.paired_bootstrap`.

  Raises:
    ValueError: as `ranking.bootstrap_intervals`; also where a squared error is negative.
  """
  values = np.asarray(squared_errors, np.float64)
  if (values < 0).any():
    raise ValueError(f'{np.count_nonzero(values < 0)} squared errors are negative')
  (interval,) = bootstrap_statistic(
    np.sqrt, values[:, None], confidence=confidence, resamples=resamples, seed=seed
  )
  return interval


def _check_lengths(**sequences: Sequence | np.ndarray) -> None:
  lengths = {name: len(values) for name, values in sequences.items()}
  if len(set(lengths.values())) > 1:
    counts = ', '.join(f'{name} has {n}' for name, n in lengths.items())
    raise ValueError(f'{counts} rows; pair the same rows in the same order')


def _fold(text: str) -> str:
  return re.sub(r'[\s-]+', ' ', text.replace('\u2019', "'")).strip().casefold()


@functools.lru_cache(maxsize=8)
def _label_pattern(labels: tuple[str, ...]) -> tuple[re.Pattern[str], dict[str, list[str]]]:
  """A pattern that finds folded labels in folded text, and folded label -> labels."""
  by_key: dict[str, list[str]] = {}
  for label in labels:
    key = _fold(label)
    if not key:
      raise ValueError(f'label {label!r} has nothing in it')
    by_key.setdefault(key, []).append(label)
  keys = sorted(by_key, key=len, reverse=True)
  names = '|'.join(map(re.escape, keys)) or '(?!)'  # which matches nothing
  return re.compile(rf'(?<!\w)(?:{names})(?!\w)'), by_key

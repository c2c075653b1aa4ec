import dataclasses
import math

import numpy as np
import pytest
import scipy.stats

from ilm_jax.metrics import generation, ranking
from ilm_jax.metrics.sentence_embedding import SentenceEmbedder

GENRES = ['Action', 'Children', 'Comedy', 'Film-Noir', 'Noir', 'Sci-Fi', 'War']


@pytest.fixture(scope='module')
def embedder():
  return SentenceEmbedder.minilm()


@pytest.mark.network
def test_paraphrases_are_more_consistent_than_unrelated_texts(embedder):
  references = [
    'A cowboy doll is jealous of a new space toy.',
    'A crew in deep space is hunted by a monster.',
    'Two strangers fall in love on a train to Vienna.',
  ]
  paraphrases = [
    'A toy cowboy envies the astronaut toy that has just arrived.',
    'Astronauts on a spaceship are stalked by a deadly alien creature.',
    'On a railway journey to Vienna, a man and a woman who never met become lovers.',
  ]
  alike = generation.semantic_consistency(paraphrases, references, embedder)
  shifted = generation.semantic_consistency(np.roll(paraphrases, 1).tolist(), references, embedder)
  assert alike.dtype == np.float64
  assert alike.shape == (3,)
  assert alike.min() > 0.5
  assert shifted.max() < 0.35


@pytest.mark.network
def test_consistency_is_the_cosine_of_each_pair(embedder):
  generated = ['A western.', 'a film about war', 'A western.', 'A comedy.', ' \n', '']
  references = ['A comedy.', 'A drama.', 'A western.', 'A comedy.', 'A comedy.', 'A drama.']
  found = generation.semantic_consistency(generated, references, embedder)
  for row in range(4):
    one, other = embedder.embed([generated[row]])[0], embedder.embed([references[row]])[0]
    cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    assert found[row] == pytest.approx(cosine, abs=1e-6)
  np.testing.assert_allclose(found[2:4], 1, atol=1e-6)  # identical texts
  np.testing.assert_array_equal(found[4:], 0)  # nothing was generated
  np.testing.assert_array_equal(generation.semantic_consistency(['', ''], 'ab', embedder), 0)


@pytest.mark.network
def test_consistency_refuses_what_has_no_pair(embedder):
  with pytest.raises(ValueError, match='generated has 1, references has 2 rows'):
    generation.semantic_consistency(['a'], ['a', 'b'], embedder)
  with pytest.raises(ValueError, match='1 of 3 references are empty, the first is row 1'):
    generation.semantic_consistency(['a', 'b', 'c'], ['a', ' ', 'c'], embedder)


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('Comedy, Sci-Fi', {'Comedy', 'Sci-Fi'}),
    ('It is an ACTION film; some comedy, more action.', {'Action', 'Comedy'}),
    ('A Film-Noir.', {'Film-Noir'}),
    ('a film\nnoir', {'Film-Noir'}),
    ('noir, and film-noir', {'Noir', 'Film-Noir'}),
    ('Neo-noir', {'Noir'}),
    ('sci fi / war', {'Sci-Fi', 'War'}),
    ("a children's film", {'Children'}),
    ('a warm interaction, comedyfilm, warfare', set()),
    ('', set()),
  ],
)
def test_labels_that_a_text_names(text, expected):
  assert generation.parse_labels(text, GENRES) == expected
  assert generation.parse_labels(text, GENRES[::-1]) == expected


def test_labels_are_no_patterns():
  labels = ["Children's", 'C++', 'C', 'R&B (live)', 'A.B']
  assert generation.parse_labels('Children\u2019s c++, AxB', labels) == {"Children's", 'C++'}
  assert generation.parse_labels('r&b (live) in C', labels) == {'R&B (live)', 'C'}
  assert generation.parse_labels('pop and POP', ['Pop', 'pop']) == {'Pop', 'pop'}
  assert generation.parse_labels('no, nothing', []) == set()
  with pytest.raises(ValueError, match="label '-' has nothing in it"):
    generation.parse_labels('anything', ['Pop', '-'])


def test_labels_of_a_text_field():
  values = ['Animation, Children, Comedy', '', 'Comedy', "Children's,Film-Noir , "]
  assert generation.split_labels(values[0]) == {'Animation', 'Children', 'Comedy'}
  assert generation.split_labels('') == set()
  assert generation.labels_of(values) == [
    'Animation', 'Children', "Children's", 'Comedy', 'Film-Noir'
  ]  # fmt: skip
  assert generation.labels_of([]) == []


def test_a_data_set_s_own_field_parses_to_its_labels(small_prepared):
  values = small_prepared.item_text['genres']
  labels = generation.labels_of(values)
  assert labels == ['Action', 'Comedy', 'Drama', 'Sci-Fi']
  parsed = [generation.parse_labels(value, labels) for value in values]
  truth = [generation.split_labels(value) for value in values]
  assert any(not labels for labels in truth)  # one item has no genres
  np.testing.assert_array_equal(generation.set_f1(parsed, truth), 1)


def test_f1_is_the_harmonic_mean_of_precision_and_recall():
  rng = np.random.default_rng(0)
  sets = [{name for name in GENRES if rng.random() < 0.3} for _ in range(200)]
  predicted, truth = sets[:100], sets[100:]
  for p, t, found in zip(predicted, truth, generation.set_f1(predicted, truth)):
    if not p or not t:
      expected = float(p == t)
    else:
      precision, recall = sum(i in t for i in p) / len(p), sum(i in p for i in t) / len(t)
      expected = 2 / (1 / precision + 1 / recall) if precision else 0.0
    assert found == pytest.approx(expected)
  worked = generation.set_f1([{'a', 'b'}, set(), set(), {'a'}], [{'b'}, set(), {'a'}, set()])
  np.testing.assert_allclose(worked, [2 / 3, 1, 0, 0])
  with pytest.raises(ValueError, match='predicted has 1, truth has 2 rows'):
    generation.set_f1([set()], [set(), set()])


def _corpus(seed=1, n=301):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(1, 60, n)
  return tokens * rng.gamma(4.0, 0.7, n), tokens


def test_log_perplexity_weighs_tokens_alike():
  nll, tokens = _corpus()
  every_token = np.concatenate([np.full(t, x / t) for x, t in zip(nll, tokens)])
  assert generation.corpus_perplexity(nll, tokens).mean == pytest.approx(every_token.mean())
  assert abs((nll / tokens).mean() - every_token.mean()) > 1e-3  # the other, wrong mean


def test_interval_of_a_ratio_agrees_with_scipy_and_with_the_delta_method():
  nll, tokens = _corpus()
  ours = generation.corpus_perplexity(nll, tokens, confidence=0.9, resamples=10_000, seed=3)
  theirs = scipy.stats.bootstrap(
    (nll, tokens),
    lambda x, t, axis: x.sum(axis) / t.sum(axis),
    paired=True,
    confidence_level=0.9,
    n_resamples=10_000,
    method='percentile',
    rng=np.random.default_rng(4),
    vectorized=True,
    batch=1000,
  )
  error = (nll - ours.mean * tokens).std() / math.sqrt(len(nll)) / tokens.mean()
  assert ours.standard_error == pytest.approx(error, rel=0.04)
  assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.1 * error)
  assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.1 * error)


def test_a_ratio_of_ones_has_the_resamples_of_ranking():
  values = _corpus()[0]
  options = {'confidence': 0.8, 'resamples': 200, 'seed': 5}
  ours = generation.bootstrap_ratio(values, np.ones(len(values)), **options)
  theirs = ranking.bootstrap_interval(values, **options)
  assert dataclasses.astuple(ours) == pytest.approx(dataclasses.astuple(theirs))
  other = generation.bootstrap_ratio(values, np.ones(len(values)), **(options | {'seed': 6}))
  assert other.low != ours.low


def test_the_difference_of_two_models_is_a_ratio_too():
  nll, tokens = _corpus()
  better = nll - 0.01 * tokens
  difference = generation.bootstrap_ratio(nll - better, tokens)
  assert dataclasses.astuple(difference) == pytest.approx((0.01, 0.01, 0.01, 0), abs=1e-12)


@pytest.mark.parametrize(
  ('numerators', 'denominators', 'options', 'message'),
  [
    ([1.0], [1, 2], {}, 'numerators has 1, denominators has 2 rows'),
    ([1.0, 0.0], [1, 0], {}, '1 of 2 denominators are not positive, the first is row 1: 0'),
    ([np.inf, 1.0], [1, 1], {}, '1 values are not finite'),
    ([1.0, 1.0], [1, np.nan], {}, '1 values are not finite'),
    ([], [], {}, 'rows >= 1'),
    ([1.0], [1], {'confidence': 95}, 'confidence=95'),
  ],
)
def test_ratio_refuses_broken_input(numerators, denominators, options, message):
  with pytest.raises(ValueError, match=message):
    generation.bootstrap_ratio(np.array(numerators), np.array(denominators), **options)


@pytest.mark.parametrize(
  ('text', 'number'),
  [
    ('4', 4), ('4.5 out of 5', 4.5), ('I would say 3, not 4.', 3), ('Rating:5', 5), ('.5', 0.5),
    ('rated4stars', 4), ('3-4', 3), ('rating-2', 2), ('say...4', 4), ('5.', 5), ('2/5', 2),
    ('four', None), ('', None), ('-1', None), ('Made in 1995, so 4', None), ('9' * 400, None),
    ('5.01', None), ('nan', None),
  ],
)  # fmt: skip
def test_the_first_number_of_a_text_is_its_rating(text, number):
  known = np.array([0.5, 5, 5, 4, 4.5])  # their mean is 3.8
  errors, is_number = generation.rating_error([text], np.array([2.0]), known)
  assert is_number.tolist() == [number is not None]
  np.testing.assert_allclose(errors, [(number - 2) ** 2 if number is not None else 1.8**2])


def test_rating_errors_are_one_per_row():
  texts, truth, known = ['1', 'good', '5'], np.array([3, 3, 4]), np.array([1, 2, 5, 4])
  errors, is_number = generation.rating_error(texts, truth, known)
  np.testing.assert_allclose(errors, [4, 0, 1])
  assert errors.dtype == np.float64
  assert is_number.dtype == bool
  np.testing.assert_array_equal(is_number, [True, False, True])
  with pytest.raises(ValueError, match='predicted has 2, truth has 3 rows'):
    generation.rating_error(texts[:2], truth, known)
  with pytest.raises(ValueError, match=r'known has shape \(\)'):
    generation.rating_error(texts, truth, np.array(3.5))
  with pytest.raises(ValueError, match='truth: 1 ratings are not finite'):
    generation.rating_error(texts, np.array([1, np.nan, 2]), known)


def test_expected_rating_is_the_mean_under_the_model():
  rng = np.random.default_rng(0)
  log_probs, ratings = rng.normal(size=(6, 5)) - 800, np.array([1, 2, 3, 4, 5])
  log_probs[2, 1:] = -np.inf
  found = generation.expected_rating(log_probs, ratings)
  for row in range(6):
    weights = [math.exp(x + 800) for x in log_probs[row]]  # exp(-800) is 0 in float64
    expected = sum(w * r for w, r in zip(weights, ratings)) / sum(weights)
    assert found[row] == pytest.approx(expected)
  assert found[2] == 1
  log_probs[4] = -np.inf
  with pytest.raises(ValueError, match='1 of 6 rows have no probabilities, the first is row 4'):
    generation.expected_rating(log_probs, ratings)
  with pytest.raises(ValueError, match='shape'):
    generation.expected_rating(log_probs, ratings[:4])


def test_rmse_agrees_with_scipy_and_with_the_delta_method():
  squared = np.random.default_rng(2).normal(size=301) ** 2
  ours = generation.rmse(squared, confidence=0.9, resamples=10_000, seed=3)
  theirs = scipy.stats.bootstrap(
    (squared,),
    lambda x, axis: np.sqrt(x.mean(axis)),
    confidence_level=0.9,
    n_resamples=10_000,
    method='percentile',
    rng=np.random.default_rng(4),
    vectorized=True,
    batch=1000,
  )
  assert ours.mean == pytest.approx(math.sqrt(sum(squared) / 301))
  error = squared.std() / math.sqrt(301) / (2 * ours.mean)
  assert ours.standard_error == pytest.approx(error, rel=0.04)
  assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.1 * error)
  assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.1 * error)
  with pytest.raises(ValueError, match='1 squared errors are negative'):
    generation.rmse(np.array([1.0, -1.0]))

import numpy as np
import pytest

from ilm_jax.cf import ials
from ilm_jax.errors import UsageError


def _interactions(seed=0, num_users=40, num_items=25, density=0.2):
  """(offsets, items, dense 0/1 matrix); user 3 and item 7 have no row."""
  rng = np.random.default_rng(seed)
  dense = rng.random((num_users, num_items)) < density
  dense[3], dense[:, 7] = False, False
  users, items = np.nonzero(dense)
  offsets = np.searchsorted(users, np.arange(num_users + 1))
  return offsets, items.astype(np.int32), dense.astype(np.float64)


def _objective(dense, users, items, alpha, regularization):
  weights = np.where(dense > 0, alpha, 1.0)
  errors = (weights * (dense - users @ items.T) ** 2).sum()
  return errors + regularization * ((users**2).sum() + (items**2).sum())


def _fit(offsets, items, num_items, **settings):
  users, vectors, report = ials.fit(offsets, items, num_items, progress=False, **settings)
  return users.astype(np.float64), vectors.astype(np.float64), report


def test_half_step_solves_the_normal_equations():
  offsets, rows, dense = _interactions()
  alpha, regularization = 3.0, 0.7
  users, items, _ = _fit(
    offsets,
    rows,
    25,
    factors=4,
    alpha=alpha,
    regularization=regularization,
    iterations=2,
    exact=True,
  )
  for item in range(25):  # items are solved last, given the users
    weight = np.diag(np.where(dense[:, item] > 0, alpha, 1.0))
    left = users.T @ weight @ users + regularization * np.eye(4)
    expected = np.linalg.solve(left, users.T @ weight @ dense[:, item])
    np.testing.assert_allclose(items[item], expected, rtol=1e-4, atol=1e-5)


def test_settings_mean_what_the_docstring_says_of_rendle_et_al():
  offsets, rows, dense = _interactions()
  alpha_0, strength = 0.5, 0.4
  alpha = 1 + 1 / alpha_0
  users, items, _ = _fit(
    offsets,
    rows,
    25,
    factors=4,
    alpha=alpha,
    regularization=strength * alpha,
    iterations=2,
    exact=True,
  )
  users /= np.sqrt(1 + alpha_0)
  for item in range(25):  # their eq.: 1 on S with target 1, plus alpha_0 on all with target 0
    left = users.T @ (np.diag(dense[:, item]) + alpha_0 * np.eye(40)) @ users
    expected = np.linalg.solve(left + strength * np.eye(4), users.T @ dense[:, item])
    np.testing.assert_allclose(items[item] / np.sqrt(1 + alpha_0), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('exact', [True, False])
def test_alpha_one_converges_to_the_shrunk_svd(exact):
  offsets, rows, dense = _interactions()
  users, items, _ = _fit(
    offsets, rows, 25, factors=6, alpha=1.0, regularization=1.5, iterations=500, exact=exact
  )
  left, values, right = np.linalg.svd(dense)
  shrunk = np.maximum(values[:6] - 1.5, 0)
  expected = (left[:, :6] * shrunk) @ right[:6]
  np.testing.assert_allclose(users @ items.T, expected, atol=2e-3)


def test_reported_losses_are_the_objective():
  offsets, rows, dense = _interactions()
  users, items, report = _fit(
    offsets, rows, 25, factors=4, alpha=3.0, regularization=0.7, iterations=5, exact=True
  )
  weight = np.where(dense > 0, 3.0, 1.0).sum()
  assert report['loss'] == pytest.approx(
    _objective(dense, users, items, 3.0, 0.7) / weight, rel=1e-4
  )
  assert report['zero_loss'] == pytest.approx(
    _objective(dense, 0 * users, 0 * items, 3.0, 0.7) / weight
  )


def test_same_seed_same_vectors_whatever_the_threads():
  offsets, rows, _ = _interactions(num_users=400, num_items=150)
  one = ials.fit(offsets, rows, 150, seed=1, num_threads=1, progress=False)
  two = ials.fit(offsets, rows, 150, seed=1, num_threads=2, progress=False)
  other = ials.fit(offsets, rows, 150, seed=2, num_threads=1, progress=False)
  assert one[0].dtype == one[1].dtype == np.float32
  np.testing.assert_array_equal(one[0], two[0])
  np.testing.assert_array_equal(one[1], two[1])
  assert np.abs(one[0] - other[0]).max() > 1e-3


def test_without_rows_a_vector_is_exactly_zero():
  offsets, rows, dense = _interactions()
  users, items, report = _fit(offsets, rows, 25, factors=4, iterations=1, regularization=0.1)
  np.testing.assert_array_equal(users.any(axis=1), dense.any(axis=1))
  np.testing.assert_array_equal(items.any(axis=1), dense.any(axis=0))
  assert report['cold_users'] == (~dense.any(axis=1)).sum() >= 1
  assert report['cold_items'] == (~dense.any(axis=0)).sum() >= 1


def test_repeats_count_once_and_the_input_stays_as_it_was():
  offsets, rows, _ = _interactions()
  doubled = np.repeat(rows, 2)
  copy = doubled.copy()
  once = ials.fit(offsets, rows, 25, factors=4, regularization=0.1, progress=False)
  twice = ials.fit(2 * offsets, doubled, 25, factors=4, regularization=0.1, progress=False)
  np.testing.assert_array_equal(once[1], twice[1])
  np.testing.assert_array_equal(doubled, copy)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'factors': 0}, 'factors=0; expected a whole number'),
    ({'iterations': 1.5}, 'iterations=1.5'),
    ({'regularization': 0.0}, 'regularization=0.0; expected a number above 0'),
    ({'alpha': float('nan')}, 'alpha=nan'),
    ({'regularization': 1000.0, 'alpha': 1.0}, 'regularization=1000.0 is so strong'),
  ],
)
def test_refuses_settings_out_of_range(settings, message):
  offsets, rows, _ = _interactions()
  with pytest.raises(UsageError, match=message):
    ials.fit(offsets, rows, 25, progress=False, **settings)


def test_refuses_broken_rows():
  offsets, rows, _ = _interactions()
  with pytest.raises(UsageError, match=r'num_items=20 allows 0\.\.19'):
    ials.fit(offsets, rows, 20, progress=False)
  with pytest.raises(UsageError, match='no rows'):
    ials.fit(np.zeros(5, np.int64), np.zeros(0, np.int32), 20, progress=False)

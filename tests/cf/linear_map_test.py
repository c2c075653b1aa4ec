import numpy as np
import pytest

from ilm_jax.cf.linear_map import PENALTIES, fit_ridge


def _data(seed=0, n=30, d=5, e=3, noise=0.5):
  rng = np.random.default_rng(seed)
  inputs = rng.normal(size=(n, d)) * [1, 10, 0.1, 3, 1] + [0, 5, -2, 0, 100]
  targets = inputs / inputs.std(axis=0) @ rng.normal(size=(d, e)) + [1, -2, 0]
  return inputs, targets + noise * rng.normal(size=(n, e))


def _explicit(inputs, targets, penalty, scale, n):
  """Ridge with an unpenalised intercept, by the normal equations of [inputs / scale, 1]."""
  design = np.concatenate([inputs / scale, np.ones((len(inputs), 1))], axis=1)
  punished = n * penalty * np.diag([1.0] * inputs.shape[1] + [0.0])
  solution = np.linalg.solve(design.T @ design + punished, design.T @ targets)
  return lambda x: np.concatenate([x / scale, np.ones((len(x), 1))], axis=1) @ solution


@pytest.mark.parametrize('penalty', [1e-3, 0.1, 10.0])
def test_solves_the_normal_equations(penalty):
  inputs, targets = _data()
  new, _ = _data(seed=1)
  fitted = fit_ridge(inputs, targets, penalties=(penalty,))
  expected = _explicit(inputs, targets, penalty, inputs.std(axis=0), len(inputs))
  np.testing.assert_allclose(fitted.predict(new), expected(new), rtol=1e-9)
  assert fitted.penalty == penalty


def test_leave_one_out_errors_are_those_of_refitting():
  inputs, targets = _data()
  n, scale = len(inputs), inputs.std(axis=0)
  fitted = fit_ridge(inputs, targets)
  assert tuple(fitted.errors) == PENALTIES
  for penalty, error in fitted.errors.items():
    squared = []
    for i in range(n):
      rest = np.arange(n) != i
      predict = _explicit(inputs[rest], targets[rest], penalty, scale, n)
      squared.append(np.sum((predict(inputs[i : i + 1])[0] - targets[i]) ** 2))
    assert error == pytest.approx(np.mean(squared), rel=1e-8)
  assert fitted.errors[fitted.penalty] == min(fitted.errors.values())


def test_noise_wants_a_larger_penalty_and_no_noise_is_recovered():
  quiet, loud = (fit_ridge(*_data(noise=noise)) for noise in (1e-6, 20.0))
  assert quiet.penalty == PENALTIES[0]
  assert loud.penalty > 100 * quiet.penalty
  inputs, targets = _data(noise=0)
  exact = fit_ridge(inputs, targets, penalties=(1e-12,))
  np.testing.assert_allclose(exact.predict(inputs), targets, atol=1e-8)


def test_units_of_the_inputs_do_not_matter():
  inputs, targets = _data()
  factors, shifts = np.array([1e-3, 1.0, 1e4, 2.0, 7.0]), np.array([5.0, 0.0, -1.0, 1e3, 2.0])
  one, other = fit_ridge(inputs, targets), fit_ridge(inputs * factors + shifts, targets)
  assert one.penalty == other.penalty
  moved = other.predict(inputs * factors + shifts)
  np.testing.assert_allclose(one.predict(inputs), moved, rtol=1e-7)


def test_constant_columns_and_few_rows():
  inputs, targets = _data()
  constant = np.full((len(inputs), 1), 0.1)
  wider = fit_ridge(np.concatenate([inputs, constant], axis=1), targets)
  elsewhere = np.concatenate([inputs, constant + 9], axis=1)
  expected = fit_ridge(inputs, targets).predict(inputs)
  np.testing.assert_allclose(wider.predict(elsewhere), expected, rtol=1e-9)
  few = fit_ridge(inputs[:3].astype(np.float32), targets[:3].astype(np.float32))  # n < d
  assert few.predict(inputs).dtype == np.float64
  assert np.isfinite(few.predict(inputs)).all()


def test_directions_are_from_the_mean_of_the_fitted_targets():
  inputs, targets = _data()
  fitted = fit_ridge(inputs, targets)
  for row, direction in zip(targets, fitted.directions(targets)):
    difference = row - targets.mean(axis=0)
    np.testing.assert_allclose(direction, difference / np.sqrt(difference @ difference))
  assert not fitted.directions(fitted.target_mean[None]).any()


@pytest.mark.parametrize(
  ('inputs', 'targets', 'penalties', 'message'),
  [
    (np.zeros((3, 2)), np.zeros((4, 2)), (1.0,), 'inputs'),
    (np.zeros((1, 2)), np.zeros((1, 2)), (1.0,), 'n > 1'),
    (np.zeros((3, 2)), np.zeros(3), (1.0,), 'targets'),
    (np.full((3, 2), np.nan), np.zeros((3, 2)), (1.0,), 'not finite'),
    (np.zeros((3, 2)), np.zeros((3, 2)), (0.0,), '> 0'),
    (np.zeros((3, 2)), np.zeros((3, 2)), (), '> 0'),
  ],
)
def test_refuses_broken_input(inputs, targets, penalties, message):
  with pytest.raises(ValueError, match=message):
    fit_ridge(inputs, targets, penalties=penalties)

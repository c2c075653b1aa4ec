"""Dropout: uniform bytes, and how much is left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ilm_jax.modules.dropout import Dropout, random_bytes


@pytest.mark.parametrize('last', [1, 4, 30])
def test_bytes_are_uniform_and_independent(last):
  shape = (40_000 // last, last)
  drawn = np.asarray(random_bytes(jax.random.key(0), shape))
  assert drawn.shape == shape
  assert drawn.dtype == np.uint8
  counts = np.bincount(drawn.reshape(-1), minlength=256)
  expected = drawn.size / 256
  # Chi-square of 255 degrees of freedom: mean 255, deviation 22.6.
  assert ((counts - expected) ** 2 / expected).sum() < 255 + 5 * 22.6
  if last > 1:
    noise = np.corrcoef(drawn.astype(float), rowvar=False) - np.eye(last)
    assert np.abs(noise).max() < 6 / np.sqrt(shape[0])


def test_dropout_keeps_the_mean_and_drops_as_often_as_it_says():
  x = jnp.ones((200, 501))
  found = Dropout(0.1).apply({}, x, deterministic=False, rngs={'dropout': jax.random.key(0)})
  dropped = np.asarray(found) == 0
  assert dropped.mean() == pytest.approx(26 / 256, abs=0.003)
  np.testing.assert_allclose(np.asarray(found)[~dropped], 256 / 230, rtol=1e-6)
  assert Dropout(0.1).apply({}, x, deterministic=True) is x
  assert Dropout(0.0).apply({}, x, deterministic=False) is x
  everything = Dropout(1.0).apply({}, x, deterministic=False, rngs={'dropout': jax.random.key(0)})
  np.testing.assert_array_equal(everything, 0)

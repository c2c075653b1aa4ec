import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from ilm_jax.modules.token_losses import token_nll

RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(11, 6)).astype(np.float32)
TABLE = RNG.normal(size=(40, 6)).astype(np.float32)
TARGETS = RNG.integers(0, 40, 11).astype(np.int32)


def capped(hidden, table=TABLE):
  return 3 * jnp.tanh(hidden @ table.T / 3)


@pytest.mark.parametrize('chunk', [1, 4, 11, 256])
def test_is_the_log_softmax_of_the_target(chunk):
  logits = 3 * np.tanh(HIDDEN.astype(np.float64) @ TABLE.T / 3)
  expected = -scipy.special.log_softmax(logits, axis=-1)[np.arange(11), TARGETS]
  np.testing.assert_allclose(token_nll(capped, HIDDEN, TARGETS, chunk=chunk), expected, rtol=1e-5)


def test_gradients_do_not_depend_on_the_chunk():
  def loss(hidden, table, chunk):
    return token_nll(lambda x: capped(x, table), hidden, TARGETS, chunk=chunk).sum()

  whole, parts = (jax.grad(loss, argnums=(0, 1))(HIDDEN, TABLE, chunk) for chunk in (256, 4))
  for a, b in zip(whole, parts):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_memory_is_that_of_a_chunk():
  hidden, table = np.zeros((1024, 8), np.float32), np.zeros((5000, 8), np.float32)
  targets = np.zeros(1024, np.int32)

  def temporaries(chunk):
    def loss(hidden):
      return token_nll(lambda x: x @ table.T, hidden, targets, chunk=chunk).sum()

    return jax.jit(jax.grad(loss)).lower(hidden).compile().memory_analysis().temp_size_in_bytes

  logits = 1024 * 5000 * 4
  assert temporaries(1024) >= logits
  assert temporaries(64) < logits / 4

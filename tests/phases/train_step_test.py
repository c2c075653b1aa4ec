"""One step of training: its randomness, its gradients, its optimizer."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ilm_jax.phases.train_step import TrainState, is_decayed, jit_step, make_optimizer, train_step


def test_each_step_draws_anew_and_a_restart_draws_the_same():
  def loss(params, frozen, batch, key, source):
    value = params['w'] * jax.random.normal(key)
    return value, {'loss': value}

  optimizer = optax.set_to_zero()
  params = {'w': jnp.ones(())}

  def state(step):
    return TrainState(jnp.int32(step), jax.tree.map(jnp.copy, params), optimizer.init(params))

  step = jit_step(SimpleNamespace(loss=loss), optimizer, 1, state(0))  # pyright: ignore

  def drawn(number):
    _, metrics = step(state(number), None, {}, jax.random.key(0), source='all')
    return float(metrics['loss'])

  assert len({drawn(number) for number in range(4)}) == 4
  assert drawn(2) == drawn(2)


def test_accumulated_gradients_are_those_of_the_whole_batch():
  """Of a mean over rows, whose gradient is known in closed form."""
  rng = np.random.default_rng(0)
  x, y, w = (rng.normal(size=shape).astype(np.float32) for shape in ((8, 3), (8,), (3,)))

  def loss(params, frozen, batch, key, source):
    value = jnp.square(batch['x'] @ params['w'] - batch['y']).mean()
    return value, {'loss': value}

  optimizer = optax.sgd(0.1)
  state = TrainState(jnp.zeros((), jnp.int32), {'w': w}, optimizer.init({'w': w}))
  residual = x @ w - y
  for parts in (1, 2, 8):
    new, metrics = train_step(
      state,
      None,
      {'x': jnp.asarray(x), 'y': jnp.asarray(y)},
      jax.random.key(0),
      source='all',
      phase=SimpleNamespace(loss=loss),  # pyright: ignore[reportArgumentType]
      optimizer=optimizer,
      parts=parts,
    )
    np.testing.assert_allclose(new.params['w'], w - 0.1 * 2 * x.T @ residual / 8, rtol=1e-5)
    np.testing.assert_allclose(metrics['loss'], np.square(residual).mean(), rtol=1e-5)
    assert new.step == 1


def test_weight_decay_is_for_matrices_and_tables():
  names = ['kernel', 'bias', 'scale', 'embedding', 'queries', 'positions', 'log_temperature_itc']
  decayed = is_decayed({name: jnp.zeros(1) for name in names})
  assert {name for name, yes in decayed.items() if yes} == {*names[:1], *names[3:6]}


def test_the_item_encoder_has_its_own_rate():
  params = {name: {'kernel': jnp.ones((3, 2))} for name in ('item_encoder', 'adaptor')}
  gradients = jax.tree.map(lambda x: x * 0.5, params)
  updates = {}
  for rate in (1.0, 0.01):
    optimizer = make_optimizer(1e-3, 1.0, b1=0.9, b2=0.98, weight_decay=0.1, item_encoder_rate=rate)
    updates[rate], _ = optimizer.update(gradients, optimizer.init(params), params)
  whole, part = updates[1.0], updates[0.01]
  np.testing.assert_array_equal(part['adaptor']['kernel'], whole['adaptor']['kernel'])
  expected = 0.01 * whole['item_encoder']['kernel']
  np.testing.assert_allclose(part['item_encoder']['kernel'], expected, rtol=1e-6)

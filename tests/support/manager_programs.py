"""Programs that `manager_test.py` runs as processes: to be killed, or with devices of their own.

python manager_programs.py NAME DIRECTORY [ARGUMENTS]
"""

import os
import sys

os.environ['JAX_PLATFORMS'] = 'cpu'
if sys.argv[1] == 'reshard':
  os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from ilm_jax.checkpoints.manager import CheckpointManager, restore_params

IDENTITY = {'model': {'name': 'item_text', 'num_layers': 2}, 'data': {'fingerprint': 'abc'}}


def big_state(step: int) -> dict[str, np.ndarray]:
  """80 MB that differ in every element from step to step."""
  base = np.random.default_rng(0).integers(0, 2**31, (20, 1000, 1000), np.uint32)
  return {
    'step': np.int32(step),
    'params': {f'layer_{i}': base[i] + np.uint32(step) for i in range(10)},
    'opt_state': {f'layer_{i}': base[10 + i] * np.uint32(2 * step + 1) for i in range(10)},
  }


def keep_saving(directory: str) -> None:
  """Saves step after step until it is killed."""
  state = big_state(0)
  where = SingleDeviceSharding(jax.devices()[0])
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state)
  with CheckpointManager(directory, identity=IDENTITY, keep_latest=2) as manager:
    step = 0
    if manager.latest_step() is not None:
      restored = manager.restore(like)
      step = restored.step
      assert restored.position == {'seed': 0, 'step': step}
      for expected, found in zip(
        jax.tree.leaves(big_state(step)), jax.tree.leaves(restored.state), strict=True
      ):
        np.testing.assert_array_equal(found, expected)
    print('restored', step, flush=True)
    while True:
      step += 1
      state = jax.tree.map(jnp.asarray, big_state(step))
      manager.save(step, state, position={'seed': 0, 'step': step})


def reshard(directory: str) -> None:
  """Saves from 8 devices in a row; restores onto 2 x 4 of them, with other specs, and onto one."""
  devices = jax.devices()
  assert len(devices) == 8
  row = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  grid = jax.make_mesh((2, 4), ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)
  rng = np.random.default_rng(0)
  expected = {
    'step': np.int32(7),
    'params': {
      'w': rng.standard_normal((16, 24), np.float32),
      'b': rng.standard_normal(24, np.float32),
    },
  }

  def shardings(mesh, w, b):
    specs = {'step': P(), 'params': {'w': w, 'b': b}}
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

  saved = jax.device_put(expected, shardings(row, P('data'), P()))
  one = SingleDeviceSharding(devices[3])
  with CheckpointManager(directory, identity=IDENTITY) as manager:
    manager.save(7, saved, position={})
    for target in (
      shardings(grid, P('fsdp', 'data'), P('fsdp')),
      shardings(grid, P(None, ('data', 'fsdp')), P()),
      jax.tree.map(lambda _: one, expected),
    ):
      like = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), expected, target
      )
      state = manager.restore(like).state
      jax.tree.map(np.testing.assert_array_equal, state, expected)
      assert jax.tree.map(lambda x: x.sharding, state) == target
      params = restore_params(directory, like['params'])
      jax.tree.map(np.testing.assert_array_equal, params, expected['params'])
      assert jax.tree.map(lambda x: x.sharding, params) == target['params']


def two_processes(directory: str, port: str, process: str) -> None:
  """One of two processes that share every array; restored over both, the other way round."""
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(f'127.0.0.1:{port}', num_processes=2, process_id=int(process))
  mesh = jax.make_mesh((2,), ('data',), axis_types=(AxisType.Auto,))
  expected = np.random.default_rng(0).standard_normal((6, 4), np.float32)

  def state(step):
    spec = NamedSharding(mesh, P('data'))
    own = expected[3 * int(process) :][:3] + step
    return {
      'step': jax.make_array_from_process_local_data(NamedSharding(mesh, P()), np.int32(step)),
      'params': {'w': jax.make_array_from_process_local_data(spec, own, expected.shape)},
    }

  settings = {'identity': IDENTITY, 'keep_latest': 1, 'best_metric': 'hr'}
  with CheckpointManager(directory, **settings) as manager:
    for step, hr in enumerate([0.1, 0.3, 0.2]):
      manager.save(step, state(step), position={'step': step}, metrics={'hr': hr})
  with CheckpointManager(directory, **settings) as manager:
    assert (manager.all_steps(), manager.best_step()) == ([1, 2], 1)
    across = NamedSharding(mesh, P(None, 'data'))
    like = state(0)
    like['params']['w'] = jax.ShapeDtypeStruct(expected.shape, np.float32, sharding=across)
    restored = manager.restore(like)
    assert (restored.step, restored.position) == (2, {'step': 2})
    own = restored.state['params']['w'].addressable_data(0)
    np.testing.assert_array_equal(own, expected[:, 2 * int(process) :][:, :2] + 2)
  print('done', flush=True)


if __name__ == '__main__':
  name, *arguments = sys.argv[1:]
  {'keep_saving': keep_saving, 'reshard': reshard, 'two_processes': two_processes}[name](*arguments)

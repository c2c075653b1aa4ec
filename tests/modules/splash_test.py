"""Splash attention against the plain one, interpreted on a CPU; and compiled for a TPU.

The second needs libtpu (`pip install 'ilm_jax[tpu]'`), but no TPU.
"""

import functools
import importlib.util
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from ilm_jax.modules import splash
from ilm_jax.modules.attention import KeyValue, Tokens, attend, visible, within
from ilm_jax.modules.decoder import Decoder
from ilm_jax.modules.layers import Compute
from ilm_jax.runtime.sharding import DEFAULT_RULES, make_mesh, use_mesh
from tests.support import eight_devices, tiny_gemma

SPLASH = Compute(attention='splash')


@pytest.fixture
def interpreted(monkeypatch):
  make = functools.partial(splash.kernels.make_splash_mha, interpret=True)
  monkeypatch.setattr(splash.kernels, 'make_splash_mha', make)


# Three texts in one row and padding; the second row is all one text.
SEGMENT_IDS = np.array([[1] * 70 + [2] * 60 + [3] * 5 + [0] * 15, [1] * 150], np.int32)


@pytest.mark.parametrize(('window', 'softcap'), [(None, 3.0), (40, None)])
def test_outputs(interpreted, window, softcap):
  rng = np.random.default_rng(0)
  shapes = (2, 4, 150, 16), (2, 2, 150, 16), (2, 2, 150, 16)
  query, key, value = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
  tokens = Tokens(np.tile(np.arange(150), (2, 1)), SEGMENT_IDS)
  mask = visible(tokens, tokens) & (True if window is None else within(tokens, tokens, window))
  options = dict(scale=0.4, softcap=softcap)
  expected = attend(query, KeyValue(key, value), None, mask, **options)
  fused = tiny_gemma.jit(functools.partial(splash.attend, window=window, **options))
  np.testing.assert_allclose(fused(query, key, value, SEGMENT_IDS), expected, atol=1e-5)


def test_a_decoder(interpreted):
  lm, variables = tiny_gemma.load('gemma3', Compute(attention='splash', scan_layers=False))
  _, ids, expected = tiny_gemma.golden('gemma3')
  logits = tiny_gemma.jit(functools.partial(lm.apply, method='logits_of'))(variables, ids)
  np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_outputs_and_gradients_of_scanned_layers(interpreted):
  """Packed rows; a layer learns only when it runs whether it has a window."""
  segment_ids = np.array([[1] * 11 + [2] * 9, [1] * 17 + [0] * 3])
  positions = np.array([[*range(11), *range(9)], [*range(17), 0, 0, 0]])
  rng = np.random.default_rng(1)
  embeddings, weights = (rng.normal(size=(2, 20, 32)).astype(np.float32) for _ in range(2))
  weights[segment_ids == 0] = 0

  def of(compute):
    lm, variables = tiny_gemma.load('gemma2', compute)

    def loss(embeddings):
      hidden = lm.apply(variables, embeddings, positions, segment_ids)[0] * weights
      return hidden.sum(), hidden

    return tiny_gemma.jit(jax.grad(loss, has_aux=True))(embeddings)

  for got, expected in zip(of(SPLASH), of(Compute())):
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_where_the_kernel_does_not_serve_the_plain_one_does():
  lm, variables = tiny_gemma.load('gemma3', SPLASH)

  def has_kernel(**more):
    jaxpr = jax.make_jaxpr(functools.partial(lm.apply, variables, **more))(np.ones((2, 20, 32)))
    return 'pallas_call' in str(jaxpr)

  assert has_kernel()
  assert not has_kernel(prefix_mask=np.ones((2, 20), int))
  assert not has_kernel(mask=np.tri(20, dtype=bool)[None])
  assert not has_kernel(cache=lm.init_cache(2, 4))


@eight_devices.needed
class TestOnEightDevices:
  # There are two key-value heads: each is split off, or two copies of it are.
  @pytest.mark.parametrize(
    'shape', [{'data': 2, 'fsdp': 2, 'tensor': 2}, {'data': 2, 'tensor': 4}], ids=str
  )
  def test_a_decoder(self, interpreted, shape):
    lm, variables = tiny_gemma.load('gemma3', Compute(attention='splash', scan_layers=False))
    _, ids, expected = tiny_gemma.golden('gemma3')
    mesh = make_mesh(shape)
    at = jax.tree.map(lambda x: x.sharding, tiny_gemma.abstract(lm, mesh))
    params = jax.device_put(variables['params'], at)
    with use_mesh(mesh, DEFAULT_RULES):
      apply = tiny_gemma.jit(lambda p, ids: lm.apply({'params': p}, ids, method='logits_of'))
      logits = apply(params, ids.repeat(2, 0))
    np.testing.assert_allclose(logits, expected.repeat(2, 0), atol=1e-4)


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed')
def test_a_step_compiles_for_a_tpu():
  import libtpu

  done = subprocess.run(
    [sys.executable, __file__],
    env={
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'PYTHONPATH': os.pathsep.join([str(eight_devices.ROOT), *sys.path]),
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # this process may have it, too
      'TPU_LIBRARY_PATH': libtpu.get_library_path(),
      'TPU_SKIP_MDS_QUERY': '1',
      'TPU_ACCELERATOR_TYPE': 'v5litepod-16',
      'TPU_WORKER_HOSTNAMES': 'localhost',
    },
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert 'compiled' in done.stdout


def compile_for_a_tpu():
  """Loss and gradient of soft tokens, of rows so long that scores would take much memory."""
  import dataclasses

  import jax.numpy as jnp
  from jax.experimental import topologies

  from ilm_jax.runtime.sharding import BATCH_AXES

  rows, length = 4, 4096
  topology = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2')
  mesh = make_mesh({'fsdp': 2, 'tensor': 2}, topology.devices)
  config = dataclasses.replace(
    tiny_gemma.CONFIGS['gemma2'],
    d_model=128, num_heads=4, num_kv_heads=1, head_dim=128, d_mlp=256, window=256,
  )  # fmt: skip
  bf16 = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
  lm = Decoder(config, Compute(attention='splash', remat='full', **bf16))

  def batch(*shape, dtype=jnp.int32):
    at = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(BATCH_AXES))
    return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=at)

  def loss(embeddings, params, positions, segment_ids):
    hidden, _ = lm.apply({'params': params}, embeddings, positions, segment_ids)
    return lm.apply({'params': params}, hidden[:, -32:], method='logits').mean()

  embeddings = batch(length, config.d_model, dtype=jnp.bfloat16)
  args = embeddings, tiny_gemma.abstract(lm, mesh), batch(length), batch(length)
  with use_mesh(mesh, DEFAULT_RULES):
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*args).compile()
  assert 'tpu_custom_call' in compiled.as_text()
  scores = 4 * rows * config.num_heads * length**2 // len(topology.devices)  # float32, of a device
  temporaries = compiled.memory_analysis().temp_size_in_bytes
  assert temporaries < scores / 4, (temporaries, scores)
  print('compiled', temporaries, scores)


if __name__ == '__main__':
  compile_for_a_tpu()

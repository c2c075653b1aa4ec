import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ilm_jax.errors import UsageError
from ilm_jax.lm.load import default_compute
from ilm_jax.modules import precision
from ilm_jax.modules.layers import Compute, Embedder
from ilm_jax.modules.precision import bf16_dot_general, bf16_times_rows, multiplies_bfloat16
from ilm_jax.phases.qformer_options import qformer_config

RNG = np.random.default_rng(0)


def kernel_product(x, kernel):
  n = kernel.ndim - 1 if kernel.ndim == 3 and x.shape[-2:] == kernel.shape[:2] else 1
  dims = (tuple(range(x.ndim - n, x.ndim)), tuple(range(n)))
  return bf16_dot_general(x, kernel, (dims, ((), ())))


# Product, its einsum, and the shapes of activations and of kernel or table.
CASES = [
  (kernel_product, 'btc,cf->btf', (2, 3, 8), (8, 5)),
  (kernel_product, 'btc,chd->bthd', (2, 3, 8), (8, 2, 5)),
  (kernel_product, 'bthd,hdf->btf', (2, 3, 2, 4), (2, 4, 7)),
  (kernel_product, 'btc,cf->btf', (1, 1, 8), (8, 5)),  # one row
  (kernel_product, 'bthd,hdf->btf', (1, 1, 2, 4), (2, 4, 7)),
  (bf16_times_rows, 'btc,vc->btv', (2, 3, 8), (11, 8)),
  (bf16_times_rows, 'bc,vc->bv', (1, 8), (11, 8)),
  (bf16_times_rows, 'c,vc->v', (8,), (11, 8)),
]


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(('product', 'einsum', 'left', 'right'), CASES)
def test_product_and_gradients(product, einsum, left, right, dtype):
  """Operands are rounded to bfloat16, the gradient that comes in among them; sums are not."""
  x, kernel = (jnp.asarray(RNG.normal(size=shape), dtype) for shape in (left, right))
  y, gradients = jax.vjp(product, x, kernel)
  assert y.dtype == jnp.float32
  incoming = jnp.asarray(RNG.normal(size=y.shape), jnp.float32)
  inputs, output = einsum.split('->')
  a, b = inputs.split(',')
  rounded = [np.asarray(v.astype(jnp.bfloat16), np.float64) for v in (x, kernel, incoming)]
  np.testing.assert_allclose(y, np.einsum(einsum, *rounded[:2]), rtol=1e-5, atol=1e-5)
  expected = (
    np.einsum(f'{output},{b}->{a}', rounded[2], rounded[1]),
    np.einsum(f'{output},{a}->{b}', rounded[2], rounded[0]),
  )
  for got, want, like in zip(gradients(incoming), expected, (x, kernel)):
    assert got.dtype == like.dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('bf16_matmul', [True, False])
@pytest.mark.parametrize('param_dtype', [jnp.float32, jnp.bfloat16, jnp.int8])
def test_gradients_go_through_the_head_of_a_frozen_model(param_dtype, bf16_matmul):
  head = Embedder(11, 8, Compute(param_dtype=param_dtype, bf16_matmul=bf16_matmul))
  params = nn.meta.unbox(head.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
  hidden, incoming = (jnp.asarray(RNG.normal(size=(3, n)), jnp.float32) for n in (8, 11))
  _, gradient = jax.vjp(lambda hidden: head.apply(params, hidden, method='attend'), hidden)
  table = {name: np.asarray(x, np.float64) for name, x in params['params'].items()}
  scale = table.get('embedding_scale', np.ones(11))
  expected = (np.asarray(incoming) * scale) @ table['embedding']
  tolerance = 0.02 if bf16_matmul else 1e-5
  np.testing.assert_allclose(gradient(incoming)[0], expected, atol=tolerance * abs(expected).max())


def test_a_product_that_is_none_of_activations_and_kernel():
  with pytest.raises(ValueError, match=r'activations @ kernel expected'):
    bf16_dot_general(jnp.ones((2, 3)), jnp.ones((4, 3)), (((1,), (1,)), ((), ())))


@pytest.mark.parametrize(
  ('cpuinfo', 'expected'),
  [
    ('flags\t\t: fpu avx2 avx512_bf16 amx_tile\n', True),
    ('flags\t\t: fpu avx512f amx_bf16\n', True),
    ('model name\t: avx512_bf16\nflags\t\t: fpu avx2 avx512f\nbugs\t: amx_bf16\n', False),
    ('Features\t: fp asimd bf16\n', False),  # Arm
    (None, False),  # no such file
  ],
)
def test_bfloat16_is_taken_where_the_cpu_has_it(cpuinfo, expected, tmp_path, monkeypatch):
  file = tmp_path / 'cpuinfo'
  if cpuinfo is not None:
    file.write_text(cpuinfo)
  flags = precision.cpu_flags(file)
  monkeypatch.setattr(precision, 'cpu_flags', lambda: flags)
  monkeypatch.delenv('ILM_CPU_BFLOAT16')
  assert multiplies_bfloat16('cpu') is expected
  assert multiplies_bfloat16('tpu')
  assert multiplies_bfloat16('gpu')

  compute = default_compute('cpu')
  assert compute.bf16_matmul is expected
  assert compute.param_dtype == (jnp.bfloat16 if expected else jnp.float32)
  assert qformer_config({'bf16_matmul': None}, 'cpu').bf16_matmul is expected
  assert qformer_config({'bf16_matmul': None}, 'tpu').bf16_matmul
  assert qformer_config({'bf16_matmul': not expected}, 'cpu').bf16_matmul is not expected


@pytest.mark.parametrize('given', [False, True])
def test_the_environment_decides_for_cpus(given, monkeypatch):
  monkeypatch.setenv('ILM_CPU_BFLOAT16', str(int(given)))
  assert multiplies_bfloat16('cpu') is given
  assert multiplies_bfloat16('tpu')


def test_what_the_environment_may_say(monkeypatch):
  monkeypatch.setenv('ILM_CPU_BFLOAT16', 'yes')
  with pytest.raises(UsageError, match=r'ILM_CPU_BFLOAT16=.yes.: 0 .* or 1'):
    multiplies_bfloat16('cpu')

"""Model FLOPs: counted in the jaxpr, against what the device could do at most.

The count is of the program as it was traced, before XLA: it is the same on every device and every
mesh, and it knows how often a scan runs, where XLA's own cost analysis counts the body once.
"""

import fnmatch
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval
from jax.typing import DTypeLike

# Dense peak of a JAX device in bfloat16, FLOP/s, by its `device_kind`: the first that fits. From
# cloud.google.com/tpu/docs and NVIDIA's data sheets (halved where they count with sparsity).
_PUBLISHED = (
  ('TPU v4', 275e12),
  ('TPU v5 lite', 197e12),  # v5e
  ('TPU v5e', 197e12),
  ('TPU v5', 459e12),  # v5p
  ('TPU v5p', 459e12),
  ('TPU v6 lite', 918e12),  # v6e
  ('TPU v6e', 918e12),
  ('TPU7x', 2307e12 / 2),  # a chip is two devices
  ('NVIDIA A100*', 312e12),
  ('NVIDIA H100 PCIe*', 756e12),
  ('NVIDIA H100 NVL*', 835e12),
  ('NVIDIA H100*', 989e12),
  ('NVIDIA GH200*', 989e12),
  ('NVIDIA H200*', 989e12),
  ('NVIDIA B200*', 2250e12),
)


def matmul_flops(function: Callable[..., Any], *abstract_args: Any) -> int:
  """Returns the floating-point operations of the matrix products and convolutions of a call.

    matmul_flops(train_step, jax.eval_shape(init, rng), batch_shapes)

  A product of [m, k] and [k, n] is 2 m n k. Elementwise work is not counted, nor are kernels that
  JAX does not see into (Pallas, cuDNN attention). A scan counts as often as it runs, a `cond` as
  its dearest branch, a `while_loop` ONCE, for nobody knows how often it runs. Results that nothing
  uses cost nothing. What `jax.checkpoint` computes again counts again: for MFU as PaLM (appendix B)
  defines it, count the function without it.

  Args:
    function: it is traced, not run.
    *abstract_args: pytrees of arrays or jax.ShapeDtypeStruct.
  """
  jaxpr = jax.make_jaxpr(function)(*abstract_args).jaxpr
  jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return _count(jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
  return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: core.JaxprEqn) -> int:
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    left = _shape(equation.invars[0])
    return 2 * math.prod(_shape(equation.outvars[0])) * math.prod(left[d] for d in contracted)
  if name == 'conv_general_dilated':
    kernel = _shape(equation.invars[1])
    features = kernel[params['dimension_numbers'].rhs_spec[0]]
    return 2 * math.prod(_shape(equation.outvars[0])) * math.prod(kernel) // features
  if name == 'pallas_call':
    return 0
  inner = [_count(jaxpr) for jaxpr in core.jaxprs_in_params(params)]
  if name == 'cond':
    return max(inner)
  if name == 'scan':
    return params['length'] * sum(inner)
  if name == 'shard_map':  # the inner shapes are those of one shard
    sizes = params['mesh'].shape
    return math.prod(sizes[axis] for axis in params['newly_manual_axes']) * sum(inner)
  return sum(inner)


def _shape(variable: Any) -> tuple[int, ...]:
  return variable.aval.shape


def peak_flops(device: Any, dtype: DTypeLike = jnp.bfloat16) -> tuple[float, str]:
  """Returns the FLOP/s of matrix products that a jax.Device can do, and the number's source.

  'published' is the maker's number, for dense bfloat16. For other dtypes and for devices that are
  not in the table it is 'measured': the best of a few products of that dtype with sums in float32,
  in about 0.3 s.
  """
  kind = device.device_kind
  if jnp.dtype(dtype) == jnp.bfloat16 and 'MIG' not in kind:  # MIG: a slice of the chip
    for pattern, flops in _PUBLISHED:
      if fnmatch.fnmatchcase(kind, pattern):
        return flops, 'published'
  return measured_flops(device, jnp.dtype(dtype)), 'measured'


@functools.cache
def measured_flops(
  device: Any, dtype: np.dtype, *, size: int = 2048, seconds: float = 0.3
) -> float:
  """FLOP/s of products [size, size] x [size, size] on a device, the best within some seconds.

  Devices of a CPU share its cores: each counts for its part. Measured once in a process.
  """
  # Rows of norm 1 keep it, more or less, through the products: no overflow, no zeros.
  x, w = jax.random.normal(jax.random.key(0), [2, size, size]).astype(dtype) / math.sqrt(size)
  x, w = jax.device_put((x, w), device)

  @jax.jit
  def product(x, w):
    # Asked for bfloat16, XLA on a CPU does not use the units that the sums in float32 get.
    return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(dtype)

  product(x, w).block_until_ready()
  best, length, begin = 0.0, 1, time.perf_counter()
  while time.perf_counter() < begin + seconds:
    start = time.perf_counter()
    for _ in range(length):
      x = product(x, w)
    x.block_until_ready()
    taken = time.perf_counter() - start
    best = max(best, length * 2 * size**3 / taken)
    if taken < 0.01:
      length *= 4  # a fast device: the waiting must not be what is measured
  if device.platform == 'cpu':
    best /= jax.local_device_count('cpu')  # they share the cores
  return best

"""Matrix products with bfloat16 operands and float32 sums, forward and backward.

A TPU multiplies float32 arrays this way by default. XLA on a CPU ignores such precision settings,
and multiplies bfloat16 fast only where the result is asked for in float32, on a CPU that has
instructions for it. On others, float32 is faster.
"""

import functools
import math
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ilm_jax.errors import UsageError

_X86_BFLOAT16 = frozenset({'avx512_bf16', 'amx_bf16'})


def multiplies_bfloat16(platform: str | None = None) -> bool:
  """Whether a platform multiplies bfloat16 faster than float32.

  Accelerators do, and of CPUs x86 ones with AVX512_BF16 or AMX_BF16. On one with AVX2 alone,
  bfloat16 made training steps and beams 1.4 times as long (docs/performance.md). Arm's CPUs have
  not been measured, and count as such.

  The environment's ILM_CPU_BFLOAT16=0 or 1 decides for CPUs instead: hosts of different kinds that
  train one model need one precision.

  Args:
    platform: 'cpu', 'gpu' or 'tpu'; by default where JAX runs.

  Raises:
    UsageError: ILM_CPU_BFLOAT16 is neither 0 nor 1.
  """
  if (platform or jax.default_backend()) != 'cpu':
    return True
  given = os.environ.get('ILM_CPU_BFLOAT16', '')
  if given not in ('', '0', '1'):
    raise UsageError(f'ILM_CPU_BFLOAT16={given!r}: 0 (float32) or 1 (bfloat16 products).')
  return given == '1' if given else bool(_X86_BFLOAT16 & cpu_flags())


@functools.cache
def cpu_flags(cpuinfo: Path = Path('/proc/cpuinfo')) -> frozenset[str]:
  """What an x86 CPU says that it can do; nothing where there is no such file, as outside Linux."""
  text = cpuinfo.read_text() if cpuinfo.exists() else ''
  found = re.search(r'^flags\s*:(.*)$', text, re.MULTILINE)
  return frozenset(found[1].split() if found else ())


def bf16_dot_general(
  lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any, *args: Any, **kwargs: Any
) -> jax.Array:
  """What `flax.linen.Dense(dot_general=...)` calls: activations [..., C] times a kernel [C, ...].

  C may be several axes. Operands are rounded to bfloat16, the result is float32.

  Args:
    lhs: activations; the last axes are contracted.
    rhs: kernel; the first axes are contracted.
    dimension_numbers: as of jax.lax.dot_general.
    *args, **kwargs: precision settings, which this function replaces.
  """
  (lhs_axes, rhs_axes), batch_axes = dimension_numbers
  n = len(lhs_axes)
  trailing, leading = tuple(range(lhs.ndim - n, lhs.ndim)), tuple(range(n))
  if (tuple(lhs_axes), tuple(rhs_axes)) != (trailing, leading) or any(batch_axes):
    raise ValueError(f'activations @ kernel expected, but dimension_numbers={dimension_numbers}.')
  return _matmul(lhs, rhs, n, 0)


def bf16_times_rows(lhs: jax.Array, table: jax.Array) -> jax.Array:
  """The same for a table [V, C], as an embedding is: [..., C] times its rows, [..., V] float32."""
  return _matmul(lhs, table, 1, 1)


def _dot(lhs: jax.Array, rhs: jax.Array, lhs_axes: range, rhs_axes: range) -> jax.Array:
  return jax.lax.dot_general(
    lhs.astype(jnp.bfloat16),
    rhs.astype(jnp.bfloat16),
    ((tuple(lhs_axes), tuple(rhs_axes)), ((), ())),
    preferred_element_type=jnp.float32,
  )


def _product(lhs: jax.Array, rhs: jax.Array, n: int, first: int) -> jax.Array:
  """Contracts the last n axes of `lhs` with n axes of `rhs` from `first` on, its first or last."""
  if lhs.size == math.prod(lhs.shape[lhs.ndim - n :]):
    # One row, as in decoding a single text, takes XLA on a CPU ten times as long as two.
    return _product(jnp.stack([lhs, lhs]), rhs, n, first)[0]
  return _dot(lhs, rhs, range(lhs.ndim - n, lhs.ndim), range(first, first + n))


# Automatic differentiation would multiply the float32 gradient by a bfloat16 operand.
_matmul = jax.custom_vjp(_product, nondiff_argnums=(2, 3))


def _forward(lhs, rhs, n, first):
  return _product(lhs, rhs, n, first), (lhs, rhs)


def _backward(n, first, saved, gradient):
  lhs, rhs = saved
  outputs = rhs.ndim - n
  rows = range(lhs.ndim - n)
  start = 0 if first else n
  of_lhs = _dot(
    gradient, rhs, range(gradient.ndim - outputs, gradient.ndim), range(start, start + outputs)
  )
  of_rhs = _dot(gradient, lhs, rows, rows) if first else _dot(lhs, gradient, rows, rows)
  return of_lhs.astype(lhs.dtype), of_rhs.astype(rhs.dtype)


_matmul.defvjp(_forward, _backward)

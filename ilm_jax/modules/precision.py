"""Matrix products with bfloat16 operands and float32 sums, forward and backward.

A TPU multiplies float32 arrays this way by default. XLA on a CPU ignores such precision settings,
and multiplies bfloat16 fast only where the result is asked for in float32.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp


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
  return _matmul(lhs, rhs, n)


def _dot(lhs: jax.Array, rhs: jax.Array, lhs_axes: range, rhs_axes: range) -> jax.Array:
  return jax.lax.dot_general(
    lhs.astype(jnp.bfloat16),
    rhs.astype(jnp.bfloat16),
    ((tuple(lhs_axes), tuple(rhs_axes)), ((), ())),
    preferred_element_type=jnp.float32,
  )


def _product(lhs: jax.Array, rhs: jax.Array, n: int) -> jax.Array:
  if lhs.size == math.prod(lhs.shape[lhs.ndim - n :]):
    # One row, as in decoding a single text, takes XLA on a CPU ten times as long as two.
    return _product(jnp.stack([lhs, lhs]), rhs, n)[0]
  return _dot(lhs, rhs, range(lhs.ndim - n, lhs.ndim), range(n))


# Automatic differentiation would multiply the float32 gradient by a bfloat16 operand.
_matmul = jax.custom_vjp(_product, nondiff_argnums=(2,))


def _forward(lhs, rhs, n):
  return _product(lhs, rhs, n), (lhs, rhs)


def _backward(n, saved, gradient):
  lhs, rhs = saved
  outputs = rhs.ndim - n
  of_lhs = _dot(gradient, rhs, range(gradient.ndim - outputs, gradient.ndim), range(n, rhs.ndim))
  of_rhs = _dot(lhs, gradient, range(lhs.ndim - n), range(gradient.ndim - outputs))
  return of_lhs.astype(lhs.dtype), of_rhs.astype(rhs.dtype)


_matmul.defvjp(_forward, _backward)

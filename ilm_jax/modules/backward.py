"""Functions whose backward pass is written out, because of what is kept for it.

Of what automatic differentiation makes of them, XLA keeps several arrays as large as the input from
the forward pass to the backward pass: on a CPU, that is where memory and a good part of the time
go. Here it is one or two, and never what is cheap to compute again.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
  'gelu': nn.gelu,  # the tanh approximation, as in Gemma and T5
  'silu': nn.silu,
  'relu': nn.relu,
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
  """x [..., D], scale and bias [D] (Ba et al. 2016, arXiv:1607.06450). Kept: x."""
  return _layer_norm_forward(x, scale, bias, epsilon)[0]


def _layer_norm_forward(x, scale, bias, epsilon):
  mean = x.mean(axis=-1, keepdims=True)
  inverse = jax.lax.rsqrt(jnp.square(x - mean).mean(axis=-1, keepdims=True) + epsilon)
  return (x - mean) * inverse * scale + bias, (x, mean, inverse, scale)


def _layer_norm_backward(epsilon, saved, gradient):
  del epsilon
  x, mean, inverse, scale = saved
  normed = (x - mean) * inverse
  rows = tuple(range(x.ndim - 1))
  of_normed = gradient * scale
  along = (of_normed * normed).mean(axis=-1, keepdims=True)
  of_x = inverse * (of_normed - of_normed.mean(axis=-1, keepdims=True) - normed * along)
  return of_x, (gradient * normed).sum(axis=rows), gradient.sum(axis=rows)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
  """x [..., D] / rms(x) * scale [D], in float32 (arXiv:1910.07467). Kept: x."""
  return _rms_norm_forward(x, scale, epsilon)[0]


def _rms_norm_forward(x, scale, epsilon):
  wide = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
  return wide * inverse * scale, (x, inverse, scale)


def _rms_norm_backward(epsilon, saved, gradient):
  del epsilon
  x, inverse, scale = saved
  wide = x.astype(jnp.float32)
  # Nothing here is as the forward pass has it: XLA would keep that.
  along = (gradient * scale * wide).mean(axis=-1, keepdims=True)
  of_x = inverse * (gradient * scale - wide * (inverse * inverse * along))
  return of_x.astype(x.dtype), (gradient * inverse * wide).sum(axis=tuple(range(x.ndim - 1)))


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def softmax(scores: jax.Array, dtype: Any) -> jax.Array:
  """Of scores [..., S] over the last axis, in float32, rounded to `dtype`. Kept: the result."""
  return jax.nn.softmax(scores, axis=-1).astype(dtype)


def _softmax_forward(scores, dtype):
  weights = softmax(scores, dtype)
  return weights, weights


def _softmax_backward(dtype, weights, gradient):
  del dtype
  weights, gradient = weights.astype(jnp.float32), gradient.astype(jnp.float32)
  return (weights * (gradient - (gradient * weights).sum(axis=-1, keepdims=True)),)


softmax.defvjp(_softmax_forward, _softmax_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gelu(x: jax.Array, saved_dtype: Any) -> jax.Array:
  """x Phi(x) of each element, the exact GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415).

  Kept: its derivative, in `saved_dtype`, which is half of the memory where gradients are rounded to
  bfloat16 anyway.
  """
  del saved_dtype
  return x * _normal_cdf(x)


def _normal_cdf(x: jax.Array) -> jax.Array:
  return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu_forward(x, saved_dtype):
  cdf = _normal_cdf(x)
  slope = cdf + x * jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
  return x * cdf, slope.astype(saved_dtype)


def _gelu_backward(saved_dtype, slope, gradient):
  del saved_dtype
  return (gradient * slope.astype(gradient.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def gated(
  gate: jax.Array, up: jax.Array, activation: str, saved_dtype: Any, as_branch: bool
) -> jax.Array:
  """ACTIVATIONS[activation](gate) * up, [..., F]. Kept: both derivatives, in `saved_dtype`.

  `as_branch` is of `in_branch`.
  """
  del saved_dtype, as_branch
  return ACTIVATIONS[activation](gate) * up


def _gated_forward(gate, up, activation, saved_dtype, as_branch):
  def forward(gate, up):
    active, slope = jax.jvp(ACTIVATIONS[activation], (gate,), (jnp.ones_like(gate),))
    return active * up, ((slope * up).astype(saved_dtype), active.astype(saved_dtype))

  return in_branch(forward, gate, up) if as_branch else forward(gate, up)


def _gated_backward(activation, saved_dtype, as_branch, saved, gradient):
  del activation, saved_dtype, as_branch
  return tuple(gradient * slope.astype(gradient.dtype) for slope in saved)


gated.defvjp(_gated_forward, _gated_backward)


def in_branch(function: Callable[..., Any], *args: jax.Array) -> Any:
  """function(*args), whose results XLA for CPUs keeps as they are.

  Else what it takes for cheap is computed again wherever it is read, and what that is computed of
  is kept until then. The first of args must be no constant.
  """
  first = args[0][(0,) * args[0].ndim]
  return jax.lax.cond(first > 0, function, function, *args)

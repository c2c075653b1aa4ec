"""Counted FLOPs against closed forms and XLA's own count."""

import functools
import math
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from ilm_jax.runtime import flops
from ilm_jax.runtime.flops import matmul_flops, peak_flops


def f32(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def xla_flops(function, *shapes):
  analysis = jax.jit(function).lower(*shapes).compile().cost_analysis()
  assert analysis is not None
  return analysis['flops']


def dense(x, w):
  return jnp.tanh(x @ w)


@pytest.mark.parametrize(
  ('function', 'shapes', 'expected'),
  [
    (jnp.matmul, [(3, 5), (5, 7)], 2 * 3 * 5 * 7),
    (jnp.matmul, [(5,), (5,)], 2 * 5),
    (functools.partial(jnp.einsum, 'bthd,bshd->bhts'), [(2, 11, 3, 5), (2, 7, 3, 5)], 2 * 2310),
    (functools.partial(jnp.einsum, 'btd,dhk->bthk'), [(2, 7, 5), (5, 3, 11)], 2 * 2310),
    (jnp.add, [(3, 5), (3, 5)], 0),
    (lambda x, w: (x @ w)[:0], [(3, 5), (5, 7)], 2 * 3 * 5 * 7),
    (lambda x, w: [x @ w, x][1], [(3, 5), (5, 7)], 0),
  ],
)
def test_a_product_is_twice_its_multiplications(function, shapes, expected):
  assert matmul_flops(function, *[f32(*shape) for shape in shapes]) == expected


@pytest.mark.parametrize(('groups', 'stride'), [(1, 1), (2, 1), (1, 2)])
def test_a_convolution(groups, stride):
  model = nn.Conv(6, (3, 5), strides=stride, padding='VALID', feature_group_count=groups)
  x = f32(2, 13, 17, 4)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  positions = math.prod((size - k) // stride + 1 for size, k in ((13, 3), (17, 5)))
  expected = 2 * 2 * positions * 6 * (3 * 5 * 4 // groups)
  assert matmul_flops(model.apply, variables, x) == expected
  assert xla_flops(model.apply, variables, x) == pytest.approx(expected, rel=0.05)


def mlp_loss(weights, x):
  for w in weights:
    x = dense(x, w)
  return (x**2).sum()


def test_the_gradient_of_an_mlp_is_thrice_the_forward_less_the_gradient_of_the_input():
  weights, x = [f32(5, 7), f32(7, 11), f32(11, 3)], f32(13, 5)
  forward = matmul_flops(mlp_loss, weights, x)
  assert forward == 2 * 13 * (5 * 7 + 7 * 11 + 11 * 3)
  first = 2 * 13 * 5 * 7
  assert matmul_flops(jax.grad(mlp_loss), weights, x) == 3 * forward - first
  assert matmul_flops(jax.grad(mlp_loss, argnums=(0, 1)), weights, x) == 3 * forward
  # Frozen weights: the forward pass and the gradients that lead back to what is trained.
  assert matmul_flops(jax.grad(mlp_loss, argnums=1), weights, x) == 2 * forward


def test_a_scan_counts_as_often_as_it_runs():
  x, w = f32(3, 5), f32(12, 5, 5)

  def scanned(x, w):
    return jax.lax.scan(lambda x, w: (dense(x, w), None), x, w)[0].sum()

  layer = 2 * 3 * 5 * 5
  assert matmul_flops(scanned, x, w) == 12 * layer
  assert xla_flops(scanned, x, w) < 2 * layer  # why we count ourselves
  assert matmul_flops(jax.grad(scanned, argnums=(0, 1)), x, w) == 3 * 12 * layer
  assert matmul_flops(lambda x, w: jax.lax.map(lambda w: dense(x, w), w), x, w) == 12 * layer

  def nested(x, w):
    return jax.lax.fori_loop(0, 4, lambda _, x: x + scanned(x, w), x)

  assert matmul_flops(nested, x, w) == 4 * 12 * layer


def test_through_whatever_wraps_a_function():
  x, w = f32(4, 5), f32(5, 5)
  one = 2 * 4 * 5 * 5

  @jax.custom_jvp
  def with_jvp(x, w):
    return x @ w

  @with_jvp.defjvp
  def _(primals, tangents):
    return with_jvp(*primals), tangents[0] @ primals[1]

  @jax.custom_vjp
  def with_vjp(x, w):
    return x @ w

  with_vjp.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, (kept[0].T @ g) @ kept[1])
  )
  for wrapped in (jax.jit(dense), jax.checkpoint(dense), with_jvp, with_vjp):
    assert matmul_flops(wrapped, x, w) == one, wrapped
  assert matmul_flops(jax.vmap(dense, in_axes=(0, None)), f32(9, 4, 5), w) == 9 * one

  def gradient(function):
    return jax.grad(lambda x, w: (function(x, w) ** 2).sum(), argnums=(0, 1))

  assert matmul_flops(gradient(dense), x, w) == 3 * one
  assert matmul_flops(gradient(jax.checkpoint(dense)), x, w) == 4 * one  # computed again
  assert matmul_flops(gradient(with_vjp), x, w) == 3 * one + 2 * 5 * 5 * 5  # the rule has one more
  mesh = jax.make_mesh((1,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  rows, whole = PartitionSpec('data'), PartitionSpec()
  sharded = jax.shard_map(dense, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
  assert matmul_flops(sharded, x, w) == one
  mesh = jax.sharding.AbstractMesh((4,), ('data',))
  sharded = jax.shard_map(dense, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
  assert matmul_flops(sharded, x, w) == one


def test_branches_and_loops_of_unknown_length():
  x, w = f32(4, 5), f32(5, 5)
  one = 2 * 4 * 5 * 5

  def branch(x, w):
    return jax.lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x @ w)

  def loop(x, w):
    return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ w, x)

  assert matmul_flops(branch, x, w) == 2 * one
  assert matmul_flops(loop, x, w) == one


class Block(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
    return x + nn.Dense(128)(nn.gelu(nn.Dense(512)(nn.LayerNorm()(x))))


class Model(nn.Module):
  scanned: bool
  layers: int = 2

  @nn.compact
  def __call__(self, x):
    if self.scanned:
      stack = nn.scan(
        lambda block, x, _: (block(x), None),
        variable_axes={'params': 0},
        split_rngs={'params': True},
        length=self.layers,
      )
      return stack(Block(), x, None)[0]
    for _ in range(self.layers):
      x = Block()(x)
    return x


def test_an_unrolled_transformer_agrees_with_xla():
  x = f32(2, 128, 128)

  def step(model, variables, x):
    return jax.grad(lambda v: (model.apply(v, x) ** 2).sum())(variables)

  counted = {}
  for scanned in (True, False):
    model = Model(scanned=scanned)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    function = functools.partial(step, model)
    counted[scanned] = matmul_flops(function, variables, x)
  assert counted[True] == counted[False]
  # XLA counts the elementwise work as well.
  assert 1 <= xla_flops(function, variables, x) / counted[False] <= 1.05


@pytest.mark.parametrize(
  ('kind', 'expected'),
  [
    ('TPU v4', 275e12),
    ('TPU v5 lite', 197e12),
    ('TPU v5', 459e12),
    ('TPU v5p', 459e12),
    ('TPU v6 lite', 918e12),
    ('TPU7x', 1153.5e12),
    ('NVIDIA A100-SXM4-40GB', 312e12),
    ('NVIDIA H100 80GB HBM3', 989e12),
    ('NVIDIA H100 PCIe', 756e12),
    ('NVIDIA H200', 989e12),
    ('NVIDIA B200', 2250e12),
  ],
)
def test_published_peaks(kind, expected):
  assert peak_flops(SimpleNamespace(device_kind=kind), jnp.bfloat16) == (expected, 'published')


@pytest.mark.parametrize(
  ('kind', 'dtype'),
  [
    ('cpu', jnp.bfloat16),
    ('TPU v4 lite', jnp.bfloat16),
    ('NVIDIA H200', jnp.float32),
    ('NVIDIA A100-SXM4-40GB MIG 3g.20gb', jnp.bfloat16),
  ],
)
def test_what_nobody_published_is_measured(monkeypatch, kind, dtype):
  monkeypatch.setattr(flops, 'measured_flops', lambda device, dtype: 7e9)
  assert peak_flops(SimpleNamespace(device_kind=kind), dtype) == (7e9, 'measured')


def test_measuring_this_machine():
  def measure():
    dtype = jnp.dtype(jnp.float32)
    return flops.measured_flops(jax.devices()[0], dtype, size=512, seconds=0.05)

  peak = measure()
  assert 1e8 < peak * jax.local_device_count() < 1e14
  assert measure() == peak  # not measured again

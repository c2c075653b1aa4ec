"""What the language models (`decoder.py`, `t5.py`) are built from.

Letters: B batch, T tokens, D model width, H heads, N key-value heads, C head width, F feed-forward
width, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.core import Tracer

from ilm_jax.modules.backward import gated, layer_norm, rms_norm
from ilm_jax.modules.precision import bf16_dot_general, bf16_times_rows
from ilm_jax.runtime.sharding import constrain, gathered, with_axes

# Which activations of a layer the backward pass finds saved, and does not compute again.
REMAT_POLICIES: Mapping[str, Callable[..., bool] | None] = {
  'full': jax.checkpoint_policies.nothing_saveable,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
_FLOATS = ('float32', 'bfloat16', 'float16')
ATTENTIONS = ('xla', 'cudnn', 'splash')
_INIT = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')


@dataclasses.dataclass(frozen=True)
class Compute:
  """How a language model is computed: nothing that changes what it is.

  Attributes:
    dtype: of activations.
    param_dtype: of kernels and embeddings; the scales of norms are always float32. 'int8' is for
      frozen models: 8 bits, and a float32 factor for each output of a kernel and each token.
    bf16_matmul: multiply by kernels as a TPU does by default: operands rounded to bfloat16, sums
      in float32. Twice as fast on CPUs that have bfloat16 (`multiplies_bfloat16`).
    remat: 'none', or what of a layer is kept for the backward pass: 'dots' or nothing ('full').
    scan_layers: one compiled layer that runs L times, over parameters stacked along a first axis,
      'layers/...'; else L layers, 'layers_0/...', which compile L times as long. XLA for CPUs
      converts stacked bfloat16 to float32 in every call: there, False is twice as fast.
    attention: 'xla'; or a fused kernel that never holds [T, T] scores, where it serves: 'splash'
      (TPU), for calls without a cache, a prefix mask or a mask of the caller's, which takes the
      order of tokens from their places in the row, as packed rows have it; or 'cudnn' (NVIDIA), see
      `ilm_jax.modules.attention.attend`.
  """

  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  bf16_matmul: bool = False
  remat: str = 'none'
  scan_layers: bool = True
  attention: str = 'xla'

  def __post_init__(self):
    if self.remat not in ('none', *REMAT_POLICIES):
      raise ValueError(f"remat={self.remat!r}: 'none' or one of {sorted(REMAT_POLICIES)}.")
    if self.attention not in ATTENTIONS:
      raise ValueError(f'attention={self.attention!r}: one of {ATTENTIONS}.')
    for name, allowed in (('dtype', _FLOATS), ('param_dtype', (*_FLOATS, 'int8'))):
      if jnp.dtype(getattr(self, name)).name not in allowed:
        raise ValueError(f'{name}={getattr(self, name)!r}: one of {allowed}.')

  @property
  def is_int8(self) -> bool:
    return jnp.dtype(self.param_dtype) == jnp.int8

  @property
  def saved_dtype(self) -> Any:
    """Of what is kept for the backward pass alone, whose gradients are rounded anyway."""
    return jnp.bfloat16 if self.bf16_matmul else self.dtype


class RMSNorm(nn.Module):
  """x / rms(x) * scale over the last axis, in float32 (Zhang & Sennrich 2019, arXiv:1910.07467).

  `scale` is the whole factor: the importers of Gemma, which stores it less one, add the one.
  """

  epsilon: float
  dtype: Any
  axis: str = 'embed'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    ones = with_axes(nn.initializers.ones, (self.axis,))
    scale: Any = self.param('scale', ones, (x.shape[-1],), jnp.float32)
    normed: Any = rms_norm(x, scale, self.epsilon)
    return normed.astype(self.dtype)


class LayerNorm(nn.Module):
  """Mean 0 and variance 1 over the last axis, times `scale`, plus `bias`, in float32."""

  epsilon: float
  dtype: Any
  axis: str = 'embed'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (x.shape[-1],)
    scale: Any = self.param('scale', with_axes(nn.initializers.ones, (self.axis,)), shape)
    bias: Any = self.param('bias', with_axes(nn.initializers.zeros, (self.axis,)), shape)
    normed: Any = layer_norm(x.astype(jnp.float32), scale, bias, self.epsilon)
    return normed.astype(self.dtype)


class Embedder(nn.Module):
  """The token embedding [V, D], and the logits of a model whose head is tied to it."""

  vocab_size: int
  d_model: int
  compute: Compute

  def setup(self):
    dtype = self.compute.param_dtype
    init = with_axes(_random(nn.initializers.normal(1.0)), ('vocab', 'embed'))
    shape = (self.vocab_size, self.d_model)
    self.embedding: Any = self.param('embedding', init, shape, dtype)
    if self.compute.is_int8:
      scale = with_axes(nn.initializers.ones, ('vocab',))
      self.embedding_scale: Any = self.param('embedding_scale', scale, shape[:1], jnp.float32)

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """[B, T] ids -> [B, T, D]."""
    embeddings = jnp.take(self.embedding, tokens, axis=0).astype(self.compute.dtype)
    if not self.compute.is_int8:
      return embeddings
    scale = jnp.take(self.embedding_scale, tokens, axis=0)[..., None]
    return (embeddings * scale).astype(self.compute.dtype)

  def attend(self, hidden: jax.Array) -> jax.Array:
    """[..., D] -> logits [..., V]: sums in float32 whatever the operands are."""
    logits = gathered(self._times_rows, ('vocab', 'embed'))(hidden, self.embedding)
    return logits * self.embedding_scale if self.compute.is_int8 else logits

  def _times_rows(self, hidden: jax.Array, table: jax.Array) -> jax.Array:
    if self.compute.bf16_matmul:
      # What is no float has no gradient. Bytes are exact in bfloat16.
      return bf16_times_rows(hidden, table.astype(jnp.bfloat16) if self.compute.is_int8 else table)
    dtype, dims = self.compute.dtype, (((hidden.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(
      hidden.astype(dtype), table.astype(dtype), dims, preferred_element_type=jnp.float32
    )


def dense(
  name: str,
  features: int | tuple[int, ...],
  axes: tuple[str, ...],
  compute: Compute,
  *,
  inputs: int = 1,
  bias: bool = False,
) -> nn.Module:
  """A linear layer over the last `inputs` axes; `axes` are its kernel's, inputs and features."""
  if compute.is_int8:
    return _Int8Dense(features, axes, compute, inputs, bias, name=name)
  return nn.DenseGeneral(
    features,
    axis=tuple(range(-inputs, 0)),
    use_bias=bias,
    kernel_init=with_axes(_INIT, axes),
    bias_init=with_axes(nn.initializers.zeros, axes[inputs:]),
    dtype=compute.dtype,
    param_dtype=compute.param_dtype,
    dot_general=gathered(_dot_general(compute), axes),
    name=name,
  )


def _dot_general(compute: Compute) -> Callable[..., jax.Array]:
  return bf16_dot_general if compute.bf16_matmul else jax.lax.dot_general


class _Int8Dense(nn.Module):
  """The same with an 8-bit kernel. Bytes are exact in bfloat16, so that products lose nothing."""

  features: int | tuple[int, ...]
  axes: tuple[str, ...]
  compute: Compute
  inputs: int
  bias: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    n, outputs = self.inputs, self.axes[self.inputs :]
    features = (self.features,) if isinstance(self.features, int) else self.features
    init = with_axes(_random(_INIT), self.axes)
    kernel: Any = self.param('kernel', init, (*x.shape[-n:], *features), jnp.int8)
    ones = with_axes(nn.initializers.ones, outputs)
    scale: Any = self.param('kernel_scale', ones, features, jnp.float32)
    dims = ((tuple(range(x.ndim - n, x.ndim)), tuple(range(n))), ((), ()))

    def dot(x, kernel, dims):
      return _dot_general(self.compute)(x, kernel.astype(x.dtype), dims)

    y = gathered(dot, self.axes)(x, kernel, dims) * scale
    if self.bias:
      zeros = with_axes(nn.initializers.zeros, outputs)
      bias: Any = self.param('bias', zeros, features, jnp.float32)
      y += bias
    return y.astype(self.compute.dtype)


def _random(init: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """The initializer, which for bytes gives any bytes: they are for tests of shapes and speed."""

  def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if jnp.dtype(dtype) == jnp.int8:
      return jax.random.randint(key, shape, -127, 128, dtype)
    return init(key, shape, dtype)

  return draw


class GatedMlp(nn.Module):
  """wo(activation(wi_0(x)) * wi_1(x)) (Shazeer 2020, arXiv:2002.05202)."""

  d_mlp: int
  activation: str
  compute: Compute

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    gate = dense('wi_0', self.d_mlp, ('embed', 'mlp'), self.compute)(x)
    up = dense('wi_1', self.d_mlp, ('embed', 'mlp'), self.compute)(x)
    compute = self.compute
    hidden: Any = gated(gate, up, self.activation, compute.saved_dtype, not compute.scan_layers)
    hidden = constrain(hidden, ('batch', 'length', 'mlp'))
    return dense('wo', x.shape[-1], ('mlp', 'embed'), self.compute)(hidden)


def run_layers(
  stack: nn.Module,
  layer: Callable[..., nn.Module],
  num_layers: int,
  compute: Compute,
  carry: Any,
  per_layer: Any,
  shared: Any,
) -> tuple[Any, Any]:
  """Runs the layers of a stack, inside its `__call__`, which is compact.

  Args:
    stack: the module that has the layers.
    layer: layer(name=...) makes one, which is called as (carry, own, shared) and returns
      (carry, output).
    num_layers: L.
    compute: says whether the layers are scanned and what of them is kept.
    carry: what goes from one layer to the next.
    per_layer: a tree of arrays [L, ...], of which each layer gets its own [...]; where layers are
      not scanned, a list of L trees.
    shared: what all layers get.

  Returns:
    What the last layer carries on; and the outputs, stacked or a list, as per_layer is.
  """
  if compute.remat != 'none':
    # Inside a scan nothing can be merged with the first computation, so prevent_cse only costs.
    policy = REMAT_POLICIES[compute.remat]
    layer = nn.remat(layer, policy=policy, prevent_cse=not compute.scan_layers)
  if not compute.scan_layers:
    run, outputs = _traced_once(layer), []
    # Where nothing is traced there is nothing to save, and `run` would be compiled in each call.
    traced = _has_tracer((stack.variables, carry, shared)) and not stack.is_initializing()
    for i in range(num_layers):
      name, own = f'layers_{i}', per_layer[i]
      if traced:
        carry, output = run(stack.variables['params'][name], carry, own, shared)
      else:
        carry, output = layer(name=name)(carry, own, shared)
      outputs.append(output)
    return carry, outputs
  scanned = nn.scan(
    layer,
    variable_axes={'params': 0},
    split_rngs={'params': True},
    in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
    length=num_layers,
    metadata_params={nn.PARTITION_NAME: 'layers'},
  )
  return scanned(name='layers')(carry, per_layer, shared)


def _has_tracer(tree: Any) -> bool:
  return any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))


def _traced_once(layer: Callable[..., nn.Module]) -> Callable[..., Any]:
  """A layer as a function of its parameters: (params, carry, own, shared) -> (carry, output).

  Layers of one kind are traced, and differentiated, once, which is most of the time until a program
  of many layers is compiled. XLA gets to see calls, which it puts in line: the same program.
  """

  @functools.partial(jax.jit, static_argnums=(4, 5))
  def run(params, carry, shared, arrays, tree, flags):
    # What a layer is (`flags`) is no array: an unrolled layer branches on it.
    leaves = [x if flag is None else flag for x, flag in zip(arrays, flags)]
    own = jax.tree.unflatten(tree, leaves)
    return layer(parent=None).apply({'params': params}, carry, own, shared)

  def call(params, carry, own, shared):
    leaves, tree = jax.tree.flatten(own)
    flags = tuple(x if isinstance(x, bool) else None for x in leaves)
    arrays = [x if flag is None else None for x, flag in zip(leaves, flags)]
    return run(params, carry, shared, arrays, tree, flags)

  return call

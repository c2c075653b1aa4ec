"""Makes a language model's parameters from the tensors of a foreign checkpoint, strictly.

A format gives a `TensorSource`: named tensors, read one at a time. A family gives a recipe: for
every parameter, the tensors it is made of and how.

  recipe = {
    'embedder/embedding': Leaf('model.embed_tokens.weight'),
    'layers/mlp/wi_0/kernel': Leaf('model.layers.{layer}.mlp.gate_proj.weight', lambda w: w.T),
  }
  params, report = assemble(source, recipe, like, dropped=('*.rotary_emb.inv_freq',))

Every parameter is filled and every tensor is used, or named in `dropped`; anything else, and every
wrong shape, is told before the first tensor is read. A process reads a tensor at a time and keeps
only the parts that its devices hold.
"""

import dataclasses
import fnmatch
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import flax.traverse_util
import jax
import numpy as np

from ilm_jax.checkpoints.natural_order import natural_order
from ilm_jax.errors import UsageError, did_you_mean


class TensorSource(Protocol):
  """Tensors of a checkpoint by name.

  Attributes:
    where: the file or directory, for messages.
    shapes: name -> shape of every tensor there is.
  """

  where: str

  @property
  def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

  def read(self, name: str) -> np.ndarray:
    """The tensor, in a NumPy float dtype or ml_dtypes.bfloat16."""
    ...


def _same(tensor: Any) -> Any:
  return tensor


@dataclasses.dataclass(frozen=True)
class Leaf:
  """How a parameter is made.

  Attributes:
    tensors: name of the tensor, or names of several, which `make` gets in this order. With
      '{layer}' in it, there is one for each layer, and the parameter is that of the layer stack.
    make: their parameter, of one layer. Methods of arrays only (`T`, `reshape`, `swapaxes`, +),
      for it is also called with abstract arrays, to learn the shape.
  """

  tensors: str | tuple[str, ...]
  make: Callable[..., Any] = _same

  @property
  def names(self) -> tuple[str, ...]:
    return (self.tensors,) if isinstance(self.tensors, str) else self.tensors


Recipe = Mapping[str, Leaf]


@dataclasses.dataclass(frozen=True)
class Report:
  """What became of a checkpoint: number of parameters made, tensors used, tensors dropped."""

  source: str
  parameters: int
  used: int
  dropped: tuple[str, ...]

  def __str__(self) -> str:
    line = f'{self.source}: {self.used} tensors into {self.parameters / 1e6:,.1f} M parameters'
    return line + (f'; not used: {", ".join(self.dropped)}' if self.dropped else '')


def assemble(
  source: TensorSource, recipe: Recipe, like: Any, *, dropped: Sequence[str] = ()
) -> tuple[Any, Report]:
  """Makes the parameters `like` (jax.ShapeDtypeStruct with shardings, unboxed).

  Args:
    source: the checkpoint.
    recipe: for 'layers/...' one entry, whether or not the layers of `like` are stacked: it serves
      a stacked 'layers/x' of L layers, and 'layers_0/x', 'layers_1/x', ... as well.
    like: nested dictionaries; arrays come in these dtypes and shardings.
    dropped: glob patterns of tensors that the model has no use for.

  Raises:
    UsageError: a parameter has no recipe, a tensor is missing, left over or of another shape. The
      message lists them all, and nothing was read.
  """
  flat: dict[str, Any] = flax.traverse_util.flatten_dict(like, sep='/')
  recipe = {**recipe, **_int8(recipe, flat)}
  plans = {path: _plan(path, leaf, recipe, source) for path, leaf in flat.items()}
  used = {name for plan in plans.values() for part in plan.parts for name in part}
  rest = sorted(source.shapes.keys() - used, key=natural_order)
  unused = [name for name in rest if any(fnmatch.fnmatchcase(name, p) for p in dropped)]
  _check(source, plans, flat, used, [name for name in rest if name not in set(unused)])
  # What is made of one tensor, one after the other: it is read once.
  read = functools.lru_cache(maxsize=1)(source.read)
  order = sorted(flat, key=lambda path: plans[path].parts[0])
  params = {path: _place(read, plans[path], flat[path]) for path in order}
  report = Report(
    source.where, sum(math.prod(x.shape) for x in flat.values()), len(used), tuple(unused)
  )
  return flax.traverse_util.unflatten_dict(params, sep='/'), report


def _int8(recipe: Recipe, flat: Mapping[str, Any]) -> dict[str, Leaf]:
  """Of 8-bit kernels and embeddings, and of the factors beside them (`Compute.param_dtype`).

  A kernel has a factor for each of its outputs, its last axes; an embedding one for each token.
  """
  made = {}
  for path, scale in flat.items():
    key = _recipe_key(path.removesuffix('_scale'))
    if path.endswith('_scale') and key in recipe:
      entry, whole = recipe[key], path.removesuffix('_scale')
      outputs, axes = len(scale.shape), len(flat[whole].shape)
      stacked = path.startswith('layers/') or '/layers/' in path
      is_table = whole.endswith('embedding')
      reduced = (-1,) if is_table else tuple(range(stacked - axes, stacked - outputs))
      made[key] = Leaf(entry.tensors, functools.partial(_bytes, entry.make, reduced))
      made[f'{key}_scale'] = Leaf(entry.tensors, functools.partial(_factors, entry.make, reduced))
  return made


def _factors(make: Callable[..., Any], axes: tuple[int, ...], *tensors: Any, keep: bool = False):
  """The largest of what shares a factor becomes 127."""
  largest = abs(make(*tensors).astype(np.float32)).max(axis=axes, keepdims=keep)
  return largest / 127 + (largest == 0)


def _bytes(make: Callable[..., Any], axes: tuple[int, ...], *tensors: Any) -> Any:
  factors = _factors(make, axes, *tensors, keep=True)
  return (make(*tensors).astype(np.float32) / factors).round().astype(np.int8)


def _recipe_key(path: str) -> str:
  """'layers_3/mlp/wo/kernel' -> 'layers/mlp/wo/kernel'."""
  return re.sub(r'(^|/)layers_\d+/', r'\1layers/', path)


@dataclasses.dataclass(frozen=True)
class _Plan:
  """The tensors of a parameter: of each of its layers, or of the whole.

  `layer`: which of what is made the parameter is, where the tensors are stacked and it is not.
  """

  stacked: bool
  parts: list[tuple[str, ...]]
  make: Callable[..., Any]
  layer: int | None = None

  def array(self, tensors: Sequence[Any]) -> Any:
    """The parameter, or that of one layer, of its tensors."""
    made = self.make(*tensors)
    return made if self.layer is None else made[self.layer]

  def shape(self, shapes: Sequence[tuple[int, ...]]) -> Any:
    """The shape of `array`, or what `make` says against these."""
    made = _shape(self.make, tuple(shapes))
    return made if self.layer is None or isinstance(made, str) else made[1:]


def _plan(path: str, leaf: Any, recipe: Recipe, source: TensorSource) -> _Plan:
  one_layer = re.search(r'(^|/)layers_(\d+)/', path)
  key = _recipe_key(path)
  if key not in recipe:
    raise UsageError(
      f'{source.where}: nothing there makes the parameter {path} {list(leaf.shape)}: the checkpoint'
      f' is of another family or configuration.{did_you_mean(key, recipe)}'
    )
  entry = recipe[key]
  layered = any('{layer}' in name for name in entry.names)
  stacked = layered and one_layer is None
  layers = range(leaf.shape[0]) if stacked else [int(one_layer[2]) if one_layer else 0]
  parts = [tuple(name.replace('{layer}', str(i)) for name in entry.names) for i in layers]
  of_stack = one_layer and not layered  # the checkpoint's tensors are stacked, ours are not
  return _Plan(stacked, parts, entry.make, layers[0] if of_stack else None)


def _check(
  source: TensorSource,
  plans: Mapping[str, _Plan],
  flat: Mapping[str, Any],
  used: set[str],
  left_over: Sequence[str],
) -> None:
  lines = []
  for name in sorted(used - source.shapes.keys(), key=natural_order):
    lines.append(f'  + {name}: missing.{did_you_mean(name, left_over)}')
  for name in left_over:
    lines.append(f'  - {name} {list(source.shapes[name])}: no parameter is made of it')
  for path, plan in plans.items():
    shape = tuple(flat[path].shape[1:] if plan.stacked else flat[path].shape)
    for part in plan.parts:
      if all(name in source.shapes for name in part):
        found = plan.shape([source.shapes[name] for name in part])
        if found != shape:
          tensors = ', '.join(f'{name} {list(source.shapes[name])}' for name in part)
          lines.append(f'  {tensors}: makes {found}, but {path} needs {list(shape)}')
  if lines:
    shown = lines[:40] + ([f'  ... and {len(lines) - 40} more'] if len(lines) > 40 else [])
    raise UsageError(
      f"{source.where} does not fit the model ('+' the model only, '-' the checkpoint only):\n"
      + '\n'.join(shown)
      + '\nIs it the configuration of this checkpoint?'
    )


@functools.lru_cache(maxsize=64)  # the layers of a model are alike
def _shape(make: Callable[..., Any], shapes: tuple[tuple[int, ...], ...]) -> Any:
  """The shape that `make` gives, or what it says against these."""
  abstract = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
  try:
    return tuple(jax.eval_shape(make, *abstract).shape)
  except (TypeError, ValueError, IndexError) as error:
    return str(error).splitlines()[0]


def _place(read: Callable[[str], np.ndarray], plan: _Plan, leaf: Any) -> jax.Array:
  """Reads the tensors one by one into the shards of this process's devices."""
  by_device = leaf.sharding.addressable_devices_indices_map(leaf.shape)
  slices = {
    _key(index, leaf.shape): tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, leaf.shape))
    for index in by_device.values()
  }
  shards = {key: np.empty([s.stop - s.start for s in at], leaf.dtype) for key, at in slices.items()}
  for number, part in enumerate(plan.parts):
    if plan.stacked and not any(at[0].start <= number < at[0].stop for at in slices.values()):
      continue
    tensor = np.asarray(plan.array([read(name) for name in part]))
    for key, at in slices.items():
      if not plan.stacked:
        shards[key][...] = tensor[at]
      elif at[0].start <= number < at[0].stop:
        shards[key][number - at[0].start] = tensor[at[1:]]
  arrays = [
    jax.device_put(shards[_key(index, leaf.shape)], device) for device, index in by_device.items()
  ]
  return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays)


def _key(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
  return tuple(s.indices(n)[:2] for s, n in zip(index, shape))

"""Where arrays live: the device mesh, and the rules from logical axes to mesh axes.

Modules name the axes of a parameter by what they are (logical axes: 'embed', 'heads'). A rule maps
each to a mesh axis, along which it is split, or to None: whole on every device. Mesh axes:

  data     rows of the batch; parameters are replicated along it
  fsdp     rows of the batch, too; parameters are split along it and gathered where they are used
  tensor   heads, feed-forward width and vocabulary; the fastest links, so the innermost axis

  mesh = make_mesh({'data': -1})
  params = init_sharded(init, mesh, rules, key)
  opt_state = init_mirrored(optimizer.init, params, mesh)
  with use_mesh(mesh, rules):
    ... jitted steps on place_batch(rows, mesh)
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import flax.linen.spmd as logical
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path

from ilm_jax.errors import UsageError, did_you_mean

MESH_AXES = ('data', 'fsdp', 'tensor')
BATCH_AXES = ('data', 'fsdp')

Rules: TypeAlias = Sequence[tuple[str, str | tuple[str, ...] | None]]

DEFAULT_RULES: Rules = (
  ('batch', BATCH_AXES),
  ('length', None),
  # Of activations only: 'embed' would ask for 'fsdp', which the batch has already.
  ('activation_embed', None),
  ('embed', 'fsdp'),
  ('mlp', 'tensor'),
  ('heads', 'tensor'),
  ('kv_heads', None),  # few: one in small Gemmas, so that they seldom divide
  ('vocab', 'tensor'),
  ('kv', None),
  ('layers', None),
  ('queries', None),
  ('cf', None),
  # Rows of the entity table. It is looked up by id, for which only ids and the rows that were found
  # travel: every device looks among its own rows, and the sum over devices is the answer.
  ('entities', MESH_AXES),
)
KNOWN_AXES = tuple(axis for axis, _ in DEFAULT_RULES)
_OF_ACTIVATIONS = ('batch', 'length', 'activation_embed')  # no array that is kept has them

_path = functools.partial(keystr, simple=True, separator='/')


def make_mesh(shape: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
  """A mesh of all `devices` (by default, all there are) that always has all of MESH_AXES.

  `shape` is mesh axis -> size: axes left out have size 1, and one may be -1, the rest. Raises
  UsageError for an unknown axis, two -1, or sizes that do not come to the devices.
  """
  devices = jax.devices() if devices is None else devices
  given = f'mesh={dict(shape)}'
  for axis in shape:
    if axis not in MESH_AXES:
      raise UsageError(f'{given}: {_unknown("mesh axis", axis, MESH_AXES)}')
  sizes = [shape.get(axis, 1) for axis in MESH_AXES]
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise UsageError(f'{given}: sizes are positive, but for one -1, which stands for the rest.')
  rest, over = divmod(len(devices), math.prod(size for size in sizes if size != -1))
  if over or (rest != 1 and -1 not in sizes):
    raise UsageError(
      f'{given} does not come to the {len(devices)} devices there are, all of which are used. Let'
      f' one axis be -1 (data, say), and the product of the others divide {len(devices)}.'
    )
  sizes = [rest if size == -1 else size for size in sizes]
  # Under Explicit axes, the default of jax.make_mesh, linen's constraints raise.
  return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: Rules) -> Iterator[None]:
  """Gives `constrain` its meaning in the steps traced inside. Outside, it does nothing.

  Raises UsageError for rules that are wrong, and for a tensor axis that would split no weights.
  """
  check_rules(rules)
  tensor = MESH_AXES[-1]
  if mesh.shape[tensor] > 1 and not any(
    tensor in _names(target) for axis, target in rules if axis != 'entities'
  ):
    raise UsageError(
      f'mesh={dict(mesh.shape)}: no sharding rule splits weights over {tensor!r}, so that its'
      f' {mesh.shape[tensor]} devices would all do the same. Let a rule name it, for mlp, heads or'
      ' vocab, or give its devices to data or fsdp.'
    )
  # Not `with mesh:`, under which linen's constraints do nothing and say nothing.
  with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
    yield


def constrain(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """Shards an activation by its logical axes; raises where one has no rule, or two collide."""
  return logical.with_logical_constraint(x, axes, fallback=logical.RulesFallback.RAISE_ERROR)


def gathered(
  dot_general: Callable[..., jax.Array], axes: Sequence[str]
) -> Callable[..., jax.Array]:
  """A dot_general whose kernel, with logical axes `axes`, is put together before it is multiplied.

  Left to itself, XLA for TPUs multiplies by each device's part of a kernel as it arrives, and reads
  and writes the whole result as often as there are parts: four times the time of the products, by
  its own estimate, with 32 parts. Whole kernels are not kept for the backward pass, but gathered
  again.
  """
  rules = dict(nn.get_logical_axis_rules())
  sizes = jax.sharding.get_abstract_mesh().shape
  if 'embed' not in axes or all(sizes.get(name, 1) == 1 for name in _names(rules.get('embed'))):
    return dot_general

  def run(lhs: jax.Array, kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    def dot(lhs, kernel):
      return dot_general(lhs, _gather(kernel, tuple(axes)), *args, **kwargs)

    return jax.checkpoint(dot)(lhs, kernel)

  return run


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(kernel: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  whole = tuple('activation_embed' if axis == 'embed' else axis for axis in axes)
  return constrain(kernel, whole)


def _scatter(axes, _, gradient):
  # Summed and split in one go. What is no float has no gradient.
  is_float = jnp.issubdtype(gradient.dtype, jnp.floating)
  return (constrain(gradient, axes) if is_float else gradient,)


_gather.defvjp(lambda kernel, axes: (_gather(kernel, axes), None), _scatter)


def with_axes(init: Callable[..., Any], axes: tuple[str | None, ...]) -> Callable[..., Any]:
  """An initializer whose parameter is boxed with its logical axes, for any layer of linen."""
  # rules=() because nn.DenseGeneral makes kernels flat and then unboxes and reshapes them: under
  # rules, the box would constrain the flat kernel by the final axes and fail, in `apply` too.
  return nn.with_logical_partitioning(init, axes, rules=())


def check_rules(rules: Rules) -> None:
  """Raises UsageError for a rule that names an unknown axis, and for an axis with two rules."""
  seen = {}
  for axis, target in rules:
    rule = f'sharding rule ({axis!r}, {target!r})'
    if axis not in KNOWN_AXES:
      raise UsageError(f'{rule}: {_unknown("logical axis", axis, KNOWN_AXES)}')
    for name in _names(target):
      if name not in MESH_AXES:
        raise UsageError(f'{rule}: {_unknown("mesh axis", name, MESH_AXES)}')
    if axis in seen:
      raise UsageError(f'{rule}: {axis!r} has a rule already, to {seen[axis]!r}. Remove one.')
    seen[axis] = target
    if axis == 'batch' and _names(target) != BATCH_AXES:
      raise UsageError(f'{rule}: must be {BATCH_AXES}, where place_batch puts the rows.')


def check_changes(changes: Rules, *boxed: Any) -> None:
  """Raises UsageError for a change of the rules that changes nothing: no array has its axis.

  Args:
    changes: rules that were given in place of default ones.
    boxed: trees of all arrays of a job, in boxes.
  """
  used = {name for leaf in jax.tree.leaves(boxed, is_leaf=_is_box) for name in _axes(leaf)}
  for axis, target in changes:
    if axis in KNOWN_AXES and axis not in {*used, *_OF_ACTIVATIONS}:
      raise UsageError(
        f'sharding rule ({axis!r}, {target!r}): no array of this job has the axis {axis!r}, so that'
        f' the rule would do nothing. Remove it; there are {", ".join(sorted(used))}.'
      )


def shardings_of(boxed: Any, mesh: Mesh, rules: Rules) -> Any:
  """The NamedSharding of every array or shape of a tree.

  Those boxed with their logical axes (`with_axes`) are sharded by the rules, others replicated.
  Raises UsageError for rules that are wrong, lack an axis, or split what does not divide.
  """
  check_rules(rules)
  table = {**dict(rules), None: None}

  def sharding(path, leaf) -> NamedSharding:
    if not _is_box(leaf):
      return NamedSharding(mesh, PartitionSpec())
    where = f'parameter {_path(path)} {leaf.value.shape}'
    for axis, size in zip(leaf.names, leaf.value.shape):
      if axis not in table:
        fix = f'add one: ({axis!r}, None) replicates it, ({axis!r}, <mesh axis>) splits it.'
        fix = fix if axis in KNOWN_AXES else _unknown('logical axis', axis, KNOWN_AXES)
        raise UsageError(f'{where}: no sharding rule for its logical axis {axis!r}: {fix}')
      split = {name: mesh.shape[name] for name in _names(table[axis])}
      if size % math.prod(split.values()):
        raise UsageError(
          f'{where}: {axis!r} of size {size} cannot be split evenly over mesh axes {split}. Choose'
          f' mesh sizes that divide {size}, or replicate it: rule ({axis!r}, None).'
        )
    targets = [table[axis] for axis in leaf.names]
    used = [name for target in targets for name in _names(target)]
    if len(used) > len(set(used)):
      raise UsageError(
        f'{where}: the rules map its logical axes {leaf.names} to {tuple(targets)}, but a mesh axis'
        ' can split only one of them. Map the other to None.'
      )
    return NamedSharding(mesh, PartitionSpec(*targets))

  return tree_map_with_path(sharding, boxed, is_leaf=_is_box)


def boxed_shapes(init: Callable[..., Any], *args: Any) -> Any:
  """Shapes of what `init(*args)` returns, in boxes."""
  with nn.logical_axis_rules(()):  # how a dummy batch is split is nobody's business
    return jax.eval_shape(init, *args)


def abstract_init(init: Callable[..., Any], mesh: Mesh, rules: Rules, *args: Any) -> Any:
  """The shapes and shardings of `init_sharded`, without running it."""
  boxed = boxed_shapes(init, *args)
  shardings = shardings_of(boxed, mesh, rules)
  return jax.tree.map(lambda x, sharding: x.update(sharding=sharding), _unbox(boxed), shardings)


def init_sharded(init: Callable[..., Any], mesh: Mesh, rules: Rules, *args: Any) -> Any:
  """The arrays that `init(*args)` returns in boxes; every device makes only the parts it holds."""
  return init_like(init, abstract_init(init, mesh, rules, *args), *args)


def init_like(init: Callable[..., Any], like: Any, *args: Any) -> Any:
  """As `init_sharded`, of what `abstract_init` returned: to trace a model takes seconds."""
  shardings = jax.tree.map(lambda x: x.sharding, like)
  with nn.logical_axis_rules(()):
    return jax.jit(lambda *args: _unbox(init(*args)), out_shardings=shardings)(*args)


def mirrored_shardings(tree: Any, params: Any, mesh: Mesh) -> Any:
  """Shardings of an optimizer's state: as of the parameters that it mirrors.

  A leaf mirrors the parameter that has its shape and whose path ends its own: (0, mu, layer, bias)
  mirrors (layer, bias). Other leaves (counts, factored moments) are replicated. Both trees hold
  arrays or shapes; those of `params` have shardings.
  """
  by_path = dict(tree_leaves_with_path(params))

  def sharding(path, leaf) -> jax.sharding.Sharding:
    ends = (path[start:] for start in range(len(path) + 1))
    params = (by_path[end] for end in ends if end in by_path)
    mirrored = (param.sharding for param in params if param.shape == leaf.shape)
    return next(mirrored, NamedSharding(mesh, PartitionSpec()))

  return tree_map_with_path(sharding, tree)


def init_mirrored(init: Callable[[Any], Any], params: Any, mesh: Mesh) -> Any:
  """Runs `init(params)` of an optimizer, with `mirrored_shardings`."""
  shardings = mirrored_shardings(jax.eval_shape(init, params), params, mesh)
  return jax.jit(init, out_shardings=shardings)(params)


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Global arrays of this process's [rows, ...], split over BATCH_AXES; UsageError if unevenly."""
  processes = np.vectorize(lambda device: device.process_index)(mesh.devices)
  parts = int((processes == jax.process_index()).any(axis=MESH_AXES.index('tensor')).sum())
  sharding, placed = NamedSharding(mesh, PartitionSpec(BATCH_AXES)), {}
  for name, rows in batch.items():
    if not rows.ndim or rows.shape[0] % parts:
      raise UsageError(
        f'batch: {name!r} {rows.shape} cannot be split by rows into the {parts} parts of this'
        f' process (mesh {dict(mesh.shape)}). Make its batch size a multiple of {parts}.'
      )
    placed[name] = jax.make_array_from_process_local_data(sharding, rows)
  return placed


def abstract_batch(
  shapes: Mapping[str, tuple[int, ...]], mesh: Mesh, dtype: Any = jnp.int32
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and shardings of global batches, as of `place_batch`."""
  by_rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
  return {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=by_rows) for name, shape in shapes.items()
  }


def place_rows(tree: Any, mesh: Mesh) -> Any:
  """Global arrays of [rows, ...] that every process has whole, split over BATCH_AXES evenly."""
  sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(x.shape, sharding, lambda part: x[part]), tree
  )


def batch_parts(rows: int) -> int:
  """In how many parts a step has `rows` rows of a batch, one after the other, each on its device.

  What is done part by part needs nothing of other devices. 1 where rows do not divide, and outside
  of `use_mesh`.
  """
  sizes = jax.sharding.get_abstract_mesh().shape
  parts = math.prod(sizes.get(axis, 1) for axis in BATCH_AXES)
  return 1 if rows % parts else parts


def rows_for(least: int, mesh: Mesh) -> int:
  """How many rows, `least` or more, split over BATCH_AXES evenly."""
  parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  return -(-least // parts) * parts


def place_constants(boxed: Any, mesh: Mesh, rules: Rules) -> Any:
  """The arrays of a tree on the devices, with `shardings_of`; unboxed values are returned.

  What lies on the mesh already stays where it is.
  """

  def place(x: Any, sharding: NamedSharding) -> Any:
    there = x.sharding if isinstance(x, jax.Array) else None
    stays = isinstance(there, NamedSharding) and there.mesh == mesh
    return x if stays else jax.device_put(x, sharding)

  return jax.tree.map(place, _unbox(boxed), shardings_of(boxed, mesh, rules))


def pad_rows(x: np.ndarray, axis: str, mesh: Mesh, rules: Rules) -> np.ndarray:
  """Rows [n, ...] and zeros after them, as many as it takes to split logical axis `axis` evenly."""
  parts = math.prod(mesh.shape[name] for name in _names(dict(rules).get(axis)))
  return np.pad(x, [(0, -len(x) % parts), *[(0, 0)] * (x.ndim - 1)])


def replicate(tree: Any, mesh: Mesh) -> Any:
  """The arrays of a tree, whole on every device."""
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def fetch(tree: Any) -> Any:
  """The global arrays of a tree as NumPy arrays, whole on every process; all must call it."""

  for x in jax.tree.leaves(tree):
    if x.is_fully_addressable or x.is_fully_replicated:
      x.copy_to_host_async()  # all of them under way before one is waited for

  def whole(x: jax.Array) -> np.ndarray:
    if x.is_fully_addressable or x.is_fully_replicated:
      return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(whole, tree)


def parameter_table(params: Any, frozen: Any = None) -> str:
  """Shape, dtype, sharding and size of every parameter (array or shape, sharded), and totals.

  Layers that are alike share a row: 'lm/layers_*/mlp/out/kernel  30 x [1536, 576]'.
  """
  rows = [['parameter', 'shape', 'dtype', 'sharding', 'MB', 'MB per device']]
  totals = []
  for kind, tree in (('trained', params), ('frozen', frozen)):
    alike: dict[tuple[str, ...], np.ndarray] = {}
    for path, x in tree_leaves_with_path(tree):
      local = math.prod(x.sharding.shard_shape(x.shape))
      spec = ', '.join('+'.join(_names(target)) or '-' for target in x.sharding.spec)
      name = re.sub(r'(?<=/layers)([_/])\d+(?=/)', r'\1*', '/' + _path(path))[1:]
      cells = name, str(list(x.shape)), str(x.dtype), f'[{spec}]'
      sizes = [size * x.dtype.itemsize / 1e6 for size in (x.size, local)]
      alike[cells] = alike.get(cells, np.zeros(4)) + [1, x.size, *sizes]
    for (name, shape, *cells), (count, _, *sizes) in alike.items():
      many = f'{count:.0f} x ' if count > 1 else ''
      rows.append([name, many + shape, *cells, *(f'{s:,.3f}' for s in sizes)])
    sums = sum((row[1:] for row in alike.values()), np.zeros(3))
    totals.append('{}: {:,.0f} parameters, {:,.1f} MB, {:,.1f} MB per device'.format(kind, *sums))
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = ['  '.join(map(str.ljust, row, widths)).rstrip() for row in rows]
  return '\n'.join(lines + totals)


def _names(target: str | Sequence[str] | None) -> tuple[str, ...]:
  return (target,) if isinstance(target, str) else tuple(target or ())


def _unknown(kind: str, name: str, allowed: Sequence[str]) -> str:
  return f'no {kind} {name!r}; there are {", ".join(allowed)}.{did_you_mean(name, allowed)}'


def _axes(leaf: Any) -> tuple[str, ...]:
  return tuple(name for name in leaf.names if name) if _is_box(leaf) else ()


def _is_box(leaf: Any) -> bool:
  return isinstance(leaf, nn.Partitioned)


def _unbox(boxed: Any) -> Any:
  return jax.tree.map(lambda x: x.value if _is_box(x) else x, boxed, is_leaf=_is_box)

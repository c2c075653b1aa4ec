"""What a compiled program needs of a chip, and what it could do at most."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.tree_util import keystr, tree_leaves_with_path

from ilm_jax.aot.chips import Chip
from ilm_jax.aot.hlo import Collective, Costs

_LARGEST = 8  # tensors that are told
_EXHAUSTED = 'RESOURCE_EXHAUSTED'
# Of what the compiler says of a program that does not fit, in one of two ways.
_USED = re.compile(
  r'(?:Used |required for [\w ]+\()([\d.]+)([KMG]?)(?: of |\) exceeds available \w+ \()'
  r'([\d.]+)([KMG]?)'
)
_ALLOCATION = re.compile(
  r'Size: ([\d.]+[KMG]?).*?(?:Operator: op_name="([^"]*)".*?)?Shape: (\S+).*?'
  r'Allocation type: ([^\n]*)',
  re.DOTALL,
)
_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30}


@dataclasses.dataclass(frozen=True)
class Report:
  """Of one program; all of one chip and one run.

  Attributes:
    name: of the program.
    seconds: it took to compile.
    arguments: bytes by category.
    largest: arguments, the largest first: (name, bytes).
    hbm: bytes: arguments (as the compiler lays them out), outputs, aliased (outputs in the place of
      arguments), code; peak, the most that is held at once; and temporaries, what of the peak is
      none of the others. None where it does not fit.
    misfit: why it does not fit.
    model_flops, flops: without and with what is computed again.
    hbm_bytes: read and written.
    collectives: by kind.
    compiler_seconds: what libtpu thinks of its own instructions: loops counted as often as they
      run, collectives and Pallas kernels not.
    optimal_seconds: of its cost analysis, loops counted once; None where there is none.
    unknown_loops: whose number of turns depends on data: their body is counted once.
    roofline: seconds that arithmetic, HBM and the interconnect take, each alone.
    mfu_bound: model FLOPs utilisation if the slowest of the three were all that takes time.
  """

  name: str
  seconds: float
  arguments: Mapping[str, int]
  largest: tuple[tuple[str, int], ...]
  hbm: Mapping[str, int] | None = None
  misfit: str | None = None
  model_flops: float = 0.0
  flops: float = 0.0
  hbm_bytes: float = 0.0
  collectives: Mapping[str, Collective] = dataclasses.field(default_factory=dict)
  compiler_seconds: float | None = None
  optimal_seconds: float | None = None
  unknown_loops: int = 0
  roofline: Mapping[str, float] = dataclasses.field(default_factory=dict)
  mfu_bound: float = 0.0

  def to_json(self) -> dict[str, Any]:
    """JSON values."""
    return dataclasses.asdict(self)


def local_bytes(x: Any) -> int:
  """Of an array or shape on one device, without padding."""
  itemsize = 8 if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
  return math.prod(x.sharding.shard_shape(x.shape)) * itemsize


def arguments_of(args: Any) -> tuple[dict[str, int], tuple[tuple[str, int], ...]]:
  """Bytes of arguments by category, and the largest ones."""
  sizes: dict[str, int] = {}
  tensors = []
  for path, x in tree_leaves_with_path(args):
    name = keystr(path, simple=True, separator='/')
    size = local_bytes(x)
    kind = category(name)
    sizes[kind] = sizes.get(kind, 0) + size
    where = str(tuple(x.sharding.spec))
    tensors.append((f'{kind}: {name} {x.dtype}{list(x.shape)}, split {where}', size))
  tensors.sort(key=lambda named: -named[1])
  return sizes, tuple(tensors[:_LARGEST])


def category(name: str) -> str:
  """What an argument is, by its path: '0/params/readout/kernel'."""
  parts = name.split('/')
  for part, kind in (
    ('opt_state', 'optimizer'),
    ('lm', 'language model'),
    ('entity_vectors', 'entity table'),
    ('vectors', 'encoded catalogue'),
    ('params', 'trained parameters'),
  ):
    if part in parts and (kind != 'language model' or 'params' not in parts):
      return kind
  constants = {'log_popularity', 'user_states', 'histories', 'prefix', 'trie', 'bias', 'frozen'}
  return 'other constants' if constants & set(parts) else 'batch'


def is_out_of_memory(error: Exception) -> bool:
  """Whether the compiler gave up because of memory."""
  return _EXHAUSTED in str(error)


def misfit(
  error: Exception,
  largest: tuple[tuple[str, int], ...],
  values: Sequence[tuple[str, int]],
  chip: Chip,
) -> str:
  """What the compiler said of a program that does not fit, in short, and what helps.

  Args:
    error: the compiler's.
    largest: arguments.
    values: of `largest_values`, told where the compiler does not say what is large.
    chip: that is too small.
  """
  text = str(error)
  used = _USED.search(text)
  lines = []
  if used:
    need, room = (float(used[i]) * _UNITS[used[i + 1]] for i in (1, 3))
    lines.append(f'needs {need / 2**30:.2f} GiB of {room / 2**30:.2f} GiB of HBM')
  else:
    lines.append(f'more than {chip.hbm / 1e9:.0f} GB: {text.splitlines()[0][:200]}')
  allocations = _ALLOCATION.findall(text)[:_LARGEST]
  if allocations:
    lines.append('largest buffers:')
    for size, operator, shape, kind in allocations:
      lines.append(f'  {size:>8}  {shape.split("{")[0]}  {kind.strip()}  {operator}'.rstrip())
  else:
    lines.append('largest values on the way, of all chips together:')
    lines += [f'  {size / 2**20:>7,.0f}M  {name}' for name, size in values]
  lines.append('largest arguments:')
  lines += [f'  {size / 2**20:>7,.0f}M  {name}' for name, size in largest]
  lines.append(f'what helps: {knobs(largest, chip)}')
  return '\n'.join(lines)


def largest_values(jaxpr: Any) -> list[tuple[str, int]]:
  """The largest arrays that a program computes, before it is split: (shape and where, bytes)."""
  found: dict[str, int] = {}

  def walk(jaxpr: Any, path: str) -> None:
    for equation in jaxpr.eqns:
      name = equation.primitive.name
      for variable in equation.outvars:
        shape, dtype = getattr(variable.aval, 'shape', ()), getattr(variable.aval, 'dtype', None)
        if dtype is not None and not jnp.issubdtype(dtype, jax.dtypes.prng_key):
          size = math.prod(shape) * dtype.itemsize
          found[f'{dtype}{list(shape)} of {path}{name}'] = size
      for inner in core.jaxprs_in_params(equation.params):
        walk(inner, path if name in ('pjit', 'jit') else f'{path}{name}/')

  walk(jaxpr, '')
  return sorted(found.items(), key=lambda named: -named[1])[:_LARGEST]


def knobs(largest: tuple[tuple[str, int], ...], chip: Chip) -> str:
  """Settings that make a program smaller, those for its largest arguments first."""
  sizes: dict[str, int] = {}
  for name, size in largest:
    kind = name.partition(':')[0]
    sizes[kind] = sizes.get(kind, 0) + size
  advice = {
    'language model': 'a larger fsdp or tensor axis of train.mesh; train.lm.int8=True (half of it)',
    'optimizer': 'a larger fsdp axis of train.mesh',
    'trained parameters': 'a larger fsdp axis of train.mesh',
    'entity table': "train.sharding_rules without {'entities': None}; fewer columns",
    'other constants': "phase 1: false_negatives='batch', which needs no histories on the devices",
    'batch': 'a smaller train.batch_size',
  }
  # What a quarter of the chip holds is worth a word.
  first = [advice[kind] for kind, size in sizes.items() if kind in advice and size > chip.hbm / 4]
  rest = [
    "train.lm.remat='full' (and train.item_encoder.remat)",
    'train.accumulate_steps',
    'a smaller train.batch_size',
    "train.lm.attention='splash'",
    'more chips, or larger ones',
  ]
  return '; '.join(dict.fromkeys([*first, *rest]))


def complete(
  report: Report,
  *,
  memory: Any,
  cost: Mapping[str, float],
  costs: Costs,
  model_flops: float,
  flops: float,
  chip: Chip,
) -> Report:
  """The report of a program that fits.

  Args:
    report: what is known of it before.
    memory: `compiled.memory_analysis()`.
    cost: `compiled.cost_analysis()`.
    costs: of its text.
    model_flops, flops: of one chip.
    chip: for which it was compiled.
  """
  hbm = {
    'arguments': memory.argument_size_in_bytes,
    'outputs': memory.output_size_in_bytes,
    'aliased': memory.alias_size_in_bytes,
    'code': memory.generated_code_size_in_bytes,
    'peak': memory.peak_memory_in_bytes,
  }
  others = hbm['arguments'] + hbm['outputs'] - hbm['aliased']
  hbm['temporaries'] = max(0, hbm['peak'] - others)
  roofline = {
    'arithmetic': flops / chip.flops,
    'HBM': costs.hbm_bytes / chip.hbm_bandwidth,
    'interconnect': sum(x.sent for x in costs.collectives.values()) / chip.ici_bandwidth,
  }
  return dataclasses.replace(
    report,
    hbm=hbm,
    model_flops=model_flops,
    flops=flops,
    hbm_bytes=costs.hbm_bytes,
    collectives=costs.collectives,
    compiler_seconds=costs.cycles / chip.cycles if costs.cycles else None,
    # Negative where it does not know an instruction, as it does not know most collectives.
    optimal_seconds=optimal if (optimal := cost.get('optimal_seconds', -1.0)) >= 0 else None,
    unknown_loops=costs.unknown_loops,
    roofline=roofline,
    mfu_bound=model_flops / chip.flops / max(*roofline.values(), 1e-12),
  )


def text_of(report: Report, chip: Chip) -> str:
  """A report as people read it."""
  lines = [f'{report.name}  (compiled in {report.seconds:.0f} s)']
  parts = ', '.join(f'{kind} {_gb(size)}' for kind, size in report.arguments.items())
  lines.append(f'  arguments      {parts}')
  if report.hbm is None:
    lines.append('  DOES NOT FIT   ' + (report.misfit or '').replace('\n', '\n                 '))
    return '\n'.join(lines)
  parts = ', '.join(f'{kind} {_gb(size)}' for kind, size in report.hbm.items())
  share = report.hbm['peak'] / chip.hbm
  lines.append(f'  HBM per chip   {parts}, {share:.0%} of {chip.hbm / 1e9:.0f} GB')
  flops, again = report.model_flops / 1e12, report.flops / 1e12
  lines.append(
    f'  FLOPs          {flops:.3g} T a chip, {again:.3g} T with what is computed again;'
    f' HBM traffic {_gb(report.hbm_bytes)}'
  )
  for kind, found in report.collectives.items():
    lines.append(
      f'  {kind:<18} {found.count:>7,} of {_gb(found.bytes)} in all, {_gb(found.sent)} sent'
    )
  if not report.collectives:
    lines.append('  collectives    none')
  times = ', '.join(f'{kind} {_ms(x)}' for kind, x in report.roofline.items())
  lines.append(f'  roofline       {times}: MFU at most {report.mfu_bound:.0%}')
  estimate = 'none' if report.compiler_seconds is None else _ms(report.compiler_seconds)
  optimal = 'none' if report.optimal_seconds is None else _ms(report.optimal_seconds)
  lines.append(
    f'  compiler says  {estimate} without collectives and kernels (its cost analysis, loops once:'
    f' {optimal})'
  )
  if report.unknown_loops:
    lines.append(f'  loops          {report.unknown_loops} of unknown length, counted once')
  return '\n'.join(lines)


def _gb(size: float) -> str:
  return f'{size / 1e9:.2f} GB' if size >= 1e7 else f'{size / 1e6:.2f} MB'


def _ms(seconds: float) -> str:
  return f'{seconds * 1e3:,.1f} ms'

"""What a compiled program does, read off its text: collectives, memory traffic, cycles.

XLA's own cost analysis counts the body of a loop once; here, everything counts as often as it runs.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence

COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
_BITS = {'pred': 8, 'token': 0, 'bf16': 16}
_ARRAY = re.compile(r'\b([a-z]+[0-9a-z]*)\[([\d,]*)\](?:\{([^{}]*)\})?')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (.*)$')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_OPCODE = re.compile(r'\s?([a-z][a-z0-9\-]*)\(')
# What moves nothing, or is counted where it is done.
_FREE = {
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call',
  'after-all', 'partition-id', 'replica-id', 'iota', 'opt-barrier', 'copy-done', 'async-done',
  'async-update',
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line: `%name = shape opcode(operands), attributes`."""

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  rest: str
  is_root: bool

  @functools.cached_property
  def bytes(self) -> int:
    """Of its result."""
    return shape_bytes(self.shape)

  @functools.cached_property
  def hbm_bytes(self) -> int:
    """Of its result, without what is in the memory of the core."""
    return shape_bytes(self.shape, hbm_only=True)

  def called(self, attribute: str) -> list[str]:
    """Computations that an attribute names."""
    found = re.search(rf'\b{attribute}=(?:%?([\w.\-]+)|\{{([^}}]*)\}})', self.rest)
    if not found:
      return []
    names = found[1] or found[2]
    return [name.strip().lstrip('%') for name in names.split(',')]


@dataclasses.dataclass
class Collective:
  """Collectives of a kind, of one chip and one run of the program.

  Attributes:
    count: how many are run.
    bytes: of what they give (all-gather: the whole; reduce-scatter: what went in).
    sent: bytes that a chip sends, if they go around a ring.
  """

  count: int = 0
  bytes: float = 0.0
  sent: float = 0.0


@dataclasses.dataclass
class Costs:
  """Of one chip and one run.

  Attributes:
    collectives: by kind.
    hbm_bytes: read from and written to HBM.
    cycles: the compiler's estimate, of the instructions for which it gives one.
    unknown_loops: loops whose number of turns is not in the text; they count once.
  """

  collectives: dict[str, Collective]
  hbm_bytes: float = 0.0
  cycles: float = 0.0
  unknown_loops: int = 0


def shape_bytes(shape: str, *, hbm_only: bool = False) -> int:
  """Bytes of all arrays of 'f32[2,3]{1,0:T(8,128)S(1)}' or of a tuple; S(1) is not HBM."""
  total = 0
  for kind, sizes, layout in _ARRAY.findall(shape):
    if hbm_only and re.search(r'S\([1-9]\)', layout):
      continue
    digits = re.search(r'\d+', kind)
    bits = _BITS.get(kind, int(digits[0]) if digits else 8)
    total += math.prod(int(x) for x in sizes.split(',') if x) * bits
  return total // 8


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Computations by name, and the name of the entry."""
  computations: dict[str, list[Instruction]] = {}
  current, entry = None, ''
  for line in text.splitlines():
    head = _COMPUTATION.match(line)
    if head:
      current = computations.setdefault(head[2], [])
      entry = head[2] if head[1] else entry
    elif line.startswith('}'):
      current = None
    elif current is not None and (found := _INSTRUCTION.match(line)):
      current.append(_instruction(found[2], found[3], bool(found[1])))
  return computations, entry


def _instruction(name: str, line: str, is_root: bool) -> Instruction:
  end = _closing(line, 0) + 1 if line.startswith('(') else line.index(' ')
  shape, line = line[:end], line[end:]
  opcode = _OPCODE.match(line)
  assert opcode, line
  start = opcode.end() - 1
  stop = _closing(line, start)
  operands = tuple(re.findall(r'%([\w.\-]+)', line[start:stop]))
  if opcode[1] in ('constant', 'parameter'):
    operands = (line[start + 1 : stop],)
  return Instruction(name, shape, opcode[1], operands, line[stop + 1 :], is_root)


def _closing(line: str, start: int) -> int:
  """Where the bracket that opens at `start` closes."""
  depth = 0
  for i in range(start, len(line)):
    depth += (line[i] == '(') - (line[i] == ')')
    if not depth:
      return i
  raise ValueError(f'no closing bracket: {line[:200]}')


def costs(text: str, num_devices: int) -> Costs:
  """Of a compiled program: `compiled.as_text()`."""
  computations, entry = parse(text)
  total = Costs(collections.defaultdict(Collective))

  def run(name: str, times: int, is_fused: bool = False) -> None:
    instructions = computations[name]
    by_name = {x.name: x for x in instructions}
    for x in instructions:
      for callee, turns in _callees(x, computations, total):
        run(callee, times * turns, is_fused or x.opcode in ('fusion', 'async-start'))
      if _is_collective(x):
        kind = total.collectives[x.opcode.removesuffix('-start')]
        _add_collective(kind, x, by_name, times, num_devices)
      if not is_fused:  # what is inside of it, its one line tells
        total.cycles += times * _cycles(x)
        total.hbm_bytes += times * _traffic(x, by_name, computations)

  run(entry, 1)
  total.collectives = {
    name: total.collectives[name] for name in COLLECTIVES if name in total.collectives
  }
  return total


def _callees(
  x: Instruction, computations: dict[str, list[Instruction]], total: Costs
) -> Iterator[tuple[str, int]]:
  """What an instruction runs, and how often."""
  if x.opcode == 'while':
    turns = _turns(x, computations)
    total.unknown_loops += turns is None
    yield x.called('body')[0], turns or 1
  elif x.opcode == 'conditional':
    # One of them is run: the one that moves most stands for it.
    branches = x.called('branch_computations') or [
      *x.called('true_computation'), *x.called('false_computation')
    ]  # fmt: skip
    yield max(branches, key=lambda name: len(computations[name])), 1
  elif x.opcode == 'call':
    yield x.called('to_apply')[0], 1
  elif x.opcode in ('fusion', 'async-start') and x.called('calls'):
    inside = computations[x.called('calls')[0]]
    if any(_is_collective(y) for y in inside) and not _is_later_part(inside):
      yield x.called('calls')[0], 1


def _is_collective(x: Instruction) -> bool:
  return x.opcode.removesuffix('-start') in COLLECTIVES


def _is_part(inside: Sequence[Instruction]) -> bool:
  """Whether a fusion is a part of a collective that libtpu for v5e spreads over several.

  The first begins it, others go on with it beside their own work, the last waits for it. All name
  it, by the same `chain_id`, and hand on its buffers.
  """
  return any(_is_collective(x) and 'chain_id=' in x.rest for x in inside)


def _is_later_part(inside: Sequence[Instruction]) -> bool:
  return _is_part(inside) and not any('"AsyncCollectiveStart"' in x.rest for x in inside)


def _turns(x: Instruction, computations: dict[str, list[Instruction]]) -> int | None:
  """How often a loop runs: what the compiler notes, or `i < N` in its condition, i from 0."""
  noted = re.search(r'known_trip_count\W+n\W+(\d+)', x.rest)
  if noted:
    return int(noted[1])
  condition = computations[x.called('condition')[0]]
  by_name = {y.name: y for y in condition}
  root = next(y for y in condition if y.is_root)
  if root.opcode == 'fusion':  # of a comparison of the same operands
    inside = computations[root.called('calls')[0]]
    compare = next(y for y in inside if y.is_root)
  else:
    compare = root
  if compare.opcode != 'compare' or 'direction=LT' not in compare.rest:
    return None
  limits = [by_name[name] for name in root.operands if name in by_name]
  numbers = [int(y.operands[0]) for y in limits if y.opcode == 'constant']
  return numbers[0] if len(numbers) == 1 else None


def _add_collective(
  kind: Collective, x: Instruction, by_name: dict[str, Instruction], times: int, devices: int
) -> None:
  group = group_size(x.rest, devices)
  given = sum(by_name[name].bytes for name in x.operands if name in by_name)
  name = x.opcode.removesuffix('-start')
  whole = given * group if name == 'all-gather' else given
  share = (group - 1) / group
  sent = {
    'all-reduce': 2 * share * given,
    'all-gather': share * whole,
    'reduce-scatter': share * given,
    'all-to-all': share * given,
    'collective-permute': given,
  }[name]
  kind.count += times
  kind.bytes += times * whole
  kind.sent += times * sent


def group_size(attributes: str, devices: int) -> int:
  """How many chips take part: replica_groups={{0,1},{2,3}}, [2,2]<=[4], or mesh['a'=2,..] {'a'}."""
  named = re.search(r'replica_groups=mesh\[(.*?)\].*?\{([^}]*)\}', attributes)
  if named:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    # Of 'x':(2)4, a part of an axis: 4 of it.
    parts = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named[2])
    return math.prod(int(part or sizes[axis]) for axis, _, part in parts)
  listed = re.search(r'replica_groups=\[(\d+),(\d+)\]', attributes)
  if listed:
    return int(listed[2])
  groups = re.search(r'replica_groups=\{\{([\d,]*)\}', attributes)
  return len(groups[1].split(',')) if groups and groups[1] else devices


def _cycles(x: Instruction) -> int:
  found = re.search(r'"estimated_cycles":"(\d+)"', x.rest)
  return int(found[1]) if found else 0


def _traffic(
  x: Instruction, by_name: dict[str, Instruction], computations: dict[str, list[Instruction]]
) -> float:
  """HBM bytes read and written: of a slice of a large array, the slice."""
  if x.opcode in _FREE or x.opcode.endswith('-done'):
    return 0
  operands = [by_name[name] for name in x.operands if name in by_name]
  if x.opcode in ('dynamic-slice', 'gather', 'slice'):
    return 2 * x.hbm_bytes
  if x.opcode in ('dynamic-update-slice', 'scatter'):
    return 2 * operands[-1 if x.opcode == 'scatter' else 1].hbm_bytes
  if x.opcode.endswith('-start') and x.opcode != 'async-start':
    return 2 * sum(y.hbm_bytes for y in operands)
  if x.opcode != 'fusion':
    return x.hbm_bytes + sum(y.hbm_bytes for y in operands)
  inside = computations[x.called('calls')[0]]
  total = float(_written(x, inside))
  handed_on: set[str] = set()
  if _is_later_part(inside):
    root = next(y for y in inside if y.is_root)
    handed_on = {name for y in (root, *filter(_is_collective, inside)) for name in y.operands}
  for y in inside:
    if y.opcode == 'parameter' and y.name not in handed_on:
      size = operands[int(y.operands[0])].hbm_bytes
      total += _read(y, inside, size, computations)
  return total


def _read(
  parameter: Instruction,
  inside: Sequence[Instruction],
  size: int,
  computations: dict[str, list[Instruction]],
) -> int:
  """Of a parameter of `size` bytes of a fusion: all of it, or the slices that are taken."""
  names = {parameter.name}  # through changes of its shape alone
  for x in inside:
    if x.opcode == 'bitcast' and x.operands[0] in names:
      names.add(x.name)
  users = [x for x in inside if names & {*x.operands} and x.opcode != 'bitcast']
  if users and all(x.opcode == 'dynamic-update-slice' for x in users):
    return 0  # what is written into; of the written part, see `_written`
  total = 0
  for x in users:
    if x.opcode in ('dynamic-slice', 'gather', 'slice'):
      total += x.bytes
    elif x.opcode == 'fusion':
      nested = computations[x.called('calls')[0]]
      for y in nested:
        if y.opcode == 'parameter' and x.operands[int(y.operands[0])] in names:
          total += _read(y, nested, size, computations)
    else:
      return size
  return min(size, total)


def _written(fusion: Instruction, inside: Sequence[Instruction]) -> int:
  by_name = {x.name: x for x in inside}
  root = next(x for x in inside if x.is_root)
  if _is_part(inside):  # of it, what is not an operand that is handed on
    aliased = re.search(r'output_to_operand_aliasing=\{(.*?\))\}', fusion.rest)
    same = re.findall(r'\{(\d*)\}: \(', aliased[1] if aliased else '')
    arrays = [] if '' in same else _ARRAY.finditer(fusion.shape)
    return sum(
      shape_bytes(array[0], hbm_only=True) for i, array in enumerate(arrays) if str(i) not in same
    )
  while root.opcode == 'bitcast':
    root = by_name[root.operands[0]]
  if root.opcode == 'dynamic-update-slice':
    return min(fusion.hbm_bytes, 2 * by_name[root.operands[1]].bytes)
  return fusion.hbm_bytes

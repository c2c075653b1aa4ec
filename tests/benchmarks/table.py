"""Rows of the table of benchmarks, and the page they are shown on."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from paired import Measured, ratios

ROOT = Path(__file__).parents[2]
PAGE = ROOT / 'docs' / 'benchmarks.md'
_BEGIN, _END = '<!-- the table: make bench -->', '<!-- end of the table -->'


class Row(NamedTuple):
  """One line of the table.

  Attributes:
    name: what is done, with its shapes and precision.
    unit: of `ours` and `peer`.
    ours, peer: medians; None: there is nothing to compare with.
    ratio: how many times better ours is, the median over rounds, with the least and the most.
    goal: the ratio that is wanted; None: none.
    fraction_of_peak: FLOP/s of ours over the best that a matrix product of that precision reached
      in the same run (0 to 1).
    memory_ratio: peak memory of ours over the peer's, while running.
    note: anything a reader must know.
  """

  name: str
  unit: str
  ours: float
  peer: float | None = None
  ratio: tuple[float, float, float] | None = None
  goal: float | None = None
  fraction_of_peak: float | None = None
  memory_ratio: float | None = None
  note: str = ''


def timed(
  name: str,
  found: Mapping[str, Measured],
  *,
  goal: float | None = None,
  peak: float | None = None,
  note: str = '',
) -> Row:
  """A row of seconds from sides 'ours' and 'peer'; `ours` may return 'flops', `peak` is FLOP/s."""
  ours, peer = found['ours'], found['peer']
  pairs = ratios(peer, ours)
  flops = ours.numbers.get('flops')
  return Row(
    name,
    's',
    ours.median,
    peer.median,
    (statistics.median(pairs), min(pairs), max(pairs)),
    goal,
    fraction_of_peak=flops / ours.median / peak if flops and peak else None,
    memory_ratio=ours.step_gib / peer.step_gib,
    note=note,
  )


def machine() -> dict[str, str]:
  libraries = ('jax', 'jaxlib', 'torch', 'transformers', 'implicit', 'numpy')
  commit = subprocess.run(
    ['git', 'describe', '--always', '--dirty'], capture_output=True, text=True, cwd=ROOT
  )
  models = [
    line.split(':')[1].strip()
    for line in Path('/proc/cpuinfo').read_text().splitlines()
    if line.startswith('model name')
  ]
  return {
    'cpu': f'{models[0] if models else platform.machine()}, {os.cpu_count()} threads',
    'commit': commit.stdout.strip(),
    'date': time.strftime('%Y-%m-%d'),
    **{name: version(name) for name in libraries},
  }


def cells(row: Row) -> str:
  def number(value: float | None, pattern: str = '{:.3g}') -> str:
    return '' if value is None else pattern.format(value)

  ratio = ''
  if row.ratio:
    ratio = '{:.3g} ({:.3g} to {:.3g})'.format(*row.ratio)
    if row.goal is not None and row.ratio[0] >= row.goal:
      ratio = f'**{ratio}**'
  return ' | '.join(
    [
      f'| {row.name}',
      f'{number(row.ours)} {row.unit}',
      f'{number(row.peer)} {row.unit}' if row.peer is not None else '',
      ratio,
      number(row.goal),
      number(row.memory_ratio, '{:.2f}'),
      number(row.fraction_of_peak, '{:.0%}'),
      f'{row.note} |',
    ]
  )


def write_page(rows: Sequence[Row]) -> None:
  """Puts the table between its two marks in docs/benchmarks.md; what a person wrote stays."""
  head = ['', 'ours', 'peer', 'times better', 'goal', 'memory, ours / peer', 'of peak', '']
  table = ['| ' + ' | '.join(head) + ' |', '|---' * len(head) + '|', *map(cells, rows)]
  facts = ', '.join(f'{name} {value}' for name, value in machine().items())
  page = PAGE.read_text()
  before, _, rest = page.partition(_BEGIN)
  _, _, after = rest.partition(_END)
  PAGE.write_text(f'{before}{_BEGIN}\n\n{facts}\n\n' + '\n'.join(table) + f'\n\n{_END}{after}')

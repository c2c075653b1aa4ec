"""`make bench`: ours against what people would use instead, in one run.

  python tests/benchmarks/bench.py [--only phase1 beam ...] [--rounds=7] [--output=runs/bench]
  python tests/benchmarks/bench.py --only suite     # the suite itself: only when it is named

Writes OUTPUT/bench.json after every row, with the seconds that each benchmark took, and, at the end
of a run of all of them, the table of docs/benchmarks.md. A run that was interrupted goes on with
the first benchmark that had not ended, if machine, libraries, rounds and commit are the same and
nothing is changed.

Each benchmark is a file beside this one, bench_NAME.py, with

  rows(rounds: int, peaks: Mapping[str, float]) -> Iterator[Row]

where `peaks` are FLOP/s of 'float32' and, on a CPU that multiplies it faster, 'bfloat16', measured
before all others; the last is the machine's best precision.
"""

import argparse
import importlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bench_peak
from paired import LEAST_ROUNDS
from table import Row, cells, machine, write_page

from ilm_jax.runtime.progress import duration

BENCHMARKS = ('start', 'ials', 'input', 'exact', 'beam', 'phase2', 'phase1')
_ONLY_WHEN_NAMED = ('suite',)  # a quarter of an hour of its own


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--only',
    nargs='+',
    choices=(*BENCHMARKS, *_ONLY_WHEN_NAMED),
    default=BENCHMARKS,
    help=f'by default all but {", ".join(_ONLY_WHEN_NAMED)}, which runs the tests: 15 minutes',
  )
  parser.add_argument(
    '--rounds',
    type=int,
    default=7,
    help=f'at most; {LEAST_ROUNDS} are enough where ratios are steady or rounds are long',
  )
  parser.add_argument('--output', type=Path, default=Path('runs/bench'))
  arguments = parser.parse_args()
  arguments.output.mkdir(parents=True, exist_ok=True)
  file = arguments.output / 'bench.json'
  start = time.monotonic()
  result = _interrupted(file, arguments.only, arguments.rounds) or _begin(arguments.rounds)
  _write(file, result)
  left = [name for name in arguments.only if name not in result['done']]
  for number, name in enumerate(left, start=1):
    print(f'[{number}/{len(left)}] {name}, {time.monotonic() - start:.0f} s', flush=True)
    begun = time.monotonic()
    rows = importlib.import_module(f'bench_{name}').rows(arguments.rounds, result['peaks'])
    for row in rows:
      _add(result, name, row)
      _write(file, result)
    result['done'].append(name)
    result['seconds'][name] = time.monotonic() - begun
    _write(file, result)
  print(', '.join(f'{name} {duration(x)}' for name, x in result['seconds'].items()), flush=True)
  if set(result['done']) >= set(BENCHMARKS):
    write_page([_row(each) for each in result['rows']])


def _begin(rounds: int) -> dict[str, Any]:
  start = time.monotonic()
  result = {'machine': machine(), 'rounds': rounds, 'peaks': {}, 'done': [], 'rows': []}
  for dtype, row in bench_peak.rows(rounds):
    _add(result, 'peak', row)
    result['peaks'][dtype] = max(row.ours, row.peer or 0.0) * 1e9
  result['seconds'] = {'peak': time.monotonic() - start}
  return result


def _interrupted(file: Path, asked: Sequence[str], rounds: int) -> dict[str, Any] | None:
  """The benchmarks that had ended, of a run that goes on; None: it begins."""
  if not file.exists():
    return None
  result = json.loads(file.read_text())
  here = machine()
  same = {**result['machine'], 'date': here['date']} == here and result['rounds'] == rounds
  if not same or here['commit'].endswith('-dirty') or set(asked) <= set(result['done']):
    return None
  ended = ('peak', *result['done'])
  result['rows'] = [row for row in result['rows'] if row['benchmark'] in ended]
  print(f'{file}: goes on; {", ".join(ended)} had ended', flush=True)
  return result


def _add(result: dict[str, Any], benchmark: str, row: Row) -> None:
  result['rows'].append({'benchmark': benchmark, **row._asdict()})
  print(cells(row), flush=True)


def _row(saved: dict[str, Any]) -> Row:
  return Row(**{name: value for name, value in saved.items() if name != 'benchmark'})


def _write(file: Path, result: dict[str, Any]) -> None:
  """All of it or nothing: a run may be stopped at any time."""
  made = file.with_suffix('.new')
  made.write_text(json.dumps(result, indent=2) + '\n')
  made.replace(file)


if __name__ == '__main__':
  main()

"""`make bench`: ours against what people would use instead, in one run.

  python tests/benchmarks/bench.py [--only phase1 beam ...] [--rounds=7] [--output=runs/bench]

Writes OUTPUT/bench.json after every row and, at the end of a run of all of them, the table of
docs/benchmarks.md. Each benchmark is a file beside this one, bench_NAME.py, with

  rows(rounds: int, peaks: Mapping[str, float]) -> Iterator[Row]

where `peaks` are FLOP/s of 'float32' and, on a CPU that multiplies it faster, 'bfloat16', measured
before all others; the last is the machine's best precision.
"""

import argparse
import importlib
import json
import time
from pathlib import Path

import bench_peak
from table import Row, cells, machine, write_page

BENCHMARKS = ('start', 'ials', 'input', 'exact', 'beam', 'phase2', 'phase1')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--only', nargs='+', choices=BENCHMARKS, default=BENCHMARKS)
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--output', type=Path, default=Path('runs/bench'))
  arguments = parser.parse_args()
  arguments.output.mkdir(parents=True, exist_ok=True)
  start = time.monotonic()
  rows: list[Row] = []

  def add(row: Row) -> None:
    rows.append(row)
    print(cells(row), flush=True)
    result = {'machine': machine(), 'rows': [row._asdict() for row in rows]}
    (arguments.output / 'bench.json').write_text(json.dumps(result, indent=2) + '\n')

  peaks = {}
  for dtype, row in bench_peak.rows(arguments.rounds):
    add(row)
    peaks[dtype] = max(row.ours, row.peer or 0.0) * 1e9
  for number, name in enumerate(arguments.only, start=1):
    print(f'[{number}/{len(arguments.only)}] {name}, {time.monotonic() - start:.0f} s', flush=True)
    for row in importlib.import_module(f'bench_{name}').rows(arguments.rounds, peaks):
      add(row)
  if set(arguments.only) == set(BENCHMARKS):
    write_page(rows)


if __name__ == '__main__':
  main()

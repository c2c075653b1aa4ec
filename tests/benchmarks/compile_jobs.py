"""The tables of docs/scale.md: jobs compiled for their chips and for others, and weak scaling.

  python tests/benchmarks/compile_jobs.py OUT [jobs] [chips] [weak]

It needs libtpu and no TPU. What is in OUT already is not compiled again: run it again after an
interruption.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

JOBS = {
  'phase2_gemma2_2b': 'v5e:2x4',
  'phase2_gemma3_4b': 'v5e:4x4',
  'phase2_gemma3_12b': 'v5e:4x8',
  'phase2_gemma3_27b': 'v5e:16x16',
  'phase1_bert8_10m': 'v5e:4x4',
}
PHASE1 = ('train item_text', 'train user_item', 'evaluate item_text', 'evaluate user_item')
PHASE2 = (
  'train sequential_seen_title',
  'train item_sequence',
  'evaluate sequential_seen_title',
  'encode catalogue',
  'recommend readout',
  'recommend beam',
)
CHIPS = ('v5e:4x4', 'v5p:2x2x4', 'v6e:4x4', 'tpu7x:2x2x2')  # of 16 devices each
# 16 rows a chip; parameters are split over 16 chips, and what is more of them are copies.
WEAK = {'v5e:4x4': 256, 'v5e:8x8': 1024, 'v5e:16x16': 4096, 'v5p:8x8x16': 16_384}
WEAK_FLAGS = ['--gin_file=jobs/phase2_gemma3_4b.gin', "--mesh={'data': -1, 'fsdp': 16}"]


def main() -> None:
  out = Path(sys.argv[1])
  out.mkdir(parents=True, exist_ok=True)
  wanted = sys.argv[2:] or ['jobs', 'chips', 'weak']
  if 'jobs' in wanted:
    rows = []
    for job, topology in JOBS.items():
      for program in PHASE1 if job.startswith('phase1') else PHASE2:
        file = out / f'{job}-{program.replace(" ", "-")}.json'
        found = compiled(file, topology, [f'--gin_file=jobs/{job}.gin', f'--programs={program}'])
        rows.append([job, topology, *cells(found)])
    show(['job', 'chips', *HEAD], rows)
  if 'chips' in wanted:
    rows = []
    for topology in CHIPS:
      for program in ('train sequential_seen_title', PHASE2[2], 'recommend beam'):
        name = f'chips-{topology.replace(":", "-")}-{program.replace(" ", "-")}.json'
        flags = ['--gin_file=jobs/phase2_gemma3_4b.gin', f'--programs={program}']
        rows.append([topology, *cells(compiled(out / name, topology, flags))])
    show(['chips', *HEAD], rows)
  if 'weak' in wanted:
    rows = []
    for topology, batch in WEAK.items():
      for program in PHASE2[:2]:
        name = f'weak-{topology.replace(":", "-")}-{program.replace(" ", "-")}.json'
        flags = [*WEAK_FLAGS, f'--batch_size={batch}', f'--programs={program}']
        found = compiled(out / name, topology, flags)
        rows.append([topology, str(found['chips']), *cells(found)])
    show(['topology', 'chips', *HEAD], rows)


def compiled(file: Path, topology: str, flags: Sequence[str]) -> dict[str, Any]:
  """What `ilm compile` says, of an earlier call if there was one."""
  if not file.exists():
    command = [sys.executable, '-m', 'ilm_jax.main', 'compile', f'--topology={topology}']
    # A program that does not fit is told in the file as well.
    subprocess.run([*command, *flags, f'--json={file}'], check=False)
  return json.loads(file.read_text())


HEAD = [
  'program', 'arguments', 'temporaries', 'peak', 'TFLOPs', 'HBM traffic', 'sent',
  'arithmetic / HBM / ICI', 'compiler', 'MFU at most',
]  # fmt: skip


def cells(found: dict[str, Any]) -> list[str]:
  """A row of the one program of a file: of a chip, in GB."""
  (program,) = found['programs']
  hbm = program['hbm']
  if hbm is None:
    return [program['name'], program['misfit'].splitlines()[0], *[''] * (len(HEAD) - 2)]
  sent = sum(x['sent'] for x in program['collectives'].values())
  estimate = program['compiler_seconds']
  return [
    program['name'],
    *(f'{hbm[kind] / 1e9:.2f}' for kind in ('arguments', 'temporaries', 'peak')),
    f'{program["model_flops"] / 1e12:.4g}',
    f'{program["hbm_bytes"] / 1e9:,.1f}',
    f'{sent / 1e9:,.2f}',
    ' / '.join(f'{x * 1e3:,.0f}' for x in program['roofline'].values()) + ' ms',
    '' if estimate is None else f'{estimate * 1e3:,.0f} ms',
    f'{program["mfu_bound"]:.0%}',
  ]


def show(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
  for row in (head, ['---'] * len(head), *rows):
    print('| ' + ' | '.join(row) + ' |')


if __name__ == '__main__':
  main()

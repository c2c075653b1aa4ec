"""Phase 2 on MovieLens-100K: what the item encoder and phase 1 are worth to the readout.

  python tests/benchmarks/phase2_ml100k.py [--output=runs/phase2_comparison] [--seeds 2 3 4]

The paper's order of item encoders, as a hypothesis: an MLP, a Q-Former as it is initialised
(`rand`), the same from phase 1 on item texts (`it`), and with user-item pairs (`it_ui`); and the
shipped one, which passes the CF vector by (`it_ui_skip`). Each sees the same 150 batches of
histories, by the readout alone. A seed decides the parameters, the order of examples and phase 1;
the data are the same. Seed 0 is what the settings were chosen on.

Test items of all users, seen items removed, the last checkpoint. Intervals are over users, of whom
each counts with the mean over seeds; what seeds alone change is told beside it. Interrupted and run
again, it goes on. About an hour and a half on two cores.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

PHASE1 = {'it': ('phase1_ml100k_it', 40), 'it_ui': ('phase1_ml100k', 80)}  # job, steps
MLP = ['--gin_file=architectures/soft_tokens_mlp.gin', '--gin_file=runs/phase2_ml100k.gin']
QFORMER = ['--gin_file=jobs/phase2_ml100k.gin', '--gin.SKIP=False']
# Name -> flags, and the phase 1 that its encoder comes from.
ENCODERS = {
  'mlp': (MLP, None),
  'rand': (QFORMER, None),
  'it': (QFORMER, 'it'),
  'it_ui': (QFORMER, 'it_ui'),
  'it_ui_skip': ([QFORMER[0]], 'it_ui'),
}
STEPS = 150
REFERENCES = ('popularity', 'itemknn_recency', 'ials_recency')
COMPARED = (
  ('rand', 'mlp'),
  ('it', 'mlp'),
  ('it_ui', 'mlp'),
  ('it', 'rand'),
  ('it_ui', 'rand'),
  ('it_ui', 'it'),
  ('it_ui_skip', 'it_ui'),
  ('it_ui_skip', 'mlp'),
  *(('it_ui_skip', name) for name in REFERENCES),
)
METRICS = ('HR@10', 'NDCG@10', 'MRR', 'rank_pct')


def ilm(*flags: str) -> None:
  subprocess.run([sys.executable, '-m', 'ilm_jax.main', *flags], check=True)


def train_all(output: Path, seeds: list[int]) -> None:
  data = output / 'ml100k'
  if not data.exists():
    ilm('prepare', '--gin_file=jobs/prepare_ml100k.gin', f'--gin.OUTPUT={data}')
  for seed in seeds:
    common = [f'--gin.DATA={data}', f'--gin.SEED={seed}', '--gin.NUM_QUERIES=1']
    for name, (job, steps) in PHASE1.items():
      run = output / f'phase1_{name}_{seed}'
      ilm('train', f'--gin_file=jobs/{job}.gin', f'--gin.MODEL_DIR={run}', *common, *every(steps))
    for name, (flags, phase1) in ENCODERS.items():
      run = output / f'{name}_{seed}'
      before = [f'--gin.PHASE1={output / f"phase1_{phase1}_{seed}"}'] if phase1 else []
      schedule = "--gin.SCHEDULE=['item_sequence']"
      ilm('train', *flags, f'--gin.MODEL_DIR={run}', *common, *before, schedule, *every(STEPS))
      if not (run / 'evaluation_test').exists():
        wanted = ["--methods=['readout']", "--conditions=['own']", '--fields=[]', '--max_texts=1']
        ilm('evaluate', f'--model_dir={run}', f'--name={name}', *wanted)


def every(steps: int) -> list[str]:
  """Evaluated and saved once, at the end: nothing is selected."""
  return [f'--gin.{name}={steps}' for name in ('TOTAL_STEPS', 'EVAL_EVERY', 'SAVE_EVERY')]


def report(output: Path, seeds: list[int]) -> str:
  from ilm_jax.evaluation.results import Results, markdown
  from ilm_jax.metrics.ranking import bootstrap_intervals

  found = {}  # name -> [seeds, users, metrics]
  for name in ENCODERS:
    results = [Results.load(output / f'{name}_{seed}' / 'evaluation_test') for seed in seeds]
    rows = [x.row(method='readout', condition='own', seen='removed') for x in results]
    assert all((row.users == rows[0].users).all() for row in rows)
    found[name] = [np.stack([row.metrics[m] for m in METRICS], axis=1) for row in rows]
    for reference in REFERENCES:
      row = results[0].row(method=reference, seen='removed')
      found[reference] = [np.stack([row.of(rows[0].users)[m] for m in METRICS], axis=1)]

  def line(name: str, values: list[np.ndarray]) -> list[str]:
    intervals = bootstrap_intervals(np.mean(values, axis=0))
    of_seeds = ' '.join(f'{x.mean(axis=0)[0]:.4f}' for x in values)
    return [name, *map(str, intervals), of_seeds]

  head = ['', *METRICS, 'HR@10 of each seed']
  rows = [line(name, values) for name, values in found.items()]
  pairs = []
  for a, b in COMPARED:
    others = found[b] * len(seeds) if len(found[b]) == 1 else found[b]
    pairs.append(line(f'{a} - {b}', [x - y for x, y in zip(found[a], others)]))
  users = len(found['mlp'][0])
  return (
    f'MovieLens-100K, test items of {users} users, {STEPS} steps, seeds {seeds}.\n\n'
    f'{markdown([head, *rows])}\n\nPaired by user and seed:\n\n{markdown([head, *pairs])}\n'
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--output', type=Path, default=Path('runs/phase2_comparison'))
  parser.add_argument('--seeds', type=int, nargs='+', default=[2, 3, 4])
  arguments = parser.parse_args()
  train_all(arguments.output, arguments.seeds)
  text = report(arguments.output, arguments.seeds)
  (arguments.output / 'report.txt').write_text(text)
  print(text)


if __name__ == '__main__':
  main()

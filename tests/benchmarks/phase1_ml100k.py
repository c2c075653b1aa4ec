"""Phase 1 on MovieLens-100K: IT, IT-II and IT-UI, three seeds, against closed-form maps.

  python tests/benchmarks/phase1_ml100k.py [--output=runs/phase1_comparison] [--seeds 2 3 4]

For each seed: prepares the data (the seed decides which tenth of the items is held out), trains the
three shipped jobs with that seed, and evaluates the last checkpoint of each on the held-out items,
whose texts no training step has seen. Seeds 0 and 1 are what the jobs' settings were chosen on, so
they are not among the defaults. Ridge and kernel ridge (item_text_retrieval_baselines.py) are
fitted and asked on the same items. Interrupted and run again, it goes on; finished runs are only
evaluated.

Writes OUTPUT/report.txt and OUTPUT/curves.png. An hour or more on two cores.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
from item_text_retrieval_baselines import item_inputs, item_texts, kernel_ridge

JOBS = {'it': 'phase1_ml100k_it', 'it_ii': 'phase1_ml100k_it_ii', 'it_ui': 'phase1_ml100k'}
MEASURED = (
  'item_text/itg/perplexity',
  'item_text/itg/perplexity/shuffled',
  'user_item/ui/gain',
  'item_item/ii/gain',
)
RETRIEVAL = ('R@1', 'R@5', 'R@10', 'rank')
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, n - 1 degrees of freedom
COMPARED = (
  ('it', 'ridge'),
  ('it_ii', 'ridge'),
  ('it_ui', 'ridge'),
  ('it', 'kernel'),
  ('it_ui', 'kernel'),
  ('it_ii', 'it'),
  ('it_ui', 'it'),
  ('it_ui', 'it_ii'),
)


def ilm(*flags: str) -> None:
  subprocess.run([sys.executable, '-m', 'ilm_jax.main', *flags], check=True)


def train_all(output: Path, seeds: list[int]) -> None:
  for seed in seeds:
    data = output / f'data_{seed}'
    if not data.exists():
      gin = [f'--gin.OUTPUT={data}', f'--gin.SEED={seed}']
      ilm('prepare', '--gin_file=jobs/prepare_ml100k.gin', *gin)
    for name in JOBS:
      ilm('train', *job_flags(output, name, seed))


def job_flags(output: Path, name: str, seed: int) -> list[str]:
  return [
    f'--gin_file=jobs/{JOBS[name]}.gin',
    f'--gin.MODEL_DIR={output / f"{name}_{seed}"}',
    f'--gin.DATA={output / f"data_{seed}"}',
    f'--gin.SEED={seed}',
  ]


def evaluate_run(output: Path, name: str, seed: int):
  """Returns retrieval by direction, with a rank for each held-out item, and all metrics."""
  import jax

  from ilm_jax.checkpoints.manager import restore_params
  from ilm_jax.phases.item_text import ItemTextPhase
  from ilm_jax.phases.settings import restore_phase
  from ilm_jax.runtime import sharding

  model_dir = output / f'{name}_{seed}'
  mesh, rules = sharding.make_mesh({'data': -1}), sharding.DEFAULT_RULES
  phase = restore_phase(model_dir, mesh, rules)
  assert isinstance(phase, ItemTextPhase)
  with sharding.use_mesh(mesh, rules):
    like = sharding.abstract_init(phase.init, mesh, rules, jax.random.key(0))
    params = restore_params(model_dir, like, identity=phase.identity)
    frozen = sharding.place_constants(phase.frozen, mesh, rules)
    return phase.evaluate_items(params, frozen)[0], phase.evaluate(params, frozen)


def evaluate_baselines(output: Path, seed: int):
  """Returns retrieval by direction of ridge and kernel ridge, of unit vectors."""
  from ilm_jax.cf.linear_map import fit_ridge
  from ilm_jax.data.prepared_records import load_prepared
  from ilm_jax.metrics.retrieval import retrieval_from_features
  from ilm_jax.metrics.sentence_embedding import SentenceEmbedder

  prepared = load_prepared(output / f'data_{seed}')
  heldout, texts = prepared.heldout_items, item_texts(prepared)['title. genres']
  vectors = item_inputs(prepared)['unit vectors']
  embeddings = SentenceEmbedder('minilm').embed(texts).astype(np.float64)
  ridge = fit_ridge(vectors[~heldout], embeddings[~heldout])
  predictions = {
    'ridge': ridge.predict(vectors),
    'kernel': kernel_ridge(vectors, embeddings, ~heldout),
  }
  same = np.array(texts)[heldout]
  return {
    name: retrieval_from_features(
      ridge.directions(predicted[heldout]), ridge.directions(embeddings[heldout]), same=same
    )
    for name, predicted in predictions.items()
  }


def columns_of(ways) -> dict[str, np.ndarray]:
  """'i2t R@1' and so on -> one value for each held-out item."""
  short = {'item_to_text': 'i2t', 'text_to_item': 't2i'}
  return {
    f'{short[way]} {name}': result.metrics[name]
    for way, result in ways.items()
    for name in RETRIEVAL
  }


def spread(values: list[float]) -> str:
  """Mean and 95 % t interval over seeds."""
  half = T_95.get(len(values), np.nan) * np.std(values, ddof=1) / np.sqrt(len(values))
  return f'{np.mean(values):.3f} +- {half:.3f}'


def report(output: Path, seeds: list[int]) -> str:
  from ilm_jax.metrics.ranking import bootstrap_interval, paired_bootstrap

  items: dict[str, dict[str, list[np.ndarray]]] = {}
  scalars: dict[str, dict[str, list[float]]] = {}
  chance: dict[str, list[float]] = {}

  def note(name, ways):
    for column, values in columns_of(ways).items():
      items.setdefault(name, {}).setdefault(column, []).append(values)

  for seed in seeds:
    for name, ways in evaluate_baselines(output, seed).items():
      note(name, ways)
    for name in JOBS:
      ways, metrics = evaluate_run(output, name, seed)
      note(name, ways)
      kept = scalars.setdefault(name, {})
      own, shuffled = (metrics[metric] for metric in MEASURED[:2])
      metrics['item_text/itg/gain over shuffled'] = np.log(shuffled / own)
      for metric in (*MEASURED, 'item_text/itg/gain over shuffled'):
        kept.setdefault(metric, []).append(metrics[metric])
    for metric in ('user_item/raw_cf/gain', 'item_item/raw_cf/gain'):  # of the data, not the run
      scalars.setdefault('raw vectors', {}).setdefault(metric, []).append(metrics[metric])
    for way, result in ways.items():
      for name in RETRIEVAL:
        label = {'item_to_text': 'i2t', 'text_to_item': 't2i'}[way]
        chance.setdefault(f'{label} {name}', []).append(result.chance[name])

  joined = {
    name: {column: np.concatenate(values) for column, values in columns.items()}
    for name, columns in items.items()
  }
  columns = list(joined['it'])
  count = len(joined['it'][columns[0]])
  lines = [
    f'MovieLens-100K, phase 1, seeds {seeds}: {count} held-out items in all, the last checkpoints.',
    'Retrieval among the held-out items of a seed; mean [95 % bootstrap over items].',
    '',
    ' ' * 18 + ''.join(f'{column:<27}' for column in columns),
    f'{"chance":<18}' + ''.join(f'{np.mean(chance[column]):<27.3f}' for column in columns),
  ]
  for name, values in joined.items():
    cells = [bootstrap_interval(values[column]) for column in columns]
    cells = [f'{x.mean:.3f} [{x.low:.3f}, {x.high:.3f}]' for x in cells]
    lines.append(f'{name:<18}' + ''.join(f'{cell:<27}' for cell in cells))
  lines += ['', 'Differences, paired by item; * where the interval excludes 0:']
  for better, other in COMPARED:
    cells = []
    for column in columns:
      x = paired_bootstrap(joined[better][column], joined[other][column])
      star = '*' if x.low > 0 or x.high < 0 else ''
      cells.append(f'{x.mean:+.3f} [{x.low:+.3f}, {x.high:+.3f}]{star}')
    lines.append(f'{better + " - " + other:<18}' + ''.join(f'{cell:<27}' for cell in cells))
  lines += ['', f'Mean +- 95 % t interval over {len(seeds)} seeds:']
  for name, values in scalars.items():
    lines += [f'  {name:<12} {metric:<34} {spread(v)}' for metric, v in values.items()]
  lines += ['', 'Differences, paired by seed, mean +- 95 % t interval:']
  for better, other in (('it_ii', 'it'), ('it_ui', 'it'), ('it_ui', 'it_ii')):
    for metric, values in scalars[better].items():
      difference = np.subtract(values, scalars[other][metric]).tolist()
      lines.append(f'  {better + " - " + other:<14} {metric:<34} {spread(difference)}')
  return '\n'.join(line.rstrip() for line in lines) + '\n'


def plot(output: Path, seeds: list[int]) -> None:
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  from ilm_jax.runtime.metric_log import read_jsonl

  panels = {
    'item_text/item_to_text/R@10': 'held-out items: item to text, R@10',
    'item_text/text_to_item/R@10': 'held-out items: text to item, R@10',
    'item_text/itg/perplexity': 'held-out items: perplexity of the text',
    'user_item/ui/gain': 'held-out user-item pairs: gain over chance, nats',
  }
  figure, axes = plt.subplots(1, len(panels), figsize=(18, 4))
  for axis, (metric, title) in zip(axes, panels.items()):
    for name, colour in zip(JOBS, ('tab:blue', 'tab:orange', 'tab:green')):
      for seed in seeds:
        rows = read_jsonl(output / f'{name}_{seed}' / 'metrics.jsonl')
        points = [
          (r['step'], r[f'validation/{metric}']) for r in rows if f'validation/{metric}' in r
        ]
        steps, values = np.array(points).T
        axis.plot(
          steps / (1 if name == 'it' else 2),
          values,
          color=colour,
          alpha=0.7,
          marker='.',
          label=name if seed == seeds[0] else None,
        )
    axis.set_title(title, fontsize=10)
    axis.set_xlabel('item-text steps')
  axes[2].set_yscale('log')
  axes[0].legend()
  figure.tight_layout()
  figure.savefig(output / 'curves.png', dpi=80)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--output', type=Path, default=Path('runs/phase1_comparison'))
  parser.add_argument('--seeds', type=int, nargs='+', default=[2, 3, 4])
  arguments = parser.parse_args()
  train_all(arguments.output, arguments.seeds)
  text = report(arguments.output, arguments.seeds)
  (arguments.output / 'report.txt').write_text(text)
  plot(arguments.output, arguments.seeds)
  print(text)
  print(f'{arguments.output / "report.txt"}, {arguments.output / "curves.png"}')


if __name__ == '__main__':
  main()

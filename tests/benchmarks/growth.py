"""How time and memory of a training step grow: with histories, soft tokens, rows, the catalogue.

  python tests/benchmarks/growth.py [--only history ...] [--rounds=3]

Steps of phase 2 as `ilm train` runs them of jobs/phase2_ml100k.gin, on made-up prompts, vectors and
a language model of SmolLM2-135M's width with six layers: what is added to the language model is
what has to grow no faster than its work. Printed is a table, and docs/growth.svg is written: time
and memory over what grows, beside time in proportion to the FLOPs.
"""

import argparse
import dataclasses
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from paired import Run, Side, compare
from table import ROOT
from training_sides import begin, finite

LAYERS = 6
D_CF = 64
TEXT, TARGETS, SEQUENCE = 16, 12, 48
BOS, SLOT, COMMA = 1, 5, 6
PLOT = ROOT / 'docs' / 'growth.svg'


class Axis(NamedTuple):
  """What grows: `option` of `step` takes each of `values`."""

  title: str
  option: str
  values: Sequence[int]
  others: Mapping[str, Any]


AXES = {
  'history': Axis('items of a history', 'history', (10, 20, 40, 80, 160), {'rows': 4}),
  'queries': Axis('soft tokens of an item (K)', 'queries', (1, 2, 4, 8, 16), {'rows': 4}),
  'rows': Axis('prompts of a batch', 'rows', (2, 4, 8, 16, 32), {}),
  'catalogue': Axis(
    'items of the catalogue (readout)', 'items', (10**3, 10**4, 10**5, 10**6, 10**7), {'rows': 8}
  ),
}


def step(rows: int, history: int = 20, queries: int = 4, items: int = 0) -> Run:
  """A training step; with `items`, of the readout on histories of that catalogue."""
  from ilm_jax.runtime.tensorflow import import_tensorflow

  import_tensorflow()
  import jax
  import jax.numpy as jnp

  from ilm_jax import train
  from ilm_jax.config import reader as config
  from ilm_jax.lm.decoder_sizes import DECODER_SIZES
  from ilm_jax.lm.load import default_compute, init_params
  from ilm_jax.models.item_language import Frozen, ItemLanguageConfig
  from ilm_jax.modules.decoder import Decoder
  from ilm_jax.phases.item_language_options import ItemLanguageData, LmOptions, soft_token_config
  from ilm_jax.phases.item_language_steps import ITEM_SEQUENCE, ItemLanguageSteps
  from ilm_jax.runtime import sharding

  readout, task = bool(items), ITEM_SEQUENCE if items else 'prompts'
  num_items = items or 1000
  changes = ['MODEL_DIR=unused', f'NUM_QUERIES={1 if readout else queries}', f'READOUT={readout}']
  job = config.parse(
    train.train, ['jobs/phase2_ml100k.gin'], [*changes, 'TARGET_LOSS=vocabulary']
  ).arguments
  size = dataclasses.replace(DECODER_SIZES['smollm2_135m'], num_layers=LAYERS)
  lm = Decoder(size, default_compute())
  lm_options = LmOptions(**{**job['lm'], 'name': 'random'})
  inputs = TEXT + history * (queries + 1)
  text = ItemLanguageData(
    **{
      **job['text'],
      'max_inputs': inputs,
      'max_targets': TARGETS,
      'max_entities': history,
      'sequence_length': SEQUENCE,
      'pack': False,
      'prefix': '',
    }
  )
  encoder = {name: x for name, x in job['item_encoder'].items() if name != 'init_from'}
  steps = ItemLanguageSteps(
    lm,
    soft_token_config(encoder, text, lm_options, d_model=size.d_model, gain=1.0, d_cf=D_CF),
    config=ItemLanguageConfig(**job['losses']),
    text=text,
    lm_options=lm_options,
    slot_id=SLOT,
    num_items=num_items,
    first_token=BOS,
  )
  rng = np.random.default_rng(0)
  with tempfile.TemporaryDirectory() as directory:
    mesh, rules, state, train_step = begin(job, steps, Path(directory))
  weights = sharding.init_sharded(lambda key: init_params(lm, key), mesh, rules, jax.random.key(1))
  vectors = jax.random.normal(jax.random.key(2), [num_items, D_CF])
  popularity = jnp.full(num_items, -math.log(num_items))
  frozen = sharding.place_constants(Frozen(weights, vectors, popularity), mesh, rules)
  if readout:
    batch = {'entity_ids': rng.integers(0, num_items, [rows, SEQUENCE + 1])}
    empty = {'text_tokens': np.zeros([rows, 0]), 'text_mask': np.zeros([rows, 0])}
    batch |= empty
  else:
    tokens = rng.integers(100, 40_000, [rows, inputs + TARGETS + 1])
    tokens[:, TEXT : TEXT + history * (queries + 1)] = [*[SLOT] * queries, COMMA] * history
    batch = {
      'decoder_input_tokens': tokens[:, :-1],
      'decoder_target_tokens': tokens[:, 1:],
      'decoder_loss_weights': np.tile(np.arange(inputs + TARGETS) >= inputs, (rows, 1)),
      'entity_ids': rng.integers(0, num_items, [rows, history]),
    }
  batch = {name: np.ascontiguousarray(x, np.int32) for name, x in batch.items()}
  shapes = steps.batch_shapes(task, rows, pack=False)
  assert {name: x.shape for name, x in batch.items()} == shapes
  flops = steps.flops(state.params, frozen, batch, task)
  key = jax.random.key(0)

  def run() -> dict[str, float]:
    nonlocal state
    with sharding.use_mesh(mesh, rules):
      state, metrics = train_step(
        state, frozen, sharding.place_batch(batch, mesh), key, source=task
      )
    jax.block_until_ready(state)
    return {**finite({'loss': float(metrics['loss'])}), 'flops': flops}

  return run


class Point(NamedTuple):
  """One measurement."""

  value: int
  seconds: float
  gib: float
  flops: float


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--only', nargs='+', choices=[*AXES], default=[*AXES])
  parser.add_argument('--rounds', type=int, default=3)
  arguments = parser.parse_args()
  found: dict[str, list[Point]] = {}
  print('| what grows | | seconds | GiB | GFLOP | seconds by FLOPs |\n|---|---|---|---|---|---|')
  for name in arguments.only:
    axis, points = AXES[name], found.setdefault(name, [])
    for value in axis.values:
      side = Side(__file__, 'step', {**axis.others, axis.option: value})
      (measured,) = compare({'ours': side}, arguments.rounds).values()
      flops = measured.numbers['flops']
      points.append(Point(value, measured.median, measured.step_gib, flops))
      expected = points[0].seconds * flops / points[0].flops
      print(
        f'| {axis.title} | {value:,} | {measured.median:.3g} | {measured.step_gib:.2f}'
        f' | {flops / 1e9:.4g} | {expected:.3g} |',
        flush=True,
      )
  if list(found) == list(AXES):
    plot(found)


def plot(found: Mapping[str, Sequence[Point]]) -> None:
  """Writes PLOT: all axes in logarithms."""
  from matplotlib import pyplot

  pyplot.rcParams.update({'svg.fonttype': 'none', 'svg.hashsalt': 'growth', 'font.size': 8})
  figure, panels = pyplot.subplots(2, 2, figsize=(7, 5), layout='constrained')
  for panel, (name, points) in zip(panels.flat, found.items(), strict=True):
    values, first = [p.value for p in points], points[0]
    panel.plot(values, [p.seconds for p in points], 'o-', label='seconds a step')
    by_flops = [first.seconds * p.flops / first.flops for p in points]
    panel.plot(values, by_flops, '--', color='tab:blue', label='seconds, in proportion to FLOPs')
    panel.plot(values, [p.gib for p in points], 's-', color='tab:red', label='GiB of the process')
    panel.set(xscale='log', yscale='log', title=AXES[name].title)
    panel.set_xticks(values, [f'{value:,}' for value in values], minor=False)
    panel.minorticks_off()
    panel.grid(alpha=0.3)
  figure.legend(*panels.flat[0].get_legend_handles_labels(), loc='outside lower center', ncols=3)
  figure.savefig(PLOT, metadata={'Date': None})


if __name__ == '__main__':
  main()

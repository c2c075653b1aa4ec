"""What phase 1 has to beat: held-out items and their texts, matched by maps in closed form.

  python tests/benchmarks/item_text_retrieval_baselines.py [--data=DIR]

Fits maps from CF vectors to MiniLM embeddings of the item texts on the items whose text phase 1
sees, and retrieves the held-out items' texts by their vectors and the reverse. The data set is
ML-100K by default, prepared on first use; its vectors are iALS with the default settings.

`ridge` is `ilm_jax.cf.linear_map`. `kernel` is kernel ridge with a Gaussian kernel, its width and
penalty by leave-one-out as well: how much more a map that is not linear finds. `log popularity` is
what the inputs know without the vectors. The release year stands in the titles, and old films have
their own viewers: `title, no year` shows what is left without it.
"""

import argparse
import collections
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

KS = (1, 5, 10)
WIDTHS = (0.25, 0.5, 1.0, 2.0)  # of the kernel, in units of the median distance
PENALTIES = 10.0 ** np.arange(-6, 1, 0.5)


def load(directory: str):
  from ilm_jax.data.prepared_records import load_prepared
  from ilm_jax.prepare import prepare

  if not Path(directory).exists():
    prepare(dataset='ml100k', output=Path(directory), rankers=False)
  return load_prepared(directory)


def item_inputs(prepared) -> dict[str, np.ndarray]:
  """CF vectors and what could help them, each [num_items, d]."""
  from ilm_jax.cf import ials

  _, vectors, _ = ials.fit(prepared.offsets, prepared.items, prepared.num_items, progress=False)
  units = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
  counts = np.bincount(prepared.items, minlength=prepared.num_items)
  popularity = np.log1p(counts)[:, None]
  return {
    'log popularity': popularity,
    'raw vectors': vectors,
    'unit vectors': units,
    'unit + log popularity': np.concatenate([units, popularity], axis=1),
  }


def item_texts(prepared) -> dict[str, list[str]]:
  titles, genres = prepared.item_text['title'], prepared.item_text['genres']
  return {
    'title. genres': [f'{title}. {genre}' for title, genre in zip(titles, genres)],
    'title': titles,
    'title, no year': [re.sub(r'\s*\(\d{4}\)$', '', title) for title in titles],
    'genres': genres,
  }


def kernel_ridge(inputs: np.ndarray, targets: np.ndarray, fitted: np.ndarray) -> np.ndarray:
  """Predictions [n, e] for all rows from the `fitted` ones [n] bool.

  `linear_map.fit_ridge` in the space of a Gaussian kernel: the kernel matrix, centred on the fitted
  rows, takes the place of the inner products.
  """
  standardised = (inputs - inputs[fitted].mean(axis=0)) / inputs[fitted].std(axis=0)
  lengths = np.square(standardised).sum(axis=1)
  distances = lengths[:, None] + lengths[fitted] - 2 * standardised @ standardised[fitted].T
  centred = targets[fitted] - targets[fitted].mean(axis=0)
  n = len(centred)
  best, predictions = np.inf, np.zeros_like(targets)
  for width in WIDTHS:
    kernel = np.exp(-distances / (2 * width**2 * np.median(distances[fitted])))
    kernel = kernel - kernel.mean(axis=1, keepdims=True)
    kernel = kernel - kernel[fitted].mean(axis=0)
    values, vectors = np.linalg.eigh(kernel[fitted])
    values = np.maximum(values, 0)
    projected = vectors.T @ centred
    for penalty in n * PENALTIES:
      leverage = 1 / n + vectors**2 @ (values / (values + penalty))
      residuals = vectors @ ((penalty / (values + penalty))[:, None] * projected)
      error = np.square(residuals / (1 - leverage)[:, None]).sum(axis=1).mean()
      if error < best:
        best = error
        predictions = kernel @ (vectors @ (projected / (values + penalty)[:, None]))
  return targets[fitted].mean(axis=0) + predictions


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--data', default='runs/demo/ml100k')
  arguments = parser.parse_args()

  from ilm_jax.cf.linear_map import fit_ridge
  from ilm_jax.metrics.retrieval import retrieval_from_features
  from ilm_jax.metrics.sentence_embedding import SentenceEmbedder

  prepared = load(arguments.data)
  heldout = prepared.heldout_items
  asked = np.flatnonzero(heldout)
  embedder = SentenceEmbedder.minilm()
  inputs = item_inputs(prepared)
  tables = collections.defaultdict(dict)
  for form, texts in item_texts(prepared).items():
    embeddings = embedder.embed(texts).astype(np.float64)
    predictions = {}
    for name, columns in inputs.items():
      ridge = fit_ridge(columns[~heldout], embeddings[~heldout])
      predictions[f'ridge, {name}'] = ridge.predict(columns)
    predictions['kernel, unit vectors'] = kernel_ridge(inputs['unit vectors'], embeddings, ~heldout)
    for system, predicted in predictions.items():
      items, targets = ridge.directions(predicted), ridge.directions(embeddings)
      for candidates, kept, queries in (
        ('held-out items', heldout, None),
        ('all items', np.ones_like(heldout), asked),
      ):
        ways = retrieval_from_features(
          items[kept], targets[kept], ks=KS, same=np.array(texts)[kept], queries=queries
        )
        for way, result in ways.items():
          tables[way, candidates][form, system] = result

  print(f'{prepared.name}: fitted on {(~heldout).sum()} items, asked for {len(asked)} others')
  for (way, candidates), table in tables.items():
    columns = [f'R@{k} [95 % interval]' for k in KS] + ['rank (0 is best)']
    print(_line(f'\n{way}, among {candidates}', columns))
    for (form, system), result in table.items():
      if system == next(iter(predictions)):
        print(_line(f'{form}: chance', [f'{value:.3f}' for value in result.chance.values()]))
      cells = [f'{x.mean:.3f} [{x.low:.3f}, {x.high:.3f}]' for x in result.intervals.values()]
      print(_line(f'{form}: {system}', cells))


def _line(name: str, cells: Sequence[str]) -> str:
  return f'{name:<46}' + ''.join(f'{cell:<23}' for cell in cells).rstrip()


if __name__ == '__main__':
  main()

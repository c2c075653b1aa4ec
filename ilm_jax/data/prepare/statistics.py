"""Statistics of a prepared data set: printed, written as JSON, and plotted."""

from pathlib import Path
from typing import Any

import numpy as np

from ilm_jax.data.prepared import PreparedData

_QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)


def compute(prepared: PreparedData) -> dict[str, Any]:
  """Counts, density, history lengths, popularity and text coverage, as JSON values.

  Lengths are in interactions (train + validation + test), text lengths in characters.
  """
  lengths = _history_lengths(prepared)
  popularity = _popularity(prepared)
  users, items = prepared.num_users, prepared.num_items
  result: dict[str, Any] = {
    'users': users,
    'items': items,
    'interactions': prepared.num_interactions,
    'density': prepared.num_interactions / (users * items),
    'train_interactions': len(prepared.items),
    'validation_users': int(np.count_nonzero(prepared.validation_items >= 0)),
    'test_users': int(np.count_nonzero(prepared.test_items >= 0)),
    'heldout_items': int(np.count_nonzero(prepared.heldout_items)),
    'items_without_training_rows': int(np.count_nonzero(_train_popularity(prepared) == 0)),
    'history_length': _summary(lengths),
    'item_popularity': _summary(popularity),
    'top_1_percent_items_share': _top_share(popularity, 0.01),
    'text': {field: _text_summary(values) for field, values in prepared.item_text.items()},
    'dropped': dict(prepared.settings.get('dropped', {})),
  }
  if prepared.timestamps is not None:
    order = np.diff(prepared.timestamps) == 0
    within = np.ones(len(prepared.items), bool)
    within[prepared.offsets[:-1][np.diff(prepared.offsets) > 0]] = False  # a user's first row
    result['equal_timestamps'] = float(np.mean(order & within[1:])) if len(order) else 0.0
    assert prepared.validation_timestamps is not None
    tested = prepared.test_items >= 0
    tied = prepared.test_timestamps == prepared.validation_timestamps
    result['test_ties'] = float(np.mean(tied[tested])) if tested.any() else 0.0
    source = prepared.settings.get('source', {})
    result['tie_order'] = source.get('tie_order', 'row of the source')
  if prepared.ratings is not None:
    values, counts = np.unique(prepared.ratings, return_counts=True)
    result['ratings'] = {f'{v:g}': int(c) for v, c in zip(values, counts)}
  titles = prepared.item_text['title']
  result['duplicate_titles'] = len(titles) - len(set(titles))
  return result


def _history_lengths(prepared: PreparedData) -> np.ndarray:
  held = (prepared.validation_items >= 0).astype(int) + (prepared.test_items >= 0)
  return np.diff(prepared.offsets) + held


def _train_popularity(prepared: PreparedData) -> np.ndarray:
  return np.bincount(prepared.items, minlength=prepared.num_items)


def _popularity(prepared: PreparedData) -> np.ndarray:
  held = np.concatenate([prepared.validation_items, prepared.test_items])
  return _train_popularity(prepared) + np.bincount(held[held >= 0], minlength=prepared.num_items)


def _summary(values: np.ndarray) -> dict[str, float]:
  quantiles = np.quantile(values, _QUANTILES)
  named = dict(zip(('min', 'p25', 'median', 'p75', 'p95', 'max'), map(float, quantiles)))
  return {'mean': float(np.mean(values)), **named}


def _top_share(popularity: np.ndarray, fraction: float) -> float:
  top = max(1, round(fraction * len(popularity)))
  return float(np.sort(popularity)[::-1][:top].sum() / popularity.sum())


def _text_summary(values: list[str]) -> dict[str, float]:
  lengths = np.array([len(v) for v in values])
  present = lengths > 0
  mean = float(lengths[present].mean()) if present.any() else 0.0
  return {'coverage': float(present.mean()), 'mean_characters': mean, 'max': int(lengths.max())}


def format_report(name: str, statistics: dict[str, Any]) -> str:
  """The statistics as a short text for people."""
  s = statistics
  h, p = s['history_length'], s['item_popularity']
  dropped = s['dropped']
  lines = [
    f'{name}: {s["users"]:,} users, {s["items"]:,} items, {s["interactions"]:,} interactions'
    f' (density {s["density"]:.2%})',
    f'  splits        train {s["train_interactions"]:,} rows, validation {s["validation_users"]:,}'
    f' users, test {s["test_users"]:,} users; text of {s["heldout_items"]:,} items held out',
    f'  history       median {h["median"]:g}, mean {h["mean"]:.1f}, 95th percentile {h["p95"]:g},'
    f' longest {h["max"]:g}',
    f'  popularity    median {p["median"]:g}, most {p["max"]:g}; the top 1 % of items hold'
    f' {s["top_1_percent_items_share"]:.1%} of all interactions',
  ]
  for field, t in s['text'].items():
    lines.append(
      f'  text {field:<12} {t["coverage"]:.1%} of items, {t["mean_characters"]:.0f} characters'
      f' on average, at most {t["max"]}'
    )
  if s['duplicate_titles']:
    lines.append(f'  titles        {s["duplicate_titles"]} repeat the title of another item')
  if s['items_without_training_rows']:
    lines.append(
      f'  cold          {s["items_without_training_rows"]} items occur in no training row'
    )
  if 'equal_timestamps' in s:
    lines.append(
      f"  time ties     {s['equal_timestamps']:.1%} of a user's consecutive rows have equal times;"
      ' the test item'
    )
    lines.append(
      f'                of {s["test_ties"]:.1%} of users is decided by a tie (broken by'
      f' {s["tie_order"]})'
    )
  if dropped.get('interactions'):
    lines.append(
      f'  dropped       {dropped["users"]:,} users, {dropped["items"]:,} items,'
      f' {dropped["interactions"]:,} interactions ({dropped["k_core_rounds"]} k-core rounds)'
    )
  return '\n'.join(lines)


def plot(prepared: PreparedData, path: Path) -> None:
  """Writes a PNG: history lengths, popularity, interactions over time or ratings, text lengths."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  from matplotlib.ticker import LogLocator, NullFormatter

  figure = Figure(figsize=(10, 7), layout='constrained')
  FigureCanvasAgg(figure)
  figure.suptitle(
    f'{prepared.name}: {prepared.num_users:,} users, {prepared.num_items:,} items,'
    f' {prepared.num_interactions:,} interactions'
  )
  axes = figure.subplots(2, 2)
  lengths = _history_lengths(prepared)
  axes[0, 0].hist(lengths, bins=np.geomspace(max(1, lengths.min()), lengths.max() + 1, 40))
  axes[0, 0].set(xscale='log', xlabel='interactions of a user', ylabel='users')
  # Ticks in between would write over one another where there is less than a decade or two.
  axes[0, 0].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  axes[0, 0].xaxis.set_major_formatter('{x:g}')
  axes[0, 0].xaxis.set_minor_formatter(NullFormatter())
  popularity = np.sort(_popularity(prepared))[::-1]
  axes[0, 1].plot(np.arange(1, len(popularity) + 1), popularity)
  axes[0, 1].set(xscale='log', yscale='log', xlabel='item rank', ylabel='interactions of an item')
  if prepared.ratings is not None:
    values, counts = np.unique(prepared.ratings, return_counts=True)
    axes[1, 0].bar([f'{v:g}' for v in values], counts)
    axes[1, 0].set(xlabel='rating', ylabel='training rows')
  else:
    axes[1, 0].axis('off')
    axes[1, 0].text(0.5, 0.5, 'no ratings', ha='center')
  for field, values in prepared.item_text.items():
    axes[1, 1].ecdf([len(v) for v in values], label=field)
  axes[1, 1].set(xlabel='characters of text (0: none)', ylabel='share of items with at most that')
  axes[1, 1].legend(frameon=False)
  for axis in axes.flat:
    axis.spines[['top', 'right']].set_visible(False)
  figure.savefig(path, dpi=110)

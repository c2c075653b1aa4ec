"""An evaluation of `tiny_run.trained`, made once, and what its figures are checked with."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ilm_jax import measurements
from ilm_jax.data.prepared import PreparedData
from ilm_jax.main import main
from ilm_jax.measurements import Measure
from ilm_jax.recommender import Prompts
from ilm_jax.results import Ranked
from tests import tiny_run

TASKS = ('sequential_seen_title', 'sequential_unseen_title', 'straightforward_seen_title')
SEQUENTIAL = TASKS[0]
CONDITIONS = ('own', 'shuffled_users', 'shuffled_items', 'zeroed', 'text_only')
USERS = 12
METRICS = ('HR@5', 'NDCG@5', 'HR@10', 'NDCG@10', 'MRR', 'rank_pct')


def evaluated(tmp_path_factory: Any) -> Path:
  """What the command left: the readout, exact and beam scores under all conditions."""

  def make(folder: Path) -> None:
    run = tiny_run.trained(tmp_path_factory)
    flags = {'methods': ['readout', 'exact', 'beam'], 'conditions': list(CONDITIONS)}
    assert main(words(run, folder / 'evaluation', name='tiny', beam_size=30, **flags)) == 0

  return tiny_run.shared(tmp_path_factory, 'evaluated', make) / 'evaluation'


def words(model_dir: Path, output: Path, **flags: Any) -> list[str]:
  """Of `ilm`."""
  flags = {'fields': [], 'max_users': USERS, 'max_texts': 16, **flags}
  return [
    'evaluate',
    f'--model_dir={model_dir}',
    f'--output={output}',
    *(f'--{name}={value}' for name, value in flags.items()),
  ]


def others(size: int, seed: int = 0) -> np.ndarray:
  """What takes the place of each in a control: nothing stays where it was."""
  found = measurements._derangement(size, seed)
  assert sorted(found) == list(range(size))
  assert (found != np.arange(size)).all()
  return found


def check_metrics(
  row: Ranked, scores: Any, targets: np.ndarray, seen: Sequence[Sequence[int]]
) -> None:
  """By sorting: no two scores of these are equal, but for twins'."""
  ranks = []
  for score, target, items in zip(scores, targets, seen):
    candidates = [i for i in range(len(score)) if i == target or i not in items]
    better = sum(score[i] > score[target] for i in candidates)
    tied = sum(score[i] == score[target] for i in candidates) - 1
    ranks.append((better, better + tied, len(candidates)))

  def mean(value: Callable[[int, int], float]) -> float:
    """Over the places that the target may have."""
    return float(np.mean([np.mean([value(r, n) for r in range(a, b + 1)]) for a, b, n in ranks]))

  found = {f'HR@{k}': mean(lambda rank, _, k=k: float(rank < k)) for k in (5, 10)} | {
    f'NDCG@{k}': mean(lambda rank, _, k=k: (rank < k) / np.log2(rank + 2)) for k in (5, 10)
  }
  found |= {
    'MRR': mean(lambda rank, _: 1 / (rank + 1)),
    'rank_pct': mean(lambda rank, n: rank / (n - 1)),
  }
  for name in METRICS:
    assert row.intervals[name].mean == pytest.approx(found[name], abs=1e-9), (row.name, name)
  assert len(row.users) == len(targets)


def read(measure: Measure, task: str, evaluator: Any) -> list[Prompts]:
  """The prompts of a task, as the model is given them."""
  found = []

  def run(prompts: Prompts, numbers: np.ndarray) -> np.ndarray:
    found.append(prompts)
    return np.zeros(len(numbers))

  measure._predictions(evaluator, task, run)
  return found


def histories(prepared: PreparedData, users: Any = None, split: str = 'test') -> list[list[int]]:
  """Of all users, or some: the items before what is hidden."""
  users = range(prepared.num_users) if users is None else users
  return [prepared.history(user, split).tolist() for user in users]

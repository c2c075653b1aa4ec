"""An evaluation of `tiny_run.trained`, made once, and what its figures are checked with."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ilm_jax.data.prepared import PreparedData
from ilm_jax.evaluation import measurements
from ilm_jax.evaluation.results import Ranked
from ilm_jax.main import main
from tests.support import tiny_run

TASKS = ('sequential_seen_title', 'straightforward_seen_title')
SEQUENTIAL = TASKS[0]
CONDITIONS = ('own', 'shuffled_users', 'shuffled_items', 'zeroed', 'text_only')
USERS = 12
METRICS = ('HR@5', 'NDCG@5', 'HR@10', 'NDCG@10', 'MRR', 'rank_pct')
# Of scores: an operand of a product that is a little more or less may round to another bfloat16.
NEAR = 0.03


def evaluated(tmp_path_factory: Any) -> Path:
  """What the command left: the readout, exact and beam scores under all conditions.

  Beside it, in shown.txt, what it said meanwhile.
  """

  def make(folder: Path) -> None:
    run = tiny_run.trained(tmp_path_factory)
    flags = {'methods': ['readout', 'exact', 'beam'], 'conditions': list(CONDITIONS)}
    flags |= {'tasks': list(TASKS)}  # to read a task's prompts takes seconds
    with open(folder / 'shown.txt', 'w') as file, contextlib.redirect_stderr(file):
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
  found = measurements.derangement(size, seed)
  assert sorted(found) == list(range(size))
  assert (found != np.arange(size)).all()
  return found


def check_metrics(
  row: Ranked, scores: Any, targets: np.ndarray, seen: Sequence[Sequence[int]]
) -> None:
  """By sorting, user by user; twins' scores are equal.

  Where another score is so near the target's that rounding decides, either order is right; of one
  target it may be the other one.
  """
  assert len(row.users) == len(targets)
  differ = set()
  for user, (score, target, items) in enumerate(zip(scores, targets, seen)):
    rest = [i for i in range(len(score)) if i != target and i not in items]
    mine = score[target]  # where a beam did not find it, -inf
    above = np.array([0.0 if score[i] == mine else score[i] - mine for i in rest])
    near = int(((above != 0) & (np.abs(above) < NEAR)).sum())
    better, tied = int((above >= NEAR).sum()), int((above == 0).sum())
    for name in METRICS:
      # All that a metric may be: with each number of the near ones before the target.
      values = [
        np.mean([metric(name, rank, len(rest)) for rank in range(first, first + tied + 1)])
        for first in range(better, better + near + 1)
      ]
      right = np.isclose(row.metrics[name][user], values, rtol=0, atol=1e-6)
      assert right.any(), (row.name, name, user)
      if not right[sum(x > 0 for x in above) - better]:
        differ.add(user)
  assert len(differ) <= 1
  for name in METRICS:
    assert row.intervals[name].mean == pytest.approx(np.mean(row.metrics[name]), abs=1e-9)


def metric(name: str, rank: int, others: int) -> float:
  """Of a target that has `rank` of the other candidates before it."""
  if name == 'MRR':
    return 1 / (rank + 1)
  if name == 'rank_pct':
    return rank / others
  k = int(name.split('@')[1])
  return float(rank < k) * (1 / np.log2(rank + 2) if name.startswith('NDCG') else 1)


def histories(prepared: PreparedData, users: Any = None, split: str = 'test') -> list[list[int]]:
  """Of all users, or some: the items before what is hidden."""
  users = range(prepared.num_users) if users is None else users
  return [prepared.history(user, split).tolist() for user in users]

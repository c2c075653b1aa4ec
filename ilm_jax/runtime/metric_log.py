"""Scalars of a run, for people (TensorBoard) and for programs (metrics.jsonl); early profiles.

  DIRECTORY/
    events.out.tfevents.*   TensorBoard: `tensorboard --logdir=DIRECTORY`
    metrics.jsonl           one line a write: {"step": 100, "train/item_text/loss": 1.2, ...}
    profile/                a trace of a few early steps: XProf, TensorBoard's profile plugin

JSON has no word for numbers that are not finite: they are the strings "NaN", "Infinity" and
"-Infinity" (as protobuf's JSON has them), which Python's `float` and our `read_jsonl` understand.

Importing this imports TensorFlow, by way of clu: seconds.
"""

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import tensorflow as tf
from clu import metric_writers

from ilm_jax.errors import UsageError

JSONL_FILE = 'metrics.jsonl'
PROFILE_DIR = 'profile'
_NOT_FINITE = {'NaN': math.nan, 'Infinity': math.inf, '-Infinity': -math.inf}


class MetricLog:
  """Writes scalars to TensorBoard and to metrics.jsonl, on process 0; elsewhere it does nothing.

    with MetricLog(directory, start_step=state.step) as log:
      log.write(100, {'train/item_text/loss': 1.2, 'train/steps_per_second': 3.4})

  Threads of its own do the writing, so that a slow disk does not stop the training. They hold
  nothing back for later. What they could not do (a full disk) the next `write`, `flush` or `close`
  raises, as clu's AsyncError.

  What an earlier run, killed, had written of the steps that will now come again disappears, so that
  the curves are those of one straight run: a run that starts at step 100 keeps what is said of the
  steps up to 100, one that starts at step 0 keeps nothing.
  """

  def __init__(self, directory: Path, *, start_step: int):
    """Opens the log of a run whose next step is `start_step` + 1.

    Raises:
      UsageError: `directory` cannot be written, or its metrics.jsonl is not ours.
    """
    writers: list[metric_writers.MetricWriter] = []
    if jax.process_index() == 0:
      try:
        directory.mkdir(parents=True, exist_ok=True)
        writers.append(_JsonlWriter(directory / JSONL_FILE, start_step))
      except OSError as error:
        raise UsageError(f'{directory}: metrics cannot be written there: {error}.') from error
      writers.append(_TensorBoardWriter(directory, start_step))
    self._writer = metric_writers.AsyncMultiWriter(writers)

  def write(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Writes numbers: Python's, NumPy's, or JAX's of shape [], which are waited for."""
    self._writer.write_scalars(step, {name: _plain(value) for name, value in scalars.items()})

  def flush(self) -> None:
    """Returns when all that was written is on the disk."""
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
  """Returns the lines of a metrics.jsonl; a last line that a crash has cut is left out.

  Raises:
    UsageError: another line is not of such a file.
  """
  lines = path.read_text(errors='replace').splitlines()
  rows = []
  for number, line in enumerate(lines, start=1):
    try:
      row = json.loads(line)
    except ValueError:
      if number == len(lines):
        break
      row = None
    if not isinstance(row, dict) or not isinstance(row.get('step'), int):
      raise UsageError(
        f'{path}, line {number}: not a line of metrics, such as {{"step": 100, "loss": 1.2}}:'
        f' {line[:80]!r}. Remove the line, or move the file away.'
      )
    rows.append({k: _NOT_FINITE.get(v, v) if isinstance(v, str) else v for k, v in row.items()})
  return rows


class _JsonlWriter(metric_writers.MetricWriter):
  """One strict JSON line a write, on the disk when the write returns. Scalars only."""

  def __init__(self, path: Path, start_step: int):
    kept = []
    if start_step and path.exists():
      kept = [row for row in read_jsonl(path) if row['step'] <= start_step]
    rewritten = path.with_name(f'.{path.name}.{os.getpid()}')
    self._file = rewritten.open('w')
    self._write(kept)
    os.replace(rewritten, path)  # a crash before this leaves the old file whole

  def _write(self, rows: Iterable[Mapping[str, Any]]) -> None:
    for row in rows:
      line = {name: _json_value(value) for name, value in row.items()}
      self._file.write(json.dumps(line, allow_nan=False) + '\n')
    self._file.flush()
    os.fsync(self._file.fileno())

  def write_scalars(self, step, scalars):
    self._write([dict(step=step, **scalars)])

  def flush(self):
    pass  # every write has

  def close(self):
    self._file.close()

  def _refuse(self, *args, **kwargs):
    raise NotImplementedError(f'{JSONL_FILE} holds scalars only.')

  write_summaries = write_images = write_videos = write_audios = _refuse
  write_texts = write_histograms = write_hparams = _refuse


class _TensorBoardWriter(metric_writers.SummaryWriter):
  """clu's writer, which also tells TensorBoard what a restart has made void."""

  def __init__(self, directory: Path, start_step: int):
    super().__init__(os.fspath(directory))
    # At a START event, except the first, TensorBoard forgets what it has read of that step and
    # later ones. tf.summary has no function for it, hence the writer's private handle.
    start = tf.compat.v1.Event(
      wall_time=time.time(),
      step=start_step + 1 if start_step else 0,
      session_log=tf.compat.v1.SessionLog(status=tf.compat.v1.SessionLog.START),
    )
    tf.raw_ops.ImportEvent(writer=self._summary_writer._resource, event=start.SerializeToString())
    self.flush()


class Profile:
  """A trace of `num_steps` early steps under DIRECTORY/profile, on process 0; 0 steps are none.

    with Profile(directory, first_step=start_step + 10, num_steps=3) as profile:
      for step in range(start_step + 1, total_steps + 1):
        profile.step(step, state)
        state = train_step(state, batch)

  The first steps compile and warm up: leave them out.
  """

  def __init__(self, directory: Path, first_step: int, num_steps: int):
    self._directory = directory / PROFILE_DIR
    wanted = num_steps > 0 and jax.process_index() == 0
    self._first, self._end = (first_step, first_step + num_steps) if wanted else (None, None)
    self._running = False

  def step(self, step: int, arrays: Any) -> None:
    """Called before each step with what the step before has returned, which it may wait for."""
    if step == self._first:
      jax.block_until_ready(arrays)  # or the trace would begin amid earlier steps
      jax.profiler.start_trace(self._directory)
      self._running = True
    elif step == self._end and self._running:
      jax.block_until_ready(arrays)
      self.close()

  def close(self) -> None:
    """Ends the trace, where the training ends before it does."""
    if self._running:
      self._running = False
      jax.profiler.stop_trace()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self.close()


def _plain(value: Any) -> int | float:
  return np.asarray(value).item()


def _json_value(value: Any) -> Any:
  if isinstance(value, float) and not math.isfinite(value):
    return 'NaN' if math.isnan(value) else 'Infinity' if value > 0 else '-Infinity'
  return value

"""`ilm train`: THE train loop, of both phases. Read it from top to bottom.

MODEL_DIR/
  config.gin, operative_config.gin   what was run
  checkpoints/STEP/                  the latest ones and the best one (ilm_jax.checkpoints.manager)
  metrics.jsonl, events.out.*        train/... and validation/...: ilm_jax.runtime.metric_log
  profile/                           a trace of early steps, with profile_steps
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from ilm_jax.checkpoints.manager import CHECKPOINTS_DIR, CheckpointManager, restore_params
from ilm_jax.config import files as config_files
from ilm_jax.config.plugins import import_task_modules
from ilm_jax.errors import UsageError
from ilm_jax.modules.precision import multiplies_bfloat16
from ilm_jax.phases.phase import (
  InputOptions,
  Phase,
  all_positions,
  batch_part,
  batch_sizes,
  check_input_shards,
  check_sources,
)
from ilm_jax.phases.settings import PhaseSettings
from ilm_jax.phases.train_step import TrainState, abstract_state, jit_step, make_optimizer
from ilm_jax.runtime import flops, sharding
from ilm_jax.runtime.processes import StopSignals, one_run
from ilm_jax.runtime.progress import Progress

_PROFILE_AFTER = 10  # steps: the first ones compile and warm up


def train(
  *,
  model_dir: Path,
  data: Path,
  model: Literal['item_text', 'item_language'] = 'item_text',
  schedule: Sequence[str] = ('item_text',),
  total_steps: int,
  batch_size: int | dict[str, int] = 64,
  item_encoder: dict[str, Any] | None = None,
  losses: dict[str, Any] | None = None,
  text: dict[str, Any] | None = None,
  lm: dict[str, Any] | None = None,
  entity_table: Path | None = None,
  modules: str | Sequence[str] = (),
  restore_from: str | None = None,
  learning_rate: float = 1e-4,
  final_learning_rate: float = 0.0,
  item_encoder_rate: float = 1.0,
  warmup_steps: int = 100,
  weight_decay: float = 0.05,
  adam_b1: float = 0.9,
  adam_b2: float = 0.98,
  clip_norm: float = 1.0,
  accumulate_steps: int = 1,
  eval_every: int | None = 500,
  save_every: int = 500,
  log_every: int = 50,
  keep_latest: int = 2,
  keep_best: int = 1,
  profile_steps: int = 0,
  mesh: dict[str, int] | None = None,
  sharding_rules: dict[str, Any] | None = None,
  input_shards: int | None = None,
  seed: int = 0,
) -> dict[str, float]:
  """Trains a phase, or goes on where MODEL_DIR has got to.

    ilm train --gin_file=jobs/phase1_ml100k.gin --gin.MODEL_DIR=runs/phase1

  On several hosts, the same on each with --multiprocess (see `ilm_jax.runtime.processes`).

  Args:
    model_dir: checkpoints, metrics and configuration; a run that stopped goes on from its latest
      checkpoint.
    data: a directory that `ilm prepare` made.
    model: what is trained: 'item_text' is phase 1, 'item_language' phase 2.
    schedule: batch sources, taken in turn, over and over. Phase 1 has item_text (ITC, ITM, ITG),
      item_item (II) and user_item (UI); phase 2 has item_sequence (the readout) and every SeqIO
      task or mixture of prompts.
    total_steps: steps of the whole run, restarts included.
    batch_size: rows of a global batch: one number, or one for each source of the schedule.
    item_encoder: size, init_from and what else `ilm_jax.modules.qformer.QFormerConfig` has. In
      phase 2 init_from is a run of phase 1, and kind is 'qformer', 'mlp' or 'none'.
    losses: fields of `ilm_jax.models.item_text.ItemTextConfig`, in phase 2 of
      `ilm_jax.models.item_language.ItemLanguageConfig`.
    text: fields of `ilm_jax.phases.item_text.ItemTextData`, in phase 2 of
      `ilm_jax.phases.item_language_options.ItemLanguageData`.
    lm: phase 2's language model, fields of
      `ilm_jax.phases.item_language_options.LmOptions`.
    entity_table: another table than the data set's own (`ilm embed`).
    modules: Python modules to import first: a list, or 'one,two'.
    restore_from: a run or a checkpoint whose parameters a new run begins with.
    learning_rate: the highest, after a linear warm-up; a cosine leads to final_learning_rate.
    final_learning_rate: at total_steps.
    item_encoder_rate: of phase 2: the item encoder's learning rate is so many times the others'.
      An encoder from phase 1 does not stand the rates at which an adaptor is learned in minutes.
    warmup_steps: of the learning rate; at most half of total_steps.
    weight_decay: AdamW's, of matrices and tables only.
    adam_b1: decay of the mean of gradients.
    adam_b2: decay of the mean of their squares.
    clip_norm: gradients are scaled down to this norm.
    accumulate_steps: parts in which a batch is taken, for its gradients to fit into memory.
      In-batch negatives are then those of a part.
    eval_every: steps between evaluations, of which one follows the last step; a multiple of
      save_every. None: there are none, and the best checkpoint is the latest.
    save_every: steps between checkpoints.
    log_every: steps between lines of metrics.
    keep_latest: checkpoints to keep.
    keep_best: checkpoints to keep besides, the best by the phase's validation metric.
    profile_steps: trace so many early steps for XProf.
    mesh: {'data': -1, 'fsdp': 1, 'tensor': 1}: sizes, -1 is the rest of the devices.
    sharding_rules: changes of `ilm_jax.runtime.sharding.DEFAULT_RULES`: {'embed': None}.
    input_shards: parts of a packed batch, of which every process reads some: a multiple of all
      numbers of processes that the run may see; by default as many as begin it.
    seed: of the initial parameters, the order of the examples, dropout and negatives.

  Returns:
    The metrics of the last evaluation, if there was one.

  Raises:
    UsageError: a setting is wrong, MODEL_DIR belongs to another model or data set, or another run
      is at work there.
    FloatingPointError: a value is no longer finite; the message says where it began.
  """
  counts = {'total_steps': total_steps, 'accumulate_steps': accumulate_steps}
  counts |= {'save_every': save_every, 'log_every': log_every}
  if eval_every is not None:
    counts['eval_every'] = eval_every
  for name, value in counts.items():
    if value < 1:
      raise UsageError(f'train.{name}={value}: at least 1 is needed.')
  if eval_every is not None and eval_every % save_every:
    raise UsageError(
      f'eval_every={eval_every} is not a multiple of save_every={save_every}: what is evaluated is'
      ' saved, so that the best can be kept.'
    )
  if item_encoder_rate != 1 and model != 'item_language':
    raise UsageError(f'train.item_encoder_rate={item_encoder_rate} is for phase 2 alone.')
  import_task_modules(modules)
  model_dir, schedule = model_dir.expanduser(), tuple(schedule)
  sizes = batch_sizes(batch_size, schedule, accumulate_steps)
  devices = sharding.make_mesh(mesh or {'data': -1})
  check_input_shards(input_shards, devices)
  rules = tuple((dict(sharding.DEFAULT_RULES) | (sharding_rules or {})).items())
  inputs = InputOptions(data.expanduser(), entity_table, sizes, seed, devices, rules, input_shards)

  # ---------------------------------------------------------------- the phase and its devices
  options = {'item_encoder': item_encoder, 'losses': losses, 'text': text, 'lm': lm}
  settings = PhaseSettings(model, {name: x for name, x in options.items() if x is not None})
  phase = settings.make(inputs)
  check_sources(schedule, phase)
  device = devices.devices.flat[0]
  precision = jnp.bfloat16 if multiplies_bfloat16(device.platform) else jnp.float32
  peak, _ = flops.peak_flops(device, precision)
  learning_rates = optax.warmup_cosine_decay_schedule(
    0.0, learning_rate, min(warmup_steps, total_steps // 2), total_steps, final_learning_rate
  )
  optimizer = make_optimizer(
    learning_rates, clip_norm, b1=adam_b1, b2=adam_b2, weight_decay=weight_decay,
    item_encoder_rate=item_encoder_rate,
  )  # fmt: skip
  with (
    one_run(model_dir),
    sharding.use_mesh(devices, rules),
    CheckpointManager(
      model_dir / CHECKPOINTS_DIR,
      identity=phase.identity,
      keep_latest=keep_latest,
      keep_best=keep_best,
      best_metric=phase.best_metric,
      best_mode=phase.best_mode,
    ) as checkpoints,
  ):
    settings.save(model_dir, inputs)  # not of a run that was refused
    if (running := config_files.running()) and jax.process_index() == 0:
      running.save(model_dir)

    # ------------------------------------- one step of training, compiled while its state is made
    key = jax.random.key(seed)
    if sharding_rules:
      changes = tuple(sharding_rules.items())
      sharding.check_changes(changes, sharding.boxed_shapes(phase.init, key), phase.frozen)
    start = checkpoints.latest_step() or 0
    frozen = sharding.place_constants(phase.frozen, devices, rules)
    like = abstract_state(phase, optimizer, devices, rules)
    params = None
    if restore_from and not start:  # before: a path that is wrong does not wait for a compilation
      params = restore_params(restore_from, like.params, identity=phase.identity)
    train_step = jit_step(phase, optimizer, accumulate_steps, like)

    def lower(source: str) -> jax.stages.Lowered:
      batch = sharding.abstract_batch(phase.batch_shapes(source, sizes[source]), devices)
      return train_step.lower(like, frozen, batch, key, source=source)

    steps = _CompiledSteps(lower)
    if start < total_steps:
      steps.begin(schedule[start % len(schedule)])

    # -------------------------------------------------- the state: latest -> path -> scratch
    positions: Mapping[str, Any] = {}
    if start:
      _, state, positions = checkpoints.restore(like)
      done = ': nothing is left to do' if start >= total_steps else ''
      _say(f'going on from step {start:,} of {total_steps:,} in {model_dir}{done}')
    else:
      if params is not None:
        _say(f'beginning with the parameters of {restore_from}')
      else:
        params = sharding.init_like(phase.init, like.params, key)
        params = phase.load_pretrained(params, _say)
      opt_state = sharding.init_mirrored(optimizer.init, params, devices)
      state = TrainState(sharding.replicate(jnp.zeros((), jnp.int32), devices), params, opt_state)
      _say(sharding.parameter_table(state.params, frozen))
    leaves = list(traverse_util.flatten_dict(state.params, sep='/'))
    readers = {
      source: phase.reader(source, taken, _position(positions, source))
      for source, taken in batches_taken(schedule, start).items()
    }
    # Here, as the readers, and not above: TensorFlow is imported beside the compilation.
    from ilm_jax.runtime.metric_log import MetricLog, Profile

    window = _Window(phase, leaves, peak * devices.size, parts=batch_part(devices)[1])
    results: dict[str, float] = {}

    # ---------------------------------------------------------------------------------- the loop
    with (
      MetricLog(model_dir, start_step=start) as log,
      Progress(total_steps, start, model) as progress,
      Profile(model_dir, start + _PROFILE_AFTER, profile_steps) as profile,
      StopSignals() as stop,
    ):
      for step in range(start + 1, total_steps + 1):
        source = schedule[(step - 1) % len(schedule)]
        profile.step(step, state)
        rows = next(readers[source])
        batch = sharding.place_batch(rows, devices)
        with progress.compiling(source):
          window.count_flops(source, rows, state.params, frozen)
          compiled_step = steps[source]
        state, metrics = compiled_step(state, frozen, batch, key)
        window.add(step, source, rows, metrics)
        progress.step(step)

        stopping = stop.asked(step)  # once a step: a signal may come at any line
        evaluating = eval_every is not None and (step % eval_every == 0 or step == total_steps)
        saving = step % save_every == 0 or step == total_steps or stopping
        if step % log_every == 0 or evaluating or saving:
          means, counts = window.fetch()  # raises where a value is not finite: nothing is saved
          rates = progress.rates(step, counts)
          utilisation = window.mfu(rates['steps_per_second'])
          log.write(
            step,
            {f'train/{name}': value for name, value in {**means, **rates}.items()}
            | {
              'train/mfu': utilisation,
              'train/learning_rate': float(np.asarray(learning_rates(step - 1))),
            },
          )
          progress.log(step, {'loss': means[f'{source}/loss']}, utilisation)
        found: dict[str, float] = {}
        if evaluating:
          with progress.paused():
            found = results = phase.evaluate(state.params, frozen)
            log.write(step, {f'validation/{name}': value for name, value in found.items()})
            shown = [f'{name} {found[name]:.4g}' for name in phase.headline]
            progress.note(f'step {step:,}, validation: {"  ".join(shown)}')
        if saving:
          with progress.paused():
            where = {name: all_positions(reader, devices) for name, reader in readers.items()}
            checkpoints.save(step, state, position=where, metrics=found)
        if stopping and step < total_steps:
          progress.note(f'{stop}: saved step {step:,} in {model_dir}; run again to go on')
          break
    if stop.interrupted:
      raise KeyboardInterrupt
  return results


class _CompiledSteps:
  """The training step of each source, compiled once."""

  def __init__(self, lower: Callable[[str], jax.stages.Lowered]):
    self._lower = lower
    self._compiled: dict[str, Future[jax.stages.Compiled]] = {}
    self._compiling = ThreadPoolExecutor(max_workers=1)

  def begin(self, source: str) -> None:
    """Traces a step here, and compiles it in a thread: XLA works without Python meanwhile."""
    if source not in self._compiled:
      self._compiled[source] = self._compiling.submit(self._lower(source).compile)

  def __getitem__(self, source: str) -> jax.stages.Compiled:
    self.begin(source)
    return self._compiled[source].result()


class _Window:
  """What the steps since the last log have given, left on the device until it is asked for."""

  def __init__(self, phase: Phase, leaves: Sequence[str], peak: float, parts: int):
    self._phase = phase
    self._leaves = leaves
    self._steps: list[tuple[int, str, dict[str, jax.Array]]] = []
    self._counts: dict[str, int] = {}
    self._flops: dict[str, Future[int]] = {}
    self._counting = ThreadPoolExecutor(max_workers=1)
    self._mean_flops = 0.0  # of the steps that were fetched last
    self._peak = peak
    self._parts = parts  # of a batch, one of which is here

  def count_flops(self, source: str, rows: Any, params: Any, frozen: Any) -> None:
    """Of a source's step, once, in a thread: it takes seconds of tracing."""
    if source not in self._flops:
      # Shapes: the step gives up its parameters.
      params, frozen = jax.eval_shape(lambda *args: args, params, frozen)
      self._flops[source] = self._counting.submit(self._phase.flops, params, frozen, rows, source)

  def add(self, step, source, rows, metrics) -> None:
    self._steps.append((step, source, metrics))
    for name, count in self._phase.count(source, rows).items():
      self._counts[name] = self._counts.get(name, 0) + count * self._parts

  def fetch(self) -> tuple[dict[str, float], dict[str, int]]:
    """Means of the metrics, and sums of what was counted; the window is empty afterwards.

    Raises:
      FloatingPointError: of the first step whose loss or gradient is not finite.
    """
    values: dict[str, list[float]] = {}
    for step, source, metrics in self._steps:
      fetched = sharding.fetch(metrics)
      norms = fetched.pop('gradient_norms')
      self._check_finite(step, source, fetched, norms)
      for name, value in fetched.items():
        values.setdefault(f'{source}/{name}', []).append(float(value))
    sources = [source for _, source, _ in self._steps]
    counted = [self._flops[source].result() * self._parts for source in sources]
    self._mean_flops = sum(counted) / max(len(counted), 1)
    counts, self._counts, self._steps = self._counts, {}, []
    return {name: float(np.mean(value)) for name, value in values.items()}, counts

  def mfu(self, steps_per_second: float) -> float:
    """Model FLOPs utilisation of the steps that were fetched last."""
    return self._mean_flops * steps_per_second / self._peak

  def _check_finite(self, step, source, metrics, norms) -> None:
    bad = [name for name, value in metrics.items() if not np.isfinite(value)]
    leaves = [leaf for leaf, norm in zip(self._leaves, norms) if not np.isfinite(norm)]
    if bad or leaves:
      raise FloatingPointError(
        f'step {step} ({source} batch): not finite: {", ".join(bad)}; gradients of'
        f' {", ".join(leaves) or "no parameter"}. Nothing of it was saved: the latest checkpoint is'
        ' good. Try a lower learning_rate, a smaller clip_norm or more warmup_steps, or look at the'
        ' batch.'
      )


def batches_taken(schedule: Sequence[str], steps: int) -> dict[str, int]:
  """How many batches of each source the first `steps` steps take."""
  whole, rest = divmod(steps, len(schedule))
  return {x: whole * schedule.count(x) + schedule[:rest].count(x) for x in schedule}


def _position(positions: Mapping[str, Any], source: str) -> np.ndarray | None:
  return np.asarray(positions[source], np.int64) if source in positions else None


def _say(text: str) -> None:
  if jax.process_index() == 0:
    print(text, file=sys.stderr, flush=True)

"""Checkpoints of a run: saved in the background, complete or absent, restored strictly.

The only file of the library that imports Orbax. A run's directory holds one directory per step:

  STEP/state          the arrays of the train state, an Orbax tree of nested dictionaries
  STEP/identity       JSON: for which model and data the checkpoint is
  STEP/position       JSON: where the input stood
  STEP/eval_metrics   JSON: what was measured at this step; empty where nothing was
"""

import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from ilm_jax.errors import UsageError, did_you_mean
from ilm_jax.runtime.processes import is_of_another

_STEP_NAMES = ocp.path.step.standard_name_format()

# Where a run, whose directory has curves and configuration too, keeps its checkpoints.
CHECKPOINTS_DIR = 'checkpoints'

Name = tuple[str, ...]
Leaves = dict[Name, Any]

# Orbax logs every step of its work, and every error that it also raises.
logging.getLogger('absl').addFilter(lambda record: '/orbax/' not in record.pathname)


class Restored(NamedTuple):
  step: int
  state: Any
  position: dict[str, Any]


class CheckpointManager:
  """Saves and restores the checkpoints of one run; every process of the run makes one.

  It belongs to the run that writes: opening it removes what killed saves left. To read while a run
  writes, use `restore_params` and `read_identity`.
  """

  def __init__(
    self,
    directory: epath.PathLike,
    *,
    identity: Mapping[str, Any],
    keep_latest: int = 2,
    keep_best: int = 1,
    best_metric: str | None = None,
    best_mode: Literal['max', 'min'] = 'max',
  ):
    """Opens a run's directory, or makes it.

    Args:
      directory: local, or of a cloud bucket ('gs://...').
      identity: nested dictionaries of JSON values: for which model ('model') and data a checkpoint
        is. What is in the directory must have the same.
      keep_latest: how many of the latest checkpoints to keep, at least 1.
      keep_best: how many of the best to keep besides. The two never displace each other.
      best_metric: the metric that says which are best; without it, or without a finite value of it,
        no checkpoint is.
      best_mode: whether the largest or the smallest value is best.

    Raises:
      UsageError: the directory has checkpoints of another identity or of another program, or is a
        file; a setting is not allowed.
    """
    if keep_latest < 1:
      raise UsageError(f'keep_latest={keep_latest}; a run resumes from its latest: at least 1.')
    if keep_best < 0:
      raise UsageError(f'keep_best={keep_best}; allowed: 0 (keep none besides the latest) or more.')
    if best_mode not in ('max', 'min'):
      raise UsageError(f"best_mode={best_mode!r}; allowed: 'max', 'min'.")
    self._directory = _absolute(directory)
    self._identity = _json_copy(identity, 'identity')
    self._policy = _LatestAndBest(keep_latest, keep_best, best_metric, best_mode)
    if self._directory.exists() and not self._directory.is_dir():
      raise UsageError(f'{self._directory} is a file; checkpoints need a directory: name another.')
    found = _step_paths(self._directory)
    if found:
      saved = _read_json(found[max(found)], 'identity')
      _check_identity(saved, self._identity, str(self._directory))
    for step, path in found.items():
      if (path / 'eval_metrics').exists():  # a kill may have left a half-deleted old step
        self._policy.record(step, _read_json(path, 'eval_metrics'))
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self._policy,
        cleanup_tmp_directories=True,
        # Made in the background, a directory that cannot be made leaves threads that wait for it
        # for minutes, and keep a failed run from exiting.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
      ),
    )

  def save(
    self,
    step: int,
    state: Any,
    *,
    position: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Starts to write a checkpoint, and returns when `state` may be changed or donated.

    A save that is still under way is waited for first. Where `step` is the latest already, nothing
    is done: a signal may ask for a save right after a periodic one.

    Args:
      step: how many steps have been done; more than at the last save.
      state: a pytree of arrays; its key paths become the names in the checkpoint.
      position: where the input stands, JSON values.
      metrics: what was measured at this step.

    Raises:
      UsageError: a later step is there; or `metrics` lacks `best_metric` (the checkpoint is
        nevertheless written).
      Exception: what the save before raised in the background.
    """
    self.wait()
    latest = self.latest_step()
    if step == latest:
      return
    if latest is not None and step < latest:
      raise UsageError(
        f'{self._directory}: step {step} cannot be saved after step {latest}, from which this run'
        ' would resume. Continue from the latest step, or use another model_dir.'
      )
    metrics = {name: float(value) for name, value in (metrics or {}).items()}
    self._policy.record(step, metrics)
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeSave(flax.traverse_util.unflatten_dict(_leaves(state))),
        identity=ocp.args.JsonSave(self._identity),
        position=ocp.args.JsonSave(_json_copy(position, 'position')),
        eval_metrics=ocp.args.JsonSave(metrics),
      ),
      force=True,  # when to save is the caller's decision alone
    )
    best_metric = self._policy.best_metric
    if metrics and best_metric is not None and best_metric not in metrics:
      raise UsageError(
        f'best_metric={best_metric!r} is not among the metrics of step {step}:'
        f' {", ".join(map(repr, sorted(metrics)))}.{did_you_mean(best_metric, metrics)}'
      )

  def wait(self) -> None:
    """Returns when everything is written; raises what a save raised in the background."""
    try:
      self._manager.wait_until_finished()
    except Exception:
      self._manager.reload()  # the steps that were to make room for the failed one are still there
      raise

  def close(self) -> None:
    """Waits as `wait` does and ends the background threads."""
    try:
      self.wait()
    finally:
      self._manager.close()

  def __enter__(self) -> 'CheckpointManager':
    return self

  def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
    if is_of_another(error):
      return  # its part of a save that is under way will not come
    self.close()

  def all_steps(self) -> list[int]:
    """The steps that are kept, ascending, with the one that is being written."""
    return sorted(self._manager.all_steps())

  def latest_step(self) -> int | None:
    return max(self.all_steps(), default=None)

  def best_step(self) -> int | None:
    """The kept step with the best finite value of `best_metric`; of equal ones the later."""
    return next(iter(self._policy.best_first(self.all_steps())), None)

  def restore(self, like: Any, step: int | None = None) -> Restored:
    """Reads a checkpoint back, onto the devices and in the dtypes of `like`.

    Args:
      like: the state as jax.ShapeDtypeStructs with shardings, or as arrays. The mesh and the float
        dtypes may be others than those it was saved with.
      step: which; the latest by default.

    Raises:
      UsageError: there is no such step, or the checkpoint and `like` differ in a name or a shape;
        the message lists them all. Nothing is left unfilled.
    """
    self.wait()
    found = _step_paths(self._directory)
    if not found:
      raise UsageError(f'{self._directory} has no checkpoint yet: nothing can be restored.')
    step = max(found) if step is None else step
    if step not in found:
      steps = ', '.join(map(str, sorted(found)))
      raise UsageError(f'{self._directory} has no checkpoint of step {step}; it has: {steps}.')
    state = _restore_tree(found[step], like)
    return Restored(step, state, _read_json(found[step], 'position'))


@dataclasses.dataclass
class _LatestAndBest(ocp.checkpoint_managers.PreservationPolicy):
  """Keeps the latest and the best checkpoints; neither displaces the other.

  Orbax's own BestN ranks NaN, and keeps checkpoints without metrics while there are few.
  """

  keep_latest: int
  keep_best: int
  best_metric: str | None
  best_mode: str
  _goodness: dict[int, float] = dataclasses.field(default_factory=dict)

  def record(self, step: int, metrics: Mapping[str, float]) -> None:
    """Notes what was measured at a step, or that nothing was."""
    value = metrics.get(self.best_metric or '', math.nan)
    if math.isfinite(value):
      self._goodness[step] = value if self.best_mode == 'max' else -value
    else:
      self._goodness.pop(step, None)  # noted for a save of this step that failed

  def best_first(self, steps: Sequence[int]) -> list[int]:
    measured = [step for step in steps if step in self._goodness]
    return sorted(measured, key=lambda step: (self._goodness[step], step), reverse=True)

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    del context
    steps = sorted(info.step for info in checkpoints)
    kept = {*steps[-self.keep_latest :], *self.best_first(steps)[: self.keep_best]}
    return [info.step in kept for info in checkpoints]


def restore_params(
  path: epath.PathLike, like: Any, *, identity: Mapping[str, Any] | None = None
) -> Any:
  """Reads only `params` of a checkpoint, for a warm start or to evaluate.

  Args:
    path: a run's directory or that of its checkpoints, whose latest step is read, or the directory
      of one step.
    like: the parameters, as for `CheckpointManager.restore`.
    identity: if given, its 'model' must be the checkpoint's.

  Raises:
    UsageError: no complete checkpoint is there, it is of another model, or names or shapes differ.
  """
  step_path = _one_step(path)
  saved = _read_json(step_path, 'identity')
  if identity is not None:
    current = _json_copy(identity, 'identity')
    saved_model, current_model = ({'model': each.get('model', {})} for each in (saved, current))
    _check_identity(saved_model, current_model, str(step_path))
  return _restore_tree(step_path, like, subtree='params')


def read_identity(path: epath.PathLike) -> dict[str, Any]:
  """Reads for which model and data the checkpoints at `path` (as in `restore_params`) are.

  Raises:
    UsageError: no complete checkpoint is there.
  """
  return _read_json(_one_step(path), 'identity')


def checkpoint_path(
  path: epath.PathLike, which: str, best_metric: str, best_mode: Literal['max', 'min']
) -> epath.Path:
  """The directory of one checkpoint of a run.

  Args:
    path: as in `restore_params`; the directory of a step is itself.
    which: 'latest', 'best', or a step.
    best_metric, best_mode: what says which is best; where nothing was measured, it is the latest.

  Raises:
    UsageError: there is no such checkpoint.
  """
  latest = _one_step(path)
  if which == 'latest' or latest == _absolute(path):
    return latest
  steps = _step_paths(latest.parent)
  if which == 'best':
    policy = _LatestAndBest(1, 1, best_metric, best_mode)
    for step, directory in steps.items():
      policy.record(step, _read_json(directory, 'eval_metrics'))
    return steps[(policy.best_first(list(steps)) or [max(steps)])[0]]
  if not which.isdecimal() or int(which) not in steps:
    known = ', '.join(map(str, sorted(steps)))
    raise UsageError(f"checkpoint={which!r}: 'best', 'latest', or a step of {path}: {known}.")
  return steps[int(which)]


class SavedParams(NamedTuple):
  """A checkpoint's directory, its identity, and its parameters by key path, not yet read."""

  step_path: epath.Path
  identity: dict[str, Any]
  leaves: Leaves


def read_saved_params(path: epath.PathLike) -> SavedParams:
  """Reads which parameters there are at `path` (as in `restore_params`), with shapes and dtypes.

  Raises:
    UsageError: no complete checkpoint is there.
  """
  step_path = _one_step(path)
  identity = _read_json(step_path, 'identity')
  leaves = _saved_leaves(step_path, ('params',))
  return SavedParams(step_path, identity, {name[1:]: leaf for name, leaf in leaves.items()})


def restore_selected(saved: SavedParams, wanted: Leaves) -> Leaves:
  """Reads those of the parameters that are `wanted`, as `CheckpointManager.restore` does.

  Raises:
    UsageError: one of them is not saved, or has another shape.
  """
  there = {name: saved.leaves[name] for name in wanted if name in saved.leaves}
  _check_leaves(there, wanted, str(saved.step_path))
  under = {('params', *name): _abstract(name, leaf) for name, leaf in wanted.items()}
  leaves = _read_leaves(saved.step_path, under, partial=True)
  return {name: leaves['params', *name] for name in wanted}


def fits(saved: Any, wanted: Any) -> bool:
  """Whether an array can be read as another: of one shape, and of one dtype unless both float."""
  floats = all(jnp.issubdtype(x.dtype, jnp.floating) for x in (saved, wanted))
  return tuple(saved.shape) == tuple(wanted.shape) and (saved.dtype == wanted.dtype or floats)


def _absolute(path: epath.PathLike) -> epath.Path:
  path = epath.Path(path).expanduser()
  return path if path.is_absolute() else path.absolute()  # absolute() would spoil a bucket's URL


def _step_paths(directory: epath.Path) -> dict[int, epath.Path]:
  """The complete checkpoints in a directory, by step."""
  if not directory.is_dir():
    return {}
  return {found.step: found.path for found in _STEP_NAMES.find_all(directory)}


def _one_step(path: epath.PathLike) -> epath.Path:
  """The directory of one step, from it or from the run's directory."""
  path = _absolute(path)
  # A run's directory may be a number too.
  if path in _step_paths(path.parent).values() and (path / 'state').exists():
    return path
  steps = _step_paths(path) or _step_paths(path / CHECKPOINTS_DIR)
  if steps:
    return steps[max(steps)]
  if not path.exists():
    near = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    raise UsageError(f'{path}: there is no such directory.{did_you_mean(path.name, near)}')
  below = [child for child in path.iterdir() if _step_paths(child)] if path.is_dir() else []
  hint = f' There are some in {min(below)}.' if below else ''
  raise UsageError(
    f"{path} has no complete checkpoint: name a run's directory, or the directory of one of its"
    f' steps.{hint}'
  )


def _read_json(step_path: epath.Path, item: str) -> dict[str, Any]:
  file = step_path / item / 'metadata'  # the name that Orbax's JsonSave gives it
  if not file.exists():
    raise UsageError(
      f'{step_path} is not a checkpoint of this library: it has no {item}. Name the directory of a'
      ' run of ilm_jax; for a language model, use an importer of ilm_jax.lm.'
    )
  return json.loads(file.read_text())


def _json_copy(value: Mapping[str, Any], name: str) -> dict[str, Any]:
  """A copy as JSON reads it back, which a caller's later changes do not reach."""
  try:
    return json.loads(json.dumps(value))
  except TypeError as error:
    raise TypeError(f'{name} is not made of JSON values: {error}') from error


def _check_identity(saved: Mapping[str, Any], current: Mapping[str, Any], source: str) -> None:
  saved_values, current_values = dict(_dotted(saved)), dict(_dotted(current))
  lines = []
  for key in sorted({*saved_values, *current_values}):
    was, now = (values.get(key, 'absent') for values in (saved_values, current_values))
    if was != now:
      lines.append(f'  {key}: {was} in the checkpoint, {now} now')
  if lines:
    raise UsageError(
      f'{source} has checkpoints made with other settings:\n'
      + '\n'.join(lines)
      + '\nUse another model_dir, or go back to the settings of the checkpoint.'
    )


def _dotted(tree: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, str]]:
  """('model.num_layers', '6') for every value of nested dictionaries, as JSON."""
  for key, value in tree.items():
    if isinstance(value, Mapping) and value:
      yield from _dotted(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', json.dumps(value)


def _leaves(tree: Any) -> Leaves:
  """The leaves by key path; sequences and named tuples are named by index and by field."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {tuple(jax.tree_util.keystr((key,), simple=True) for key in path): x for path, x in flat}


def _restore_tree(step_path: epath.Path, like: Any, subtree: str | None = None) -> Any:
  """Reads the leaves of `like`, which must be all that are saved, or all below `subtree`."""
  prefix = () if subtree is None else (subtree,)
  wanted = {prefix + name: _abstract(name, leaf) for name, leaf in _leaves(like).items()}
  _check_leaves(_saved_leaves(step_path, prefix), wanted, str(step_path))
  leaves = _read_leaves(step_path, wanted, partial=subtree is not None)
  return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in wanted])


def _saved_leaves(step_path: epath.Path, prefix: Name) -> Leaves:
  """Shapes and dtypes of what is saved below `prefix`, with which the names begin."""
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    metadata = reader.metadata(step_path / 'state').item_metadata
  saved = flax.traverse_util.flatten_dict(metadata.tree)
  return {name: leaf for name, leaf in saved.items() if name[: len(prefix)] == prefix}


def _read_leaves(step_path: epath.Path, wanted: Leaves, *, partial: bool) -> Leaves:
  """Reads what is known to be saved in these shapes: all there is, or (`partial`) some of it."""
  nested = flax.traverse_util.unflatten_dict(wanted)
  restore_args = ocp.checkpoint_utils.construct_restore_args(nested)
  args = ocp.args.PyTreeRestore(nested, restore_args=restore_args, partial_restore=partial)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    leaves = flax.traverse_util.flatten_dict(reader.restore(step_path / 'state', args=args))
  for name, leaf in wanted.items():
    restored = leaves[name]
    # Orbax's partial restore leaves holes without an error.
    if not isinstance(restored, jax.Array) or restored.shape != leaf.shape:
      raise RuntimeError(f'{step_path}: Orbax did not restore {"/".join(name)}')
  return leaves


def _abstract(name: tuple[str, ...], leaf: Any) -> jax.ShapeDtypeStruct:
  if getattr(leaf, 'sharding', None) is None:
    raise ValueError(f'{"/".join(name)} of `like` has no sharding: say where to restore it')
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _check_leaves(saved: Leaves, wanted: Leaves, source: str) -> None:
  lines = []
  for name in sorted({*saved, *wanted}):
    path = '/'.join(name)
    if name not in wanted:
      lines.append(f'  - {path} {list(saved[name].shape)}')
    elif name not in saved:
      lines.append(f'  + {path} {list(wanted[name].shape)}')
    elif not fits(was := saved[name], now := wanted[name]):
      lines.append(
        f'  {path}: {was.dtype} {list(was.shape)} in the checkpoint,'
        f' {now.dtype} {list(now.shape)} in the model'
      )
  if lines:
    raise UsageError(
      f"{source} does not fit the model ('-' is in the checkpoint only, '+' in the model only):\n"
      + '\n'.join(lines)
      + '\nUse the settings that the checkpoint was made with, or start from another one.'
    )

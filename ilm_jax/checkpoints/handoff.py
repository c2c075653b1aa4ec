"""From phase 1 to phase 2: the Q-Former that was trained becomes the item encoder.

  phase 1                                phase 2
  qformer/queries                     -> item_encoder/queries
  qformer/embedding_norm/*            -> item_encoder/embedding_norm/*
  qformer/layers/layer_N/attention/*, -> item_encoder/layers/layer_N/attention/*,
    cross_attention/*, query_mlp/*         cross_attention/*, query_mlp/*
  text branch, heads, temperatures       (dropped)
  (new)                                  adaptor, gain, common, feature_*, recency,
                                         readout, lm

Every parameter of either side is in one of these groups, or nothing is handed over.
"""

import dataclasses
import fnmatch
import json
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from ilm_jax.checkpoints.manager import SavedParams, fits, read_saved_params, restore_selected
from ilm_jax.checkpoints.natural_order import natural_order
from ilm_jax.errors import UsageError, did_you_mean

_PHASE = 'item_text'  # the name of phase 1's model in the identity of its checkpoints
_FROM, _TO = 'qformer/', 'item_encoder/'

# What queries go through, below _FROM and below _TO alike.
_HANDED_OVER = (
  'queries',
  'embedding_norm/*',
  'layers/layer_*/attention/*',
  'layers/layer_*/cross_attention/*',
  'layers/layer_*/query_mlp/*',
)
_DROPPED = (
  'qformer/word_embedder/*',
  'qformer/positions',
  'qformer/layers/layer_*/text_mlp/*',
  'query_projection/*',
  'text_projection/*',
  'match/*',
  'log_temperature_*',
)
_NEW = ('adaptor/*', 'gain', 'common', 'feature_*', 'recency', 'readout/*', 'lm/*')

_TABLE_FIX = 'set train.entity_table to that of phase 1'


class HandedOver(NamedTuple):
  """Phase 2's parameters, and a few lines on what is phase 1's, dropped and new."""

  params: Any
  report: str


def hand_over(path: Any, params: Any, *, identity: Mapping[str, Any]) -> HandedOver:
  """Puts phase 1's Q-Former in the place of phase 2's item encoder.

  Args:
    path: of a run of phase 1, whose latest step is read, or of one of its steps.
    params: phase 2's parameters as initialised, unboxed, with shardings. They are not changed.
    identity: for which model and data phase 2 is, as phases tell it to `CheckpointManager`: its
      'model.item_encoder', 'data.fingerprint' and 'entity_table.content_hash' are compared.

  Returns:
    `params`, in which the item encoder's arrays are phase 1's, in the shardings and float dtypes
    they had, and all others are the same arrays.

  Raises:
    UsageError: no checkpoint of phase 1 is at `path`; it was trained on other data, another entity
      table or in another size; or a parameter is missing, left over or of another shape. The
      message lists them all, and nothing was read.
  """
  saved = read_saved_params(path)
  flat, tree = jax.tree_util.tree_flatten_with_path(params)
  target = {jax.tree_util.keystr(name, simple=True, separator='/'): leaf for name, leaf in flat}
  source = {'/'.join(name): leaf for name, leaf in saved.leaves.items()}
  _check_kind(saved, target)
  _check_identity(saved, identity)
  plan = _plan(source, target, str(saved.step_path))
  wanted = {tuple(was.split('/')): target[name] for name, was in plan.source_of.items()}
  # The same order as that of `wanted`.
  restored = dict(zip(plan.source_of, restore_selected(saved, wanted).values(), strict=True))
  filled = jax.tree.unflatten(tree, list({**target, **restored}.values()))
  return HandedOver(filled, _report(saved, plan, source, target))


@dataclasses.dataclass(frozen=True)
class _Plan:
  """What becomes of every parameter.

  Attributes:
    source_of: of phase 2, the parameter of phase 1 that it becomes.
    dropped: names of phase 1.
    new: names of phase 2.
  """

  source_of: Mapping[str, str]
  dropped: Sequence[str]
  new: Sequence[str]


def _plan(source: Mapping[str, Any], target: Mapping[str, Any], where: str) -> _Plan:
  source_of = {name: _FROM + name.removeprefix(_TO) for name in target if _is_handed_over(name)}
  dropped = [name for name in source if _matches(name, _DROPPED)]
  new = [name for name in target if _matches(name, _NEW)]
  left_over = sorted({*source} - {*source_of.values()} - {*dropped}, key=natural_order)
  missing, wrong = [], []
  for name in sorted({*target} - {*new}, key=natural_order):
    was, line = source_of.get(name), f'{name} {list(target[name].shape)}'
    if was is None:
      missing.append(f'  - {line}: nothing of phase 1 becomes it, and it is not known as new')
    elif was not in source:
      missing.append(f'  - {line}: there is no {was}.{did_you_mean(was, left_over)}')
    elif not fits(source[was], target[name]):
      kinds = f'{_kind(source[was])} in the checkpoint, {_kind(target[name])} in the model'
      wrong.append(f'  ~ {name}: {kinds}')
  extra = [f'  + {name} {list(source[name].shape)}: nothing is made of it' for name in left_over]
  if lines := [*missing, *extra, *wrong]:
    raise UsageError(
      f"{where} does not fit the model of phase 2 ('-': missing in the checkpoint, '+': left over"
      " in it, '~': there in another shape or dtype):\n"
      + '\n'.join(lines)
      + '\nUse the train.item_encoder of phase 1, or train phase 1 again.'
    )
  return _Plan(source_of, dropped, new)


def _check_kind(saved: SavedParams, target: Mapping[str, Any]) -> None:
  """That it is from phase 1, and for a Q-Former."""
  phase = saved.identity.get('model', {}).get('name')
  if phase != _PHASE:
    raise UsageError(
      f'{saved.step_path} is a checkpoint of {phase!r}, not of phase 1 ({_PHASE!r}): name the'
      ' directory of a run of phase 1.'
    )
  if not any(_is_handed_over(name) for name in target):
    has = ', '.join(name for name in target if name.startswith(_TO)) or 'no parameter'
    raise UsageError(
      f'{saved.step_path} has a Q-Former, but the item encoder of this run is another one: it has'
      f" {has}. Set train.item_encoder.kind='qformer', or leave out train.item_encoder.init_from."
    )


def _check_identity(saved: SavedParams, identity: Mapping[str, Any]) -> None:
  """That entities, their vectors and the sizes of the Q-Former are those of phase 1."""
  trained = saved.identity
  fixes = {
    'data.fingerprint': f'set train.data to {trained["data"].get("name")!r} of phase 1',
    'entity_table.content_hash': _TABLE_FIX,
  }
  compared = {
    f'{part}.{key}': (trained[part].get(key), identity[part][key])
    for part, key in (name.split('.') for name in fixes)
  }
  was, now = (each['model']['item_encoder'] for each in (trained, identity))
  for key in sorted(was.keys() & now.keys()):
    name = f'item_encoder.{key}'
    compared[f'model.{name}'] = was[key], now[key]
    # The width is that of the table's vectors.
    fixes[f'model.{name}'] = _TABLE_FIX if key == 'd_encoder' else f'set train.{name}={was[key]!r}'
  lines = [
    f'  {name}: {json.dumps(was)} in the checkpoint, {json.dumps(now)} in this run; {fixes[name]}'
    for name, (was, now) in compared.items()
    if was != now
  ]
  if lines:
    raise UsageError(
      f'{saved.step_path} was trained with other settings than those of this run:\n'
      + '\n'.join(lines)
      + '\nOr train phase 1 again with the settings of this run.'
    )


def _report(
  saved: SavedParams, plan: _Plan, source: Mapping[str, Any], target: Mapping[str, Any]
) -> str:
  handed = {was: source[was] for was in plan.source_of.values()}
  parts = (
    ('used', handed, _groups(handed, [_FROM + pattern for pattern in _HANDED_OVER])),
    ('dropped', {name: source[name] for name in plan.dropped}, _groups(plan.dropped, _DROPPED)),
    ('new', {name: target[name] for name in plan.new}, _groups(plan.new, _NEW)),
  )
  lines = [f'Item encoder of phase 1: {len(handed)} arrays from {saved.step_path}']
  for title, leaves, groups in parts:
    size = sum(math.prod(leaf.shape) for leaf in leaves.values()) / 1e6
    head = f'  {title:<8} {len(leaves):>3} arrays {size:6.2f} M  '
    lines += textwrap.wrap(
      ', '.join(groups) or '-',
      width=100,
      initial_indent=head,
      subsequent_indent=' ' * len(head),
      break_on_hyphens=False,
    )
  return '\n'.join(lines)


def _groups(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
  """The patterns that there is a name for; 'match' of 'match/*'."""
  used = (pattern for pattern in patterns if any(_matches(name, [pattern]) for name in names))
  return [pattern.removesuffix('/*') for pattern in used]


def _is_handed_over(name: str) -> bool:
  return name.startswith(_TO) and _matches(name.removeprefix(_TO), _HANDED_OVER)


def _matches(name: str, patterns: Iterable[str]) -> bool:
  return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _kind(leaf: Any) -> str:
  return f'{leaf.dtype} {list(leaf.shape)}'

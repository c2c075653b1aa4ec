"""What the benchmarks of training steps share: the state that a run begins with, on both sides.

Ours begins as `ilm train` does and writes its weights and settings; the peer reads them into
modules of transformers and trains with torch's optimizer.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from paired import Measured, Side, Workers

WEIGHTS, SETTINGS = 'weights.npz', 'settings.json'  # what ours hands to the peer


def ways_of_torch() -> dict[str, dict[str, Any]]:
  """Options of 'peer' by how torch runs: the compiler of torch for CPUs needs one for C++."""
  ways = {'eager': {'compiled': False}}
  return ways | {'torch.compile': {'compiled': True}} if shutil.which('c++') else ways


def compare_checked(
  workers: Workers,
  file: str,
  options: Mapping[str, Any],
  ways: Mapping[str, Mapping[str, Any]],
  rounds: int,
  loss: float,
  gradient: float,
  also: Mapping[str, Mapping[str, Any]] = {},
) -> dict[str, Measured]:
  """Function 'ours' of a file, and 'peer' in several ways, all of which pass `check_same`.

  Args:
    workers: what they are run in.
    file, options: of all sides.
    ways: name -> more options of 'peer'; only the fastest is measured.
    rounds: of `Workers.compare`.
    loss, gradient: of `check_same`.
    also: ways that are measured besides.
  """
  sides = {'ours': Side(file, 'ours', options)}
  # The first call of a way may compile; by the second one they are compared.
  sides |= {way: Side(file, 'peer', {**options, **more}, 2) for way, more in ways.items()}
  sides |= {way: Side(file, 'peer', {**options, **more}) for way, more in also.items()}
  found = workers.compare(sides, rounds, one_of=ways)
  for way in (*ways, *also):
    check_same(found['ours'], found[way], loss, gradient)
  return found


def with_peer(
  found: Mapping[str, Measured], ways: Collection[str]
) -> tuple[dict[str, Measured], str]:
  """'ours' and as 'peer' the one of some ways that was measured, and a note on which it is."""
  (best,) = (way for way in ways if found[way].seconds)
  others = (f'; {way}: {found[way].warm:.3g} s when warm' for way in ways if way != best)
  return {'ours': found['ours'], 'peer': found[best]}, f'the peer is {best}{"".join(others)}'


def check_same(ours: Measured, peer: Measured, loss: float, gradient: float) -> None:
  """Compares what both sides return as 'same/...', call by call.

  Args:
    ours, peer: of `Workers.compare`.
    loss: relative tolerance of 'same/...'.
    gradient: that of 'same/gradient_norm'.

  Raises:
    ValueError: a number differs or is not there. Counts must be equal.
  """
  for call, sides in enumerate(zip(ours.calls, peer.calls), start=1):
    for name in sorted({name for side in sides for name in side if name.startswith('same/')}):
      a, b = (side.get(name, math.nan) for side in sides)
      tolerance = gradient if name == 'same/gradient_norm' else loss
      if name.startswith('same/number_of_'):
        tolerance = 0.0
      if not abs(a - b) <= tolerance * abs(b):
        raise ValueError(
          f'call {call}, {name}: ours {a}, peer {b}, further apart than {tolerance:g}.'
        )


def begin(job: Mapping[str, Any], steps: Any, directory: Path) -> tuple[Any, Any, Any, Any]:
  """What `ilm train` does before its first step.

  Args:
    job: arguments of `train`.
    steps: of the phase.
    directory: where the peer finds weights and settings.

  Returns:
    mesh, rules, state and the compiled step.
  """
  import flax.traverse_util
  import jax
  import jax.numpy as jnp
  import optax

  from ilm_jax import train
  from ilm_jax.runtime import sharding

  mesh, rules = sharding.make_mesh({'data': -1}), sharding.DEFAULT_RULES
  params = _noisy(sharding.init_sharded(steps.init, mesh, rules, jax.random.key(job['seed'])))
  leaves = flax.traverse_util.flatten_dict(params, sep='/')
  arrays = {name: np.asarray(x) for name, x in leaves.items()}
  np.savez(directory / WEIGHTS, allow_pickle=False, **arrays)
  settings = {name: x for name, x in job.items() if isinstance(x, int | float)}
  (directory / SETTINGS).write_text(json.dumps(settings))
  rate, total = job['learning_rate'], job['total_steps']
  optimizer = train.make_optimizer(
    optax.warmup_cosine_decay_schedule(
      0.0, rate, min(job['warmup_steps'], total // 2), total, job['final_learning_rate']
    ),
    job['clip_norm'],
    b1=job['adam_b1'],
    b2=job['adam_b2'],
    weight_decay=job['weight_decay'],
    item_encoder_rate=job['item_encoder_rate'],
  )
  opt_state = sharding.init_mirrored(optimizer.init, params, mesh)
  state = train.TrainState(sharding.replicate(jnp.zeros((), jnp.int32), mesh), params, opt_state)
  return mesh, rules, state, train.jit_step(steps, optimizer, job['accumulate_steps'], state)


def _noisy(params: Any) -> Any:
  """With noise, so that no bias is 0 and no scale 1: what a side does not read would show."""
  import jax

  rng = np.random.default_rng(0)

  def noisy(x: jax.Array) -> jax.Array:
    noise = 0.02 * rng.standard_normal(x.shape, np.float32) if x.ndim else 0.0
    return jax.device_put(np.asarray(x) + noise, x.sharding)

  return jax.tree.map(noisy, params)


def peer_update(model: Any, directory: Path) -> Callable[[Any], float]:
  """What follows a loss in torch: backward, clipping, AdamW. It returns the gradient's norm."""
  import torch
  from transformers import get_cosine_schedule_with_warmup

  settings = json.loads((directory / SETTINGS).read_text())
  trained = [x for x in model.parameters() if x.requires_grad]
  optimizer = torch.optim.AdamW(
    [
      {'params': [x for x in trained if x.ndim > 1], 'weight_decay': settings['weight_decay']},
      {'params': [x for x in trained if x.ndim <= 1], 'weight_decay': 0.0},
    ],
    lr=settings['learning_rate'],
    betas=(settings['adam_b1'], settings['adam_b2']),
    fused=True,
  )
  schedule = get_cosine_schedule_with_warmup(
    optimizer, settings['warmup_steps'], settings['total_steps']
  )

  def update(loss: Any) -> float:
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trained, settings['clip_norm'])
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    return float(norm)

  return update


_PARAMETERS = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias'}
# Modules of a layer of ours -> those of Blip2QFormerLayer.
_MODULES = {
  'attention/query': 'attention.attention.query',
  'attention/key': 'attention.attention.key',
  'attention/value': 'attention.attention.value',
  'attention/out': 'attention.output.dense',
  'attention/norm': 'attention.output.LayerNorm',
  'cross_attention/query': 'crossattention.attention.query',
  'cross_attention/key': 'crossattention.attention.key',
  'cross_attention/value': 'crossattention.attention.value',
  'cross_attention/out': 'crossattention.output.dense',
  'cross_attention/norm': 'crossattention.output.LayerNorm',
  'text_mlp/wi': 'intermediate.dense',
  'text_mlp/wo': 'output.dense',
  'text_mlp/norm': 'output.LayerNorm',
  'query_mlp/wi': 'intermediate_query.dense',
  'query_mlp/wo': 'output_query.dense',
  'query_mlp/norm': 'output_query.LayerNorm',
}
_LEAF = re.compile(r'layers/layer_(\d+)/(.+)/(kernel|bias|scale)')


def qformer_state(leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """A state of Blip2QFormerModel from the leaves of our Q-Former, 'layers/layer_0/...' and so on.

  What is outside of the layers but for the norm of embeddings is not in that module.
  """
  matches = {path: match for path in leaves if (match := _LEAF.fullmatch(path))}
  every = len({match[1] for match in matches.values()})
  state = {
    f'layernorm.{_PARAMETERS[name]}': tensor(leaves[f'embedding_norm/{name}'])
    for name in ('scale', 'bias')
  }
  for path, match in matches.items():
    theirs = f'{_MODULES[match[2]]}.{_PARAMETERS[match[3]]}'
    for group, value in enumerate(leaves[path]):
      if match[3] == 'kernel':  # heads are axes of ours: [inputs, heads, width] or the reverse
        inputs = math.prod(value.shape[:-1]) if match[2].endswith('/out') else len(value)
        value = value.reshape(inputs, -1).T
      name = f'encoder.layer.{group * every + int(match[1])}.{theirs}'
      state[name] = tensor(value if match[3] == 'kernel' else value.reshape(-1))
  return state


def tensor(x: np.ndarray) -> Any:
  import torch

  return torch.from_numpy(np.array(x))


def finite(values: dict[str, float]) -> dict[str, float]:
  """The same; what a side has made of nothing is not timed."""
  if bad := [name for name, value in values.items() if not math.isfinite(value)]:
    raise ValueError(f'not finite: {", ".join(bad)}.')
  return values

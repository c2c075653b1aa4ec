"""T5X's checkpoints of tests/golden/t5x, unpacked and loaded."""

import atexit
import functools
import tarfile
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ilm_jax.lm import t5_recipes
from ilm_jax.lm.assemble import Report, assemble
from ilm_jax.lm.t5x_source import T5XSource
from ilm_jax.modules.layers import Compute
from ilm_jax.modules.t5 import T5
from ilm_jax.runtime.sharding import DEFAULT_RULES, abstract_init, make_mesh

GOLDEN = Path(__file__).parents[1] / 'golden' / 't5x'


@functools.cache
def directory(name) -> Path:
  """The checkpoint, unpacked for as long as this process lives."""
  unpacked = tempfile.TemporaryDirectory()
  atexit.register(unpacked.cleanup)
  with tarfile.open(GOLDEN / f'{name}.tar.xz') as packed:
    packed.extractall(unpacked.name, filter='data')
  return Path(unpacked.name) / name


class Loaded(NamedTuple):
  lm: T5
  params: Any
  report: Report

  def logits_of(self, *args, **kwargs):
    apply = jax.jit(functools.partial(self.lm.apply, method='logits_of'))
    return apply({'params': self.params}, *args, **kwargs)


def params_like(config, compute=Compute()):
  """Shapes and shardings of a T5's parameters, on one device."""
  lm, tokens = T5(config, compute), jnp.ones((1, 2), jnp.int32)
  encoder_tokens = tokens if config.num_encoder_layers else None

  def init(key):
    return lm.init(key, tokens, encoder_tokens, method='logits_of')['params']

  mesh = make_mesh({'data': 1}, jax.devices()[:1])
  return abstract_init(init, mesh, DEFAULT_RULES, jax.random.key(0))


@functools.cache
def load(name, scan_layers=True):
  return load_source(T5XSource(directory(name)), scan_layers=scan_layers)


def load_source(source, config=None, scan_layers=True):
  config = config or t5_recipes.t5x_config(source.shapes, source.where)
  compute = Compute(scan_layers=scan_layers)
  recipe, dropped = t5_recipes.t5x_recipe(config, source.shapes)
  params, report = assemble(source, recipe, params_like(config, compute), dropped=dropped)
  return Loaded(T5(config, compute), params, report)

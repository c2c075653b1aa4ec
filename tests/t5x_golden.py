"""T5X's checkpoints of tests/golden/t5x, loaded."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ilm_jax.checkpoints.lm import t5_recipes
from ilm_jax.checkpoints.lm.assemble import Report, assemble
from ilm_jax.checkpoints.lm.t5x import T5XSource
from ilm_jax.modules.layers import Compute
from ilm_jax.modules.t5 import T5
from ilm_jax.sharding import DEFAULT_RULES, abstract_init, make_mesh

GOLDEN = Path(__file__).parent / 'golden' / 't5x'


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
  source = T5XSource(GOLDEN / name)
  return load_source(source, scan_layers=scan_layers)


def load_source(source, config=None, scan_layers=True):
  config = config or t5_recipes.t5x_config(source.shapes, source.where)
  compute = Compute(scan_layers=scan_layers)
  recipe, dropped = t5_recipes.t5x_recipe(config, source.shapes)
  params, report = assemble(source, recipe, params_like(config, compute), dropped=dropped)
  return Loaded(T5(config, compute), params, report)

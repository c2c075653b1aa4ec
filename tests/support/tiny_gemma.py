"""The random tiny Gemma 2 and 3 of tests/golden/gemma, and tensors in memory."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ilm_jax.lm import huggingface
from ilm_jax.lm.assemble import assemble
from ilm_jax.modules.decoder import Decoder, DecoderConfig
from ilm_jax.modules.layers import Compute
from ilm_jax.runtime.sharding import DEFAULT_RULES, abstract_init, make_mesh

GOLDEN = Path(__file__).parents[1] / 'golden' / 'gemma'

# Programs run for a moment here, and are compiled for seconds: not optimised, for a third of them.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})

_COMMON = dict(
  num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_mlp=64, vocab_size=512,
  activation='gelu', window=8, global_every=2, post_norms=True, scale_embeddings=True,
)  # fmt: skip
CONFIGS = {
  'gemma2': DecoderConfig(**_COMMON, attention_softcap=50.0, final_softcap=30.0),
  'gemma3': DecoderConfig(**_COMMON, qk_norm=True, rope_base=1e6, local_rope_base=1e4),
}


class Tensors:
  """A TensorSource of arrays in memory, which counts what is read."""

  def __init__(self, tensors, where='memory'):
    self.where = where
    self.tensors = tensors
    self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
    self.reads = []

  def read(self, name):
    self.reads.append(name)
    return self.tensors[name]


@functools.cache
def golden(family):
  """(tensors under Hugging Face's names, ids [2, 20], logits [2, 20, V])."""
  with np.load(GOLDEN / f'hf_g{family[-1]}.npz') as file:
    tensors = dict(file)
  return tensors, tensors.pop('ids').astype(np.int32), tensors.pop('logits')


def abstract(lm, mesh=None, rules=DEFAULT_RULES):
  """Shapes and shardings of a decoder's parameters; by default on one device."""
  mesh = make_mesh({'data': 1}, jax.devices()[:1]) if mesh is None else mesh
  tokens = jnp.zeros((1, 2), jnp.int32)
  return abstract_init(
    lambda key: lm.init(key, tokens, method='logits_of')['params'], mesh, rules, jax.random.key(0)
  )


@functools.cache
def load(family, compute=Compute()):
  """(decoder, parameters) of the stored tensors."""
  lm = Decoder(CONFIGS[family], compute)
  source = Tensors(golden(family)[0])
  recipe, dropped = huggingface.decoder_recipe(lm.config, source.shapes)
  params, _ = assemble(source, recipe, abstract(lm), dropped=dropped)
  return lm, {'params': params}

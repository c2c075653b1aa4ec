"""GGUF files for tests, written with the gguf package as llama.cpp's converter writes them."""

import functools

import flax.linen as nn
import gguf
import jax
import jax.numpy as jnp
import numpy as np

from ilm_jax.lm.assemble import assemble
from ilm_jax.lm.gguf_models import DROPPED, gguf_architecture, gguf_config, gguf_recipe
from ilm_jax.modules.decoder import Decoder

TOKENS = {
  'tokenizer.ggml.model': 'gpt2',
  'tokenizer.ggml.pre': 'gpt-2',
  'tokenizer.ggml.tokens': ['a', 'b', 'ab', *(f'<|{i}|>' for i in range(29))],
  'tokenizer.ggml.token_type': [1, 1, 1] + 29 * [3],
  'tokenizer.ggml.merges': ['a b'],
  'tokenizer.ggml.bos_token_id': 3,
  'tokenizer.ggml.eos_token_id': 4,
}

# Sizes: L 4, D 64, H 4, N 2, F 96, V 32. C is 16, but of Gemma and Qwen 3 that of the releases,
# which transformers' conversion takes for granted.
_SHAPE = {
  'block_count': 4,
  'context_length': 64,
  'embedding_length': 64,
  'feed_forward_length': 96,
  'attention.head_count': 4,
  'attention.head_count_kv': 2,
  'attention.layer_norm_rms_epsilon': 1e-5,
}
_GEMMA = {**_SHAPE, 'attention.key_length': 256, 'attention.value_length': 256}
METADATA = {
  'llama': {**_SHAPE, 'rope.freq_base': 50_000.0, 'rope.dimension_count': 16, 'vocab_size': 32},
  'qwen2': {**_SHAPE, 'rope.freq_base': 1e6},
  'qwen3': {
    **_SHAPE,
    'rope.freq_base': 1e6,
    'attention.key_length': 128,
    'attention.value_length': 128,
  },
  'gemma': _GEMMA,
  'gemma2': {
    **_GEMMA,
    'attention.sliding_window': 4,
    'attn_logit_softcapping': 50.0,
    'final_logit_softcapping': 30.0,
  },
  'gemma3': {**_GEMMA, 'rope.freq_base': 1e6, 'attention.sliding_window': 4, 'block_count': 7},
}


def interleaved(weight, heads):
  """[heads * C, D]: what the converter does to Llama's queries and keys."""
  return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def random_weights(architecture, tied=True, seed=0):
  """Name in the file -> array, with queries and keys in the order of the checkpoint."""
  m = METADATA[architecture]
  width, mlp, heads, kv_heads = 64, 96, 4, 2
  head_dim = m.get('attention.key_length', 16)
  rng = np.random.default_rng(seed)

  def matrix(*shape):
    return rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)

  def scale(size):
    return rng.uniform(0.5, 1.5, size).astype(np.float32)

  weights = {'token_embd.weight': matrix(32, width), 'output_norm.weight': scale(width)}
  if not tied:
    weights['output.weight'] = matrix(32, width)
  for i in range(m['block_count']):
    layer = {
      'attn_norm.weight': scale(width),
      'ffn_norm.weight': scale(width),
      'attn_q.weight': matrix(heads * head_dim, width),
      'attn_k.weight': matrix(kv_heads * head_dim, width),
      'attn_v.weight': matrix(kv_heads * head_dim, width),
      'attn_output.weight': matrix(width, heads * head_dim),
      'ffn_gate.weight': matrix(mlp, width),
      'ffn_up.weight': matrix(mlp, width),
      'ffn_down.weight': matrix(width, mlp),
    }
    if architecture == 'qwen2':
      layer |= {f'attn_{x}.bias': matrix(len(layer[f'attn_{x}.weight'])) for x in 'qkv'}
    if architecture in ('qwen3', 'gemma3'):
      layer |= {f'attn_{x}_norm.weight': scale(head_dim) for x in 'qk'}
    if architecture in ('gemma2', 'gemma3'):
      layer |= {f'post_{x}_norm.weight': scale(width) for x in ('attention', 'ffw')}
    weights |= {f'blk.{i}.{name}': value for name, value in layer.items()}
  return weights


def write_gguf(path, architecture, metadata, tensors, types=None):
  """Writes a file.

  Args:
    metadata: keys with a dot in the first place ('.block_count') belong to the architecture.
    tensors: name -> array, or (bytes as uint8, type).
    types: name -> type to quantise to; float32 by default.
  """
  writer = gguf.GGUFWriter(str(path), architecture)
  writer.add_name('test')
  for key, value in metadata.items():
    key = f'{architecture}{key}' if key.startswith('.') else key
    kinds = {bool: 'bool', int: 'uint32', float: 'float32', str: 'string'}
    getattr(writer, f'add_{kinds.get(type(value), "array")}')(key, value)
  for name, value in tensors.items():
    data, kind = value if isinstance(value, tuple) else (value, (types or {}).get(name))
    if kind is not None and not isinstance(value, tuple):
      data = gguf.quantize(data, kind)
    writer.add_tensor(name, data, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def write_model(path, architecture, metadata=(), tensors=(), types=None, tied=True):
  """Writes a small model of random weights and returns them, not quantised."""
  weights = random_weights(architecture, tied)
  stored = dict(weights)
  if architecture == 'llama':
    for name in weights:
      if name.endswith('attn_q.weight'):
        stored[name] = interleaved(weights[name], 4)
      if name.endswith('attn_k.weight'):
        stored[name] = interleaved(weights[name], 2)
  own = {f'.{key}': value for key, value in METADATA[architecture].items()}
  everything = {**own, **TOKENS, **dict(metadata)}
  present = {key: value for key, value in everything.items() if value is not None}
  write_gguf(path, architecture, present, {**stored, **dict(tensors)}, types)
  return weights


def decoder_and_params(source):
  """The decoder of a GGUF file, with its parameters."""
  config = gguf_config(source)
  decoder = Decoder(config)
  tokens = jnp.zeros((1, 1), jnp.int32)
  shapes = jax.eval_shape(
    functools.partial(decoder.init, method='logits_of'), jax.random.key(0), tokens
  )
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
    nn.meta.unbox(shapes)['params'],
  )
  recipe = gguf_recipe(config, gguf_architecture(source))
  params, _ = assemble(source, recipe, like, dropped=DROPPED)
  return decoder, params

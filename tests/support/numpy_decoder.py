"""The decoder once more, in NumPy and float64, from tensors under Hugging Face's names.

Written from the papers for tests: no cache, no scan, one head of one row after the other.
"""

import math

import numpy as np


def who_sees_whom(positions, segment_ids, prefix_mask=None):
  """[B, T, T] bool, pair by pair."""
  rows, length = np.shape(positions)
  sees = np.zeros((rows, length, length), bool)
  for b, t, s in np.ndindex(*sees.shape):
    same = segment_ids[b][t] == segment_ids[b][s]
    before = positions[b][s] <= positions[b][t]
    prefix = prefix_mask is not None and prefix_mask[b][t] and prefix_mask[b][s]
    sees[b, t, s] = same and (before or prefix)
  return sees


def embed(tensors, c, tokens):
  return tensors['model.embed_tokens.weight'].astype(np.float64)[tokens] * (
    math.sqrt(c.d_model) if c.scale_embeddings else 1
  )


def logits(tensors, c, embeddings, positions, sees):
  """[B, T, D], [B, T], [B, T, T] -> [B, T, V]."""
  gemma = c.scale_embeddings
  rows, length, _ = embeddings.shape

  def norm(x, name):
    weight = tensors[f'{name}.weight'] + (1.0 if gemma else 0.0)
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + c.norm_epsilon) * weight

  def linear(x, name):
    y = x @ tensors[f'{name}.weight'].astype(np.float64).T
    return y + tensors[f'{name}.bias'] if f'{name}.bias' in tensors else y

  def turn(x, position, is_local):
    """One head of one token: its two halves are the axes of C / 2 planes."""
    half = c.head_dim // 2
    out = np.empty_like(x)
    for i in range(half):
      base = c.local_rope_base if is_local and c.local_rope_base else c.rope_base
      frequency = base ** (-2 * i / c.head_dim)
      if not is_local:
        frequency = scaled(frequency / c.rope_divisor, c.rope_scaling)
      cos, sin = math.cos(position * frequency), math.sin(position * frequency)
      out[i] = x[i] * cos - x[i + half] * sin
      out[i + half] = x[i + half] * cos + x[i] * sin
    return out

  def attention(x, name, is_local):
    query, key, value = (
      linear(x, f'{name}.{kind}_proj').reshape(rows, length, -1, c.head_dim) for kind in 'qkv'
    )
    if c.qk_norm:
      query, key = norm(query, f'{name}.q_norm'), norm(key, f'{name}.k_norm')
    for b, t in np.ndindex(rows, length):
      for heads in (query, key):
        for h in range(heads.shape[2]):
          heads[b, t, h] = turn(heads[b, t, h], positions[b][t], is_local)
    scale = c.query_scale or c.head_dim**-0.5
    out = np.zeros(query.shape)
    for b, t, h in np.ndindex(rows, length, c.num_heads):
      keys = [
        s
        for s in range(length)
        if sees[b, t, s] and not (is_local and abs(positions[b][t] - positions[b][s]) >= c.window)
      ]
      shared = h // (c.num_heads // c.num_kv_heads)
      scores = scale * (key[b, keys, shared] @ query[b, t, h])
      if c.attention_softcap:
        scores = c.attention_softcap * np.tanh(scores / c.attention_softcap)
      weights = np.exp(scores - scores.max())
      out[b, t, h] = weights / weights.sum() @ value[b, keys, shared]
    return linear(out.reshape(rows, length, -1), f'{name}.o_proj')

  def mlp(x, name):
    gate = linear(x, f'{name}.gate_proj')
    if c.activation == 'gelu':
      gate = gate / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    else:
      gate = gate / (1 + np.exp(-gate))
    return linear(gate * linear(x, f'{name}.up_proj'), f'{name}.down_proj')

  x = embeddings
  for i in range(c.num_layers):
    layer = f'model.layers.{i}'
    is_local = (i + 1) % c.global_every != 0
    attended = attention(norm(x, f'{layer}.input_layernorm'), f'{layer}.self_attn', is_local)
    if c.post_norms:
      x = x + norm(attended, f'{layer}.post_attention_layernorm')
      wide = mlp(norm(x, f'{layer}.pre_feedforward_layernorm'), f'{layer}.mlp')
      x = x + norm(wide, f'{layer}.post_feedforward_layernorm')
    else:
      x = x + attended
      x = x + mlp(norm(x, f'{layer}.post_attention_layernorm'), f'{layer}.mlp')
  head = 'model.embed_tokens' if c.tied_head else 'lm_head'
  out = linear(norm(x, 'model.norm'), head)
  return c.final_softcap * np.tanh(out / c.final_softcap) if c.final_softcap else out


def scaled(frequency, scaling):
  """Llama 3's RoPE for long contexts, by wavelengths."""
  if scaling is None:
    return frequency
  wavelength = 2 * math.pi / frequency
  if wavelength < scaling.original_length / scaling.high_frequency_factor:
    return frequency
  if wavelength > scaling.original_length / scaling.low_frequency_factor:
    return frequency / scaling.factor
  smooth = (scaling.original_length / wavelength - scaling.low_frequency_factor) / (
    scaling.high_frequency_factor - scaling.low_frequency_factor
  )
  return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def random_tensors(c, seed=0):
  """Of a decoder, under Hugging Face's names; norms and biases are random, too."""
  rng = np.random.default_rng(seed)
  shapes = {
    'model.embed_tokens.weight': (c.vocab_size, c.d_model),
    'model.norm.weight': (c.d_model,),
  }
  if not c.tied_head:
    shapes['lm_head.weight'] = (c.vocab_size, c.d_model)
  norms = ['input_layernorm', 'post_attention_layernorm']
  norms += ['pre_feedforward_layernorm', 'post_feedforward_layernorm'] * c.post_norms
  for i in range(c.num_layers):
    layer = f'model.layers.{i}'
    shapes.update({f'{layer}.{norm}.weight': (c.d_model,) for norm in norms})
    for kind, heads in (('q', c.num_heads), ('k', c.num_kv_heads), ('v', c.num_kv_heads)):
      width = heads * c.head_dim
      shapes[f'{layer}.self_attn.{kind}_proj.weight'] = (width, c.d_model)
      if c.qkv_bias:
        shapes[f'{layer}.self_attn.{kind}_proj.bias'] = (width,)
      if c.qk_norm and kind != 'v':
        shapes[f'{layer}.self_attn.{kind}_norm.weight'] = (c.head_dim,)
    shapes[f'{layer}.self_attn.o_proj.weight'] = (c.d_model, c.num_heads * c.head_dim)
    shapes[f'{layer}.mlp.gate_proj.weight'] = (c.d_mlp, c.d_model)
    shapes[f'{layer}.mlp.up_proj.weight'] = (c.d_mlp, c.d_model)
    shapes[f'{layer}.mlp.down_proj.weight'] = (c.d_model, c.d_mlp)

  def draw(name, shape):
    if name.endswith('norm.weight'):
      return rng.normal(0.0 if c.scale_embeddings else 1.0, 0.3, shape)
    return rng.normal(0, 0.5 if len(shape) == 1 else 1.5 / math.sqrt(shape[-1]), shape)

  return {name: draw(name, shape).astype(np.float32) for name, shape in shapes.items()}

"""Gemma 1, 2 and 3 as Google releases them, in Orbax checkpoints.

  source = OrbaxSource('gemma3-1b-it')
  config = gemma_config(source)
  recipe, dropped = gemma_recipe(config, source.shapes)
  params, report = assemble(source, recipe, like, dropped=dropped)

There are two layouts, of which the names of tensors here say what the checkpoint says:

  FLAT     transformer/layer_0/attn/q_einsum/w   transformer/layer_0/mlp/linear/w
  NESTED   layer_0/attn/q_einsum/w               layer_0/mlp/linear

Letters: D model width, L layers, N heads, K key-value heads, H head width, F feed-forward width,
V vocabulary.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ilm_jax.errors import UsageError, did_you_mean
from ilm_jax.lm.assemble import Leaf, Recipe, TensorSource
from ilm_jax.lm.decoder_sizes import DECODER_SIZES
from ilm_jax.modules.decoder import DecoderConfig

# The eyes of a multimodal Gemma 3, and what leads from them to the language model.
DROPPED = ('SigLiPFromPatches_0/*', 'vision_encoder/*', '*embedder/mm_*')


def gemma_config(source: TensorSource) -> DecoderConfig:
  """The configuration of the released Gemma that has a checkpoint's shapes.

  A vocabulary of another size is taken over from the checkpoint.

  Raises:
    UsageError: a tensor that every Gemma has is missing, or no release has these shapes.
  """
  found = _Found(source)
  embedding = found('embedder/input_embedding', 2)
  heads, head_dim, d_model = found('layer_0/attn/attn_vec_einsum/w', 3)
  layers = [re.match(rf'{found.root}layer_(\d+)/', name) for name in source.shapes]
  fused = found.has('layer_0/attn/qkv_einsum/w')
  shape = dict(
    num_layers=1 + max(int(layer[1]) for layer in layers if layer),
    d_model=d_model,
    num_heads=heads,
    num_kv_heads=heads if fused else found('layer_0/attn/kv_einsum/w', 4)[1],
    head_dim=head_dim,
    d_mlp=found(f'layer_0/mlp/linear{found.end}', 2)[0],
    qk_norm=found.has('layer_0/attn/_query_norm/scale'),
    post_norms=found.has('layer_0/post_attention_norm/scale'),
  )
  differences = {
    size: {key: getattr(config, key) for key in shape if getattr(config, key) != shape[key]}
    for size, config in DECODER_SIZES.items()
    if size.startswith('gemma')
  }
  nearest = min(differences, key=lambda size: len(differences[size]))
  if differences[nearest]:
    raise UsageError(
      f'{source.where}: no released Gemma has these shapes: {_listed(shape)}. The nearest,'
      f' {nearest}, has {_listed(differences[nearest])}. For a Gemma of your own, give its'
      ' configuration in place of this.'
    )
  return dataclasses.replace(DECODER_SIZES[nearest], vocab_size=embedding[0])


def _listed(values: Mapping[str, Any]) -> str:
  return ', '.join(f'{key}={value}' for key, value in values.items())


class _Found:
  """Shapes of a checkpoint by their names in NESTED, whichever layout it has.

  Attributes:
    root: what FLAT has before all names of the language model.
    end: what it has after those of the feed-forward layers.
  """

  def __init__(self, source: TensorSource):
    self.source = source
    self.root, self.end = _layout(source.shapes)

  def has(self, name: str) -> bool:
    return self.root + name in self.source.shapes

  def __call__(self, name: str, rank: int) -> tuple[int, ...]:
    name, shapes = self.root + name, self.source.shapes
    if name not in shapes:
      raise UsageError(
        f'{self.source.where}: no {name}, which every Gemma 1, 2 and 3 of Google has.'
        f'{did_you_mean(name, shapes)}'
      )
    if len(shapes[name]) != rank:
      raise UsageError(
        f'{self.source.where}: {name} {list(shapes[name])} has {len(shapes[name])} axes; in a Gemma'
        f' it has {rank}.'
      )
    return shapes[name]


def _layout(shapes: Mapping[str, Any]) -> tuple[str, str]:
  root = 'transformer/' if any(name.startswith('transformer/') for name in shapes) else ''
  return root, '/w' if f'{root}layer_0/mlp/linear/w' in shapes else ''


def gemma_recipe(
  c: DecoderConfig, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Recipe, tuple[str, ...]]:
  """How a decoder's parameters are made of Google's tensors, and which are not needed.

  Args:
    c: of `gemma_config`, or a configuration of one's own.
    shapes: of the tensors there are, which say in which of its layouts the checkpoint is.

  Raises:
    UsageError: D = F, where the two orders of `gating_einsum` have the same shape.
  """
  root, end = _layout(shapes)
  layer = root + 'layer_{layer}/'
  swap = _swap if _is_transposed(c, shapes.get(f'{root}layer_0/mlp/gating_einsum{end}')) else _same
  gate = f'{layer}mlp/gating_einsum{end}'
  recipe = {
    'embedder/embedding': Leaf(f'{root}embedder/input_embedding'),
    'layers/attention/out/kernel': Leaf(f'{layer}attn/attn_vec_einsum/w'),
    'layers/mlp/wi_0/kernel': Leaf(gate, lambda w: swap(w[0])),
    'layers/mlp/wi_1/kernel': Leaf(gate, lambda w: swap(w[1])),
    'layers/mlp/wo/kernel': Leaf(f'{layer}mlp/linear{end}'),
  }
  # [N, D, H] -> [D, N, H]
  if f'{root}layer_0/attn/qkv_einsum/w' in shapes:
    fused = f'{layer}attn/qkv_einsum/w'
    recipe['layers/attention/query/kernel'] = Leaf(fused, lambda w: _swap(w[0]))
    recipe['layers/attention/key/kernel'] = Leaf(fused, lambda w: _swap(w[1]))
    recipe['layers/attention/value/kernel'] = Leaf(fused, lambda w: _swap(w[2]))
  else:
    fused = f'{layer}attn/kv_einsum/w'
    recipe['layers/attention/query/kernel'] = Leaf(f'{layer}attn/q_einsum/w', _swap)
    recipe['layers/attention/key/kernel'] = Leaf(fused, lambda w: _swap(w[0]))
    recipe['layers/attention/value/kernel'] = Leaf(fused, lambda w: _swap(w[1]))
  norms = {
    'final_norm': f'{root}final_norm',
    'layers/attention_norm': f'{layer}pre_attention_norm',
    'layers/mlp_norm': f'{layer}pre_ffw_norm',
  }
  if c.post_norms:
    norms['layers/post_attention_norm'] = f'{layer}post_attention_norm'
    norms['layers/post_mlp_norm'] = f'{layer}post_ffw_norm'
  if c.qk_norm:
    norms['layers/attention/query_norm'] = f'{layer}attn/_query_norm'
    norms['layers/attention/key_norm'] = f'{layer}attn/_key_norm'
  for ours, theirs in norms.items():
    recipe[f'{ours}/scale'] = Leaf(f'{theirs}/scale', _plus_one)
  return recipe, DROPPED


def _is_transposed(c: DecoderConfig, gating: tuple[int, ...] | None) -> bool:
  """[2, F, D] in Gemma 2 from 9B and in Gemma 3; [2, D, F] in the others."""
  if c.d_model == c.d_mlp:
    raise UsageError(
      f'd_model={c.d_model} and d_mlp={c.d_mlp} are equal: whether gating_einsum is [2, d_model,'
      ' d_mlp] or [2, d_mlp, d_model] cannot be seen. No released Gemma is so; convert such a'
      " checkpoint to Hugging Face's layout, which has one order."
    )
  return gating == (2, c.d_mlp, c.d_model)


def _same(w: Any) -> Any:
  return w


def _swap(w: Any) -> Any:
  return w.swapaxes(0, 1)


def _plus_one(scale: Any) -> Any:
  # Gemma's norms multiply by (1 + scale); our scale is the whole factor.
  return scale.astype(np.float32) + 1

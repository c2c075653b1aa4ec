"""T5s of T5X and of Hugging Face: their configuration, and what their tensors make.

  config = t5x_config(source.shapes, source.where)
  recipe, dropped = t5x_recipe(config, source.shapes)
  params, report = assemble(source, recipe, like, dropped=dropped)

Letters as in modules/t5.py: D model width, L layers, H heads, C head width, F feed-forward width,
V vocabulary, K buckets of the relative bias.
"""

import math
import re
from collections.abc import Container, Mapping
from typing import Any, NamedTuple

import numpy as np

from ilm_jax.errors import UsageError, did_you_mean
from ilm_jax.lm.assemble import Leaf, Recipe
from ilm_jax.lm.huggingface import Getter
from ilm_jax.modules.t5 import T5Config

Shapes = Mapping[str, tuple[int, ...]]

FAMILIES = ('t5', 'mt5', 'umt5')
_GATES = {'gated-gelu': 'gelu', 'gated-silu': 'silu', 'gated-relu': 'relu'}
_HEAD = 'lm_head.weight'
_TABLES = ('shared.weight', 'encoder.embed_tokens.weight', 'decoder.embed_tokens.weight')
# Older checkpoints have a relative bias of cross-attention, which nothing has ever read.
_DROPPED = ('decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight',)
_BIAS = 'relpos_bias/rel_embedding'  # T5X's


def huggingface_config(config: Mapping[str, Any], where: str) -> T5Config:
  """The configuration that a config.json describes.

  Args:
    config: content of the file.
    where: the checkpoint, for messages.

  Raises:
    UsageError: a key is missing, or the model computes something else, as the first T5 does, whose
      feed-forward layers have no gate.
  """
  get = Getter(config, where)
  family = get('model_type')
  if family not in FAMILIES:
    hint = did_you_mean(str(family), FAMILIES)
    raise UsageError(f'{where}: model_type={family!r}; allowed: {", ".join(FAMILIES)}.{hint}')
  gate = get('feed_forward_proj', 'relu' if family == 't5' else 'gated-gelu')
  if gate not in _GATES:
    raise UsageError(
      f'{where}: feed_forward_proj={gate!r}; allowed: {", ".join(_GATES)}. It is a T5 of before'
      ' version 1.1: take T5 1.1, Flan-T5 or mT5 of the same size.'
    )
  tied = False  # mT5's logits are never scaled, whatever is said of its head
  if family != 'mt5':
    # transformers 5 ties everything by name, and tells T5 1.1 by 'scale_decoder_outputs'.
    tied = get('scale_decoder_outputs', get('tie_word_embeddings', True))
  return T5Config(
    num_encoder_layers=get('num_layers'),
    num_decoder_layers=get('num_decoder_layers', None) or get('num_layers'),
    d_model=get('d_model'),
    num_heads=get('num_heads'),
    head_dim=get('d_kv'),
    d_mlp=get('d_ff'),
    vocab_size=get('vocab_size'),
    max_length=get('n_positions', 512),
    relative_buckets=get('relative_attention_num_buckets', 32),
    relative_max_distance=get('relative_attention_max_distance', 128),
    shared_relative_bias=family != 'umt5',
    activation=_GATES[gate],
    norm_epsilon=get('layer_norm_epsilon', 1e-6),
    tied_head=tied,
  )


def huggingface_recipe(c: T5Config, names: Container[str]) -> tuple[Recipe, tuple[str, ...]]:
  """How a T5 is made of Hugging Face's tensors, and which are not needed.

  Args:
    c: of `huggingface_config`.
    names: of the tensors there are: the embedding has up to three, and the head another one.
  """
  tables = [name for name in _TABLES if name in names] or [_TABLES[0]]
  recipe: dict[str, Leaf] = {}
  if not c.tied_head:
    recipe['head/embedding'] = Leaf(_HEAD)
  elif _HEAD in names:
    tables.append(_HEAD)
  recipe['embedder/embedding'] = Leaf(tuple(tables), _one_table)
  for stack in ('encoder', 'decoder'):
    block = f'{stack}.block.{{layer}}.layer'
    parts = [('attention', 'SelfAttention'), ('cross_attention', 'EncDecAttention')]
    parts = parts[: 1 if stack == 'encoder' else 2]
    for i, (ours, theirs) in enumerate(parts):
      path, name = f'{stack}/layers/{ours}', f'{block}.{i}.{theirs}'
      for projection in ('query', 'key', 'value'):
        recipe[f'{path}/{projection}/kernel'] = Leaf(
          f'{name}.{projection[0]}.weight', lambda w: w.T.reshape(w.shape[1], c.num_heads, -1)
        )
      recipe[f'{path}/out/kernel'] = Leaf(
        f'{name}.o.weight', lambda w: w.T.reshape(c.num_heads, -1, w.shape[0])
      )
      recipe[f'{path}_norm/scale'] = Leaf(f'{block}.{i}.layer_norm.weight')
    last = f'{block}.{len(parts)}'
    for kernel in ('wi_0', 'wi_1', 'wo'):
      recipe[f'{stack}/layers/mlp/{kernel}/kernel'] = Leaf(
        f'{last}.DenseReluDense.{kernel}.weight', lambda w: w.T
      )
    recipe[f'{stack}/layers/mlp_norm/scale'] = Leaf(f'{last}.layer_norm.weight')
    recipe[f'{stack}/final_norm/scale'] = Leaf(f'{stack}.final_layer_norm.weight')
    bias = '.0.SelfAttention.relative_attention_bias.weight'
    if c.shared_relative_bias:
      recipe[f'{stack}/relative_bias/embedding'] = Leaf(f'{stack}.block.0.layer{bias}', _transposed)
    else:
      recipe[f'{stack}/layers/relative_bias/embedding'] = Leaf(f'{block}{bias}', _transposed)
  return recipe, _DROPPED


def _one_table(table: Any, *copies: Any) -> Any:
  """The table that several names stand for. transformers 5 can train them apart."""
  for copy in copies:
    if isinstance(table, np.ndarray) and not np.array_equal(table, copy):
      raise UsageError(
        'The checkpoint has several token embeddings that differ, of encoder and decoder or of a'
        ' head that its config.json calls tied: T5 has one. Tie them, and train or save it again.'
      )
  return table


def _transposed(x: Any) -> Any:
  return x.T


def t5x_config(shapes: Shapes, where: str) -> T5Config:
  """The configuration that the tensors of a T5X checkpoint show.

  What they do not show is as in T5X's own models: gated by 'gelu', distances up to 128.

  Args:
    shapes: of `T5XSource`.
    where: the checkpoint, for messages.

  Raises:
    UsageError: they are not those of a T5 1.1 or of examples/decoder_only.
  """

  def shape(name: str) -> tuple[int, ...]:
    if name in shapes:
      return shapes[name]
    raise UsageError(
      f'{where}: no tensor {name!r}, which each T5 1.1 of T5X has, and its decoder_only, where'
      f' feed-forward layers have a gate.{did_you_mean(name, shapes)}'
    )

  encoder, decoder = (_t5x_stack(shapes, stack) for stack in ('encoder', 'decoder'))
  first = decoder.prefix.format(layer=0)
  num_heads, *_, buckets = shape(decoder.bias.format(layer=0))
  vocab_size, d_model = shape(_t5x_table(shapes))
  *_, d_mlp = shape(f'{first}mlp/wi_0/kernel')
  query = math.prod(shape(f'{first}self_attention/query/kernel'))  # D L H C of stacked layers
  width = query // d_model // (decoder.num_layers if decoder.stacked else 1)
  return T5Config(
    num_encoder_layers=encoder.num_layers,
    num_decoder_layers=decoder.num_layers,
    d_model=d_model,
    num_heads=num_heads,
    head_dim=width // num_heads,
    d_mlp=d_mlp,
    vocab_size=vocab_size,
    relative_buckets=buckets,
    shared_relative_bias=decoder.bias == f'decoder/{_BIAS}',
    tied_head='decoder/logits_dense/kernel' not in shapes,
  )


def t5x_recipe(c: T5Config, shapes: Shapes) -> tuple[Recipe, tuple[str, ...]]:
  """How a T5 is made of T5X's tensors, of all of which something is made.

  Args:
    c: of `t5x_config`.
    shapes: of `T5XSource`: they show whether the layers are stacked.
  """
  recipe: dict[str, Leaf] = {'embedder/embedding': Leaf(_t5x_table(shapes))}
  if not c.tied_head:
    recipe['head/embedding'] = Leaf('decoder/logits_dense/kernel', _transposed)
  for name in ('encoder', 'decoder'):
    recipe |= _t5x_layers(c, name, _t5x_stack(shapes, name))
    recipe[f'{name}/final_norm/scale'] = Leaf(f'{name}/{name}_norm/scale')
  return recipe, ()


class _Stack(NamedTuple):
  """Where encoder or decoder are. Stacked layers lie along axis 1: a kernel is [D, L, H, C]."""

  prefix: str
  stacked: bool
  num_layers: int
  bias: str


def _t5x_stack(shapes: Shapes, name: str) -> _Stack:
  stacked = any(tensor.startswith(f'{name}/{name}/') for tensor in shapes)
  prefix = f'{name}/{name}/' if stacked else f'{name}/layers_{{layer}}/'
  if stacked:
    num_layers = shapes.get(f'{prefix}pre_mlp_layer_norm/scale', (0, 0))[1]
  else:
    found = (re.match(rf'{name}/layers_(\d+)/', tensor) for tensor in shapes)
    num_layers = max((int(match[1]) + 1 for match in found if match), default=0)
  shared = f'{name}/{_BIAS}'
  return _Stack(prefix, stacked, num_layers, shared if shared in shapes else f'{prefix}{_BIAS}')


def _t5x_table(shapes: Shapes) -> str:
  table = 'token_embedder/embedding'
  return table if table in shapes else f'decoder/{table}'


def _t5x_layers(c: T5Config, name: str, stack: _Stack) -> dict[str, Leaf]:
  prefix, lead = stack.prefix, int(stack.stacked)

  def by_layer(x: Any) -> Any:
    return x.swapaxes(0, 1) if stack.stacked else x

  def into_heads(w: Any) -> Any:  # [D, HC], or [D, H, C] already
    w = by_layer(w)
    return w.reshape(*w.shape[: lead + 1], c.num_heads, c.head_dim)

  def out_of_heads(w: Any) -> Any:  # [HC, D], or [H, C, D] already
    w = by_layer(w)
    return w.reshape(*w.shape[:lead], c.num_heads, c.head_dim, w.shape[-1])

  attention = [('attention', 'attention', 'pre_attention_layer_norm')]
  if name == 'decoder':
    attention = [
      ('attention', 'self_attention', 'pre_self_attention_layer_norm'),
      ('cross_attention', 'encoder_decoder_attention', 'pre_cross_attention_layer_norm'),
    ]
  recipe: dict[str, Leaf] = {}
  for ours, theirs, norm in attention:
    for kernel in ('query', 'key', 'value'):
      recipe[f'{ours}/{kernel}/kernel'] = Leaf(f'{prefix}{theirs}/{kernel}/kernel', into_heads)
    recipe[f'{ours}/out/kernel'] = Leaf(f'{prefix}{theirs}/out/kernel', out_of_heads)
    recipe[f'{ours}_norm/scale'] = Leaf(f'{prefix}{norm}/scale', by_layer)
  for kernel in ('wi_0', 'wi_1', 'wo'):
    recipe[f'mlp/{kernel}/kernel'] = Leaf(f'{prefix}mlp/{kernel}/kernel', by_layer)
  recipe['mlp_norm/scale'] = Leaf(f'{prefix}pre_mlp_layer_norm/scale', by_layer)
  recipe = {f'{name}/layers/{path}': leaf for path, leaf in recipe.items()}
  if c.shared_relative_bias:
    recipe[f'{name}/relative_bias/embedding'] = Leaf(stack.bias)
  else:
    recipe[f'{name}/layers/relative_bias/embedding'] = Leaf(stack.bias, by_layer)
  return recipe

"""Decoder-only language models in Hugging Face's layout: config.json and safetensors.

Gemma 1, 2 and 3 (of a multimodal Gemma 3 the language model), Llama (also SmolLM2), Qwen 2.5 and 3.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from ilm_jax.errors import UsageError, did_you_mean
from ilm_jax.lm.assemble import Leaf, Recipe
from ilm_jax.modules.decoder import DecoderConfig, RopeScaling

_INDEX = 'model.safetensors.index.json'

# What the model does not read: tables that are computed, the copy of a tied head, eyes.
DROPPED = ('*rotary_emb.inv_freq', '*vision_tower.*', '*multi_modal_projector.*')


class SafetensorsSource:
  """The tensors of a model.safetensors, or of the files that its index names.

  Attributes:
    where, shapes: see TensorSource.
  """

  def __init__(self, directory: str | os.PathLike[str]):
    """Opens the files; tensors are read when asked for.

    Raises:
      UsageError: there are no such files in the directory, or they cannot be read.
    """
    self.where = str(directory)
    self.shapes: dict[str, tuple[int, ...]] = {}
    self._open: dict[str, Any] = {}
    for path in _files(Path(directory)):
      try:
        file = safetensors.safe_open(path, framework='numpy')
      except (OSError, safetensors.SafetensorError) as error:
        raise UsageError(f'{path}: cannot be read as safetensors: {error}.') from error
      for name in file.keys():  # noqa: SIM118  (it is no mapping)
        self._open[name] = file
        self.shapes[name] = tuple(file.get_slice(name).get_shape())

  def read(self, name: str) -> np.ndarray:
    return self._open[name].get_tensor(name)


def _files(directory: Path) -> list[Path]:
  if (directory / _INDEX).is_file():
    names = sorted(set(read_json(directory / _INDEX)['weight_map'].values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
      raise UsageError(f'{directory}: its {_INDEX} names files that are not there: {missing}.')
    return [directory / name for name in names]
  if (directory / 'model.safetensors').is_file():
    return [directory / 'model.safetensors']
  found = sorted(path.name for path in directory.iterdir())
  raise UsageError(
    f'{directory}: neither model.safetensors nor {_INDEX} in it, but'
    f' {", ".join(found) or "nothing"}. Other formats can run code when they are read;'
    ' save_pretrained(directory) of transformers writes safetensors.'
  )


def read_json(path: Path) -> dict[str, Any]:
  """A JSON object of a file; UsageError where it is none."""
  try:
    value = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise UsageError(f'{path}: cannot be read as JSON: {error}.') from error
  if not isinstance(value, dict):
    raise UsageError(f'{path}: an object is expected in it, found a {type(value).__name__}.')
  return value


def decoder_config(config: Mapping[str, Any], where: str) -> DecoderConfig:
  """The configuration that a config.json describes.

  Raises:
    UsageError: a key is missing, or has a value that the decoder does not compute.
  """
  # A multimodal Gemma 3 has its language model's configuration inside its own.
  config = {**config, **config['text_config']} if 'text_config' in config else config
  get = Getter(config, where)
  family = get('model_type')
  if family not in _FAMILIES:
    raise UsageError(
      f'{where}: model_type={family!r}; allowed: {", ".join(_FAMILIES)}.'
      f'{did_you_mean(str(family), _FAMILIES)}'
    )
  heads, width = get('num_attention_heads'), get('hidden_size')
  # transformers 5 has the parameters of RoPE in a dictionary, earlier ones beside each other.
  rope = get('rope_parameters', None) or {}
  by_kind = {key: value for key, value in rope.items() if isinstance(value, Mapping)}
  rope = by_kind.get('full_attention', rope)
  scaling = {**(get('rope_scaling', None) or {}), **rope}
  divisor, rope_scaling = _rope_scaling(scaling, where)
  common = dict(
    num_layers=get('num_hidden_layers'),
    d_model=width,
    num_heads=heads,
    num_kv_heads=get('num_key_value_heads', heads),
    head_dim=get('head_dim', None) or width // heads,
    d_mlp=get('intermediate_size'),
    vocab_size=get('vocab_size'),
    max_length=get('max_position_embeddings'),
    norm_epsilon=get('rms_norm_eps', 1e-6),
    rope_base=float(rope.get('rope_theta', get('rope_theta', 10_000.0))),
    rope_divisor=divisor,
    rope_scaling=rope_scaling,
    activation=_activation(get),
  )
  return DecoderConfig(**common, **_FAMILIES[family](get, by_kind.get('sliding_attention', {})))


class Getter:
  """Looks up keys of a config.json; those without a default must be there."""

  def __init__(self, config: Mapping[str, Any], where: str):
    self.config, self.where = config, where

  def __call__(self, key: str, *default: Any) -> Any:
    if key not in self.config and not default:
      hint = did_you_mean(key, self.config)
      raise UsageError(f'{self.where}: no {key!r} in config.json, which this model needs.{hint}')
    return self.config.get(key, *default)


def _activation(get: Getter) -> str:
  name = get('hidden_activation', None) or get('hidden_act', 'silu')
  # Gemma 1 says 'gelu' and has always computed the approximation.
  known = {'silu': 'silu', 'gelu_pytorch_tanh': 'gelu', 'gelu': 'gelu'}
  if name not in known:
    raise UsageError(f'{get.where}: activation {name!r}; allowed: {", ".join(known)}.')
  return known[name]


def _rope_scaling(scaling: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
  kind = scaling.get('rope_type', scaling.get('type', 'default'))
  if kind == 'default':
    return 1.0, None
  if kind == 'linear':
    return float(scaling['factor']), None
  if kind == 'llama3':
    return 1.0, RopeScaling(
      float(scaling['factor']),
      float(scaling['low_freq_factor']),
      float(scaling['high_freq_factor']),
      int(scaling['original_max_position_embeddings']),
    )
  raise UsageError(f"{where}: rope type {kind!r}; allowed: 'default', 'linear', 'llama3'.")


def _gemma(get: Getter, local_rope: Mapping[str, Any]) -> dict[str, Any]:
  del local_rope
  return dict(scale_embeddings=True, tied_head=get('tie_word_embeddings', True))


def _gemma2(get: Getter, local_rope: Mapping[str, Any]) -> dict[str, Any]:
  return dict(
    **_gemma(get, local_rope),
    post_norms=True,
    query_scale=get('query_pre_attn_scalar') ** -0.5,
    attention_softcap=get('attn_logit_softcapping', None),
    final_softcap=get('final_logit_softcapping', None),
    **_windows(get, 2),
  )


def _gemma3(get: Getter, local_rope: Mapping[str, Any]) -> dict[str, Any]:
  base = local_rope.get('rope_theta', get('rope_local_base_freq', 10_000.0))
  pattern = get('sliding_window_pattern', None) or get('_sliding_window_pattern', 6)
  return dict(
    **_gemma(get, local_rope),
    post_norms=True,
    qk_norm=True,
    query_scale=get('query_pre_attn_scalar') ** -0.5,
    attention_softcap=get('attn_logit_softcapping', None),
    final_softcap=get('final_logit_softcapping', None),
    local_rope_base=float(base),
    **_windows(get, pattern),
  )


def _windows(get: Getter, global_every: int) -> dict[str, Any]:
  kinds = get('layer_types', None)
  if kinds is not None:
    full = [i for i, kind in enumerate(kinds) if kind == 'full_attention']
    global_every = full[0] + 1 if full else len(kinds) + 1
    expected = [(i + 1) % global_every == 0 for i in range(len(kinds))]
    if [kind == 'full_attention' for kind in kinds] != expected:
      raise UsageError(f'{get.where}: layer_types={kinds}; every n-th must be full_attention.')
  if global_every == 1:
    return {}
  return dict(window=get('sliding_window'), global_every=global_every)


def _llama(get: Getter, local_rope: Mapping[str, Any]) -> dict[str, Any]:
  del local_rope
  for key in ('attention_bias', 'mlp_bias'):
    if get(key, False):
      raise UsageError(f'{get.where}: {key}=True; allowed: False.')
  return dict(tied_head=get('tie_word_embeddings', False))


def _qwen2(get: Getter, local_rope: Mapping[str, Any]) -> dict[str, Any]:
  del local_rope
  _no_window(get)
  return dict(tied_head=get('tie_word_embeddings', False), qkv_bias=True)


def _qwen3(get: Getter, local_rope: Mapping[str, Any]) -> dict[str, Any]:
  _no_window(get)
  return dict(**_llama(get, local_rope), qk_norm=True)


def _no_window(get: Getter) -> None:
  if get('use_sliding_window', False):
    raise UsageError(f'{get.where}: use_sliding_window=True; allowed for a Qwen: False.')


_FAMILIES: Mapping[str, Callable[[Getter, Mapping[str, Any]], dict[str, Any]]] = {
  'gemma': _gemma,
  'gemma2': _gemma2,
  'gemma3': _gemma3,
  'gemma3_text': _gemma3,
  'llama': _llama,
  'qwen2': _qwen2,
  'qwen3': _qwen3,
}


def decoder_recipe(c: DecoderConfig, names: Mapping[str, Any]) -> tuple[Recipe, tuple[str, ...]]:
  """How a decoder's parameters are made of Hugging Face's tensors, and which are not needed.

  Args:
    c: of `decoder_config`.
    names: of the tensors there are, which say where in a multimodal model the decoder is.
  """
  root = next((r for r in _ROOTS if f'{r}embed_tokens.weight' in names), 'model.')
  layer = root + 'layers.{layer}.'
  # Gemma's norms multiply by (1 + weight); our scale is the whole factor.
  gemma = c.scale_embeddings
  recipe: dict[str, Leaf] = {'embedder/embedding': Leaf(f'{root}embed_tokens.weight')}
  dropped = DROPPED
  head = f'{root.removesuffix("model.")}lm_head.weight'
  if c.tied_head:
    dropped = (*dropped, head, 'lm_head.weight')
  else:
    recipe['head/embedding'] = Leaf(head)

  def norm(path: str, name: str) -> None:
    recipe[f'{path}/scale'] = Leaf(f'{name}.weight', _plus_one if gemma else _float32)

  def projection(name: str, heads: int) -> None:
    tensor = f'{layer}self_attn.{name[0]}_proj'
    shape = (heads, c.head_dim)
    path = f'layers/attention/{name}'
    recipe[f'{path}/kernel'] = Leaf(f'{tensor}.weight', lambda w: w.T.reshape(c.d_model, *shape))
    if c.qkv_bias:
      recipe[f'{path}/bias'] = Leaf(f'{tensor}.bias', lambda b: b.reshape(shape))

  projection('query', c.num_heads)
  projection('key', c.num_kv_heads)
  projection('value', c.num_kv_heads)
  recipe['layers/attention/out/kernel'] = Leaf(
    f'{layer}self_attn.o_proj.weight', lambda w: w.T.reshape(c.num_heads, c.head_dim, c.d_model)
  )
  for ours, theirs in (('wi_0', 'gate_proj'), ('wi_1', 'up_proj'), ('wo', 'down_proj')):
    recipe[f'layers/mlp/{ours}/kernel'] = Leaf(f'{layer}mlp.{theirs}.weight', lambda w: w.T)
  norm('final_norm', f'{root}norm')
  norm('layers/attention_norm', f'{layer}input_layernorm')
  if c.qk_norm:
    norm('layers/attention/query_norm', f'{layer}self_attn.q_norm')
    norm('layers/attention/key_norm', f'{layer}self_attn.k_norm')
  if c.post_norms:
    norm('layers/post_attention_norm', f'{layer}post_attention_layernorm')
    norm('layers/mlp_norm', f'{layer}pre_feedforward_layernorm')
    norm('layers/post_mlp_norm', f'{layer}post_feedforward_layernorm')
  else:
    norm('layers/mlp_norm', f'{layer}post_attention_layernorm')
  return recipe, dropped


_ROOTS = ('model.', 'language_model.model.', 'model.language_model.', '')


def _plus_one(weight: Any) -> Any:
  return weight.astype(np.float32) + 1


def _float32(weight: Any) -> Any:
  return weight.astype(np.float32)

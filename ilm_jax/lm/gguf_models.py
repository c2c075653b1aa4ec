"""Decoder-only language models in GGUF files: their configuration, and what their tensors make.

Llama (also SmolLM2, Mistral), Gemma 1, 2 and 3, Qwen 2.5 and 3. What llama.cpp's converter changes
is undone here: it interleaves the rows of Llama's queries and keys for its RoPE, turns the RoPE
scaling of Llama 3 into a tensor, and adds Gemma's 1 to the norms (which ours contain as well).

Letters as in modules/decoder.py: D model width, H heads, N key-value heads, C head width,
F feed-forward width, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ilm_jax.errors import UsageError, did_you_mean
from ilm_jax.lm.assemble import Leaf, Recipe
from ilm_jax.lm.gguf_files import GgufSource
from ilm_jax.modules.decoder import DecoderConfig, RopeScaling

# Tensors that the configuration is made of, not the parameters.
DROPPED = ('rope_freqs.weight',)

_ROPE_FACTORS = 'rope_freqs.weight'
_EMBEDDING, _HEAD = 'token_embd.weight', 'output.weight'

# Keys, after '{architecture}.', of computations that the decoder does not have, with the value that
# stands for none.
_NOT_COMPUTED: Mapping[str, Any] = {
  'expert_count': 0,
  'attention.clamp_kqv': 0.0,
  'attention.causal': True,
  'attention.scale': 0.0,
  'embedding_scale': 0.0,
  'residual_scale': 0.0,
  'logit_scale': 0.0,
}
# llama.cpp knows the models whose query scale is not C ** -0.5 by their number of layers.
_LAYERS_OF_27B = {'gemma2': 46, 'gemma3': 62}


class _Getter:
  """Keys of an architecture; those without a default must be there."""

  def __init__(self, source: GgufSource, architecture: str):
    self.source, self.architecture = source, architecture

  def __call__(self, key: str, *default: Any) -> Any:
    return self.source.key(f'{self.architecture}.{key}', *default)

  def size(self, key: str, *default: Any) -> int:
    """A number that is the same in all layers."""
    value = self(key, *default)
    if not isinstance(value, int) or value < 1:
      self.fail(key, value, 'one positive number for all layers')
    return value

  def fail(self, key: str, value: Any, allowed: Any) -> None:
    raise UsageError(
      f'{self.source.where}: {self.architecture}.{key}={value}; allowed: {allowed}. The model'
      ' computes something that this library does not.'
    )


def gguf_architecture(source: GgufSource) -> str:
  """'llama', ...; UsageError where it is none of those in this file."""
  architecture = source.key('general.architecture')
  if architecture not in _FAMILIES:
    raise UsageError(
      f'{source.where}: general.architecture={architecture!r}; allowed: {", ".join(_FAMILIES)}.'
      f'{did_you_mean(str(architecture), _FAMILIES)}'
    )
  return architecture


def gguf_config(source: GgufSource) -> DecoderConfig:
  """The configuration of the model in a GGUF file.

  Raises:
    UsageError: an architecture or a computation that the decoder does not have, or no such key.
  """
  architecture = gguf_architecture(source)
  get = _Getter(source, architecture)
  for key, none in _NOT_COMPUTED.items():
    if get(key, none) != none:
      get.fail(key, get(key), none)
  heads, width = get.size('attention.head_count'), get.size('embedding_length')
  head_dim = get.size('attention.key_length', width // heads)
  for key in ('attention.value_length', 'rope.dimension_count'):
    if get(key, head_dim) != head_dim:
      get.fail(key, get(key), head_dim)
  config = dict(
    num_layers=get.size('block_count'),
    d_model=width,
    num_heads=heads,
    num_kv_heads=get.size('attention.head_count_kv', heads),
    head_dim=head_dim,
    d_mlp=get.size('feed_forward_length'),
    vocab_size=_vocab_size(source),
    max_length=get.size('context_length'),
    norm_epsilon=get('attention.layer_norm_rms_epsilon'),
    rope_base=get('rope.freq_base', 10_000.0),
    rope_divisor=_rope_divisor(get),
    tied_head=_HEAD not in source.shapes,
  )
  return DecoderConfig(**{**config, **_FAMILIES[architecture](get)})


def _vocab_size(source: GgufSource) -> int:
  """Rows of the embedding table, which may be more than tokens."""
  if _EMBEDDING not in source.shapes:
    hint = did_you_mean(_EMBEDDING, source.shapes)
    raise UsageError(f'{source.where}: no tensor {_EMBEDDING}: not a language model.{hint}')
  rows, tokens = source.shapes[_EMBEDDING][0], len(source.key('tokenizer.ggml.tokens'))
  if tokens > rows:
    raise UsageError(f'{source.where}: {tokens} tokens, but {_EMBEDDING} has {rows} rows.')
  return rows


def _rope_divisor(get: _Getter) -> float:
  kind = get('rope.scaling.type', 'linear')
  if kind not in ('none', 'linear'):
    get.fail('rope.scaling.type', kind, 'none, linear')
  factor = get('rope.scaling.factor', get('rope.scale_linear', 0.0))
  return float(factor) if kind == 'linear' and factor else 1.0


def _llama(get: _Getter) -> dict[str, Any]:
  return dict(rope_scaling=_rope_scaling(get))


def _qwen2(get: _Getter) -> dict[str, Any]:
  _refuse_rope_factors(get)
  return dict(qkv_bias=True)


def _qwen3(get: _Getter) -> dict[str, Any]:
  _refuse_rope_factors(get)
  return dict(qk_norm=True)


def _gemma(get: _Getter) -> dict[str, Any]:
  _refuse_rope_factors(get)
  return dict(activation='gelu', scale_embeddings=True)


def _gemma2(get: _Getter) -> dict[str, Any]:
  return dict(
    **_gemma(get),
    post_norms=True,
    query_scale=_query_scale(get),
    attention_softcap=get('attn_logit_softcapping', 50.0),
    final_softcap=get('final_logit_softcapping', 30.0),
    window=get.size('attention.sliding_window', 4096),
    global_every=2,
  )


def _gemma3(get: _Getter) -> dict[str, Any]:
  return dict(
    **_gemma(get),
    post_norms=True,
    qk_norm=True,
    query_scale=_query_scale(get),
    final_softcap=get('final_logit_softcapping', 0.0) or None,
    rope_base=get('rope.freq_base', 1_000_000.0),
    local_rope_base=get('rope.freq_base_swa', 10_000.0),
    window=get.size('attention.sliding_window'),
    global_every=_global_every(get),
  )


def _query_scale(get: _Getter) -> float:
  if get('block_count') == _LAYERS_OF_27B[get.architecture]:
    return (get('embedding_length') / get('attention.head_count')) ** -0.5
  return get('attention.key_length') ** -0.5


def _global_every(get: _Getter) -> int:
  """A period, or for each layer whether it has a window."""
  key = 'attention.sliding_window_pattern'
  pattern = get(key, 6)
  if isinstance(pattern, int):
    return pattern
  is_local = [bool(local) for local in pattern]
  period = is_local.index(False) + 1 if False in is_local else len(is_local) + 1
  if is_local != [(i + 1) % period != 0 for i in range(len(is_local))]:
    get.fail(key, is_local, 'every n-th layer without a window')
  return period


def _refuse_rope_factors(get: _Getter) -> None:
  if _ROPE_FACTORS in get.source.shapes:
    raise UsageError(f'{get.source.where}: {_ROPE_FACTORS}, which only Llama 3 is known to have.')


def _rope_scaling(get: _Getter) -> RopeScaling | None:
  """The scaling of Llama 3.1 to 3.3 that gives the file's divisors of the frequencies [C / 2]."""
  if _ROPE_FACTORS not in get.source.shapes:
    return None
  divisors = get.source.read(_ROPE_FACTORS).astype(np.float64)
  # What the releases have in common; the lowest frequency is divided by all of the factor.
  scaling = RopeScaling(float(divisors.max()), 1.0, 4.0, 8192)
  base = get('rope.freq_base', 10_000.0)
  turns = scaling.original_length * base ** -np.linspace(0, 1, len(divisors), endpoint=False)
  turns /= 2 * np.pi
  low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
  kept = np.clip((turns - low) / (high - low), 0, 1)
  expected = 1 / (kept + (1 - kept) / scaling.factor)
  if not np.allclose(divisors, expected, rtol=1e-4):
    raise UsageError(
      f'{get.source.where}: {_ROPE_FACTORS} is not the RoPE scaling of Llama 3 with a factor of'
      f' {scaling.factor:g} (low 1, high 4, original length 8192).'
    )
  return scaling


_FAMILIES: Mapping[str, Callable[[_Getter], dict[str, Any]]] = {
  'llama': _llama,
  'gemma': _gemma,
  'gemma2': _gemma2,
  'gemma3': _gemma3,
  'qwen2': _qwen2,
  'qwen3': _qwen3,
}


def gguf_recipe(c: DecoderConfig, architecture: str) -> Recipe:
  """How a decoder's parameters are made of the tensors of a GGUF file; DROPPED are not needed."""
  layer = 'blk.{layer}.'
  recipe: dict[str, Leaf] = {
    'embedder/embedding': Leaf(_EMBEDDING),
    'final_norm/scale': Leaf('output_norm.weight'),
    'layers/attention_norm/scale': Leaf(f'{layer}attn_norm.weight'),
    'layers/mlp_norm/scale': Leaf(f'{layer}ffn_norm.weight'),
    'layers/attention/out/kernel': Leaf(
      f'{layer}attn_output.weight', lambda w: w.T.reshape(c.num_heads, c.head_dim, c.d_model)
    ),
  }
  if not c.tied_head:
    recipe['head/embedding'] = Leaf(_HEAD)
  for ours, theirs in (('wi_0', 'ffn_gate'), ('wi_1', 'ffn_up'), ('wo', 'ffn_down')):
    recipe[f'layers/mlp/{ours}/kernel'] = Leaf(f'{layer}{theirs}.weight', lambda w: w.T)

  def projection(name: str, heads: int) -> None:
    tensor, path = f'{layer}attn_{name[0]}', f'layers/attention/{name}'
    interleaved = architecture == 'llama' and name != 'value'

    def kernel(w: Any) -> Any:  # [heads * C, D] -> [D, heads, C]
      if interleaved:  # rows (0, C/2, 1, C/2 + 1, ...) of a head -> (0, 1, ..., C - 1)
        w = w.reshape(heads, c.head_dim // 2, 2, c.d_model).swapaxes(1, 2)
      return w.reshape(heads * c.head_dim, c.d_model).T.reshape(c.d_model, heads, c.head_dim)

    recipe[f'{path}/kernel'] = Leaf(f'{tensor}.weight', kernel)
    if c.qkv_bias:
      recipe[f'{path}/bias'] = Leaf(f'{tensor}.bias', lambda b: b.reshape(heads, c.head_dim))

  projection('query', c.num_heads)
  projection('key', c.num_kv_heads)
  projection('value', c.num_kv_heads)
  if c.qk_norm:
    recipe['layers/attention/query_norm/scale'] = Leaf(f'{layer}attn_q_norm.weight')
    recipe['layers/attention/key_norm/scale'] = Leaf(f'{layer}attn_k_norm.weight')
  if c.post_norms:
    recipe['layers/post_attention_norm/scale'] = Leaf(f'{layer}post_attention_norm.weight')
    recipe['layers/post_mlp_norm/scale'] = Leaf(f'{layer}post_ffw_norm.weight')
  return recipe

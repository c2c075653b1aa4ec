"""Tiny language models with random weights, and what they say without a cache."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ilm_jax.modules.decoder import Decoder, DecoderConfig
from ilm_jax.modules.layers import Compute
from ilm_jax.modules.t5 import T5, T5Config

VOCAB = 97
_LONGEST = 32  # forward passes are padded to it, and so compiled once
_LLAMA = DecoderConfig(
  num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=8, d_mlp=24, vocab_size=VOCAB,
  max_length=200, tied_head=False,
)  # fmt: skip
_GEMMA = dataclasses.replace(
  _LLAMA, num_layers=3, activation='gelu', window=5, global_every=2, attention_softcap=5.0,
  final_softcap=8.0, qk_norm=True, post_norms=True, scale_embeddings=True, local_rope_base=1e3,
)  # fmt: skip
_T5 = T5Config(
  num_encoder_layers=2, num_decoder_layers=2, d_model=16, num_heads=2, head_dim=6, d_mlp=24,
  vocab_size=VOCAB, relative_buckets=8, relative_max_distance=12,
)  # fmt: skip
CONFIGS = {
  'llama': _LLAMA,
  'gemma': _GEMMA,
  't5': _T5,
  't5_decoder': dataclasses.replace(_T5, num_encoder_layers=0),
}


@dataclasses.dataclass(eq=False)
class TinyLM:
  lm: Any
  params: Any

  @functools.cached_property
  def _table(self):
    embed = functools.partial(self.lm.apply, method='embed_tokens')
    return np.asarray(jax.jit(embed)({'params': self.params}, jnp.arange(VOCAB)))

  @functools.cached_property
  def _forward(self):
    def run(params, row, text=None, length=None):
      apply = functools.partial(self.lm.apply, {'params': params})
      if text is None:
        hidden, _ = apply(row[None])
      else:
        there = (jnp.arange(_LONGEST) < length).astype(jnp.int32)[None]
        encoded = apply(text[None], segment_ids=there, method='encode')
        hidden, _ = apply(row[None], encoded, encoder_segment_ids=there, method='decode')
      return jax.nn.log_softmax(apply(hidden[0], method='logits'), axis=-1)

    return jax.jit(run)

  def embed(self, tokens):
    """[...] -> [..., D], NumPy."""
    return self._table[np.asarray(tokens, np.int32)]

  def log_probs(self, row, text=None):
    """Of the next token at each place of embeddings [T, D]: [T, V], by a whole forward pass.

    `text` [E, D] is what the encoder of an encoder-decoder reads.
    """
    arguments = [_padded(row)] if text is None else [_padded(row), _padded(text), len(text)]
    return np.asarray(self._forward(self.params, *arguments))[: len(row)]

  def greedy(self, prompt, new_tokens):
    """The most likely tokens after [T, D], a whole forward pass for each; and their log p."""
    has_encoder = isinstance(self.lm, T5) and self.lm.config.num_encoder_layers
    row, text = (self.embed([0]), prompt) if has_encoder else (prompt, None)
    tokens, log_probs = [], []
    for _ in range(new_tokens):
      distribution = self.log_probs(row, text)[-1]
      tokens.append(int(distribution.argmax()))
      log_probs.append(distribution[tokens[-1]])
      row = np.concatenate([row, self.embed(tokens[-1:])])
    return tokens, np.array(log_probs)


@functools.cache
def tiny_lm(name, scan_layers=True):
  """The same random weights however the layers are stacked."""
  config = CONFIGS[name]
  kind = T5 if isinstance(config, T5Config) else Decoder
  lm, tokens = kind(config), jnp.zeros((1, 2), jnp.int32)
  args = (tokens, tokens) if name == 't5' else (tokens,)
  init = jax.jit(lambda key: nn.meta.unbox(lm.init(key, *args, method='logits_of'))['params'])
  params = init(jax.random.key(0))
  if not scan_layers:
    params = _unstacked(params)
  return TinyLM(kind(config, Compute(scan_layers=scan_layers)), params)


def _unstacked(params):
  made = {}
  for name, value in params.items():
    if name == 'layers':
      for i in range(len(jax.tree.leaves(value)[0])):
        made[f'layers_{i}'] = jax.tree.map(lambda x, i=i: np.asarray(x)[i], value)
    else:
      made[name] = _unstacked(value) if isinstance(value, dict) else value
  return made


def _padded(row):
  padded = np.zeros((_LONGEST, row.shape[1]), np.float32)
  padded[: len(row)] = row
  return padded

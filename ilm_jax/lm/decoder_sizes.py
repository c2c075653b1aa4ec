"""Released decoder-only language models by name, as configurations of `decoder.Decoder`.

  lm = Decoder(DECODER_SIZES['gemma3_1b'])

A checkpoint's own configuration comes first (`lm/`); these are for what is asked before
there is one: does it fit, how fast is it, what are its shapes.

Sources: Gemma arXiv:2403.08295, 2 arXiv:2408.00118, 3 arXiv:2503.19786, with the vocabulary as
Google releases it (256,128; Hugging Face has 256,000); Llama 3 arXiv:2407.21783; SmolLM2
arXiv:2502.02737; Qwen 2.5 arXiv:2412.15115 and 3 arXiv:2505.09388; and the config.json of each.
"""

import types
from collections.abc import Mapping
from typing import Any

from ilm_jax.modules.decoder import DecoderConfig, RopeScaling


def _shape(
  layers: int, d_model: int, heads: int, kv_heads: int, head_dim: int, d_mlp: int
) -> dict[str, Any]:
  return dict(
    num_layers=layers,
    d_model=d_model,
    num_heads=heads,
    num_kv_heads=kv_heads,
    head_dim=head_dim,
    d_mlp=d_mlp,
  )


def _gemma(*shape: int, **more: Any) -> DecoderConfig:
  common = dict(vocab_size=256_128, activation='gelu', scale_embeddings=True)
  return DecoderConfig(**{**_shape(*shape), **common, **more})


def _gemma2(*shape: int, **more: Any) -> DecoderConfig:
  softcaps = dict(attention_softcap=50.0, final_softcap=30.0)
  return _gemma(*shape, **softcaps, post_norms=True, window=4096, global_every=2, **more)


def _gemma3(*shape: int, window: int, max_length: int, **more: Any) -> DecoderConfig:
  return _gemma(
    *shape,
    vocab_size=262_144,
    max_length=max_length,
    rope_base=1e6,
    local_rope_base=1e4,
    window=window,
    global_every=6,
    qk_norm=True,
    post_norms=True,
    **more,
  )


def _small_gemma3(*shape: int) -> DecoderConfig:
  return _gemma3(*shape, window=512, max_length=32_768)


def _large_gemma3(*shape: int, **more: Any) -> DecoderConfig:
  return _gemma3(*shape, window=1024, max_length=131_072, rope_divisor=8.0, **more)


def _smollm2(*shape: int, rope_base: float) -> DecoderConfig:
  return DecoderConfig(
    **_shape(*shape), vocab_size=49_152, norm_epsilon=1e-5, rope_base=rope_base, max_length=8192
  )


def _llama3(*shape: int, factor: float, tied_head: bool) -> DecoderConfig:
  return DecoderConfig(
    **_shape(*shape),
    vocab_size=128_256,
    max_length=131_072,
    norm_epsilon=1e-5,
    rope_base=5e5,
    rope_scaling=RopeScaling(factor, 1.0, 4.0, 8192),
    tied_head=tied_head,
  )


def _qwen25(*shape: int, vocab_size: int, tied_head: bool) -> DecoderConfig:
  return DecoderConfig(
    **_shape(*shape),
    vocab_size=vocab_size,
    max_length=32_768,
    rope_base=1e6,
    qkv_bias=True,
    tied_head=tied_head,
  )


def _qwen3(*shape: int, tied_head: bool) -> DecoderConfig:
  return DecoderConfig(
    **_shape(*shape),
    vocab_size=151_936,
    max_length=40_960,
    rope_base=1e6,
    qk_norm=True,
    tied_head=tied_head,
  )


# Layers, model width, heads, key-value heads, head width, feed-forward width.
DECODER_SIZES: Mapping[str, DecoderConfig] = types.MappingProxyType(
  {
    'gemma_2b': _gemma(18, 2048, 8, 1, 256, 16_384),
    'gemma_7b': _gemma(28, 3072, 16, 16, 256, 24_576),
    'gemma2_2b': _gemma2(26, 2304, 8, 4, 256, 9216),
    'gemma2_9b': _gemma2(42, 3584, 16, 8, 256, 14_336),
    # The 27B models scale scores by model width / heads, not by the width of a head.
    'gemma2_27b': _gemma2(46, 4608, 32, 16, 128, 36_864, query_scale=144**-0.5),
    'gemma3_270m': _small_gemma3(18, 640, 4, 1, 256, 2048),
    'gemma3_1b': _small_gemma3(26, 1152, 4, 1, 256, 6912),
    'gemma3_4b': _large_gemma3(34, 2560, 8, 4, 256, 10_240),
    'gemma3_12b': _large_gemma3(48, 3840, 16, 8, 256, 15_360),
    'gemma3_27b': _large_gemma3(62, 5376, 32, 16, 128, 21_504, query_scale=168**-0.5),
    'smollm2_135m': _smollm2(30, 576, 9, 3, 64, 1536, rope_base=1e5),
    'smollm2_360m': _smollm2(32, 960, 15, 5, 64, 2560, rope_base=1e5),
    'smollm2_1.7b': _smollm2(24, 2048, 32, 32, 64, 8192, rope_base=1.3e5),
    'llama3.1_8b': _llama3(32, 4096, 32, 8, 128, 14_336, factor=8.0, tied_head=False),
    'llama3.2_1b': _llama3(16, 2048, 32, 8, 64, 8192, factor=32.0, tied_head=True),
    'llama3.2_3b': _llama3(28, 3072, 24, 8, 128, 8192, factor=32.0, tied_head=True),
    'llama3.3_70b': _llama3(80, 8192, 64, 8, 128, 28_672, factor=8.0, tied_head=False),
    'qwen2.5_0.5b': _qwen25(24, 896, 14, 2, 64, 4864, vocab_size=151_936, tied_head=True),
    'qwen2.5_1.5b': _qwen25(28, 1536, 12, 2, 128, 8960, vocab_size=151_936, tied_head=True),
    'qwen2.5_3b': _qwen25(36, 2048, 16, 2, 128, 11_008, vocab_size=151_936, tied_head=True),
    'qwen2.5_7b': _qwen25(28, 3584, 28, 4, 128, 18_944, vocab_size=152_064, tied_head=False),
    'qwen2.5_14b': _qwen25(48, 5120, 40, 8, 128, 13_824, vocab_size=152_064, tied_head=False),
    'qwen2.5_32b': _qwen25(64, 5120, 40, 8, 128, 27_648, vocab_size=152_064, tied_head=False),
    'qwen3_0.6b': _qwen3(28, 1024, 16, 8, 128, 3072, tied_head=True),
    'qwen3_1.7b': _qwen3(28, 2048, 16, 8, 128, 6144, tied_head=True),
    'qwen3_4b': _qwen3(36, 2560, 32, 8, 128, 9728, tied_head=True),
    'qwen3_8b': _qwen3(36, 4096, 32, 8, 128, 12_288, tied_head=False),
    'qwen3_14b': _qwen3(40, 5120, 40, 8, 128, 17_408, tied_head=False),
    'qwen3_32b': _qwen3(64, 5120, 64, 8, 128, 25_600, tied_head=False),
  }
)

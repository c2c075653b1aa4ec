"""GGUF models computed by us and by transformers, which has a conversion of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from ilm_jax.lm.gguf_files import GgufSource
from tests.support import tiny_gguf

pytestmark = pytest.mark.parity

# It knows no Gemma 1.
ARCHITECTURES = ('llama', 'qwen2', 'qwen3', 'gemma2', 'gemma3')


def oracle_logits(path, tokens):
  import torch
  from transformers import AutoConfig, AutoModelForCausalLM
  from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

  # What from_pretrained(gguf_file=) does, which needs one package more.
  config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
  model = AutoModelForCausalLM.from_config(
    config, dtype=torch.float32, attn_implementation='eager'
  ).eval()
  tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)['tensors']
  outcome = model.load_state_dict(tensors, strict=False)
  assert set(outcome.missing_keys) <= {'lm_head.weight'}
  assert not outcome.unexpected_keys
  assert outcome.missing_keys == [] or config.tie_word_embeddings
  with torch.no_grad():
    return model(torch.tensor(tokens)).logits.numpy()


def our_logits(path, tokens):
  decoder, params = tiny_gguf.decoder_and_params(GgufSource(path))
  run = jax.jit(lambda p, t: decoder.apply({'params': p}, t, method='logits_of'))
  return np.asarray(run(params, jnp.asarray(tokens)))


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_logits(tmp_path, architecture):
  path = tmp_path / 'model.gguf'
  types = {
    'token_embd.weight': Type.Q8_0,
    'blk.0.attn_q.weight': Type.Q4_1,
    'blk.0.attn_k.weight': Type.Q8_0,
    'blk.1.ffn_down.weight': Type.Q5_0,
    'blk.2.attn_output.weight': Type.F16,
    'blk.3.ffn_up.weight': Type.BF16,
  }
  tiny_gguf.write_model(path, architecture, types=types, tied=architecture != 'qwen2')
  tokens = np.random.default_rng(0).integers(0, 32, (2, 20))  # beyond the window of 4
  expected = oracle_logits(path, tokens)
  assert expected.std() > 0.3
  np.testing.assert_allclose(our_logits(path, tokens), expected, atol=2e-4)

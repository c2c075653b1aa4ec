"""Parity of the Q-Former with Hugging Face's Blip2QFormerModel (torch) on the same weights.

`make parity` compares live. Run as a script, this writes the oracle's weights and outputs to
tests/golden/qformer.npz, which `make test` compares with where torch is not installed.
"""

from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ilm_jax.modules import qformer

GOLDEN = Path(__file__).parent.parent / 'golden' / 'qformer.npz'
CONFIG = qformer.QFormerConfig(
  num_layers=4, d_model=32, num_heads=4, d_mlp=64, num_queries=5, d_encoder=24, vocab_size=120,
  max_text_length=32,
)  # fmt: skip


def make_oracle():
  import torch
  from transformers import Blip2QFormerConfig
  from transformers.models.blip_2 import modeling_blip_2

  torch.manual_seed(0)
  config = Blip2QFormerConfig(
    vocab_size=CONFIG.vocab_size,
    hidden_size=CONFIG.d_model,
    num_hidden_layers=CONFIG.num_layers,
    num_attention_heads=CONFIG.num_heads,
    intermediate_size=CONFIG.d_mlp,
    max_position_embeddings=CONFIG.max_text_length,
    encoder_hidden_size=CONFIG.d_encoder,
    cross_attention_frequency=CONFIG.cross_attention_every,
    use_qformer_text_input=True,
    attn_implementation='eager',
  )
  model = modeling_blip_2.Blip2QFormerModel(config).eval()
  embeddings = modeling_blip_2.Blip2TextEmbeddings(config).eval()
  with torch.no_grad():
    for parameter in [*model.parameters(), *embeddings.parameters()]:
      parameter.copy_(parameter + 0.1 * torch.randn_like(parameter))
  return model, embeddings


@pytest.fixture(scope='module')
def oracle():
  return make_oracle()


def parameters(model, embeddings, queries):
  """Our parameters from the oracle's state."""
  state = {k: v.numpy() for k, v in model.state_dict().items()}
  heads = (CONFIG.num_heads, CONFIG.d_model // CONFIG.num_heads)

  def norm(name):
    return {'scale': state[f'{name}.weight'], 'bias': state[f'{name}.bias']}

  def dense(name, shape=None, bias_shape=None):
    kernel, bias = state[f'{name}.weight'].T, state[f'{name}.bias']
    if shape:
      kernel, bias = kernel.reshape(shape), bias.reshape(bias_shape)
    return {'kernel': kernel, 'bias': bias}

  def attention(name):
    return {
      **{
        part: dense(f'{name}.attention.{part}', (-1, *heads), heads)
        for part in ('query', 'key', 'value')
      },
      'out': dense(f'{name}.output.dense', (*heads, CONFIG.d_model), (CONFIG.d_model,)),
      'norm': norm(f'{name}.output.LayerNorm'),
    }

  def mlp(layer, suffix):
    output = f'{layer}.output{suffix}'
    return {
      'wi': dense(f'{layer}.intermediate{suffix}.dense'),
      'wo': dense(f'{output}.dense'),
      'norm': norm(f'{output}.LayerNorm'),
    }

  groups = []
  for first in range(0, CONFIG.num_layers, CONFIG.cross_attention_every):
    group = {}
    for i in range(CONFIG.cross_attention_every):
      name = f'encoder.layer.{first + i}'
      group[f'layer_{i}'] = {
        'attention': attention(f'{name}.attention'),
        'query_mlp': mlp(name, '_query'),
        'text_mlp': mlp(name, ''),
      }
      if i == 0:
        group['layer_0']['cross_attention'] = attention(f'{name}.crossattention')
    groups.append(group)
  text = {k: v.numpy() for k, v in embeddings.state_dict().items()}
  return {
    'params': {
      'queries': queries,
      'positions': text['position_embeddings.weight'],
      'word_embedder': {'embedding': text['word_embeddings.weight']},
      'embedding_norm': norm('layernorm'),
      'layers': jax.tree.map(lambda *leaves: np.stack(leaves), *groups),
    }
  }


def compare_inputs(encoder_tokens):
  """Queries, encoder tokens, text and its mask: random, with padding."""
  rng = np.random.default_rng(0)
  batch, length = 3, 9
  return {
    'queries': rng.normal(size=(CONFIG.num_queries, CONFIG.d_model)).astype(np.float32),
    'encoder': rng.normal(size=(batch, encoder_tokens, CONFIG.d_encoder)).astype(np.float32),
    'text': rng.integers(0, CONFIG.vocab_size, (batch, length)),
    'text_mask': np.arange(length)[None] < np.array([9, 6, 2])[:, None],
  }


def oracle_states(oracle, inputs, with_text):
  """The oracle's last hidden states, [B, K (+ T), D]."""
  import torch

  model, embeddings = oracle
  batch = len(inputs['encoder'])
  query_embeds = torch.tensor(inputs['queries']).expand(batch, -1, -1)
  seen = [np.ones((batch, CONFIG.num_queries), bool), inputs['text_mask']]
  mask = torch.tensor(np.concatenate(seen, axis=1)).long()
  with torch.no_grad():
    if with_text:
      text = torch.tensor(inputs['text'])
      query_embeds = embeddings(input_ids=text, query_embeds=query_embeds)
    return model(
      query_embeds=query_embeds,
      query_length=CONFIG.num_queries,
      attention_mask=mask if with_text else None,
      encoder_hidden_states=torch.tensor(inputs['encoder']),
    ).last_hidden_state.numpy()


def assert_equals_oracle(variables, inputs, with_text, expected):
  text_mask = inputs['text_mask']
  mask = qformer.attention_mask('multimodal', CONFIG.num_queries, jnp.asarray(text_mask))
  queries, text = qformer.QFormer(CONFIG).apply(
    variables,
    inputs['encoder'],
    jnp.asarray(inputs['text']) if with_text else None,
    mask if with_text else None,
  )
  np.testing.assert_allclose(queries, expected[:, : CONFIG.num_queries], atol=1e-4)
  if with_text:
    # States at padding are nobody's business.
    expected = expected[:, CONFIG.num_queries :]
    np.testing.assert_allclose(np.asarray(text)[text_mask], expected[text_mask], atol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize('encoder_tokens', [1, 6])
@pytest.mark.parametrize('with_text', [False, True])
def test_equals_blip2(oracle, encoder_tokens, with_text):
  inputs = compare_inputs(encoder_tokens)
  expected = oracle_states(oracle, inputs, with_text)
  variables = parameters(*oracle, inputs['queries'])
  assert_equals_oracle(variables, inputs, with_text, expected)


@pytest.mark.parametrize('with_text', [False, True])
def test_equals_blip2_as_recorded(with_text):
  with np.load(GOLDEN) as golden:
    states = golden[f'states/{with_text}']
    leaves = {key: golden[key] for key in golden.files if key.startswith('params/')}
  variables = flax.traverse_util.unflatten_dict(leaves, sep='/')
  assert_equals_oracle(variables, compare_inputs(1), with_text, states)


def write_golden():
  import torch
  import transformers

  oracle, inputs = make_oracle(), compare_inputs(1)
  variables = parameters(*oracle, inputs['queries'])
  np.savez_compressed(
    GOLDEN,
    oracle=f'transformers {transformers.__version__}, torch {torch.__version__}',
    **flax.traverse_util.flatten_dict(variables, sep='/'),
    **{f'states/{text}': oracle_states(oracle, inputs, text) for text in (False, True)},
  )


if __name__ == '__main__':
  write_golden()

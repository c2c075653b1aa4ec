"""Parity of a Q-Former's text branch, filled from BERT's file, with transformers' BertModel."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ilm_jax.checkpoints import bert
from ilm_jax.metrics import sentence_embedding
from ilm_jax.modules import qformer

pytestmark = pytest.mark.parity

TEXTS = [
  'Toy Story (1995). Animation, Children, Comedy',
  'A man is playing a guitar.',
  'Café! ÜBER-naïve 東京 tokens, and some words nobody knows: xqzptl.',
  '',
  'The stock market fell sharply on Monday after the report. ' * 40,
]


def oracle_states(directory, tokens, present):
  import torch
  from transformers import BertModel

  model = BertModel.from_pretrained(directory, attn_implementation='eager').eval()
  with torch.no_grad():
    return model(
      input_ids=torch.tensor(tokens), attention_mask=torch.tensor(present).long()
    ).last_hidden_state.numpy()


def our_states(directory, config, tokens, present):
  """The text's states beside queries, of all parameters random but those loaded."""
  files = bert.bert_files(directory)
  inputs = jnp.ones((len(tokens), 1, config.d_encoder)), jnp.asarray(tokens)
  module = qformer.QFormer(config)
  shapes = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs))['params']
  rng = np.random.default_rng(0)
  initial = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)
  weights = bert.load_bert(files.weights)
  params, _ = bert.init_qformer_from_bert(initial, weights, files.config)
  mask = qformer.attention_mask('unimodal', config.num_queries, jnp.asarray(present))
  _, text = jax.jit(module.apply)({'params': params}, *inputs, mask)
  of_text = mask[..., config.num_queries :, config.num_queries :]
  _, alone = jax.jit(module.apply)({'params': params}, None, inputs[1], of_text)
  np.testing.assert_allclose(np.asarray(text)[present], np.asarray(alone)[present], atol=1e-4)
  return np.asarray(text)


def assert_states_equal(directory, config):
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, config.vocab_size - 6, (3, 9))
  present = np.arange(9)[None] < np.array([9, 6, 2])[:, None]
  expected = oracle_states(directory, tokens, present)
  states = our_states(directory, config, tokens, present)
  print('largest difference', np.abs(states - expected)[present].max())
  np.testing.assert_allclose(states[present], expected[present], atol=1e-4)


@pytest.mark.network
def test_text_states_of_minilm():
  config = qformer.QFormerConfig(
    num_layers=6, d_model=384, num_heads=12, d_mlp=1536, vocab_size=30_528
  )
  assert_states_equal(bert.bert_files('minilm').weights.parent, config)


@pytest.mark.parametrize('head', ['BertModel', 'BertForMaskedLM'])
def test_text_states_of_a_random_bert_of_save_pretrained(tmp_path, head):
  import torch
  import transformers

  torch.manual_seed(0)
  config = transformers.BertConfig(
    vocab_size=120, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
    intermediate_size=64, max_position_embeddings=32,
  )  # fmt: skip
  model = getattr(transformers, head)(config)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.copy_(parameter + 0.1 * torch.randn_like(parameter))
  model.save_pretrained(tmp_path)
  assert json.loads((tmp_path / 'config.json').read_text())['num_attention_heads'] == 4
  ours = qformer.QFormerConfig(
    num_layers=4, d_model=32, num_heads=4, d_mlp=64, vocab_size=126, max_text_length=16
  )
  assert_states_equal(tmp_path, ours)


@pytest.mark.network
def test_sentence_embeddings_of_minilm():
  import torch
  from transformers import AutoTokenizer, BertModel

  directory = bert.bert_files('minilm').weights.parent
  tokenizer = AutoTokenizer.from_pretrained(directory)
  model = BertModel.from_pretrained(directory).eval()
  # As the model card computes them.
  batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=256, return_tensors='pt')
  assert batch['input_ids'].shape == (len(TEXTS), 256)
  with torch.no_grad():
    states = model(**batch).last_hidden_state
  mask = batch['attention_mask'][..., None].float()
  mean = (states * mask).sum(1) / mask.sum(1)
  expected = torch.nn.functional.normalize(mean, dim=1).numpy()
  vectors = sentence_embedding.SentenceEmbedder.minilm().embed(TEXTS)
  print('largest difference', np.abs(vectors - expected).max())
  np.testing.assert_allclose(vectors, expected, atol=1e-5)

"""Hugging Face's names and configurations of T5s. Live comparison: t5_recipes_parity_test.py."""

import dataclasses

import jax
import numpy as np
import pytest

from ilm_jax.errors import UsageError
from ilm_jax.lm.assemble import assemble
from ilm_jax.lm.t5_recipes import huggingface_config, huggingface_recipe
from ilm_jax.lm.t5x_source import T5XSource
from ilm_jax.modules.t5 import T5_SIZES
from tests.support.t5x_golden import directory, load, params_like

# Of google/flan-t5-small and google/mt5-small, as published.
FLAN = {
  'model_type': 't5', 'd_ff': 1024, 'd_kv': 64, 'd_model': 512, 'decoder_start_token_id': 0,
  'dropout_rate': 0.1, 'eos_token_id': 1, 'feed_forward_proj': 'gated-gelu',
  'is_encoder_decoder': True, 'layer_norm_epsilon': 1e-06, 'n_positions': 512,
  'num_decoder_layers': 8, 'num_heads': 6, 'num_layers': 8, 'pad_token_id': 0,
  'relative_attention_max_distance': 128, 'relative_attention_num_buckets': 32,
  'tie_word_embeddings': False, 'vocab_size': 32128,
}  # fmt: skip
MT5 = {**FLAN, 'model_type': 'mt5', 'vocab_size': 250_112}
CONFIG = load('t5_1_1_encdec_legacy').lm.config


@pytest.mark.parametrize(
  ('config', 'expected'),
  [
    (FLAN, T5_SIZES['flan_t5_small']),
    (MT5, T5_SIZES['mt5_small']),
    # As transformers 5 saves them.
    (
      {**FLAN, 'tie_word_embeddings': True, 'scale_decoder_outputs': False},
      T5_SIZES['flan_t5_small'],
    ),
    ({**MT5, 'tie_word_embeddings': True}, T5_SIZES['mt5_small']),
    (
      {**FLAN, 'tie_word_embeddings': True, 'num_decoder_layers': None},
      dataclasses.replace(T5_SIZES['flan_t5_small'], tied_head=True),
    ),
    (
      {**FLAN, 'model_type': 'umt5', 'feed_forward_proj': 'gated-silu', 'num_decoder_layers': 4},
      dataclasses.replace(
        T5_SIZES['flan_t5_small'],
        activation='silu',
        num_decoder_layers=4,
        shared_relative_bias=False,
      ),
    ),
  ],
)
def test_configurations(config, expected):
  assert huggingface_config(config, 'flan') == expected


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'feed_forward_proj': 'relu'}, "flan: feed_forward_proj='relu'; allowed: gated-gelu, .* 1.1"),
    ({'model_type': 'mT5'}, r"model_type='mT5'; allowed: t5, mt5, umt5\. Did you mean 'mt5'"),
    ({'d_model': None}, "no 'd_model' in config.json, which this model needs"),
  ],
)
def test_what_is_no_t5_1_1_is_refused(change, message):
  config = {key: value for key, value in {**FLAN, **change}.items() if value is not None}
  with pytest.raises(UsageError, match=message):
    huggingface_config(config, 'flan')


def theirs(name):
  """Hugging Face's name of a tensor of T5X."""
  stack, _, rest = name.partition('/')
  fixed = {
    'token_embedder/embedding': 'shared',
    'decoder/logits_dense/kernel': 'lm_head',
    f'{stack}/{stack}_norm/scale': f'{stack}.final_layer_norm',
    f'{stack}/relpos_bias/rel_embedding': (
      f'{stack}.block.0.layer.0.SelfAttention.relative_attention_bias'
    ),
  }
  if name in fixed:
    return f'{fixed[name]}.weight'
  layer, _, rest = rest.partition('/')
  last = 1 if stack == 'encoder' else 2
  rest = rest.replace('self_attention/', 'attention/').replace('/kernel', '')
  for part in ('query', 'key', 'value', 'out'):
    rest = rest.replace(f'encoder_decoder_attention/{part}', f'1.EncDecAttention.{part[0]}')
    rest = rest.replace(f'attention/{part}', f'0.SelfAttention.{part[0]}')
  rest = rest.replace('mlp/', f'{last}.DenseReluDense.')
  for norm, place in (('attention', 0), ('self_attention', 0), ('cross_attention', 1)):
    rest = rest.replace(f'pre_{norm}_layer_norm/scale', f'{place}.layer_norm')
  rest = rest.replace('pre_mlp_layer_norm/scale', f'{last}.layer_norm')
  return f'{stack}.block.{layer.removeprefix("layers_")}.layer.{rest}.weight'


class HuggingFaceTensors:
  """T5X's tensors as Hugging Face stores them: kernels and tables of buckets the other way."""

  where = 'flan'

  def __init__(self, **more):
    source = T5XSource(directory('t5_1_1_encdec_legacy'))
    self.tensors = {theirs(name): source.read(name) for name in source.shapes}
    self.tensors = {
      name: x if name == 'shared.weight' else x.T for name, x in self.tensors.items()
    } | {name.replace('__', '.'): x for name, x in more.items()}
    self.shapes = {name: x.shape for name, x in self.tensors.items()}

  def read(self, name):
    return self.tensors[name]


def assembled(source, config=CONFIG):
  recipe, dropped = huggingface_recipe(config, source.shapes)
  return assemble(source, recipe, params_like(config), dropped=dropped)


def test_huggingface_tensors_make_what_t5x_tensors_make():
  params, report = assembled(HuggingFaceTensors())
  jax.tree.map(np.testing.assert_array_equal, params, load('t5_1_1_encdec_legacy').params)
  assert report.dropped == ()


def test_copies_of_the_embedding_are_one_table():
  table = HuggingFaceTensors().read('shared.weight')
  unread = 'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight'
  more = {'encoder.embed_tokens.weight': table, unread: np.zeros((32, 4))}
  params, report = assembled(HuggingFaceTensors(**more))
  np.testing.assert_array_equal(params['embedder']['embedding'], table)
  assert report.dropped == (unread,)
  with pytest.raises(UsageError, match='several token embeddings that differ'):
    assembled(HuggingFaceTensors(**{'encoder.embed_tokens.weight': table + 1}))


def test_the_only_table_may_be_that_of_a_stack():
  source = HuggingFaceTensors()
  for tensors in (source.tensors, source.shapes):
    tensors['decoder.embed_tokens.weight'] = tensors.pop('shared.weight')
  params, _ = assembled(source)
  jax.tree.map(np.testing.assert_array_equal, params, load('t5_1_1_encdec_legacy').params)


def test_a_head_that_is_said_to_be_tied_must_be():
  with pytest.raises(UsageError, match='several token embeddings that differ'):
    assembled(HuggingFaceTensors(), dataclasses.replace(CONFIG, tied_head=True))

"""A Q-Former filled from a BERT: which array goes where, what is left over, what does not fit."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ilm_jax.checkpoints import bert
from ilm_jax.errors import UsageError
from ilm_jax.modules import qformer

WORDS, POSITIONS, LAYERS, D, HEADS, MLP = 50, 24, 4, 16, 2, 40
CONFIG = qformer.QFormerConfig(
  num_layers=4, d_model=D, num_heads=HEADS, d_mlp=MLP, num_queries=3, d_encoder=8,
  vocab_size=WORDS, max_text_length=POSITIONS,
)  # fmt: skip
BERT_CONFIG = {
  'model_type': 'bert',
  'hidden_act': 'gelu',
  'num_attention_heads': HEADS,
  'layer_norm_eps': 1e-12,
}


def bert_tensors(words=WORDS, positions=POSITIONS, layers=LAYERS, d=D, mlp=MLP):
  """A random BertModel under Hugging Face's names."""
  shapes = {
    'embeddings.word_embeddings.weight': (words, d),
    'embeddings.position_embeddings.weight': (positions, d),
    'embeddings.token_type_embeddings.weight': (2, d),
    'embeddings.LayerNorm.weight': (d,),
    'embeddings.LayerNorm.bias': (d,),
    'pooler.dense.weight': (d, d),
    'pooler.dense.bias': (d,),
  }
  for i in range(layers):
    for name, out, inputs in (
      ('attention.self.query', d, d),
      ('attention.self.key', d, d),
      ('attention.self.value', d, d),
      ('attention.output.dense', d, d),
      ('intermediate.dense', mlp, d),
      ('output.dense', d, mlp),
    ):
      shapes[f'encoder.layer.{i}.{name}.weight'] = (out, inputs)
      shapes[f'encoder.layer.{i}.{name}.bias'] = (out,)
    for name in ('attention.output.LayerNorm', 'output.LayerNorm'):
      shapes[f'encoder.layer.{i}.{name}.weight'] = (d,)
      shapes[f'encoder.layer.{i}.{name}.bias'] = (d,)
  rng = np.random.default_rng(0)
  return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def qformer_params(**changes):
  module = qformer.QFormer(dataclasses.replace(CONFIG, **changes))
  tokens = jnp.zeros((1, 1, CONFIG.d_encoder)), jnp.zeros((1, 4), jnp.int32)
  return random_params(jax.eval_shape(module.init, jax.random.key(0), *tokens))


def random_params(shapes):
  rng = np.random.default_rng(1)
  params = nn.meta.unbox(shapes)['params']
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)


def flattened(params):
  return {k: np.asarray(v) for k, v in traverse_util.flatten_dict(params, sep='/').items()}


@pytest.fixture(scope='module')
def initial():
  return qformer_params()


def test_every_leaf_by_its_indices(initial):
  w = bert_tensors()
  params, _ = bert.init_qformer_from_bert(initial, w, BERT_CONFIG)
  leaves, before = flattened(params), flattened(initial)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, initial)
  np.testing.assert_array_equal(
    leaves['word_embedder/embedding'], w['embeddings.word_embeddings.weight']
  )
  for t in range(POSITIONS):
    np.testing.assert_array_equal(
      leaves['positions'][t],
      w['embeddings.position_embeddings.weight'][t]
      + w['embeddings.token_type_embeddings.weight'][0],
    )
  np.testing.assert_array_equal(leaves['embedding_norm/scale'], w['embeddings.LayerNorm.weight'])
  np.testing.assert_array_equal(leaves['embedding_norm/bias'], w['embeddings.LayerNorm.bias'])
  for i in range(LAYERS):

    def leaf(name, i=i):
      return leaves[f'layers/layer_{i % 2}/{name}'][i // 2]

    def tensor(name, i=i):
      return w[f'encoder.layer.{i}.{name}']

    for h in range(HEADS):
      rows = slice(h * D // HEADS, (h + 1) * D // HEADS)
      for part in ('query', 'key', 'value'):
        kernel, bias = leaf(f'attention/{part}/kernel'), leaf(f'attention/{part}/bias')
        np.testing.assert_array_equal(kernel[:, h], tensor(f'attention.self.{part}.weight')[rows].T)
        np.testing.assert_array_equal(bias[h], tensor(f'attention.self.{part}.bias')[rows])
      out = tensor('attention.output.dense.weight')[:, rows].T
      np.testing.assert_array_equal(leaf('attention/out/kernel')[h], out)
    for ours, theirs in (
      ('attention/out/bias', 'attention.output.dense.bias'),
      ('attention/norm/scale', 'attention.output.LayerNorm.weight'),
      ('attention/norm/bias', 'attention.output.LayerNorm.bias'),
    ):
      np.testing.assert_array_equal(leaf(ours), tensor(theirs))
    for mlp in ('text_mlp', 'query_mlp'):
      np.testing.assert_array_equal(leaf(f'{mlp}/wi/kernel'), tensor('intermediate.dense.weight').T)
      np.testing.assert_array_equal(leaf(f'{mlp}/wi/bias'), tensor('intermediate.dense.bias'))
      np.testing.assert_array_equal(leaf(f'{mlp}/wo/kernel'), tensor('output.dense.weight').T)
      np.testing.assert_array_equal(leaf(f'{mlp}/wo/bias'), tensor('output.dense.bias'))
      np.testing.assert_array_equal(leaf(f'{mlp}/norm/scale'), tensor('output.LayerNorm.weight'))
      np.testing.assert_array_equal(leaf(f'{mlp}/norm/bias'), tensor('output.LayerNorm.bias'))
  for name in before:
    if name == 'queries' or 'cross_attention' in name:
      np.testing.assert_array_equal(leaves[name], before[name])


def test_report_accounts_for_every_leaf_and_every_tensor(initial):
  w = {**bert_tensors(), 'cls.predictions.bias': np.zeros(WORDS, np.float32)}
  _, report = bert.init_qformer_from_bert(initial, w, BERT_CONFIG, 'there/model.safetensors')
  leaves = flattened(initial)
  assert sorted(report.loaded + report.copied + report.new) == sorted(leaves)
  assert len(report.loaded) == 4 + 2 * 16
  assert report.copied == [name for name in sorted(leaves) if 'query_mlp' in name]
  assert report.new == [name for name in sorted(leaves) if 'cross_' in name] + ['queries']
  assert report.dropped == ['cls.predictions.bias', 'pooler.dense.bias', 'pooler.dense.weight']
  assert report.partly_new == []
  text = str(report)
  assert text.startswith('Q-Former initialised from there/model.safetensors\n')
  assert 'copied    12 arrays' in text
  assert 'layers/layer_0/cross_attention(10), queries' in text
  assert 'pooler.dense.weight' in text
  assert max(map(len, text.splitlines())) <= 100


def test_a_longer_vocabulary_keeps_its_own_last_rows():
  initial = qformer_params(vocab_size=64)
  w = bert_tensors()
  params, report = bert.init_qformer_from_bert(initial, w, BERT_CONFIG)
  words = flattened(params)['word_embedder/embedding']
  np.testing.assert_array_equal(words[:WORDS], w['embeddings.word_embeddings.weight'])
  np.testing.assert_array_equal(words[WORDS:], initial['word_embedder']['embedding'][WORDS:])
  assert report.partly_new == ['word_embedder/embedding']
  assert 'word_embedder/embedding is partly new: its last 14 rows' in str(report)


def test_a_deeper_bert_and_more_positions_lose_their_rest(initial):
  w = bert_tensors(layers=12, positions=POSITIONS + 8)
  params, report = bert.init_qformer_from_bert(initial, w, BERT_CONFIG)
  fitting = {name: w[name] for name in bert_tensors()}
  name = 'embeddings.position_embeddings.weight'
  fitting[name] = w[name][:POSITIONS]
  expected, _ = bert.init_qformer_from_bert(initial, fitting, BERT_CONFIG)
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  dropped = {name.split('.')[2] for name in report.dropped if name.startswith('encoder')}
  assert dropped == {str(i) for i in range(4, 12)}
  assert "first 4 of BERT's 12 layers" in str(report)
  assert "first 24 of BERT's 32" in str(report)
  assert 'encoder.layer.9(16), encoder.layer.10(16)' in ' '.join(str(report).split())


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'num_layers': 6}, r'a BERT of 4 layers cannot fill a Q-Former of num_layers=6'),
    ({'vocab_size': 49}, r'BERT has 50 words, but the Q-Former vocab_size=49'),
    ({'max_text_length': 25}, r'24 positions, but the Q-Former max_text_length=25. Set it to 24'),
    ({'d_model': 32}, r'\[50, 16\].*word_embedder/embedding \[50, 32\].*d_model=16'),
    (
      {'d_mlp': 20},
      r'intermediate.dense.bias is \[40\].*text_mlp/wi/bias \[2, 20\], which takes \[20\].*'
      r'd_mlp=40 and at most num_layers=4',
    ),
    ({'num_heads': 4}, r'num_attention_heads=2, but the Q-Former has num_heads=4'),
  ],
)
def test_what_does_not_fit_is_refused(changes, message):
  with pytest.raises(UsageError, match=message) as error:
    bert.init_qformer_from_bert(qformer_params(**changes), bert_tensors(), BERT_CONFIG, 'my.file')
  assert str(error.value).startswith('my.file: ')


def test_the_fitting_size_is_named(initial):
  w = bert_tensors(words=WORDS, d=64, mlp=128)
  with pytest.raises(UsageError, match=r"at most num_layers=4: 'tiny'"):
    bert.init_qformer_from_bert(initial, w, BERT_CONFIG)


@pytest.mark.parametrize(
  ('key', 'value'),
  [('model_type', 'roberta'), ('hidden_act', 'relu'), ('position_embedding_type', 'relative_key')],
)
def test_a_bert_of_another_kind_is_refused(initial, key, value):
  with pytest.raises(UsageError, match=f"{key}='{value}', but a Q-Former computes"):
    bert.init_qformer_from_bert(initial, bert_tensors(), {**BERT_CONFIG, key: value})


def test_what_config_json_leaves_open_is_said(initial):
  _, report = bert.init_qformer_from_bert(initial, bert_tensors())
  assert 'no config.json: num_heads=2' in str(report)
  config = {**BERT_CONFIG, 'layer_norm_eps': 1e-5}
  _, report = bert.init_qformer_from_bert(initial, bert_tensors(), config)
  assert 'layer_norm_eps=1e-05' in str(report)


def test_a_wrong_width_is_said_before_wrong_heads():
  initial = qformer_params(d_model=32, num_heads=4)
  with pytest.raises(UsageError, match=r'\[50, 16\].*\[50, 32\]'):
    bert.init_qformer_from_bert(initial, bert_tensors(), BERT_CONFIG)


def test_a_missing_tensor_is_named(initial):
  w = bert_tensors()
  del w['encoder.layer.2.output.dense.bias']
  with pytest.raises(UsageError, match=r"no tensor 'encoder.layer.2.output.dense.bias'"):
    bert.init_qformer_from_bert(initial, w, BERT_CONFIG)


def test_sharding_and_type_stay(initial):
  mesh = Mesh(np.array(jax.devices()[:1]), 'x')
  sharding = NamedSharding(mesh, PartitionSpec('x'))
  params, _ = bert.init_qformer_from_bert(
    jax.device_put(initial, sharding), bert_tensors(), BERT_CONFIG
  )
  assert {x.sharding for x in jax.tree.leaves(params)} == {sharding}
  params, _ = bert.init_qformer_from_bert(
    jax.tree.map(np.asarray, initial), bert_tensors(), BERT_CONFIG
  )
  assert all(isinstance(x, np.ndarray) and x.dtype == np.float32 for x in jax.tree.leaves(params))
  layer = params['layers']['layer_0']
  kernels = (layer[mlp]['wi']['kernel'] for mlp in ('query_mlp', 'text_mlp'))
  assert not np.shares_memory(*kernels)


def test_text_branch_alone(initial):
  tokens = jnp.zeros((1, 4), jnp.int32)
  text = jax.eval_shape(qformer.QFormer(CONFIG).init, jax.random.key(0), None, tokens)
  params, report = bert.init_qformer_from_bert(random_params(text), bert_tensors())
  expected, _ = bert.init_qformer_from_bert(initial, bert_tensors())
  leaves, all_leaves = flattened(params), flattened(expected)
  assert (report.copied, report.new) == ([], ['queries'])
  for name in report.loaded:
    np.testing.assert_array_equal(leaves[name], all_leaves[name])


def test_parameters_of_something_else_are_refused(initial):
  with pytest.raises(ValueError, match=r"variables\['params'\]"):
    bert.init_qformer_from_bert({'params': initial}, bert_tensors())


@pytest.mark.parametrize('prefix', ['', 'bert.', 'model.'])
@pytest.mark.parametrize('old', [False, True])
def test_names_of_other_files(tmp_path, prefix, old):
  expected = bert_tensors(layers=1)
  tensors = {prefix + name: x for name, x in expected.items()}
  if old:
    renamed = {'LayerNorm.weight': 'LayerNorm.gamma', 'LayerNorm.bias': 'LayerNorm.beta'}
    for new, name in renamed.items():
      tensors = {key.replace(new, name): x for key, x in tensors.items()}
  tensors['cls.predictions.bias'] = np.ones(3, np.float32)
  safetensors.numpy.save_file(tensors, tmp_path / 'model.safetensors')
  found = bert.load_bert(tmp_path / 'model.safetensors')
  assert found.keys() == {*expected, 'cls.predictions.bias'}
  for name, x in expected.items():
    np.testing.assert_array_equal(found[name], x)


@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_as_float32(tmp_path, dtype):
  expected = {name: x.astype(dtype) for name, x in bert_tensors(layers=1).items()}
  expected['embeddings.position_ids'] = np.arange(POSITIONS)[None]
  safetensors.numpy.save_file(expected, tmp_path / 'model.safetensors')
  found = bert.load_bert(tmp_path / 'model.safetensors')
  assert found.pop('embeddings.position_ids').dtype == np.int64
  for name, x in found.items():
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, expected[name].astype(np.float32))


def test_other_files_are_refused(tmp_path):
  file = tmp_path / 'model.safetensors'
  safetensors.numpy.save_file({'roberta.' + k: v for k, v in bert_tensors(layers=0).items()}, file)
  with pytest.raises(UsageError, match=r"no 'embeddings.word_embeddings.weight'.*it has roberta\."):
    bert.load_bert(file)
  file.write_bytes(b'not safetensors')
  with pytest.raises(UsageError, match='cannot be read as safetensors'):
    bert.load_bert(file)
  with pytest.raises(UsageError, match='cannot be read as safetensors'):
    bert.load_bert(tmp_path / 'absent.safetensors')


def test_files_of_a_directory_and_of_a_path(tmp_path):
  weights = tmp_path / 'model.safetensors'
  weights.touch()
  assert bert.bert_files(tmp_path) == (weights, None, None)
  (tmp_path / 'tokenizer.json').touch()
  (tmp_path / 'config.json').write_text(json.dumps(BERT_CONFIG))
  expected = (weights, tmp_path / 'tokenizer.json', BERT_CONFIG)
  assert bert.bert_files(tmp_path) == expected
  assert bert.bert_files(str(weights)) == expected


def test_wrong_paths_name_what_is_allowed(tmp_path):
  with pytest.raises(UsageError, match=r"'minilm2': no such file.*'minilm'. Did you mean 'minilm'"):
    bert.bert_files('minilm2')
  (tmp_path / 'pytorch_model.bin').touch()
  with pytest.raises(UsageError, match=r'no model.safetensors in it, but pytorch_model.bin'):
    bert.bert_files(tmp_path)
  with pytest.raises(UsageError, match=r'save_pretrained'):
    bert.bert_files(tmp_path / 'pytorch_model.bin')
  (tmp_path / 'model.safetensors').touch()
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(UsageError, match=r'config.json: cannot be read as JSON'):
    bert.bert_files(tmp_path)
  (tmp_path / 'config.json').write_text('[]')
  with pytest.raises(UsageError, match=r'found a list'):
    bert.bert_files(tmp_path)


@pytest.mark.network
def test_minilm_fills_the_qformer_of_its_size():
  files = bert.bert_files('minilm')
  assert files.tokenizer is not None
  config = dataclasses.replace(qformer.SIZES['minilm'], vocab_size=30_528)
  tokens = jnp.zeros((1, 1, config.d_encoder)), jnp.zeros((1, 4), jnp.int32)
  shapes = jax.eval_shape(qformer.QFormer(config).init, jax.random.key(0), *tokens)
  initial = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), nn.meta.unbox(shapes)['params'])
  weights = bert.load_bert(files.weights)
  params, report = bert.init_qformer_from_bert(initial, weights, files.config, 'minilm')
  assert len(report.loaded) == 4 + 2 * 16
  assert (len(report.copied), len(report.new)) == (12, 11)
  assert report.dropped == [
    'embeddings.position_ids', 'pooler.dense.bias', 'pooler.dense.weight',
  ]  # fmt: skip
  # The model's published size is 22.7 M, of which 0.15 M are the pooler's and token type 1's.
  used = sum(report.sizes[name] for name in report.loaded) - 6 * 384
  assert used == 22_713_216 - (384 * 384 + 384) - 2 * 384
  for name, leaf in flattened(params).items():
    # Nothing that should have been loaded is still 0.
    assert (name in report.new) == (not leaf.any()), name

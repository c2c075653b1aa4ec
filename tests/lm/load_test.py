"""`load_lm` on every format: found by its files, loaded, and told apart by its identity."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from ilm_jax.errors import UsageError
from ilm_jax.lm.gguf_files import GgufSource
from ilm_jax.lm.load import abstract_params, default_compute, init_params, load_lm
from ilm_jax.modules.decoder import Decoder
from ilm_jax.modules.layers import Compute
from ilm_jax.modules.t5 import T5, T5Config
from ilm_jax.runtime.sharding import DEFAULT_RULES, abstract_init, make_mesh
from tests.support import t5x_golden, tiny_gemma, tiny_gguf

TOKENS = np.random.default_rng(1).integers(1, 32, (2, 9)).astype(np.int32)
F32 = Compute()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('ILM_CACHE', str(tmp_path / 'cache'))
  return tmp_path / 'cache'


def logits_of(lm, *args):
  return np.asarray(lm.module.apply({'params': lm.params}, *args, method='logits_of'))


def write_tokenizer(directory, **config):
  """Words for tokens: 'w0' is 0."""
  vocabulary = {f'w{i}': i for i in range(500)} | {'<s>': 500, '</s>': 501, '<unused0>': 502}
  tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token='w0'))
  tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  tokenizer.add_special_tokens(['<s>', '</s>', '<unused0>'])
  tokenizer.save(str(directory / 'tokenizer.json'))
  (directory / 'tokenizer_config.json').write_text(json.dumps(config))


def write_huggingface(directory, family='gemma3', change=None):
  """The stored tiny Gemma as transformers saves it."""
  directory.mkdir()
  tensors, ids, logits = tiny_gemma.golden(family)
  safetensors.numpy.save_file(
    {**tensors, **(change or {})}, directory / 'model.safetensors', {'format': 'pt'}
  )
  config = {
    'model_type': 'gemma3_text', 'num_hidden_layers': 2, 'hidden_size': 32,
    'num_attention_heads': 4, 'num_key_value_heads': 2, 'head_dim': 8, 'intermediate_size': 64,
    'vocab_size': 512, 'max_position_embeddings': 64, 'sliding_window': 8,
    'sliding_window_pattern': 2, 'query_pre_attn_scalar': 8, 'rope_theta': 1e6,
    'rope_local_base_freq': 1e4, 'hidden_activation': 'gelu_pytorch_tanh',
    'tie_word_embeddings': True,
  }  # fmt: skip
  (directory / 'config.json').write_text(json.dumps(config))
  return ids, logits


@pytest.fixture
def gguf(tmp_path):
  path = tmp_path / 'tiny.gguf'
  tiny_gguf.write_model(path, 'llama')
  return path


def test_a_gguf_file_is_converted_once(gguf, cache):
  said = []
  first = load_lm(str(gguf), compute=F32, report=said.append)
  assert [line for line in said if 'converting it, once' in line]
  (converted,) = (cache / 'lm').glob('tiny-*')
  assert {'params', 'lm.json', 'tokenizer.json'} == {p.name for p in converted.iterdir()}
  said.clear()
  second = load_lm(str(gguf), compute=F32, report=said.append)
  assert said == []
  source = GgufSource(gguf)
  decoder, params = tiny_gguf.decoder_and_params(source)
  expected = np.asarray(decoder.apply({'params': params}, TOKENS, method='logits_of'))
  for lm in (first, second):
    np.testing.assert_array_equal(logits_of(lm, TOKENS), expected)
    assert lm.identity == first.identity
  unstacked = load_lm(str(gguf), compute=Compute(scan_layers=False))
  np.testing.assert_allclose(logits_of(unstacked, TOKENS), expected, atol=1e-5)


def test_a_conversion_that_fails_leaves_nothing(gguf, cache, tmp_path):
  broken = tmp_path / 'broken.gguf'
  tiny_gguf.write_model(broken, 'llama', {'tokenizer.ggml.pre': 'unheard-of'})
  with pytest.raises(UsageError, match='unheard-of'):
    load_lm(str(broken), compute=F32, report=lambda _: None)
  assert not [p for p in (cache / 'lm').iterdir() if not p.name.endswith('.lock')]


def test_a_huggingface_directory(tmp_path):
  ids, logits = write_huggingface(tmp_path / 'gemma')
  write_tokenizer(
    tmp_path / 'gemma',
    bos_token='<s>',
    eos_token={'content': '</s>'},
    chat_template='{{ bos_token }}{% for m in messages %} {{ m.content }}{% endfor %}',
  )
  lm = load_lm(str(tmp_path / 'gemma'), compute=F32)
  assert np.abs(logits_of(lm, ids) - logits).max() < 1e-4
  assert lm.vocabulary.encode('w3 w9') == [3, 9]
  assert lm.prompt_tokens('w3') == [3]
  assert lm.stop_ids == (501,)
  assert lm.chat_tokens([{'role': 'user', 'content': 'w3 </s> w4'}]) == [500, 3, 501, 4]
  file = str(tmp_path / 'gemma' / 'tokenizer.json')
  tokenizer = Tokenizer.from_file(file)
  tokenizer.post_processor = processors.TemplateProcessing(
    single='<s> $A', special_tokens=[('<s>', 500)]
  )
  tokenizer.save(file)
  assert load_lm(str(tmp_path / 'gemma'), compute=F32).prompt_tokens('w3') == [500, 3]
  assert lm.vocabulary.slot_token == '<unused0>'
  json.dumps(lm.identity)


def test_the_identity_is_of_the_content(tmp_path):
  for name, change in (('a', None), ('b', None), ('c', {'model.norm.weight': np.ones(32, 'f4')})):
    write_huggingface(tmp_path / name, change=change)
  a, b, c = (load_lm(str(tmp_path / name), compute=F32).identity for name in 'abc')
  assert a == b != c


@pytest.mark.parametrize('name', ['decoder_only_legacy', 'decoder_only_orbax'])
def test_a_t5x_directory(name):
  lm = load_lm(str(t5x_golden.directory(name)), compute=F32)
  expected = np.asarray(t5x_golden.load(name).logits_of(TOKENS))
  np.testing.assert_allclose(logits_of(lm, TOKENS), expected, atol=1e-5)
  with pytest.raises(UsageError, match='no tokenizer beside the checkpoint'):
    _ = lm.vocabulary


def test_an_encoder_decoder_and_its_own_tokenizer(tmp_path):
  write_tokenizer(tmp_path, eos_token='</s>', pad_token='w0')
  name = 't5_1_1_encdec_legacy'
  path = str(t5x_golden.directory(name))
  lm = load_lm(path, compute=F32, tokenizer=str(tmp_path / 'tokenizer.json'))
  expected = np.asarray(t5x_golden.load(name).logits_of(TOKENS, TOKENS))
  np.testing.assert_allclose(logits_of(lm, TOKENS, TOKENS), expected, atol=1e-5)
  assert lm.vocabulary.eos_id == 501
  with pytest.raises(UsageError, match='has no chat template'):
    lm.chat_tokens([])


@pytest.mark.parametrize('dtype', ['bfloat16', 'int8'])
def test_smaller_weights(tmp_path, dtype):
  ids, logits = write_huggingface(tmp_path / 'gemma')
  compute = dataclasses.replace(default_compute('cpu'), param_dtype=dtype)
  lm = load_lm(str(tmp_path / 'gemma'), compute=compute)
  matrices = [x for x in jax.tree.leaves(lm.params) if x.dtype != jnp.float32]
  assert {x.dtype for x in matrices} == {jnp.dtype(dtype)}
  assert sum(x.size for x in matrices) > 0.95 * sum(x.size for x in jax.tree.leaves(lm.params))
  error = logits_of(lm, ids) - logits
  assert np.sqrt((error**2).mean()) < 0.1 * logits.std()


def test_bytes_are_what_rounding_gives(tmp_path):
  write_huggingface(tmp_path / 'gemma')
  tensors, _, _ = tiny_gemma.golden('gemma3')
  for scan_layers in (True, False):
    compute = Compute(param_dtype='int8', scan_layers=scan_layers)
    params = load_lm(str(tmp_path / 'gemma'), compute=compute).params
    layer = params['layers'] if scan_layers else params['layers_1']
    out = layer['attention']['out']
    kernel, scale = (
      np.asarray(out[k])[1 if scan_layers else ...] for k in ('kernel', 'kernel_scale')
    )
    weight = tensors['model.layers.1.self_attn.o_proj.weight'].T.reshape(4, 8, 32)
    np.testing.assert_allclose(scale, np.abs(weight).max(axis=(0, 1)) / 127, rtol=1e-6)
    assert np.abs(kernel * scale - weight).max() <= scale.max() / 2 * 1.001
    assert np.abs(kernel).max() == 127
    table, scales = (np.asarray(params['embedder'][k]) for k in ('embedding', 'embedding_scale'))
    words = tensors['model.embed_tokens.weight']
    np.testing.assert_allclose(scales, np.abs(words).max(axis=1) / 127, rtol=1e-6)
    assert np.abs(table * scales[:, None] - words).max() <= scales.max() / 2 * 1.001


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('smollm2_135', "Did you mean 'smollm2_135m'"),
    ('nowhere/at/all', 'neither a name'),
    ('empty', 'no format that is known'),
    ('file.bin', 'It is a file'),
    ('only_config', r'neither model.safetensors'),
  ],
)
def test_what_is_no_language_model(tmp_path, monkeypatch, name, message):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'file.bin').touch()
  (tmp_path / 'only_config').mkdir()
  (tmp_path / 'only_config' / 'config.json').write_text('{"model_type": "llama"}')
  with pytest.raises(UsageError, match=message):
    load_lm(name)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'model_type': 'gemma4'}, "Did you mean 'gemma"),
    ({'hidden_activation': 'relu6'}, 'relu6'),
    ({'rope_scaling': {'rope_type': 'yarn', 'factor': 2}}, 'yarn'),
    ({'layer_types': ['full_attention', 'sliding_attention']}, 'every n-th'),
    ({'hidden_size': 16}, r'embed_tokens.weight \[512, 32\]: makes'),
    ({'num_hidden_layers': 3}, r'\+ model.layers.2.self_attn.q_proj.weight: missing'),
    ({'num_hidden_layers': 1}, r'- model.layers.1.self_attn.q_proj.weight \[32, 32\]'),
  ],
)
def test_a_wrong_config_is_told(tmp_path, change, message):
  write_huggingface(tmp_path / 'gemma')
  file = tmp_path / 'gemma' / 'config.json'
  file.write_text(json.dumps(json.loads(file.read_text()) | change))
  with pytest.raises(UsageError, match=message):
    load_lm(str(tmp_path / 'gemma'), compute=F32)


@pytest.mark.parametrize('param_dtype', ['float32', 'int8'])
@pytest.mark.parametrize('kind', ['decoder', 'own_bias', 'shared_bias'])
def test_the_shapes_of_unrolled_layers_are_those_that_init_makes(kind, param_dtype):
  compute = Compute(param_dtype=param_dtype, scan_layers=False)
  module = Decoder(tiny_gemma.CONFIGS['gemma3'], compute)
  if kind != 'decoder':
    sizes = dict(num_encoder_layers=2, num_decoder_layers=3, d_model=16, num_heads=2, head_dim=4)
    shared = kind == 'shared_bias'
    config = T5Config(vocab_size=50, d_mlp=32, shared_relative_bias=shared, **sizes)
    module = T5(config, compute)
  mesh = make_mesh({'data': -1})
  init = functools.partial(init_params, module)
  expected = abstract_init(init, mesh, DEFAULT_RULES, jax.random.key(0))
  assert abstract_params(module, mesh) == expected

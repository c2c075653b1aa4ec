"""Checkpoints that T5X wrote: ours compute what T5X computed with them."""

import dataclasses
import shutil

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import pytest

from ilm_jax.errors import UsageError
from ilm_jax.lm import t5_recipes
from ilm_jax.lm.t5x_source import T5XSource
from ilm_jax.modules.t5 import T5Config
from tests.support.t5x_golden import GOLDEN, directory, load, load_source

DECODER_ONLY = T5Config(
  num_encoder_layers=0, num_decoder_layers=2, d_model=32, num_heads=4, head_dim=8, d_mlp=64,
  vocab_size=384, tied_head=True,
)  # fmt: skip
T5_1_1 = dataclasses.replace(DECODER_ONLY, num_encoder_layers=2, tied_head=False)
CONFIGS = {
  'decoder_only_legacy': DECODER_ONLY,
  'decoder_only_orbax': DECODER_ONLY,
  't5_1_1_encdec_legacy': T5_1_1,
  't5_1_1_scalable_legacy': dataclasses.replace(T5_1_1, shared_relative_bias=False),
}


def reference(name):
  with np.load(GOLDEN / name) as arrays:
    return dict(arrays)


@pytest.mark.parametrize('scan_layers', [True, False])
@pytest.mark.parametrize('kind', ['causal', 'prefix'])
def test_decoder_only_computes_what_t5x_did(kind, scan_layers):
  ref = reference('ref_decoder_only.npz')
  there = ref['targets'] > 0
  logits = load('decoder_only_legacy', scan_layers).logits_of(
    ref['inputs'],
    segment_ids=there.astype(np.int32),
    prefix_mask=ref['causal'] if kind == 'prefix' else None,
  )
  expected = ref['logits_prefix' if kind == 'prefix' else 'logits']
  np.testing.assert_allclose(logits[there], expected[there], atol=1e-5)


@pytest.mark.parametrize('scan_layers', [True, False])
def test_encoder_decoder_computes_what_t5x_did(scan_layers):
  ref = reference('ref_t5_1_1_encdec.npz')
  there = ref['targets'] > 0
  logits = load('t5_1_1_encdec_legacy', scan_layers).logits_of(
    ref['inputs'],
    ref['encoder_input'],
    segment_ids=there.astype(np.int32),
    encoder_segment_ids=(ref['encoder_input'] > 0).astype(np.int32),
  )
  np.testing.assert_allclose(logits[there], ref['logits'][there], atol=1e-5)


@pytest.mark.parametrize('name', CONFIGS)
def test_every_tensor_becomes_a_parameter(name):
  loaded = load(name)
  assert loaded.lm.config == CONFIGS[name]
  assert loaded.report.used == len(T5XSource(directory(name)).shapes)
  assert loaded.report.dropped == ()
  leaves = jax.tree.leaves(loaded.params)
  assert loaded.report.parameters == sum(x.size for x in leaves)
  assert all(np.std(x) > 0 for x in leaves)


def test_stacked_layers_are_layers():
  tokens = np.arange(1, 13).reshape(2, 6)
  stacked, layers = (
    load('t5_1_1_scalable_legacy', scan).logits_of(tokens, tokens + 20) for scan in (True, False)
  )
  np.testing.assert_allclose(stacked, layers, atol=1e-5)


def test_the_axes_of_stacked_layers():
  """T5X's kernels are [D, L, H, C], what comes out of heads is [H, L, C, D]."""
  source = T5XSource(directory('t5_1_1_scalable_legacy'))
  layers = load('t5_1_1_scalable_legacy').params['decoder']['layers']
  cross = source.read('decoder/decoder/encoder_decoder_attention/out/kernel')
  np.testing.assert_array_equal(layers['cross_attention']['out']['kernel'][1], cross[:, 1])
  key = source.read('decoder/decoder/self_attention/key/kernel')
  np.testing.assert_array_equal(layers['attention']['key']['kernel'][1], key[:, 1])
  bias = source.read('decoder/decoder/relpos_bias/rel_embedding')
  np.testing.assert_array_equal(layers['relative_bias']['embedding'][0], bias[:, 0])


class Tensors:
  """A source in memory, to be spoilt."""

  where = 'checkpoint_7'

  def __init__(self, tensors):
    self.tensors = tensors
    self.shapes = {name: x.shape for name, x in tensors.items()}

  def read(self, name):
    return self.tensors[name]


def tensors_of(name):
  source = T5XSource(directory(name))
  return {tensor: source.read(tensor) for tensor in source.shapes}


@pytest.mark.parametrize('scan_layers', [True, False])
@pytest.mark.parametrize('name', ['t5_1_1_encdec_legacy', 't5_1_1_scalable_legacy'])
def test_other_layers_than_t5x_stacks_are_read(name, scan_layers):
  """Kernels with heads apart or together, as different models of T5X have them."""
  tensors, heads = tensors_of(name), 2 if 'scalable' in name else 1
  for tensor, x in tensors.items():
    if tensor.endswith(('query/kernel', 'key/kernel', 'value/kernel')):
      shape = x.shape[:heads]
      tensors[tensor] = x.reshape(*shape, 32) if heads == 2 else x.reshape(*shape, 4, 8)
  got = load_source(Tensors(tensors), scan_layers=scan_layers)
  jax.tree.map(np.testing.assert_array_equal, got.params, load(name, scan_layers).params)


def spoilt(name, change):
  tensors = tensors_of('t5_1_1_encdec_legacy')
  change(tensors, name)
  return Tensors(tensors)


@pytest.mark.parametrize(
  ('name', 'change', 'message'),
  [
    (
      'encoder/layers_1/mlp/wo/kernel',
      lambda tensors, name: tensors.pop(name),
      r'\+ encoder/layers_1/mlp/wo/kernel: missing',
    ),
    (
      'decoder/layers_1/mlp/wo/bias',
      lambda tensors, name: tensors.update({name: np.zeros(32)}),
      r'- decoder/layers_1/mlp/wo/bias \[32\]: no parameter is made of it',
    ),
    (
      'decoder/layers_0/encoder_decoder_attention/key/kernel',
      lambda tensors, name: tensors.update({name: np.zeros((40, 32))}),
      r'decoder/layers_0/encoder_decoder_attention/key/kernel \[40, 32\]: makes \(40, 4, 8\)',
    ),
    (
      'encoder/layers_0/attention/out/kernel',
      lambda tensors, name: tensors.update({name: np.zeros((16, 64))}),  # as many numbers
      r'encoder/layers_0/attention/out/kernel \[16, 64\]: makes cannot reshape',
    ),
  ],
)
def test_what_does_not_fit_is_named(name, change, message):
  with pytest.raises(UsageError, match=message):
    load_source(spoilt(name, change), config=T5_1_1)


def test_a_model_that_is_not_gated_is_refused():
  def without_gate(tensors, name):
    tensors['decoder/layers_0/mlp/wi/kernel'] = tensors.pop(name)

  source = spoilt('decoder/layers_0/mlp/wi_0/kernel', without_gate)
  with pytest.raises(UsageError, match=r"no tensor 'decoder/layers_0/mlp/wi_0/kernel', .* a gate"):
    t5_recipes.t5x_config(source.shapes, source.where)


def test_what_is_no_checkpoint_is_told(tmp_path):
  with pytest.raises(
    UsageError, match=r'nowhere is not a checkpoint of T5X\. There is no such dir'
  ):
    T5XSource(tmp_path / 'nowhere')
  with pytest.raises(UsageError, match="One has a file 'checkpoint' or a directory 'state'"):
    T5XSource(tmp_path)
  for step in (900, 1000):
    (tmp_path / f'checkpoint_{step}').mkdir()
  with pytest.raises(UsageError, match='Name one of those in it: checkpoint_1000'):
    T5XSource(tmp_path)
  (tmp_path / 'checkpoint').write_bytes(b'\x83nonsense')
  with pytest.raises(UsageError, match='checkpoint'):
    T5XSource(tmp_path)


def test_an_incomplete_copy_is_told(tmp_path):
  copy = tmp_path / 'checkpoint_20'
  shutil.copytree(directory('decoder_only_legacy'), copy)
  shutil.rmtree(copy / 'target.decoder.layers_1.mlp.wo.kernel')
  with pytest.raises(UsageError, match=r'mlp\.wo\.kernel: cannot be read; is the copy complete?'):
    load_source(T5XSource(copy))


def test_small_tensors_may_stand_in_the_index(tmp_path):
  """So do norms in old checkpoints."""
  tensors = tensors_of('decoder_only_legacy')
  nested = flax.traverse_util.unflatten_dict(tensors, sep='/')
  index = {'version': 3, 'optimizer': {'target': nested, 'state': {'step': 7}}}
  (tmp_path / 'checkpoint').write_bytes(flax.serialization.msgpack_serialize(index))
  got = load_source(T5XSource(tmp_path)).params
  jax.tree.map(np.testing.assert_array_equal, got, load('decoder_only_legacy').params)

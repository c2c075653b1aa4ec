"""Google's Orbax checkpoints of Gemma: layouts, logits, inferred configurations, and refusals.

The tiny models are those of tests/golden/gemma, of which Google's own library gives the same
logits as transformers.
"""

import dataclasses
import functools

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from ilm_jax.errors import UsageError
from ilm_jax.lm import gemma
from ilm_jax.lm.assemble import assemble
from ilm_jax.lm.decoder_sizes import DECODER_SIZES
from ilm_jax.lm.orbax_source import OrbaxSource
from ilm_jax.modules.decoder import Decoder
from ilm_jax.modules.layers import Compute
from tests.support import tiny_gemma


def google_layers(family, transposed, fused=False):
  """The stored tensors in Google's NESTED layout, by path."""
  tensors, _, _ = tiny_gemma.golden(family)
  c = tiny_gemma.CONFIGS[family]
  tree = {
    'embedder/input_embedding': tensors['model.embed_tokens.weight'],
    'final_norm/scale': tensors['model.norm.weight'],
  }
  for i in range(c.num_layers):
    get = {
      key.removeprefix(f'model.layers.{i}.'): value
      for key, value in tensors.items()
      if key.startswith(f'model.layers.{i}.')
    }

    def heads(name, get=get):  # [N H, D] -> [N, D, H]
      return get[f'self_attn.{name}.weight'].reshape(-1, c.head_dim, c.d_model).swapaxes(1, 2)

    query, key, value = heads('q_proj'), heads('k_proj'), heads('v_proj')
    gating = np.stack([get['mlp.gate_proj.weight'], get['mlp.up_proj.weight']])  # [2, F, D]
    out = get['self_attn.o_proj.weight'].T.reshape(c.num_heads, c.head_dim, c.d_model)
    layer = {
      'attn/attn_vec_einsum/w': out,
      'mlp/gating_einsum': gating if transposed else gating.swapaxes(1, 2),
      'mlp/linear': get['mlp.down_proj.weight'].T,
      'pre_attention_norm/scale': get['input_layernorm.weight'],
      'post_attention_norm/scale': get['post_attention_layernorm.weight'],
      'pre_ffw_norm/scale': get['pre_feedforward_layernorm.weight'],
      'post_ffw_norm/scale': get['post_feedforward_layernorm.weight'],
    }
    if fused:  # as where there are as many key-value heads: each of these is there G times
      key, value = (np.repeat(x, c.num_heads // c.num_kv_heads, axis=0) for x in (key, value))
      layer['attn/qkv_einsum/w'] = np.stack([query, key, value])
    else:
      layer['attn/q_einsum/w'] = query
      layer['attn/kv_einsum/w'] = np.stack([key, value])
    if c.qk_norm:
      layer['attn/_query_norm/scale'] = get['self_attn.q_norm.weight']
      layer['attn/_key_norm/scale'] = get['self_attn.k_norm.weight']
    tree.update({f'layer_{i}/{name}': x for name, x in layer.items()})
  return tree


EYES = {
  'SigLiPFromPatches_0/siglip_encoder/embedding/kernel': np.ones((3, 2), np.float32),
  'transformer/embedder/mm_input_projection/w': np.ones((2, 32), np.float32),
  'transformer/embedder/mm_soft_embedding_norm/scale': np.ones(2, np.float32),
}


def flat(tree):
  """The same in FLAT: {'transformer/layer_0/mlp/linear': {'w': ...}}."""
  named = {f'transformer/{path}{"/w" * ("/mlp/" in path)}': x for path, x in tree.items()}
  return unflatten_dict({tuple(path.rsplit('/', 1)): x for path, x in named.items()})


def nested(tree):
  return unflatten_dict(tree, sep='/')


def save(path, tree, *, ocdbt=True, zarr3=False):
  handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(path, args=ocp.args.PyTreeSave(tree))
  return path


def load(directory, config):
  source = OrbaxSource(directory)
  lm = Decoder(config, Compute(scan_layers=False))
  recipe, dropped = gemma.gemma_recipe(config, source.shapes)
  params, report = assemble(source, recipe, tiny_gemma.abstract(lm), dropped=dropped)
  return params, report


@functools.cache
def logits_of(config):
  lm = Decoder(config, Compute(scan_layers=False))
  return tiny_gemma.jit(lambda params, ids: lm.apply({'params': params}, ids, method='logits_of'))


def check_logits(family, params, config):
  _, ids, expected = tiny_gemma.golden(family)
  assert np.abs(logits_of(config)(params, ids) - expected).max() < 1e-4


@pytest.mark.parametrize(
  ('family', 'layout', 'ocdbt', 'transposed'),
  [
    ('gemma2', flat, True, False),
    ('gemma2', nested, False, True),
    ('gemma3', flat, False, True),
    ('gemma3', nested, True, True),
  ],
)
def test_logits(family, layout, ocdbt, transposed, tmp_path):
  config = tiny_gemma.CONFIGS[family]
  path = save(tmp_path / 'tiny', layout(google_layers(family, transposed)), ocdbt=ocdbt)
  params, report = load(path, config)
  check_logits(family, params, config)
  assert report.dropped == ()


def test_fused_qkv_and_zarr3(tmp_path):
  config = dataclasses.replace(tiny_gemma.CONFIGS['gemma2'], num_kv_heads=4)
  path = save(tmp_path / 'tiny', flat(google_layers('gemma2', False, fused=True)), zarr3=True)
  params, _ = load(path, config)
  check_logits('gemma2', params, config)


def test_eyes_are_dropped(tmp_path):
  tree = flat(google_layers('gemma3', True))
  eyes = {tuple(path.rsplit('/', 1)): x for path, x in EYES.items()}
  path = save(tmp_path / 'tiny', unflatten_dict({**flatten_dict(tree), **eyes}))
  params, report = load(path, tiny_gemma.CONFIGS['gemma3'])
  check_logits('gemma3', params, tiny_gemma.CONFIGS['gemma3'])
  assert set(report.dropped) == set(EYES)


def test_bfloat16_as_released(tmp_path):
  tree = jax.tree.map(lambda x: x.astype(jax.numpy.bfloat16), flat(google_layers('gemma3', True)))
  params, _ = load(save(tmp_path / 'tiny', tree), tiny_gemma.CONFIGS['gemma3'])
  embedding = tree['transformer/embedder']['input_embedding'].astype(np.float32)
  np.testing.assert_array_equal(params['embedder']['embedding'], embedding)
  scale = tree['transformer/final_norm']['scale'].astype(np.float32) + 1
  np.testing.assert_array_equal(params['final_norm']['scale'], scale)


BROKEN = {
  'renamed': (
    lambda tree: tree.update({'layer_1/attn/query_einsum/w': tree.pop('layer_1/attn/q_einsum/w')}),
    r'\+ layer_1/attn/q_einsum/w: missing. Did you mean .layer_1/attn/query_einsum/w.*\n'
    r'  - layer_1/attn/query_einsum/w \[4, 32, 8\]: no parameter is made of it',
  ),
  'missing': (
    lambda tree: tree.pop('layer_1/post_ffw_norm/scale'),
    r'\+ layer_1/post_ffw_norm/scale: missing',
  ),
  'extra': (
    lambda tree: tree.update({'layer_2/mlp/linear': np.ones((64, 32), np.float32)}),
    r'- layer_2/mlp/linear \[64, 32\]: no parameter is made of it',
  ),
  'wrong shape': (
    lambda tree: tree.update({'layer_0/attn/attn_vec_einsum/w': np.ones((4, 32, 8), np.float32)}),
    r'layer_0/attn/attn_vec_einsum/w \[4, 32, 8\]: makes \(4, 32, 8\), but'
    r' layers_0/attention/out/kernel needs \[4, 8, 32\]',
  ),
  'one layer transposed': (
    lambda tree: tree.update({'layer_1/mlp/gating_einsum': np.ones((2, 32, 64), np.float32)}),
    r'layer_1/mlp/gating_einsum \[2, 32, 64\]: makes \(64, 32\), but layers_1/mlp/wi_0/kernel',
  ),
}


@pytest.mark.parametrize('case', BROKEN)
def test_what_does_not_fit_is_told(case, tmp_path):
  tree = google_layers('gemma3', True)
  change, message = BROKEN[case]
  change(tree)
  path = save(tmp_path / 'tiny', nested(tree))
  with pytest.raises(UsageError, match=message):
    load(path, tiny_gemma.CONFIGS['gemma3'])


# In these, gating_einsum is [2, F, D].
TRANSPOSED = ('gemma2_9b', 'gemma2_27b', 'gemma3_270m', 'gemma3_1b', 'gemma3_4b', 'gemma3_12b')
TRANSPOSED += ('gemma3_27b',)


class Released:
  """The shapes of a released checkpoint, in FLAT; reading ends the test."""

  def __init__(self, size, **changes):
    c = dataclasses.replace(DECODER_SIZES[size], **changes)
    self.where = size
    self.shapes = shapes = {
      'transformer/embedder/input_embedding': (c.vocab_size, c.d_model),
      'transformer/final_norm/scale': (c.d_model,),
    }
    norms = ['pre_attention_norm', 'pre_ffw_norm']
    norms += ['post_attention_norm', 'post_ffw_norm'] * c.post_norms
    gating = (2, c.d_mlp, c.d_model) if size in TRANSPOSED else (2, c.d_model, c.d_mlp)
    for i in range(c.num_layers):
      layer = f'transformer/layer_{i}/'
      shapes[f'{layer}attn/attn_vec_einsum/w'] = (c.num_heads, c.head_dim, c.d_model)
      if c.num_heads == c.num_kv_heads:
        shapes[f'{layer}attn/qkv_einsum/w'] = (3, c.num_heads, c.d_model, c.head_dim)
      else:
        shapes[f'{layer}attn/q_einsum/w'] = (c.num_heads, c.d_model, c.head_dim)
        shapes[f'{layer}attn/kv_einsum/w'] = (2, c.num_kv_heads, c.d_model, c.head_dim)
      shapes[f'{layer}mlp/gating_einsum/w'] = gating
      shapes[f'{layer}mlp/linear/w'] = (c.d_mlp, c.d_model)
      shapes.update({f'{layer}{norm}/scale': (c.d_model,) for norm in norms})
      if c.qk_norm:
        shapes[f'{layer}attn/_query_norm/scale'] = (c.head_dim,)
        shapes[f'{layer}attn/_key_norm/scale'] = (c.head_dim,)
    if size in ('gemma3_4b', 'gemma3_12b', 'gemma3_27b'):
      shapes.update({path: x.shape for path, x in EYES.items()})

  def read(self, name):
    raise EOFError(name)


GEMMAS = [size for size in DECODER_SIZES if size.startswith('gemma')]


@pytest.mark.parametrize('size', GEMMAS)
def test_a_released_size_is_recognised_and_fits(size):
  source = Released(size)
  config = gemma.gemma_config(source)
  assert config == DECODER_SIZES[size]
  recipe, dropped = gemma.gemma_recipe(config, source.shapes)
  like = tiny_gemma.abstract(Decoder(config))
  with pytest.raises(EOFError, match='embedder/input_embedding'):  # all fits: it starts to read
    assemble(source, recipe, like, dropped=dropped)


def test_another_vocabulary_is_taken_over():
  config = gemma.gemma_config(Released('gemma2_2b', vocab_size=256_000))
  assert config == dataclasses.replace(DECODER_SIZES['gemma2_2b'], vocab_size=256_000)


def test_a_size_that_was_not_released():
  with pytest.raises(
    UsageError,
    match=r'no released Gemma has these shapes: num_layers=25, d_model=1152, .*qk_norm=True.*'
    r'The nearest, gemma3_1b, has num_layers=26\. For a Gemma of your own, give',
  ):
    gemma.gemma_config(Released('gemma3_1b', num_layers=25))


def test_another_family():
  with pytest.raises(UsageError, match=r'no embedder/input_embedding, which every Gemma'):
    gemma.gemma_config(tiny_gemma.Tensors(tiny_gemma.golden('gemma2')[0]))
  tree = {'embedder/input_embedding': np.ones((3, 2, 1))}
  with pytest.raises(
    UsageError, match=r'embedder/input_embedding \[3, 2, 1\] has 3 axes.*it has 2'
  ):
    gemma.gemma_config(tiny_gemma.Tensors(tree))


def test_a_square_feed_forward_layer_is_ambiguous():
  config = dataclasses.replace(tiny_gemma.CONFIGS['gemma2'], d_mlp=32)
  with pytest.raises(UsageError, match='d_model=32 and d_mlp=32 are equal'):
    gemma.gemma_recipe(config, {})


def test_no_checkpoint(tmp_path):
  with pytest.raises(UsageError, match='there is no such directory'):
    OrbaxSource(tmp_path / 'nothing')
  save(tmp_path / 'gemma3-1b-it', flat(google_layers('gemma3', True)))
  (tmp_path / 'tokenizer.model').touch()
  with pytest.raises(UsageError, match=r'no Orbax checkpoint in it, but gemma3-1b-it, tokenizer'):
    OrbaxSource(tmp_path)
  with pytest.raises(UsageError, match=rf'There is one in {tmp_path}/gemma3-1b-it'):
    OrbaxSource(tmp_path)


def test_a_broken_checkpoint(tmp_path):
  path = save(tmp_path / 'tiny', flat(google_layers('gemma3', True)))
  (path / 'manifest.ocdbt').write_bytes(b'garbage')
  with pytest.raises(UsageError, match='cannot be read as an Orbax checkpoint'):
    OrbaxSource(path)
  path = save(tmp_path / 'another', flat(google_layers('gemma3', True)))
  source = OrbaxSource(path)
  for file in (path / 'd').iterdir():
    file.write_bytes(b'')
  with pytest.raises(UsageError, match=r'transformer/final_norm/scale cannot be read'):
    source.read('transformer/final_norm/scale')

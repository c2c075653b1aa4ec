"""Parameters from foreign tensors: what is refused, and what each device holds and reads."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ilm_jax.errors import UsageError
from ilm_jax.lm import huggingface
from ilm_jax.lm.assemble import Leaf, assemble
from ilm_jax.modules.decoder import Decoder
from ilm_jax.modules.layers import Compute
from ilm_jax.runtime import sharding
from ilm_jax.runtime.sharding import DEFAULT_RULES, make_mesh
from tests.support import eight_devices, tiny_gemma, two_processes

L, D, F, V = 3, 4, 6, 10
RECIPE = {
  'embedder/embedding': Leaf('wte'),
  'layers/mlp/wi/kernel': Leaf('h.{layer}.up', lambda w: w.T),
  'layers/qkv/kernel': Leaf(('h.{layer}.q', 'h.{layer}.k'), lambda q, k: q.T + k.T),
}


def tensors():
  rng = np.random.default_rng(0)
  named = {'wte': rng.normal(size=(V, D))}
  for i in range(L):
    named |= {f'h.{i}.up': rng.normal(size=(F, D)), f'h.{i}.q': rng.normal(size=(D, D))}
    named[f'h.{i}.k'] = rng.normal(size=(D, D))
  return {name: x.astype(np.float32) for name, x in named.items()}


def shape(*sizes, dtype=jnp.float32):
  mesh = Mesh(np.array(jax.devices()[:1]), ('data',))
  return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def stacked():
  return {
    'embedder': {'embedding': shape(V, D)},
    'layers': {'mlp': {'wi': {'kernel': shape(L, D, F)}}, 'qkv': {'kernel': shape(L, D, D)}},
  }


def unstacked():
  layer = {'mlp': {'wi': {'kernel': shape(D, F)}}, 'qkv': {'kernel': shape(D, D)}}
  return {
    'embedder': {'embedding': shape(V, D)},
    **{f'layers_{i}': layer for i in range(L)},
  }


def test_stacked_layers():
  source = tiny_gemma.Tensors(tensors())
  params, report = assemble(source, RECIPE, stacked())
  get = source.tensors
  np.testing.assert_array_equal(params['embedder']['embedding'], get['wte'])
  for i in range(L):
    np.testing.assert_array_equal(params['layers']['mlp']['wi']['kernel'][i], get[f'h.{i}.up'].T)
    both = get[f'h.{i}.q'].T + get[f'h.{i}.k'].T
    np.testing.assert_array_equal(params['layers']['qkv']['kernel'][i], both)
  assert report.parameters == V * D + L * (D * F + D * D)
  assert (report.used, report.dropped) == (1 + 3 * L, ())
  assert str(report) == 'memory: 10 tensors into 0.0 M parameters'


def test_layers_of_their_own():
  source = tiny_gemma.Tensors(tensors())
  params, _ = assemble(source, RECIPE, unstacked())
  for i in range(L):
    layer = params[f'layers_{i}']
    np.testing.assert_array_equal(layer['mlp']['wi']['kernel'], source.tensors[f'h.{i}.up'].T)


def test_a_stack_in_the_checkpoint_for_layers_of_their_own():
  """Where a tensor has all layers, each layer takes its own."""
  stack = np.random.default_rng(1).normal(size=(L, D, F)).astype(np.float32)
  recipe = {'layers/wi/kernel': Leaf('stack')}
  apart = {f'layers_{i}': {'wi': {'kernel': shape(D, F)}} for i in range(L)}
  params, _ = assemble(tiny_gemma.Tensors({'stack': stack}), recipe, apart)
  for i in range(L):
    np.testing.assert_array_equal(params[f'layers_{i}']['wi']['kernel'], stack[i])
  together, _ = assemble(
    tiny_gemma.Tensors({'stack': stack}), recipe, {'layers': {'wi': {'kernel': shape(L, D, F)}}}
  )
  np.testing.assert_array_equal(together['layers']['wi']['kernel'], stack)


def test_other_dtypes():
  source = tiny_gemma.Tensors({'wte': tensors()['wte'].astype(ml_dtypes.bfloat16)})
  for dtype in (jnp.float32, jnp.bfloat16):
    like = {'embedder': {'embedding': shape(V, D, dtype=dtype)}}
    params, _ = assemble(source, RECIPE, like)
    assert params['embedder']['embedding'].dtype == dtype
    np.testing.assert_array_equal(
      params['embedder']['embedding'].astype(np.float32), source.tensors['wte'].astype(np.float32)
    )


def test_what_is_dropped_is_reported():
  source = tiny_gemma.Tensors({**tensors(), 'h.0.rotary': np.ones(2), 'h.10.rotary': np.ones(2)})
  _, report = assemble(source, RECIPE, stacked(), dropped=('*.rotary', 'nothing'))
  assert report.dropped == ('h.0.rotary', 'h.10.rotary')
  assert str(report).endswith('; not used: h.0.rotary, h.10.rotary')
  assert not {'h.0.rotary', 'h.10.rotary'} & set(source.reads)


BROKEN = {
  'missing and renamed': (
    lambda named: named.update({'h.1.upp': named.pop('h.1.up')}),
    [r"  \+ h.1.up: missing.*Did you mean 'h.1.upp'\?", r'  - h.1.upp \[6, 4\]: no parameter'],
  ),
  'extra layers, in order': (
    lambda named: named.update({f'h.{i}.up': np.ones((F, D)) for i in (10, 9)}),
    [r'  - h.9.up \[6, 4\]: no parameter is made of it\n  - h.10.up'],
  ),
  'wrong shape': (
    lambda named: named.update({'h.2.up': np.ones((D, F))}),
    [r'  h.2.up \[4, 6\]: makes \(6, 4\), but layers/mlp/wi/kernel needs \[4, 6\]'],
  ),
  'shapes that do not go together': (
    lambda named: named.update({'h.0.k': np.ones((D, D + 1))}),
    [r'  h.0.q \[4, 4\], h.0.k \[4, 5\]: makes add got incompatible shapes.*needs \[4, 4\]'],
  ),
}


@pytest.mark.parametrize('case', BROKEN)
def test_what_does_not_fit_is_told_before_anything_is_read(case):
  named = tensors()
  change, messages = BROKEN[case]
  change(named)
  source = tiny_gemma.Tensors(named, where='some/model')
  with pytest.raises(UsageError) as error:
    assemble(source, RECIPE, stacked())
  for message in messages:
    assert error.match(message)
  assert error.match(r'some/model does not fit the model')
  assert source.reads == []


def test_a_parameter_that_nothing_makes():
  like = {**stacked(), 'head': {'embedding': shape(V, D)}}
  with pytest.raises(
    UsageError, match=r'makes the parameter head/embedding \[10, 4\]: the checkpoint is of another'
  ):
    assemble(tiny_gemma.Tensors(tensors()), RECIPE, like)


def test_many_differences_are_cut_short():
  source = tiny_gemma.Tensors({**tensors(), **{f'x{i}': np.ones(1) for i in range(50)}})
  with pytest.raises(UsageError, match=r'\.\.\. and 10 more\nIs it the configuration'):
    assemble(source, RECIPE, stacked())


MESHES = [{'data': 2, 'fsdp': 2, 'tensor': 2}, {'fsdp': 4, 'tensor': 2}]


@eight_devices.needed
class TestOnEightDevices:
  @pytest.mark.parametrize('shape', MESHES, ids=str)
  @pytest.mark.parametrize('scan_layers', [True, False])
  def test_a_decoder_is_the_same_wherever_it_lies(self, shape, scan_layers):
    lm = Decoder(tiny_gemma.CONFIGS['gemma3'], Compute(scan_layers=scan_layers))
    named, ids, logits = tiny_gemma.golden('gemma3')
    recipe, dropped = huggingface.decoder_recipe(lm.config, named)

    def make(like):
      return assemble(tiny_gemma.Tensors(named), recipe, like, dropped=dropped)[0]

    mesh = make_mesh(shape)
    like = tiny_gemma.abstract(lm, mesh)
    whole, parts = make(tiny_gemma.abstract(lm)), make(like)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    for x, y in zip(jax.tree.leaves(parts), jax.tree.leaves(like), strict=True):
      assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    embedding = parts['embedder']['embedding']
    held = 512 // shape.get('tensor', 1), 32 // shape.get('fsdp', 1)
    assert {x.data.shape for x in embedding.addressable_shards} == {held}
    with sharding.use_mesh(mesh, DEFAULT_RULES):
      got = tiny_gemma.jit(lambda p: lm.apply({'params': p}, ids, method='logits_of'))(parts)
    np.testing.assert_allclose(got, logits, atol=1e-4)


TWO_PROCESSES = """
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tests.support import tiny_gemma
from ilm_jax.lm.assemble import Leaf, assemble
from ilm_jax.runtime.sharding import fetch, make_mesh
source = tiny_gemma.Tensors({f'h.{i}': np.full((2, 2), i, np.float32) for i in range(6)})
at = NamedSharding(make_mesh({'data': -1}), PartitionSpec('data'))
like = {'layers': {'up': jax.ShapeDtypeStruct((6, 2, 2), np.float32, sharding=at)}}
params, _ = assemble(source, {'layers/up': Leaf('h.{layer}')}, like)
print('read', *source.reads)
print('made', *fetch(params)['layers']['up'][:, 1, 0].astype(int))
"""


def test_a_process_reads_only_the_layers_that_its_devices_hold():
  first, second = two_processes.printed(TWO_PROCESSES, 'read', 'made')
  assert first == ['read h.0 h.1 h.2', 'made 0 1 2 3 4 5']
  assert second == ['read h.3 h.4 h.5', 'made 0 1 2 3 4 5']

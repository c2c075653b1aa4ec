"""Meshes, rules and placed arrays; the tests on eight virtual devices run in one subprocess."""

import dataclasses
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from jax.ad_checkpoint import print_saved_residuals
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from ilm_jax.errors import UsageError
from ilm_jax.modules import qformer
from ilm_jax.runtime import sharding
from tests.support import eight_devices, two_processes

RULES = sharding.DEFAULT_RULES
# Optimised less, programs compile in less time.
MESHES = [
  pytest.param((2, 2, 2), id='2x2x2'),
  pytest.param((8, 1, 1), id='8x1x1', marks=pytest.mark.slow),
  pytest.param((1, 4, 2), id='1x4x2', marks=pytest.mark.slow),
]
CONFIG = dataclasses.replace(
  qformer.SIZES['tiny'], vocab_size=96, max_text_length=16, cross_attention_every=1, dropout_rate=0
)


def boxed(**parameters):
  return {
    name: nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), axes)
    for name, (shape, axes) in parameters.items()
  }


def abstract_mesh(*sizes) -> Any:
  return AbstractMesh(sizes, sharding.MESH_AXES)


@pytest.mark.parametrize(
  ('shape', 'message'),
  [
    ({'model': 2}, r"mesh=\{'model': 2\}: no mesh axis 'model'; there are data, fsdp, tensor\."),
    ({'tensr': 2}, r"Did you mean 'tensor'\?"),
    ({'data': -1, 'fsdp': -1}, r'one -1'),
    ({'data': 0}, r'sizes are positive'),
    ({'data': 3}, r"\{'data': 3\} does not come to the 8 devices there are"),
    ({'data': 4}, r'let one axis be -1'),
    ({'data': -1, 'tensor': 3}, r'the product of the others divide 8'),
    ({'data': 16}, r'does not come to the 8 devices'),
  ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_an_error(shape, message):
  with pytest.raises(UsageError, match=f'(?i){message}'):
    sharding.make_mesh(shape, devices=[object()] * 8)


@pytest.mark.parametrize(
  ('rule', 'message'),
  [
    (('emded', None), r"rule \('emded', None\): no logical axis 'emded'.*Did you mean 'embed'\?"),
    (('kv', 'tensors'), r"no mesh axis 'tensors'; there are data, .*Did you mean 'tensor'\?"),
    (('mlp', 'fsdp'), r"'mlp' has a rule already, to 'tensor'"),
  ],
)
def test_a_wrong_rule_is_an_error(rule, message):
  with pytest.raises(UsageError, match=message):
    sharding.check_rules((*(r for r in RULES if r[0] != 'kv'), rule))


def test_the_batch_is_split_as_it_is_placed():
  with pytest.raises(UsageError, match=r"\('batch', 'data'\): must be \('data', 'fsdp'\)"):
    sharding.check_rules((('batch', 'data'), *RULES[1:]))


def test_a_tensor_axis_that_splits_no_weights_is_an_error():
  whole = tuple((axis, None) if target == 'tensor' else (axis, target) for axis, target in RULES)
  message = r"'tensor': 4\}: no sharding rule splits weights over 'tensor'.* 4 devices"
  with (
    pytest.raises(UsageError, match=message),
    sharding.use_mesh(abstract_mesh(1, 2, 4), whole),
  ):
    pass


def test_a_change_of_the_rules_that_changes_nothing_is_an_error():
  trees = boxed(w=((64, 32), ('embed', 'mlp'))), {'count': jnp.zeros(())}
  sharding.check_changes((('embed', None), ('length', None)), *trees)
  with pytest.raises(
    UsageError, match=r"\('queries', 'tensor'\): no array .* there are embed, mlp"
  ):
    sharding.check_changes((('queries', 'tensor'),), *trees)


@pytest.mark.parametrize(
  ('shape', 'axes', 'rules', 'message'),
  [
    (
      (64, 30), ('embed', 'vocab'), RULES,
      r"parameter w \(64, 30\): 'vocab' of size 30 cannot be split .*\{'tensor': 4\}.*divide 30, or"
      r" replicate it: rule \('vocab', None\)",
    ),
    ((64,), ('embed',), RULES[:3], r"w \(64,\): no sharding rule .*'embed': add one: \('embed'"),
    ((64,), ('emded',), RULES, r"w .* axis 'emded': no logical axis.*Did you mean 'embed'\?"),
    ((8, 8), ('heads', 'mlp'), RULES, r'w .*a mesh axis can split only one of them'),
  ],
)  # fmt: skip
def test_a_parameter_that_the_rules_cannot_split_is_an_error(shape, axes, rules, message):
  with pytest.raises(UsageError, match=message):
    sharding.shardings_of(boxed(w=(shape, axes)), abstract_mesh(1, 2, 4), rules)


def test_arrays_without_a_box_are_replicated():
  tree = {**boxed(w=((8, 3), ('embed', None))), 'count': jnp.zeros((), jnp.int32)}
  shardings = sharding.shardings_of(tree, abstract_mesh(1, 8, 1), RULES)
  assert shardings['w'].spec == PartitionSpec('fsdp', None)
  assert shardings['count'].spec == PartitionSpec()


def test_factored_moments_are_replicated_and_whole_ones_mirror():
  mesh = abstract_mesh(1, 2, 4)
  shapes = {'big': ((256, 128), ('embed', 'mlp')), 'small': ((4,), ('mlp',))}
  params = sharding.abstract_init(lambda: boxed_zeros(shapes), mesh, RULES)
  state = jax.eval_shape(optax.adafactor(1e-3).init, params)
  mirrored = sharding.mirrored_shardings(state, params, mesh)
  leaves = jax.tree_util.tree_leaves_with_path(mirrored)
  specs = {jax.tree_util.keystr(k, simple=True, separator='/'): x.spec for k, x in leaves}
  assert specs['0/v/small'] == PartitionSpec('tensor')
  assert specs['0/v_row/big'] == specs['0/v_col/big'] == specs['0/count'] == PartitionSpec()


def boxed_zeros(parameters):
  return jax.tree.map(lambda x: jnp.zeros(x.shape), boxed(**parameters))


def test_the_table_counts_what_every_device_holds():
  mesh = abstract_mesh(2, 2, 2)
  shapes = {'w': ((1000, 4000), ('embed', 'mlp')), 'b': ((4000,), ('mlp',))}
  params = sharding.abstract_init(lambda: {'layer': boxed_zeros(shapes)}, mesh, RULES)
  whole = NamedSharding(mesh, PartitionSpec())
  frozen = {'table': jax.ShapeDtypeStruct((500_000, 32), jnp.bfloat16, sharding=whole)}
  lines = [line.split() for line in sharding.parameter_table(params, frozen).split('\n')]
  assert [' '.join(line) for line in lines[1:]] == [
    'layer/b [4000] float32 [tensor] 0.016 0.008',
    'layer/w [1000, 4000] float32 [fsdp, tensor] 16.000 4.000',
    'table [500000, 32] bfloat16 [] 32.000 32.000',
    'trained: 4,004,000 parameters, 16.0 MB, 4.0 MB per device',
    'frozen: 16,000,000 parameters, 32.0 MB, 32.0 MB per device',
  ]


@pytest.fixture(scope='module', params=MESHES)
def mesh(request):
  return sharding.make_mesh(dict(zip(sharding.MESH_AXES, request.param)))


@pytest.fixture(scope='module')
def params(mesh):
  return sharding.init_sharded(init, mesh, RULES, jax.random.key(0))


@pytest.fixture(scope='module')
def single():
  """One device's parameters, as initialised and random everywhere; a batch; its step's results."""
  rng = np.random.default_rng(0)
  batch = {
    'encoder_tokens': rng.normal(size=(8, 3, CONFIG.d_encoder)).astype(np.float32),
    'text_tokens': rng.integers(0, CONFIG.vocab_size, (8, 5)),
  }
  initial = nn.meta.unbox(jax.jit(init)(jax.random.key(0)))
  params = jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(np.float32) / 10, initial)
  opt_state = jax.jit(OPTIMIZER.init)(params)
  return initial, params, batch, jax.jit(step)(params, opt_state, batch)


def init(key):
  encoder, text = jnp.ones((1, 1, CONFIG.d_encoder)), jnp.zeros((1, 2), jnp.int32)
  return qformer.QFormer(CONFIG).init(key, encoder, text)['params']


def is_kernel(params):
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == 'kernel', params)


OPTIMIZER = optax.chain(
  optax.clip_by_global_norm(1.0), optax.adamw(1e-3, eps=1e-3, weight_decay=0.1, mask=is_kernel)
)


def step(params, opt_state, batch):
  def loss_fn(params):
    out = qformer.QFormer(CONFIG).apply({'params': params}, *batch.values())
    return sum(jnp.square(x[..., :7]).mean() for x in out), out  # pyright: ignore

  (loss, out), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
  updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, loss, out


def shard_shapes(tree):
  for x in jax.tree.leaves(tree):
    assert len({shard.data.shape for shard in x.addressable_shards}) == 1
  return jax.tree.map(lambda x: x.addressable_shards[0].data.shape, tree)


@eight_devices.needed
class TestOnEightDevices:
  def test_every_device_holds_its_part_of_every_parameter(self, mesh, params, single):
    f, t = mesh.shape['fsdp'], mesh.shape['tensor']
    shapes = flatten_dict(shard_shapes(params), sep='/')
    expected = {
      'word_embedder/embedding': (96 // t, 64 // f),
      'queries': (4, 64 // f),
      'positions': (16, 64 // f),
      'layers/layer_0/attention/query/kernel': (2, 64 // f, 4 // t, 16),
      'layers/layer_0/attention/query/bias': (2, 4 // t, 16),
      'layers/layer_0/attention/out/kernel': (2, 4 // t, 16, 64 // f),
      'layers/layer_0/cross_attention/key/kernel': (2, 32, 4 // t, 16),
      'layers/layer_0/text_mlp/wi/kernel': (2, 64 // f, 128 // t),
      'layers/layer_0/text_mlp/wo/kernel': (2, 128 // t, 64 // f),
      'layers/layer_0/text_mlp/norm/scale': (2, 64 // f),
    }
    assert {name: shapes[name] for name in expected} == expected
    jax.tree.map(np.testing.assert_array_equal, params, single[0])

  def test_the_optimizer_mirrors_the_parameters(self, mesh, params):
    adam = sharding.init_mirrored(OPTIMIZER.init, params, mesh)[1][0]
    assert shard_shapes(adam.mu) == shard_shapes(adam.nu) == shard_shapes(params)
    assert adam.count.sharding.is_fully_replicated

  def test_a_step_is_one_devices_step_and_keeps_the_shardings(self, mesh, single):
    _, params, batch, (expected_params, _, expected_loss, expected_out) = single
    with sharding.use_mesh(mesh, RULES):  # as good as outside
      abstract = sharding.abstract_init(init, mesh, RULES, jax.random.key(0))
    params = jax.device_put(params, jax.tree.map(lambda x: x.sharding, abstract))
    opt_state = sharding.init_mirrored(OPTIMIZER.init, params, mesh)
    at = jax.tree.map(lambda x: x.sharding, (params, opt_state))
    with sharding.use_mesh(mesh, RULES):
      jitted = jax.jit(step, out_shardings=(*at, None, None))
      placed = sharding.place_batch(batch, mesh)
      assert '[{"data", "fsdp"}, {}, {}]' in str(jitted.lower(params, opt_state, placed).as_text())
      new_params, _, loss, out = jitted(params, opt_state, placed)
    np.testing.assert_allclose(loss, expected_loss, atol=1e-5)
    rows = NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES))
    for x, y in zip(out, expected_out):
      np.testing.assert_allclose(x, y, atol=1e-5)
      assert x.sharding.is_equivalent_to(rows, x.ndim)
    for x, y in zip(jax.tree.leaves(new_params), jax.tree.leaves(expected_params)):
      np.testing.assert_allclose(x, y, atol=1e-5)
    assert shard_shapes(new_params) == shard_shapes(params)

  def test_a_constraint_holds_inside_use_mesh_only(self, mesh):
    axes = ('batch', 'length', 'mlp')
    d, f, t = mesh.devices.shape
    x = sharding.replicate(np.ones((8, 3, 4), np.float32), mesh)
    assert shard_shapes(jax.jit(lambda x: sharding.constrain(2 * x, axes))(x)) == (8, 3, 4)
    with sharding.use_mesh(mesh, RULES):
      compiled = jax.jit(lambda x: sharding.constrain(2 * x, axes)).lower(x).compile()
    assert shard_shapes(compiled(x)) == (8 // (d * f), 3, 4 // t)
    assert f'f32[{8 // (d * f)},3,{4 // t}]' in str(compiled.as_text())

  @pytest.mark.parametrize('axes', [('batch', 'embed'), ('batch', 'lenght')])
  def test_a_constraint_that_linen_would_drop_is_an_error(self, mesh, axes):
    with (
      sharding.use_mesh(mesh, RULES),
      pytest.raises(ValueError, match=f'{axes[1]}.*did not match a rule'),
    ):
      jax.jit(lambda x: sharding.constrain(x, axes))(jnp.ones((8, 8)))

  def test_a_kernel_is_gathered_its_gradient_is_split_and_its_parts_are_kept(self, mesh, capsys):
    axes = ('embed', 'mlp')
    rng = np.random.default_rng(0)
    kernel, x = (rng.normal(size=shape).astype(np.float32) for shape in ((64, 32), (16, 64)))

    def loss(kernel, x):
      dot = sharding.gathered(jax.lax.dot_general, axes)
      return jnp.sin(dot(x, kernel, (((1,), (0,)), ((), ())))).sum()

    expected = jax.value_and_grad(loss)(kernel, x)
    _, f, t = mesh.devices.shape
    split = NamedSharding(mesh, PartitionSpec('fsdp', 'tensor'))
    args = jax.device_put(kernel, split), sharding.place_batch({'x': x}, mesh)['x']
    with sharding.use_mesh(mesh, RULES):
      compiled = jax.jit(jax.value_and_grad(loss)).lower(*args).compile()
      print_saved_residuals(loss, *args)
    np.testing.assert_allclose(compiled(*args)[0], expected[0], rtol=1e-4)
    np.testing.assert_allclose(compiled(*args)[1], expected[1], atol=1e-4)
    if f > 1:
      assert re.search(rf'f32\[64,{32 // t}\]\S* all-gather', str(compiled.as_text()))
      assert shard_shapes(compiled(*args)[1]) == (64 // f, 32 // t)
      kept = [line for line in capsys.readouterr().out.splitlines() if '[64,32]' in line]
      assert kept
      assert all('argument' in line for line in kept)

  def test_rows_are_placed_in_order(self, mesh):
    rows = {'ids': np.arange(16), 'x': np.arange(32.0, dtype=np.float32).reshape(16, 2)}
    placed = sharding.place_batch(rows, mesh)
    jax.tree.map(np.testing.assert_array_equal, placed, rows)
    d, f, _ = mesh.devices.shape
    assert shard_shapes(placed) == {'ids': (16 // (d * f),), 'x': (16 // (d * f), 2)}

  def test_rows_that_do_not_divide_are_an_error(self, mesh):
    parts = mesh.shape['data'] * mesh.shape['fsdp']
    with pytest.raises(UsageError, match=rf"'x' \(6, 2\) .*{parts} parts.* a multiple of {parts}"):
      sharding.place_batch({'x': np.ones((6, 2))}, mesh)
    with pytest.raises(UsageError, match=r"'n' \(\) cannot be split"):
      sharding.place_batch({'n': np.array(3)}, mesh)


# Each process has two devices. Where they hold different parts of the batch, each gives its own
# rows; where the tensor axis spans both, they give the same.
TWO_PROCESSES = """
import numpy as np
from ilm_jax.runtime import sharding
total = jax.jit(lambda x, weight: (x.shape[0], (x * weight).sum()))
for shape, rows in (
  ({'data': 2, 'tensor': -1}, np.arange(4) + 4 * jax.process_index()),
  ({'fsdp': -1}, np.arange(4) + 4 * jax.process_index()),
  ({'tensor': -1}, np.arange(8)),
):
  mesh = sharding.make_mesh(shape)
  batch = sharding.place_batch({'x': rows}, mesh)
  weight = sharding.replicate(np.array([1, 10, 100, 1000, 0, 0, 0, 1]), mesh)
  print('total', *map(int, total(batch['x'], weight)))
"""


def test_two_processes_make_one_batch():
  found = two_processes.printed(TWO_PROCESSES, 'total', devices=2)
  assert found == [['total 8 3217'] * 3] * 2

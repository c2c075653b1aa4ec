"""Phase 1's Q-Former in phase 2: bit for bit, or not at all and with every reason named."""

import copy
import dataclasses
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from ilm_jax.checkpoints.handoff import hand_over
from ilm_jax.checkpoints.manager import CheckpointManager, read_saved_params, restore_selected
from ilm_jax.errors import UsageError
from ilm_jax.modules.item_text import ItemTextEncoder
from ilm_jax.modules.qformer import QFormerConfig
from ilm_jax.modules.soft_tokens import MlpConfig, SoftTokenConfig, SoftTokens
from ilm_jax.runtime.sharding import DEFAULT_RULES, abstract_init, make_mesh
from tests.support import eight_devices

D_CF, D_LM, LAYERS = 6, 24, 4
QFORMER = QFormerConfig(
  num_layers=LAYERS, d_model=16, num_heads=2, d_mlp=40, num_queries=3, d_encoder=D_CF,
  vocab_size=64, max_text_length=8,
)  # fmt: skip
VECTORS = np.random.default_rng(0).normal(size=(5, D_CF)).astype(np.float32)
# Of layer_0, which cross-attends, and layer_1.
ATTENTION, MLP = 10, 6
USED = 1 + 2 + 3 * ATTENTION + 2 * MLP


def identity(name='item_text', config=QFORMER, **encoder):
  training = {'dropout_rate', 'dtype', 'bf16_matmul', 'remat', 'has_text'}
  text = set() if name == 'item_text' else {'vocab_size', 'max_text_length'}
  sizes = {k: v for k, v in dataclasses.asdict(config).items() if k not in training | text}
  return {
    'model': {'name': name, 'item_encoder': sizes | encoder, f'only_{name}': 1},
    'data': {'name': 'films', 'fingerprint': 'abc'},
    'entity_table': {'content_hash': '0a1b'},
  }


def random_like(shapes, seed):
  """LayerNorms too, which would all begin alike."""
  rng = np.random.default_rng(seed)
  params = nn.meta.unbox(shapes)
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)


def trained_params():
  module = ItemTextEncoder(QFORMER, 8, (('item_text', 0.07), ('item_item', 0.1)), 'cls')
  inputs = jnp.zeros((1, D_CF)), jnp.zeros((1, 4), jnp.int32)
  return random_like(jax.eval_shape(module.init, jax.random.key(0), *inputs)['params'], 1), module


TRAINED, ITEM_TEXT = trained_params()


def phase2(config=QFORMER, **changes):
  module = SoftTokens(SoftTokenConfig(config, D_LM, max_encoder_tokens=4, **changes))
  tokens = jnp.zeros((1, 4, D_CF))
  return random_like(jax.eval_shape(module.init, jax.random.key(0), tokens)['params'], 2), module


def save(directory, params, identity):
  with CheckpointManager(directory, identity=identity) as manager:
    state = {'step': jnp.int32(7), 'params': params, 'opt_state': {'mu': params}}
    manager.save(7, state, position={})
  return directory


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  directory = tmp_path_factory.mktemp('phase1') / 'checkpoints'
  return save(directory, TRAINED, identity()).parent


def flattened(tree) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep='/')


def refused(path, params, **changes):
  """The message with which the hand-over is refused; it must have left `params` alone."""
  before = flattened(params)
  with pytest.raises(UsageError) as raised:
    hand_over(path, params, identity=identity('item_language') | changes)
  after = flattened(params)
  assert before.keys() == after.keys()
  assert all(after[name] is before[name] for name in before)
  return str(raised.value)


def listed(message):
  return [line.strip() for line in message.splitlines() if re.match(r'  [-+~] ', line)]


def test_the_item_encoder_is_phase_1s_and_the_rest_is_as_it_was(run):
  params, _ = phase2()
  params |= {'readout': {'kernel': jnp.ones(2)}, 'lm': {'layers': {'lora': jnp.ones(3)}}}
  handed = hand_over(run, params, identity=identity('item_language')).params
  assert jax.tree.structure(handed) == jax.tree.structure(params)
  before, after = flattened(params), flattened(handed)
  source = flattened(TRAINED['qformer'])
  inside = [name for name in after if name.startswith('item_encoder/')]
  assert len(inside) == USED
  for name in inside:
    expected = source[name.removeprefix('item_encoder/')]
    assert after[name].dtype == expected.dtype == jnp.float32
    assert np.asarray(after[name]).tobytes() == np.asarray(expected).tobytes()
  rest = after.keys() - set(inside)
  assert {name.split('/')[0] for name in rest} == {'adaptor', 'gain', 'recency', 'readout', 'lm'}
  assert all(after[name] is before[name] for name in rest)


def test_queries_are_those_of_phase_1(run):
  params, module = phase2()
  # Of a lone encoder token the place says nothing in phase 1.
  params['recency'] = jnp.zeros_like(params['recency'])

  def queries(params) -> Any:
    _, seen = module.apply(
      {'params': params}, VECTORS[:, None], capture_intermediates=True, mutable=['intermediates']
    )
    return seen['intermediates']['item_encoder']['__call__'][0][0]

  handed = hand_over(run, params, identity=identity('item_language')).params
  expected: Any = ITEM_TEXT.apply(
    {'params': TRAINED}, VECTORS, method='queries', deterministic=True
  )
  np.testing.assert_allclose(queries(handed), expected, rtol=1e-5, atol=1e-5)
  assert np.abs(queries(params) - expected).max() > 0.1


def test_report_names_what_is_used_dropped_and_new(run):
  params, _ = phase2()
  report = hand_over(str(run), params, identity=identity('item_language')).report
  assert all(len(line) <= 100 for line in report.splitlines()[1:])
  dropped = 2 + 2 * MLP + 3 * 2 + 2
  trees = TRAINED, params['item_encoder']
  everything, used = (sum(x.size for x in jax.tree.leaves(tree)) / 1e6 for tree in trees)
  new = (D_LM * 17 + 1 + 4 * D_CF) / 1e6
  expected = f"""
    Item encoder of phase 1: {USED} arrays from {run}/checkpoints/7
      used {USED} arrays {used:.2f} M qformer/queries, qformer/embedding_norm,
        qformer/layers/layer_*/attention, qformer/layers/layer_*/cross_attention,
        qformer/layers/layer_*/query_mlp
      dropped {dropped} arrays {everything - used:.2f} M qformer/word_embedder, qformer/positions,
        qformer/layers/layer_*/text_mlp, query_projection, text_projection, match,
        log_temperature_*
      new 4 arrays {new:.2f} M adaptor, gain, recency
  """
  assert report.split() == expected.split()


def test_float_dtypes_are_cast_to_the_models(run):
  params, _ = phase2()
  params['item_encoder'] = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params['item_encoder'])
  handed = hand_over(run, params, identity=identity('item_language')).params
  source = flattened(TRAINED['qformer'])
  for name, found in flattened(handed['item_encoder']).items():
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, source[name].astype(jnp.bfloat16))


def test_every_name_that_does_not_fit_is_listed(tmp_path):
  saved = copy.deepcopy(TRAINED)
  encoder, layer = saved['qformer'], saved['qformer']['layers']['layer_1']
  encoder['querys'] = encoder.pop('queries')  # renamed
  del layer['attention']['norm']  # missing
  encoder['embedding_norm']['extra'] = jnp.ones(2)  # extra
  saved['new_head'] = {'kernel': jnp.ones((2, 3))}
  layer['query_mlp']['wi']['bias'] = jnp.ones((2, 41))  # wrong shape
  layer['query_mlp']['wo']['bias'] = jnp.ones((2, 16), jnp.int32)  # wrong dtype
  params, _ = phase2()
  params['adapter'] = params.pop('adaptor')
  # A text branch does not belong into phase 2, though phase 1 has it.
  params['item_encoder']['positions'] = jnp.ones((8, 16))
  message = refused(save(tmp_path / 'run', saved, identity()), params)
  assert message.startswith(f'{tmp_path}/run/7 does not fit the model of phase 2')
  layer_1 = 'layers/layer_1'
  unknown = 'nothing of phase 1 becomes it, and it is not known as new'
  missing = f'there is no qformer/{layer_1}/attention/norm'
  assert listed(message) == [
    f'- adapter/bias [{D_LM}]: {unknown}',
    f'- adapter/kernel [16, {D_LM}]: {unknown}',
    f'- item_encoder/{layer_1}/attention/norm/bias [2, 16]: {missing}/bias.',
    f'- item_encoder/{layer_1}/attention/norm/scale [2, 16]: {missing}/scale.',
    f'- item_encoder/positions [8, 16]: {unknown}',
    "- item_encoder/queries [3, 16]: there is no qformer/queries. Did you mean 'qformer/querys'?",
    '+ new_head/kernel [2, 3]: nothing is made of it',
    '+ qformer/embedding_norm/extra [2]: nothing is made of it',
    '+ qformer/querys [3, 16]: nothing is made of it',
    f'~ item_encoder/{layer_1}/query_mlp/wi/bias: float32 [2, 41] in the checkpoint,'
    ' float32 [2, 40] in the model',
    f'~ item_encoder/{layer_1}/query_mlp/wo/bias: int32 [2, 16] in the checkpoint,'
    ' float32 [2, 16] in the model',
  ]


@pytest.mark.parametrize(
  ('change', 'lines'),
  [
    (
      lambda saved: saved['qformer'].update(querys=saved['qformer'].pop('queries')),
      [r'- item_encoder/queries \[3, 16\].*', r'\+ qformer/querys \[3, 16\].*'],
    ),
    (
      lambda saved: saved['qformer']['embedding_norm'].pop('scale'),
      [r'- item_encoder/embedding_norm/scale \[16\].*'],
    ),
    (lambda saved: saved.update(head=jnp.ones(2)), [r'\+ head \[2\].*']),
    (
      lambda saved: saved['qformer'].update(queries=jnp.ones((5, 16))),
      [r'~ item_encoder/queries: float32 \[5, 16\].*float32 \[3, 16\].*'],
    ),
  ],
  ids=['renamed', 'missing', 'extra', 'shape'],
)
def test_one_leaf_is_enough(tmp_path, change, lines):
  saved = copy.deepcopy(TRAINED)
  change(saved)
  found = listed(refused(save(tmp_path / 'run', saved, identity()), phase2()[0]))
  assert len(found) == len(lines)
  assert all(map(re.fullmatch, lines, found)), found


def test_settings_that_differ_are_named_with_the_fix(run):
  other = identity('item_language', num_queries=8, d_encoder=32)
  changes = {
    'model': other['model'],
    'data': {'name': 'films', 'fingerprint': 'def'},
    'entity_table': {'content_hash': '2c3d'},
  }
  message = refused(run, phase2(dataclasses.replace(QFORMER, num_queries=8))[0], **changes)
  assert message == (
    f'{run}/checkpoints/7 was trained with other settings than those of this run:\n'
    '  data.fingerprint: "abc" in the checkpoint, "def" in this run;'
    " set train.data to 'films' of phase 1\n"
    '  entity_table.content_hash: "0a1b" in the checkpoint, "2c3d" in this run;'
    ' set train.entity_table to that of phase 1\n'
    '  model.item_encoder.d_encoder: 6 in the checkpoint, 32 in this run;'
    ' set train.entity_table to that of phase 1\n'
    '  model.item_encoder.num_queries: 3 in the checkpoint, 8 in this run;'
    ' set train.item_encoder.num_queries=3\n'
    'Or train phase 1 again with the settings of this run.'
  )
  # What no shape tells.
  only = {'entity_table': {'content_hash': '2c3d'}}
  assert refused(run, phase2()[0], **only).count(' in the checkpoint, ') == 1
  epsilon = identity('item_language', layer_norm_epsilon=1e-6)['model']
  assert 'set train.item_encoder.layer_norm_epsilon=1e-12' in refused(
    run, phase2()[0], model=epsilon
  )


def test_what_is_no_q_former_or_not_of_phase_1_is_refused(run, tmp_path):
  mlp = SoftTokens(SoftTokenConfig(MlpConfig(3, D_CF), D_LM))
  shapes = jax.eval_shape(mlp.init, jax.random.key(0), jnp.zeros((1, 1, D_CF)))['params']
  model = {'name': 'item_language', 'item_encoder': dataclasses.asdict(MlpConfig(1, D_CF))}
  message = refused(run, random_like(shapes, 0), model=model)
  assert 'item encoder of this run is another one: it has item_encoder/' in message
  params, _ = phase2()
  later = save(tmp_path / 'phase2', params, identity('item_language'))
  assert "is a checkpoint of 'item_language', not of phase 1 ('item_text')" in refused(
    later, params
  )


def test_a_path_without_a_checkpoint_is_explained(run, tmp_path):
  params, _ = phase2()
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'foreign' / '5' / 'default').mkdir(parents=True)
  assert 'there is no such directory' in refused(run.parent / 'nowhere', params)
  assert 'has no complete checkpoint' in refused(tmp_path / 'empty', params)
  assert 'is not a checkpoint of this library' in refused(tmp_path / 'foreign', params)


def test_selected_parameters_are_read_strictly(run):
  saved = read_saved_params(run)
  assert {'/'.join(name) for name in saved.leaves} == flattened(TRAINED).keys()
  name = ('qformer', 'queries')
  wanted: dict[tuple[str, ...], Any] = {
    ('match', 'bias'): jnp.zeros(2),
    name: jnp.zeros((3, 16), jnp.bfloat16),
  }
  found = restore_selected(saved, wanted)
  assert list(found) == list(wanted)
  np.testing.assert_array_equal(found['match', 'bias'], TRAINED['match']['bias'])
  np.testing.assert_array_equal(found[name], TRAINED['qformer']['queries'].astype(jnp.bfloat16))
  for wrong, line in (
    ({name: jnp.zeros((4, 16))}, r'qformer/queries: float32 \[3, 16\].*float32 \[4, 16\]'),
    ({('qformer', 'more'): jnp.zeros(2)}, r'\+ qformer/more \[2\]'),
  ):
    with pytest.raises(UsageError, match=line):
      restore_selected(saved, wanted | wrong)


@eight_devices.needed
class TestOnEightDevices:
  def test_arrays_lie_where_phase_2_has_them(self, run):
    """Phase 1's lay on one device."""
    _, module = phase2()
    mesh = make_mesh({'fsdp': 4, 'tensor': 2})

    def init():
      return module.init(jax.random.key(0), jnp.zeros((1, 4, D_CF)))['params']

    like = abstract_init(init, mesh, DEFAULT_RULES)
    handed = hand_over(run, like, identity=identity('item_language')).params['item_encoder']
    source = flattened(TRAINED['qformer'])
    wanted = flattened(like['item_encoder'])
    split = 0
    for name, found in flattened(handed).items():
      assert found.sharding == wanted[name].sharding
      split += found.addressable_shards[0].data.size < found.size
      np.testing.assert_array_equal(found, source[name])
    assert split > 10

"""Phase 2 in the train loop: what is trained and what is not, restarts, what goes wrong."""

import json
import signal

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn

from ilm_jax import train as train_module
from ilm_jax.checkpoints.manager import read_identity, restore_params
from ilm_jax.errors import UsageError
from ilm_jax.phases.item_language import ItemLanguagePhase
from ilm_jax.phases.item_language_options import LmOptions, lm_compute
from ilm_jax.phases.phase import InputOptions
from ilm_jax.phases.settings import PhaseSettings, restore_phase
from ilm_jax.runtime.metric_log import read_jsonl
from ilm_jax.runtime.sharding import (
  DEFAULT_RULES,
  abstract_init,
  make_mesh,
  place_constants,
  use_mesh,
)
from ilm_jax.train import train
from tests.support import tiny_run
from tests.support.tiny_run import D_CF, D_MODEL

TASK = 'sequential_seen_title'
TEXT = {**tiny_run.TEXT, 'eval_examples': 8}
LM_SIZE = 400 * D_MODEL + D_MODEL + 2 * (4 * D_MODEL**2 + 3 * D_MODEL * 48 + 2 * D_MODEL)


@pytest.fixture(scope='session')
def settings(tmp_path_factory):
  """An MLP, two sources in turn, checkpoints at 2 and 4, an evaluation at 4."""
  folder = tmp_path_factory.mktemp('phase2')
  return {
    'model': 'item_language',
    'data': tiny_run.write_data(folder / 'films'),
    'schedule': ['item_sequence', TASK],
    'total_steps': 4,
    'batch_size': {'item_sequence': 8, TASK: 2},
    'item_encoder': {'kind': 'mlp', 'num_queries': 2},
    'losses': {'target_loss': {TASK: 'catalogue'}},
    'text': TEXT,
    'lm': {'name': str(tiny_run.write_lm(folder / 'lm'))},
    'learning_rate': 1e-2,
    'warmup_steps': 1,
    'eval_every': 4,
    'save_every': 2,
    'log_every': 1,
    'keep_latest': 10,
  }


@pytest.fixture(scope='session')
def straight(settings, tmp_path_factory):
  """A run that nothing disturbs, its results, and its constants before and after."""
  model_dir = tmp_path_factory.mktemp('straight')
  constants = []

  def placed(frozen, *args):
    on_device = place_constants(frozen, *args)
    constants.extend([jax.tree.map(np.array, on_device), on_device])
    return on_device

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train_module.sharding, 'place_constants', placed)
    results = train(model_dir=model_dir, **settings)
  return model_dir, results, *constants


def make_phase(settings, **change):
  """The phase of settings, as `train` makes it."""
  settings = settings | change
  inputs = InputOptions(
    settings['data'], None, settings['batch_size'], 0, make_mesh({'data': 1}), DEFAULT_RULES
  )
  options = {name: settings[name] for name in ItemLanguagePhase.OPTIONS}
  phase = PhaseSettings('item_language', options).make(inputs)
  assert isinstance(phase, ItemLanguagePhase)
  return phase


# ---------------------------------------------------------------- what is trained


def test_the_language_model_is_not_changed(straight, settings):
  model_dir, _, before, after = straight
  assert jax.tree.structure(before) == jax.tree.structure(after)
  for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
    assert old.tobytes() == np.asarray(new).tobytes()
  stored = safetensors.numpy.load_file(f'{settings["lm"]["name"]}/model.safetensors')
  embedding = np.asarray(after.lm['embedder']['embedding'].astype(np.float32))
  np.testing.assert_allclose(embedding, stored['model.embed_tokens.weight'], rtol=2**-8)

  arrays = tiny_run.arrays_of(model_dir, 4)
  trained = {name.removeprefix('params/') for name in arrays if name.startswith('params/')}
  assert trained == {
    'adaptor/bias', 'adaptor/kernel', 'gain', 'item_encoder/bias', 'item_encoder/kernel',
    'readout/kernel', 'readout/popularity_weight',
  }  # fmt: skip
  # AdamW's two moments of each of them, and otherwise counts of steps: no slot for anything else.
  slots = [x for name, x in arrays.items() if name.startswith('opt_state/')]
  floats = [x for x in slots if np.issubdtype(x.dtype, np.floating)]
  sizes = sorted([arrays[f'params/{name}'].size for name in trained] * 2)
  assert sorted(x.size for x in floats) == sizes
  moved = tiny_run.arrays_of(model_dir, 2)
  for name in trained:
    assert (moved[f'params/{name}'] != arrays[f'params/{name}']).any(), name


def mlp_size(k):
  hidden = 10 * D_CF
  encoder = (D_CF + 1) * hidden + (hidden + 1) * k * D_MODEL
  return encoder + 1 + D_MODEL * hidden + 1  # gain; readout and its weight of popularity


def qformer_size(k, d=64, mlp=128):
  """Two layers, the first of which cross-attends to D_CF wide vectors."""
  attention = 4 * (d + 1) * d + 2 * d
  feed_forward = (d + 1) * mlp + (mlp + 1) * d + 2 * d
  cross = 2 * (d + 1) * d + 2 * (D_CF + 1) * d + 2 * d
  encoder = k * d + 2 * d + 2 * (attention + feed_forward) + cross
  return encoder + (d + 1) * D_MODEL + 1 + D_MODEL * d + 1


@pytest.mark.parametrize(
  ('encoder', 'trains_lm', 'readout', 'expected'),
  [
    ({'kind': 'none'}, True, False, LM_SIZE),
    ({'kind': 'mlp'}, False, True, mlp_size(1)),
    ({'kind': 'mlp', 'num_queries': 4}, False, True, mlp_size(4)),
    ({'kind': 'mlp', 'normalise': False}, False, True, mlp_size(1) - 1),
    ({'kind': 'mlp'}, False, False, mlp_size(1) - D_MODEL * 10 * D_CF - 1),
    ({'size': 'tiny', 'num_queries': 1}, False, True, qformer_size(1)),
    ({'size': 'tiny', 'skip': True}, False, True, qformer_size(4) + 2 * D_CF * D_MODEL),
    ({'kind': 'qformer', 'size': 'tiny'}, False, True, qformer_size(4)),
    ({'kind': 'qformer', 'size': 'tiny'}, True, True, qformer_size(4) + LM_SIZE),
  ],
  ids=['text_only', 'mlp', 'mlp_k', 'bare', 'no_readout', 'ilm_1', 'skip', 'ilm', 'full_finetune'],
)
def test_how_much_is_trained(settings, encoder, trains_lm, readout, expected):
  phase = make_phase(
    settings,
    item_encoder=encoder,
    lm=settings['lm'] | {'trained': trains_lm},
    losses={'readout': readout},
    text=TEXT | {'prefix': ''},
  )
  params = nn.meta.unbox(jax.eval_shape(phase.init, jax.random.key(0)))
  assert sum(x.size for x in jax.tree.leaves(params)) == expected
  assert (phase.frozen.lm is None) is trains_lm


def test_the_readout_learns(settings, tmp_path):
  """Films of a genre in one order: popularity, where it begins, knows nothing of it."""
  options = settings | {
    'schedule': ['item_sequence'],
    'total_steps': 40,
    'batch_size': 16,
    'losses': {},
    'eval_every': 40,
    'save_every': 40,
  }
  train(model_dir=tmp_path, **options)
  losses = [
    row['train/item_sequence/loss']
    for row in read_jsonl(tmp_path / 'metrics.jsonl')
    if 'train/item_sequence/loss' in row
  ]
  assert len(losses) == 40
  assert losses[0] == pytest.approx(np.log(tiny_run.NUM_ITEMS), abs=0.2)
  assert np.mean(losses[-5:]) < losses[0] - 0.5


# ---------------------------------------------------------------- what a run leaves


def test_the_curves_have_every_source_and_every_task(straight):
  model_dir, results, *_ = straight
  rows = read_jsonl(model_dir / 'metrics.jsonl')
  for row in rows[:-1]:
    source = 'item_sequence' if row['step'] % 2 else TASK
    assert f'train/{source}/loss' in row
  assert {f'validation/{name}': x for name, x in results.items()}.items() <= rows[-1].items()
  assert {'readout/HR@10', 'readout/NDCG@10', 'readout/rank_pct', f'{TASK}/loss'} <= set(results)
  assert results['loss'] == results[f'{TASK}/loss']
  # 30 films, the seen ones removed: 1 of 10 at least by chance; and their titles are 30.
  assert 0 < results['readout/HR@10'] <= 1
  assert 0 < results[f'{TASK}/loss'] < np.log(tiny_run.NUM_ITEMS)


def test_a_mixture_is_measured_task_by_task(settings):
  batch_size = {'items_title': 2}
  phase = make_phase(settings, batch_size=batch_size, losses={})
  assert phase.tasks_of('items_title') == [
    'films_item_genres_seen_title',
    'films_item_title_seen_title',
  ]
  params = nn.meta.unbox(jax.jit(phase.init)(jax.random.key(0)))
  frozen = place_constants(phase.frozen, phase.inputs.mesh, phase.inputs.rules)
  found = phase.evaluate(params, frozen)
  tasks = {'item_genres_seen_title/loss', 'item_title_seen_title/loss'}
  assert set(found) == tasks | {'loss'}
  assert found['loss'] == pytest.approx(np.mean([found[name] for name in tasks]))
  # Random weights know nothing of 400 tokens.
  assert all(found[name] == pytest.approx(np.log(400), abs=1.0) for name in tasks)


def test_the_phase_is_made_again_from_the_directory(straight):
  model_dir, results, *_ = straight
  mesh = make_mesh({'data': 1})
  phase = restore_phase(model_dir, mesh, DEFAULT_RULES)
  assert isinstance(phase, ItemLanguagePhase)
  assert phase.identity == read_identity(model_dir / 'checkpoints')
  with use_mesh(mesh, DEFAULT_RULES):
    like = abstract_init(phase.init, mesh, DEFAULT_RULES, jax.random.key(0))
    params = restore_params(str(model_dir), like, identity=phase.identity)
    frozen = place_constants(phase.frozen, mesh, DEFAULT_RULES)
    assert phase.evaluate(params, frozen) == pytest.approx(results)


def test_no_run_is_told(straight):
  near = straight[0].parent / f'{straight[0].name}s'
  with pytest.raises(UsageError, match=f'is no run of `ilm train`.*{straight[0].name}'):
    restore_phase(near, make_mesh({'data': 1}), DEFAULT_RULES)


# ---------------------------------------------------------------- stopping and going on


def test_a_run_that_stopped_goes_on_bit_for_bit(settings, straight, tmp_path, monkeypatch):
  original = ItemLanguagePhase.count
  calls = []

  def interrupted(*args):
    calls.append(args)
    if len(calls) == 2:
      signal.raise_signal(signal.SIGTERM)
    return original(*args)

  monkeypatch.setattr(ItemLanguagePhase, 'count', interrupted)
  train(model_dir=tmp_path, **settings)
  assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == ['2']
  monkeypatch.undo()
  train(model_dir=tmp_path, **settings)
  found, expected = (tiny_run.arrays_of(d, 4) for d in (tmp_path, straight[0]))
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)
  assert tiny_run.curves(tmp_path) == tiny_run.curves(straight[0])


def test_another_language_model_is_refused_and_nothing_is_lost(settings, straight, tmp_path):
  model_dir = straight[0]
  before = (model_dir / 'phase.json').read_text()
  other = tiny_run.write_lm(tmp_path / 'other', seed=1)
  with pytest.raises(UsageError, match=r'model\.lm\.content_hash: ".*" in the checkpoint'):
    train(model_dir=model_dir, **(settings | {'lm': {'name': str(other)}, 'total_steps': 6}))
  assert (model_dir / 'phase.json').read_text() == before
  assert json.loads(before)['options']['lm'] == settings['lm']


# ---------------------------------------------------------------- names


def test_sources(settings):
  """What the template file has, in both forms; phase 1's tasks are no prompts."""
  names = set(make_phase(settings).sources())
  tasks = {'sequential_seen', 'sequential_unseen', 'openp5', 'items', 'multitask'}
  tasks |= {f'item_{kind}_{group}' for kind in ('title', 'genres') for group in ('seen', 'unseen')}
  expected = {'item_sequence', *(f'{task}_{form}' for task in tasks for form in ('title', 'id'))}
  assert names >= expected
  assert not names & {'item_text', 'item_item', 'user_item', 'it', 'it_ii', 'it_ui'}
  assert 'item_sequence' not in make_phase(settings, losses={'readout': False}).sources()


@pytest.mark.parametrize(
  ('named', 'platform', 'expected', 'warned'),
  [
    (None, 'cpu', 'xla', False),
    (None, 'gpu', 'cudnn', False),
    (None, 'tpu', 'xla', False),
    ('splash', 'tpu', 'splash', False),
    ('splash', 'gpu', 'cudnn', True),
    ('splash', 'cpu', 'xla', True),
    ('cudnn', 'tpu', 'xla', True),
    ('xla', 'gpu', 'xla', False),
  ],
)
def test_a_kernel_of_another_platform_is_left_out(named, platform, expected, warned, caplog):
  compute = lm_compute(LmOptions('any', attention=named), platform)
  assert compute.attention == expected
  assert (f'attention={named!r} is a kernel for ' in caplog.text) == warned


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      {'schedule': ['item_sequense'], 'batch_size': 2},
      r"no source 'item_sequense'. Did you mean 'item_sequence'",
    ),
    ({'schedule': ['item_sequense']}, r"no entry for 'item_sequense'"),
    (
      {'schedule': ['sequential_title'], 'batch_size': 2},
      r"no source 'sequential_title'. Did you mean 'sequential_\w+_title'",
    ),
    ({'item_encoder': {'kind': 'qfomer'}}, r"kind='qfomer'.*Did you mean 'qformer'"),
    ({'item_encoder': {'size': 'tinny'}}, r"size='tinny'.*Did you mean 'tiny'"),
    (
      {'item_encoder': {'kind': 'mlp', 'size': 'tiny'}},
      r"train\.item_encoder has no option 'size'",
    ),
    ({'item_encoder': {'size': 'tiny', 'd_encoder': 4}}, r'd_encoder is decided by the data'),
    ({'item_encoder': {'kind': 'none'}}, r"train\.lm=\{\.\.\., 'trained': True\}"),
    ({'losses': {'target_los': 'catalogue'}}, r"target_los.*Did you mean 'target_loss'"),
    ({'text': {'template': 'templates.txt'}}, r"template.*Did you mean 'templates'"),
    ({'text': {'templates': 'templates_film.txt'}}, r'templates_film\.txt'),
    ({'text': {'users': 'item'}}, r"users: 'item' is str, but Literal\['vector', 'items'\]"),
    ({'text': TEXT | {'users': 'items'}}, r'an MLP reads one encoder token'),
    ({'lm': {}}, r"train\.lm: \{'name': \.\.\.\} is missing"),
    ({'lm': {'name': 'smollm_135m'}}, r"Did you mean 'smollm2_135m'"),
    ({'lm': {'name': 'x', 'traind': True}}, r"traind.*Did you mean 'trained'"),
    ({'model': 'item_text'}, r'train\.lm: .*item_text.* has no such options'),
    ({'model': 'item_langauge'}, r"'item_language' is what there is|Did you mean 'item_language'"),
  ],
)
def test_wrong_settings_are_told(settings, tmp_path, change, message):
  with pytest.raises(UsageError, match=message):
    train(model_dir=tmp_path / 'run', **(settings | change))
  assert not (tmp_path / 'run' / 'metrics.jsonl').exists()

"""Both phases under T5X: its steps are those of `ilm train`, and `python -m t5x.train` trains them.

T5X is on no package registry and so not in the virtual environment of the other tests; docs/t5x.md
says how to make one that has it.
"""

import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from flax import traverse_util
from flax.core import freeze, unfreeze

from tests.support import eight_devices

pytest.importorskip('t5x.trainer', reason='needs T5X, which is on no registry: see docs/t5x.md')

from t5x import optimizers, partitioning, utils

from ilm_jax.data.text.vocabularies import ByteVocabulary
from ilm_jax.errors import UsageError
from ilm_jax.modules.layers import Compute
from ilm_jax.phases import item_language_options, t5x_batches, t5x_models
from ilm_jax.phases.phase import InputOptions
from ilm_jax.phases.settings import PhaseSettings
from ilm_jax.phases.train_step import TrainState, jit_step
from ilm_jax.runtime import sharding
from ilm_jax.train import train
from tests.support import tiny_run

ROOT = Path(__file__).parents[2]
ROWS = 8
PROMPTS = 'sequential_seen_title'
LEARNING_RATES = optax.constant_schedule(1.0)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A data set and a language model."""
  path = tmp_path_factory.mktemp('t5x')
  tiny_run.write_data(path / 'films')
  tiny_run.write_lm(path / 'lm')
  return path


def options_of(phase, folder):
  """Of the model, T5X's lengths, and the task that T5X evaluates."""
  if phase == 1:
    text = {'item_text': '{title}', 'vocabulary': 'bytes', 'max_text_tokens': 20}
    encoder = {'size': 'tiny', 'num_queries': 4}
    options = {'item_encoder': encoder, 'losses': {}, 'text': text}
    return options, {'targets': 20, 'entity_ids': 1}, 'films_item_text'
  options = {
    'item_encoder': {'kind': 'mlp', 'num_queries': 2},
    'losses': {'target_loss': 'catalogue', 'weights': {PROMPTS: 3.0}},
    'text': tiny_run.TEXT,
    'lm': {'name': str(folder / 'lm')},
  }
  return options, {'inputs': 64, 'targets': 32, 'entity_ids': 12}, f'films_{PROMPTS}'


MODELS = {1: t5x_models.T5XItemTextModel, 2: t5x_models.T5XItemLanguageModel}
SCHEDULES = {1: ('item_text', 'user_item'), 2: ('item_sequence', PROMPTS)}


@functools.cache
def partitioner(*submesh, dims=1):
  rules = partitioning.standard_logical_axis_rules(
    parameter_partitioning_dims=dims,
    additional_rules=[
      ('activation_embed', None),
      ('kv_heads', None),
      ('queries', None),
      ('cf', None),
      ('entities', ('data', 'model')),
    ],
  )
  if submesh:
    return partitioning.PjitPartitioner(model_parallel_submesh=submesh, logical_axis_rules=rules)
  return partitioning.PjitPartitioner(num_partitions=1, logical_axis_rules=rules)


def make_model(phase, folder, devices=None, optimizer=None, **change):
  options, _, task = options_of(phase, folder)
  settings = {'schedule': SCHEDULES[phase], **options, **change}
  return MODELS[phase](
    partitioner=devices or partitioner(),
    # Not AdamW, which divides by gradients, and with them by their rounding errors.
    optimizer_def=optimizer or optimizers.OptaxWrapper(optax.sgd(LEARNING_RATES)),
    task=task,
    data=str(folder / 'films' / 'prepared'),
    **settings,
  )


def dataset_config(phase, folder, **change):
  _, lengths, task = options_of(phase, folder)
  return utils.DatasetConfig(
    mixture_or_task_name=task,
    task_feature_lengths=lengths,
    split='train',
    batch_size=ROWS,
    shuffle=True,
    seed=3,
    pack=phase == 2,
    **change,
  )


def batches_of(model, phase, folder):
  config = dataset_config(phase, folder)
  return t5x_batches.get_dataset(config, 0, 1, model.FEATURE_CONVERTER_CLS)


def begin(model, devices, batches, parts=None, seed=1):
  """T5X's trainer as its train loop makes it, with parameters from scratch."""
  spec = batches.element_spec
  start = t5x_models.TrainStateInitializer(
    optimizer_def=model.optimizer_def,
    init_fn=model.get_initial_variables,
    input_shapes={name: x.shape for name, x in spec.items()},
    input_types={name: x.dtype for name, x in spec.items()},
    partitioner=devices,
  )
  return t5x_models.Trainer(
    model=model,
    train_state=start.from_scratch(jax.random.PRNGKey(seed)),
    partitioner=devices,
    eval_names=['task'],
    summary_dir=None,
    train_state_axes=start.train_state_axes,
    rng=jax.random.PRNGKey(2),
    learning_rate_fn=LEARNING_RATES,
    num_microbatches=parts,
  )


def ilm_phase(phase, folder):
  """The phase as `ilm train` makes it, on one device."""
  mesh = sharding.make_mesh({'data': 1}, jax.devices()[:1])
  data = folder / 'films' / 'prepared'
  sizes = dict.fromkeys(SCHEDULES[phase], ROWS)
  inputs = InputOptions(data, None, sizes, 3, mesh, sharding.DEFAULT_RULES)
  name = {1: 'item_text', 2: 'item_language'}[phase]
  return PhaseSettings(name, options_of(phase, folder)[0]).make(inputs), mesh


def parts_of(x):
  """Into how many parts each axis of an array is split."""
  return tuple(n // part for n, part in zip(x.shape, x.addressable_shards[0].data.shape))


def flat(tree):
  return {k: np.asarray(x) for k, x in traverse_util.flatten_dict(unfreeze(tree), sep='/').items()}


def check_steps(phase, folder, devices, **change):
  """Two steps of T5X, one of each source, are two steps of `ilm train` on one device.

  With the same parameters, the same random key, the batches of each one's own reader, and dropout.
  """
  model = make_model(phase, folder, devices, **change)
  batches = batches_of(model, phase, folder)
  trainer = begin(model, devices, batches)
  before = flat(trainer.train_state.params)
  other, mesh = ilm_phase(phase, folder)
  params = jax.tree.map(
    lambda x: jax.device_put(np.asarray(x), mesh.devices.flat[0]),
    unfreeze(trainer.train_state.params),
  )
  optimizer = optax.sgd(LEARNING_RATES)
  frozen = sharding.place_constants(other.frozen, mesh, sharding.DEFAULT_RULES)
  state = TrainState(jax.numpy.zeros((), jax.numpy.int32), params, optimizer.init(params))
  step = jit_step(other, optimizer, 1, state)
  for i, source in enumerate(SCHEDULES[phase]):
    rows = next(batches)
    own = sharding.place_batch(next(other.reader(source, 0, None)), mesh)
    for name, x in own.items():
      np.testing.assert_array_equal(rows[f'{source}/{name}'], x)
    train_state, metrics = trainer._partitioned_train_step(trainer.train_state, rows)
    trainer.train_state = train_state
    with sharding.use_mesh(mesh, sharding.DEFAULT_RULES):
      state, expected = step(state, frozen, own, jax.random.PRNGKey(2), source=source)
    found = {name: float(x.compute()) for name, x in metrics.items()}
    assert set(expected) - {'gradient_norm', 'gradient_norms'} == {
      name.removeprefix(f'{source}/') for name in found if name.startswith(f'{source}/')
    }
    for name in expected:
      if not name.startswith('gradient'):
        np.testing.assert_allclose(
          found[f'{source}/{name}'], float(expected[name]), rtol=2e-5, atol=1e-6, err_msg=name
        )
    others = [name for name in found if name.split('/')[0] == SCHEDULES[phase][1 - i]]
    assert others
    assert all(np.isnan(found[name]) for name in others)
  after, expected = flat(trainer.train_state.params), flat(state.params)
  assert set(after) == set(expected)
  assert any((after[name] != before[name]).any() for name in after)
  for name, x in after.items():
    np.testing.assert_allclose(x, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
  return model, trainer, rows


@pytest.mark.parametrize('phase', [1, 2])
def test_a_step_is_a_step_of_ilm_train(phase, folder):
  model, trainer, rows = check_steps(phase, folder, partitioner())

  # What is frozen is an argument of the program: nothing of it is written there, nor in the state.
  text = trainer._partitioned_train_step.lower(trainer.train_state, rows).function.as_text()
  assert max(map(len, re.findall(r'dense<"[^"]*"', text)), default=0) < 2000
  expected = {f'target/{name}' for name in flat(model.phase.init(jax.random.key(0)))}
  names = traverse_util.flatten_dict(trainer.train_state.state_dict(), sep='/')
  assert {name for name in names if name.startswith('target/')} == expected


@eight_devices.needed
class TestOnEightDevices:
  @pytest.fixture(autouse=True)
  def float32(self, monkeypatch):
    """Sums over devices are of other parts, which bfloat16 would round in other ways."""
    plain = Compute(scan_layers=False)
    monkeypatch.setattr(item_language_options, 'default_compute', lambda platform: plain)

  @pytest.mark.parametrize('phase', [1, 2])
  def test_a_step_is_a_step_of_ilm_train_on_one(self, phase, folder):
    devices = partitioner(1, 2, 1, 1)
    assert dict(devices.mesh.shape) == {'data': 4, 'model': 2}
    model, trainer, _ = check_steps(phase, folder, devices)
    # T5X's rules split parameters, ours what is frozen.
    params = traverse_util.flatten_dict(unfreeze(trainer.train_state.params), sep='/')
    name = {1: 'qformer/layers/layer_0/query_mlp/wi/kernel', 2: 'item_encoder/kernel'}[phase]
    assert params[name].sharding.spec[-1] == 'model'
    assert parts_of(params[name])[-1] == 2
    vectors = model.frozen.entity_vectors
    assert parts_of(vectors)[0] == 8
    if phase == 2:
      assert parts_of(model.frozen.lm['embedder']['embedding']) == (2, 1)

  def test_parameters_and_the_language_model_are_split_over_data_too(self, folder):
    devices = partitioner(1, 2, 1, 1, dims=2)
    model, trainer, _ = check_steps(2, folder, devices, sharding_rules={'embed': 'data'})
    assert parts_of(trainer.train_state.params['readout']['kernel']) == (4, 1)
    assert parts_of(model.frozen.lm['embedder']['embedding']) == (2, 4)


def test_parts_of_a_batch_give_the_mean_of_their_gradients(folder):
  """Two parts that are the same are one."""
  model = make_model(2, folder, schedule=['item_sequence'])
  batches = batches_of(model, 2, folder)
  rows = next(batches)
  half = {name: x[: ROWS // 2] for name, x in rows.items()}
  doubled = {name: np.concatenate([x, x]) for name, x in half.items()}
  results = []
  for parts, batch in ((None, half), (2, doubled)):
    trainer = begin(model, partitioner(), batches, parts)
    state, metrics = trainer._partitioned_train_step(trainer.train_state, batch)
    results.append((flat(state.params), float(metrics['loss'].compute())))
  (one, loss), (two, mean) = results
  np.testing.assert_allclose(mean, loss, rtol=1e-6)
  for name in one:
    np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_batches_go_on_where_they_were(folder, tmp_path):
  model = make_model(2, folder, schedule=(PROMPTS, 'item_sequence', PROMPTS))
  batches = batches_of(model, 2, folder)
  for _ in range(4):
    next(batches)
  batches.save(tmp_path / 'position')
  expected = [next(batches) for _ in range(4)]
  assert [x['source'][0] for x in expected] == [1, 0, 0, 1]
  again = batches_of(model, 2, folder)
  again.restore(tmp_path / 'position')
  for rows, found in zip(expected, again):
    assert set(rows) == set(found) == set(again.element_spec)
    for name, x in rows.items():
      np.testing.assert_array_equal(found[name], x)
      assert again.element_spec[name].shape == x.shape
    of = (PROMPTS, 'item_sequence')[rows['source'][0]]
    others = [x for name, x in rows.items() if name != 'source' and not name.startswith(f'{of}/')]
    assert others
    assert not any(x.any() for x in others)


def test_a_task_alone_is_read_by_t5x_itself(folder):
  """`utils.get_dataset` makes what our reader makes but for the order; and scores are per row."""
  model = make_model(1, folder, schedule=())
  config = dataset_config(1, folder)
  dataset = utils.get_dataset(config, 0, 1, model.FEATURE_CONVERTER_CLS, num_epochs=1)
  seen = {}
  for rows in dataset.as_numpy_iterator():
    for item, tokens, mask in zip(rows['entity_ids'], rows['text_tokens'], rows['text_mask']):
      seen[int(item[0])] = ByteVocabulary().decode(tokens[mask > 0].tolist())
  titles = model.phase.prepared.item_text['title']
  assert len(seen) >= ROWS
  assert all(titles[item].startswith(text) and len(text) > 10 for item, text in seen.items())

  params = freeze(nn.meta.unbox(model.phase.init(jax.random.key(0))))
  scores = jax.jit(model.score_batch)(params, rows)
  assert scores.shape == (ROWS,)
  plain = unfreeze(params)
  vectors = model.frozen.entity_vectors[rows['entity_ids'][:, 0]]
  nll, _ = model.phase.model.text_nll(plain, vectors, rows['text_tokens'], rows['text_mask'])
  np.testing.assert_allclose(scores.sum(), -float(nll), rtol=1e-5)
  few = {name: x[2:3] for name, x in rows.items()}
  np.testing.assert_allclose(model.score_batch(params, few), scores[2:3], rtol=1e-5)
  features, aux = model.predict_batch_with_aux(params, rows)
  np.testing.assert_allclose(np.linalg.norm(features, axis=-1), 1, rtol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(aux['texts'], axis=-1), 1, rtol=1e-5)


def test_scores_and_evaluation_of_prompts(folder):
  model = make_model(2, folder, schedule=())
  config = dataclasses.replace(dataset_config(2, folder), pack=False)
  rows = next(t5x_batches.get_dataset(config, 0, 1, model.FEATURE_CONVERTER_CLS))
  params = freeze(nn.meta.unbox(model.phase.init(jax.random.key(0))))
  scores = jax.jit(model.score_batch)(params, rows)
  loss, metrics = jax.jit(lambda *args: model.eval_fn(*args))(params, rows)
  weights = rows['decoder_loss_weights'].sum()
  np.testing.assert_allclose(float(loss), -float(scores.sum()) / weights, rtol=1e-5)
  np.testing.assert_allclose(float(metrics['loss'].compute()), float(loss), rtol=1e-6)
  with pytest.raises(UsageError, match='T5X cannot recommend'):
    model.predict_batch(params, rows)


def test_what_is_handed_over_is_where_a_run_begins(folder, tmp_path):
  options, _, _ = options_of(1, folder)
  train(
    model_dir=tmp_path / 'phase1',
    data=folder / 'films' / 'prepared',
    schedule=['user_item'],
    total_steps=1,
    batch_size=ROWS,
    eval_every=1,
    save_every=1,
    **options,
  )
  encoder = {'size': 'tiny', 'num_queries': 4, 'init_from': str(tmp_path / 'phase1')}
  model = make_model(2, folder, item_encoder=encoder)
  trainer = begin(model, partitioner(), batches_of(model, 2, folder))
  found = flat(trainer.train_state.params)
  saved = tiny_run.arrays_of(tmp_path / 'phase1', 1)
  taken = [name for name in found if name.startswith('item_encoder/')]
  assert len(taken) > 20
  for name in taken:
    np.testing.assert_array_equal(
      found[name], saved[name.replace('item_encoder', 'params/qformer')]
    )


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'schedule': ['item_txt']}, "no source 'item_txt'.*Did you mean 'item_text'"),
    ({'losses': {'itc_wieght': 1}}, "Did you mean 'itc_weight'"),
    ({'lm': {'name': 'x'}}, "train.lm: train.model='item_text' has no such options"),
  ],
)
def test_what_is_wrong_is_told(folder, change, message):
  with pytest.raises(UsageError, match=message):
    make_model(1, folder, **change)


@pytest.mark.parametrize(
  'change',
  [{'shuffle': False}, {'seed': None}, {'mixture_or_task_name': 'films_item_item'}],
  ids=lambda change: next(iter(change)),
)
def test_what_the_batches_cannot_do_is_told(folder, change):
  model = make_model(1, folder)
  config = dataclasses.replace(dataset_config(1, folder), **change)
  with pytest.raises(UsageError, match=next(iter(change))):
    t5x_batches.get_dataset(config, 0, 1, model.FEATURE_CONVERTER_CLS)


# ---------------------------------------------------------------- python -m t5x.train


def run(phase, folder, model_dir, **macros):
  """`python -m t5x.train` on eight devices, 4 of data by 2 of the model."""
  options, lengths, task = options_of(phase, folder)
  text = options['text']
  macros = {
    'MODEL_DIR': str(model_dir),
    'DATA': str(folder / 'films' / 'prepared'),
    'MIXTURE_OR_TASK_NAME': task,
    'SCHEDULE': SCHEDULES[phase],
    'ITEM_ENCODER': options['item_encoder'],
    'LOSSES': options['losses'],
    'TEXT': text,
    'TASK_FEATURE_LENGTHS': lengths,
    'TRAIN_STEPS': 4,
    'BATCH_SIZE': ROWS,
    'WARMUP_STEPS': 1,
    'SAVE_PERIOD': 2,
    'EVAL_PERIOD': 2,
    'EVAL_STEPS': 1,
    'KEEP': 4,
    'NUM_PARTITIONS': None,
    'MODEL_PARALLEL_SUBMESH': (1, 2, 1, 1),
    **({'LM': str(folder / 'lm')} if phase == 2 else {}),
    **macros,
  }
  command = [sys.executable, '-m', 't5x.train', f'--gin_search_paths={ROOT / "gin"}']
  command += [f'--gin_file=t5x/phase{phase}.gin']
  done = subprocess.run(
    command + [f'--gin.{name}={value!r}' for name, value in macros.items()],
    env={**os.environ, **eight_devices.ENVIRONMENT},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-5000:]


def checkpoint(model_dir, step):
  """Every array that T5X saved, as Orbax itself reads it."""
  import orbax.checkpoint as ocp

  path = (model_dir / f'checkpoint_{step}' / 'state').absolute()
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    saved = reader.metadata(path).item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
    tree = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
  return {k: np.asarray(x) for k, x in traverse_util.flatten_dict(tree, sep='/').items()}


@pytest.mark.parametrize('phase', [1, 2])
def test_t5x_trains_saves_and_goes_on(phase, folder, tmp_path):
  run(phase, folder, tmp_path / 'straight')
  saved = {step: checkpoint(tmp_path / 'straight', step) for step in (0, 2, 4)}
  moved = [name for name in saved[0] if name.startswith('target/')]
  model = make_model(phase, folder)
  assert set(moved) == {f'target/{name}' for name in flat(model.phase.init(jax.random.key(0)))}
  for name in moved:
    # There are no pairs of items, and attention to one CF vector is 1 whatever its key.
    if not re.search('temperature_ii|cross_attention/(key|query)', name):
      assert (saved[0][name] != saved[4][name]).any(), name
  # AdamW's moments of them, and otherwise counts: nothing of what is frozen.
  sizes = sorted(x.size for name, x in saved[4].items() if name not in moved and x.size > 1)
  assert sizes == sorted(
    2 * [x.size for name, x in saved[4].items() if name in moved and x.size > 1]
  )

  # A run that stopped after step 2 comes to the same parameters.
  (tmp_path / 'resumed').mkdir()
  shutil.copytree(tmp_path / 'straight' / 'checkpoint_2', tmp_path / 'resumed' / 'checkpoint_2')
  run(phase, folder, tmp_path / 'resumed')
  again = checkpoint(tmp_path / 'resumed', 4)
  assert set(again) == set(saved[4])
  for name, x in again.items():
    np.testing.assert_array_equal(x, saved[4][name], err_msg=name)
  assert not (tmp_path / 'resumed' / 'checkpoint_0').exists()

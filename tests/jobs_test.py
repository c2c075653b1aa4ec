"""Every gin job that trains: what it asks for, its header, its programs, and runs on tiny data."""

import functools
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

from ilm_jax import train as train_module
from ilm_jax.aot import programs
from ilm_jax.checkpoints.manager import read_identity
from ilm_jax.config.files import gin_root
from ilm_jax.config.flags import parse_argv
from ilm_jax.main import COMMANDS, main
from ilm_jax.runtime.metric_log import read_jsonl
from tests.support import tiny_run

JOBS = {p.stem: p for p in sorted((gin_root() / 'jobs').glob('*.gin'))}
# Queries of the Q-Former.
PHASE1 = {
  'phase1_ml100k': 4,
  'phase1_ml100k_it': 4,
  'phase1_ml100k_it_ii': 4,
  'demo_phase1': 1,
  'phase1_bert8_10m': 8,
}
# Soft tokens of an entity; whether the language model is trained; whether there is a readout.
PHASE2 = {
  'phase2_ml100k': (1, False, True),
  'phase2_ml100k_text_only': (0, True, False),
  'phase2_ml100k_mlp': (1, False, True),
  'phase2_ml100k_mlp_k': (4, False, True),
  'phase2_ml100k_ilm_rand': (4, False, True),
  'phase2_ml100k_ilm_it': (4, False, True),
  'phase2_ml100k_ilm_it_ii': (4, False, True),
  'phase2_ml100k_ilm_it_ui': (4, False, True),
  'phase2_ml100k_ilm_full_finetune': (4, True, True),
  'phase2_ml100k_long': (1, False, True),
  'phase2_ml100k_items': (1, False, False),
  'demo_ilm': (1, False, True),
  'demo_mlp': (1, False, True),
}
# Of these, only the language model and the layout differ: one is run, with neither; whether each
# fits its chips is for `ilm compile` to say (docs/scale.md).
PODS = ('phase2_gemma2_2b', 'phase2_gemma3_4b', 'phase2_gemma3_12b', 'phase2_gemma3_27b')
PHASE2[PODS[0]] = 8, False, True
HAND_OFF = {
  'phase2_ml100k_ilm_it': 'phase1_ml100k_it',
  'phase2_ml100k_ilm_it_ii': 'phase1_ml100k_it_ii',
  'phase2_ml100k_ilm_it_ui': 'phase1_ml100k',
  'phase2_ml100k_ilm_full_finetune': 'phase1_ml100k',
  'phase2_ml100k_long': 'phase1_ml100k',
  'phase2_ml100k_items': 'phase1_ml100k',
  'demo_ilm': 'demo_phase1',
}
# For every change the demo's two phases are run, the second after the first; a language model that
# is trained, without soft tokens, is in evaluate_test.py. All are run before a release.
RUN = ('demo_ilm',)
NO_QFORMER = ('phase2_ml100k_text_only', 'phase2_ml100k_mlp', 'phase2_ml100k_mlp_k', 'demo_mlp')

SIZES = programs.Sizes(items=1349, users=943, cf_dim=32, prefix_tokens=20, trie_depth=16)


def parsed(argv):
  return parse_argv(train_module.train, argv, other_commands=COMMANDS)[0]


def arguments(job: str) -> list[str]:
  return [f'--gin_file=jobs/{job}.gin'] + ['--gin.PHASE1=phase1'] * (job in HAND_OFF)


@functools.cache
def header(path: Path) -> str:
  lines = path.read_text().splitlines()
  end = next(i for i, line in enumerate(lines) if not line.startswith('#'))
  return '\n'.join(line.removeprefix('#').removeprefix(' ') for line in lines[:end])


# ---------------------------------------------------------------- the files


def test_no_job_is_left_out():
  assert {*PHASE1, *PHASE2, *PODS} == {name for name in JOBS if not name.startswith('prepare_')}


@pytest.mark.parametrize('path', sorted(gin_root().rglob('*.gin')), ids=lambda p: p.stem)
def test_every_file_says_what_it_needs(path):
  assert 'Required to be set:' in header(path)
  assert 'Commonly overridden:' in header(path)
  assert max(map(len, path.read_text().splitlines())) <= 100


@pytest.mark.parametrize('job', [*PHASE1, *PHASE2, *PODS[1:]])
def test_the_commands_of_a_header_are_complete(job):
  """They parse, nothing required is missing, and no setting is without use."""
  text = header(JOBS[job]).replace('\\\n', ' ')
  commands = re.findall(r'^ +ilm train (.*)$', text, re.MULTILINE)
  assert f'--gin_file=jobs/{job}.gin' in commands[-1]
  for command in commands:
    assert parsed(shlex.split(command)).warnings == ()
  if len(commands) == 2:
    before, after = (parsed(shlex.split(command)).arguments for command in commands)
    assert f'--gin_file=jobs/{HAND_OFF[job]}.gin' in commands[0]
    assert after['item_encoder']['init_from'] == str(before['model_dir'])
    assert after['item_encoder']['num_queries'] == before['item_encoder']['num_queries']


def test_the_jobs_of_the_table_differ_in_what_it_compares_alone():
  """Of all settings of `train`: the item encoder, what is trained, and what follows from it."""
  runs = {
    job: dict(parsed([*arguments(job), '--gin.MODEL_DIR=run']).arguments)
    for job in PHASE2
    if job.startswith('phase2_ml100k_') and not job.endswith(('_long', '_items'))
  }
  base = runs['phase2_ml100k_ilm_rand']
  for job, found in runs.items():
    differing = {name for name, value in found.items() if value != base[name]}
    allowed = {'item_encoder'}
    if PHASE2[job][1]:
      allowed |= {'lm', 'learning_rate'}
    if not PHASE2[job][0]:
      allowed |= {'losses', 'schedule'}
    assert differing <= allowed, job
    assert found['text'] == base['text'], job


def test_jobs_for_pods_differ_in_language_model_and_layout_alone():
  argv = ['--gin.DATA=data', '--gin.MODEL_DIR=run']
  found = [dict(parsed([*arguments(job), *argv]).arguments) for job in PODS]
  for job, run in zip(PODS, found):
    assert run['lm']['name'] == 'checkpoints/' + job.removeprefix('phase2_')
    assert (run['text']['history_length'], run['item_encoder']['num_queries']) == (50, 8)
    assert run['text']['max_inputs'] + run['text']['max_targets'] == 2048
    assert run['batch_size'] >= 256
    same = {name for name in run if run[name] == found[0][name]}
    assert set(run) - same <= {'lm', 'mesh', 'accumulate_steps'}
    assert {**run['lm'], 'name': ''} == {**found[0]['lm'], 'name': ''}


# ---------------------------------------------------------------- what they do


@pytest.mark.parametrize('job', [*PHASE1, *PHASE2, *PODS[1:]])
def test_what_a_job_trains(job):
  """Shapes at the job's own sizes; of a pod's job, on one device."""
  argv = [*arguments(job), '--gin.DATA=data', '--gin.MODEL_DIR=run', '--gin.MESH=None']
  settings = dict(parsed(argv).arguments)
  lm = job.removeprefix('phase2_') if job in PODS else None
  found, *_ = programs.programs(settings, SIZES, jax.devices(), lm=lm)
  steps = {p.name.removeprefix('train '): p for p in found if p.name.startswith('train ')}
  assert list(steps) == list(dict.fromkeys(settings['schedule']))
  for program in steps.values():
    state, frozen, batch, _ = program.args
    rows = {len(x) if hasattr(x, '__len__') else x.shape[0] for x in batch.values()}
    assert len(rows) == 1
  if job in PHASE1:
    assert state.params['qformer']['queries'].shape[0] == settings['item_encoder']['num_queries']
  else:
    check_parameters(PHASE2.get(job, PHASE2[PODS[0]]), job, set(state.params))
    assert (frozen.lm is None) == ('lm' in state.params)


def check_parameters(kind, job, found):
  """What phase 2 trains."""
  soft_tokens, trains_lm, readout = kind
  expected = {'lm'} if trains_lm else set()
  expected |= {'item_encoder', 'adaptor', 'gain'} if soft_tokens else set()
  expected |= {'readout'} if readout else set()
  if job.endswith('_items'):  # its adaptor begins at words
    expected |= {'common', 'feature_mean', 'feature_deviation'}
  assert found == expected


@pytest.fixture(scope='module')
def lm_directory(tmp_path_factory):
  return tiny_run.write_lm(tmp_path_factory.mktemp('lm') / 'tiny')


@pytest.fixture(scope='module')
def films_directory(tmp_path_factory):
  return tiny_run.write_data(tmp_path_factory.mktemp('films') / 'films')


@pytest.fixture(scope='module')
def phase1_run(films_directory, tmp_path_factory):
  """(job of phase 1, queries) -> the directory of its run with the tiny overlay, made once."""

  @functools.cache
  def run(job: str, queries: int) -> Path:
    directory = tmp_path_factory.mktemp(job)
    argv = [f'--gin_file=jobs/{job}.gin', '--gin_file=local_tiny.gin']
    argv += [f'--gin.NUM_QUERIES={queries}']
    argv += [f'--gin.DATA={films_directory}', f'--gin.MODEL_DIR={directory}']
    assert main(['train', *argv]) == 0
    return directory

  return run


def run_some(jobs):
  """All of them, those that are not in RUN before a release alone."""
  return [pytest.param(job, marks=[pytest.mark.slow] * (job not in RUN)) for job in jobs]


@pytest.mark.parametrize('job', run_some(PHASE1))
def test_phase_1_runs(phase1_run, job):
  directory = phase1_run(job, PHASE1[job])
  assert sorted(p.name for p in (directory / 'checkpoints').iterdir()) == ['2', '4']
  for row in read_jsonl(directory / 'metrics.jsonl'):
    assert all(np.isfinite(value) for value in row.values())


@pytest.mark.parametrize('job', run_some(PHASE2))
def test_phase_2_runs(films_directory, lm_directory, phase1_run, tmp_path, capfd, job):
  argv = [f'--gin_file=jobs/{job}.gin', '--gin_file=local_tiny_phase2.gin']
  argv += [f'--gin.DATA={films_directory}', f'--gin.LM={lm_directory}']
  argv += [f'--gin.MODEL_DIR={tmp_path}']
  argv += ['--gin.MESH=None'] if job in PODS else []  # which is that of a pod
  soft_tokens, trains_lm, readout = PHASE2[job]
  before = phase1_run(HAND_OFF[job], soft_tokens) if job in HAND_OFF else None
  argv += [f'--gin.PHASE1={before}'] if before else []
  warnings = parsed(argv).warnings
  assert len(warnings) == (job in NO_QFORMER)
  assert all('nothing uses the macro SIZE' in warning for warning in warnings)
  assert main(['train', *argv]) == 0

  shown = capfd.readouterr().err
  assert 'item_language: step 4/4 (100 %)' in shown
  model = read_identity(tmp_path / 'checkpoints')['model']
  assert model['item_encoder'].get('num_queries', 0) == soft_tokens
  assert model['lm']['trained'] is trains_lm
  assert model['readout'] is readout
  paths = [name.split('/') for name in tiny_run.arrays_of(tmp_path, 4)]
  check_parameters(PHASE2[job], job, {path[1] for path in paths if path[0] == 'params'})
  rows = read_jsonl(tmp_path / 'metrics.jsonl')
  assert all(np.isfinite(value) for row in rows for value in row.values())
  for source in set(parsed(argv).arguments['schedule'][:4]):
    assert [row for row in rows if f'train/{source}/loss' in row], source
  if before:
    check_hand_off(shown, before, tmp_path)


def check_hand_off(shown: str, before: Path, run: Path) -> None:
  """Training began at phase 1's Q-Former: in 4 steps of 1e-3 at most it is not far from it."""
  assert 'Item encoder of phase 1: ' in shown
  ours, theirs = tiny_run.arrays_of(run, 4), tiny_run.arrays_of(before, 4)
  for name in ('queries', 'layers/layer_1/attention/key/kernel'):
    moved = ours[f'params/item_encoder/{name}'] - theirs[f'params/qformer/{name}']
    assert 0 < np.abs(moved).max() < 5e-3

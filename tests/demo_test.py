"""`ilm demo` with tiny models on MovieLens-100K: all of it, again, and after an interruption."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ilm_jax.demo import STAGES_FILE, demo
from ilm_jax.errors import UsageError
from ilm_jax.evaluation.report import text_summary
from ilm_jax.runtime.metric_log import JSONL_FILE, read_jsonl
from tests.support import tiny_run

STAGES = [
  'prepare', 'train phase1', 'train ilm', 'train mlp', 'evaluate mlp', 'evaluate ilm',
]  # fmt: skip
SECTIONS = {
  'title', 'summary', 'settings', 'stages', 'rankings', 'comparisons', 'curves', 'embedding_map',
  'users', 'descriptions', 'generation', 'notes',
}  # fmt: skip


@pytest.fixture(scope='session')
def finished(tmp_path_factory):
  """The directory that `make smoke` leaves, and what it printed."""

  def make(folder):
    script = str(Path(__file__).parent / 'smoke.py')
    done = subprocess.run(
      [sys.executable, script, str(folder / 'demo')], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (folder / 'out').write_text(done.stdout)
    (folder / 'err').write_text(done.stderr)

  folder = tiny_run.shared(tmp_path_factory, 'smoke', make)
  return folder / 'demo', (folder / 'out').read_text(), (folder / 'err').read_text()


@pytest.fixture
def again(finished, tmp_path):
  """A copy, and what runs the demo there: the language model is that of the settings."""
  shutil.copytree(finished[0], tmp_path / 'demo')
  lm = str(finished[0] / 'lm')
  return tmp_path / 'demo', lambda: demo(output=tmp_path / 'demo', lm=lm, smoke=True)


def read(path):
  return json.loads(path.read_text())


def stages_run(shown):
  """Names of stages that were run, and of those that were not, from what is printed."""
  lines = [line for line in shown.splitlines() if line.startswith('demo: ')]
  names = [line.removeprefix('demo: ').partition(':')[0] for line in lines]
  skipped = [name for name, line in zip(names, lines) if 'done before' in line]
  return [name for name, line in zip(names, lines) if line.endswith(f'{name}:')], skipped


@pytest.mark.slow
@pytest.mark.network
def test_every_stage_runs_and_shows_its_command(finished):
  directory, out, err = finished
  assert stages_run(err) == (STAGES, [])
  seconds = read(directory / STAGES_FILE)['seconds']
  assert list(seconds) == STAGES
  assert all(value > 0 for value in seconds.values())
  for stage in STAGES:
    assert f'\n  ilm {stage.split()[0]} --' in err
  assert 'its figures mean nothing' in out
  assert (directory / 'report.html').stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.network
def test_the_report_has_what_was_measured(finished):
  directory, out, _ = finished
  report = read(directory / 'report.json')
  assert text_summary(report) in out  # and it is as report.SCHEMA says
  assert set(report) == SECTIONS
  assert [stage['name'] for stage in report['stages']] == STAGES

  ilm, mlp = (read(directory / name / 'evaluation' / 'evaluation.json') for name in ('ilm', 'mlp'))
  rows = [row for row in ilm['rows'] + mlp['rows'] if row['seen'] == 'removed']
  assert len(report['rankings']) == len(rows)
  for shown, row in zip(report['rankings'], rows):
    assert shown['users'] == row['users']
    assert shown['name'] == (row['method'] if row['model'] == 'reference' else row['model'])
    assert shown['kind'] == {'own': 'model', '': 'reference'}.get(row['condition'], 'control')
    check_intervals(shown['metrics'], row['metrics'])

  # Pairs that the evaluation compared too have its figures.
  found = [c['differences'] for c in ilm['comparisons'] if c['a'].endswith('own/removed')]
  means = [{name: i['mean'] for name, i in c['metrics'].items()} for c in report['comparisons']]
  known = [{name: i['mean'] for name, i in c.items()} for c in found]
  assert all(mean in known for mean in means[:3])
  # The others are of a reference: the difference of the means, on the same users.
  own = report['rankings'][0]['metrics']['MRR']['mean']
  for c, name in zip(report['comparisons'][3:], ('popularity', 'itemknn_recency', 'ials_recency')):
    (row,) = [row for row in rows if row['method'] == name]
    assert c['b'] == name
    difference = own - row['metrics']['MRR']['mean']
    assert c['metrics']['MRR']['mean'] == pytest.approx(difference, abs=1e-9)

  genres = ilm['texts']['genres: semantic consistency']
  (shown,) = [g for g in report['generation'] if g['what'] == 'genres: semantic consistency']
  check_intervals({'own': shown['own']}, genres)
  check_intervals({'own - shuffled_items': shown['difference']}, genres)
  by_truth = {(e['item'], e['generated']) for e in ilm['examples']}
  for description in report['descriptions']:
    assert (description['title'].removesuffix(': genres'), description['generated']) in by_truth


def check_intervals(shown, measured):
  for name, interval in shown.items():
    assert interval == {key: measured[name][key] for key in ('mean', 'low', 'high')}


@pytest.mark.slow
@pytest.mark.network
def test_the_report_knows_users_and_items(finished):
  from ilm_jax.data.prepared_records import load_prepared

  directory = finished[0]
  report = read(directory / 'report.json')
  prepared = load_prepared(directory / 'ml100k')
  titles = prepared.item_text['title']
  assert len(report['users']) == 5
  for shown in report['users']:
    user = prepared.user_keys.index(shown['name'].removeprefix('user '))
    history = [titles[item] for item in prepared.history(user)]
    assert shown['history'] == history[-10:]
    assert shown['next'] == titles[prepared.test_items[user]]
    recommended = [r['title'] for r in shown['recommended']]
    assert len(recommended) == 10
    if shown['rank'] <= 10:
      assert recommended[shown['rank'] - 1] == shown['next']
    else:
      assert shown['next'] not in recommended or titles.count(shown['next']) > 1
    scores = [r['score'] for r in shown['recommended']]
    assert scores == sorted(scores, reverse=True)
  points = report['embedding_map']['points']
  assert [point['title'] for point in points] == titles
  curves = {curve['title']: curve for curve in report['curves']}
  assert len(curves) == 3
  assert [s['name'] for s in curves['Phase 2: loss of the next item of a history']['series']] == [
    'ilm', 'mlp',
  ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.network
def test_a_second_call_makes_the_report_and_nothing_else(again, capfd):
  directory, call = again
  before = contents(directory)
  (directory / 'report.html').unlink()
  call()
  assert stages_run(capfd.readouterr().err) == ([], STAGES)
  assert contents(directory) == before


@pytest.mark.slow
@pytest.mark.network
def test_a_stage_that_was_interrupted_is_done_again(again, capfd):
  """What it left is no evaluation, and is replaced; no other stage is run."""
  directory, call = again
  before = contents(directory)
  values = read(directory / STAGES_FILE)
  del values['seconds']['evaluate mlp']
  (directory / STAGES_FILE).write_text(json.dumps(values))
  evaluation = directory / 'mlp' / 'evaluation'
  for file in evaluation.iterdir():
    file.unlink()
  (evaluation / 'left over').touch()
  call()
  ran, skipped = stages_run(capfd.readouterr().err)
  assert ran == ['evaluate mlp']
  assert skipped == [stage for stage in STAGES if stage != 'evaluate mlp']
  after = read(directory / STAGES_FILE)
  assert after['seconds'].pop('evaluate mlp') > 0
  assert after == values
  # The same figures again, but for times, the path of the copy, and rounding: a program read
  # from the compilation cache need not add in the order of the one that was compiled then.
  changed = {name for name, value in contents(directory).items() if before[name] != value}
  found = read(evaluation / 'evaluation.json')
  rows = json.loads(before['mlp/evaluation/evaluation.json'])['rows']
  for row, old in zip(found['rows'], rows, strict=True):
    metrics, others = row.pop('metrics'), old.pop('metrics')
    assert row == old
    means, expected = ({name: x['mean'] for name, x in each.items()} for each in (metrics, others))
    assert means == pytest.approx(expected, abs=2 / 943)  # two of the users, at most
  files = {f'mlp/evaluation/{name}' for name in ('evaluation.json', 'ranks.npz')}
  assert changed <= {STAGES_FILE, 'report.json', 'report.html', *files}


def contents(directory):
  return {
    str(path.relative_to(directory)): path.read_bytes()
    for path in directory.rglob('*')
    if path.is_file()
  }


@pytest.mark.parametrize('change', [{'lm': 'smollm2_135m'}, {'smoke': False}, {'seed': 1}])
def test_another_demo_in_the_same_directory_is_refused(tmp_path, change):
  settings = {'lm': 'nowhere', 'jobs': 'demo', 'smoke': True, 'seed': 0}
  stages = json.dumps({'settings': settings, 'seconds': {'prepare': 1.0}})
  (tmp_path / STAGES_FILE).write_text(stages)
  with pytest.raises(UsageError, match=r'holds a demo with .*, not with .*: name another output'):
    demo(output=tmp_path, **(settings | change))
  assert (tmp_path / STAGES_FILE).read_text() == stages


def test_a_stage_that_fails_is_told_and_not_done(tmp_path, capfd):
  settings = {'lm': 'nowhere', 'jobs': 'demmo', 'smoke': True, 'seed': 0}
  values = {'settings': settings, 'seconds': {'prepare': 1.0}}
  (tmp_path / STAGES_FILE).write_text(json.dumps(values))
  with pytest.raises(UsageError, match=r'train phase1 ended with status 2; .* Run the demo again'):
    demo(output=tmp_path, lm='nowhere', jobs='demmo', smoke=True)
  assert 'demmo_phase1.gin' in capfd.readouterr().err
  assert read(tmp_path / STAGES_FILE) == values
  assert {path.name for path in tmp_path.iterdir()} == {STAGES_FILE, '.lock'}


@pytest.mark.network
def test_a_demo_that_is_stopped_stops_its_stage_and_one_that_is_killed_locks_others_out(tmp_path):
  directory = tmp_path / 'demo'

  def start():
    command = [sys.executable, '-m', 'ilm_jax.main', 'demo', f'--output={directory}', '--smoke']
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
      if line.startswith('  ilm prepare'):
        return process
    raise AssertionError(f'ended with {process.wait()}')

  def lock_is_free():
    with open(directory / '.lock') as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        return False
    return True

  process = start()
  time.sleep(0.5)  # the handler is set right after the stage has started
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=60) == -signal.SIGTERM
  assert lock_is_free()  # the stage holds it as long as it runs
  assert not (directory / STAGES_FILE).exists()

  process = start()
  time.sleep(0.5)
  process.kill()
  assert process.wait(timeout=60) == -signal.SIGKILL
  with pytest.raises(UsageError, match='another demo is at work there, or a stage of one that was'):
    demo(output=directory, smoke=True)
  children = subprocess.run(['pgrep', '-f', str(directory)], capture_output=True, text=True)
  for pid in children.stdout.split():
    os.kill(int(pid), signal.SIGKILL)
  deadline = time.monotonic() + 60
  while not lock_is_free():
    assert time.monotonic() < deadline
    time.sleep(0.1)


@pytest.mark.network
@pytest.mark.slow
def test_phase_2_is_not_validated_as_it_is_evaluated_next(finished):
  for name, expected in (('phase1', True), ('ilm', False), ('mlp', False)):
    keys = {key for line in read_jsonl(finished[0] / name / JSONL_FILE) for key in line}
    assert any(key.startswith('train/') for key in keys)
    assert any(key.startswith('validation/') for key in keys) == expected

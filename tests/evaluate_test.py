"""`ilm evaluate` on a tiny trained run: figures recomputed in loops, controls, refusals."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ilm_jax.cf import rankers
from ilm_jax.errors import UsageError
from ilm_jax.evaluate import evaluate
from ilm_jax.evaluation.results import Results
from ilm_jax.main import main
from ilm_jax.metrics import ranking
from ilm_jax.serving.recommender import Recommender
from ilm_jax.train import train
from tests.support import eight_devices, tiny_run
from tests.support.evaluations import (
  CONDITIONS,
  SEQUENTIAL,
  TASKS,
  USERS,
  check_metrics,
  histories,
  others,
  words,
)
from tests.support.plain_lm import PlainLm

FILES = ['evaluation.json', 'evaluation.txt', 'ranks.npz']


# ---------------------------------------------------------------- what it leaves


@pytest.mark.slow
def test_eight_devices_share_the_rows_and_find_the_same(tmp_path, run, results):
  flags = {'name': 'eight', 'tasks': [SEQUENTIAL], 'methods': ['readout', 'exact', 'beam']}
  flags |= {'conditions': ['own'], 'rankers': [], 'beam_size': 30}
  mesh = {'data': 2, 'fsdp': 2, 'tensor': 2}
  done = subprocess.run(
    [sys.executable, '-m', 'ilm_jax.main', *words(run, tmp_path / 'eight', mesh=mesh, **flags)],
    env={**os.environ, **eight_devices.ENVIRONMENT},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  found = Results.load(tmp_path / 'eight').rows
  assert len(found) == 6
  for row in found:
    way = {name: getattr(row, name) for name in ('task', 'method', 'condition', 'seen')}
    expected = results.row(**way)
    np.testing.assert_array_equal(row.users, expected.users)
    # Scores that are nearly equal may change places.
    moved = np.abs(row.ranks.better - expected.ranks.better)
    assert moved.max() <= 1, (way, moved)
    assert np.mean(moved > 0) < 0.1, (way, moved)


def test_the_files(evaluated, results):
  assert sorted(p.name for p in evaluated.iterdir()) == FILES
  values = json.loads((evaluated / 'evaluation.json').read_text())
  assert values['facts'] == {
    'model': 'tiny',
    'model_dir': values['facts']['model_dir'],
    'split': 'test',
    'data': 'films',
    'lm': values['facts']['lm'],
    'checkpoint': 'best',
    'tuned_on': 'validation',
  }
  expected = {('history', 'readout', c) for c in CONDITIONS[:-1]}
  expected |= {(task, 'exact', c) for task in TASKS for c in CONDITIONS}
  expected |= {(task, 'beam', c) for task in TASKS for c in CONDITIONS[:-1]}
  expected |= {('', name, '') for name in rankers.RANKERS}
  rows = [(r.task, r.method, r.condition, r.seen) for r in results.rows]
  assert set(rows) == {(*way, seen) for way in expected for seen in ('removed', 'kept')}
  assert len(rows) == len(set(rows))
  for row in results.rows:
    assert row.model == ('tiny' if row.condition else 'reference')
    by_prompt = row.method in ('exact', 'beam')
    assert row.users.tolist() == list(range(USERS if by_prompt else tiny_run.NUM_USERS))
  table = (evaluated / 'evaluation.txt').read_text()
  for row in results.rows:
    assert str(row.intervals['NDCG@10']) in table
  assert 'rating_seen_title: RMSE' in table


def test_what_is_compared(results, evaluated):
  """Own with each control, on the same users; and the readout with the best of texts."""
  values = json.loads((evaluated / 'evaluation.json').read_text())['comparisons']
  found = {(c['a'], c['b']): c for c in values}
  assert len(found) == len(values)
  ways = [('history', 'readout', CONDITIONS[1:-1])]
  ways += [(task, 'exact', CONDITIONS[1:]) for task in TASKS]
  ways += [(task, 'beam', CONDITIONS[1:-1]) for task in TASKS]
  count = 0
  for task, method, conditions in ways:
    for condition in conditions:
      for seen in ('removed', 'kept'):
        pair = [
          results.row(task=task, method=method, condition=c, seen=seen) for c in ('own', condition)
        ]
        c = found[f'tiny {pair[0].name}', f'tiny {pair[1].name}']
        expected = ranking.paired_bootstrap(*(row.metrics['MRR'] for row in pair))
        assert c['differences']['MRR'] == dataclasses.asdict(expected)
        assert c['users'] == len(pair[0].users)
        count += 1
  for task in TASKS:
    for seen in ('removed', 'kept'):
      c = found[f'tiny history/readout/own/{seen}', f'tiny {task}/exact/text_only/{seen}']
      readout = results.row(method='readout', condition='own', seen=seen).metrics['MRR'][:USERS]
      text = results.row(task=task, condition='text_only', seen=seen).metrics['MRR']
      assert c['differences']['MRR'] == dataclasses.asdict(ranking.paired_bootstrap(readout, text))
      assert c['users'] == USERS
      count += 1
  assert count == len(values)


def test_references_are_those_of_the_data(results, model):
  for found in rankers.evaluate_rankers(model.prepared, splits=['test']):
    seen = 'removed' if found.seen_removed else 'kept'
    row = results.row(method=found.ranker, seen=seen)
    for name, values in found.metrics.items():
      np.testing.assert_array_equal(row.metrics[name], values)


# ---------------------------------------------------------------- rankings by hand


@pytest.mark.parametrize('condition', CONDITIONS[:-1])
def test_the_readout(results, model, plain, condition):
  """A control changes soft tokens, and neither what they are compared with nor the candidates."""
  prepared, items = model.prepared, range(tiny_run.NUM_ITEMS)
  own = histories(prepared)
  read, soft = own, plain.soft(items)
  if condition == 'shuffled_users':
    read = [own[other] for other in others(prepared.num_users)]
  elif condition == 'shuffled_items':
    soft = soft[others(len(items))]
  elif condition == 'zeroed':
    soft = np.zeros_like(soft)
  scores = plain.readout_scores_of(read, soft=soft, vectors=plain.vectors(items))
  for seen in ('removed', 'kept'):
    row = results.row(method='readout', condition=condition, seen=seen)
    check_metrics(row, scores, prepared.test_items, own if seen == 'removed' else [[]] * len(own))


@pytest.mark.parametrize('condition', ['own', 'zeroed'])
def test_exact_of_a_prompt(results, model, plain, condition):
  """The prompt 'After {history:soft} comes', each title by a plain pass; twins tie."""
  prepared = model.prepared
  users = range(USERS)
  bias, scores = plain.bias(), []
  for history in histories(prepared, users):
    pieces = ['After', history[-6:][0]]
    for item in history[-6:][1:]:
      pieces += [',', item]
    row = plain.prompt([*pieces, ' comes'])
    if condition == 'zeroed':
      begin = len(plain.prompt(['After']))
      k, separator = 2, len(model.phase.vocabulary.encode_segment(','))
      for n in range(len(history[-6:])):
        first = begin + n * (k + separator)
        row[first : first + k] = 0
    scores.append(plain.title_scores(row, bias))
  for seen in ('removed', 'kept'):
    row = results.row(task=SEQUENTIAL, method='exact', condition=condition, seen=seen)
    own = histories(prepared, users) if seen == 'removed' else [[]] * USERS
    check_metrics(row, scores, prepared.test_items[:USERS], own)


# ---------------------------------------------------------------- texts


def values_of(evaluated, name):
  return json.loads((evaluated / 'evaluation.json').read_text())['texts'][name]


def test_expected_ratings(evaluated, model, plain):
  """The mean of ' 1' to ' 5' by their probabilities, after the prompt that asks for a rating."""
  vocabulary = model.phase.vocabulary
  texts = [(*vocabulary.encode_segment(f' {n}'), vocabulary.eos_id) for n in range(1, 6)]
  prepared = model.prepared
  errors = []
  for user, history in enumerate(histories(prepared, range(USERS))):
    pieces = [tiny_run.NUM_ITEMS + user, ' saw', history[-6:][0]]
    for item in history[-6:][1:]:
      pieces += [',', item]
    pieces += [' and rates', int(prepared.test_items[user]), ' with']
    log_probs = plain.text_scores(plain.prompt(pieces), texts)
    assert np.exp(log_probs).sum() == pytest.approx(1)
    expected = np.exp(log_probs) @ np.arange(1, 6)
    errors.append((expected - prepared.test_ratings[user]) ** 2)
  found = values_of(evaluated, 'rating_seen_title: RMSE')
  assert found['own']['mean'] == pytest.approx(np.sqrt(np.mean(errors)), abs=1e-3)
  assert set(found) == set(CONDITIONS[:-1])
  assert len({round(i['mean'], 9) for i in found.values()}) == 4


def test_perplexity(evaluated, model, plain):
  """-log p of the targets' tokens over all of the vocabulary, 16 examples."""
  nll, tokens = 0.0, 0
  for user in range(16):
    history = histories(model.prepared, [user])[0]
    pieces = ['After', history[-6:][0]]
    for item in history[-6:][1:]:
      pieces += [',', item]
    title = plain.titles[model.prepared.test_items[user]]
    prompt = plain.prompt([*pieces, ' comes'])
    for n, logits in plain.edges(prompt, [title]).items():
      nll += np.logaddexp.reduce(logits) - logits[title[len(n)]]
      tokens += 1
  found = values_of(evaluated, f'{SEQUENTIAL}: log-perplexity')
  assert found['own']['mean'] == pytest.approx(nll / tokens, rel=1e-4)
  assert set(found) == {'own', 'shuffled_items', 'zeroed'}
  assert len({i['mean'] for i in found.values()}) == 3


@pytest.mark.network
def test_what_is_said_of_held_out_items(run, tmp_path, model):
  results = evaluate(
    model_dir=run,
    output=tmp_path / 'out',
    methods=[],
    losses=[],
    rankers=[],
    fields=['genres'],
    max_texts=8,
  )
  items = np.flatnonzero(model.prepared.heldout_items)
  titles, genres = (model.prepared.item_text[field] for field in ('title', 'genres'))
  prompt = 'The genres of the film {item} are'
  said = model.describe(items, prompt=prompt, max_new_tokens=24)
  assert [e['item'] for e in results.examples] == [titles[i] for i in items]
  assert [e['truth'] for e in results.examples] == [genres[i] for i in items]
  assert [e['generated'] for e in results.examples] == said
  shuffled = others(len(items))
  assert [e['shuffled'] for e in results.examples] == [said[i] for i in shuffled]
  f1 = [float(set(said[n].replace(',', ' ').split()) == {genres[i]}) for n, i in enumerate(items)]
  assert results.texts['genres: F1']['own'].mean == pytest.approx(np.mean(f1))
  assert set(results.texts['genres: semantic consistency']) == {
    'own', 'shuffled_items', 'own - shuffled_items',
  }  # fmt: skip
  assert not [name for name in results.texts if name.startswith('title:')]


# ---------------------------------------------------------------- two runs


def test_two_runs_are_compared_user_by_user(run, evaluated, results, tmp_path):
  """A run with itself, another checkpoint, fewer users."""
  output = tmp_path / 'other'
  flags = {'methods': ['readout', 'exact'], 'conditions': ['own'], 'losses': [], 'rankers': []}
  argv = words(run, output, checkpoint=12, name='late', compare_to=[str(evaluated)], **flags)
  assert main([*argv, '--max_users=9']) == 0
  late = Results.load(output)
  found = json.loads((output / 'evaluation.json').read_text())['comparisons']
  assert len(found) == 2 * (1 + len(TASKS))
  for c in found:
    way = c['a'].removeprefix('late ')
    assert c['b'] == f'tiny {way}'
    a, b = (next(r for r in rows if r.name == way) for rows in (late.rows, results.rows))
    assert c['users'] == (9 if a.method == 'exact' else tiny_run.NUM_USERS)
    difference = a.metrics['rank_pct'] - b.metrics['rank_pct'][: c['users']]
    assert c['differences']['rank_pct']['mean'] == pytest.approx(difference.mean())
  assert any(c['differences']['rank_pct']['mean'] for c in found)


def test_other_items_are_not_compared(run, evaluated, tmp_path):
  with pytest.raises(UsageError, match=r"compare_to: .* has split='test', this has 'validation'"):
    evaluate(
      model_dir=run, output=tmp_path / 'out', split='validation', compare_to=[evaluated], fields=[]
    )


# ---------------------------------------------------------------- a run without soft tokens


def test_a_run_on_text_alone(tmp_path, capsys):
  """It has its prompts with titles, and no control; what needs soft tokens is told."""
  options = tiny_run.settings_of_trained(tmp_path)
  options |= {
    'schedule': [SEQUENTIAL],
    'total_steps': 2,
    'eval_every': 2,
    'save_every': 2,
    'item_encoder': {'kind': 'none'},
    'losses': {'readout': False, 'target_loss': 'catalogue'},
    'lm': options['lm'] | {'trained': True},
  }
  train(model_dir=tmp_path / 'run', **options)
  found = evaluate(
    model_dir=tmp_path / 'run',
    conditions=CONDITIONS,
    tasks=['sequential_unseen_title'],  # the only one that has titles
    losses=[SEQUENTIAL],
    rankers=[],
    max_users=4,
    max_texts=4,
  )
  shown = capsys.readouterr().err
  assert 'no soft tokens: there is nothing to shuffle' in shown
  assert 'readout: not with this run, which has exact, beam' in shown
  ways = [(row.method, row.condition, row.seen) for row in found.rows]
  assert ways == [
    ('exact', condition, seen) for condition in ('own', 'text_only') for seen in ('removed', 'kept')
  ]
  assert set(found.texts) >= {f'{SEQUENTIAL}: log-perplexity'}
  model = Recommender.load(tmp_path / 'run')
  with pytest.raises(UsageError, match='has no soft tokens'):
    model.describe([0])
  with pytest.raises(UsageError, match=r"no template asks for 'genres' .* nothing"):
    evaluate(model_dir=tmp_path / 'run', output=tmp_path / 'out', fields=['genres'])
  # What is trained is what ranks: a plain pass of the trained weights.
  plain = PlainLm(model)
  plain.frozen = dataclasses.replace(model.frozen, lm=model.params['lm'])
  (ranked,) = model.top_for_prompts([('After this comes', [])], k=30, method='exact')
  counts = np.bincount(model.prepared.items, minlength=30) + 1.0
  popularity = {
    path: np.log(sum(n for n, t in zip(counts, plain.titles) if t[: len(path)] == path))
    for title in plain.titles
    for path in (title[: i + 1] for i in range(len(title)))
  }
  expected = plain.title_scores(plain.prompt(['After this comes']), popularity)
  np.testing.assert_allclose([s for _, s in ranked], expected[[i for i, _ in ranked]], atol=2e-3)


# ---------------------------------------------------------------- mistakes


def test_an_output_that_is_there_is_not_touched(run, evaluated, capsys):
  before = {p.name: p.read_bytes() for p in evaluated.iterdir()}
  assert main(words(run, evaluated)) == 2
  assert 'exists already: name another output' in capsys.readouterr().err
  assert {p.name: p.read_bytes() for p in evaluated.iterdir()} == before


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ({'methods': ['exakt']}, r"evaluate\.methods: 'exakt' is none of .* Did you mean 'exact'"),
    ({'conditions': ['zero']}, r"evaluate\.conditions: 'zero' .* Did you mean 'zeroed'"),
    ({'rankers': ['popular']}, r"evaluate\.rankers: 'popular' .* Did you mean 'popularity'"),
    ({'tasks': ['sequental_seen_title']}, r"Did you mean 'sequential_seen_title'"),
    ({'tasks': ['item_sequence']}, r"no task 'item_sequence' ranks items"),
    ({'tasks': ['rating_seen_title']}, r"no task 'rating_seen_title' ranks items"),
    (
      {'fields': ['genre']},
      r"no template asks for 'genre' .* title, genres.*Did you mean 'genres'",
    ),
    ({'compare_to': [Path('nowhere')]}, r'nowhere is no evaluation'),
    ({'checkpoint': '5'}, r"'latest', or a step"),
  ],
  ids=lambda x: '-'.join(f'{k}={v}' for k, v in x.items()) if isinstance(x, dict) else '',
)
def test_wrong_settings_are_told_before_anything_is_measured(run, tmp_path, flags, message):
  with pytest.raises(UsageError, match=message):
    evaluate(model_dir=run, output=tmp_path / 'out', **flags)
  assert not list(tmp_path.iterdir())


def test_no_run_is_told(run, tmp_path):
  with pytest.raises(UsageError, match='is no run of `ilm train`'):
    evaluate(model_dir=tmp_path / 'runn')
  copied = tmp_path / 'run'
  shutil.copytree(run, copied)
  shutil.rmtree(copied / 'checkpoints')
  with pytest.raises(UsageError, match='no complete checkpoint'):
    evaluate(model_dir=copied)


# ---------------------------------------------------------------- how far it is


def test_every_part_is_told_while_it_runs(evaluated):
  """Each of them, to its end, in batches of what is measured."""
  shown = (evaluated.parent / 'shown.txt').read_text()
  users = {'exact': USERS, 'beam': 2 * USERS}  # seen items removed and kept
  expected = {f'readout, {c}': tiny_run.NUM_USERS for c in CONDITIONS[:-1]}
  expected |= {
    f'{task}, {method}, {c}': users[method]
    for task in TASKS
    for method in users
    for c in CONDITIONS[:-1]
  }
  expected |= {f'{task}, text_only': 16 + USERS for task in TASKS}  # 16 that weights are tuned on
  expected['reference rankers'] = len(rankers.RANKERS)
  expected |= {f'rating_seen_title, RMSE, {c}': USERS for c in CONDITIONS[:-1]}
  ends = re.findall(r'^evaluate (\d+)/(\d+), (.+): example (\d+)/(\d+) \(100 %\)', shown, re.M)
  found = {label: (int(done), int(total)) for _, _, label, done, total in ends}
  losses = [label for label in found if 'log-perplexity' in label]
  assert {label: found[label] for label in found if label not in losses} == {
    label: (total, total) for label, total in expected.items()
  }
  assert {found[label] for label in losses} == {(16, 16)}
  assert f'{SEQUENTIAL}, log-perplexity, own' in losses
  assert [int(number) for number, *_ in ends] == list(range(1, len(found) + 1))
  assert {int(number) for _, number, *_ in ends} == {len(found)}
  for label in found:
    assert re.search(rf'^evaluate \d+/\d+, {label}: (\d+ min )?\d+ s$', shown, re.M)


def test_what_is_said_is_told_too(model):
  counts = []
  soft = model.soft_tokens(np.arange(20))
  model.say(soft, max_new_tokens=1, done=counts.append)
  assert counts == [16, 4]


def test_losses_of_no_task_are_told(run, tmp_path):
  message = r"evaluate\.losses: no task 'sequental_seen_title' .* Did you mean 'sequential_seen"
  with pytest.raises(UsageError, match=message):
    evaluate(model_dir=run, output=tmp_path / 'out', losses=['sequental_seen_title'])

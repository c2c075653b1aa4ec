"""What is measured under controls and of the language model alone; and by SeqIO itself."""

import copy
import dataclasses

import jax
import numpy as np
import pytest

from ilm_jax.data.input.feature_converter import ItemLMFeatureConverter
from ilm_jax.data.text.text_tokens import TextTokens
from ilm_jax.decoding.calibration import calibrated, tune_calibration
from ilm_jax.evaluation.measurements import Measure
from ilm_jax.serving.recommender import Recommender
from tests.support import tiny_run
from tests.support.evaluations import (
  CONDITIONS,
  SEQUENTIAL,
  TASKS,
  USERS,
  check_metrics,
  histories,
  others,
)


class Recording(Recommender):
  """Keeps the prompts that it was asked about, and what it said."""

  def __init__(self, phase, params, frozen):
    super().__init__(phase, params, frozen)
    self.asked = []

  def prompt_scores(self, prompts, **changes):
    scores = super().prompt_scores(prompts, **changes)
    self.asked.append((prompts, scores))
    return scores


def measure_of(phase, params, frozen):
  return Measure(Recording(phase, params, frozen), 'tiny', max_users=USERS, max_texts=16)


@pytest.fixture(scope='module')
def measure(model):
  return measure_of(model.phase, model.params, model.frozen)


def asked(measure, task, condition):
  """The prompts of a task under a condition, [USERS, T], and the scores [USERS, I] after them."""
  measure.prompts(f'films_{task}', condition=condition)
  return measure.recommender.asked[-1]


# ---------------------------------------------------------------- the same in other ways


@pytest.mark.parametrize('task', TASKS)
def test_exact_is_what_seqio_measures(results, model, task):
  """seqio.Evaluator with the metrics of the task itself, seen items kept."""
  phase = model.phase
  name = f'films_{task}'
  converter = ItemLMFeatureConverter(
    slot_id=phase.vocabulary.slot_id, num_soft_tokens=2, bos_id=phase.first_token
  )
  evaluator = phase.seqio.Evaluator(
    name,
    converter,
    eval_split='test',
    sequence_length=phase.lengths(name),
    num_examples=USERS,
  )

  def score(dataset, _=None):
    found = []
    for number, features in dataset.as_numpy_iterator():
      prompt = model.prompts_of({key: x[None] for key, x in features.items()})
      (scores,) = model.prompt_scores(prompt, bias=model.catalogue_bias)
      found.append((int(number), scores))
    return found

  metrics, _ = evaluator.evaluate(compute_metrics=True, score_fn=score)
  row = results.row(task=task, method='exact', condition='own', seen='kept')
  found = {k: float(v) for k, v in metrics.result()[name].items()}
  assert found == pytest.approx({k: i.mean for k, i in row.intervals.items()}, abs=1e-9)


@pytest.mark.parametrize('condition', CONDITIONS[:-1])
@pytest.mark.parametrize('task', TASKS)
def test_a_beam_as_wide_as_the_catalogue_ranks_as_exact(results, task, condition):
  for seen in ('removed', 'kept'):
    exact, beam = (
      results.row(task=task, method=method, condition=condition, seen=seen).ranks
      for method in ('exact', 'beam')
    )
    np.testing.assert_array_equal(beam.better, exact.better)
    np.testing.assert_array_equal(beam.tied, exact.tied)
    np.testing.assert_array_equal(beam.candidates, exact.candidates)


# ---------------------------------------------------------------- controls


def test_controls_change_rankings(results):
  """All of them, or what they are compared with says nothing. (A user is no item.)"""
  for task, method in (('history', 'readout'), *((task, 'exact') for task in TASKS)):
    for condition in CONDITIONS[1:]:
      if (task, condition) in (('history', 'text_only'), (TASKS[1], 'shuffled_items')):
        continue
      own, control = (
        results.row(task=task, method=method, condition=c, seen='kept').ranks.better
        for c in ('own', condition)
      )
      assert (own != control).any(), (task, condition)


@pytest.mark.parametrize('condition', ['zeroed', 'shuffled_items'])
def test_controls_of_the_model_change_soft_tokens_alone(measure, model, condition):
  params, frozen = measure.changed(condition)
  for own, changed, spared in (
    (model.params, params, 'adaptor'),
    (dataclasses.asdict(model.frozen), dataclasses.asdict(frozen), 'entity_vectors'),
  ):
    touched = condition == ('zeroed' if spared == 'adaptor' else 'shuffled_items')
    for name, value in own.items():
      same = jax.tree.map(lambda a, b: np.array_equal(a, b), value, changed[name])
      assert all(jax.tree.leaves(same)) is not (touched and name == spared), name
  trained = model.phase.model
  slot = model.phase.vocabulary.slot_id
  tokens = np.array([[5, slot, slot, 9, slot, slot, 6, 7]], np.int32)
  user = tiny_run.NUM_ITEMS + 3
  ids = np.array([[4, user]], np.int32)
  own, found = (
    np.asarray(trained.embed(p, f, tokens, ids), np.float32)[0]
    for p, f in ((model.params, model.frozen), (params, frozen))
  )
  text = tokens[0] != slot
  np.testing.assert_array_equal(own[text], found[text])
  if condition == 'zeroed':
    assert not found[~text].any()
  else:
    other = others(tiny_run.NUM_ITEMS)[4]
    expected = np.asarray(
      trained.embed(model.params, model.frozen, tokens, np.array([[other, user]]))
    )[0]
    np.testing.assert_allclose(found, expected, atol=1e-6)
  assert own[~text].all()


def test_another_users_soft_tokens(measure, model):
  """Prompts keep their text; their entities are another user's, as many as there are slots."""
  task = 'sequential_unseen_title'  # which has the user, and titles
  prompts, changed = (asked(measure, task, condition)[0] for condition in CONDITIONS[:2])
  np.testing.assert_array_equal(changed.tokens, prompts.tokens)
  np.testing.assert_array_equal(changed.lengths, prompts.lengths)
  slots = (prompts.tokens == model.phase.vocabulary.slot_id).sum(axis=1)
  np.testing.assert_array_equal((changed.entity_ids >= 0).sum(axis=1) * 2, slots)
  for row in range(USERS):
    own, other = (set(p.entity_ids[row]) - {-1} for p in (prompts, changed))
    users = [{e for e in ids if e >= tiny_run.NUM_ITEMS} for ids in (own, other)]
    assert users[0] == {tiny_run.NUM_ITEMS + row}
    assert users[1] == {tiny_run.NUM_ITEMS + (row - 1) % USERS}
    assert other <= set(prompts.entity_ids[row - 1])


# ---------------------------------------------------------------- the language model alone


@pytest.mark.parametrize('task', [SEQUENTIAL, 'sequential_unseen_title'])
def test_text_only_reads_titles_and_no_slot(measure, model, task):
  prompts, _ = asked(measure, task, 'text_only')
  assert not (prompts.tokens == model.phase.vocabulary.slot_id).any()
  assert (prompts.entity_ids == -1).all()
  titles = model.prepared.item_text['title']
  for user, (tokens, length) in enumerate(zip(prompts.tokens, prompts.lengths)):
    text = model.phase.vocabulary.decode(tokens[1:length].tolist())
    history = [titles[i] for i in histories(model.prepared, [user])[0][-6:]]
    begin = 'After ' if task == SEQUENTIAL else f'user {user + 1} has seen '
    end = ' comes' if task == SEQUENTIAL else '. Next:'
    assert text == f'{begin}{", ".join(history)}{end}'


def test_what_text_only_reads_decides_alone(measure, model):
  """The soft tokens of a run are in none of its scores."""
  zeroed = measure_of(model.phase, *measure.changed('zeroed'))
  scores, without = (asked(x, SEQUENTIAL, 'text_only')[1] for x in (measure, zeroed))
  assert scores.shape == (USERS, tiny_run.NUM_ITEMS)
  np.testing.assert_array_equal(without, scores)


def test_text_only_by_hand(results, measure, model, plain):
  """Titles after titles, less a neutral prompt, plus popularity; weights of the validation."""
  titles = model.prepared.item_text['title']
  counts = np.bincount(model.prepared.items, minlength=tiny_run.NUM_ITEMS) + 1.0

  def scores(split, users):
    found = []
    for history in histories(model.prepared, users, split):
      names = ', '.join(titles[i] for i in history[-6:])
      found.append(plain.title_scores(plain.prompt([f'After {names} comes'])))
    return np.array(found)

  neutral = plain.title_scores(plain.neutral())
  tuned_on = range(16)  # max_texts
  offsets = np.cumsum([0, *map(len, histories(model.prepared, tuned_on, 'validation'))])
  seen = np.concatenate(histories(model.prepared, tuned_on, 'validation'))
  weights = tune_calibration(
    scores('validation', tuned_on),
    neutral,
    np.log(counts),
    model.prepared.validation_items[:16],
    (offsets, seen),
  )
  assert measure.text_calibration(SEQUENTIAL) == weights
  expected = calibrated(scores('test', range(USERS)), neutral, np.log(counts), *weights)
  own = histories(model.prepared, range(USERS))
  for kept in (False, True):
    row = results.row(task=SEQUENTIAL, condition='text_only', seen='kept' if kept else 'removed')
    check_metrics(row, expected, model.prepared.test_items[:USERS], [[]] * USERS if kept else own)


def test_the_weights_of_text_only_know_no_test_item(measure, model):
  """With other test items they stay, and the ranks do not."""
  before = measure.prompts(f'films_{SEQUENTIAL}', condition='text_only')[1].ranks
  prepared = model.prepared
  changed = dataclasses.replace(prepared, test_items=(prepared.test_items + 7) % 30)
  phase = copy.copy(model.phase)
  phase.prepared = changed
  phase.texts = TextTokens(
    changed, phase.vocabulary, dataset=phase.texts.dataset, max_text_tokens=16
  )
  other = measure_of(phase, model.params, model.frozen)
  after = other.prompts(f'films_{SEQUENTIAL}', condition='text_only')[1].ranks
  assert other.text_calibration(SEQUENTIAL) == measure.text_calibration(SEQUENTIAL)
  assert (before.better != after.better).any()

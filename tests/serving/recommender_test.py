"""A trained run that ranks and says: against plain forward passes in loops."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ilm_jax.decoding.generator import Generator
from ilm_jax.decoding.sampling import SamplingOptions
from ilm_jax.errors import UsageError
from ilm_jax.lm.load import load_lm
from ilm_jax.phases.phase import InputOptions
from ilm_jax.phases.settings import PhaseSettings
from ilm_jax.runtime.metric_log import read_jsonl
from ilm_jax.runtime.sharding import DEFAULT_RULES, make_mesh
from ilm_jax.serving.recommender import Recommender
from tests.support import tiny_run

HISTORIES = [[3, 17, 5], [29], [0, 1, 2, 3, 4, 5, 6, 7], [11, 12]]
# Beside it, a prompt is padded as histories are: what is compiled for them runs it too.
FIVE = ('{item}, {item}, {item}, {item}, {item}', [9, 10, 11, 12, 13])
SIXTEEN = list(range(14, 30))  # as many as are described at once
EVERY = 50  # more items than there are, of a beam: one program


def twins(model):
  """The two items of one title."""
  titles = model.prepared.item_text['title']
  return [i for i, title in enumerate(titles) if titles.count(title) == 2]


def history_prompt(model, plain, history):
  """What the template 'After {history:soft} comes' makes, in pieces."""
  last = history[-6:]  # history_length
  pieces = ['After', last[0]]
  for item in last[1:]:
    pieces += [',', item]
  return plain.prompt([*pieces, ' comes'])


# ---------------------------------------------------------------- ranking


@pytest.mark.parametrize('exclude_seen', [True, False])
def test_the_readout_ranks_by_its_scores(model, plain, exclude_seen):
  found = model.top(HISTORIES, k=7, exclude_seen=exclude_seen)
  for history, ranking in zip(HISTORIES, found):
    scores = plain.readout_scores(history)
    allowed = [i for i in range(30) if not (exclude_seen and i in history)]
    expected = sorted((scores[i] for i in allowed), reverse=True)[:7]
    assert len(ranking) == 7
    np.testing.assert_allclose([score for _, score in ranking], expected, atol=1e-4)
    for item, score in ranking:
      assert item in allowed
      assert score == pytest.approx(scores[item], abs=1e-4)
  every = model.readout_scores(HISTORIES)
  order = np.argsort(-every, axis=1, kind='stable')
  unseen = [[i for i in row if not (exclude_seen and i in h)] for row, h in zip(order, HISTORIES)]
  assert [[i for i, _ in ranking] for ranking in found] == [row[:7] for row in unseen]


def test_exact_is_the_log_probability_of_every_title(model, plain):
  """Over the tokens that may follow in the catalogue, with the bias, from one plain pass."""
  found = model.top(HISTORIES, k=30, method='exact', exclude_seen=False)
  bias = plain.bias()
  for history, ranking in zip(HISTORIES, found):
    expected = plain.title_scores(history_prompt(model, plain, history), bias)
    assert sorted(i for i, _ in ranking) == list(range(30))
    assert [s for _, s in ranking] == sorted((s for _, s in ranking), reverse=True)
    np.testing.assert_allclose(
      [s for _, s in ranking], expected[[i for i, _ in ranking]], atol=1e-4
    )
    # They are probabilities, of texts: the twins' is that of both.
    first, second = twins(model)
    scores = dict(ranking)
    assert scores[first] == scores[second]
    assert sum(np.exp(s) for i, s in ranking if i != second) == pytest.approx(1, abs=1e-4)
  spread = np.std([dict(ranking)[0] for ranking in found])
  assert spread > 1e-2  # histories are read


def test_the_bias_makes_up_for_what_titles_are_worth(model):
  """Of nobody, it is said what is popular."""
  neutral = ('One person saw films, and then', [])
  ranking, _ = model.top_for_prompts([neutral, FIVE], k=30, method='exact')
  counts = np.bincount(model.prepared.items, minlength=30) + 1.0
  total = counts.sum()
  counts[twins(model)] = counts[twins(model)].sum()  # of one text
  expected = [np.log(counts[item] / total) for item, _ in ranking]
  np.testing.assert_allclose([score for _, score in ranking], expected, atol=1e-4)


def test_bfloat16_products_are_as_near_as_their_rounding(run, model, monkeypatch):
  """A title's score is a sum over its tokens, each off by some roundings of 2^-8."""
  monkeypatch.setenv('ILM_CPU_BFLOAT16', '1')
  rounded = Recommender.load(run).top(HISTORIES, k=30, method='exact', exclude_seen=False)
  exact = model.top(HISTORIES, k=30, method='exact', exclude_seen=False)
  for found, expected in zip(map(dict, rounded), map(dict, exact)):
    errors = np.array([abs(found[item] - score) for item, score in expected.items()])
    assert 0 < errors.max() < model.phase.text.max_text_tokens * 2**-7


@pytest.mark.parametrize('exclude_seen', [True, False])
def test_a_beam_of_the_whole_catalogue_is_exact(model, exclude_seen):
  exact, beam = (
    model.top(HISTORIES, k=EVERY, method=method, exclude_seen=exclude_seen)
    for method in ('exact', 'beam')
  )
  for history, found, expected in zip(HISTORIES, beam, exact):
    assert len(found) == 30 - exclude_seen * len(history)
    np.testing.assert_allclose([s for _, s in found], [s for _, s in expected], atol=1e-4)
    scores = dict(expected)
    assert all(scores[item] == pytest.approx(score, abs=1e-4) for item, score in found)
    assert sorted(scores) == sorted(item for item, _ in found)
    assert not exclude_seen or not scores.keys() & set(history)


def test_a_narrow_beam_has_the_scores_of_what_it_finds(model):
  exact = model.top(HISTORIES, k=30, method='exact')
  for history, found, scores in zip(
    HISTORIES, model.top(HISTORIES, k=3, method='beam'), map(dict, exact)
  ):
    assert len(found) == 3
    assert len({item for item, _ in found}) == 3
    for item, score in found:
      assert item not in history
      assert score == pytest.approx(scores[item], abs=1e-4)


@pytest.mark.parametrize('method', ['readout', 'exact', 'beam'])
def test_what_is_asked_for_and_no_more(model, method):
  """A user who has seen all but three items gets those; items are of the catalogue, each once."""
  history = [i for i in range(30) if i not in (2, 9, 13)]
  (ranking,) = model.top([history], k=EVERY, method=method)
  assert sorted(item for item, _ in ranking) == [2, 9, 13]
  (ranking,) = model.top([history], k=EVERY, method=method, exclude_seen=False)
  assert sorted(item for item, _ in ranking) == list(range(30))
  assert model.top([], k=5, method=method) == []


def test_twins_come_with_equal_scores(model):
  first, second = twins(model)
  history = [i for i in range(30) if i not in (first, second, 6)]
  for method in ('exact', 'beam'):
    (ranking,) = model.top([history], k=2 + 1, method=method)
    scores = dict(ranking)
    assert scores[first] == scores[second]
    assert 6 in scores
  # One of them seen: the other may come.
  ranking, _ = model.top([[first], HISTORIES[2]], k=EVERY, method='beam')
  assert second in dict(ranking)
  assert first not in dict(ranking)


def test_an_empty_history(model):
  """By the readout: popularity. By text there is nothing to go on from."""
  counts = np.bincount(model.prepared.items, minlength=30)
  (ranking,) = model.top([[]], k=30)
  assert [counts[item] for item, _ in ranking] == sorted(counts, reverse=True)
  assert ranking[0][1] == pytest.approx(np.log(counts.max() + 1))
  for method in ('exact', 'beam'):
    with pytest.raises(UsageError, match='a history is empty'):
      model.top([[1, 2], []], k=3, method=method)


@pytest.mark.parametrize('method', ['readout', 'exact', 'beam'])
def test_what_is_beside_a_prompt_does_not_matter(model, method):
  """20 rows are two batches, the second of which is filled up; and all are as long as one of them.

  The readout sees of a prompt its items, which are a history.
  """
  rng = np.random.default_rng(0)
  histories = [rng.choice(30, 11 if i == 7 else 5, replace=False).tolist() for i in range(20)]
  prompts = [
    ('word ' * (60 if row == 7 else 1) + '{item}, ' * len(items), items)
    for row, items in enumerate(histories)
  ]
  rank = functools.partial(model.top_for_prompts, k=EVERY, method=method)
  together = rank(prompts)
  for place in (0, 15, 16, 19):
    (alone,) = rank([prompts[place]])
    scores = dict(together[place])
    assert scores.keys() == dict(alone).keys()
    for item, score in alone:
      assert score == pytest.approx(scores[item], abs=1e-4)


def test_a_beam_leaves_out_what_each_user_has_seen_in_all_batches(model):
  rng = np.random.default_rng(1)
  histories = [rng.choice(30, 10, replace=False).tolist() for _ in range(20)]
  for history, ranking in zip(histories, model.top(histories, k=EVERY, method='beam')):
    assert sorted(item for item, _ in ranking) == sorted({*range(30)} - {*history})


# ---------------------------------------------------------------- prompts


def test_prompts_with_items_in_them(model, plain):
  prompts = [
    ('I liked {item} and {item}. Next:', [7, 21]),
    ('Something for a rainy day:', []),
    ('{item}', [4]),
    FIVE,
  ]
  pieces = [['I liked', 7, ' and', 21, '. Next:'], ['Something for a rainy day:'], [4]]
  pieces += [[9, ',', 10, ',', 11, ',', 12, ',', 13]]
  found = model.top_for_prompts(prompts, k=30, method='exact', exclude_seen=False)
  bias = plain.bias()
  for parts, ranking in zip(pieces, found):
    expected = plain.title_scores(plain.prompt(parts), bias)
    np.testing.assert_allclose(
      [s for _, s in ranking], expected[[i for i, _ in ranking]], atol=1e-4
    )
  beams = model.top_for_prompts(prompts, k=EVERY, method='beam')
  for (_, items), ranking, beam in zip(prompts, found, beams):
    unseen = [(i, s) for i, s in ranking if i not in items]
    np.testing.assert_allclose([s for _, s in beam], [s for _, s in unseen], atol=1e-4)
    assert not {i for i, _ in beam} & set(items)


def test_by_the_readout_the_items_of_a_prompt_are_a_history(model):
  prompts = [('Whatever {item} {item}', [7, 21]), ('{item}', [3])]
  assert model.top_for_prompts(prompts, k=5) == model.top([[7, 21], [3]], k=5)


@pytest.mark.parametrize(
  ('prompt', 'message'),
  [
    (('Like {item}', [1, 2]), '1 times {item}, but 2 items'),
    (('Like {item} or {item}', [1]), '2 times {item}, but 1 items'),
    (('word ' * 600 + '{item}', [1]), r'a prompt has \d+ tokens; .* Shorten the history'),
    ((f'{tiny_run.SLOT} {{item}}', [1]), 'contains the slot token'),
  ],
  ids=['more_items', 'fewer_items', 'long', 'slot'],
)
def test_prompts_that_are_wrong(model, prompt, message):
  with pytest.raises(UsageError, match=message):
    model.top_for_prompts([('{item}', [2]), prompt], k=3, method='exact')


def test_the_longest_prompt_that_fits(model, plain):
  """The tokens of the prefix, the prompt and the longest title are the model's 512."""
  depth = max(map(len, plain.titles))
  room = 512 - len(model.phase.model.prefix_tokens) - depth
  texts = [' '.join(['word'] * n) for n in range(1, 600)]
  lengths = [1 + len(model.phase.vocabulary.encode_segment(text)) for text in texts]
  longest, longer = max(n for n in lengths if n <= room), min(n for n in lengths if n > room)
  prompt = texts[lengths.index(longest)]
  assert len(model.top_for_prompts([(prompt, [])], k=30, method='exact')[0]) == 30
  prompt = texts[lengths.index(longer)]
  with pytest.raises(UsageError, match=f'a prompt has {longer} tokens; .* {room} is the most'):
    model.top_for_prompts([(prompt, [])], k=3, method='exact')


@pytest.mark.parametrize('ask', ['top', 'top_for_prompts'])
def test_an_unknown_method(model, ask):
  rows = [[1]] if ask == 'top' else [('{item}', [1])]
  with pytest.raises(UsageError, match=r"this run has readout, exact, beam\. Did you mean 'exact'"):
    getattr(model, ask)(rows, k=3, method='exakt')


# ---------------------------------------------------------------- saying


def test_soft_tokens_are_in_what_is_said(model, plain):
  """Greedy decoding, a token at a time by plain passes."""
  texts = model.describe(SIXTEEN, prompt='The genres of the film {item} are', max_new_tokens=8)
  for item, text in list(zip(SIXTEEN, texts))[::2]:
    said = plain.greedy(plain.prompt(['The genres of the film', item, ' are']), 8)
    assert text == model.phase.vocabulary.decode(said).strip()
  assert len(set(texts)) > 1


def test_another_vector_says_something_else(model):
  vectors = np.roll(np.asarray(model.frozen.entity_vectors), -1, axis=0)
  frozen = dataclasses.replace(model.frozen, entity_vectors=jnp.asarray(vectors))
  rolled = Recommender(model.phase, model.params, frozen)
  texts = model.describe(SIXTEEN, max_new_tokens=8)
  assert rolled.describe(SIXTEEN[:-1], max_new_tokens=8) == texts[1:]
  prompt = [model.phase.vocabulary.bos_id, *[model.phase.vocabulary.slot_id] * 2]
  title = model.phase.vocabulary.encode(' Drama')
  own, other = model.generator.score(
    [prompt] * 2, [title] * 2, soft_tokens=list(model.soft_tokens(np.array(SIXTEEN))[:2])
  )
  assert np.abs(own - other).max() > 1e-3


def test_the_default_prompt_is_the_first_about_an_item(model):
  prompt = 'The title of the film {item} is'
  expected = model.describe(SIXTEEN, prompt=prompt, max_new_tokens=8)
  assert model.describe(SIXTEEN, max_new_tokens=8) == expected
  assert model.describe([]) == []


# ---------------------------------------------------------------- the language model is as it was


def test_without_entities_the_language_model_is_itself_to_the_bit(model, run):
  """The same texts, log-probabilities and logits as of the checkpoint that was loaded alone."""
  options = json.loads((run / 'phase.json').read_text())['options']
  alone = load_lm(options['lm']['name'])
  prompts = ['The capital of France is', 'One person saw films, and then', 'x']
  rows = [alone.prompt_tokens(prompt) for prompt in prompts]
  generator = Generator(alone.module, alone.params, alone.vocabulary, max_rows=16)
  ours, theirs = (g.complete(rows, SamplingOptions(12)) for g in (model.generator, generator))
  assert ours == theirs
  assert len({found.tokens for found in ours}) == 3

  @functools.partial(jax.jit, static_argnums=0)
  def logits_of(lm, weights, embeddings):
    hidden, _ = lm.apply({'params': weights}, embeddings)
    return lm.apply({'params': weights}, hidden, method='logits')

  trained, longest = model.phase.model, max(map(len, rows))
  tokens = np.array([[*row, *[0] * (longest - len(row))] for row in rows], np.int32)
  nobody = np.full((len(rows), 3), -1, np.int32)
  logits = [
    np.asarray(logits_of(lm, weights, embeddings))
    for lm, weights, embeddings in (
      (
        trained.lm,
        model.frozen.lm,
        jax.jit(trained.embed)(model.params, model.frozen, tokens, nobody),
      ),
      (alone.module, alone.params, alone.embed(tokens)),
    )
  ]
  assert logits[0].tobytes() == logits[1].tobytes()
  assert min(row[: len(tokens)].std() for row, tokens in zip(logits[0], rows)) > 0.1


# ---------------------------------------------------------------- loading


@pytest.fixture(scope='module')
def doctored(run, tmp_path_factory):
  """The run, with step 4 as the best: it is not the latest then."""
  copy = tmp_path_factory.mktemp('doctored') / 'run'
  shutil.copytree(run, copy)
  for step, value in ((4, 0.9), (8, 0.2), (12, 0.1)):
    file = copy / 'checkpoints' / str(step) / 'eval_metrics' / 'metadata'
    metrics = json.loads(file.read_text())
    assert 'readout/NDCG@10' in metrics
    file.write_text(json.dumps(metrics | {'readout/NDCG@10': value}))
  return copy


@pytest.mark.parametrize(('which', 'step'), [('best', 4), ('latest', 12), ('8', 8)])
def test_which_checkpoint(doctored, which, step):
  loaded = Recommender.load(doctored, checkpoint=which)
  saved = tiny_run.arrays_of(doctored, step)
  leaves = jax.tree.leaves_with_path(loaded.params)
  names = [jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in leaves]
  assert {f'params/{n}' for n in names} == {n for n in saved if n.startswith('params/')}
  for name, (_, value) in zip(names, leaves):
    np.testing.assert_array_equal(np.asarray(value), saved[f'params/{name}'], err_msg=name)
  other = tiny_run.arrays_of(doctored, 8 if step != 8 else 4)
  assert (other['params/gain'] != saved['params/gain']).any()


def test_the_best_is_that_of_the_curves(run, model):
  """Of equal ones the later."""
  rows = [row for row in read_jsonl(run / 'metrics.jsonl') if 'validation/readout/NDCG@10' in row]
  best = max(rows, key=lambda row: (row['validation/readout/NDCG@10'], row['step']))
  gain = tiny_run.arrays_of(run, best['step'])['params/gain']
  assert np.asarray(model.params['gain']) == gain
  found = model.phase.evaluate_readout(model.params, model.frozen, 'validation')
  mean = found.intervals['NDCG@10'].mean
  assert mean == pytest.approx(best['validation/readout/NDCG@10'], abs=1e-6)


def test_the_data_may_be_elsewhere(run, model, tmp_path):
  values = json.loads((run / 'phase.json').read_text())
  copy = tmp_path / 'run'
  shutil.copytree(run, copy)
  moved = tmp_path / 'moved'
  shutil.copytree(values['data'], moved)
  (copy / 'phase.json').write_text(json.dumps(values | {'data': str(tmp_path / 'gone')}))
  with pytest.raises(UsageError, match='gone'):
    Recommender.load(copy)
  found = Recommender.load(copy, data=moved)
  assert found.top([[3]], k=3) == model.top([[3]], k=3)


def test_what_cannot_be_loaded(run, tmp_path):
  with pytest.raises(UsageError, match=r"'best', 'latest', or a step of .*: 4, 8, 12"):
    Recommender.load(run, checkpoint='5')
  with pytest.raises(UsageError, match=r"is no run of `ilm train`.*Did you mean 'run'"):
    Recommender.load(run.with_name('runn'))
  with pytest.raises(UsageError, match=r'is no run of `ilm train`'):
    Recommender.load(tmp_path)


def test_a_run_of_phase_1_is_told_what_it_is(run, tmp_path):
  data = Path(json.loads((run / 'phase.json').read_text())['data'])
  settings = PhaseSettings(
    'item_text', {'item_encoder': {'size': 'tiny'}, 'text': {'vocabulary': 'bytes'}}
  )
  inputs = InputOptions(data, None, {'item_text': 8}, 0, make_mesh({'data': 1}), DEFAULT_RULES)
  settings.save(tmp_path, inputs)
  with pytest.raises(UsageError, match=r'is a run of phase 1.*--gin\.PHASE1='):
    Recommender.load(tmp_path)

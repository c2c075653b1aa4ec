"""The Python interface: what the recommender says, by titles and ids."""

import subprocess
import sys

import numpy as np
import pytest

import ilm_jax
from ilm_jax.errors import UsageError
from ilm_jax.serving.model import Model

HISTORY = [3, 7, 11]


@pytest.fixture(scope='module')
def by_name(model):
  return Model(model)


@pytest.fixture(scope='module')
def names(by_name):
  return [by_name.titles[i] for i in HISTORY]


def test_import_is_light():
  code = 'import sys, ilm_jax; print(sorted({"jax", "numpy", "tensorflow"} & set(sys.modules)))'
  assert subprocess.check_output([sys.executable, '-c', code], text=True).strip() == '[]'


def test_load_is_of_a_directory(run, names):
  loaded = ilm_jax.load(str(run), checkpoint=12)
  assert loaded.methods == ('readout', 'exact', 'beam')
  assert len(loaded.recommend(history=names, k=3)) == 3


@pytest.mark.parametrize('method', ['readout', 'exact'])
def test_recommendations_are_the_recommenders(by_name, names, method):
  """By titles, by ids, and by the scores of all items."""
  model = by_name.recommender
  keys = model.prepared.item_keys
  (expected,) = model.top([HISTORY], k=5, method=method)
  found = by_name.recommend(history=names, k=5, method=method)
  assert found == [(by_name.titles[i], keys[i], score) for i, score in expected]
  assert by_name.recommend(history=[f'#{keys[i]}' for i in HISTORY], k=5, method=method) == found
  scores = by_name.score(history=names, method=method)
  unseen = [i for i in np.argsort(-scores, kind='stable') if i not in HISTORY]
  assert [keys[i] for i in unseen[:5]] == [r.item for r in found]
  np.testing.assert_array_equal(by_name.score(names, history=names, method=method), scores[HISTORY])


def test_a_user_is_all_of_his_history(by_name):
  model = by_name.recommender
  prepared = model.prepared
  items = [*prepared.history(4, 'test').tolist(), int(prepared.test_items[4])]
  (expected,) = model.top([items], k=5)
  found = by_name.recommend(user=prepared.user_keys[4], k=5)
  assert [r.score for r in found] == [score for _, score in expected]


def test_a_prompt_has_its_items_soft_tokens(by_name, names):
  """Of one item, against `say`, which takes soft tokens; of two, against the recommender."""
  model = by_name.recommender
  prompt = f'After {{{names[0]}}}, {{{names[1]}}} comes'
  assert by_name.recommend(prompt=prompt, method='exact') == by_name.recommend(
    prompt=f'After {{#{model.prepared.item_keys[3]}}}, {{{names[1]}}} comes', method='exact'
  )
  soft = by_name.soft_tokens(names[:2])
  assert soft.shape == (2, 2, model.phase.lm.module.config.d_model)
  text = 'After {item}, {item} comes'
  found = by_name.complete(prompt, max_new_tokens=6)
  assert found == model.complete(text, HISTORY[:2], max_new_tokens=6)
  (about,) = model.say(soft[:1], prompt='The title of the film {item} is', max_new_tokens=6)
  assert by_name.complete(f'The title of the film {{{names[0]}}} is', max_new_tokens=6) == about
  assert isinstance(by_name.complete('After that', max_new_tokens=2), str)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({}, 'one of user, history, prompt is needed'),
    ({'history': ['x'], 'user': 'u1'}, 'user and history'),
    ({'history': 'Crime Film 4'}, r"write \['Crime Film 4'\]"),
    ({'history': ['No Such Film']}, 'no item has the title or id'),
    ({'user': 'nobody'}, 'no user "nobody"'),
    ({'user': 'u1', 'k': 0}, 'k=0: at least 1'),
    ({'user': 'u1', 'method': 'exakt'}, "Did you mean 'exact'"),
  ],
)
def test_what_is_wrong_is_told(by_name, arguments, message):
  with pytest.raises(UsageError, match=message):
    by_name.recommend(**arguments)


def test_a_beam_scores_no_catalogue(by_name):
  with pytest.raises(UsageError, match="use 'exact'"):
    by_name.score(user='u1', method='beam')

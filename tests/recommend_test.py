"""`ilm recommend` with itemKNN in the place of a trained model."""

import io
import json
from collections import Counter

import numpy as np
import pytest

from ilm_jax.cf import rankers
from ilm_jax.config import flags as config_flags
from ilm_jax.errors import UsageError
from ilm_jax.recommend import Options, answer, interact, recommend, run, typed_lines
from ilm_jax.serving.requests import Reader


class KnnRecommender:
  """Ranks by `rankers.item_knn_recency` or `item_knn`: a ranker with the API of the trained one."""

  methods = ('recency', 'all_rows')

  def __init__(self, prepared):
    self.prepared = prepared
    self.batches = []  # (method, size) of each call

  def top(self, histories, *, k, method=None, exclude_seen=True):
    self.batches.append((method, len(histories)))
    ranker = rankers.item_knn if method == 'all_rows' else rankers.item_knn_recency
    prepared, rankings = self.prepared, []
    for items in histories:
      # The user of the history comes after those of the data set; each alone, since the rows of
      # another would change the cosines.
      sequences = rankers.Sequences(
        np.append(prepared.offsets, prepared.offsets[-1] + len(items)),
        np.append(prepared.items, np.array(items, np.int32)),
        prepared.num_items,
      )
      scores = ranker(sequences)(np.array([prepared.num_users]))[0]
      order = [i for i in np.argsort(-scores, kind='stable') if not (exclude_seen and i in items)]
      rankings.append([(int(item), float(scores[item])) for item in order[:k]])
    return rankings

  def top_for_prompts(self, prompts, *, k, method=None, exclude_seen=True):
    for text, items in prompts:
      assert text.count('{item}') == len(items)
      if len(text) > 60:
        raise UsageError(f'the prompt has {len(text)} letters, and 60 are the most.')
    histories = [items for _, items in prompts]
    return self.top(histories, k=k, method=method, exclude_seen=exclude_seen)

  def describe(self, items):
    return [self.prepared.item_text['genres'][item] for item in items]


@pytest.fixture
def recommender(small_prepared):
  return KnnRecommender(small_prepared)


def _answers(recommender, lines, **options):
  options = Options(**options)
  reader = Reader(recommender.prepared, hide_last=options.hide_last)
  texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
  requests = reader.read(texts, 'requests', options.on_error)
  return [line for batch in answer(recommender, requests, options) for line in batch]


def _unique_titles(prepared):
  titles = prepared.item_text['title']
  return [item for item in range(prepared.num_items) if titles.count(titles[item]) == 1]


def _knn_by_hand(prepared, history, k, exclude_seen=True):
  """Scores of itemKNN with recency, from sets of users in Python; {item: score} of the best k."""
  users = {item: set() for item in range(prepared.num_items)}
  for user in range(prepared.num_users):
    for item in prepared.items[prepared.offsets[user] : prepared.offsets[user + 1]]:
      users[int(item)].add(user)
  for item in history:
    users[item].add('new')

  def cosine(a, b):
    size = (len(users[a]) * len(users[b])) ** 0.5
    return len(users[a] & users[b]) / size if size and a != b else 0.0

  scores = {
    item: sum(0.8**age * cosine(item, old) for age, old in enumerate(history[::-1][:20]))
    for item in range(prepared.num_items)
    if not (exclude_seen and item in history)
  }
  return dict(sorted(scores.items(), key=lambda pair: -pair[1])[:k])


def test_users_histories_and_prompts_in_the_order_of_the_lines(recommender, small_prepared):
  p = small_prepared
  titles = p.item_text['title']
  first, second, third = _unique_titles(p)[:3]
  user = 5
  assert p.validation_items[user] >= 0
  assert p.test_items[user] >= 0
  rows = p.items[p.offsets[user] : p.offsets[user + 1]].tolist()
  lines = [
    {'prompt': f'I loved {{{titles[first]}}} and {{#{p.item_keys[second]}}}. Now?', 'id': 'a'},
    {'user': p.user_keys[user], 'id': {'nested': 1}},
    {'history': [titles[third][:-7].lower(), f'#{p.item_keys[first]}']},
  ]
  histories = [
    [first, second],
    [*rows, int(p.validation_items[user]), int(p.test_items[user])],
    [third, first],
  ]
  for seen_removed in (True, False):
    answers = _answers(recommender, lines, k=6, exclude_seen=seen_removed)
    assert len(answers) == 3
    for line, history, answered in zip(lines, histories, answers):
      assert {key: answered[key] for key in line} == line
      expected = _knn_by_hand(p, history, 6, seen_removed)
      rows_of = answered['recommendations']
      assert [row['rank'] for row in rows_of] == [1, 2, 3, 4, 5, 6]
      np.testing.assert_allclose([row['score'] for row in rows_of], list(expected.values()))
      every = _knn_by_hand(p, history, p.num_items, seen_removed)
      for row in rows_of:
        item = p.item_keys.index(row['item'])
        assert row['title'] == titles[item]
        assert row['score'] == pytest.approx(every[item])
      assert 'next' not in answered


def test_the_hidden_test_item_is_told_with_its_rank(recommender, small_prepared):
  p = small_prepared
  lines = [{'user': key} for key in p.user_keys]
  answers = _answers(recommender, lines, k=10, hide_last=True)
  found = 0
  for user, answered in enumerate(answers):
    target = int(p.test_items[user])
    assert target >= 0
    scores = _knn_by_hand(p, p.history(user, 'test').tolist(), p.num_items)
    better = sum(score > scores[target] + 1e-12 for score in scores.values())
    tied = sum(abs(score - scores[target]) < 1e-12 for score in scores.values()) - 1
    rank = answered['next']['rank']
    assert answered['next']['item'] == p.item_keys[target]
    assert answered['next']['title'] == p.item_text['title'][target]
    if rank is None:
      assert better + tied >= 10
    else:
      assert better < rank <= better + tied + 1
      assert answered['next'].get('tied', False) == (tied > 0)
      found += 1
  assert 0 < found < p.num_users


def test_ties_are_marked_also_with_what_is_not_shown(recommender, small_prepared):
  # Without a history all items score 0.
  (answered,) = _answers(recommender, [{'prompt': 'Anything good?'}], k=1)
  (row,) = answered['recommendations']
  assert row['tied'] is True
  for answered in _answers(recommender, [{'user': key} for key in small_prepared.user_keys], k=39):
    rows = answered['recommendations']
    counts = Counter(row['score'] for row in rows)
    assert [row.get('tied', False) for row in rows] == [counts[row['score']] > 1 for row in rows]


def test_batches_have_one_method_and_change_nothing(recommender, small_prepared):
  title = small_prepared.item_text['title'][_unique_titles(small_prepared)[0]]
  lines = [
    {'prompt': f'{{{title}}}!', 'n': n} if n % 3 == 1 else {'user': small_prepared.user_keys[n]}
    for n in range(11)
  ]
  alone = _answers(recommender, lines, batch_size=1, method='all_rows')
  assert recommender.batches == [('all_rows', 1)] * 11
  recommender.batches.clear()
  assert _answers(recommender, [*lines, '', ' \n'], batch_size=4, method='all_rows') == alone
  assert recommender.batches == [('all_rows', n) for n in (3, 1, 2, 2, 2, 1)]
  assert _answers(recommender, lines) != alone  # another method


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('{"user": ', 'not JSON (Expecting value'),
    ('{"user": "u00", "weight": NaN}', 'NaN is not allowed'),
    ('["u00"]', 'not an object such as {"user": "196"}: \'["u00"]\'.'),
    ('{}', 'one of user, history, prompt is needed, but there are the keys (none).'),
    ('{"promt": "a"}', "there are the keys promt. Did you mean 'prompt'?"),
    ('{"user": "u00", "history": []}', 'but there are user and history.'),
    ('{"user": "u99"}', 'no user "u99" in small, which has 60 users, by the source\'s ids: "u'),
    ('{"user": 7}', 'no user 7 in small'),
    ('{"history": []}', 'history is a list of titles, but here it is [].'),
    ('{"history": "Heat"}', 'history is a list of titles, but here it is "Heat".'),
    ('{"history": [1.5]}', 'an item is a title or an id, but here it is 1.5.'),
    ('{"history": [true]}', 'an item is a title or an id, but here it is true.'),
    ('{"history": [12]}', "or the id '12'; an id is '#i"),
    ('{"history": ["Film Nmber 3"]}', "Nearest: 'Film Number 3 (1953)' (#i03)"),
    ('{"history": ["film number 8"]}', "'film number 8' may be 'Film Number 8 (1958)' (#i0"),
    ('{"prompt": ""}', 'prompt is a text, but here it is "".'),
    ('{"prompt": "I loved {Film Number 3"}', 'a brace without its other one; write "{TITLE}".'),
    ('{"prompt": "I loved {item}"}', "no item has the title or id 'item'"),
    ('{"user": "u00", "error": 1}', "'error' is a key of the output"),
    (json.dumps({'prompt': 'long ' * 20}), 'the prompt has 100 letters, and 60 are the most.'),
  ],
)
def test_a_mistake_in_a_line_stops_or_is_reported(recommender, line, message):
  good = [{'user': 'u01'}, {'prompt': 'What now, after {#i03}?'}]
  lines = [good[0], '', line, good[1]]
  with pytest.raises(UsageError) as error:
    _answers(recommender, lines)
  assert str(error.value).startswith('requests, line 3: ')
  assert message in str(error.value)

  first, wrong, last = _answers(recommender, lines, on_error='report')
  assert message in wrong.pop('error')
  try:
    given = json.loads(line, parse_constant=lambda _: None)
  except ValueError:
    given = None
  readable = isinstance(given, dict) and 'weight' not in given
  assert wrong == ({k: v for k, v in given.items() if k != 'error'} if readable else {'line': 3})
  assert [first, last] == _answers(recommender, good)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'method': 'recencey'}, "ranks by recency, all_rows. Did you mean 'recency'?"),
    ({'k': 41}, 'k=41, but the catalogue has 40 items.'),
    ({'k': 0}, 'k=0, but it is at least 1.'),
    ({'batch_size': 0}, 'batch_size=0, but it is at least 1.'),
  ],
)
def test_options_are_checked_before_anything_is_read(recommender, options, message):
  with pytest.raises(UsageError) as error:
    run(recommender, Options(**options))  # standard input must not be read under pytest
  assert message in str(error.value)


def test_files(recommender, small_prepared, tmp_path, capsys):
  source, target = tmp_path / 'in.jsonl', tmp_path / 'out.jsonl'
  lines = [{'user': key, 'note': 'é'} for key in small_prepared.user_keys]
  source.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  run(recommender, Options(k=3, batch_size=8), str(source), str(target))
  written = target.read_text(encoding='utf-8')
  assert '"note": "é"' in written
  assert [json.loads(line) for line in written.splitlines()] == _answers(recommender, lines, k=3)
  out, err = capsys.readouterr()
  assert out == ''
  assert 'recommend: step 60/60 (100 %)' in err
  assert 'examples/s' in err
  assert 'ETA 0 s' in err
  assert '60 lines in 0 s' in err
  with pytest.raises(UsageError, match='exists already: name another file'):
    run(recommender, Options(), str(source), str(target))
  assert target.read_text(encoding='utf-8') == written


def test_a_file_is_complete_or_absent(recommender, small_prepared, tmp_path):
  source, target = tmp_path / 'in.jsonl', tmp_path / 'out.jsonl'
  lines = [{'user': key} for key in small_prepared.user_keys[:5]]
  # Only the recommender finds this one, when others have been written.
  source.write_text('\n'.join(map(json.dumps, [*lines, {'prompt': 'long ' * 20}])))
  with pytest.raises(UsageError, match=r'in\.jsonl, line 6: the prompt has 100 letters'):
    run(recommender, Options(batch_size=2), str(source), str(target))
  assert len(recommender.batches) == 3
  assert [path.name for path in tmp_path.iterdir()] == ['in.jsonl']
  # This one is found when the file is read, before anything is ranked.
  recommender.batches.clear()
  source.write_text('\n'.join(map(json.dumps, [*lines, {'user': 'nobody'}])))
  with pytest.raises(UsageError, match=r'in\.jsonl, line 6: no user "nobody"'):
    run(recommender, Options(batch_size=2), str(source), str(target))
  assert recommender.batches == []
  source.write_bytes(b'{"user": "\xff"}\n')
  with pytest.raises(UsageError, match='is not text in UTF-8'):
    run(recommender, Options(), str(source), str(target))
  assert [path.name for path in tmp_path.iterdir()] == ['in.jsonl']


def test_standard_input_and_output(recommender, capsys, monkeypatch):
  monkeypatch.setattr('sys.stdin', io.StringIO('{"user": "u01"}\n\n{"user": "nobody"}\n'))
  run(recommender, Options(k=2, on_error='report'))
  out, err = capsys.readouterr()
  good, wrong = map(json.loads, out.splitlines())
  assert [good] == _answers(recommender, [{'user': 'u01'}], k=2)
  assert wrong['user'] == 'nobody'
  assert 'no user "nobody"' in wrong['error']
  assert '2 lines, 1 of them with errors in ' in err
  assert 'step' not in err


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    (['--model_dir=m', '--k=0'], 'k=0'),
    (['--model_dir=m', '--input=nowhere.jsonl'], "input='nowhere.jsonl': no such file"),
    (['--model_dir=m', '--output=nowhere/x.jsonl'], "there is no directory 'nowhere'"),
    (['--model_dir=m', '--output=.'], "output='.' exists already"),
    (['--model_dir=m', '--seen=remove'], "Did you mean 'removed'"),
    (['--model_dir=m', '--on_error=skip'], "'report'"),
    (['--model_dir=m', '--interactive', '--input=a', '--history=test'], 'but input, history is'),
    (['--k=3'], 'model_dir'),
  ],
)
def test_mistakes_in_flags_are_told_before_a_model_is_loaded(argv, message):
  with pytest.raises(UsageError) as error:
    config_flags.run(recommend, argv)
  assert message in str(error.value)


def test_help(capsys):
  with pytest.raises(SystemExit):
    config_flags.run(recommend, ['--help'])
  out = capsys.readouterr().out
  for flag in ('--model_dir', '--input', '--on_error', '--interactive', '--history'):
    assert flag in out


def _dialogue(recommender, *lines, **options):
  out = io.StringIO()
  interact(recommender, lines, Options(**options), out)
  return out.getvalue()


def test_a_dialogue(recommender, small_prepared):
  p = small_prepared
  answered = _dialogue(
    recommender, 'film number 3; #i05', '', ':k 2', '#i03;#i05;', ':quit', '#i01'
  )
  history = [p.item_keys.index('i03'), p.item_keys.index('i05')]
  expected = _knn_by_hand(p, history, 10)
  lines = answered.splitlines()
  assert len(lines) == 10 + any('=' in line for line in lines) + 1 + 2
  for rank, (line, score) in enumerate(zip(lines, expected.values()), start=1):
    assert line.split()[0].rstrip('=') == str(rank)
    assert line.endswith(f'{score:.4f}')
    assert line[6:].split('  ')[0] in p.item_text['title']
  assert lines[-3] == 'k is 2 now'
  # The best two again, less widely set; after :quit nothing.
  assert [line.split() for line in lines[-2:]] == [line.split() for line in lines[:2]]


def test_a_dialogue_marks_ties(recommender, small_prepared):
  items = [small_prepared.item_keys.index('i39')]
  scores = [score for _, score in recommender.top([items], k=40)[0]]
  counts = Counter(scores)
  assert 1 < len(counts) < len(scores)
  *rows, legend = _dialogue(recommender, '#i39', k=40).splitlines()
  assert [line[4] for line in rows] == ['=' if counts[score] > 1 else ' ' for score in scores]
  assert legend.strip().startswith('= equal scores')


def test_commands_and_mistakes_of_a_dialogue(recommender, small_prepared):
  genres = small_prepared.item_text['genres'][small_prepared.item_keys.index('i05')]
  steps = {
    'Film Nmber 3': "Nearest: 'Film Number 3 (1953)' (#i03)",
    'film number 8': "may be 'Film Number 8 (1958)'",
    ';': "no item has the title or id ';'",
    'I {loved': 'a brace without its other one',
    ':about film number 5': genres,
    ':about Film Nmber 5': "Nearest: 'Film Number 5 (1955)' (#i05)",
    ':about': "write it as ':about Alien'",
    ':k five': "write it as ':k 5'",
    ':k 0': 'k=0, but it is at least 1',
    ':k 100': 'the catalogue has 40 items',
    ':method recencey': "Did you mean 'recency'?",
    ':mehtod recency': "no command :mehtod. Did you mean ':method'?",
    ':help': 'rank by: recency, all_rows',
  }
  for typed, message in steps.items():
    answered = _dialogue(recommender, typed, '#i03', k=2)
    assert message in answered, typed
    assert len(answered.splitlines()) >= 3, typed  # the dialogue went on
  _dialogue(recommender, ':method all_rows', '#i03', '{#i03}?')
  assert recommender.batches[-2:] == [('all_rows', 1)] * 2
  with pytest.raises(UsageError, match='ranks by'):
    _dialogue(recommender, '#i03', method='exact')


def test_typed_lines_end_with_the_input(monkeypatch, capsys, recommender):
  monkeypatch.setattr('sys.stdin', io.StringIO(':k 3\n#i03\n'))
  interact(recommender, typed_lines('items> '), Options())
  out, err = capsys.readouterr()
  assert out.count('items> ') == 3
  assert 'k is 3 now' in out
  assert ':help' in err

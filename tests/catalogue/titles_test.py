import itertools
import random
import time

import pytest

from ilm_jax.catalogue.titles import TitleIndex
from ilm_jax.errors import UsageError

TITLES = {
  '2571': 'Matrix, The (1999)',
  '1': 'Toy Story (1995)',
  '144': 'Die Hard (1988)',
  '183': 'Alien (1979)',
  '176': 'Aliens (1986)',
  '211': 'M*A*S*H (1970)',
  '423': 'E.T. the Extra-Terrestrial (1982)',
  '527': "Schindler's List (1993)",
  '47': 'Seven (Se7en) (1995)',
  '29': 'City of Lost Children, The (Cité des enfants perdus, La) (1995)',
  '4973': 'Amelie (a.k.a. Fabuleux destin d’Amélie Poulain, Le) (2001)',  # noqa: RUF001
  '1441': "Enfer, L' (1994)",
  '515': 'Das Boot (1981)',
  '1411': 'Hamlet (1996)',
  '1941': 'Hamlet (1948)',
  '304': 'Fly Away Home (1996)',
  '500': 'Fly Away Home (1996)',
  '187': 'Godfather: Part II, The (1974)',
  '330': '187 (1997)',
  '69757': '(500) Days of Summer (2009)',
  '9': 'Harold & Kumar (2004–2008)',  # noqa: RUF001
  '10': 'Bug’s Life, A (1998)',  # noqa: RUF001
  '11': '???',
  '12': 'ハウルの動く城',
  '13': 'Dr. Strangelove or: How I Learned to Stop Worrying and Love the Bomb (1963)',
}


@pytest.fixture(scope='module')
def index():
  return TitleIndex(list(TITLES.values()), list(TITLES))


def _found(index, text):
  return list(TITLES)[index.find(text)]


@pytest.mark.parametrize(
  ('text', 'key'),
  [
    ('Matrix, The (1999)', '2571'),
    ('The Matrix (1999)', '2571'),
    ('the matrix', '2571'),
    ('  MATRIX, the ', '2571'),
    ('matrix 1999', '2571'),
    ('Matrix', '2571'),
    ('mash', '211'),
    ('ET the Extra Terrestrial', '423'),
    ('schindlers list', '527'),
    ('Schindler’s List', '527'),  # noqa: RUF001
    ('Se7en', '47'),
    ('seven', '47'),
    ('Se7en (1995)', '47'),
    ('La Cite des Enfants Perdus', '29'),
    ('The City of Lost Children', '29'),
    ("Le fabuleux destin d'Amelie Poulain", '4973'),
    ('Amélie', '4973'),
    ("L'Enfer", '1441'),
    ('Boot, Das', '515'),
    ('Hamlet 1948', '1941'),
    ('500 days of summer', '69757'),
    ('harold and kumar', '9'),
    ('A bugs life', '10'),
    ("Bug's Life", '10'),
    ('???', '11'),
    ('ハウルの動く城', '12'),
    ('#500', '500'),
    ('500', '500'),
    ('#187', '187'),
    ('187 (1997)', '330'),
  ],
)
def test_titles_are_found_as_people_write_them(index, text, key):
  assert _found(index, text) == key


def test_every_title_finds_itself_or_its_doubles(index):
  for key, title in TITLES.items():
    if title == 'Fly Away Home (1996)':
      with pytest.raises(UsageError, match='may be'):
        index.find(title)
    else:
      assert _found(index, title) == key
    assert _found(index, f'#{key}') == key


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    (
      'Fly away home',
      "'Fly away home' may be 'Fly Away Home (1996)' (#304), 'Fly Away Home (1996)' (#500)."
      " Choose one by its id: '#304'.",
    ),
    ('hamlet', "'hamlet' may be 'Hamlet (1996)' (#1411), 'Hamlet (1948)' (#1941)."),
    # The id of one film, the title of another.
    ('187', "'187' may be 'Godfather: Part II, The (1974)' (#187), '187 (1997)' (#330)."),
    ('Alein', "no item has the title or id 'Alein'. Nearest: 'Alien (1979)' (#183), 'Aliens"),
    ('toy stroy', "Nearest: 'Toy Story (1995)' (#1)"),
    ('Strangelove', "Nearest: 'Dr. Strangelove or: How"),
    ('Hard', "Nearest: 'Die Hard (1988)' (#144)"),  # not found: 'Die' is no article here
    ('Alien (1997)', "Nearest: 'Alien (1979)' (#183)"),  # another year is another film
    ('zzzqqq', "no item has the title or id 'zzzqqq'. None is near."),
    ('', "no item has the title or id ''. None is near."),
    ('#999', "no item has the title '#999' or the id '999'; an id is '#2571'."),
  ],
)
def test_what_is_not_one_item_is_told(index, text, message):
  with pytest.raises(UsageError) as error:
    index.find(text)
  assert message in str(error.value)


def test_many_of_one_title_are_counted():
  index = TitleIndex(['Heat'] * 12, [f'k{i}' for i in range(12)])
  with pytest.raises(UsageError, match=r"'Heat' \(#k4\) and 7 more\. Choose"):
    index.find('heat')


def test_at_most_five_are_offered(index):
  titles = [f'Halloween {i}' for i in range(30)]
  near = TitleIndex(titles, titles).nearest('Haloween 7')
  assert len(near) == 5
  assert titles[near[0]] == 'Halloween 7'


def test_a_misspelt_title_is_offered_and_fast_enough_in_a_large_catalogue():
  rng = random.Random(0)
  syllables = [''.join(pair) for pair in itertools.product('bdfgklmnprst', 'aeiou')]

  def word():
    return ''.join(rng.choices(syllables, k=rng.randint(2, 4)))

  titles = list(
    dict.fromkeys(' '.join(word() for _ in range(rng.randint(2, 5))) for _ in range(50_000))
  )
  index = TitleIndex(titles, [str(i) for i in range(len(titles))])
  index.nearest('warm up')
  start = time.process_time()
  wanted = rng.sample(range(len(titles)), 20)
  for item in wanted:
    place = rng.randrange(1, len(titles[item]) - 1)
    misspelt = titles[item][:place] + 'x' + titles[item][place + 1 :]
    assert item in index.nearest(misspelt)  # first, unless a part of another is as near
  assert (time.process_time() - start) / len(wanted) < 0.5

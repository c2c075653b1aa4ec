"""Finding items by what a person types."""

import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher

import numpy as np

from ilm_jax.errors import UsageError

_OFFERED = 5  # titles in a message
_ALIKE = 0.6  # the likeness of two texts, from 0 to 1, that is worth an offer; as difflib's
_SHORTLIST = 100  # titles that are compared letter by letter

# After a title, 'Cité des enfants perdus, La', an article of any of these languages is one.
_ARTICLES = (
  "the|a|an|la|le|les|l'|un|une|el|los|las|una|il|lo|gli|i|der|die|das|ein|eine|den|det|o|os"
)
_ARTICLE_BEHIND = re.compile(rf'(.+), ({_ARTICLES})', re.IGNORECASE)
# In front only English ones are: 'Die' of 'Die Hard' is none.
_ARTICLES_IN_FRONT = ('the', 'a', 'an')
_IN_PARENTHESES_BEHIND = re.compile(r'\s*\(([^()]*)\)\s*$')
_YEAR = re.compile(r'\d{4}([-\u2013]\d{0,4})?')
# Letters that Unicode does not take apart, and what people type for them.
_LETTERS = str.maketrans(
  {'ø': 'o', 'æ': 'ae', 'œ': 'oe', 'ł': 'l', 'đ': 'd', '\u0131': 'i', '&': ' and '}
)
_APOSTROPHES = re.compile("['`.\u2018\u2019\u00b4]")  # "Schindlers List", "ET"
_NOT_OF_A_WORD = re.compile(r'[\W_]+')


class TitleIndex:
  """The titles of a catalogue, looked up as people write them.

  What is found, the first that fits:

    Matrix, The (1999)          the title
    the matrix 1999             letters and digits alone count; the article stands where it may
    The Matrix                  without the year
    Se7en                       another title that is given in parentheses, with or without year
    Matrix                      without the article
    #2571                       the source's own id; `2571` too, where no title is so

  Nothing is guessed: where several items fit equally well, none is chosen.
  """

  def __init__(self, titles: Sequence[str], keys: Sequence[str]):
    """Indexes `titles` [I]; `keys` [I] are the source's own ids."""
    self._titles = list(titles)
    self._keys = list(keys)
    self._items = {key: item for item, key in enumerate(keys)}
    # The levels of the list above but the last, each form -> items.
    self._levels: list[dict[str, list[int]]] = [{}, {}, {}, {}, {}]
    for item, title in enumerate(titles):
      for level, forms in zip(self._levels, _forms(title)):
        for form in forms:
          level.setdefault(form, []).append(item)

  def find(self, text: str) -> int:
    """Returns the one item that `text` names.

    Raises:
      UsageError: none has that title or id, and the nearest titles are offered; or several do.
    """
    text = text.strip()
    if text.startswith('#') and text[1:] in self._items:
      return self._items[text[1:]]
    found = self._by_title(text)
    if text in self._items and self._items[text] not in found:
      found = [self._items[text], *found]
    if not found:
      raise UsageError(self._unknown(text))
    if len(found) > 1:
      more = f' and {len(found) - _OFFERED:,} more' if len(found) > _OFFERED else ''
      raise UsageError(
        f'{text!r} may be {self._named(found[:_OFFERED])}{more}. Choose one by its id:'
        f" '#{self._keys[found[0]]}'."
      )
    return found[0]

  def nearest(self, text: str, count: int = _OFFERED) -> list[int]:
    """Returns up to `count` items whose titles, or a part of them, look like `text`, best first."""
    query = _without_article(_words(text))
    if not query:
      return []
    pairs, ends, words = self._letter_pairs
    asked = _pairs_of(query)
    is_asked = np.zeros(1 << 16, bool)
    is_asked[asked] = True
    shared = np.diff(np.concatenate([[0], np.cumsum(is_asked[pairs])])[ends])
    # A part of a long title counts as much as a short title that is as near.
    closeness = 2 * shared / (np.diff(ends) + len(asked)) + shared / len(asked)
    shortlist = np.argsort(-closeness, kind='stable')[:_SHORTLIST].tolist()
    matcher = SequenceMatcher(autojunk=False)
    matcher.set_seq2(' '.join(query))

    def likeness(words: Sequence[str]) -> float:
      matcher.set_seq1(' '.join(words))
      return matcher.ratio()

    scored = []
    for item in shortlist:
      title = words[item]
      starts = range(max(len(title) - len(query), 0) + 1)
      part = max(likeness(title[start : start + len(query)]) for start in starts)
      if part >= _ALIKE:
        scored.append((-part, -likeness(title), item))
    return [item for *_, item in sorted(scored)[:count]]

  def _by_title(self, text: str) -> list[int]:
    exact, *others = self._levels
    if text in exact:
      return exact[text]
    words = _words(_article_in_front(text))
    whole, without_article = ''.join(words), ''.join(_without_article(words))
    for level in others:
      form = without_article if level is others[-1] else whole
      if found := level.get(form):
        return found
    return []

  def _unknown(self, text: str) -> str:
    if text.startswith('#'):
      return f"no item has the title {text!r} or the id {text[1:]!r}; an id is '#{self._keys[0]}'."
    near = self.nearest(text)
    offer = f'Nearest: {self._named(near)}.' if near else 'None is near.'
    return f'no item has the title or id {text!r}. {offer}'

  def _named(self, items: Iterable[int]) -> str:
    return ', '.join(f'{self._titles[item]!r} (#{self._keys[item]})' for item in items)

  @functools.cached_property
  def _letter_pairs(self) -> tuple[np.ndarray, np.ndarray, list[Sequence[str]]]:
    """Each title's `_pairs_of`, one after the other; their bounds [I + 1]; each title's words."""
    words = [_without_article(_words(_article_in_front(title))) for title in self._titles]
    pairs = [_pairs_of(title) for title in words]
    return np.concatenate(pairs), np.cumsum([0, *map(len, pairs)]), words


def _forms(title: str) -> tuple[set[str], ...]:
  """What a title is found by, level by level.

  _forms('Seven (Se7en) (1995)') ->
    {'Seven (Se7en) (1995)'}, {'sevense7en1995'}, {'sevense7en'},
    {'seven', 'seven1995', 'se7en', 'se7en1995'}, (all but the first)
  """
  title = title.strip()
  rest, year = title, ''
  others: list[str] = []
  while (match := _IN_PARENTHESES_BEHIND.search(rest)) and match.start():
    rest = rest[: match.start()]
    if not others and not year and _YEAR.fullmatch(match[1]):
      year = match[1]
    else:
      others.insert(0, match[1])
  main = _words(_article_in_front(rest))
  year_words = _words(year)
  names = [main, *(_words(_article_in_front(_without_aka(name))) for name in others)]
  names = [name for name in names if name]
  long = [word for name in names for word in name]
  written = [*long, *year_words]
  either = [form for name in names for form in (name, [*name, *year_words])]
  every = [written, long, *either]
  levels = ([written], [long], either, map(_without_article, every))
  return ({title}, *({''.join(words) for words in level if words} for level in levels))


def _without_aka(name: str) -> str:
  return re.sub(r'^a\.?k\.?a\.?\s+', '', name, flags=re.IGNORECASE)


def _article_in_front(title: str) -> str:
  """'Matrix, The (1999)' -> 'The Matrix (1999)'; "Enfer, L' (1994)" -> "L'Enfer (1994)"."""
  name, space, behind = title.partition(' (')
  match = _ARTICLE_BEHIND.fullmatch(name.strip())
  if not match:
    return title
  rest, article = match.groups()
  return f'{article}{"" if article.endswith(chr(39)) else " "}{rest}{space}{behind}'


def _without_article(words: Sequence[str]) -> Sequence[str]:
  return words[1:] if len(words) > 1 and words[0] in _ARTICLES_IN_FRONT else words


def _words(text: str) -> list[str]:
  """The words of a text without case, accents and punctuation; of '???' the text itself."""
  folded = text.casefold()
  if not folded.isascii():
    apart = unicodedata.normalize('NFKD', folded)
    # Accents of Latin, Greek and Cyrillic letters; the marks that make が of か stay.
    apart = ''.join(c for c in apart if not '\u0300' <= c <= '\u036f')
    folded = unicodedata.normalize('NFKC', apart)
  folded = folded.translate(_LETTERS)
  words = _NOT_OF_A_WORD.sub(' ', _APOSTROPHES.sub('', folded)).split()
  return words or text.split()


def _pairs_of(words: Sequence[str]) -> np.ndarray:
  """uint16, a number for each two letters that are neighbours in ' word word ', each once."""
  text = f' {" ".join(words)} '
  return np.fromiter(
    {ord(a) * 257 + ord(b) & 0xFFFF for a, b in itertools.pairwise(text)}, np.uint16
  )

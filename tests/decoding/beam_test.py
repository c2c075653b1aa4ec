"""Beam search, against the ranking of all items by forward passes of each."""

import functools
import re
from typing import Any

import jax
import numpy as np
import pytest

from ilm_jax.decoding.beam import beam_search
from ilm_jax.errors import UsageError
from tests.support import catalogues, tiny_lms

ITEMS = len(catalogues.SEQUENCES)


@functools.cache
def compiled(lm):
  return jax.jit(functools.partial(beam_search, lm), static_argnames=('beam_size', 'normalise'))


def search(tiny, lengths=catalogues.LENGTHS, **kwargs):
  arguments = (tiny.params, catalogues.trie(), catalogues.embedded(tiny), lengths)
  return jax.device_get(compiled(tiny.lm)(*arguments, **kwargs))


def check(beams, expected, ranked):
  """`ranked`: [3] lists of items, best first; equal ones by their ids."""
  size = beams.items.shape[1]
  leaf = np.asarray(catalogues.trie().leaf)
  for row, items in enumerate(ranked):
    items = items[:size]
    assert beams.items[row].tolist() == [*items, *[-1] * (size - len(items))]
    np.testing.assert_allclose(beams.log_probs[row, : len(items)], expected[row, items], atol=2e-5)
    assert (beams.log_probs[row, len(items) :] == -np.inf).all()
    assert beams.leaves[row].tolist() == [*leaf[items], *[-1] * (size - len(items))]


def ranking(expected):
  return [np.argsort(-row.round(5), kind='stable').tolist() for row in expected]


@pytest.mark.parametrize(
  ('name', 'scan', 'normalise'),
  [('gemma', True, 'vocabulary'), ('gemma', False, 'catalogue'), ('llama', False, 'vocabulary')],
)
def test_with_enough_beams_is_the_exact_ranking(name, scan, normalise):
  """Beginnings of each other and equal items included; more beams than items are fine."""
  expected = catalogues.brute_force(name, normalise)
  ranked = ranking(expected)
  assert len({tuple(row) for row in ranked}) == 3
  beams = search(tiny_lms.tiny_lm(name, scan), beam_size=ITEMS + 5, normalise=normalise)
  check(beams, expected, ranked)


def test_with_a_bias_of_each_edge():
  expected = catalogues.brute_force('gemma', 'catalogue', biased=True)
  ranked = ranking(expected)
  assert ranked != ranking(catalogues.brute_force('gemma', 'catalogue'))
  beams = search(tiny_lms.tiny_lm('gemma', False), beam_size=ITEMS + 5, bias=catalogues.bias())
  check(beams, expected, ranked)


def test_a_bias_over_the_vocabulary_is_refused():
  tiny = tiny_lms.tiny_lm('gemma')
  with pytest.raises(UsageError, match="bias with normalise='vocabulary'"):
    search(tiny, beam_size=3, normalise='vocabulary', bias=catalogues.bias())


def step_by_step(tiny, prompt, beam_size):
  """The same search by whole forward passes, one for each beam: sequences, best first."""
  beams = [(0.0, ())]
  while any(said[-1:] != (catalogues.EOS,) for _, said in beams):
    grown = [beam for beam in beams if beam[1][-1:] == (catalogues.EOS,)]
    for score, said in beams:
      if said[-1:] != (catalogues.EOS,):
        legal = catalogues.legal_after(said)
        row = np.concatenate([prompt, tiny.embed(np.array(said, int))])
        log_probs = tiny.log_probs(row)[-1, legal].astype(np.float64)
        log_probs -= np.log(np.exp(log_probs).sum())
        grown += [(score + p, (*said, token)) for p, token in zip(log_probs, legal)]
    beams = sorted(grown, reverse=True)[:beam_size]
  return beams


def test_few_beams_are_those_of_the_textbook():
  tiny = tiny_lms.tiny_lm('gemma')
  beam_size = 3
  beams = search(tiny, beam_size=beam_size)
  for row, length in enumerate(catalogues.LENGTHS):
    prompt = tiny.embed(catalogues.TOKENS[row, :length])
    items, scores = [], []
    for score, said in step_by_step(tiny, prompt, beam_size):
      same = [i for i, s in enumerate(catalogues.SEQUENCES) if tuple(s) == said]
      items += same
      scores += [score] * len(same)
    assert beams.items[row].tolist() == items[:beam_size]
    np.testing.assert_allclose(beams.log_probs[row], scores[:beam_size], atol=2e-5)


def test_forbidden_items_do_not_come_and_change_nothing_else():
  tiny = tiny_lms.tiny_lm('gemma', False)
  expected = catalogues.brute_force('gemma', 'catalogue')
  forbidden = np.zeros((3, ITEMS), bool)
  forbidden[0, [0, 5, 3]] = True  # one of three equal ones, and all below token 7
  forbidden[1] = True
  forbidden[2, np.arange(ITEMS) != 12] = True
  ranked = [[item for item in row if not no[item]] for row, no in zip(ranking(expected), forbidden)]
  assert 2 in ranked[0]
  assert ranked[1:] == [[], [12]]
  check(search(tiny, beam_size=ITEMS + 5, forbidden=forbidden), expected, ranked)
  # One beam goes where something is left.
  narrow = search(tiny, beam_size=1, forbidden=forbidden)
  assert narrow.items[1:].tolist() == [[-1], [12]]
  assert not forbidden[0, narrow.items[0, 0]]


def test_a_row_of_length_0_is_not_wanted():
  tiny = tiny_lms.tiny_lm('gemma')
  alone = search(tiny, beam_size=3)
  beams = search(tiny, lengths=np.array([catalogues.LONGEST, 0, 1]), beam_size=3)
  assert beams.items[1].tolist() == [-1] * 3
  for got, expected in zip(beams, alone):
    np.testing.assert_array_equal(got[[0, 2]], expected[[0, 2]])


def test_no_beam_is_refused():
  with pytest.raises(UsageError, match='beam_size=0'):
    search(tiny_lms.tiny_lm('gemma'), beam_size=0)


@pytest.mark.parametrize('scan', [True, False])
def test_the_cache_stays_where_it_is(scan):
  """No copy of a layer's cache, nor of all, in the compiled loop."""
  tiny = tiny_lms.tiny_lm('gemma' if scan else 'llama', scan)
  size = 3 if scan else ITEMS + 5  # programs that other tests run, too
  arguments = (tiny.params, catalogues.trie(), catalogues.embedded(tiny), catalogues.LENGTHS)
  kwargs = {} if scan else {'normalise': 'vocabulary'}
  lowered = compiled(tiny.lm).lower(*arguments, beam_size=size, **kwargs)
  program: Any = lowered.compile().as_text()
  places = catalogues.LONGEST + 5 * min(size, ITEMS)
  cached = rf'f32\[(?:\d+,)*3,(?:1,)?2,{places},8\]\S*'
  inner = program[: program.index('\nENTRY ')]
  assert re.search(rf'{cached} (fusion|dynamic-update-slice)\(', inner)
  assert not re.findall(rf'.*{cached} copy\(.*', inner)

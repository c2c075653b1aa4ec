import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilm_jax.catalogue.trie import build_trie
from ilm_jax.errors import UsageError

EOS = 1
CATALOGUES = st.lists(st.lists(st.integers(2, 5), min_size=1, max_size=5), min_size=1, max_size=30)


def path(trie, node):
  tokens = []
  while node:
    tokens.insert(0, int(trie.token[node]))
    node = int(trie.parent[node])
  return tokens


@given(CATALOGUES)
@settings(max_examples=40, deadline=None)
def test_is_the_set_of_beginnings(texts):
  sequences = [[*text, EOS] for text in texts]
  trie = build_trie(sequences, EOS)
  beginnings = {tuple(s[:n]) for s in sequences for n in range(len(s) + 1)}
  paths = [tuple(path(trie, node)) for node in range(trie.num_nodes)]
  assert sorted(paths) == sorted(beginnings)
  assert trie.depth.tolist() == [len(p) for p in paths]
  assert trie.alphabet.tolist() == sorted({t for s in sequences for t in s})
  assert trie.alphabet[trie.column[1:]].tolist() == trie.token[1:].tolist()
  for node, begin in enumerate(paths):
    below = trie.items[trie.first_item[node] : trie.end_item[node]].tolist()
    assert sorted(below) == [i for i, s in enumerate(sequences) if tuple(s[: len(begin)]) == begin]
    child, exists = trie.children(jnp.asarray(node))
    tokens = trie.token[child][exists].tolist()
    assert tokens == sorted({b[-1] for b in beginnings if b and b[:-1] == begin})
    assert bool(trie.is_leaf(jnp.asarray(node))) == (begin[-1:] == (EOS,))
  for item, sequence in enumerate(sequences):
    assert path(trie, int(trie.leaf[item])) == sequence


def test_the_example_of_the_docstring():
  trie = build_trie([[5, 1], [5, 8, 1], [3, 1]], EOS)
  assert trie.items.tolist() == [2, 0, 1]
  assert trie.first_child.tolist() == [1, 3, 4, 6, 6, 6, 7, 7]
  assert (trie.max_children, trie.max_depth, trie.num_items) == (2, 3, 3)


def test_equal_items_share_a_leaf():
  trie = build_trie([[5, 1], [4, 1], [5, 1]], EOS)
  assert trie.leaf[0] == trie.leaf[2] != trie.leaf[1]


@pytest.mark.parametrize(
  ('sequences', 'message'),
  [
    ([], 'no item'),
    ([[5, 1], [5]], r'item 1: tokens \[5\]'),
    ([[1]], 'some text'),
    ([[5, 1, 1]], 'one EOS'),
    ([[-1, 1]], 'item 0'),
  ],
)
def test_bad_items(sequences, message):
  with pytest.raises(UsageError, match=message):
    build_trie(sequences, EOS)


def test_many_items():
  rng = np.random.default_rng(0)
  sequences = np.concatenate(
    [rng.integers(2, 3000, (100_000, 4)), np.full((100_000, 1), EOS)], axis=1
  )
  trie = build_trie(sequences, EOS)
  assert trie.num_items == 100_000

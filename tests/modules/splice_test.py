import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ilm_jax.modules.splice import splice, unique_entities


@given(
  st.lists(st.lists(st.integers(-1, 6), min_size=3, max_size=3), min_size=2, max_size=2),
  st.integers(1, 8),
)
@settings(max_examples=200, deadline=None)
def test_unique_entities(rows, capacity):
  rows = np.array(rows, np.int32)
  expected = np.unique(rows[rows >= 0])
  ids, index, overflow = unique_entities(jnp.asarray(rows), capacity)
  assert bool(overflow) == (len(expected) > capacity)
  assert ids[: len(expected)].tolist() == expected[:capacity].tolist()
  assert (np.asarray(ids)[len(expected) :] == -1).all()
  if not overflow:
    assert (np.asarray(ids)[index] == rows)[rows >= 0].all()


def by_hand(embeddings, is_slot, soft_tokens, index):
  out = embeddings.copy()
  for row in range(len(out)):
    slots = np.flatnonzero(is_slot[row])
    for i, place in enumerate(slots):
      k = soft_tokens.shape[1]
      out[row, place] = soft_tokens[index[row, i // k], i % k]
  return out


ROWS = {
  'none': '.......',
  'at the beginning': 'ss.....',
  'at the end': '.....ss',
  'side by side': '.ssss..',
  'apart': 'ss..ss.',
  'everywhere': 'ssssss.',
}


@pytest.mark.parametrize('k', [1, 2])
def test_splice_is_what_a_loop_does(k):
  rng = np.random.default_rng(0)
  is_slot = np.array([[c == 's' for c in row] for row in ROWS.values()])
  embeddings = rng.normal(size=(*is_slot.shape, 4)).astype(np.float32)
  soft_tokens = rng.normal(size=(5, k, 4)).astype(np.float32)
  index = rng.integers(0, 5, (len(ROWS), 6)).astype(np.int32)
  found = jax.jit(splice)(embeddings, is_slot, soft_tokens, index)
  np.testing.assert_array_equal(found, by_hand(embeddings, is_slot, soft_tokens, index))


def test_gradients_reach_the_soft_tokens_that_are_used_and_no_others():
  is_slot = np.array([[True, True, False], [True, True, False]])
  index = np.array([[2], [2]], np.int32)

  def total(soft_tokens):
    return splice(jnp.zeros((2, 3, 1)), is_slot, soft_tokens, index).sum()

  gradient = jax.grad(total)(jnp.zeros((4, 2, 1)))
  assert gradient[..., 0].tolist() == [[0, 0], [0, 0], [2, 2], [0, 0]]

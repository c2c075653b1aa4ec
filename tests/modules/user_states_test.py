"""Users as of their rows, against loops; and that no state knows what is to be predicted."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from ilm_jax.data.input.sources import InteractionSource, RowTable
from ilm_jax.data.text.entity_text import TITLE_FORM
from ilm_jax.data.text.prompts import parse_template
from ilm_jax.data.text.rendering import Renderer
from ilm_jax.data.text.text_tokens import TextTokens
from ilm_jax.data.text.vocabularies import ByteVocabulary
from ilm_jax.modules.qformer import QFormerConfig
from ilm_jax.modules.soft_tokens import SoftTokenConfig, SoftTokens
from ilm_jax.modules.user_states import UserStates

NUM_ENTITIES, D_CF, SPLITS = 15, 6, ('train', 'validation', 'test')
RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(NUM_ENTITIES, D_CF)).astype(np.float32)
LENGTHS = (0, 4, 1, 0, 0, 9, 2, 0)  # rows of users
OFFSETS = np.cumsum([0, *LENGTHS])
ITEMS = RNG.integers(0, NUM_ENTITIES, OFFSETS[-1])


def encoder_tokens(states, vectors, ids, length):
  tokens, mask = jax.jit(UserStates.encoder_tokens, static_argnames='length')(
    states, jnp.asarray(vectors), jnp.asarray(ids, jnp.int32), length=length
  )
  return np.asarray(tokens), np.asarray(mask)


def by_hand(entity, length):
  """The vectors of one entity, the oldest item first."""
  if entity < NUM_ENTITIES:
    return VECTORS[[entity]]
  row = entity - NUM_ENTITIES
  first = max(start for start in OFFSETS if start <= row)
  known = [int(item) for item in ITEMS[first:row]][-length:]
  return VECTORS[known] if known else np.zeros((1, D_CF), np.float32)


@pytest.mark.parametrize('length', [1, 3, 20])
def test_is_what_a_loop_finds(length):
  ids = RNG.permutation(NUM_ENTITIES + len(ITEMS))
  tokens, mask = encoder_tokens(UserStates.of(ITEMS, OFFSETS, NUM_ENTITIES), VECTORS, ids, length)
  assert tokens.shape == (len(ids), length, D_CF)
  assert mask.shape == (len(ids), length)
  for entity, of_entity, there in zip(ids, tokens, mask):
    expected = by_hand(entity, length)
    assert there.tolist() == [place < len(expected) for place in range(length)]
    np.testing.assert_array_equal(of_entity[: len(expected)], expected)
    assert (of_entity[len(expected) :] == 0).all()


@given(st.lists(st.integers(0, 6), min_size=1, max_size=8), st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_a_state_knows_its_users_rows_before_and_no_others(lengths, length):
  offsets = np.cumsum([0, *lengths])
  rows = np.arange(50)  # padded, to be compiled once for a length; each row is an item of its own
  states = UserStates.of(rows, np.append(offsets, 50), 50)
  vectors = np.arange(1, 51)[:, None]  # of item i, i + 1: 0 is none
  tokens, mask = encoder_tokens(states, vectors, 50 + rows, length)
  for user, (start, end) in enumerate(itertools.pairwise(offsets)):
    assert end - start == lengths[user]
    for row in range(start, end):
      known = (tokens[row, :, 0][mask[row]] - 1).tolist()
      assert known == (list(range(max(start, row - length), row)) or [-1])


def test_before_the_first_row_there_is_one_token_of_zeros():
  firsts = [start for start, length in zip(OFFSETS, LENGTHS) if length]
  ids = NUM_ENTITIES + np.array(firsts)
  tokens, mask = encoder_tokens(UserStates.of(ITEMS, OFFSETS, NUM_ENTITIES), VECTORS, ids, 3)
  assert (tokens == 0).all()
  assert mask.tolist() == [[True, False, False]] * len(firsts)


def test_soft_tokens_of_a_state_do_not_depend_on_its_padding():
  encoder = QFormerConfig(
    num_layers=2, d_model=16, num_heads=2, d_mlp=32, num_queries=2, d_encoder=D_CF
  )
  module = SoftTokens(SoftTokenConfig(encoder, 20, max_encoder_tokens=12))
  params = nn.meta.unbox(jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 12, D_CF))))
  encode = jax.jit(module.apply)
  ids = NUM_ENTITIES + np.arange(len(ITEMS))
  states = UserStates.of(ITEMS, OFFSETS, NUM_ENTITIES)
  tokens, mask = encoder_tokens(states, VECTORS, ids, 12)
  found, vectors = encode(params, tokens, mask)
  rubbish = np.where(mask[..., None], tokens, 7.0)
  for other, (soft, of_items) in {
    'padding': encode(params, rubbish, mask),
    'fewer places': encode(params, *encoder_tokens(states, VECTORS, ids, 9)),
  }.items():
    np.testing.assert_allclose(soft, found, atol=1e-5, err_msg=other)
    np.testing.assert_allclose(of_items, vectors, atol=1e-5, err_msg=other)
  last = OFFSETS[6] - 1  # of the user with 9 rows
  alone, _ = encode(params, by_hand(NUM_ENTITIES + last, 12)[None])
  np.testing.assert_allclose(found[last], alone[0], atol=1e-5)
  assert np.abs(found[last] - found[last - 1]).max() > 0.01


# ---- of a data set


def everything(prepared, user):
  """A user's rows in time order."""
  held = [prepared.validation_items[user], prepared.test_items[user]]
  train = prepared.items[prepared.offsets[user] : prepared.offsets[user + 1]]
  return [*train.tolist(), *(int(item) for item in held if item >= 0)]


@pytest.fixture(scope='module')
def prepared(small_prepared):
  """With users who have no held-out rows."""
  held = {f'{split}_items': getattr(small_prepared, f'{split}_items') for split in SPLITS[1:]}
  without = np.isin(np.arange(small_prepared.num_users), [0, 17, 18, 59])
  return dataclasses.replace(
    small_prepared, **{name: np.where(without, -1, items) for name, items in held.items()}
  )


def test_all_rows_user_by_user(prepared):
  table, rows = RowTable(prepared), [everything(prepared, u) for u in range(prepared.num_users)]
  assert table.items.tolist() == [item for of_user in rows for item in of_user]
  assert np.diff(table.offsets).tolist() == [len(of_user) for of_user in rows]
  assert prepared.num_interactions == len(table.items)
  assert table.ratings is not None
  for user in range(prepared.num_users):
    end = table.offsets[user + 1]
    if prepared.test_items[user] >= 0:
      held = prepared.validation_ratings[user], prepared.test_ratings[user]
      assert table.ratings[end - 2 : end].tolist() == list(held)
      end -= 2
    train = prepared.ratings[prepared.offsets[user] : prepared.offsets[user + 1]]
    assert table.ratings[table.offsets[user] : end].tolist() == train.tolist()


def examples(prepared, split):
  """All of a split as columns; and of each its user, and which of the user's rows it is."""
  source = InteractionSource(prepared, history_length=5, user_states=True)
  count = source.num_input_examples(split)
  columns = source.examples_at(split, tf.range(count, dtype=tf.int64))
  expected = []
  for user in range(prepared.num_users):
    rows = everything(prepared, user)
    has_held = prepared.test_items[user] >= 0
    if split == 'train':
      expected += [(user, n) for n in range(len(rows) - 2 * has_held)]
    elif has_held:
      expected.append((user, len(rows) - (2 if split == 'validation' else 1)))
  assert count == len(expected)
  return columns, expected


@pytest.mark.parametrize('split', SPLITS)
def test_the_user_of_an_example_knows_the_rows_before_it(prepared, split):
  columns, rows = examples(prepared, split)
  starts = np.cumsum([0, *(len(everything(prepared, u)) for u in range(prepared.num_users))])
  assert columns['user'].numpy().tolist() == [user for user, _ in rows]
  states = columns['user_entity'].numpy()
  assert states.tolist() == [prepared.num_entities + starts[user] + n for user, n in rows]

  table = RowTable(prepared)
  vectors = np.arange(1, prepared.num_entities + 1)[:, None]
  tokens, mask = encoder_tokens(
    UserStates.of(table.items, table.offsets, prepared.num_entities), vectors, states, 5
  )
  histories = columns['history'].to_list()
  for (user, n), target, history, of_state, there in zip(
    rows, columns['target'].numpy(), histories, tokens[..., 0], mask
  ):
    of_user = everything(prepared, user)
    assert target == of_user[n]
    known = (of_state[there] - 1).tolist()
    assert known == (of_user[max(0, n - 5) : n] or [-1])
    assert history == of_user[max(0, n - 5) : n]


@pytest.mark.parametrize('split', SPLITS)
def test_prompts_name_the_state_where_they_name_the_user(prepared, split):
  prompts = ('{user} took {history}. Next?', 'After {history:soft}: what would {user:soft} like?')
  vocabulary = ByteVocabulary()
  texts = TextTokens(prepared, vocabulary, dataset='B', max_text_tokens=64)
  columns, rows = examples(prepared, split)
  seed = np.stack([np.zeros(len(rows)), np.arange(len(rows))], axis=1)
  for n, prompt in enumerate(prompts):
    parsed = parse_template(
      't', 'seen', prompt, '{target}', dataset='B', where='x', fields=('title',)
    )
    render = Renderer([parsed], texts, num_soft_tokens=2, entity_text=TITLE_FORM)
    batch = {**columns, 'seed': tf.constant(seed, tf.int64)}
    rendered = render(batch)
    for (user, _), state, history, found, inputs in zip(
      rows, columns['user_entity'].numpy(), columns['history'].to_list(),
      rendered['entity_ids'].to_list(), rendered['inputs'].to_list(),
    ):  # fmt: skip
      assert found == ([state, *history] if n == 0 else [*history, state])
      # The text is the user's own, and there are slots for it.
      if n == 0:
        begin = [*vocabulary.encode(f'user {user + 1}'), *[vocabulary.slot_id] * 2]
        assert inputs[: len(begin)] == begin
    del batch['user_entity']
    plain = render(batch)
    of_user = {prepared.num_items + user for user, _ in rows}
    assert {ids[0 if n == 0 else -1] for ids in plain['entity_ids'].to_list()} == of_user

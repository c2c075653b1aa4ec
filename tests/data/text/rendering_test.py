"""Rendering against an oracle that builds strings and tries every history length."""

import dataclasses
import itertools

import numpy as np
import pytest
import tensorflow as tf

from ilm_jax.data.text import entity_text
from ilm_jax.data.text.entity_text import ID_FORM, TITLE_FORM
from ilm_jax.data.text.prompts import Slot, parse_template
from ilm_jax.data.text.rendering import Renderer
from ilm_jax.data.text.text_tokens import TextTokens
from ilm_jax.data.text.vocabularies import ByteVocabulary
from ilm_jax.errors import UsageError

VOCABULARY = ByteVocabulary()
PROMPTS = (
  '{user} took {history}. What next?',
  'After {history}: what would {user:soft} like?',
  '{history:text} ({user})',
  'Anything for {user}?',
  '{history:soft}',
)


def template(prompt, target='{target}', fields=('title', 'genres')):
  return parse_template('t', 'seen', prompt, target, dataset='BOOKS', where='x', fields=fields)


def renderer(prepared, prompts, target='{target}', **overrides):
  arguments = {'num_soft_tokens': 2, 'entity_text': TITLE_FORM, **overrides}
  max_text_tokens = arguments.pop('max_text_tokens', 64)
  texts = TextTokens(prepared, VOCABULARY, dataset='BOOKS', max_text_tokens=max_text_tokens)
  return Renderer([template(p, target) for p in prompts], texts, **arguments)


def batch(prepared, n=12, longest=6, seed=0):
  rng = np.random.default_rng(seed)
  history = [rng.integers(0, prepared.num_items, rng.integers(0, longest + 1)) for _ in range(n)]
  return {
    'user': tf.constant(rng.integers(0, prepared.num_users, n), tf.int32),
    'target': tf.constant(rng.integers(0, prepared.num_items, n), tf.int32),
    'history': tf.ragged.constant([h.tolist() for h in history], tf.int32, 1),
    'seed': tf.constant(np.stack([np.full(n, 7), np.arange(n)], 1), tf.int64),
  }


def oracle_prompt(prepared, parsed, example, form, k, max_inputs, max_entities):
  """The longest-history prompt that fits: a list of text pieces and slot groups, then bytes."""

  def build(history):
    tokens, entities = [], []

    def entity(text, entity_id, mode, spaced):
      if mode != 'soft':
        tokens.extend(VOCABULARY.encode((' ' if spaced else '') + text))
      if mode != 'text' and k:
        tokens.extend([VOCABULARY.slot_id] * k)
        entities.append(entity_id)

    for part in parsed.prompt:
      if not isinstance(part, Slot):
        tokens.extend(VOCABULARY.encode(part))
      elif part.name == 'user':
        text = entity_text.user_texts(prepared, form.user, 'BOOKS')[example['user']]
        entity(text, prepared.num_items + example['user'], part.mode, part.spaced)
      else:
        for place, item in enumerate(history):
          if place:
            tokens.extend(VOCABULARY.encode(','))
          entity(entity_text.item_texts(prepared, form.item, 'BOOKS')[item], item, part.mode, True)
    return tokens, entities

  full = example['history']
  for dropped in range(len(full) + 1):
    tokens, entities = build(full[dropped:])
    if len(tokens) <= max_inputs and len(entities) <= max_entities:
      return tokens, entities
  raise AssertionError('does not fit')


def cases():
  """All prompts, k, limits and forms; before a release alone, those whose pairs others have."""
  seen = set()
  everything = itertools.product(
    [('title', TITLE_FORM), ('id', ID_FORM)],
    [(90, 100), (10_000, 3), (10_000, 100)],
    [3, 0, 1],
    PROMPTS,
  )
  for (name, form), (max_inputs, max_entities), k, prompt in everything:
    pairs = set(itertools.combinations(enumerate([name, (max_inputs, max_entities), k, prompt]), 2))
    marks = [] if pairs - seen else [pytest.mark.slow]
    seen |= pairs
    yield pytest.param(
      form, max_inputs, max_entities, k, prompt, marks=marks,
      id=f'{name}-{max_inputs}-{max_entities}-{k}-{prompt}',
    )  # fmt: skip


@pytest.mark.parametrize(('form', 'max_inputs', 'max_entities', 'k', 'prompt'), cases())
def test_equals_the_oracle(small_prepared, prompt, k, max_inputs, max_entities, form):
  examples = batch(small_prepared)
  made = renderer(small_prepared, [prompt], num_soft_tokens=k, entity_text=form)
  rendered = made(examples, max_inputs=max_inputs, max_entities=max_entities)
  texts = entity_text.item_texts(small_prepared, form.item, 'BOOKS')
  for i, history in enumerate(examples['history'].to_list()):
    example = {'user': int(examples['user'][i]), 'history': history}
    tokens, entities = oracle_prompt(
      small_prepared, template(prompt), example, form, k, max_inputs, max_entities
    )
    assert rendered['inputs'][i].numpy().tolist() == tokens
    assert rendered['entity_ids'][i].numpy().tolist() == entities
    alone = made.prompt(example, max_inputs=max_inputs, max_entities=max_entities)
    assert alone == (tokens, entities)
    target = VOCABULARY.encode(' ' + texts[int(examples['target'][i])])
    assert rendered['targets'][i].numpy().tolist() == [*target, VOCABULARY.eos_id]


def test_slots_equal_k_times_entities(small_prepared):
  rendered = renderer(small_prepared, PROMPTS, num_soft_tokens=3)(
    batch(small_prepared, n=200), max_inputs=120, max_entities=4
  )
  slots = tf.reduce_sum(tf.cast(rendered['inputs'] == VOCABULARY.slot_id, tf.int64), axis=1)
  np.testing.assert_array_equal(slots, 3 * rendered['entity_ids'].row_lengths())


def test_worked_example_of_the_docstring(small_prepared):
  prepared = dataclasses.replace(
    small_prepared, item_text={'title': [f'T{i}' for i in range(small_prepared.num_items)]}
  )
  examples = {
    'user': tf.constant([0]),
    'target': tf.constant([5]),
    'history': tf.ragged.constant([[4, 7]], tf.int32),
    'seed': tf.zeros([1, 2], tf.int64),
  }
  parsed = parse_template(
    't',
    'seen',
    '{user} took {history}. Next?',
    '{target}',
    dataset='B',
    where='',
    fields=('title',),
  )
  rendered = Renderer(
    [parsed], TextTokens(prepared, VOCABULARY), num_soft_tokens=2, entity_text=TITLE_FORM
  )(examples)
  slots = [VOCABULARY.slot_id] * 2
  encode = VOCABULARY.encode
  assert rendered['inputs'][0].numpy().tolist() == (
    encode('user 1') + slots + encode(' took T4') + slots + encode(', T7') + slots
    + encode('. Next?')
  )  # fmt: skip
  assert rendered['entity_ids'][0].numpy().tolist() == [prepared.num_items, 4, 7]
  assert rendered['targets'][0].numpy().tolist() == [*encode(' T5'), 1]


def test_every_template_is_drawn_about_equally_often_and_by_seed(small_prepared):
  prompts = ['a {user:text}', 'b {user:text}', 'c {user:text}', 'd {user:text}']
  n = 4000
  examples = {
    'user': tf.zeros([n], tf.int32),
    'target': tf.zeros([n], tf.int32),
    'seed': tf.constant(np.stack([np.full(n, 3), np.arange(n)], 1), tf.int64),
  }
  first = renderer(small_prepared, prompts)(examples)['inputs'].to_tensor()[:, 0].numpy()
  again = renderer(small_prepared, prompts)(examples)['inputs'].to_tensor()[:, 0].numpy()
  np.testing.assert_array_equal(first, again)
  counts = np.bincount(first - first.min(), minlength=4)
  # Standard error of a count: sqrt(4000 * 1/4 * 3/4) = 27.
  assert (abs(counts - n / 4) < 5 * 27).all(), counts


def test_encoder_decoder_ends_inputs_with_eos_and_starts_targets_bare(small_prepared):
  rendered = renderer(small_prepared, ['For {user}:'], target_continues_prompt=False)(
    batch(small_prepared)
  )
  assert all(row[-1] == VOCABULARY.eos_id for row in rendered['inputs'].to_list())
  titles = small_prepared.item_text['title']
  target = int(batch(small_prepared)['target'][0])
  assert rendered['targets'][0].numpy().tolist() == [*VOCABULARY.encode(titles[target]), 1]


def test_ratings_and_fields(small_prepared):
  p = small_prepared
  parsed = template('{user:text} on {item} ({item.genres})', '{rating}')
  rendered = Renderer(
    [parsed], TextTokens(p, VOCABULARY), num_soft_tokens=1, entity_text=TITLE_FORM
  )(
    {
      'user': tf.constant([0, 1]),
      'item': tf.constant([3, 4]),
      'rating': tf.constant(p.ratings[:2]),
      'seed': tf.zeros([2, 2], tf.int64),
    }
  )
  for i, item in enumerate((3, 4)):
    title, genres = p.item_text['title'][item], p.item_text['genres'][item]
    expected = (
      VOCABULARY.encode(f'user {i + 1} on {title}') + [VOCABULARY.slot_id]
      + VOCABULARY.encode(f' ({genres})')
    )  # fmt: skip
    assert rendered['inputs'][i].numpy().tolist() == expected
    assert rendered['targets'][i].numpy().tolist() == [*VOCABULARY.encode(f' {p.ratings[i]:g}'), 1]


def test_openp5_templates_read_as_openp5_writes_them(small_prepared):
  parsed = template(
    'What for {dataset} user_{user_id} after {dataset} items {history} ?', '{dataset} {target}'
  )
  examples = {
    'user': tf.constant([4]),
    'target': tf.constant([5]),
    'history': tf.ragged.constant([[0, 7, 9]], tf.int32),
    'seed': tf.zeros([1, 2], tf.int64),
  }
  make = Renderer(
    [parsed],
    TextTokens(small_prepared, VOCABULARY, dataset='BOOKS'),
    num_soft_tokens=0,
    entity_text=ID_FORM,
  )

  def text(max_inputs):
    return VOCABULARY.decode(make(examples, max_inputs=max_inputs)['inputs'][0].numpy().tolist())

  full = 'What for BOOKS user_5 after BOOKS items item_1001 , item_1008 , item_1010 ?'
  assert text(None) == text(len(full)) == full
  assert text(len(full) - 1) == full.replace(' item_1001 ,', '')
  target = make(examples)['targets'][0].numpy().tolist()
  assert VOCABULARY.decode(target[:-1]) == ' BOOKS item_1006'


def test_long_texts_are_cut(small_prepared):
  rendered = renderer(small_prepared, ['{user:text}'], max_text_tokens=4)(batch(small_prepared))
  assert max(rendered['targets'].row_lengths()) <= 5
  assert VOCABULARY.decode(rendered['inputs'][0].numpy().tolist()) == 'user'


@pytest.mark.parametrize(
  ('lengths', 'message'),
  [
    ({'inputs': 5}, 'inputs of length 5 cannot hold'),
    ({'targets': 2}, 'targets of length 2 cannot hold'),
    ({'entity_ids': 0}, 'entity_ids of length 0 cannot hold'),
  ],
)
def test_lengths_that_cannot_work_are_refused_before_anything_runs(
  small_prepared, lengths, message
):
  with pytest.raises(UsageError, match=message):
    renderer(small_prepared, ['{user} took {history}. What next?']).check_lengths(lengths)


def test_lengths_that_pass_the_check_hold_every_example(small_prepared):
  made = renderer(small_prepared, ['{user} took {history}. What next?'])
  for inputs in range(20, 400):
    try:
      made.check_lengths({'inputs': inputs})
    except UsageError:
      continue
    rendered = made(batch(small_prepared, n=200), max_inputs=inputs)
    assert max(rendered['inputs'].row_lengths()) <= inputs
    break


def test_two_histories_and_unknown_fields_are_refused(small_prepared):
  with pytest.raises(UsageError, match='twice'):
    template('{history} and {history:text}')
  with pytest.raises(UsageError, match=r"unknown field \{titel\}.*Did you mean 'title'"):
    entity_text.item_texts(small_prepared, '{titel}', 'BOOKS')


def test_each_kind_of_text_is_tokenised_once(small_prepared):
  texts = TextTokens(small_prepared, VOCABULARY)
  spaced = texts.rows('item', TITLE_FORM, spaced=True, first=False)
  assert texts.rows('item', TITLE_FORM, spaced=True, first=False) is spaced
  # In title form an OpenP5 history is written as any other.
  assert texts.rows('item of openp5', TITLE_FORM, spaced=True, first=False) is spaced
  assert texts.rows('item of openp5', ID_FORM, spaced=True, first=False) is not texts.rows(
    'item', ID_FORM, spaced=True, first=False
  )


def test_one_prompt_is_rendered_as_in_a_batch(small_prepared):
  """Whatever a template has, without TensorFlow as with it."""
  p = small_prepared
  prompts = [
    *PROMPTS,
    '{history}',
    'a {user:text} b {history:soft} c {item} d {item.genres} e {rating}',
    'What for {dataset} user_{user_id} after {dataset} items {history} ?',
  ]
  examples = {
    **batch(p),
    'user_entity': tf.range(100, 112),
    'item': tf.range(12) % p.num_items,
    'rating': tf.constant(p.ratings[:12]),
  }
  columns = {name: x.to_list() if name == 'history' else x.numpy() for name, x in examples.items()}
  for k, form, limits in (
    (0, ID_FORM, {'max_inputs': 120}),
    (2, TITLE_FORM, {}),
    (3, ID_FORM, {'max_inputs': 160, 'max_entities': 4}),
  ):
    for prompt in prompts:
      made = renderer(p, [prompt], num_soft_tokens=k, entity_text=form)
      rendered = made(examples, **limits)
      for i in range(12):
        alone = made.prompt({name: column[i] for name, column in columns.items()}, **limits)
        assert rendered['inputs'][i].numpy().tolist() == alone.inputs
        assert rendered['entity_ids'][i].numpy().tolist() == alone.entity_ids
  several = renderer(p, prompts)
  assert several.prompt({**columns, 'history': [3], 'user': 1}, template=4).inputs == (
    renderer(p, [prompts[4]]).prompt({'history': [3]}).inputs
  )

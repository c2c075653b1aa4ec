"""Losses of prompts with soft tokens, against loops in NumPy and the same rows made otherwise."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import linen as nn

from ilm_jax.catalogue.trie import build_trie
from ilm_jax.models.item_language import Frozen, ItemLanguageConfig, ItemLanguageModel
from ilm_jax.modules.qformer import QFormerConfig
from ilm_jax.modules.soft_tokens import MlpConfig, SoftTokenConfig, SoftTokens
from ilm_jax.modules.user_states import UserStates
from tests.support import numpy_decoder, tiny_gemma, tiny_lms

SLOT, EOS, K, D_CF, NUM_ENTITIES, NUM_ITEMS = 9, 1, 2, 6, 12, 8
LM, VARIABLES = tiny_gemma.load('gemma3')
RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(NUM_ENTITIES, D_CF)).astype(np.float32)
QFORMER = QFormerConfig(
  num_layers=1, cross_attention_every=1, d_model=16, num_heads=2, d_mlp=32, num_queries=K,
  d_encoder=D_CF,
)  # fmt: skip
MLP = MlpConfig(K, D_CF)  # which is compiled sooner
KEY = jax.random.key(1)

# Two examples: slots at the beginning and side by side; one entity twice.
ROWS = {
  'decoder_target_tokens': [
    [SLOT, SLOT, 7, SLOT, SLOT, SLOT, SLOT, 3, 4, 1],
    [8, 5, 6, 1] + [0] * 6,
  ],
  'decoder_input_tokens': [
    [2, SLOT, SLOT, 7, SLOT, SLOT, SLOT, SLOT, 3, 4],
    [2, 8, 5, 6] + [0] * 6,
  ],
  'decoder_loss_weights': [[0] * 7 + [1] * 3, [0, 0, 1, 1] + [0] * 6],
  'entity_ids': [[11, 0, 11], [-1, -1, -1]],
}
UNPACKED = {name: np.array(rows, np.int32) for name, rows in ROWS.items()}
PACKED = {
  name: np.concatenate([UNPACKED[name][0], UNPACKED[name][1][:4]])[None] for name in ROWS
} | {
  'decoder_segment_ids': np.array([[1] * 10 + [2] * 4]),
  'decoder_positions': np.array([[*range(10), *range(4)]]),
  'entity_ids': np.array([[11, 0, 11, -1]], np.int32),
}
# Of a prompt that is seen both ways: ItemPrefixLMFeatureConverter's.
BOTH_WAYS = np.array([[1] * 8 + [0] * 2, [1] * 3 + [0] * 7])
PACKED_BOTH_WAYS = np.array([[1] * 8 + [0] * 2 + [1] * 3 + [0]])
BEFORE = (2, 30, 17, 5)


@functools.cache
def tiny(name):
  """(language model, its parameters)"""
  if name == 'gemma3':
    return LM, VARIABLES['params']
  lm = tiny_lms.tiny_lm(name)
  return lm.lm, lm.params


@functools.cache
def make_model(encoder=MLP, *, lm='gemma3', prefix=(), max_items=1, **config):
  """One of the same options, so that what is compiled of it is found again."""
  lm, _ = tiny(lm)
  return ItemLanguageModel(
    lm,
    SoftTokenConfig(encoder, lm.config.d_model, gain=0.5, max_encoder_tokens=max_items),
    slot_id=SLOT,
    num_items=NUM_ITEMS,
    config=ItemLanguageConfig(**{'readout': False, **config}),
    prefix_tokens=prefix,
  )


@functools.cache
def make_params(encoder=MLP, **options):
  model = make_model(encoder, **options)
  return nn.meta.unbox(jax.jit(model.init)(jax.random.key(0)))


@functools.cache
def make_prefix(lm, prefix):
  return jax.jit(make_model(lm=lm, prefix=prefix).run_prefix)(tiny(lm)[1])


def make(encoder=MLP, *, lm='gemma3', prefix=(), max_items=1, **config):
  """A model, its parameters, which prefix and losses have nothing to do with, and constants."""
  model = make_model(encoder, lm=lm, prefix=prefix, max_items=max_items, **config)
  params = make_params(encoder, lm=lm, max_items=max_items)
  of_prefix = make_prefix(lm, prefix) if prefix else model.run_prefix(tiny(lm)[1])
  return model, params, Frozen(tiny(lm)[1], jnp.asarray(VECTORS), prefix=of_prefix)


@functools.cache
def _loss(model, **options):
  return tiny_gemma.jit(functools.partial(model.loss, key=KEY, deterministic=True, **options))


def loss(model, params, frozen, batch, **options):
  return _loss(model, **options)(params, frozen, batch)


@functools.cache
def _loss_and_gradients(model):
  def run(params, frozen, batch):
    return model.loss(params, frozen, batch, KEY, deterministic=True)

  return tiny_gemma.jit(jax.value_and_grad(run, has_aux=True))


def loss_and_gradients(model, params, frozen, batch):
  (value, _), gradients = _loss_and_gradients(model)(params, frozen, batch)
  return value, gradients


def assert_same(found, expected):
  """Losses and gradients."""
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
  for path, gradient in jax.tree_util.tree_leaves_with_path(expected[1]):
    gradient = np.asarray(gradient)
    other = functools.reduce(lambda tree, key: tree[key.key], path, found[1])
    scale = np.abs(gradient).max()
    np.testing.assert_allclose(
      other, gradient, rtol=1e-3, atol=1e-4 * scale + 1e-6, err_msg=jax.tree_util.keystr(path)
    )
  assert jax.tree.structure(found[1]) == jax.tree.structure(expected[1])


@functools.cache
def _encoder(model):
  every = np.arange(NUM_ENTITIES, dtype=np.int32)
  return jax.jit(lambda params, frozen: model.encode(params, frozen, every).soft_tokens)


def soft_tokens(model, params, frozen, entities):
  """[entities * K, D]"""
  soft = np.asarray(_encoder(model)(params, frozen), np.float64)
  return soft[np.maximum(np.array(entities, int), 0)].reshape(-1, soft.shape[-1])


def log_probs_by_hand(model, params, frozen, inputs, entities, before=()):
  """Of the token after each of `inputs`, [T, V], by loops and by the decoder in NumPy."""
  tensors, _, _ = tiny_gemma.golden('gemma3')
  tokens = np.array([*before, *inputs])
  embeddings = numpy_decoder.embed(tensors, LM.config, tokens[None])
  slots = np.flatnonzero(tokens == SLOT)
  for place, soft in zip(slots, soft_tokens(model, params, frozen, entities)):
    embeddings[0, place] = soft
  positions = np.arange(len(tokens))[None]
  sees = numpy_decoder.who_sees_whom(positions, np.ones_like(positions))
  logits = numpy_decoder.logits(tensors, LM.config, embeddings, positions, sees)[0]
  return scipy.special.log_softmax(logits, axis=-1)[len(before) :]


def oracle(model, params, frozen, before=()):
  """The loss of ROWS."""
  nll = []
  for inputs, targets, weights, entities in zip(
    *(UNPACKED[f'decoder_{name}'] for name in ('input_tokens', 'target_tokens', 'loss_weights')),
    UNPACKED['entity_ids'],
  ):
    log_p = log_probs_by_hand(model, params, frozen, inputs, entities, before)
    nll += [-log_p[i, targets[i]] for i in np.flatnonzero(weights)]
  return np.mean(nll)


@pytest.mark.parametrize('encoder', [QFORMER, MLP], ids=['qformer', 'mlp'])
def test_the_loss_is_the_nll_of_the_targets(encoder):
  model, params, frozen = make(encoder)
  value, metrics = loss(model, params, frozen, UNPACKED)
  np.testing.assert_allclose(value, oracle(model, params, frozen), rtol=1e-4)
  assert metrics['target_tokens'] == 5


def test_packed_is_unpacked():
  """For gradients, see the trained language model."""
  packed, unpacked = (loss(*make(), batch)[0] for batch in (PACKED, UNPACKED))
  np.testing.assert_allclose(packed, unpacked, rtol=1e-5)


def test_logits_of_the_targets_only():
  model, params, frozen = make()
  few = make_model(max_targets=3, chunk=2)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(
    jnp.shape, nn.meta.unbox(jax.eval_shape(few.init, jax.random.key(0)))
  )
  value, _ = loss(model, params, frozen, UNPACKED)
  found, metrics = loss(few, params, frozen, UNPACKED)
  np.testing.assert_allclose(found, value, rtol=1e-5)
  assert metrics['targets_left_out'] == 0
  _, metrics = loss(make_model(max_targets=2), params, frozen, UNPACKED)
  assert metrics['targets_left_out'] == 1


def test_soft_tokens_matter_and_other_entities_do_not():
  model, params, frozen = make()
  value, _ = loss(model, params, frozen, UNPACKED)
  others = VECTORS.copy()
  others[1:11] = 5.0
  others = dataclasses.replace(frozen, entity_vectors=jnp.asarray(others))
  same, _ = loss(model, params, others, UNPACKED)
  assert same == value
  shuffled = {**UNPACKED, 'entity_ids': np.array([[0, 11, 0], [-1] * 3], np.int32)}
  assert abs(loss(model, params, frozen, shuffled)[0] - value) > 1e-3


def test_without_slots_it_is_the_language_model():
  model, params, frozen = make()
  tokens = np.array([[2, 8, 5, 6]])
  batch = {'decoder_input_tokens': tokens, 'entity_ids': np.full((1, 3), -1, np.int32)}
  hidden = tiny_gemma.jit(model.hidden)(params, frozen, batch)

  @tiny_gemma.jit
  def language_model(variables):
    return LM.apply(variables, LM.apply(variables, tokens, method='embed_tokens'))[0]

  np.testing.assert_array_equal(hidden, language_model(VARIABLES))


def test_slots_at_the_beginning_none_and_nothing_else():
  table = np.asarray(LM.apply(VARIABLES, np.arange(LM.config.vocab_size), method='embed_tokens'))
  rms = float(np.sqrt(np.mean(table.astype(np.float64) ** 2)))
  model, _, frozen = make()
  assert model.soft_tokens is not None
  c = dataclasses.replace(model.soft_tokens, gain=rms)
  model = ItemLanguageModel(LM, c, slot_id=SLOT, num_items=NUM_ITEMS, config=model.config)
  params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0)))
  tokens = np.array([[SLOT, SLOT, 7, 8, 3, 4], [3] * 6, [SLOT] * 6, [7, SLOT, SLOT, 4, SLOT, SLOT]])
  entities = np.array([[11, -1, -1], [-1] * 3, [0, 5, 0], [11, 3, -1]], np.int32)
  found = np.asarray(tiny_gemma.jit(model.embed)(params, frozen, tokens, entities))
  for row, ids, of_row in zip(tokens, entities, found):
    soft = iter(soft_tokens(model, params, frozen, ids))
    expected = [next(soft) if token == SLOT else table[token] for token in row]
    np.testing.assert_allclose(of_row, expected, rtol=1e-4, atol=1e-5)
  of_slots = found[tokens == SLOT]
  np.testing.assert_allclose(np.sqrt((of_slots**2).mean(axis=-1)), rms, rtol=1e-3)


def test_a_user_is_read_from_the_items_before_the_row():
  items, offsets = np.array([1, 4, 2, 7, 7, 3]), np.array([0, 4, 6])
  model, params, frozen = make(QFORMER, max_items=3)
  frozen = dataclasses.replace(frozen, user_states=UserStates.of(items, offsets, NUM_ENTITIES))
  ids = [NUM_ENTITIES + 3, 5, NUM_ENTITIES + 4, NUM_ENTITIES + 1]
  embed = tiny_gemma.jit(model.embed)
  found = embed(params, frozen, np.full((1, len(ids) * K), SLOT), np.array([ids]))
  found = np.asarray(found).reshape(len(ids), K, -1)
  assert model.soft_tokens is not None
  encode: Any = jax.jit(SoftTokens(model.soft_tokens).apply)
  sequences = VECTORS[[1, 4, 2]], VECTORS[[5]], np.zeros((1, D_CF), np.float32), VECTORS[[1]]
  for of_entity, sequence in zip(found, sequences):
    expected = encode({'params': params}, sequence[None]).soft_tokens[0]
    np.testing.assert_allclose(of_entity, expected, rtol=1e-4, atol=1e-5)


# ---- a prefix


def with_prefix(batch):
  """The same rows with the prefix in front of each."""
  joined = dict(batch)
  for name in batch.keys() - {'entity_ids'}:
    rows = batch[name]
    begin = np.zeros((len(rows), len(BEFORE)), np.int32)
    if name == 'decoder_input_tokens':
      begin += np.array(BEFORE, np.int32)
    joined[name] = np.concatenate([begin, rows], axis=1)
  return joined


@pytest.mark.parametrize(
  ('lm', 'both_ways'), [('gemma3', False), ('gemma3', True), ('t5_decoder', False)]
)
def test_a_prefix_is_the_same_as_in_every_row(lm, both_ways):
  """For gradients, see the trained language model."""
  unpacked, packed = dict(UNPACKED), dict(PACKED)
  if both_ways:
    unpacked['decoder_causal_attention'] = BOTH_WAYS
    packed['decoder_causal_attention'] = PACKED_BOTH_WAYS
  model, params, frozen = make(lm=lm, prefix=BEFORE)
  plain, _, without = make(lm=lm)
  expected, _ = loss(plain, params, without, with_prefix(unpacked))
  for batch in (unpacked, packed):
    np.testing.assert_allclose(loss(model, params, frozen, batch)[0], expected, rtol=1e-5)
  if lm == 'gemma3' and not both_ways:
    assert abs(loss(plain, params, without, unpacked)[0] - expected) > 1e-3


def test_behind_a_prefix_by_hand():
  model, params, frozen = make(prefix=BEFORE)
  expected = oracle(model, params, frozen, BEFORE)
  np.testing.assert_allclose(loss(model, params, frozen, UNPACKED)[0], expected, rtol=1e-4)


def test_a_trained_language_model_gets_gradients_through_its_prefix_too():
  """And gradients after a prefix and of packed rows are those of rows that begin with it."""
  model, params, frozen = make(prefix=BEFORE)
  value, gradients = loss_and_gradients(model, params, frozen, PACKED)
  assert gradients.keys() == params.keys() == {'item_encoder', 'adaptor', 'gain'}
  all_params = {**params, 'lm': VARIABLES['params']}
  trained = dataclasses.replace(frozen, lm=None, prefix=None)
  found = loss_and_gradients(model, all_params, trained, PACKED)
  own = {name: gradient for name, gradient in found[1].items() if name != 'lm'}
  assert_same((found[0], own), (value, gradients))
  assert_same(found, loss_and_gradients(make()[0], all_params, trained, with_prefix(UNPACKED)))
  for gradient in jax.tree.leaves(found[1]['lm']):
    assert np.abs(np.asarray(gradient)).max() > 0


# ---- titles of a catalogue

TITLES = [[5, EOS], [5, 8, EOS], [6, EOS], [7, 11, 12, EOS], [5, 8, 20, EOS], [40, 8, EOS]]
NO_TITLE = [7, 11, 13, EOS]  # leaves the catalogue
# Of the last one there is nothing but what predicts a title's first token: packed, titles are
# neighbours.
PROMPTS = (([2, SLOT, SLOT, 20], [11]), ([2, 21, SLOT, SLOT, SLOT, SLOT], [3, 0]), ([2], []))
LONGEST = 10


def titles_behind_prompts():
  """Examples, each (inputs, targets, entities); as a batch of a row each; and all in one row."""
  examples = [
    (prompt, title, entities) for prompt, entities in PROMPTS for title in [*TITLES, NO_TITLE]
  ]
  rows, entity_ids = [], []
  for segment, (prompt, title, entities) in enumerate(examples, 1):
    inputs, first = [*prompt, *title[:-1]], len(prompt) - 1
    rows.append([
      (token, [*prompt, *title][i + 1], int(i >= first), segment, i)
      for i, token in enumerate(inputs)
    ])  # fmt: skip
    entity_ids.append([*entities, -1, -1][:2])
  names = ('input_tokens', 'target_tokens', 'loss_weights', 'segment_ids', 'positions')

  def batch(rows, entity_ids):
    features = np.moveaxis(np.array(rows, np.int32), -1, 0)
    batch = {f'decoder_{name}': x for name, x in zip(names, features)}
    return {**batch, 'entity_ids': np.array(entity_ids, np.int32)}

  padded = batch([row + [(0,) * 5] * (LONGEST - len(row)) for row in rows], entity_ids)
  del padded['decoder_segment_ids'], padded['decoder_positions']
  together = [entity for entities in entity_ids for entity in entities if entity >= 0]
  one_row = [token for row in rows for token in row]
  return examples, padded, batch([one_row], [[*together, -1, -1]])


@functools.cache
def catalogue():
  """The trie, and what is added to the logits of its edges: by node, and by beginning."""
  trie = build_trie(TITLES, EOS)
  bias = np.random.default_rng(3).normal(size=trie.num_nodes).astype(np.float32)
  paths: list[tuple[int, ...]] = [()]
  for node in range(1, trie.num_nodes):
    paths.append((*paths[trie.parent[node]], int(trie.token[node])))
  return trie, bias, dict(zip(paths, bias.tolist()))


def nll_among_titles(log_p, first, title):
  """-log p of a title; that of a token is among those with which some title goes on."""
  nll, (_, _, bias_of) = 0.0, catalogue()
  for i, token in enumerate(title):
    said = title[:i]
    legal = sorted({t[i] for t in TITLES if t[:i] == said})
    scores = np.array([log_p[first + i, t] + bias_of[(*said, t)] for t in legal])
    nll -= scipy.special.log_softmax(scores)[legal.index(token)]
  return nll


def test_the_catalogue_loss_is_that_of_titles_among_titles():
  examples, unpacked, packed = titles_behind_prompts()
  trie, bias, _ = catalogue()
  few, params, frozen = make(max_targets=4, chunk=7)
  many = make_model(max_targets=90)
  frozen = dataclasses.replace(frozen, trie=trie, bias=jnp.asarray(bias))
  nll, weights, metrics = tiny_gemma.jit(
    lambda params, frozen: few.target_nll(params, frozen, unpacked, target_loss='catalogue')
  )(params, frozen)
  found = (np.asarray(nll) * np.asarray(weights)).sum(axis=1)
  is_title = np.array([title in TITLES for _, title, _ in examples])
  expected = [
    nll_among_titles(
      log_probs_by_hand(few, params, frozen, [*prompt, *title], entities), len(prompt) - 1, title
    )
    if title in TITLES
    else 0.0
    for prompt, title, entities in examples
  ]
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
  # The titles are all there is.
  by_prompt = found.reshape(len(PROMPTS), -1)[:, : len(TITLES)]
  np.testing.assert_allclose(np.exp(-by_prompt).sum(axis=1), 1, rtol=1e-4)
  assert np.ptp(by_prompt) > 0.5
  assert metrics['targets_no_item'] == len(PROMPTS) * len(NO_TITLE)
  assert (np.asarray(weights).sum(axis=1) > 0).tolist() == is_title.tolist()

  tokens = len(PROMPTS) * sum(map(len, TITLES))
  for model, batch in ((many, packed), (few, unpacked)):
    value, metrics = loss(model, params, frozen, batch, target_loss='catalogue')
    np.testing.assert_allclose(value, sum(expected) / tokens, rtol=1e-4)
    assert metrics['target_tokens'] == tokens
    assert metrics['targets_no_item'] == len(PROMPTS) * len(NO_TITLE)
    assert metrics['targets_left_out'] == 0


def test_a_catalogue_loss_without_a_catalogue():
  model, params, frozen = make()
  with pytest.raises(ValueError, match='needs a trie'):
    loss(model, params, frozen, UNPACKED, target_loss='catalogue')


# ---- an encoder-decoder

TEXTS = (([SLOT, SLOT, 4, EOS], [11]), ([7, SLOT, SLOT, SLOT, SLOT, 3, EOS], [0, 11]))
ANSWERS = ([5, 6, EOS], [8, EOS])
TWO_ROWS = {
  'encoder_input_tokens': [[SLOT, SLOT, 4, EOS, 0, 0, 0], TEXTS[1][0]],
  'decoder_input_tokens': [[0, 5, 6], [0, 8, 0]],
  'decoder_target_tokens': [[5, 6, EOS], [8, EOS, 0]],
  'decoder_loss_weights': [[1, 1, 1], [1, 1, 0]],
  'entity_ids': [[11, -1], [0, 11]],
}
ONE_ROW = {
  'encoder_input_tokens': [[*TEXTS[0][0], *TEXTS[1][0], 0]],
  'encoder_segment_ids': [[1] * 4 + [2] * 7 + [0]],
  'encoder_positions': [[*range(4), *range(7), 0]],
  'decoder_input_tokens': [[0, 5, 6, 0, 8, 0]],
  'decoder_target_tokens': [[5, 6, EOS, 8, EOS, 0]],
  'decoder_loss_weights': [[1] * 5 + [0]],
  'decoder_segment_ids': [[1] * 3 + [2] * 2 + [0]],
  'decoder_positions': [[0, 1, 2, 0, 1, 0]],
  'entity_ids': [[11, 0, 11, -1]],
}


def test_an_encoder_decoder():
  plain = tiny_lms.tiny_lm('t5')
  model, params, frozen = make(lm='t5')
  nll = []
  for (inputs, entities), answer in zip(TEXTS, ANSWERS):
    text = plain.embed(inputs).copy()
    text[np.array(inputs) == SLOT] = soft_tokens(model, params, frozen, entities)
    log_p = plain.log_probs(plain.embed([0, *answer[:-1]]), text)
    nll += [-log_p[i, token] for i, token in enumerate(answer)]
  for rows in (ONE_ROW, TWO_ROWS):
    batch = {name: np.array(x, np.int32) for name, x in rows.items()}
    value, metrics = loss(model, params, frozen, batch)
    np.testing.assert_allclose(value, np.mean(nll), rtol=1e-4)
    assert metrics['target_tokens'] == 5


# ---- what is refused


@pytest.mark.parametrize('options', [{'readout': True}, {'prefix': BEFORE}])
def test_an_encoder_decoder_has_neither_readout_nor_prefix(options):
  with pytest.raises(ValueError, match='an encoder-decoder has neither'):
    make_model(lm='t5', **options)


def test_a_readout_without_an_item_encoder_is_refused():
  with pytest.raises(ValueError, match='readout=False'):
    ItemLanguageModel(LM, None, slot_id=SLOT, num_items=NUM_ITEMS)


def test_another_width_is_refused():
  with pytest.raises(ValueError, match='width 7'):
    ItemLanguageModel(LM, SoftTokenConfig(QFORMER, 7), slot_id=SLOT, num_items=NUM_ITEMS)

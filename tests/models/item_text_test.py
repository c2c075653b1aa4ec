"""Phase 1's model: what is put together from modules and losses, against NumPy; edge cases."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ilm_jax.models.item_text import Frozen, ItemTextConfig, ItemTextModel, SpecialTokens
from ilm_jax.modules.histories import UserHistories
from ilm_jax.modules.qformer import QFormerConfig
from tests.support import steps

NUM_ITEMS, NUM_USERS, D_CF, VOCAB = 12, 5, 6, 40
TOKENS = SpecialTokens(cls=1, dec=VOCAB - 1, eos=2)
# Two layers, since a text sees of an item what the queries have read in the layer before; and each
# as the other, so that one is compiled.
ENCODER = QFormerConfig(
  num_layers=2,
  cross_attention_every=1,
  d_model=32,
  num_heads=4,
  d_mlp=48,
  num_queries=3,
  d_encoder=D_CF,
  vocab_size=VOCAB,
  max_text_length=16,
)
KEY = jax.random.key(0)


@functools.cache
def make_model(encoder=ENCODER, **config):
  return ItemTextModel(encoder, ItemTextConfig(**config), TOKENS, NUM_ITEMS)


# Of all three losses, each of which is in the metrics too: one program for many tests. By its least
# temperature hard negatives can be certain.
THREE_WEIGHTS = {'itc': 0.5, 'itm': 2.0, 'itg': 3.0}


def three_losses(encoder=ENCODER):
  weights = {f'{name}_weight': weight for name, weight in THREE_WEIGHTS.items()}
  return make_model(encoder, min_temperature=1e-6, itg_smoothing=0.0, **weights)


@pytest.fixture(scope='module')
def params():
  return steps.random_params(make_model().init, KEY)


@pytest.fixture(scope='module')
def frozen():
  vectors = np.random.default_rng(1).normal(size=(NUM_ITEMS + NUM_USERS, D_CF))
  return Frozen(jnp.asarray(vectors, jnp.float32), None)


def text_batch(items, seed=0, longest=6):
  """Item-text batch: the text of an item depends on the item alone."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, longest + 1, NUM_ITEMS)
  texts = rng.integers(3, VOCAB - 1, (NUM_ITEMS, longest))
  items = np.array(items)
  mask = np.arange(longest) < lengths[items][:, None]
  return {
    'text_tokens': np.where(mask, texts[items], 0).astype(np.int32),
    'text_mask': mask.astype(np.int32),
    'entity_ids': items[:, None].astype(np.int32),
  }


def pair_batch(triples):
  return {'entity_ids': np.array(triples, np.int32)}


def _loss(model, params, frozen, batch, key, source='item_text'):
  return model.loss(params, frozen, batch, key, source=source, deterministic=True)


loss_and_gradient = jax.jit(
  jax.value_and_grad(_loss, argnums=1, has_aux=True), static_argnames=('model', 'source')
)


def _method(name):
  def run(model, params, *inputs):
    return getattr(model, name)(params, *inputs)

  return jax.jit(run, static_argnames='model')


encode_entities, encode_texts, text_nll = map(
  _method, ('encode_entities', 'encode_texts', 'text_nll')
)


@functools.partial(jax.jit, static_argnames='model')
def match_logits(model, params, vectors, text_tokens, text_mask):
  tokens, mask, _ = model.with_special_tokens(text_tokens, text_mask)
  return model.module.apply(
    {'params': params}, vectors, tokens, mask, deterministic=True, method='match_logits'
  )


def log_softmax(x, axis):
  x = np.asarray(x, np.float64)
  x = x - x.max(axis=axis, keepdims=True)
  return x - np.log(np.exp(x).sum(axis=axis, keepdims=True))


def info_nce(scores, excluded, smoothing=0.0):
  """Symmetric, the excluded left out; the labels smoothed over what remains."""
  scores = np.where(excluded, -np.inf, np.asarray(scores, np.float64))
  losses = []
  for axis in (1, 0):
    log_p = log_softmax(scores, axis)
    even = np.where(excluded, 0, log_p).sum(axis=axis) / (~excluded).sum(axis=axis)
    losses.append(-(1 - smoothing) * np.diag(log_p) - smoothing * even)
  return np.mean(losses)


# ---------------------------------------------------------------- item-text batches


def test_special_tokens_of_the_documented_example():
  tokens, mask, targets = make_model().with_special_tokens(
    jnp.array([[7, 8, 0], [7, 8, 9], [0, 0, 0]]), jnp.array([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
  )
  np.testing.assert_array_equal(tokens, [[1, 7, 8, 2, 0], [1, 7, 8, 9, 2], [1, 2, 0, 0, 0]])
  np.testing.assert_array_equal(mask, [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
  np.testing.assert_array_equal(targets, [[7, 8, 2, 0], [7, 8, 9, 2], [2, 0, 0, 0]])


def test_itc_masks_duplicates_and_is_the_formula(params, frozen):
  items = [3, 5, 3, 0]
  batch = text_batch(items)
  (_, metrics), _ = loss_and_gradient(three_losses(), params, frozen, batch, KEY)

  model = make_model()
  _, queries = encode_entities(model, params, frozen.entity_vectors[np.array(items)])
  texts = encode_texts(model, params, batch['text_tokens'], batch['text_mask'])
  temperature = np.clip(np.exp(params['log_temperature_itc']), 0.01, 1)
  scores = np.einsum('ikf,jf->ijk', queries, texts).max(axis=2) / temperature
  excluded = (np.equal.outer(items, items)) & ~np.eye(4, dtype=bool)
  assert excluded.sum() == 2
  np.testing.assert_allclose(metrics['itc/loss'], info_nce(scores, excluded, 0.1), rtol=1e-5)
  np.testing.assert_allclose(metrics['itc/temperature'], temperature, rtol=1e-6)


def test_itm_of_two_items_has_every_wrong_pair_twice(params, frozen):
  """Of two items the hard negatives are certain, so that the batch of 3B is known."""
  items = np.array([4, 9, 4, 9])  # each pair again, which changes no mean
  batch = text_batch(items)
  (_, metrics), _ = loss_and_gradient(three_losses(), params, frozen, batch, KEY)

  pairs = 2 * [(0, 0), (1, 1), (0, 1), (1, 0), (0, 1), (1, 0)]
  entities, texts = np.array(pairs).T
  logits = match_logits(
    make_model(),
    params,
    frozen.entity_vectors[items[entities]],
    batch['text_tokens'][texts],
    batch['text_mask'][texts],
  )
  log_p = log_softmax(logits, axis=1)
  expected = -np.mean([log_p[i, int(entity == text)] for i, (entity, text) in enumerate(pairs)])
  np.testing.assert_allclose(metrics['itm/loss'], expected, rtol=1e-5)
  np.testing.assert_allclose(metrics['itm/loss_of_constant'], 0.6365, atol=1e-4)


def test_itg_is_the_probability_of_the_text_token_by_token(params, frozen):
  """Each token is predicted from the tokens before it alone, which here are all there is."""

  @jax.jit
  def states_of(vector, prefix, mask):
    inputs = vector[None], prefix[None], mask[None]
    return model.module.apply(
      {'params': params}, *inputs, deterministic=True, method='generation_states'
    )

  model = make_model()
  items = [2, 8, 11, 6]
  vectors = frozen.entity_vectors[np.array(items)]
  batch = text_batch(items)
  embedding = np.asarray(params['qformer']['word_embedder']['embedding'], np.float64)
  total, count = 0.0, 0
  for row in range(len(items)):
    text = batch['text_tokens'][row][batch['text_mask'][row] == 1].tolist()
    for place, target in enumerate([*text, TOKENS.eos]):
      prefix = np.zeros(8, np.int32)
      prefix[: place + 1] = [TOKENS.dec, *text[:place]]
      states = states_of(vectors[row], prefix, np.arange(8) <= place)
      total -= log_softmax(np.asarray(states, np.float64)[0, place] @ embedding.T, 0)[target]
      count += 1
  (_, metrics), _ = loss_and_gradient(three_losses(), params, frozen, batch, KEY)
  np.testing.assert_allclose(metrics['itg/loss'], total / count, rtol=1e-5)
  nll, tokens = text_nll(model, params, vectors, batch['text_tokens'], batch['text_mask'])
  np.testing.assert_allclose((nll, tokens), (total, count), rtol=1e-5)


def test_an_empty_text_counts_in_no_perplexity(params, frozen):
  batch = text_batch([2, 8, 11, 6])
  vectors = frozen.entity_vectors[batch['entity_ids'][:, 0]]
  rows, nobody = batch['text_mask'], np.zeros(6, np.int32)
  masks = rows, np.array([*rows[:3], nobody]), np.array([nobody, nobody, nobody, rows[3]])
  every, three, one = (
    np.array(text_nll(make_model(), params, vectors, batch['text_tokens'], mask)) for mask in masks
  )
  np.testing.assert_allclose(three + one, every, rtol=1e-5)
  assert one[1] == rows[3].sum() + 1  # and EOS


def test_weights_add_up(params, frozen):
  batch = text_batch([1, 2, 3, 4])
  (loss, metrics), _ = loss_and_gradient(three_losses(), params, frozen, batch, KEY)
  expected = sum(weight * float(metrics[f'{name}/loss']) for name, weight in THREE_WEIGHTS.items())
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  np.testing.assert_allclose(metrics['loss'], loss)


@pytest.mark.parametrize(
  'items', [[5], [5, 5, 5, 5], [5, 5, 6, 6]], ids=['batch of one', 'one item', 'duplicates']
)
def test_small_batches_are_defined(params, frozen, items):
  model = three_losses()
  (loss, metrics), gradient = loss_and_gradient(model, params, frozen, text_batch(items), KEY)
  for value in jax.tree.leaves((loss, metrics, gradient)):
    assert np.isfinite(value).all()
  if len(set(items)) == 1:  # nothing to be told from: no contrast, and matches only
    np.testing.assert_allclose(metrics['itc/loss'], 0, atol=1e-6)
    np.testing.assert_allclose(metrics['itm/loss_of_constant'], 0, atol=1e-6)
    (_, one), _ = loss_and_gradient(model, params, frozen, text_batch(items[:1]), KEY)
    for name in ('itm/loss', 'itg/loss'):
      np.testing.assert_allclose(metrics[name], one[name], rtol=1e-5)


def test_it_learns_what_it_is_asked(frozen):
  """All three losses to (almost) their least, on four items and without dropout."""
  model, batch = three_losses(), text_batch(range(4))
  optimizer = optax.flatten(optax.adam(5e-3))  # of one array: compiled in no time

  @jax.jit
  def update(params, opt_state, gradient):
    updates, opt_state = optimizer.update(gradient, opt_state)
    return optax.apply_updates(params, updates), opt_state

  params = nn.meta.unbox(jax.jit(model.init)(KEY))
  opt_state, last = jax.jit(optimizer.init)(params), []
  for key in np.asarray(jax.random.key_data(jax.random.split(KEY, 200))):
    # A step of the program that the tests above have compiled.
    (_, metrics), gradient = loss_and_gradient(
      model, params, frozen, batch, jax.random.wrap_key_data(key)
    )
    params, opt_state = update(params, opt_state, gradient)
    last = [*last[-19:], metrics]
  metrics = jax.tree.map(lambda *x: np.mean(x), *last)
  assert metrics['itc/accuracy'] == 1
  assert min(metrics['itm/accuracy_match'], metrics['itm/accuracy_mismatch']) > 0.95
  assert metrics['itm/loss'] < 0.2 < metrics['itm/loss_of_constant']
  assert metrics['itg/nll'] < 0.1


# ---------------------------------------------------------------- pairs


@pytest.mark.parametrize(
  ('source', 'false_negatives'),
  [
    ('item_item', 'batch'),
    ('user_item', 'history'),
    # Sources and masks have nothing to do with each other.
    pytest.param('item_item', 'history', marks=pytest.mark.slow),
    pytest.param('user_item', 'batch', marks=pytest.mark.slow),
  ],
)
def test_pairs_mask_what_is_known_to_be_positive(params, frozen, false_negatives, source):
  model = make_model(false_negatives=false_negatives, pair_weight=1.0)
  histories = {0: [1, 2, 3], 1: [3, 4, 5, 6], 2: [7], 3: [0, 8], 4: [9, 10]}
  if false_negatives == 'history':
    runs = [histories[user] for user in range(NUM_USERS)]
    frozen = dataclasses.replace(
      frozen,
      histories=UserHistories(
        offsets=jnp.asarray(np.cumsum([0, *map(len, runs)], dtype=np.int32)),
        items=jnp.array([item for run in runs for item in run]),
        max_length=4,
      ),
    )
  users, right = [0, 1, 1, 3, 4, 0], [2, 4, 6, 8, 10, 3]
  left = [1, 3, 5, 0, 9, 2] if source == 'item_item' else [NUM_ITEMS + user for user in users]
  batch = pair_batch(list(zip(left, right, [NUM_ITEMS + user for user in users])))

  excluded = np.zeros((6, 6), bool)
  for i in range(6):
    for j in range(6):
      known = users[i] == users[j] or left[i] == left[j] or right[i] == right[j]
      if false_negatives == 'history':
        known |= right[j] in histories[users[i]]
      excluded[i, j] = known and i != j
  if false_negatives == 'history':
    assert excluded[1, 5], 'item 3 is of the history of user 1, and comes from user 0 here'
  assert not excluded[0, 4]

  vectors = [frozen.entity_vectors[np.array(entities)] for entities in (left, right)]
  features = [encode_entities(make_model(), params, each)[1] for each in vectors]
  name = {'item_item': 'ii', 'user_item': 'ui'}[source]
  temperature = np.clip(np.exp(params[f'log_temperature_{name}']), 0.01, 1)
  scores = np.einsum('ikf,jlf->ijkl', *features).max(axis=(2, 3)) / temperature
  (loss, metrics), gradient = loss_and_gradient(model, params, frozen, batch, KEY, source)
  np.testing.assert_allclose(loss, info_nce(scores, excluded), rtol=1e-5)
  candidates = np.mean([np.log((~excluded).sum(axis=axis)) for axis in (0, 1)])
  np.testing.assert_allclose(metrics[f'{name}/gain'], candidates - loss, rtol=1e-4, atol=1e-5)
  used = jax.tree.map(lambda x: bool(np.any(x)), gradient)
  assert used['query_projection']['kernel']
  assert used[f'log_temperature_{name}']
  assert not any(jax.tree.leaves((used['text_projection'], used['match'])))


PAIRS = [(1, 2, 12), (3, 4, 13), (5, 6, 14)]


def test_one_pair_teaches_nothing(params, frozen):
  batch = pair_batch([(1, 2, NUM_ITEMS)])
  (loss, _), gradient = loss_and_gradient(make_model(), params, frozen, batch, KEY, 'item_item')
  assert loss == 0
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


# ---------------------------------------------------------------- options


@pytest.mark.parametrize('source', ['item_text', 'item_item'])
def test_dropout_is_decided_by_the_key(params, frozen, source):
  model = make_model(itm_weight=0.0)  # whose negatives are of the key anyway
  batch = text_batch([1, 2, 3]) if source == 'item_text' else pair_batch(PAIRS)
  loss = jax.jit(lambda key: model.loss(params, frozen, batch, key, source=source)[0])
  first, again, other = loss(KEY), loss(KEY), loss(jax.random.key(1))
  assert first == again != other


@pytest.mark.parametrize(
  ('remat', 'source'),
  [('dots', 'item_item'), pytest.param('full', 'item_text', marks=pytest.mark.slow)],
)
def test_remat_changes_no_value(params, frozen, remat, source):
  """Layers are wrapped in one way for all losses; those of pairs are compiled sooner."""
  batch = text_batch([1, 2, 3, 4]) if source == 'item_text' else pair_batch(PAIRS)
  less_memory = dataclasses.replace(ENCODER, remat=remat)
  plain, less_memory = (
    loss_and_gradient(make_model(encoder), params, frozen, batch, KEY, source)
    for encoder in (ENCODER, less_memory)
  )
  for x, y in zip(jax.tree.leaves(plain), jax.tree.leaves(less_memory)):
    np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(
  'options', [{'bf16_matmul': True}, pytest.param({'dtype': jnp.bfloat16}, marks=pytest.mark.slow)]
)
def test_bfloat16_is_close(params, frozen, options):
  # Which negatives are drawn may turn on the last bit of a score: not of two items.
  batch = text_batch([1, 2, 1, 2])
  encoder = dataclasses.replace(ENCODER, **options)
  exact, rounded = (
    loss_and_gradient(three_losses(e), params, frozen, batch, KEY) for e in (ENCODER, encoder)
  )
  np.testing.assert_allclose(rounded[0][0], exact[0][0], rtol=0.03)
  flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for _, g in (exact, rounded)]
  cosine = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
  assert cosine > 0.99
  assert all(x.dtype == np.float32 for x in jax.tree.leaves(rounded[1]))


@pytest.mark.parametrize('option', [{'false_negatives': 'none'}, {'text_pooling': 'max'}])
def test_unknown_options_are_refused(option):
  with pytest.raises(ValueError, match=next(iter(option))):
    ItemTextConfig(**option)


def test_pooling_by_cls_sees_the_first_state_only(params, frozen):
  batch = text_batch([1, 2])
  texts = batch['text_tokens'], batch['text_mask']
  padded = [np.pad(x, ((0, 0), (0, 3))) for x in texts]

  @functools.partial(jax.jit, static_argnames='model')
  def features_of(model, params):
    return [model.encode_texts(params, *each) for each in (texts, padded)]

  features = []
  for pooling in ('mean', 'cls'):
    found, longer = features_of(make_model(text_pooling=pooling), params)
    np.testing.assert_allclose(longer, found, atol=1e-5)  # padding is no text
    features.append(found)
  assert np.abs(features[0] - features[1]).max() > 0.01


def test_hard_negatives_are_what_is_confused_with_a_text_and_with_an_item(params, frozen):
  """By sharp scores they are certain: of a text the best of its column, of an item of its row."""
  sharp = {**params, 'log_temperature_itc': np.log(np.float32(1e-6))}
  items = np.array([2, 5, 7, 11])
  batch = text_batch(items)
  (_, metrics), _ = loss_and_gradient(three_losses(), sharp, frozen, batch, KEY)

  model, vectors = make_model(), frozen.entity_vectors[items]
  _, queries = encode_entities(model, params, vectors)
  texts = encode_texts(model, params, batch['text_tokens'], batch['text_mask'])
  scores = np.einsum('ikf,jf->ijk', queries, texts).max(axis=2)
  np.fill_diagonal(scores, -np.inf)
  entity_of_text, text_of_entity = scores.argmax(axis=0), scores.argmax(axis=1)
  assert (entity_of_text != text_of_entity).any()
  own = np.arange(4)
  chosen = np.concatenate([own, own, text_of_entity])
  logits = match_logits(
    model,
    params,
    vectors[np.concatenate([own, entity_of_text, own])],
    batch['text_tokens'][chosen],
    batch['text_mask'][chosen],
  )
  log_p = log_softmax(logits, axis=1)
  expected = -np.concatenate([log_p[:4, 1], log_p[4:, 0]]).mean()
  np.testing.assert_allclose(metrics['itm/loss'], expected, rtol=1e-4)

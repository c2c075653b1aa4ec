"""Phase 1's model: what is put together from modules and losses, against NumPy; edge cases."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ilm_jax.data.histories import UserHistories
from ilm_jax.models.item_text import Frozen, ItemTextConfig, ItemTextModel, SpecialTokens
from ilm_jax.modules.qformer import QFormerConfig

NUM_ITEMS, NUM_USERS, D_CF, VOCAB = 12, 5, 6, 40
TOKENS = SpecialTokens(cls=1, dec=VOCAB - 1, eos=2)
ENCODER = QFormerConfig(
  num_layers=2,
  d_model=32,
  num_heads=4,
  d_mlp=48,
  num_queries=3,
  d_encoder=D_CF,
  vocab_size=VOCAB,
  max_text_length=16,
)
KEY = jax.random.key(0)


def make_model(encoder=ENCODER, **config):
  return ItemTextModel(encoder, ItemTextConfig(**config), TOKENS, NUM_ITEMS)


@pytest.fixture(scope='module')
def params():
  """Random everywhere: at their initial values, biases and temperatures would hide mistakes."""
  rng = np.random.default_rng(0)
  initial = nn.meta.unbox(jax.jit(make_model().init)(KEY))
  return jax.tree.map(
    lambda x: jnp.asarray(x + 0.1 * rng.normal(size=x.shape), jnp.float32), initial
  )


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


@functools.cache
def loss_and_gradient(model):
  def loss(params, frozen, batch, key, source):
    return model.loss(params, frozen, batch, key, source=source, deterministic=True)

  return jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnames='source')


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
  tokens, mask, targets = make_model()._with_special_tokens(
    jnp.array([[7, 8, 0], [7, 8, 9], [0, 0, 0]]), jnp.array([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
  )
  np.testing.assert_array_equal(tokens, [[1, 7, 8, 2, 0], [1, 7, 8, 9, 2], [1, 2, 0, 0, 0]])
  np.testing.assert_array_equal(mask, [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
  np.testing.assert_array_equal(targets, [[7, 8, 2, 0], [7, 8, 9, 2], [2, 0, 0, 0]])


def test_itc_masks_duplicates_and_is_the_formula(params, frozen):
  model = make_model(itm_weight=0.0, itg_weight=0.0, itc_smoothing=0.1)
  items = [3, 5, 3, 0, 7]
  batch = text_batch(items)
  (loss, metrics), _ = loss_and_gradient(model)(params, frozen, batch, KEY, 'item_text')

  _, queries = model.encode_entities(params, frozen.entity_vectors[jnp.array(items)])
  texts = model.encode_texts(params, batch['text_tokens'], batch['text_mask'])
  temperature = np.clip(np.exp(params['log_temperature_itc']), 0.01, 1)
  scores = np.einsum('ikf,jf->ijk', queries, texts).max(axis=2) / temperature
  excluded = (np.equal.outer(items, items)) & ~np.eye(5, dtype=bool)
  assert excluded.sum() == 2
  np.testing.assert_allclose(loss, info_nce(scores, excluded, 0.1), rtol=1e-5)
  np.testing.assert_allclose(metrics['itc/temperature'], temperature, rtol=1e-6)


def test_itm_of_two_items_has_every_wrong_pair_twice(params, frozen):
  """Of two items the hard negatives are certain, so that the batch of 3B is known."""
  model = make_model(itc_weight=0.0, itg_weight=0.0)
  batch = text_batch([4, 9])
  (loss, metrics), _ = loss_and_gradient(model)(params, frozen, batch, KEY, 'item_text')

  tokens, mask, _ = model._with_special_tokens(batch['text_tokens'], batch['text_mask'])
  vectors = frozen.entity_vectors[jnp.array([4, 9])]
  pairs = [(0, 0), (1, 1), (0, 1), (1, 0), (0, 1), (1, 0)]
  entities, texts = np.array(pairs).T
  logits = model.module.apply(
    {'params': params},
    vectors[entities],
    tokens[texts],
    mask[texts],
    deterministic=True,
    method='match_logits',
  )
  log_p = log_softmax(logits, axis=1)
  expected = -np.mean([log_p[i, int(entity == text)] for i, (entity, text) in enumerate(pairs)])
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  np.testing.assert_allclose(metrics['itm/loss_of_constant'], 0.6365, atol=1e-4)


def test_itg_is_the_probability_of_the_text_token_by_token(params, frozen):
  """Each token is predicted from the tokens before it alone, which here are all there is."""

  @jax.jit
  def states_of(vector, prefix, mask):
    inputs = vector[None], prefix[None], mask[None]
    return model.module.apply(
      {'params': params}, *inputs, deterministic=True, method='generation_states'
    )

  model = make_model(itc_weight=0.0, itm_weight=0.0, itg_smoothing=0.0)
  items = [2, 8, 11]
  batch = text_batch(items)
  embedding = np.asarray(params['qformer']['word_embedder']['embedding'], np.float64)
  total, count = 0.0, 0
  for row, item in enumerate(items):
    text = batch['text_tokens'][row][batch['text_mask'][row] == 1].tolist()
    for place, target in enumerate([*text, TOKENS.eos]):
      prefix = np.zeros(8, np.int32)
      prefix[: place + 1] = [TOKENS.dec, *text[:place]]
      states = states_of(frozen.entity_vectors[item], prefix, np.arange(8) <= place)
      total -= log_softmax(np.asarray(states, np.float64)[0, place] @ embedding.T, 0)[target]
      count += 1
  (loss, _), _ = loss_and_gradient(model)(params, frozen, batch, KEY, 'item_text')
  np.testing.assert_allclose(loss, total / count, rtol=1e-5)
  nll, tokens = model.text_nll(
    params, frozen.entity_vectors[jnp.array(items)], batch['text_tokens'], batch['text_mask']
  )
  np.testing.assert_allclose((nll, tokens), (total, count), rtol=1e-5)


def test_an_empty_text_counts_in_no_perplexity(params, frozen):
  batch = {**text_batch([2, 8]), 'entity_ids': np.array([[2], [-1]])}
  model = make_model()
  texts = batch['text_tokens'], batch['text_mask'] * np.array([[1], [0]])
  both = model.text_nll(params, frozen.entity_vectors[jnp.array([2, 0])], *texts)
  one = model.text_nll(params, frozen.entity_vectors[jnp.array([2])], *(x[:1] for x in texts))
  np.testing.assert_allclose(both, one, rtol=1e-5)


def test_weights_add_up(params, frozen):
  batch = text_batch([1, 2, 3, 4])
  weights = {'itc': 0.5, 'itm': 2.0, 'itg': 3.0}
  model = make_model(**{f'{name}_weight': weight for name, weight in weights.items()})
  (loss, metrics), _ = loss_and_gradient(model)(params, frozen, batch, KEY, 'item_text')
  expected = sum(weight * float(metrics[f'{name}/loss']) for name, weight in weights.items())
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  np.testing.assert_allclose(metrics['loss'], loss)


@pytest.mark.parametrize(
  'items', [[5], [5, 5, 5, 5], [5, 5, 6]], ids=['batch of one', 'one item', 'duplicates']
)
def test_small_batches_are_defined(params, frozen, items):
  (loss, metrics), gradient = loss_and_gradient(make_model())(
    params, frozen, text_batch(items), KEY, 'item_text'
  )
  for value in jax.tree.leaves((loss, metrics, gradient)):
    assert np.isfinite(value).all()
  if len(set(items)) == 1:  # nothing to be told from: no contrast, and matches only
    np.testing.assert_allclose(metrics['itc/loss'], 0, atol=1e-6)
    np.testing.assert_allclose(metrics['itm/loss_of_constant'], 0, atol=1e-6)
    (_, one), _ = loss_and_gradient(make_model())(
      params, frozen, text_batch(items[:1]), KEY, 'item_text'
    )
    for name in ('itm/loss', 'itg/loss'):
      np.testing.assert_allclose(metrics[name], one[name], rtol=1e-5)


def test_it_learns_what_it_is_asked(frozen):
  """All three losses to (almost) their least, on eight items and without dropout."""
  model = make_model(itc_smoothing=0.0, itg_smoothing=0.0)
  batch = text_batch(range(8))
  optimizer = optax.adam(3e-3)

  @jax.jit
  def train(params):
    def step(carry, key):
      params, opt_state = carry
      (_, metrics), gradient = loss_and_gradient(model)(params, frozen, batch, key, 'item_text')
      updates, opt_state = optimizer.update(gradient, opt_state)
      return (optax.apply_updates(params, updates), opt_state), metrics

    keys = jax.random.split(KEY, 400)
    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[1]

  metrics = jax.tree.map(lambda x: x[-20:].mean(), train(nn.meta.unbox(jax.jit(model.init)(KEY))))
  assert metrics['itc/accuracy'] == 1
  assert min(metrics['itm/accuracy_match'], metrics['itm/accuracy_mismatch']) > 0.95
  assert metrics['itm/loss'] < 0.2 < metrics['itm/loss_of_constant']
  assert metrics['itg/nll'] < 0.1


# ---------------------------------------------------------------- pairs


@pytest.mark.parametrize('false_negatives', ['batch', 'history'])
@pytest.mark.parametrize('source', ['item_item', 'user_item'])
def test_pairs_mask_what_is_known_to_be_positive(params, frozen, false_negatives, source):
  model = make_model(false_negatives=false_negatives, pair_weight=1.0)
  histories = {0: [1, 2, 3], 1: [3, 4, 5, 6], 2: [7], 3: [0, 8], 4: [9, 10]}
  if false_negatives == 'history':
    runs = [histories[user] for user in range(NUM_USERS)]
    frozen = dataclasses.replace(
      frozen,
      histories=UserHistories(
        offsets=jnp.cumsum(jnp.array([0, *map(len, runs)])),
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

  vectors = [frozen.entity_vectors[jnp.array(entities)] for entities in (left, right)]
  features = [model.encode_entities(params, each)[1] for each in vectors]
  name = {'item_item': 'ii', 'user_item': 'ui'}[source]
  temperature = np.clip(np.exp(params[f'log_temperature_{name}']), 0.01, 1)
  scores = np.einsum('ikf,jlf->ijkl', *features).max(axis=(2, 3)) / temperature
  (loss, metrics), gradient = loss_and_gradient(model)(params, frozen, batch, KEY, source)
  np.testing.assert_allclose(loss, info_nce(scores, excluded), rtol=1e-5)
  candidates = np.mean([np.log((~excluded).sum(axis=axis)) for axis in (0, 1)])
  np.testing.assert_allclose(metrics[f'{name}/gain'], candidates - loss, rtol=1e-4, atol=1e-5)
  used = jax.tree.map(lambda x: bool(np.any(x)), gradient)
  assert used['query_projection']['kernel']
  assert used[f'log_temperature_{name}']
  assert not any(jax.tree.leaves((used['text_projection'], used['match'])))


def test_one_pair_teaches_nothing(params, frozen):
  batch = pair_batch([(1, 2, NUM_ITEMS)])
  (loss, _), gradient = loss_and_gradient(make_model())(params, frozen, batch, KEY, 'item_item')
  assert loss == 0
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


# ---------------------------------------------------------------- options


@pytest.mark.parametrize('source', ['item_text', 'item_item'])
def test_dropout_is_decided_by_the_key(params, frozen, source):
  model = make_model()
  batch = text_batch([1, 2, 3]) if source == 'item_text' else pair_batch([(1, 2, 12), (3, 4, 13)])
  loss = jax.jit(lambda key: model.loss(params, frozen, batch, key, source=source)[0])
  first, again, other = loss(KEY), loss(KEY), loss(jax.random.key(1))
  assert first == again != other


@pytest.mark.parametrize('remat', ['full', 'dots'])
def test_remat_changes_no_value(params, frozen, remat):
  batch = text_batch([1, 2, 3, 4])
  plain, less_memory = (
    loss_and_gradient(make_model(dataclasses.replace(ENCODER, remat=kind)))(
      params, frozen, batch, KEY, 'item_text'
    )
    for kind in ('none', remat)
  )
  for x, y in zip(jax.tree.leaves(plain), jax.tree.leaves(less_memory)):
    np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize('options', [{'bf16_matmul': True}, {'dtype': jnp.bfloat16}])
def test_bfloat16_is_close(params, frozen, options):
  batch = text_batch([1, 2, 3, 4])
  encoder = dataclasses.replace(ENCODER, **options)
  # Which negatives are drawn may turn on the last bit of a score: leave ITM out.
  exact, rounded = (
    loss_and_gradient(make_model(e, itm_weight=0.0))(params, frozen, batch, KEY, 'item_text')
    for e in (ENCODER, encoder)
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
  features = []
  for pooling in ('mean', 'cls'):
    model = make_model(text_pooling=pooling)
    features.append(model.encode_texts(params, batch['text_tokens'], batch['text_mask']))
    padded = {k: np.pad(v, ((0, 0), (0, 3))) for k, v in batch.items() if k != 'entity_ids'}
    longer = model.encode_texts(params, padded['text_tokens'], padded['text_mask'])
    np.testing.assert_allclose(longer, features[-1], atol=1e-5)  # padding is no text
  assert np.abs(features[0] - features[1]).max() > 0.01

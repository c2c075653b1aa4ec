"""The readout's losses and scores of histories, against the decoder in NumPy and loops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import linen as nn

from ilm_jax.models.item_language import Frozen, ItemLanguageConfig, ItemLanguageModel
from ilm_jax.modules.qformer import QFormerConfig
from ilm_jax.modules.readout import log_popularity
from ilm_jax.modules.soft_tokens import MlpConfig, SoftTokenConfig
from tests.support import numpy_decoder, tiny_gemma

SLOT, D_CF, NUM_ENTITIES, NUM_ITEMS = 9, 6, 12, 8
LM, VARIABLES = tiny_gemma.load('gemma3')
RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(NUM_ENTITIES, D_CF)).astype(np.float32)
POPULARITY = log_popularity(np.array([40, 3, 0, 12, 7, 7, 1, 25]))
QFORMER = QFormerConfig(
  num_layers=1, cross_attention_every=1, d_model=16, num_heads=2, d_mlp=32, num_queries=1,
  d_encoder=D_CF,
)  # fmt: skip
KEY = jax.random.key(1)
# Of different length; one has nothing to predict, one an item twice in a row.
HISTORIES = np.array([[3, 0, 7, 7, 2, 5], [6, 1, 4, -1, -1, -1], [5, -1, -1, -1, -1, -1]], np.int32)
POSITIONS = [(row, n) for row in range(2) for n in range(1, (HISTORIES[row] >= 0).sum())]
BEFORE = (2, 30, 17, 5)
MLP = MlpConfig(2, D_CF)  # with two soft tokens; a Q-Former, which takes longer to compile, has one


@functools.cache
def make_model(encoder=MLP, *, prefix=(), num_items=NUM_ITEMS, weight=0.7, chunk=4, **config):
  """One of the same options, so that what is compiled of it is found again."""
  return ItemLanguageModel(
    LM,
    SoftTokenConfig(encoder, LM.config.d_model, gain=0.5),
    slot_id=SLOT,
    num_items=num_items,
    config=ItemLanguageConfig(popularity_weight=weight, chunk=chunk, **config),
    prefix_tokens=prefix,
  )


@functools.cache
def initial_params(encoder, weight):
  model = make_model(encoder, weight=weight)
  return nn.meta.unbox(jax.jit(model.init)(jax.random.key(0)))


@functools.cache
def make_prefix(prefix):
  return jax.jit(make_model(prefix=prefix).run_prefix)(VARIABLES['params'])


def make(encoder=MLP, *, prefix=(), num_items=NUM_ITEMS, weight=0.7, **config):
  """A model, its parameters, random where they begin at zero, and constants."""
  model = make_model(encoder, prefix=prefix, num_items=num_items, weight=weight, **config)
  lm = VARIABLES['params']
  run = make_prefix(prefix) if prefix else model.run_prefix(lm)
  frozen = Frozen(lm, jnp.asarray(VECTORS), POPULARITY[:num_items], prefix=run)
  params = dict(initial_params(encoder, weight))
  kernel = 0.1 * np.random.default_rng(7).normal(size=params['readout']['kernel'].shape)
  params['readout'] = {**params['readout'], 'kernel': jnp.asarray(kernel, jnp.float32)}
  return model, params, frozen


@functools.cache
def _encode(model):
  items = np.arange(NUM_ITEMS, dtype=np.int32)
  return tiny_gemma.jit(lambda params, frozen: model.encode(params, frozen, items))


@functools.cache
def _scores(model):
  return tiny_gemma.jit(model.readout_scores)


@functools.cache
def _loss(model):
  return tiny_gemma.jit(functools.partial(model.readout_loss, deterministic=True))


def scores(model, params, frozen, histories):
  encoded = _encode(model)(params, frozen)
  return np.asarray(_scores(model)(params, frozen, np.array(histories, np.int32), encoded.vectors))


def loss(model, params, frozen, histories, key=KEY):
  return _loss(model)(params, frozen, np.array(histories, np.int32), key)


def scores_by_hand(model, params, frozen, history):
  """After each item of one history, [S, I], with the decoder in NumPy."""
  tensors, _, _ = tiny_gemma.golden('gemma3')
  soft, vectors = (np.asarray(x, np.float64) for x in _encode(model)(params, frozen))
  k = soft.shape[1]
  begin = numpy_decoder.embed(tensors, LM.config, np.array([model.prefix_tokens], int))
  embeddings = np.concatenate([begin, soft[history].reshape(1, len(history) * k, -1)], axis=1)
  positions = np.arange(embeddings.shape[1])[None]
  sees = numpy_decoder.who_sees_whom(positions, np.ones_like(positions))
  # The head is tied to the embeddings: with one that changes nothing, logits are states.
  headless = {**tensors, 'model.embed_tokens.weight': np.eye(LM.config.d_model)}
  states = numpy_decoder.logits(headless, LM.config, embeddings, positions, sees)[0]
  at_last_slots = states[[begin.shape[1] + k * (n + 1) - 1 for n in range(len(history))]]
  at_last_slots /= np.sqrt(np.mean(at_last_slots**2, axis=1, keepdims=True))
  vectors -= vectors.mean(axis=1, keepdims=True)
  vectors /= np.sqrt(np.mean(vectors**2, axis=1, keepdims=True) + 1e-6)
  kernel = np.asarray(params['readout']['kernel'], np.float64)
  return at_last_slots @ kernel @ vectors.T + 0.7 * np.asarray(frozen.log_popularity, np.float64)


def nll_by_hand(model, params, frozen):
  """-log p of each item of POSITIONS among all."""
  of_row = {row: scores_by_hand(model, params, frozen, _items(row)) for row in range(2)}
  log_p = {row: scipy.special.log_softmax(x, axis=1) for row, x in of_row.items()}
  return np.array([-log_p[row][n - 1, HISTORIES[row, n]] for row, n in POSITIONS]), of_row


def padded(histories, rows=len(HISTORIES)):
  """As many rows as others, and as long: nothing is compiled for them."""
  found = np.full((rows, HISTORIES.shape[1]), -1, np.int32)
  for row, history in zip(found, histories):
    row[: len(history)] = history
  return found


def _items(row):
  return HISTORIES[row][HISTORIES[row] >= 0]


def _beginnings():
  """The history in front of each of POSITIONS, padded."""
  histories = np.full((len(POSITIONS), HISTORIES.shape[1]), -1, np.int32)
  for history, (row, n) in zip(histories, POSITIONS):
    history[:n] = HISTORIES[row, :n]
  return histories


@pytest.mark.parametrize(
  ('encoder', 'prefix', 'chunk'),
  [(MLP, BEFORE, 256), (MLP, (), 4), (QFORMER, (), 256)],
  ids=['two slots and a prefix', 'two slots in chunks', 'one slot'],
)
def test_loss_and_scores_by_hand(encoder, prefix, chunk):
  model, params, frozen = make(encoder, prefix=prefix, chunk=chunk)
  nll, of_row = nll_by_hand(model, params, frozen)
  assert np.ptp(of_row[0] - 0.7 * np.asarray(POPULARITY), axis=0).min() > 0.05  # states matter
  value, metrics = loss(model, params, frozen, HISTORIES)
  np.testing.assert_allclose(value, nll.mean(), rtol=1e-4)
  assert metrics['targets'] == len(POSITIONS)
  found = scores(model, params, frozen, _beginnings())
  expected = np.array([of_row[row][n - 1] for row, n in POSITIONS])
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_what_comes_later_is_not_seen():
  """A loss at every item is that of its history alone."""
  model, params, frozen = make()
  found = scores(model, params, frozen, _beginnings())
  log_p = scipy.special.log_softmax(found.astype(np.float64), axis=1)
  alone = {at: -log_p[i, HISTORIES[at]] for i, at in enumerate(POSITIONS)}
  for row in range(2):
    total = 0.0
    for n in range(1, len(_items(row))):
      value, metrics = loss(model, params, frozen, padded([HISTORIES[row, : n + 1]]))
      np.testing.assert_allclose(value * metrics['targets'] - total, alone[row, n], atol=2e-4)
      total = float(value * metrics['targets'])


def test_padding_and_neighbours_do_not_matter():
  model, params, frozen = make()
  value, metrics = loss(model, params, frozen, HISTORIES)
  wide = np.pad(HISTORIES, ((1, 0), (0, 4)), constant_values=-1)
  same, same_metrics = loss(model, params, frozen, wide)
  np.testing.assert_allclose(same, value, rtol=1e-5)
  assert same_metrics['targets'] == metrics['targets']
  narrow, same = (
    scores(model, params, frozen, x) for x in (padded(HISTORIES, len(POSITIONS)), wide)
  )
  np.testing.assert_allclose(same[1:], narrow[:3], rtol=1e-4, atol=1e-5)
  nothing, metrics = loss(model, params, frozen, padded([]))
  assert nothing == metrics['targets'] == 0


def test_training_begins_at_popularity():
  model, _, frozen = make()
  params = initial_params(MLP, 1.0)
  found = scores(model, params, frozen, _beginnings())
  np.testing.assert_array_equal(found, np.tile(POPULARITY, (len(POSITIONS), 1)))
  value, _ = loss(model, params, frozen, HISTORIES)
  expected = -np.mean([POPULARITY[HISTORIES[at]] for at in POSITIONS])
  np.testing.assert_allclose(value, expected, rtol=1e-5)


# ---- a sample of the other items


def drawn(key, count, num_items=NUM_ITEMS):
  """The items that stand for the others."""
  return np.asarray(jax.random.randint(jax.random.split(key)[1], (count,), 0, num_items))


# (What of a prefix is read, whole and sampled losses read alike.)
@pytest.mark.parametrize('prefix', [(), pytest.param(BEFORE, marks=pytest.mark.slow)])
def test_a_sampled_loss_given_its_sample(prefix):
  model, params, frozen = make(prefix=prefix, whole_catalogue=0, num_negatives=5)
  _, of_row = nll_by_hand(model, params, frozen)
  for seed in range(4):
    key = jax.random.key(seed)
    nll = []
    for row, n in POSITIONS:
      of_items, target = of_row[row][n - 1], HISTORIES[row, n]
      others = [i for i in drawn(key, 5) if i != target]
      estimate = np.exp(of_items[others]).sum() * (NUM_ITEMS - 1) / len(others)
      nll.append(np.log(np.exp(of_items[target]) + estimate) - of_items[target])
    value, metrics = loss(model, params, frozen, HISTORIES, key)
    np.testing.assert_allclose(value, np.mean(nll), rtol=1e-4)
    assert metrics['targets'] == len(POSITIONS)


def test_the_sum_over_a_sample_is_right_on_average():
  """exp(nll) is 1 + (the sum over the others) / exp(own score), whose mean is that of all items."""
  model, params, frozen = make(whole_catalogue=0, num_negatives=5)
  whole = make_model()

  @tiny_gemma.jit
  def losses(params, frozen, history, keys):
    return jax.lax.map(
      lambda key: model.readout_loss(params, frozen, history, key, deterministic=True)[0],
      keys,
      batch_size=500,
    )

  keys = jax.random.split(jax.random.key(5), 2000)
  for history in ([3, 0], [6, 2]):  # the most popular item, and the least
    estimates = (
      np.exp(np.asarray(losses(params, frozen, np.array([history]), keys), np.float64)) - 1
    )
    exact = np.exp(float(loss(whole, params, frozen, padded([history]))[0])) - 1
    error = estimates.std() / np.sqrt(len(estimates))
    assert 0 < error < 0.03 * exact
    assert abs(estimates.mean() - exact) < 4 * error


def test_gradients_of_a_sampled_loss():
  """They are those of the whole one, where each of the others is drawn equally often."""
  model, params, frozen = make(whole_catalogue=0, num_negatives=3, num_items=2)
  whole = make_model(num_items=2)
  histories = np.array([[1, 0, 1, 1], [0, 0, -1, -1]])

  def gradients_of(model):
    def run(params, key):
      return model.readout_loss(params, frozen, histories, key, deterministic=True)[0]

    return tiny_gemma.jit(jax.grad(run))

  by_sample = {}
  for seed in range(40):
    key = jax.random.key(seed)
    by_sample.setdefault(frozenset(drawn(key, 3, 2).tolist()), key)
  assert len(by_sample) == 3  # both items; and one alone, so that a target has no others
  expected, sampled = gradients_of(whole)(params, KEY), gradients_of(model)
  found = {sample: sampled(params, key) for sample, key in by_sample.items()}
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5),
    found[frozenset({0, 1})], expected,
  )  # fmt: skip
  for tree in found.values():
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(tree))
  value, _ = loss(model, params, frozen, [[1, 0]], by_sample[frozenset({0})])
  assert value == 0  # against nothing


def test_a_trained_language_model():
  """The same loss, and the prefix gets its gradient."""
  model, params, frozen = make(prefix=BEFORE)
  trained = dataclasses.replace(frozen, lm=None, prefix=None)
  all_params = {**params, 'lm': VARIABLES['params']}

  def run(params, frozen):
    return model.readout_loss(params, frozen, jnp.asarray(HISTORIES), KEY, deterministic=True)[0]

  value, gradients = tiny_gemma.jit(jax.value_and_grad(run))(all_params, trained)
  np.testing.assert_allclose(value, loss(model, params, frozen, HISTORIES)[0], rtol=1e-5)
  # No token is embedded but those of the prefix.
  of_tokens = np.abs(gradients['lm']['embedder']['embedding']).max(axis=1)
  assert set(np.flatnonzero(of_tokens)) == set(BEFORE)

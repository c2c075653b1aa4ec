"""The losses against NumPy, float64, written as loops over the formulas of the papers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ilm_jax.models import losses


def _units(rng, *shape):
  x = rng.normal(size=shape)
  return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def _log_softmax(x):
  x = np.asarray(x, np.float64)
  return x - x.max() - np.log(np.exp(x - x.max()).sum())


def _similarity(left, right):
  best = np.full((len(left), len(right)), -np.inf)
  for b in range(len(left)):
    for c in range(len(right)):
      for k in range(left.shape[1]):
        for m in range(right.shape[1]):
          best[b, c] = max(best[b, c], np.dot(left[b, k].astype(np.float64), right[c, m]))
  return best


def _contrastive(scores, false_negatives, label_smoothing):
  """(loss, nll, gain, accuracy) from the definition: one softmax for each row and each column."""
  scores = np.asarray(scores, np.float64)
  size = len(scores)
  loss, nll, chance, hits = [], [], [], []
  for table, mask in ((scores, false_negatives), (scores.T, false_negatives.T)):
    for i in range(size):
      candidates = [j for j in range(size) if j == i or not mask[i, j]]
      log_p = _log_softmax([table[i, j] for j in candidates])
      labels = np.full(len(candidates), label_smoothing / len(candidates))
      labels[candidates.index(i)] += 1 - label_smoothing
      loss.append(-np.dot(labels, log_p))
      nll.append(-log_p[candidates.index(i)])
      chance.append(np.log(len(candidates)))
      hits.append(all(table[i, i] > table[i, j] for j in candidates if j != i))
  return np.mean(loss), np.mean(nll), np.mean(chance) - np.mean(nll), np.mean(hits)


def _gradient(function, x, step=1e-5):
  """Central differences, float64."""
  x = np.array(x, np.float64)
  gradient = np.zeros_like(x)
  for index in np.ndindex(x.shape):
    values = []
    for sign in (1, -1):
      moved = x.copy()
      moved[index] += sign * step
      values.append(function(moved))
    gradient[index] = (values[0] - values[1]) / (2 * step)
  return gradient


def _false_negatives(rng, size, kind):
  if kind == 'none':
    return np.zeros((size, size), bool)
  if kind == 'duplicates':  # symmetric, with the diagonal, as items == items gives it
    items = rng.integers(size // 2, size=size)
    return items[:, None] == items[None]
  return rng.random((size, size)) < 0.3  # the user's other items: not symmetric


_contrastive_and_gradient = jax.jit(
  jax.value_and_grad(
    lambda scores, excluded, label_smoothing: losses.contrastive(
      scores, excluded, label_smoothing=label_smoothing
    ),
    has_aux=True,
  )
)


@pytest.mark.parametrize('shapes', [((3, 4, 5), (6, 2, 5)), ((1, 1, 2), (1, 1, 2))])
def test_similarity_is_the_best_pair(shapes):
  rng = np.random.default_rng(0)
  left, right = (_units(rng, *shape) for shape in shapes)
  actual = losses.similarity(jnp.asarray(left), jnp.asarray(right))
  np.testing.assert_allclose(actual, _similarity(left, right), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('kind', ['none', 'duplicates', 'random'])
@pytest.mark.parametrize('label_smoothing', [0.0, 0.1])
@pytest.mark.parametrize('size', [1, 7])
def test_contrastive_is_the_formula(kind, label_smoothing, size):
  rng = np.random.default_rng(size)
  scores = rng.normal(size=(size, size), scale=3) + 2 * np.eye(size)
  false_negatives = _false_negatives(rng, size, kind if size > 1 else 'none')
  (loss, metrics), gradient = _contrastive_and_gradient(
    scores.astype(np.float32), false_negatives, label_smoothing
  )
  expected = _contrastive(scores, false_negatives, label_smoothing)
  actual = (loss, metrics['nll'], metrics['gain'], metrics['accuracy'])
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
  numeric = _gradient(lambda x: _contrastive(x, false_negatives, label_smoothing)[0], scores)
  np.testing.assert_allclose(gradient, numeric, rtol=1e-4, atol=1e-6)


def test_contrastive_through_features_has_the_gradient_of_the_formula():
  rng = np.random.default_rng(4)
  items, texts = rng.normal(size=(4, 3, 5)), rng.normal(size=(4, 1, 5))
  none = np.zeros((4, 4), bool)

  def ours(items, texts, temperature):
    left, right = losses.normalise(items), losses.normalise(texts)
    scores = losses.similarity(left, right) / temperature
    return losses.contrastive(scores, jnp.asarray(none), label_smoothing=0.1)[0]

  def theirs(items, texts, temperature):
    left = items / np.linalg.norm(items, axis=-1, keepdims=True)
    right = texts / np.linalg.norm(texts, axis=-1, keepdims=True)
    return _contrastive(_similarity(left, right) / temperature, none, 0.1)[0]

  arguments = [items, texts, np.array(0.3)]
  gradients = jax.jit(jax.grad(ours, argnums=(0, 1, 2)))(*map(np.float32, arguments))
  for i, gradient in enumerate(gradients):
    numeric = _gradient(lambda x, i=i: theirs(*arguments[:i], x, *arguments[i + 1 :]), arguments[i])
    np.testing.assert_allclose(gradient, numeric, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('size', [1, 7])
def test_one_item_many_times_teaches_nothing(size):
  scores, same = np.full((size, size), 14.2, np.float32), np.ones((size, size), bool)
  (loss, metrics), gradient = _contrastive_and_gradient(scores, same, 0.1)
  assert loss == 0
  assert metrics['gain'] == 0
  np.testing.assert_array_equal(gradient, np.zeros((size, size)))


def test_knowing_nothing_is_chance_and_copies_are_no_negatives():
  items = np.array([4, 7, 4, 9])
  same = jnp.asarray(items[:, None] == items[None])
  _, metrics = losses.contrastive(jnp.zeros((4, 4)), same)
  assert metrics['nll'] == pytest.approx((2 * np.log(3) + 2 * np.log(4)) / 4)
  assert metrics['gain'] == pytest.approx(0, abs=1e-6)
  # A copy scores what the item scores. As a negative it would leave log 2.
  scores = jnp.where(same, 50.0, 0.0)
  assert losses.contrastive(scores, same)[0] < 1e-6
  assert losses.contrastive(scores, jnp.eye(4, dtype=bool))[0] == pytest.approx(np.log(2) / 2)


def test_contrastive_of_bfloat16_is_float32():
  scores = jnp.asarray(np.random.default_rng(0).normal(size=(6, 6), scale=5), jnp.bfloat16)
  none = np.zeros((6, 6), bool)
  loss, metrics = losses.contrastive(scores, jnp.asarray(none), label_smoothing=0.1)
  expected = _contrastive(np.asarray(scores, np.float64), none, 0.1)
  np.testing.assert_allclose((loss, metrics['nll']), expected[:2], rtol=1e-5)
  assert loss.dtype == jnp.float32


def test_hard_negatives_are_drawn_from_the_softmax():
  rng = np.random.default_rng(0)
  size, draws = 6, 20_000
  scores = rng.normal(size=(size, size)).astype(np.float32)
  excluded = np.eye(size, dtype=bool)
  excluded[0, 3] = excluded[3, 0] = excluded[2, 5] = True
  excluded[4] = True  # a row without negatives
  sample = jax.jit(
    jax.vmap(lambda key: losses.sample_hard_negatives(key, scores, jnp.asarray(excluded)))
  )
  columns, exists = map(np.asarray, sample(jax.random.split(jax.random.key(0), draws)))
  assert (exists == (np.arange(size) != 4)).all()
  assert (columns[:, 4] == 0).all()
  for row in (0, 1, 2, 3, 5):
    allowed = np.flatnonzero(~excluded[row])
    counts = np.bincount(columns[:, row], minlength=size)
    assert counts[allowed].sum() == draws  # never an excluded one
    expected = draws * np.exp(_log_softmax(scores[row, allowed]))
    chi_square = ((counts[allowed] - expected) ** 2 / expected).sum()
    assert chi_square < 25  # at most 4 degrees of freedom: p < 1e-4
  # Rows are drawn independently of each other.
  together = np.mean((columns[:, 1] == 0) & (columns[:, 5] == 0))
  alone = np.mean(columns[:, 1] == 0) * np.mean(columns[:, 5] == 0)
  assert together == pytest.approx(alone, abs=5 * np.sqrt(alone / draws))


def test_sharp_scores_draw_the_hardest_and_huge_ones_do_not_overflow():
  scores = jnp.asarray([[9e4, 1e4, 0.0], [0.0, 9e4, 1e4], [1e4, 0.0, 9e4]])
  columns, exists = losses.sample_hard_negatives(jax.random.key(0), scores, jnp.eye(3, dtype=bool))
  np.testing.assert_array_equal(columns, [1, 2, 0])
  assert exists.all()


def test_a_batch_of_one_has_no_hard_negative():
  columns, exists = losses.sample_hard_negatives(
    jax.random.key(0), jnp.ones((1, 1)), jnp.ones((1, 1), bool)
  )
  assert columns.tolist() == [0]
  assert exists.tolist() == [False]


def _matching(logits, matches, weights):
  total = sum(weights)
  loss, right = 0.0, {True: [], False: []}
  for row, match, weight in zip(logits, matches, weights):
    loss -= weight * _log_softmax(row)[int(match)] / total
    right[bool(match)].append((weight, (row[1] > row[0]) == match))
  share = sum(w for m, w in zip(matches, weights) if m) / total
  constant = -sum(p * np.log(p) for p in (share, 1 - share) if p > 0)
  accuracy = {
    match: sum(w * hit for w, hit in rows) / sum(w for w, _ in rows) if rows else 0.0
    for match, rows in right.items()
  }
  return loss, constant, accuracy[True], accuracy[False]


@pytest.mark.parametrize('weighted', [False, True])
def test_matching_is_the_formula(weighted):
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(12, 2), scale=2).astype(np.float32)
  matches = np.arange(12) < 4
  weights = rng.integers(1, 4, size=12).astype(np.float32) if weighted else np.ones(12)
  if weighted:
    weights[[0, 7]] = 0
  loss, metrics = losses.matching(*map(jnp.asarray, (logits, matches, weights)))
  names = ('loss_of_constant', 'accuracy_match', 'accuracy_mismatch')
  actual = (loss, *(metrics[name] for name in names))
  np.testing.assert_allclose(actual, _matching(logits, matches, weights), rtol=1e-5)


def test_matching_of_one_to_two_and_of_a_constant_answer():
  matches = jnp.arange(9) < 3
  constant = jnp.tile(jnp.log(jnp.array([2 / 3, 1 / 3])), (9, 1))
  loss, metrics = losses.matching(constant, matches, jnp.ones(9))
  assert loss == pytest.approx(0.6365, abs=1e-4)
  assert metrics['loss_of_constant'] == pytest.approx(0.6365, abs=1e-4)
  assert (metrics['accuracy_match'], metrics['accuracy_mismatch']) == (0, 1)


@pytest.mark.parametrize('matches', [True, False])
def test_matching_of_one_class_and_of_no_rows_is_finite(matches):
  logits = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
  for weights in (np.ones(4), np.zeros(4)):
    (loss, metrics), gradient = _matching_and_gradient(logits, np.full(4, matches), weights)
    assert metrics['loss_of_constant'] == 0
    assert metrics['accuracy_mismatch' if matches else 'accuracy_match'] == 0
    assert np.isfinite(gradient).all()
    assert bool(loss > 0) == weights.any()


_matching_and_gradient = jax.jit(jax.value_and_grad(losses.matching, has_aux=True))


def _generation(states, embedding, targets, weights, label_smoothing):
  states, embedding = (np.asarray(x, np.float64) for x in (states, embedding))
  loss = nll = hits = 0.0
  for b, t in np.ndindex(targets.shape):
    logits = np.array([np.dot(states[b, t], row) for row in embedding])
    log_p = _log_softmax(logits)
    labels = np.full(len(embedding), label_smoothing / len(embedding))
    labels[targets[b, t]] += 1 - label_smoothing
    loss -= weights[b, t] * np.dot(labels, log_p)
    nll -= weights[b, t] * log_p[targets[b, t]]
    hits += weights[b, t] * (np.argmax(logits) == targets[b, t])
  total = max(weights.sum(), 1e-9)
  return loss / total, nll / total, hits / total


def _generation_case(dtype=jnp.float32, batch=3, length=5, width=48, vocab=37):
  """Half of the targets are the best token. Embeddings have a mean, as BERT's have."""
  rng = np.random.default_rng(2)
  states = jnp.asarray(rng.normal(size=(batch, length, width)), dtype)
  embedding = jnp.asarray(rng.normal(size=(vocab, width), scale=0.3) + 0.7, dtype)
  best = np.einsum('btd,vd->btv', *(np.asarray(x, np.float64) for x in (states, embedding)))
  other = rng.integers(vocab, size=(batch, length))
  targets = np.where(rng.random((batch, length)) < 0.5, best.argmax(axis=-1), other)
  weights = (rng.random((batch, length)) < 0.7).astype(np.float32)
  return states, embedding, targets, weights


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('label_smoothing', [0.0, 0.1])
def test_generation_is_the_formula(dtype, label_smoothing):
  states, embedding, targets, weights = _generation_case(dtype)
  loss, metrics = jax.jit(losses.generation, static_argnames='label_smoothing')(
    states, embedding, jnp.asarray(targets), jnp.asarray(weights), label_smoothing=label_smoothing
  )
  expected = _generation(states, embedding, targets, weights, label_smoothing)
  assert loss.dtype == jnp.float32
  # Products of bfloat16 are exact in float32, so both types are held to float32's tolerance.
  np.testing.assert_allclose((loss, metrics['nll']), expected[:2], rtol=1e-5)
  assert metrics['accuracy'] == pytest.approx(expected[2])


def test_generation_counts_every_best_token():
  """The best token is found in any rounding of its logit: many tokens, all of them targets."""
  states, embedding, _, _ = _generation_case(batch=8, length=64, width=384, vocab=500)
  targets = jnp.einsum('btd,vd->btv', states, embedding).argmax(axis=-1)
  _, metrics = jax.jit(losses.generation)(states, embedding, targets, jnp.ones(targets.shape))
  assert metrics['accuracy'] == 1


def test_generation_has_the_gradient_of_the_formula():
  states, embedding, targets, weights = _generation_case(batch=1, length=3, width=4, vocab=5)
  weights[0, 0] = 1
  gradients = _generation_and_gradients(states, embedding, targets, weights)[1]
  of_states = _gradient(lambda x: _generation(x, embedding, targets, weights, 0.1)[0], states)
  of_embedding = _gradient(lambda x: _generation(states, x, targets, weights, 0.1)[0], embedding)
  np.testing.assert_allclose(gradients[0], of_states, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(gradients[1], of_embedding, rtol=1e-4, atol=1e-6)


def test_generation_without_targets_is_zero_and_finite():
  states, embedding, targets, weights = _generation_case(batch=1, length=3, width=4, vocab=5)
  (loss, metrics), gradients = _generation_and_gradients(states, embedding, targets, 0 * weights)
  assert (loss, metrics['nll'], metrics['accuracy']) == (0, 0, 0)
  for gradient in gradients:
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


_generation_and_gradients = jax.jit(
  jax.value_and_grad(
    functools.partial(losses.generation, label_smoothing=0.1), argnums=(0, 1), has_aux=True
  )
)


def test_query_collapse():
  rng = np.random.default_rng(0)
  one = jnp.asarray(rng.normal(size=(3, 1, 8)), jnp.float32)
  scales = jnp.array([1.0, 5.0, 0.1, 2.0])[None, :, None]
  assert losses.query_collapse(one * scales) == pytest.approx(1, abs=1e-5)
  orthogonal = jnp.broadcast_to(jnp.eye(4, 8), (3, 4, 8)) * scales
  assert losses.query_collapse(orthogonal) == pytest.approx(0, abs=1e-6)
  assert losses.query_collapse(one) == 0
  queries = rng.normal(size=(3, 4, 8)).astype(np.float32)
  cosines = [
    a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    for entity in queries.astype(np.float64)
    for i, a in enumerate(entity)
    for j, b in enumerate(entity)
    if i != j
  ]
  actual = losses.query_collapse(jnp.asarray(queries))
  assert actual == pytest.approx(np.mean(cosines), abs=1e-6)


def test_normalise():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(4, 3, 8)).astype(np.float32) * 10.0 ** np.arange(-2, 2)[:, None, None]
  expected = x / np.linalg.norm(x, axis=-1, keepdims=True)
  np.testing.assert_allclose(losses.normalise(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-7)
  zeros = jnp.zeros((2, 8), jnp.bfloat16)
  assert losses.normalise(zeros).dtype == jnp.float32
  assert not losses.normalise(zeros).any()
  assert np.isfinite(jax.grad(lambda x: losses.normalise(x).sum())(jnp.zeros((2, 8)))).all()


@pytest.mark.parametrize(
  ('value', 'gradient', 'passes'),
  [
    (0.5, 1.0, True),
    (0.5, -1.0, True),
    (0.05, -2.0, True),  # below; a step against the gradient goes up, back inside
    (0.05, 2.0, False),
    (3.0, 2.0, True),  # above; a step goes down
    (3.0, -2.0, False),
  ],
)
def test_clamp_lets_the_gradient_pass_inwards(value, gradient, passes):
  assert losses.clamp(value, 0.1, 1.0) == pytest.approx(np.clip(value, 0.1, 1.0))
  expected = gradient if passes else 0.0
  assert _clamp_gradient(value, gradient) == expected
  assert jax.jit(_clamp_gradient)(value, gradient) == expected
  several = jax.vmap(_clamp_gradient, (0, None))(np.array([value, 0.5], np.float32), gradient)
  np.testing.assert_array_equal(several, [expected, gradient])


_clamp_gradient = jax.grad(lambda x, gradient: gradient * losses.clamp(x, 0.1, 1.0))


def test_a_parameter_that_got_outside_a_clamp_comes_back():
  step = jax.jit(lambda x: x - 0.1 * jax.grad(lambda x: (losses.clamp(x, 0.1, 1.0) - 0.5) ** 2)(x))
  for start in (-1.0, 2.0):
    x = jnp.asarray(start)
    for _ in range(100):
      x = step(x)
    assert x == pytest.approx(0.5, abs=1e-3)


def test_generation_in_bfloat16_is_float32_but_for_rounding():
  rng = np.random.default_rng(5)
  states, embedding = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 6, 8), (40, 8)))
  targets, weights = rng.integers(40, size=(2, 6)), np.ones((2, 6))

  def loss(embedding, bf16_matmul):
    return losses.generation(
      states, embedding, targets, weights, label_smoothing=0.1, bf16_matmul=bf16_matmul
    )[0]

  found, expected = (jax.value_and_grad(loss)(embedding, bf16) for bf16 in (True, False))
  assert found[0] != expected[0]
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-2)
  np.testing.assert_allclose(found[1], expected[1], rtol=2e-2, atol=2e-3)

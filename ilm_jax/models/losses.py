"""The losses of phase 1 as functions of arrays (ILM, arXiv:2406.02844; BLIP-2, arXiv:2301.12597).

Every function sees the GLOBAL batch: under jit on a mesh the arrays are global, so negatives come
from all devices and gradients flow to all of them, as on one device.

Letters: B batch, K queries of an entity, F contrastive features, N rows, T text tokens, D width,
V vocabulary. Metrics are scalars; losses are in nats.
"""

import jax
import jax.numpy as jnp

from ilm_jax.modules.precision import bf16_times_rows

Metrics = dict[str, jax.Array]

_EXCLUDED = -1e9  # a score that is never chosen, finite so that a fully excluded row has no NaN


def similarity(left: jax.Array, right: jax.Array) -> jax.Array:
  """Cosine of two entities, or of an entity and a text: the best over their features.

  Args:
    left: [B, K, F] unit vectors.
    right: [C, L, F] unit vectors.

  Returns:
    [B, C], max over k and l of <left[b, k], right[c, l]>.
  """
  return jnp.einsum('bkf,clf->bckl', left, right).max(axis=(2, 3))


def contrastive(
  scores: jax.Array, false_negatives: jax.Array, *, label_smoothing: float = 0.0
) -> tuple[jax.Array, Metrics]:
  """Symmetric InfoNCE: row i's positive is column i, and column i's is row i (ITC, II, UI).

  A false negative is no candidate: it is left out of both softmaxes, and label smoothing spreads
  over the candidates that remain. A row whose only candidate is its positive (batch of 1, copies
  of one item) has loss 0.

  Args:
    scores: [B, B] similarity / temperature.
    false_negatives: [B, B] bool; its diagonal is ignored.
    label_smoothing: probability mass spread evenly over the candidates, the positive included.

  Returns:
    The loss, the mean of both directions, and the metrics
      nll: the same without label smoothing,
      gain: chance - nll, where chance = mean of log(number of candidates); 0 is knowing nothing,
      accuracy: how often the positive scores above all other candidates.
  """
  positives = jnp.eye(scores.shape[0], dtype=bool)
  excluded = false_negatives & ~positives
  scores = jnp.where(excluded, _EXCLUDED, scores.astype(jnp.float32))
  losses, nlls, chances, hits = [], [], [], []
  for axis in (1, 0):
    log_p = jax.nn.log_softmax(scores, axis=axis)
    candidates = (~excluded).sum(axis=axis)
    nll = -jnp.diagonal(log_p)
    even = -jnp.where(excluded, 0.0, log_p).sum(axis=axis) / candidates
    losses.append((1 - label_smoothing) * nll + label_smoothing * even)
    nlls.append(nll)
    chances.append(jnp.log(candidates))
    best_negative = jnp.where(positives, _EXCLUDED, scores).max(axis=axis)
    hits.append(jnp.diagonal(scores) > best_negative)
  nll = jnp.mean(jnp.stack(nlls))
  return jnp.mean(jnp.stack(losses)), {
    'nll': nll,
    'gain': jnp.mean(jnp.stack(chances)) - nll,
    'accuracy': jnp.mean(jnp.stack(hits)),
  }


def sample_hard_negatives(
  key: jax.Array, scores: jax.Array, excluded: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Draws one wrong column for each row, from the softmax of the row's scores.

  Args:
    key: of the draw.
    scores: [B, B].
    excluded: [B, B] bool, columns that are no negatives: the diagonal and every duplicate.

  Returns:
    Columns [B] int32, and whether the row has a negative at all [B] bool (column 0 if not).
  """
  scores = jnp.where(excluded, -jnp.inf, scores.astype(jnp.float32))
  exists = ~excluded.all(axis=1)
  columns = jax.random.categorical(key, jnp.where(exists[:, None], scores, 0.0), axis=1)
  return jnp.where(exists, columns, 0), exists


def matching(
  logits: jax.Array, matches: jax.Array, weights: jax.Array
) -> tuple[jax.Array, Metrics]:
  """ITM: does this text describe this entity?

  Args:
    logits: [N, 2], (no, yes), averaged over queries.
    matches: [N] bool.
    weights: [N] float, 0 for rows that do not count.

  Returns:
    The cross-entropy, and the metrics
      loss_of_constant: what the best constant answer would score: .6365 for labels 1 : 2,
      accuracy_match, accuracy_mismatch: of each class (0 where the class has no row).
  """
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
  nll = -jnp.where(matches, log_p[:, 1], log_p[:, 0])
  says_yes = logits[:, 1] > logits[:, 0]
  share = _mean(matches, weights)
  entropy = -(jax.scipy.special.xlogy(share, share) + jax.scipy.special.xlogy(1 - share, 1 - share))
  return _mean(nll, weights), {
    'loss_of_constant': entropy,
    'accuracy_match': _mean(says_yes, weights * matches),
    'accuracy_mismatch': _mean(~says_yes, weights * ~matches),
  }


def generation(
  states: jax.Array,
  embedding: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  *,
  label_smoothing: float = 0.0,
  bf16_matmul: bool = False,
) -> tuple[jax.Array, Metrics]:
  """ITG: cross-entropy of the next token, its logits being states @ embedding^T.

  Args:
    states: [B, T, D].
    embedding: [V, D], tied.
    targets: [B, T] int.
    weights: [B, T], 1 where a target counts.
    label_smoothing: probability mass spread evenly over the vocabulary.
    bf16_matmul: as of QFormerConfig.

  Returns:
    The mean over weighted targets, and the metrics `nll` (without smoothing; exp of it is the
    perplexity) and `accuracy` of the best token.
  """
  if bf16_matmul:
    logits = bf16_times_rows(states, embedding)
  else:
    logits = jnp.einsum('btd,vd->btv', states, embedding, preferred_element_type=jnp.float32)
  log_z = jax.nn.logsumexp(logits, axis=-1)
  # Reductions of the same logits: a product of its own rounds differently, so that the best token
  # is not equal to the maximum. And no gather from [B, T, V], which a sharded V makes costly.
  is_target = targets[..., None] == jnp.arange(embedding.shape[0])
  target_logit = jnp.where(is_target, logits, 0.0).sum(axis=-1)
  mean_logit = logits.mean(axis=-1)
  nll = log_z - target_logit
  smoothed = (1 - label_smoothing) * nll + label_smoothing * (log_z - mean_logit)
  return _mean(smoothed, weights), {
    'nll': _mean(nll, weights),
    'accuracy': _mean(target_logit >= logits.max(axis=-1), weights),
  }


def query_collapse(queries: jax.Array) -> jax.Array:
  """Mean cosine between the different queries [B, K, D] of an entity: 1 if all say the same.

  0 where there is one query only.
  """
  num_queries = queries.shape[1]
  if num_queries == 1:
    return jnp.zeros(())
  unit = normalise(queries)
  total = jnp.einsum('bkd,bld->b', unit, unit) - num_queries
  return jnp.mean(total) / (num_queries * (num_queries - 1))


def normalise(features: jax.Array) -> jax.Array:
  """Unit vectors along the last axis, float32; zeros stay zeros."""
  features = features.astype(jnp.float32)
  return features * jax.lax.rsqrt(jnp.square(features).sum(-1, keepdims=True) + 1e-12)


@jax.custom_vjp
def clamp(value: jax.Array, low: float, high: float) -> jax.Array:
  """Clips a scalar; outside, the gradient passes only if descending it leads back inside.

  With jnp.clip a parameter that once got outside would stay there, its gradient being 0.
  """
  return jnp.clip(value, low, high)


def _clamp_forward(value, low, high):
  return jnp.clip(value, low, high), (value, low, high)


def _clamp_backward(saved, gradient):
  value, low, high = saved
  outwards = ((value < low) & (gradient > 0)) | ((value > high) & (gradient < 0))
  return jnp.where(outwards, 0.0, gradient), None, None


clamp.defvjp(_clamp_forward, _clamp_backward)


def _mean(values: jax.Array, weights: jax.Array) -> jax.Array:
  """Weighted mean; 0 where no weight is."""
  weights = weights.astype(jnp.float32)
  return (values * weights).sum() / jnp.maximum(weights.sum(), 1e-9)

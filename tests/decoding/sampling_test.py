"""Sampling: what is generated is what whole forward passes say, and draws are from what is told."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from ilm_jax.decoding import sampling
from ilm_jax.decoding.sampling import SamplingOptions, candidates, choose_tokens, generate
from ilm_jax.errors import UsageError
from ilm_jax.modules.attention import NewTokens
from tests.support import tiny_lms

NEW = 10
TOKENS = np.random.default_rng(1).integers(1, tiny_lms.VOCAB, (3, 9))
LENGTHS = np.array([9, 4, 1])
MODELS = [
  ('gemma', True), ('gemma', False), ('llama', False), ('t5', True), ('t5_decoder', False)
]  # fmt: skip


@functools.cache
def compiled(lm):
  return jax.jit(functools.partial(generate, lm), static_argnames='max_new_tokens')


def run(tiny, inputs=TOKENS, lengths=LENGTHS, options=SamplingOptions(), **kwargs):
  arguments = (tiny.params, inputs, lengths, options.traced())
  kwargs = {'rows': np.arange(len(inputs)), 'max_new_tokens': NEW, **kwargs}
  return jax.device_get(compiled(tiny.lm)(*arguments, **kwargs))


@functools.cache
def expected(name, scan, row):
  tiny = tiny_lms.tiny_lm(name, scan)
  return tiny.greedy(tiny.embed(TOKENS[row, : LENGTHS[row]]), NEW)


@pytest.mark.parametrize(('name', 'scan'), MODELS)
def test_greedy_is_what_whole_forward_passes_say(name, scan):
  """Each row as if alone, with a window shorter than the prompt, softcaps and grouped heads."""
  out = run(tiny_lms.tiny_lm(name, scan))
  assert len(set(out.tokens.ravel())) > 5  # the models do say something
  for row in range(3):
    tokens, log_probs = expected(name, scan, row)
    assert out.tokens[row].tolist() == tokens
    np.testing.assert_allclose(out.log_probs[row], log_probs, atol=1e-5)
  assert out.lengths.tolist() == [NEW] * 3
  assert not out.stopped.any()


@pytest.mark.parametrize('name', ['llama', 't5'])
def test_a_stop_token_ends_its_row(name):
  tiny = tiny_lms.tiny_lm(name, name == 't5')
  free = run(tiny)
  stop = int(free.tokens[0, 3])
  many = (*range(1000, 1008), stop)  # more than their array has places for at first
  for stop_ids in [(stop,)] + [many] * (name == 'llama'):
    out = run(tiny, options=SamplingOptions(stop_ids=stop_ids))
    for row in range(3):
      places = np.flatnonzero(free.tokens[row] == stop)
      length = places[0] + 1 if len(places) else NEW
      assert out.lengths[row] == length
      assert out.stopped[row] == bool(len(places))
      assert out.tokens[row].tolist() == [*free.tokens[row, :length], *[0] * (NEW - length)]
      np.testing.assert_allclose(out.log_probs[row, :length], free.log_probs[row, :length])
      assert not out.log_probs[row, length:].any()
  assert out.stopped[0]


def test_the_limit_of_the_options_counts():
  tiny = tiny_lms.tiny_lm('llama', False)
  free = run(tiny)
  for limit in (1, 4, NEW + 7):
    out = run(tiny, options=SamplingOptions(max_new_tokens=limit))
    assert out.lengths.tolist() == [min(limit, NEW)] * 3
    assert (out.tokens[:, :limit] == free.tokens[:, :limit]).all()
    assert not out.tokens[:, limit:].any()


def test_the_loop_ends_when_all_rows_have():
  """Steps are counted where they are made; a row of length 0 is not waited for."""
  steps = []
  tiny = tiny_lms.tiny_lm('llama', False)

  def step(tokens, positions, cache):
    jax.debug.callback(lambda p: steps.append(p.tolist()), positions)
    new = jax.tree.map(lambda x: x[..., :1, :], cache.layers)
    new = NewTokens(new, positions[:, None], jnp.ones_like(positions)[:, None])
    return jnp.eye(tiny_lms.VOCAB)[positions], new  # says its position

  options = SamplingOptions(stop_ids=(6, 9)).traced()
  decode = functools.partial(
    sampling.decode, step, sampling=options, max_new_tokens=NEW, rows=np.arange(3)
  )
  out = jax.jit(decode)(
    logits=np.eye(tiny_lms.VOCAB, dtype=np.float32)[[2, 6, 3]],
    positions=np.array([3, 7, 4]),
    cache=tiny.lm.init_cache(3, NEW),
    ended=np.array([False, False, True]),
  )
  jax.effects_barrier()
  assert out.tokens[:, :6].tolist() == [[2, 3, 4, 5, 6, 0], [6, 0, 0, 0, 0, 0], [0] * 6]
  assert out.lengths.tolist() == [5, 1, 0]
  assert out.stopped.tolist() == [True, True, False]
  assert [row[0] for row in steps] == [3, 4, 5, 6]


@pytest.mark.parametrize('places', [[0], [3, 4], [0, 2, 8]])
def test_soft_tokens_anywhere(places):
  tiny = tiny_lms.tiny_lm('gemma', False)
  soft = np.random.default_rng(2).normal(size=(len(places), 16)).astype(np.float32)
  embeddings = tiny.embed(TOKENS[:1])
  embeddings[0, places] = soft
  out = run(tiny, embeddings, LENGTHS[:1])
  tokens, log_probs = tiny.greedy(embeddings[0], NEW)
  assert out.tokens[0].tolist() == tokens != expected('gemma', False, 0)[0]
  np.testing.assert_allclose(out.log_probs[0], log_probs, atol=1e-5)


def test_a_beginning_that_all_prompts_share():
  tiny = tiny_lms.tiny_lm('gemma')
  beginning = np.random.default_rng(3).integers(1, tiny_lms.VOCAB, 6)

  @jax.jit
  def shared(params, embeddings):
    _, new = tiny.lm.apply({'params': params}, embeddings)
    return tiny.lm.init_cache(1, 8).append(new)

  out = run(tiny, cache=shared(tiny.params, tiny.embed(beginning[None])))
  for row, length in enumerate(LENGTHS):
    prompt = tiny.embed(np.concatenate([beginning, TOKENS[row, :length]]))
    tokens, log_probs = tiny.greedy(prompt, NEW)
    assert out.tokens[row].tolist() == tokens
    np.testing.assert_allclose(out.log_probs[row], log_probs, atol=1e-5)


@pytest.mark.parametrize(
  ('name', 'scan', 'rows'),
  [
    # What tests above have run, so that it is compiled.
    ('gemma', True, 3),
    ('gemma', False, 3),
    ('gemma', False, 1),
    ('t5', True, 3),
    ('t5_decoder', False, 3),
    *(pytest.param('llama', scan, 1, marks=pytest.mark.slow) for scan in (True, False)),
    pytest.param('llama', True, 3, marks=pytest.mark.slow),
    pytest.param('t5', False, 3, marks=pytest.mark.slow),
  ],
)
def test_the_cache_stays_where_it_is(name, scan, rows):
  """No copy of a layer's cache, nor of all, in the compiled loop."""
  tiny = tiny_lms.tiny_lm(name, scan)
  inputs = TOKENS if rows == 3 else tiny.embed(TOKENS[:1])
  arguments = tiny.params, inputs, LENGTHS[:rows], SamplingOptions().traced()
  lowered = compiled(tiny.lm).lower(*arguments, rows=np.arange(rows), max_new_tokens=NEW)
  program = lowered.compile().as_text()
  heads, width = (2, 8) if name in ('gemma', 'llama') else (2, 6)
  capacity = NEW if name == 't5' else 9 + NEW - 1
  cached = rf'f32\[(?:\d+,)?{rows},{heads},{capacity},{width}\]\S*'
  # All computations but the first: bodies of loops, and what they call.
  inner = program[: program.index('\nENTRY ')]
  assert re.search(rf'{cached} (fusion|dynamic-update-slice)\(', inner)
  assert not re.findall(rf'.*{cached} copy\(.*', inner)


# Draws. Logits of 12 tokens, two of which are equal.
LOGITS = np.array([2.0, -1.0, 0.5, 3.0, 0.5, -3.0, 1.0, -0.0, 0.2, 2.5, -2.0, 1.7], np.float32)


def exact(logits, temperature=1.0, top_k=None, top_p=None):
  """Probabilities in float64, by sorting."""
  p = scipy.special.softmax(logits.astype(np.float64) / temperature)
  order = np.argsort(-p, kind='stable')
  keep = np.ones(len(p), bool)
  if top_k is not None:
    keep &= p >= p[order[min(top_k, len(p)) - 1]]
  if top_p is not None:
    p = np.where(keep, p, 0) / p[keep].sum()
    before = np.array([p[p > x].sum() for x in p])  # what is more likely
    keep &= before < top_p
  return np.where(keep, p, 0) / p[keep].sum()


FILTERS = [
  {},
  {'temperature': 0.5},
  {'top_k': 6},  # the sixth and the seventh are equal: both stay
  {'temperature': 2.0, 'top_k': 8, 'top_p': 0.7},
  # What is kept is compared with sorting below, for many more of them.
  *(
    pytest.param(filters, marks=pytest.mark.slow)
    for filters in (
      {'top_k': 1},
      {'top_p': 0.8},
      {'top_p': 0.3},
      {'top_k': 50, 'top_p': 1.0},
    )
  ),
]


candidates_compiled = jax.jit(candidates)
draw_from = jax.jit(sampling.draw)


@functools.cache
def draw_compiled():
  def draw(logits, options, keys):
    return choose_tokens(jnp.broadcast_to(logits, (len(keys), len(logits))), options, keys)

  return jax.jit(draw)


@pytest.mark.parametrize('filters', FILTERS, ids=str)
def test_draws_are_of_the_distribution(filters):
  n = 20_000
  options = SamplingOptions(**{'temperature': 1.0, **filters})
  keys = jax.random.split(jax.random.key(7), n)
  drawn = np.bincount(draw_compiled()(LOGITS, options.traced(), keys), minlength=len(LOGITS))
  p = exact(LOGITS, **filters)
  assert not drawn[p == 0].any()
  if (p > 0).sum() > 1:
    assert scipy.stats.chisquare(drawn[p > 0], n * p[p > 0]).pvalue > 1e-3


@given(
  st.integers(0, 10**6),
  st.sampled_from([1, 2, 7, 40, 999, 1000, 10**6]),
  st.sampled_from([1e-3, 0.1, 0.5, 0.9, 0.999, 1.0]),
  st.sampled_from([0.3, 1.0, 20.0]),
)
@settings(max_examples=60, deadline=None)
def test_candidates_are_the_sorted_ones(seed, top_k, top_p, scale):
  rng = np.random.default_rng(seed)
  logits = (scale * rng.normal(size=(2, 1000))).astype(np.float32)
  logits[1] = np.round(logits[1])  # many are equal
  kept = candidates_compiled(logits, np.int32(top_k), np.float32(top_p))
  for row, got in zip(logits, np.asarray(kept)):
    lower, upper = (exact(row, 1.0, top_k, top_p + d) > 0 for d in (-1e-6, 1e-6))
    if top_p == 1:
      upper = exact(row, 1.0, top_k) > 0
    assert (got >= lower).all()  # up to rounding of the sum
    assert (got <= upper).all()


@given(st.integers(0, 10**6), st.sampled_from([3, 256, 257, 5000]))
@settings(max_examples=30, deadline=None)
def test_a_draw_is_never_of_a_token_without_probability(seed, vocab_size):
  rng = np.random.default_rng(seed)
  p = rng.exponential(size=(6, vocab_size)) ** 6 * (rng.random((6, vocab_size)) < 0.02)
  p[:, rng.integers(vocab_size)] += 1e-9
  p = (p / p.sum(axis=1, keepdims=True)).astype(np.float32)
  # The least and the greatest number that jax.random.uniform gives, and ends of tokens.
  ends = [np.cumsum(row)[rng.integers(vocab_size)] for row in p[2:]]
  uniform = np.minimum([0.0, 1 - 2**-23, *ends], 1 - 2**-23).astype(np.float32)
  drawn = np.asarray(draw_from(p, uniform))
  assert (p[np.arange(6), drawn] > 0).all()
  before = np.array([row[:i].sum(dtype=np.float64) for row, i in zip(p, drawn)])
  np.testing.assert_array_less(before, uniform + 1e-5)
  np.testing.assert_array_less(uniform, before + p[np.arange(6), drawn] + 1e-5)


def test_a_low_temperature_is_greedy():
  tiny = tiny_lms.tiny_lm('llama', False)
  for temperature in (1e-6, 1e-4):
    cold = run(tiny, options=SamplingOptions(temperature=temperature))
    assert (cold.tokens == run(tiny).tokens).all()


def test_seeds_and_rows_decide_what_is_drawn():
  tiny = tiny_lms.tiny_lm('llama', False)
  hot = [run(tiny, options=SamplingOptions(temperature=2.0, seed=seed)) for seed in (0, 0, 1)]
  assert (hot[0].tokens == hot[1].tokens).all()
  assert (hot[0].tokens != hot[2].tokens).any(axis=1).all()
  # What stands beside a row does not matter; equal prompts draw each their own.
  options = SamplingOptions(temperature=2.0)
  beside = run(tiny, TOKENS[[2, 1, 1]], LENGTHS[[2, 1, 1]], options)
  assert (beside.tokens[1] == hot[0].tokens[1]).all()
  assert (beside.tokens[2] != beside.tokens[1]).any()
  moved = run(tiny, TOKENS[[1, 0, 2]], LENGTHS[[1, 0, 2]], options, rows=np.array([1, 0, 2]))
  assert (moved.tokens[[1, 0, 2]] == hot[0].tokens).all()
  # Log-probabilities are the model's, whatever is drawn from.
  row, new = tiny.embed(np.concatenate([TOKENS[0], hot[0].tokens[0]])), hot[0].tokens[0]
  log_probs = tiny.log_probs(row)[8:-1][np.arange(NEW), new]
  np.testing.assert_allclose(hot[0].log_probs[0], log_probs, atol=1e-5)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'max_new_tokens': 0}, 'max_new_tokens=0; it must be 1 or more'),
    ({'temperature': -1.0}, 'temperature=-1.0; it must be 0, which takes the most likely'),
    ({'temperature': 1e-9}, 'or 1e-06 or more'),
    ({'temperature': float('nan')}, 'temperature=nan'),
    ({'temperature': 1.0, 'top_k': 0}, 'top_k=0; it must be None or 1 or more'),
    ({'temperature': 1.0, 'top_p': 0.0}, r'top_p=0.0; it must be None or in \(0, 1\]'),
    ({'top_p': 0.9}, 'but temperature=0 always takes the most likely one. Give a temperature'),
    ({'stop_ids': (-1,)}, r'stop_ids=\(-1,\)'),
    ({'seed': 2**32}, 'seed='),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(UsageError, match=message):
    SamplingOptions(**options)

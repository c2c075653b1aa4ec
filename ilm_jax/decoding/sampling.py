"""Text from a language model: greedy or drawn at random, token by token, inside jit.

  sampling = SamplingOptions(max_new_tokens=64, temperature=0.7, top_p=0.9, stop_ids=(2,)).traced()
  generated = jax.jit(
    lambda params, tokens, lengths: generate(
      lm, params, tokens, lengths, sampling, max_new_tokens=64
    )
  )(params, tokens, lengths)

Prompts are padded on the right, so that rows of different length begin at place 0:

  tokens     [[5, 6, 7, 8], [9, 3, 0, 0]]   lengths [4, 2]
  place       0  1  2  3     0  1  2  3    4  5       the cache: new tokens stand after all prompts
  position    0  1  2  3     0  1  -  -    4  5 | 2  3
  segment     1  1  1  1     1  1  0  0    1  1

Letters: B rows, T tokens of a prompt, D model width, N new tokens, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ilm_jax.decoding.prefill import prefill
from ilm_jax.errors import UsageError
from ilm_jax.modules.attention import Cache, NewTokens
from ilm_jax.modules.decoder import Decoder
from ilm_jax.modules.t5 import T5

# (tokens [B], positions [B], cache) -> (logits [B, V] of what comes next, the tokens for the cache)
Step: TypeAlias = Callable[[jax.Array, jax.Array, Cache], tuple[jax.Array, NewTokens]]

START_ID = 0  # what the decoder of an encoder-decoder begins with: T5's padding
_LEAST_TEMPERATURE = 1e-6  # below, it is no longer a normal float32
_STOP_IDS = 8  # their number is padded to a multiple of it, so that few programs are compiled
_BLOCK = 256  # tokens of which a draw looks at the sum first


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
  """How tokens are chosen, and when to stop.

  Attributes:
    max_new_tokens: of a row, the one that stops it included.
    temperature: 0 takes the most likely token; else logits are divided by it.
    top_k: draw from the k most likely tokens only; None: from all.
    top_p: draw from the fewest tokens that have this much of the probability (Holtzman et al. 2020,
      arXiv:1904.09751), after temperature and top_k; None: from all.
    stop_ids: tokens that end a row; None: the vocabulary's EOS, where there is a vocabulary.
    seed: of the random numbers.

  With equal logits, tokens are kept or left out together.
  """

  max_new_tokens: int = 64
  temperature: float = 0.0
  top_k: int | None = None
  top_p: float | None = None
  stop_ids: tuple[int, ...] | None = None
  seed: int = 0

  def __post_init__(self):
    def require(ok: bool, name: str, allowed: str) -> None:
      if not ok:
        raise UsageError(f'sampling: {name}={getattr(self, name)!r}; it must be {allowed}.')

    require(self.max_new_tokens >= 1, 'max_new_tokens', '1 or more')
    require(
      self.temperature == 0 or _LEAST_TEMPERATURE <= self.temperature < math.inf,
      'temperature',
      f'0, which takes the most likely token, or {_LEAST_TEMPERATURE} or more',
    )
    require(self.top_k is None or self.top_k >= 1, 'top_k', 'None or 1 or more')
    require(self.top_p is None or 0 < self.top_p <= 1, 'top_p', 'None or in (0, 1]')
    require(all(i >= 0 for i in self.stop_ids or ()), 'stop_ids', 'ids of tokens, 0 or more')
    require(0 <= self.seed < 2**32, 'seed', 'from 0 to 2**32 - 1')
    if not self.temperature:
      for name in ('top_k', 'top_p'):
        if getattr(self, name) is not None:
          raise UsageError(
            f'sampling: {name}={getattr(self, name)} says from which tokens to draw, but'
            ' temperature=0 always takes the most likely one. Give a temperature, such as 1.0.'
          )

  def traced(self) -> 'Sampling':
    """As arrays, which a compiled program takes as arguments."""
    stop_ids = list(self.stop_ids or (-1,))  # no token has it
    missing = -len(stop_ids) % _STOP_IDS
    return Sampling(
      limit=np.int32(self.max_new_tokens),
      temperature=np.float32(self.temperature),
      top_k=np.int32(np.iinfo(np.int32).max if self.top_k is None else self.top_k),
      top_p=np.float32(1.0 if self.top_p is None else self.top_p),
      stop_ids=np.array(stop_ids + [-1] * missing, np.int32),
      seed=np.uint32(self.seed),
    )


class Sampling(NamedTuple):
  """SamplingOptions as scalars; `stop_ids` [n], padded with -1. `limit` is max_new_tokens."""

  limit: Any
  temperature: Any
  top_k: Any
  top_p: Any
  stop_ids: Any
  seed: Any


class Generated(NamedTuple):
  """What came of a prompt, row by row.

  Attributes:
    tokens: [B, N] int32; 0 after the end of a row.
    lengths: [B] int32, how many tokens there are, a stop token included.
    log_probs: [B, N] float32, of each token according to the model, whatever the temperature and
      the filters were; 0 after the end.
    stopped: [B] bool: the last token is a stop token.
  """

  tokens: jax.Array
  lengths: jax.Array
  log_probs: jax.Array
  stopped: jax.Array


def generate(
  lm: Decoder | T5,
  params: Any,
  inputs: jax.Array,
  lengths: jax.Array,
  sampling: Sampling,
  *,
  max_new_tokens: int,
  cache: Cache | None = None,
  rows: jax.Array | None = None,
) -> Generated:
  """Goes on from prompts: of a decoder, or of an encoder-decoder, whose encoder reads them.

  Args:
    lm: the model; `params` its parameters.
    inputs: [B, T] tokens; or [B, T, D] embeddings, of `lm.embed_tokens` with soft tokens in it.
    lengths: [B], tokens of each prompt; 0 for a row that is not wanted, of which nothing comes.
    sampling: how to choose, `SamplingOptions.traced()`.
    max_new_tokens: N; where `sampling.limit` is less, no more than that.
    cache: of one row: tokens 0 to `cache.length` - 1, which come before all prompts. Of decoders.
    rows: [B], of which random numbers a row gets; 0, 1, ... by default.
  """
  apply = _apply(lm, params)
  if not jnp.issubdtype(inputs.dtype, jnp.floating):
    inputs = apply('embed_tokens', inputs)
  batch = inputs.shape[0]
  if isinstance(lm, T5) and lm.config.num_encoder_layers:
    if cache is not None:
      raise ValueError(
        'generate: a cache is of a decoder that reads the prompts; here, an encoder.'
      )
    read = _read_by_encoder(lm, apply, inputs, lengths, max_new_tokens)
  else:
    read = _read_by_decoder(lm, params, inputs, lengths, max_new_tokens, cache)

  def step(tokens: jax.Array, positions: jax.Array, cache: Cache) -> tuple[jax.Array, NewTokens]:
    hidden, new = read.run(apply('embed_tokens', tokens[:, None]), positions[:, None], cache)
    return apply('logits', hidden[:, 0]), new

  return decode(
    step,
    apply('logits', read.last),
    read.positions,
    read.cache,
    sampling,
    max_new_tokens,
    rows=jnp.arange(batch) if rows is None else rows,
    ended=lengths == 0,
  )


class _Read(NamedTuple):
  """Prompts that were read.

  Attributes:
    run: (embeddings [B, 1, D], positions [B, 1], cache) -> (hidden [B, 1, D], NewTokens).
    last: [B, D], what the first new token is chosen by.
    positions: [B], where that token will stand.
    cache: with room for all new tokens but the last, which is not run.
  """

  run: Callable[[jax.Array, jax.Array, Cache], tuple[jax.Array, NewTokens]]
  last: jax.Array
  positions: jax.Array
  cache: Cache


def _apply(lm: Decoder | T5, params: Any) -> Callable[..., Any]:
  return lambda method, *args, **kwargs: lm.apply(
    {'params': params}, *args, method=method, **kwargs
  )


def _read_by_decoder(
  lm: Decoder | T5,
  params: Any,
  inputs: jax.Array,
  lengths: jax.Array,
  max_new_tokens: int,
  cache: Cache | None,
) -> _Read:
  batch, length, _ = inputs.shape
  last, new = prefill(lm, params, inputs, lengths, cache=cache)
  before = lm.init_cache(batch, 0) if cache is None else cache.repeat(batch)
  apply = _apply(lm, params)
  return _Read(
    run=lambda embeddings, positions, cache: apply('__call__', embeddings, positions, cache=cache),
    last=last,
    positions=lengths if cache is None else cache.length + lengths,
    cache=before.extended(length + max_new_tokens - 1).append(new),
  )


def _read_by_encoder(
  lm: T5, apply: Callable[..., Any], inputs: jax.Array, lengths: jax.Array, max_new_tokens: int
) -> _Read:
  """The decoder has run on the token that it begins with."""
  batch, length, _ = inputs.shape
  there = (jnp.arange(length) < lengths[:, None]).astype(jnp.int32)
  source = apply('cross_cache', apply('encode', inputs, segment_ids=there))

  def run(embeddings: jax.Array, positions: jax.Array, cache: Cache | None) -> Any:
    at = {'positions': positions, 'encoder_segment_ids': there}
    return apply('decode', embeddings, source, cache=cache, **at)

  start = apply('embed_tokens', jnp.full((batch, 1), START_ID))
  hidden, new = run(start, jnp.zeros((batch, 1), jnp.int32), None)
  return _Read(
    run=run,
    last=hidden[:, 0],
    positions=jnp.ones((batch,), jnp.int32),
    cache=lm.init_cache(batch, max_new_tokens).append(new),
  )


def decode(
  step: Step,
  logits: jax.Array,
  positions: jax.Array,
  cache: Cache,
  sampling: Sampling,
  max_new_tokens: int,
  *,
  rows: jax.Array,
  ended: jax.Array,
) -> Generated:
  """The loop: chooses tokens and runs the model on them, until all rows have ended.

  Args:
    step: runs the model on one token of each row.
    logits: [B, V], of the first token.
    positions: [B], where it will stand.
    cache: with room for max_new_tokens - 1 more.
    sampling: how to choose.
    max_new_tokens: N.
    rows: [B], of which random numbers a row gets.
    ended: [B] bool: rows of which nothing is wanted.
  """

  def choose(state: _State, logits: jax.Array) -> _State:
    """With one more token."""
    keys = _keys(sampling.seed, rows, state.count)
    tokens = jnp.where(state.ended, 0, choose_tokens(logits, sampling, keys))
    log_probs = jnp.where(state.ended, 0.0, _log_prob(logits, tokens))
    stops = ~state.ended & (tokens[:, None] == sampling.stop_ids).any(axis=1)
    out = state.out
    return state._replace(
      count=state.count + 1,
      last=tokens,
      ended=state.ended | stops,
      out=Generated(
        tokens=out.tokens.at[:, state.count].set(tokens),
        lengths=out.lengths + ~state.ended,
        log_probs=out.log_probs.at[:, state.count].set(log_probs),
        stopped=out.stopped | stops,
      ),
    )

  def go_on(state: _State) -> jax.Array:
    return (state.count < jnp.minimum(sampling.limit, max_new_tokens)) & ~state.ended.all()

  def body(state: _State) -> _State:
    logits, new = step(state.last, positions + state.count - 1, state.cache)
    state = choose(state, logits)
    return state._replace(cache=state.cache.append(new, after=state.last))

  batch = logits.shape[0]
  nothing = Generated(
    tokens=jnp.zeros((batch, max_new_tokens), jnp.int32),
    lengths=jnp.zeros((batch,), jnp.int32),
    log_probs=jnp.zeros((batch, max_new_tokens), jnp.float32),
    stopped=jnp.zeros((batch,), bool),
  )
  count = jnp.zeros((), jnp.int32)
  state = _State(count, nothing.lengths, ended, cache, nothing)
  return jax.lax.while_loop(go_on, body, choose(state, logits)).out


class _State(NamedTuple):
  """Of the loop: `count` tokens were chosen, of which `last` [B] has not been run."""

  count: jax.Array
  last: jax.Array
  ended: jax.Array
  cache: Cache
  out: Generated


def choose_tokens(logits: jax.Array, sampling: Sampling, keys: jax.Array) -> jax.Array:
  """[B, V], random keys [B] -> tokens [B] int32."""

  def drawn() -> jax.Array:
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
    kept = candidates(scaled, sampling.top_k, sampling.top_p)
    probabilities = jax.nn.softmax(jnp.where(kept, scaled, -jnp.inf), axis=-1)
    return draw(probabilities, jax.vmap(jax.random.uniform)(keys))

  return jax.lax.cond(sampling.temperature > 0, drawn, lambda: _first_maximum(logits))


def candidates(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
  """Which tokens are drawn from: of the k most likely, the fewest that have p of their probability.

  No sort, which takes 30 times as long as what is needed: the least logit that is kept.

  Args:
    logits: [B, V], divided by the temperature.
    top_k: scalar; V or more keeps all.
    top_p: scalar; 1 or more keeps all.

  Returns:
    [B, V] bool.
  """
  order = _ordered(logits)
  least = jnp.zeros((logits.shape[0],), jnp.uint32)
  by_k = jax.lax.cond(
    top_k < logits.shape[-1], lambda: _least_kept(order, jnp.float32(1), top_k), lambda: least
  )
  kept = order >= by_k[:, None]
  # Summed before they are divided, so that p is of what is left.
  weights = jnp.where(kept, jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)), 0.0)
  by_p = jax.lax.cond(
    top_p < 1, lambda: _least_kept(order, weights, top_p * weights.sum(axis=-1)), lambda: least
  )
  return kept & (order >= by_p[:, None])


def _ordered(x: jax.Array) -> jax.Array:
  """float32 -> uint32 in the same order."""
  x = jnp.where(x == 0, 0.0, x)  # -0.0 is no less
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  sign = jnp.uint32(1 << 31)
  return jnp.where(bits & sign, ~bits, bits | sign)


def _least_kept(order: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
  """[B]: the greatest t for which what is t or more weighs `target` or more; found bit by bit."""

  def bit(i: jax.Array, least: jax.Array) -> jax.Array:
    higher = least | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
    weight = jnp.where(order >= higher[:, None], weights, 0.0).sum(axis=-1)
    return jnp.where(weight >= target, higher, least)

  return jax.lax.fori_loop(0, 32, bit, jnp.zeros(order.shape[:1], jnp.uint32))


def draw(probabilities: jax.Array, uniform: jax.Array) -> jax.Array:
  """Where numbers fall among probabilities laid end to end: a block by its sum, then a token of it.

  Args:
    probabilities: [B, V].
    uniform: [B] in [0, 1).

  Returns:
    Tokens [B], none of which has probability 0.
  """
  batch, vocab_size = probabilities.shape
  padded = jnp.pad(probabilities, ((0, 0), (0, -vocab_size % _BLOCK)))
  blocks = padded.reshape(batch, -1, _BLOCK)
  sums = blocks.sum(axis=-1)
  block, rest = _place(sums, uniform * sums.sum(axis=-1))
  place, _ = _place(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], rest)
  return block * _BLOCK + place


def _place(weights: jax.Array, at: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Where `at` falls in weights [B, n] laid end to end, and how far in; never where one is 0."""
  ends = jnp.cumsum(weights, axis=-1)
  # The sum of the block and the sum of the sums are rounded: what is beyond is in the last one.
  last = _first_maximum(ends)
  place = jnp.minimum((ends <= at[:, None]).sum(axis=-1, dtype=jnp.int32), last)
  begins = jnp.where(place > 0, jnp.take_along_axis(ends, (place - 1)[:, None], axis=1)[:, 0], 0.0)
  return place, jnp.maximum(at - begins, 0.0)


def _first_maximum(x: jax.Array) -> jax.Array:
  """argmax of [B, V], in two passes that XLA for CPUs does five times as fast as its own."""
  ids = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
  is_maximum = x == jnp.max(x, axis=-1, keepdims=True)
  # No id is V, also where all is NaN: it would be looked up.
  return jnp.min(jnp.where(is_maximum, ids, x.shape[-1] - 1), axis=-1)


def _log_prob(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """[B, V], [B] -> [B]."""
  chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)


def _keys(seed: jax.Array, rows: jax.Array, count: jax.Array) -> jax.Array:
  """[B]: a row draws the same whatever rows stand beside it."""
  key = jax.random.fold_in(jax.random.key(seed), count)
  return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)

"""Prompts in, texts out: what a program calls that has a language model and wants it to speak.

  generator = Generator(lm, params, vocabulary)
  for completion in generator.complete(['The capital of France is'], SamplingOptions()):
    print(completion.text)

Letters: B rows, T tokens of a row, N new tokens, K soft tokens of a row, D model width.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ilm_jax.decoding.sampling import START_ID, Generated, Sampling, SamplingOptions, generate
from ilm_jax.errors import UsageError
from ilm_jax.modules.decoder import Decoder
from ilm_jax.modules.splice import splice
from ilm_jax.modules.t5 import T5
from ilm_jax.modules.token_losses import token_nll

_LEAST_LENGTH = 16  # of the buckets of lengths: 16, 32, 64, ...


@dataclasses.dataclass(frozen=True)
class Completion:
  """What came of a prompt.

  Attributes:
    text: None where there is no vocabulary.
    tokens: without the stop token.
    log_prob: of the tokens, and of the stop token where there is one, according to the model.
    stopped: by a stop token, not by the limit.
  """

  text: str | None
  tokens: tuple[int, ...]
  log_prob: float
  stopped: bool


class Generator:
  """A language model that completes prompts and scores continuations.

  Lengths and numbers of rows are padded to powers of two, and all that is set in SamplingOptions is
  an argument of the compiled program: one is compiled for each padded shape, the first time it
  comes, and no other (`num_compiled` counts them). With max_rows=8 and prompts up to 1,024 tokens,
  there are at most 4 x 7 for each power of two of max_new_tokens.

  What comes of a prompt does not depend on the prompts beside it, except for rounding, which with
  bfloat16 can tip the scales between two tokens; what is drawn at random depends on the prompt's
  place among them.

  Args:
    lm: a decoder or an encoder-decoder; `params` its parameters.
    vocabulary: a SlotVocabulary, or whatever has `encode`, `decode`, `bos_id` and `eos_id`; needed
      for prompts that are text.
    max_rows: prompts that are run at once.
    max_logits: that are held at once when scoring; by default 128 MB.
    slot_id: of the token that soft tokens replace; by default the vocabulary's.
  """

  def __init__(
    self,
    lm: Decoder | T5,
    params: Any,
    vocabulary: Any = None,
    *,
    max_rows: int = 8,
    max_logits: int = 1 << 25,
    slot_id: int | None = None,
  ):
    self._lm = lm
    self._params = params
    self._vocabulary = vocabulary
    self._max_rows = max_rows
    self._max_logits = max_logits
    self._given_slot_id = slot_id
    self._has_encoder = isinstance(lm, T5) and lm.config.num_encoder_layers > 0
    self._generate = jax.jit(self._generate_rows, static_argnames='max_new_tokens')
    self._score = jax.jit(self._score_rows)

  @property
  def _slot_id(self) -> int:
    if self._given_slot_id is not None:
      return self._given_slot_id
    if self._vocabulary is None:
      raise UsageError('soft tokens: which token they replace is not known: give slot_id.')
    return self._vocabulary.slot_id

  @property
  def num_compiled(self) -> int:
    """How many programs were compiled so far."""
    return self._generate._cache_size() + self._score._cache_size()  # pyright: ignore

  def complete(
    self,
    prompts: Sequence[str | Sequence[int]],
    options: SamplingOptions = SamplingOptions(),
    *,
    soft_tokens: Sequence[np.ndarray | None] | None = None,
    add_bos: bool = False,
  ) -> list[Completion]:
    """Goes on from each prompt.

    Args:
      prompts: text, or tokens.
      options: how, and how long.
      soft_tokens: for each prompt [K, D], which take the places of its K slots; None where there
        are none.
      add_bos: whether a prompt that is text begins with BOS. A chat template writes it itself.

    Raises:
      UsageError: a prompt is empty or too long for the model, is text without a vocabulary, or has
        another number of slots than of soft tokens.
    """
    rows = [self._tokens(prompt, add_bos) for prompt in prompts]
    self._check(rows, soft_tokens, 0 if self._has_encoder else options.max_new_tokens)
    if options.stop_ids is None and self._vocabulary is not None:
      options = dataclasses.replace(options, stop_ids=(self._vocabulary.eos_id,))
    sampling = options.traced()
    max_new_tokens = bucket(options.max_new_tokens)

    def run(batch: '_Batch') -> list[Generated]:
      generated = self._generate(
        self._params,
        batch.tokens,
        batch.lengths,
        batch.soft_tokens,
        batch.rows,
        sampling,
        max_new_tokens=max_new_tokens,
      )
      return [Generated(*row) for row in zip(*jax.device_get(generated))]

    return [self._completion(row) for row in self._in_batches(rows, soft_tokens, run)]

  def score(
    self,
    prompts: Sequence[str | Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    soft_tokens: Sequence[np.ndarray | None] | None = None,
    add_bos: bool = False,
  ) -> list[np.ndarray]:
    """The log-probability of each token of continuations, given prompts and what comes between.

    Logits are taken of the continuations only, and of a few at a time: memory does not grow with
    the vocabulary. Arguments and errors are those of `complete`; continuations are tokens, of which
    a prompt may have none.
    """
    rows = [self._tokens(prompt, add_bos) for prompt in prompts]
    targets = [np.asarray(tokens, np.int32) for tokens in continuations]
    if len(targets) != len(rows):
      raise UsageError(f'score: {len(rows)} prompts, but {len(targets)} continuations.')
    self._check_ids(targets, 'continuation', None)
    if not self._has_encoder:
      rows = [np.concatenate(parts) for parts in zip(rows, targets)]
    self._check(rows, soft_tokens, 0)

    def run(batch: '_Batch') -> list[np.ndarray]:
      expected = [targets[row] for row in batch.rows[: batch.size]]
      padded = _padded(expected, len(batch.tokens), bucket(max(map(len, expected))), -1)
      arguments = (batch.tokens, batch.lengths, batch.soft_tokens, padded)
      scores = jax.device_get(self._score(self._params, *arguments))
      return [row[: len(tokens)] for row, tokens in zip(scores, expected)]

    return self._in_batches(rows, soft_tokens, run)

  def _generate_rows(
    self,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    soft_tokens: jax.Array | None,
    rows: jax.Array,
    sampling: Sampling,
    *,
    max_new_tokens: int,
  ) -> Generated:
    return generate(
      self._lm,
      params,
      self._embed(params, tokens, soft_tokens),
      lengths,
      sampling,
      max_new_tokens=max_new_tokens,
      rows=rows,
    )

  def _score_rows(
    self,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    soft_tokens: jax.Array | None,
    targets: jax.Array,
  ) -> jax.Array:
    """Targets [B, N], padded with -1 -> log-probabilities. A decoder's tokens end in them."""
    variables, inputs = {'params': params}, self._embed(params, tokens, soft_tokens)
    there = jnp.arange(tokens.shape[1]) < lengths[:, None]
    segment_ids = there.astype(jnp.int32)
    apply = functools.partial(self._lm.apply, variables)
    if self._has_encoder:
      encoded = apply(inputs, segment_ids=segment_ids, method='encode')
      before = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=START_ID)
      embedded = apply(jnp.maximum(before, 0), method='embed_tokens')
      decoded: Any = apply(embedded, encoded, encoder_segment_ids=segment_ids, method='decode')
      hidden = decoded[0]
    else:
      run: Any = apply(inputs, None, segment_ids)
      begin = lengths - (targets >= 0).sum(axis=1) - 1
      at = (begin[:, None] + jnp.arange(targets.shape[1])).clip(0, tokens.shape[1] - 1)
      hidden = jnp.take_along_axis(run[0], at[..., None], axis=1)

    def logits(hidden: jax.Array) -> Any:
      return apply(hidden, method='logits')

    chunk = max(1, self._max_logits // self._lm.config.vocab_size)
    flat = hidden.reshape(-1, hidden.shape[-1])
    nll = token_nll(logits, flat, targets.reshape(-1), chunk=chunk)
    return -nll.reshape(targets.shape)

  def _embed(self, params: Any, tokens: jax.Array, soft_tokens: jax.Array | None) -> Any:
    """[B, T], [B, K, D] -> [B, T, D]."""
    embeddings: Any = self._lm.apply({'params': params}, tokens, method='embed_tokens')
    if soft_tokens is None:
      return embeddings
    own = jnp.arange(tokens.shape[0])[:, None]
    return splice(embeddings, tokens == self._slot_id, soft_tokens, own)

  def _tokens(self, prompt: str | Sequence[int], add_bos: bool) -> np.ndarray:
    if not isinstance(prompt, str):
      return np.asarray(prompt, np.int32)
    if self._vocabulary is None:
      raise UsageError(f'prompt {prompt!r}: text, but there is no vocabulary. Give tokens.')
    begin = [self._vocabulary.bos_id] if add_bos else []
    return np.array(begin + list(self._vocabulary.encode(prompt)), np.int32)

  def _check(
    self,
    rows: Sequence[np.ndarray],
    soft_tokens: Sequence[np.ndarray | None] | None,
    max_new_tokens: int,
  ) -> None:
    c = self._lm.config
    if soft_tokens is not None and len(soft_tokens) != len(rows):
      raise UsageError(f'{len(rows)} prompts, but soft tokens for {len(soft_tokens)}.')
    slot_id = None if soft_tokens is None else self._slot_id
    self._check_ids(rows, 'prompt', slot_id)
    for i, row in enumerate(rows):
      if not len(row):
        raise UsageError(f'prompt {i} has no token: a model needs one to begin with, such as BOS.')
      if isinstance(self._lm, Decoder) and len(row) + max_new_tokens > c.max_length:
        raise UsageError(
          f'prompt {i}: {len(row)} tokens and max_new_tokens={max_new_tokens} are more than the'
          f' {c.max_length} that the model was trained for. Shorten one of them.'
        )
      if soft_tokens is None:
        continue
      slots, soft = int((row == slot_id).sum()), soft_tokens[i]
      shape = (0, c.d_model) if soft is None else soft.shape
      if shape != (slots, c.d_model):
        raise UsageError(
          f'prompt {i}: it has {slots} slots (token {slot_id}), but soft tokens of shape'
          f' {list(shape)}; [{slots}, {c.d_model}] are needed.'
        )

  def _check_ids(self, rows: Sequence[np.ndarray], what: str, slot_id: int | None) -> None:
    """A slot need not be in the model's table."""
    vocab_size = self._lm.config.vocab_size
    for i, row in enumerate(rows):
      wrong = row[((row < 0) | (row >= vocab_size)) & (row != slot_id)]
      if wrong.size:
        raise UsageError(
          f'{what} {i}: token {wrong[0]}, but the model has {vocab_size}. Is it the tokenizer of'
          ' another model?'
        )

  def _in_batches(
    self,
    rows: Sequence[np.ndarray],
    soft_tokens: Sequence[np.ndarray | None] | None,
    run: Callable[['_Batch'], list[Any]],
  ) -> list[Any]:
    """Runs rows of like lengths together, and returns what came of them in their order."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    results: list[Any] = [None] * len(rows)
    for start in range(0, len(rows), self._max_rows):
      chosen = order[start : start + self._max_rows]
      batch = _batch(rows, soft_tokens, chosen, self._lm.config.d_model)
      for i, result in zip(chosen, run(batch)):
        results[i] = result
    return results

  def _completion(self, row: Generated) -> Completion:
    stopped = bool(row.stopped)
    tokens = row.tokens[: int(row.lengths) - stopped].tolist()
    return Completion(
      text=None if self._vocabulary is None else self._vocabulary.decode(tokens),
      tokens=tuple(tokens),
      log_prob=float(row.log_probs.sum()),
      stopped=stopped,
    )


@dataclasses.dataclass(frozen=True)
class _Batch:
  """Rows that are run together, padded: tokens [B, T], lengths [B], soft tokens [B, K, D].

  `rows` [B]: which ones they are. After the first `size`, there is nothing (length 0).
  """

  size: int
  rows: np.ndarray
  tokens: np.ndarray
  lengths: np.ndarray
  soft_tokens: np.ndarray | None


def _batch(
  rows: Sequence[np.ndarray],
  soft_tokens: Sequence[np.ndarray | None] | None,
  chosen: Sequence[int],
  d_model: int,
) -> _Batch:
  size = bucket(len(chosen), least=1)
  tokens = [rows[i] for i in chosen]
  soft = [None if soft_tokens is None else soft_tokens[i] for i in chosen]
  most = max((len(x) for x in soft if x is not None), default=0)
  padded = None
  if most:
    padded = np.zeros((size, bucket(most, least=1), d_model), np.float32)
    for row, x in zip(padded, soft):
      if x is not None:
        row[: len(x)] = x
  return _Batch(
    size=len(chosen),
    rows=np.array([*chosen, *[0] * (size - len(chosen))], np.int32),
    tokens=_padded(tokens, size, bucket(max(map(len, tokens))), 0),
    lengths=np.array([*map(len, tokens), *[0] * (size - len(chosen))], np.int32),
    soft_tokens=padded,
  )


def bucket(size: int, *, least: int = _LEAST_LENGTH) -> int:
  """The next power of two, `least` or more."""
  return max(least, 1 << (size - 1).bit_length())


def _padded(rows: Sequence[np.ndarray], batch: int, length: int, fill: int) -> np.ndarray:
  padded = np.full((batch, length), fill, np.int32)
  for row, tokens in zip(padded, rows):
    row[: len(tokens)] = tokens
  return padded

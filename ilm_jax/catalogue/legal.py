"""Log-probabilities of the tokens that may come next in a catalogue.

Letters: D model width, V vocabulary, A tokens that a catalogue uses, C tokens that may come next.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias, get_args

import jax
import jax.numpy as jnp

from ilm_jax.catalogue.trie import Trie
from ilm_jax.errors import UsageError, did_you_mean
from ilm_jax.modules.decoder import Decoder
from ilm_jax.modules.token_losses import in_chunks

# What the probabilities of next tokens sum to one over: those that the catalogue allows, so that
# the probabilities of all items do too; or all of the vocabulary.
Normalise: TypeAlias = Literal['catalogue', 'vocabulary']


class LegalLogProbs(Protocol):
  """(hidden [..., D], columns, exists and bias [..., C]) -> log-probabilities [..., C].

  `bias` is added to logits before they are normalised.
  """

  def __call__(
    self,
    hidden: jax.Array,
    columns: jax.Array,
    exists: jax.Array,
    bias: jax.Array | None = None,
  ) -> jax.Array: ...


_LOGITS = 1 << 25  # held at once: 128 MB
_NEVER = -1e30  # -inf would make gradients NaN where nothing exists


def check_normalise(normalise: str) -> None:
  allowed = get_args(Normalise)
  if normalise not in allowed:
    hint = did_you_mean(normalise, allowed)
    raise UsageError(f'normalise={normalise!r}: one of {", ".join(allowed)}.{hint}')


def check_bias(bias: jax.Array | None, trie: Trie, normalise: Normalise) -> None:
  if bias is None:
    return
  _check_biased(normalise)
  if bias.shape != (trie.num_nodes,):
    raise UsageError(
      f'bias of shape {bias.shape}: one number for each of the {trie.num_nodes} nodes of the'
      ' catalogue is needed; was it made for another catalogue?'
    )


def _check_biased(normalise: Normalise) -> None:
  if normalise != 'catalogue':
    raise UsageError(
      f'bias with normalise={normalise!r}: a bias is of tokens that the catalogue allows, and needs'
      " normalise='catalogue'."
    )


def legal_log_probs(
  lm: Decoder, params: Any, alphabet: jax.Array, normalise: Normalise
) -> LegalLogProbs:
  """A function that gives the log-probabilities of tokens that may come next.

  Logits are taken of the alphabet alone, which is a small part of a vocabulary: 1,800 of SmolLM2's
  49,152 tokens are in titles of films.

  Args:
    lm: a decoder; `params` its parameters.
    alphabet: [A] tokens, the columns of what the function is asked for.
    normalise: over what.
  """
  check_normalise(normalise)
  variables = {'params': params}
  some = _with_tokens(lm, params, alphabet)

  def over_vocabulary(hidden: jax.Array) -> jax.Array:
    """The logarithm of the sum of all exponentials."""

    def one(part: tuple[jax.Array]) -> jax.Array:
      return _logsumexp(lm.apply(variables, *part, method='logits'))

    rows = hidden.reshape(-1, hidden.shape[-1])
    chunk = max(1, _LOGITS // lm.config.vocab_size)
    return in_chunks(one, (rows,), chunk).reshape(hidden.shape[:-1])

  def log_probs(
    hidden: jax.Array, columns: jax.Array, exists: jax.Array, bias: jax.Array | None = None
  ) -> jax.Array:
    legal = jnp.take_along_axis(some(hidden), columns, axis=-1)
    if bias is not None:
      _check_biased(normalise)
      legal += bias
    if normalise == 'catalogue':
      total = jax.nn.logsumexp(jnp.where(exists, legal, _NEVER), axis=-1)
    else:
      total = over_vocabulary(hidden)
    return jnp.where(exists, legal - total[..., None], -jnp.inf)

  return log_probs


def _logsumexp(logits: Any) -> jax.Array:
  """[M, V] -> [M], where no gradient is asked for.

  The sum is a product with ones: XLA on CPUs takes four times as long for a sum that it computes
  together with its exponentials.
  """
  top = logits.max(axis=-1, keepdims=True)
  ones = jnp.ones(logits.shape[-1:], logits.dtype)
  total = jnp.dot(jnp.exp(logits - top), ones, precision=jax.lax.Precision.HIGHEST)
  return jnp.log(total) + top[..., 0]


def _with_tokens(lm: Decoder, params: Any, tokens: jax.Array) -> Callable[[jax.Array], jax.Array]:
  """[..., D] -> logits [..., A]: the model's head with the rows of some tokens."""
  name = 'embedder' if lm.config.tied_head else 'head'
  rows = jax.tree.map(lambda x: jnp.take(x, tokens, axis=0, mode='clip'), params[name])
  config = dataclasses.replace(lm.config, vocab_size=tokens.shape[0])
  head = Decoder(config, lm.compute)

  def logits(hidden: jax.Array) -> Any:
    return head.apply({'params': {name: rows}}, hidden, method='logits')

  return logits

"""Where an adaptor begins: at words.

A random adaptor says to a frozen language model what no word says, and the same of all items. One
that begins at the regression from what the item encoder says of an item to the mean embedding of
the words of its text begins with what tells items apart, and in directions that mean something.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ilm_jax.data.prepared import PreparedData
from ilm_jax.data.text.slot_vocabulary import SlotVocabulary
from ilm_jax.errors import UsageError, did_you_mean
from ilm_jax.modules.soft_tokens import SoftTokenConfig, SoftTokens, standardised
from ilm_jax.runtime.sharding import fetch

_RIDGE = 0.1  # of the mean variance of features
_MOST_ITEMS = 8192  # of a catalogue: they are in random order


def begin_at_words(
  config: SoftTokenConfig,
  params: Mapping[str, Any],
  vectors: np.ndarray,
  texts: Mapping[int, Sequence[int]],
  embed: Callable[[np.ndarray], Any],
) -> dict[str, Any]:
  """Parameters of phase 2 whose features are standardised and whose adaptor is the regression.

  Args:
    config: with standardise=True.
    params: of phase 2; those of the item encoder are not changed.
    vectors: [items, d_cf], of the entity table.
    texts: item -> tokens, at least one; of the items whose texts may be read.
    embed: [m] ids -> [m, D], token embeddings.
  """
  tokens = np.asarray(vectors[:_MOST_ITEMS, None])
  own = {name: x for name, x in params.items() if name not in ('readout', 'lm')}
  own = standardised(config, own, tokens)
  items = [item for item in texts if item < len(tokens)]
  encoded: Any = jax.jit(SoftTokens(config).apply)({'params': own}, tokens[items])
  kernel = ridge(fetch(encoded.vectors), mean_embeddings([texts[i] for i in items], embed))
  begins = jax.device_put(kernel, own['adaptor']['kernel'].sharding)
  return {**params, **own, 'adaptor': {'kernel': begins}}


def words_of_items(
  prepared: PreparedData, fields: Sequence[str], vocabulary: SlotVocabulary
) -> dict[int, list[int]]:
  """Item -> the tokens of its text fields, but for held-out items and those that have none.

  Raises:
    UsageError: items have no such field.
  """
  known = prepared.item_text
  for field in fields:
    if field not in known:
      raise UsageError(
        f'train.item_encoder.adaptor_text={list(fields)}: items have no text {field!r}.'
        f'{did_you_mean(field, known)} Texts: {", ".join(known)}.'
      )
  rows = [', '.join(filter(None, texts)) for texts in zip(*(known[field] for field in fields))]
  return {
    item: vocabulary.encode_segment(' ' + row, first=False)
    for item, row in enumerate(rows)
    if row and not prepared.heldout_items[item]
  }


def mean_embeddings(
  texts: Sequence[Sequence[int]], embed: Callable[[np.ndarray], Any]
) -> np.ndarray:
  """[n, D], the mean of the embeddings of each text's tokens.

  Args:
    texts: tokens, of each at least one.
    embed: [m] ids -> [m, D].
  """
  tokens = np.unique(np.concatenate([np.asarray(text, np.int32) for text in texts]))
  vectors = np.asarray(embed(tokens), np.float64)
  return np.stack([vectors[np.searchsorted(tokens, text)].mean(axis=0) for text in texts])


def ridge(features: np.ndarray, targets: np.ndarray) -> np.ndarray:
  """The linear map [F, D] from features [n, F] to targets [n, D], both less their mean.

  It minimises the mean squared error and a penalty of the map's square; then it is scaled to
  outputs of RMS 1, so that a step of an optimizer is small beside them.
  """
  x, y = (np.asarray(values, np.float64) for values in (features, targets))
  x, y = x - x.mean(axis=0), y - y.mean(axis=0)
  covariance = x.T @ x / len(x)
  penalty = _RIDGE * np.trace(covariance) / len(covariance)
  kernel = np.linalg.solve(covariance + penalty * np.eye(len(covariance)), x.T @ y / len(x))
  return (kernel / np.sqrt(np.mean((x @ kernel) ** 2))).astype(np.float32)

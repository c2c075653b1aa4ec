"""Small catalogues, and what tiny language models say of their items token by token."""

import functools

import jax
import numpy as np
import scipy.special

from ilm_jax.catalogue.trie import build_trie
from tests.support import tiny_lms

EOS = 1
LONGEST = 9
# Beginnings of each other (0, 1, 7), equal ones (2, 5, 10), and one that never branches (3).
ITEMS = [
  [5], [5, 8], [6, 8, 9], [7, 30, 31, 32, 33], [6, 8], [6, 8, 9], [6, 40], [5, 8, 8], [90],
  [6, 41, 8], [6, 8, 9], [5, 12, 8, 96, 2], [5, 12, 8, 96, 3], [6, 8, 10],
]  # fmt: skip
SEQUENCES = [[*item, EOS] for item in ITEMS]
DISTINCT = sorted({tuple(s) for s in SEQUENCES})
TOKENS = np.random.default_rng(4).integers(2, tiny_lms.VOCAB, (3, LONGEST))
LENGTHS = np.array([LONGEST, 4, 1])


@functools.cache
def trie():
  return build_trie(SEQUENCES, EOS)


@functools.cache
def bias():
  """[nodes] of something for each beginning of an item, as large as what the model says."""
  made = trie()
  numbers = np.random.default_rng(5).normal(size=made.num_nodes).astype(np.float32)
  numbers[0] = 100  # nothing leads to the root
  return numbers


@functools.cache
def bias_of():
  """The same by tokens."""
  made = trie()
  parent, token = np.asarray(made.parent), np.asarray(made.token)
  paths: list[tuple[int, ...]] = [()]
  for node in range(1, made.num_nodes):
    paths.append((*paths[parent[node]], int(token[node])))
  return dict(zip(paths, bias().astype(np.float64)))


def legal_after(said):
  """The tokens that may come after a beginning."""
  return sorted({s[len(said)] for s in DISTINCT if s[: len(said)] == said})


@functools.cache
def _logits(name):
  """Each item after each prompt: [(prompt and item, where the item starts, logits [T, V])]."""
  tiny = tiny_lms.tiny_lm(name)
  rows, starts = [], []
  for prompt, length in zip(TOKENS, LENGTHS):
    for sequence in SEQUENCES:
      rows.append([*prompt[:length], *sequence])
      starts.append(length)
  padded = np.zeros((len(rows), max(map(len, rows))), np.int32)
  for row, tokens in zip(padded, rows):
    row[: len(tokens)] = tokens
  logits_of = jax.jit(functools.partial(tiny.lm.apply, method='logits_of'))
  logits = np.asarray(logits_of({'params': tiny.params}, padded), np.float64)
  return list(zip(rows, starts, logits))


@functools.cache
def brute_force(name, normalise, biased=False):
  """[3, items]: each item after each prompt, in a forward pass of its own, in float64."""
  scores = []
  for row, start, of_row in _logits(name):
    score = 0.0
    for place in range(start, len(row)):
      said, logits = tuple(row[start:place]), of_row[place - 1].copy()
      legal = legal_after(said)
      if biased:
        logits[legal] += [bias_of()[*said, token] for token in legal]
      over = logits[legal] if normalise == 'catalogue' else logits
      score += logits[row[place]] - scipy.special.logsumexp(over)
    scores.append(score)
  return np.array(scores).reshape(len(LENGTHS), len(SEQUENCES))


def embedded(tiny):
  """Prompts [3, T, D]; what is after their ends is not to be looked at."""
  embeddings = tiny.embed(TOKENS).copy()
  embeddings[np.arange(LONGEST) >= LENGTHS[:, None]] = 100.0
  return embeddings

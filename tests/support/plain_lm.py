"""What a trained run is to say, by plain forward passes over whole rows and loops in Python.

No cache, no trie, no packing, no padding that is not after: each row of tokens is a row of the
batch, and probabilities are taken of logits by hand.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ilm_jax.serving.recommender import Recommender

Edges = dict[tuple[int, ...], np.ndarray]  # beginning of a title -> logits of what comes next


class PlainLm:
  """The language model of a run with an MLP, and its titles.

  Attributes:
    titles: [I] tuples of tokens, with EOS.
    children: beginning of titles -> the tokens that may follow.
  """

  def __init__(self, model: Recommender):
    phase = model.phase
    self.model = model
    self.params, self.frozen = model.params, model.frozen
    self.vocabulary = phase.vocabulary
    most, eos = phase.text.max_text_tokens, self.vocabulary.eos_id
    self.titles = [
      (*self.vocabulary.encode_segment(f' {title}')[:most], eos)
      for title in model.prepared.item_text['title']
    ]
    self.children = children_of(self.titles)
    lm = phase.model.lm

    @jax.jit
    def run(weights: Any, embeddings: jax.Array) -> Any:
      hidden, _ = lm.apply({'params': weights}, embeddings)
      return hidden, lm.apply({'params': weights}, hidden, method='logits')

    self._run = run

  def embed(self, tokens: Sequence[int]) -> np.ndarray:
    """[T, D], as the layers take them."""
    weights = {'params': self.frozen.lm}
    row = jnp.asarray([list(tokens)], jnp.int32)
    found = self.model.phase.model.lm.apply(weights, row, method='embed_tokens')
    return np.asarray(found, np.float32)[0]

  def prompt(self, pieces: Sequence[str | int]) -> np.ndarray:
    """[T, D] of text and items, whose soft tokens are put in, after the run's prefix."""
    phase = self.model.phase
    rows = [self.embed(phase.lm.prompt_tokens(phase.text.prefix))]
    for piece in pieces:
      if isinstance(piece, str):
        rows.append(self.embed(self.vocabulary.encode_segment(piece)))
      else:
        rows.append(self.soft([piece])[0])
    return np.concatenate(rows)

  def neutral(self) -> np.ndarray:
    return self.prompt(['One person saw films, and then'])

  def soft(self, entities: Sequence[int]) -> np.ndarray:
    """[U, K, D] in NumPy."""
    return self._mlp(entities)[1]

  def vectors(self, entities: Sequence[int]) -> np.ndarray:
    """[U, F] in NumPy."""
    return self._mlp(entities)[0]

  def _mlp(self, entities: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    p = jax.tree.map(np.asarray, self.params)
    x = np.asarray(self.frozen.entity_vectors)[list(entities)]
    hidden = np.maximum(x @ p['item_encoder']['kernel'] + p['item_encoder']['bias'], 0)
    soft = np.einsum('uf,fkd->ukd', hidden, p['adaptor']['kernel']) + p['adaptor']['bias']
    return hidden, normalised(soft) * p['gain']

  # ---- passes

  def rows(self, rows: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """States and logits of rows of embeddings, one pass for all."""
    longest = -(-max(map(len, rows)) // 64) * 64
    padded = np.stack([np.pad(row, ((0, longest - len(row)), (0, 0))) for row in rows])
    size = -(-len(rows) // 32) * 32
    padded = np.pad(padded, ((0, size - len(rows)), (0, 0), (0, 0)))
    hidden, logits = self._run(self.frozen.lm, padded)
    return cut_to(rows, hidden), cut_to(rows, logits)

  def edges(self, prompt: np.ndarray, texts: Sequence[tuple[int, ...]]) -> Edges:
    """The logits after a prompt [T, D] and each beginning of texts."""
    distinct = sorted(set(texts))
    rows = [
      np.concatenate([prompt, self.embed(text[:-1])]) if len(text) > 1 else prompt
      for text in distinct
    ]
    found = {}
    for text, logits in zip(distinct, self.rows(rows)[1]):
      for i in range(len(text)):
        found[text[:i]] = logits[len(prompt) - 1 + i]
    return found

  def text_scores(
    self,
    prompt: np.ndarray,
    texts: Sequence[tuple[int, ...]],
    bias: dict[tuple[int, ...], float] | None = None,
  ) -> np.ndarray:
    """The log-probability of each text among all, by the tokens that may follow."""
    children = children_of(texts)
    edges = self.edges(prompt, texts)
    scores = []
    for text in texts:
      total = 0.0
      for i in range(len(text)):
        total += edge_log_probs(edges, children, text[:i], bias)[text[i]]
      scores.append(total)
    return np.array(scores)

  def title_scores(
    self, prompt: np.ndarray, bias: dict[tuple[int, ...], float] | None = None
  ) -> np.ndarray:
    """[I]."""
    return self.text_scores(prompt, self.titles, bias)

  def bias(self) -> dict[tuple[int, ...], float]:
    """Of each beginning of titles: log popularity of what is below it, less the neutral prompt."""
    counts = np.bincount(self.model.prepared.items, minlength=len(self.titles)) + 1.0
    edges = self.edges(self.neutral(), self.titles)
    found = {}
    for beginning, tokens in self.children.items():
      neutral = edge_log_probs(edges, self.children, beginning, None)
      for token in tokens:
        path = (*beginning, token)
        below = [n for n, title in zip(counts, self.titles) if title[: len(path)] == path]
        found[path] = np.log(sum(below)) - neutral[token]
    return found

  def greedy(self, prompt: np.ndarray, steps: int) -> list[int]:
    """Tokens, up to EOS."""
    tokens: list[int] = []
    for _ in range(steps):
      row = np.concatenate([prompt, self.embed(tokens)]) if tokens else prompt
      token = int(self.rows([row])[1][0][-1].argmax())
      if token == self.vocabulary.eos_id:
        break
      tokens.append(token)
    return tokens

  def readout_scores(
    self,
    history: Sequence[int],
    *,
    soft: np.ndarray | None = None,
    vectors: np.ndarray | None = None,
  ) -> np.ndarray:
    """[I]; `soft` [I, K, D] and `vectors` [I, F] in place of the items' own."""
    return self.readout_scores_of([history], soft=soft, vectors=vectors)[0]

  def readout_scores_of(
    self,
    histories: Sequence[Sequence[int]],
    *,
    soft: np.ndarray | None = None,
    vectors: np.ndarray | None = None,
  ) -> np.ndarray:
    """As `readout_scores`, [B, I]."""
    items = range(len(self.titles))
    soft = self.soft(items) if soft is None else soft
    vectors = self.vectors(items) if vectors is None else vectors
    length = self.model.phase.text.sequence_length
    begin = self.prompt([])[:-1]  # the last token of the prefix begins prompts, not histories
    rows = [np.concatenate([begin, *(soft[item] for item in h[-length:])]) for h in histories]
    hidden = np.stack([states[-1] for states in self.rows(rows)[0]])
    hidden /= np.sqrt(np.mean(hidden**2, axis=1, keepdims=True) + 1e-6)
    p = jax.tree.map(np.asarray, self.params['readout'])
    counts = np.bincount(self.model.prepared.items, minlength=len(self.titles)) + 1.0
    popularity = p['popularity_weight'] * np.log(counts / counts.sum())
    return hidden @ p['kernel'] @ normalised(vectors).T + popularity


def cut_to(rows: Sequence[np.ndarray], padded: Any) -> list[np.ndarray]:
  """What belongs to each row, without padding."""
  return [x[: len(row)] for row, x in zip(rows, np.asarray(padded, np.float64))]


def children_of(texts: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], set[int]]:
  found: dict[tuple[int, ...], set[int]] = {}
  for text in texts:
    for i in range(len(text)):
      found.setdefault(text[:i], set()).add(text[i])
  return found


def edge_log_probs(
  edges: Edges,
  children: dict[tuple[int, ...], set[int]],
  beginning: tuple[int, ...],
  bias: dict[tuple[int, ...], float] | None,
) -> dict[int, float]:
  """Of each token that may follow."""
  logits = {
    token: edges[beginning][token] + (bias[(*beginning, token)] if bias else 0)
    for token in children[beginning]
  }
  total = np.logaddexp.reduce(list(logits.values()))
  return {token: logit - total for token, logit in logits.items()}


def normalised(x: np.ndarray) -> np.ndarray:
  """LayerNorm without scale and bias, with Flax's epsilon."""
  x = x - x.mean(axis=-1, keepdims=True)
  return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)

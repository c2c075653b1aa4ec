"""Exact log-probabilities of the titles of all films: on a trie, against transformers.

  python tests/benchmarks/bench.py --only exact

Prompts, films and language model are those of bench_beam.py. The peer reads a prompt once, and all
titles after copies of its cache, in batches of like length. Both sum log-probabilities over the
tokens that go on towards a title (the library's default), or, of a third of the titles, over the
vocabulary.

In float32 both must say the same; where the machine's best precision is another, the same is done
in float32 for one user before.
"""

import tempfile
from collections.abc import Iterator, Mapping
from typing import get_args

import ml100k
import numpy as np
from bench_beam import Normalise, for_each_user, our_batches, our_lm
from paired import Run, Side, Workers
from table import Row, timed

# Of a round: the peer takes half a minute for each, and over the vocabulary ours as well.
USERS = {'catalogue': {'ours': 16, 'peer': 1}, 'vocabulary': {'ours': 1, 'peer': 1}}
_EVERY = {'catalogue': 1, 'vocabulary': 3}  # title of the catalogue
TOLERANCE = 1e-3  # of the log-probability of a title, in float32
_ROWS = 75  # titles that the peer scores at once: a sixth of 450, an 18th of 1,350


def ours(file: str, users: int, normalise: Normalise, dtype: str, output: str) -> Run:
  import jax

  from ilm_jax.catalogue.trie import build_trie
  from ilm_jax.decoding.exact import catalogue_scores, scoring_plan

  lm = our_lm(dtype)
  prompts, titles = _prompts(file, normalise)
  plan = scoring_plan(build_trie(titles, titles[0][-1]), normalise)

  @jax.jit
  def score(params, plan, tokens, lengths):
    embeddings = lm.module.apply({'params': params}, tokens, method='embed_tokens')
    return catalogue_scores(lm.module, params, plan, embeddings, lengths)

  batches = our_batches(prompts[:users])

  def run() -> dict[str, float]:
    scores = np.concatenate([score(lm.params, plan, *batch) for batch in batches])
    np.save(output, scores)
    return {'scores': scores.size / users}

  return run


def peer(file: str, users: int, normalise: Normalise, dtype: str, output: str) -> Run:
  import os

  import torch
  from transformers import DynamicCache

  torch.set_num_threads(os.cpu_count() or 1)
  model = ml100k.torch_lm(dtype)
  prompts, titles = _prompts(file, normalise)
  following = ml100k.following(titles)
  order = sorted(range(len(titles)), key=lambda item: len(titles[item]))
  order = order[: -len(order) % _ROWS] + order  # the cache is copied once for all batches

  def padded(rows, value):
    return torch.tensor([row + [value] * (max(map(len, rows)) - len(row)) for row in rows])

  def choices(begins):
    """What may come after each beginning, and how much there is of it."""
    return padded([following[tuple(begin)] for begin in begins], -1)

  batches = []
  for start in range(0, len(order), _ROWS):
    rows = [titles[item] for item in order[start : start + _ROWS]]
    inputs, targets = padded([row[:-1] for row in rows], 0), padded([row[1:] for row in rows], -1)
    legal = choices([row[:n] for row in rows for n in range(1, len(row))])
    batches.append((inputs, targets, legal))
  root, first = torch.tensor(following[()]), torch.tensor([titles[item][0] for item in order])

  def log_totals(logits, legal):
    """[N, V], [N, C] -> [N]: what probabilities are over."""
    if normalise == 'vocabulary':
      return logits.float().logsumexp(dim=1)
    among = logits.gather(1, legal.clamp(min=0)).float()
    return among.masked_fill(legal < 0, -torch.inf).logsumexp(dim=1)

  def score(prompt: list[int]) -> np.ndarray:
    cache = DynamicCache(config=model.config)
    last = model(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1).logits[0]
    start = last[0, first].float() - log_totals(last, root[None])
    cache.batch_repeat_interleave(_ROWS)
    sums = []
    for inputs, targets, legal in batches:
      there = targets >= 0
      logits = model(inputs, past_key_values=cache).logits[there]
      cache.crop(-inputs.shape[1])
      found = torch.zeros(targets.shape)
      chosen = logits.gather(1, targets[there][:, None])[:, 0].float()
      found[there] = chosen - log_totals(logits, legal)
      sums.append(found.sum(dim=1))
    scores = np.empty(len(titles), np.float32)
    scores[order] = (start + torch.cat(sums)).numpy()
    return scores

  def run() -> dict[str, float]:
    with torch.inference_mode():
      scores = np.stack([score(prompt) for prompt in prompts[:users]])
    np.save(output, scores)
    return {'scores': scores.size / users}

  return run


def _prompts(file: str, normalise: Normalise) -> ml100k.Prompts:
  found = ml100k.read_prompts(file)
  return found._replace(titles=found.titles[:: _EVERY[normalise]])


def rows(rounds: int, peaks: Mapping[str, float]) -> Iterator[Row]:
  best = [*peaks][-1]
  with tempfile.TemporaryDirectory() as directory, Workers() as workers:
    file = ml100k.arrays()

    def sides(normalise: Normalise, dtype: str, users: Mapping[str, int]) -> dict[str, Side]:
      options = {'file': str(file), 'normalise': normalise, 'dtype': dtype}
      return {
        name: Side(
          __file__,
          name,
          {**options, 'users': users[name], 'output': f'{directory}/{name}.npy'},
          # The peer compiles nothing, and takes half a minute.
          warm_ups=1 if name == 'ours' or dtype != best else 0,
        )
        for name in ('ours', 'peer')
      }

    def outputs() -> tuple[np.ndarray, np.ndarray]:
      ours, peer = (np.load(f'{directory}/{name}.npy') for name in ('ours', 'peer'))
      return ours[: len(peer)], peer

    for normalise in get_args(Normalise):
      users = USERS[normalise]
      rounded = ''
      if best != 'float32':
        workers.compare(sides(normalise, 'float32', {'ours': 1, 'peer': 1}), rounds=0)
        np.testing.assert_allclose(*outputs(), atol=TOLERANCE)
      found = workers.compare(sides(normalise, best, users), rounds)
      ours, peer = outputs()
      if best == 'float32':
        np.testing.assert_allclose(ours, peer, atol=TOLERANCE)
      else:
        # Each side rounds in other places: titles of 11 tokens, 30 to 60 nats.
        apart = np.abs(ours - peer).mean()
        assert apart < 0.5, apart
        rounded = f', in {best} {apart:.2f} nats apart'
      yield timed(
        f'log-probabilities of {ours.shape[1]:,} titles for a user, over the {normalise},'
        f' {ml100k.LM}, {best}',
        for_each_user(found, users),
        goal=5,
        note=f'{users["ours"]} users, {users["peer"]} for transformers; in float32 equal within'
        f' {TOLERANCE:g}{rounded}',
      )

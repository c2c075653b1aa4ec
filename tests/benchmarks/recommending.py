"""Seconds to recommend: beam search and exact scores of a catalogue, by a language model.

  ilm prepare --dataset=ml100k --output=DATA
  python tests/benchmarks/recommending.py --data=DATA [--lm=smollm2_135m] [--users=8] [--rounds=5]

Prompts are titles that users have seen, cut to --prompt tokens. Each way is compiled first, then
all take turns; printed are seconds for one user, medians (least to most). Whether the beam finds
the best items is counted against the exact scores.
"""

import argparse
import functools
import os
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ilm_jax.checkpoints.lm.load import load_lm
from ilm_jax.data.prepared import load_prepared
from ilm_jax.decoding.beam import beam_search
from ilm_jax.decoding.exact import catalogue_scores, scoring_plan
from ilm_jax.decoding.trie import build_trie


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--data', required=True)
  parser.add_argument('--lm', default='smollm2_135m')
  parser.add_argument('--users', type=int, default=8)
  parser.add_argument('--prompt', type=int, default=128)
  parser.add_argument('--beams', type=int, nargs='+', default=[10, 50])
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--nodes_at_once', type=int, default=128)
  parser.add_argument('--normalise', nargs='+', default=['catalogue', 'vocabulary'])
  arguments = parser.parse_args()

  lm = load_lm(arguments.lm)
  decoder: Any = lm.module
  data = load_prepared(arguments.data)
  titles = data.item_text['title']
  encode, eos = lm.vocabulary.encode, lm.vocabulary.eos_id
  trie = build_trie([[*encode(' ' + title), eos] for title in titles], eos)
  rows = []
  for user in range(arguments.users):
    seen = ', '.join(titles[item] for item in data.history(user)[::-1])
    tokens = lm.prompt_tokens(f'Films that a user likes: {seen},')[: arguments.prompt]
    rows.append(tokens + [eos] * (arguments.prompt - len(tokens)))
  lengths = np.full(len(rows), arguments.prompt, np.int32)
  embeddings = lm.module.apply({'params': lm.params}, jnp.array(rows), method='embed_tokens')
  inner = int((~np.asarray(trie.is_leaf(jnp.arange(trie.num_nodes)))).sum())
  print(
    f'{os.cpu_count()} cores, {lm.name}; {trie.num_items} items,'
    f' {len(np.unique(trie.leaf))} distinct, {trie.num_nodes} nodes, {inner} of them inner, at most'
    f' {trie.max_children} children and {trie.max_depth} tokens; {len(rows)} users, prompts of'
    f' {arguments.prompt} tokens',
    flush=True,
  )
  ways = {}
  for normalise in arguments.normalise:
    plan = scoring_plan(trie, normalise, nodes_at_once=arguments.nodes_at_once)
    way = f'exact, {normalise}: {plan.num_nodes} nodes in {plan.groups.shape[0]} groups'
    exact = jax.jit(functools.partial(catalogue_scores, decoder))
    ways[way] = functools.partial(exact, lm.params, plan, embeddings, lengths)
    scores = compiled(way, ways[way])
    if normalise == 'catalogue':
      first = np.unique(trie.leaf, return_index=True)[1]
      print(f'  sum of probabilities: {np.exp(scores[:, first], dtype=np.float64).sum(axis=1)}')
    best = np.argsort(-scores, axis=1, kind='stable')
    for size in arguments.beams:
      beam = jax.jit(functools.partial(beam_search, decoder, beam_size=size, normalise=normalise))
      way = f'beam {size}, {normalise}'
      ways[way] = functools.partial(beam, lm.params, trie, embeddings, lengths)
      items = compiled(way, ways[way]).items
      for top in (1, 10):
        found = [len(set(a[:top]) & set(b[:top])) / top for a, b in zip(items, best)]
        print(f'  of the exact top {top}, found: {np.mean(found):.0%}')
      got = ways[way]().log_probs
      expected = np.take_along_axis(scores, np.maximum(items, 0), axis=1)
      print(f'  largest difference of a log-probability: {np.abs(got - expected).max():.1e}')
  seconds = {way: [] for way in ways}
  for _ in range(arguments.rounds):
    for way, run in ways.items():
      start = time.perf_counter()
      jax.block_until_ready(run())
      seconds[way].append((time.perf_counter() - start) / len(rows))
  for way, values in seconds.items():
    print(f'{way}: {statistics.median(values):.3f} s ({min(values):.3f} to {max(values):.3f})')


def compiled(way, run):
  start = time.perf_counter()
  out = jax.device_get(run())
  print(f'{way}: compiled and run in {time.perf_counter() - start:.1f} s', flush=True)
  return out


if __name__ == '__main__':
  main()

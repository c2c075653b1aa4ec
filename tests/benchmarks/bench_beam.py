"""Recommending films by title with a beam of ten: one program, against transformers' generate.

  python tests/benchmarks/bench.py --only beam

Prompts are the titles of the last ten films of 64 users of MovieLens-100K; the catalogue is the
titles of all films; the language model is SmolLM2-135M-Instruct in the machine's best precision,
without a trained adaptor, so that ours is `beam_search` as Recommender.beams calls it, with rows
padded as there.

The peer allows at each step what a trie of the titles allows (prefix_allowed_tokens_fn, as OpenP5
does), for several users at once. Where our probabilities are over the catalogue, the library's
default, its are too (renormalize_logits). As it is, generate reads a prompt once for each beam; it
is also measured from a cache of the prompt that was read once.

In float32, the same is done for a few users before: both must say the same.
"""

import functools
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import ml100k
import numpy as np
from paired import Measured, Run, Side, Workers
from table import Row, timed

BEAMS = 10
Normalise: TypeAlias = Literal['catalogue', 'vocabulary']  # what probabilities are over
# Of a round: as many as are searched for at once, seconds of work.
USERS = {'ours': 16, 'peer': 4, 'peer, shared': 8}
_PEERS = {'peer': 'as it is', 'peer, shared': 'from a cache of the prompt'}
CHECKED = 4
TOLERANCE = 1e-3  # of log-probabilities, in float32
OUR_ROWS, OUR_LENGTHS = 16, 32  # as in ilm_jax.serving.recommender


def ours(file: str, users: int, normalise: Normalise, dtype: str, output: str) -> Run:
  import jax

  from ilm_jax.catalogue.trie import build_trie

  lm, search = our_lm(dtype), _our_search(normalise, dtype)
  prompts, titles = ml100k.read_prompts(file)
  trie = build_trie(titles, titles[0][-1])
  batches = our_batches(prompts[:users])

  def run() -> dict[str, float]:
    found = [jax.device_get(search(lm.params, trie, *batch)) for batch in batches]
    items, log_probs = (
      np.concatenate([getattr(beams, name) for beams in found])[:users]
      for name in ('items', 'log_probs')
    )
    np.savez(output, items=items, log_probs=log_probs)
    return {'users': users}

  return run


@functools.lru_cache(maxsize=1)
def our_lm(dtype: str) -> Any:
  """In float32, or as it is loaded by itself, in the machine's best precision."""
  from ilm_jax.lm.load import load_lm
  from ilm_jax.modules.layers import Compute

  return load_lm(ml100k.LM, compute=Compute(scan_layers=False) if dtype == 'float32' else None)


@functools.lru_cache(maxsize=1)
def _our_search(normalise: Normalise, dtype: str) -> Any:
  """The program that is checked is the one that is measured."""
  import jax

  from ilm_jax.decoding.beam import beam_search

  module = our_lm(dtype).module

  @jax.jit
  def search(params, trie, tokens, lengths):
    embeddings = module.apply({'params': params}, tokens, method='embed_tokens')
    return beam_search(
      module, params, trie, embeddings, lengths, beam_size=BEAMS, normalise=normalise
    )

  return search


def our_batches(prompts: list[list[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
  """Tokens [B, T] and lengths [B], padded as a Recommender pads them."""
  width = -(-max(map(len, prompts)) // OUR_LENGTHS) * OUR_LENGTHS
  batches = []
  for start in range(0, len(prompts), OUR_ROWS):
    rows = prompts[start : start + OUR_ROWS]
    tokens = np.zeros((len(rows), width), np.int32)
    for padded, row in zip(tokens, rows):
      padded[: len(row)] = row
    batches.append((tokens, np.array([*map(len, rows)], np.int32)))
  return batches


def peer(
  file: str,
  users: int,
  normalise: Normalise,
  dtype: str,
  output: str,
  scores: bool = False,
  share: bool = False,
) -> Run:
  """Searches as transformers does, for all users at once.

  Args:
    scores: whether log-probabilities are returned, for which generate keeps those of each step.
    share: whether a prompt is read once; left to itself, generate reads it for each beam.
  """
  import os

  import torch
  from transformers import DynamicCache

  torch.set_num_threads(os.cpu_count() or 1)
  model = ml100k.torch_lm(dtype)
  prompts, titles = ml100k.read_prompts(file)
  eos = titles[0][-1]
  item_of = {tuple(title): item for item, title in reversed(list(enumerate(titles)))}
  following = ml100k.following(titles)

  def search(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    width = max(map(len, rows))
    tokens = torch.tensor([[eos] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    with torch.inference_mode():
      cached = {}
      if share:
        cached['past_key_values'] = cache = DynamicCache(config=model.config)
        before, positions = mask[:, :-1], (mask[:, :-1].cumsum(dim=1) - 1).clamp(min=0)
        model.model(
          tokens[:, :-1], attention_mask=before, position_ids=positions, past_key_values=cache
        )
        cache.batch_repeat_interleave(BEAMS)
      found = model.generate(
        tokens,
        attention_mask=mask,
        num_beams=BEAMS,
        num_return_sequences=BEAMS,
        do_sample=False,
        max_new_tokens=max(map(len, titles)),
        length_penalty=0.0,  # a score is the sum of log-probabilities
        renormalize_logits=normalise == 'catalogue',
        # Beams that have ended come too, and are given up afterwards.
        prefix_allowed_tokens_fn=lambda _, row: following.get(tuple(row[width:].tolist()), [eos]),
        eos_token_id=eos,
        pad_token_id=eos,
        return_dict_in_generate=True,
        output_scores=scores,
        **cached,
      )
    made = found.sequences[:, width:].tolist()
    items = [item_of[(*row[: row.index(eos)], eos)] for row in made]
    log_probs = found.sequences_scores.numpy() if scores else np.zeros(len(items))
    return np.reshape(items, (-1, BEAMS)), np.reshape(log_probs, (-1, BEAMS))

  def run() -> dict[str, float]:
    items, log_probs = search(prompts[:users])
    np.savez(output, items=items, log_probs=log_probs)
    return {'users': users}

  return run


def for_each_user(found: Mapping[str, Measured], users: Mapping[str, int]) -> dict[str, Measured]:
  """Seconds of rounds -> seconds for one user."""
  return {
    name: side._replace(seconds=[seconds / users[name] for seconds in side.seconds])
    for name, side in found.items()
  }


def rows(rounds: int, peaks: Mapping[str, float]) -> Iterator[Row]:
  best = [*peaks][-1]
  with tempfile.TemporaryDirectory() as directory, Workers() as workers:
    file = ml100k.arrays()
    titles = ml100k.read_prompts(str(file)).titles

    def measured(normalise: Normalise, check: bool, rounds: int) -> dict[str, Measured]:
      sides = {}
      dtype = 'float32' if check else best
      warm = best == 'float32' and not check  # by the check
      for name, users in USERS.items():
        options: dict[str, Any] = {'file': str(file), 'normalise': normalise, 'dtype': dtype}
        options |= {'users': users, 'output': f'{directory}/{name}.npz'}
        if name != 'ours':
          options |= {'share': name == 'peer, shared', 'scores': check}
          options |= {'users': CHECKED} if check else {}
        function = 'ours' if name == 'ours' else 'peer'
        sides[name] = Side(__file__, function, options, warm_ups=0 if warm else 1)
      return workers.compare(sides, rounds)

    def agreement(peer: str) -> '_Agreement':
      return _Agreement.of(titles, *(np.load(f'{directory}/{name}.npz') for name in ('ours', peer)))

    for normalise in get_args(Normalise):
      measured(normalise, check=True, rounds=0)
      exact = {peer: agreement(peer) for peer in _PEERS}
      for found in exact.values():
        # Beams that have ended keep their places in ours, and are put aside in the peer's search,
        # which may find other titles at the end of the list.
        assert found.first == 1, exact
        assert found.same > 0.9, exact
        assert found.difference < TOLERANCE, exact
      sides = for_each_user(measured(normalise, check=False, rounds=rounds), USERS)
      for peer, how in _PEERS.items():
        rounded = agreement(peer)
        assert rounded.same > 0.8, rounded
        also = f', {rounded.same:.0%} in bfloat16' if best == 'bfloat16' else ''
        yield timed(
          f'beam of {BEAMS} over {len(titles):,} titles for a user, probabilities over the'
          f" {normalise}, {ml100k.LM}, {best}: transformers' generate, {how}",
          {'ours': sides['ours'], 'peer': sides[peer]},
          goal=10,
          note=f'{USERS["ours"]} users, {USERS[peer]} for transformers; of its titles ours are'
          f' {exact[peer].same:.0%} in float32{also}',
        )


class _Agreement(NamedTuple):
  """How alike two lists of titles are, over users.

  Attributes:
    first: how often the first title is the same.
    same: the share of the peer's titles that are ours, too.
    difference: the largest, of log-probabilities of titles that both have.
  """

  first: float
  same: float
  difference: float

  @classmethod
  def of(cls, titles: list[list[int]], ours: Any, peer: Any) -> '_Agreement':
    first, same, difference = [], [], [0.0]
    for user in range(len(peer['items'])):
      # Films of the same title are one item for the peer.
      mine, theirs = (
        {
          tuple(titles[item]): log_prob
          for item, log_prob in zip(side['items'][user], side['log_probs'][user])
        }
        for side in (ours, peer)
      )
      both = mine.keys() & theirs.keys()
      first.append(next(iter(mine)) == next(iter(theirs)))
      same.append(len(both) / len(theirs))
      difference += [abs(mine[title] - theirs[title]) for title in both]
    return cls(float(np.mean(first)), float(np.mean(same)), float(np.max(difference)))

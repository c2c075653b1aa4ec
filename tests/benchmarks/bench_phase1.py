"""Phase 1's training steps against the same in PyTorch, with the Q-Former of transformers.

  python tests/benchmarks/bench.py --only phase1

What is timed is one turn of the shipped schedule, an item-text step (ITC + ITM + ITG) and a
user-item step (UI): batch to device, forward, backward, clipping, AdamW. Ours is what `ilm train`
runs of jobs/phase1_ml100k.gin, on made-up tokens and vectors. Dropout is .1 on both sides.

Before it is timed, both sides compute the same losses without dropout on the same weights, and
`check_same` compares them and the norm of their gradient. Hard negatives are drawn at random, so
that in this check ITM has fixed pairs instead.
"""

import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from paired import Run, Workers
from table import Row, timed
from training_sides import (
  WEIGHTS,
  begin,
  compare_checked,
  finite,
  peer_update,
  qformer_state,
  tensor,
  ways_of_torch,
  with_peer,
)

SIZES = {'minilm': '6 x 384', 'bert8': '8 x 768'}
GOALS = {'float32': 1.5, 'bfloat16': 1.1}
# Relative, of losses and of the norm of the gradient.
TOLERANCES = {'float32': (1e-5, 5e-4), 'bfloat16': (1e-2, 2e-2)}
BATCHES = {'minilm': 32, 'bert8': 16}
TEXT, QUERIES, D_CF = 32, 8, 64
ITEMS, USERS = 1349, 943  # of MovieLens-100K
WORDS, CLS, SEP = 30_522, 101, 102  # of BERT; [DEC] comes after its words
ITEM_TEXT, USER_ITEM = 'item_text', 'user_item'


def rows(rounds: int, peaks: Mapping[str, float]) -> Iterator[Row]:
  with Workers() as workers:
    yield from _rows(workers, rounds, peaks)


def _rows(workers: Workers, rounds: int, peaks: Mapping[str, float]) -> Iterator[Row]:
  for size, shape in SIZES.items():
    batch = BATCHES[size]
    for dtype in peaks:
      with tempfile.TemporaryDirectory() as directory:
        options = {'directory': directory, 'size': size, 'batch': batch, 'dtype': dtype}
        # Of the large one a call takes so long that only the way without a compiler is measured.
        ways = ways_of_torch() if size == 'minilm' else {'eager': {'compiled': False}}
        found = compare_checked(workers, __file__, options, ways, rounds, *TOLERANCES[dtype])
      pair, note = with_peer(found, ways)
      yield timed(
        f'phase 1, item-text and user-item step, Q-Former {shape}, K {QUERIES}, batch {batch}, text'
        f' {TEXT}, {dtype}: torch, transformers',
        pair,
        goal=GOALS[dtype],
        peak=peaks[dtype],
        note=note,
      )


def make_data(batch: int) -> dict[str, np.ndarray]:
  """Entities, histories and the two batches: the same whoever calls it."""
  rng = np.random.default_rng(0)
  vectors = rng.standard_normal([ITEMS + USERS, D_CF], np.float32)
  histories = [rng.choice(ITEMS, n, replace=False) for n in rng.integers(20, 190, USERS)]
  lengths = rng.integers(TEXT // 2, TEXT + 1, batch)
  lengths[0] = TEXT
  text_mask = np.arange(TEXT) < lengths[:, None]
  users = rng.choice(USERS, batch)
  right = np.array([rng.choice(histories[user]) for user in users])
  seen = np.array([np.isin(right, histories[user]) for user in users])
  same = (users[:, None] == users) | (right[:, None] == right)
  return {
    'vectors': vectors / np.sqrt(np.square(vectors).mean(axis=1, keepdims=True)),
    'offsets': np.cumsum([0, *map(len, histories)]).astype(np.int32),
    'history_items': np.concatenate([np.sort(items) for items in histories]).astype(np.int32),
    'items': rng.choice(ITEMS, batch, replace=False).astype(np.int32),
    'text_tokens': np.where(text_mask, rng.integers(1000, WORDS, [batch, TEXT]), 0),
    'text_mask': text_mask.astype(np.int32),
    'users': (users + ITEMS).astype(np.int32),
    'right': right.astype(np.int32),
    'false_negatives': (seen | same) & ~np.eye(batch, dtype=bool),
  }


def with_special_tokens(data: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """[CLS] text [SEP] and its mask, [batch, TEXT + 2] each."""
  places = np.arange(TEXT + 2)
  ends = data['text_mask'].sum(axis=1, keepdims=True) + 1
  tokens = np.pad(data['text_tokens'], ((0, 0), (1, 1)), constant_values=((0, 0), (CLS, 0)))
  tokens = np.where(places == ends, SEP, tokens)
  return tokens.astype(np.int32), (places <= ends).astype(np.int32)


def ours(directory: str, size: str, batch: int, dtype: str) -> Run:
  from ilm_jax.runtime.tensorflow import import_tensorflow

  import_tensorflow()
  import jax
  import jax.numpy as jnp
  import optax

  from ilm_jax import train
  from ilm_jax.config import reader as config
  from ilm_jax.models import losses
  from ilm_jax.models.item_text import Frozen, ItemTextConfig, SpecialTokens
  from ilm_jax.modules.histories import UserHistories
  from ilm_jax.phases.item_text_steps import ItemTextSteps, encoder_config
  from ilm_jax.runtime import sharding

  job = config.parse(train.train, ['jobs/phase1_ml100k.gin'], ['MODEL_DIR=unused']).arguments
  encoder = {name: x for name, x in job['item_encoder'].items() if name != 'init_from'}
  encoder |= {'size': size, 'num_queries': QUERIES, 'bf16_matmul': dtype == 'bfloat16'}

  def make_steps(**changes: Any) -> ItemTextSteps:
    return ItemTextSteps(
      encoder_config(encoder, d_cf=D_CF, vocab_size=WORDS),
      ItemTextConfig(**{**job['losses'], **changes}),
      SpecialTokens(cls=CLS, dec=WORDS, eos=SEP),
      num_items=ITEMS,
      max_text_tokens=TEXT,
    )

  steps, data, key = make_steps(), make_data(batch), jax.random.key(0)
  mesh, rules, state, train_step = begin(job, steps, Path(directory))
  longest = int(np.diff(data['offsets']).max())
  offsets, history_items = (jnp.asarray(data[name]) for name in ('offsets', 'history_items'))
  histories = UserHistories(offsets, history_items, longest)
  frozen = sharding.place_constants(Frozen(data['vectors'], histories), mesh, rules)
  batches = {
    ITEM_TEXT: {
      'text_tokens': data['text_tokens'].astype(np.int32),
      'text_mask': data['text_mask'],
      'entity_ids': data['items'][:, None],
    },
    USER_ITEM: {
      'text_tokens': np.zeros([batch, 0], np.int32),
      'text_mask': np.zeros([batch, 0], np.int32),
      'entity_ids': np.stack([data['users'], data['right'], data['users']], axis=1),
    },
  }
  for source, rows in batches.items():
    assert {name: x.shape for name, x in rows.items()} == steps.batch_shapes(source, batch)

  def fixed_losses(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    no_draw = make_steps(itm_weight=0.0).model

    def metrics_of(source: str) -> dict[str, jax.Array]:
      rows = {name: jnp.asarray(x) for name, x in batches[source].items()}
      return no_draw.loss(params, frozen, rows, key, source=source, deterministic=True)[1]

    tokens, mask = (jnp.asarray(np.tile(x, (2, 1))) for x in with_special_tokens(data))
    items = np.concatenate([data['items'], np.roll(data['items'], 1)])
    vectors = frozen.entity_vectors[items]
    logits: Any = no_draw.module.apply(
      {'params': params}, vectors, tokens, mask, method='match_logits', deterministic=True
    )
    matches = jnp.arange(2 * batch) < batch
    found = {
      'itm': losses.matching(logits, matches, jnp.ones(2 * batch))[0],
      'itc': metrics_of(ITEM_TEXT)['itc/loss'],
      'itg': metrics_of(ITEM_TEXT)['itg/loss'],
      'ui': metrics_of(USER_ITEM)['ui/loss'],
    }
    return sum(found.values(), jnp.zeros(())), found

  @jax.jit
  def fixed(params: Any) -> tuple[dict[str, jax.Array], jax.Array]:
    gradient, found = jax.grad(fixed_losses, has_aux=True)(params)
    return found, optax.global_norm(gradient)

  with sharding.use_mesh(mesh, rules):
    found, norm = fixed(state.params)
  same = {f'same/{name}': float(value) for name, value in found.items()}
  same['same/gradient_norm'] = float(norm)
  same['same/number_of_parameters'] = sum(x.size for x in jax.tree.leaves(state.params))
  flops = sum(steps.flops(state.params, frozen, rows, name) for name, rows in batches.items())

  def run() -> dict[str, float]:
    nonlocal state
    metrics = {}
    with sharding.use_mesh(mesh, rules):
      for source, rows in batches.items():
        placed = sharding.place_batch(rows, mesh)
        state, metrics[source] = train_step(state, frozen, placed, key, source=source)
    jax.block_until_ready(state)
    found = {f'loss/{source}': float(each['loss']) for source, each in metrics.items()}
    return {**same, **finite(found), 'flops': flops}

  return run


def peer(directory: str, size: str, batch: int, dtype: str, compiled: bool) -> Run:
  import torch
  from torch import nn
  from torch.nn import functional
  from transformers import Blip2QFormerConfig
  from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2TextEmbeddings

  torch.set_num_threads(os.cpu_count() or 1)
  leaves = dict(np.load(Path(directory) / WEIGHTS))
  layers, width = (int(x) for x in SIZES[size].split(' x '))
  config = Blip2QFormerConfig(
    vocab_size=len(leaves['qformer/word_embedder/embedding']),
    hidden_size=width,
    num_hidden_layers=layers,
    num_attention_heads=12,
    intermediate_size=4 * width,
    encoder_hidden_size=D_CF,
    cross_attention_frequency=2,
    use_qformer_text_input=True,
    hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.1,
  )
  made = make_data(batch)
  data = {name: torch.from_numpy(x) for name, x in made.items()}
  tokens, mask = (torch.from_numpy(x).long() for x in with_special_tokens(made))
  vectors, users, right = data['vectors'], data['users'], data['right']
  diagonal = torch.arange(batch)

  class ItemText(nn.Module):
    def __init__(self):
      super().__init__()
      self.qformer = Blip2QFormerModel(config)
      self.embeddings = Blip2TextEmbeddings(config)
      self.queries = nn.Parameter(torch.zeros(1, QUERIES, width))
      self.query_projection = nn.Linear(width, 256)
      self.text_projection = nn.Linear(width, 256)
      self.match = nn.Linear(width, 2)
      self.log_temperature_itc = nn.Parameter(torch.zeros(()))
      self.log_temperature_ii = nn.Parameter(torch.zeros(()))  # of the source that has no turn
      self.log_temperature_ui = nn.Parameter(torch.zeros(()))

    def query_states(self, items):
      return self.qformer(
        query_embeds=self.queries.expand(len(items), -1, -1),
        encoder_hidden_states=vectors[items][:, None],
      ).last_hidden_state

    def query_features(self, items):
      return functional.normalize(self.query_projection(self.query_states(items)).float(), dim=-1)

    def text_features(self, tokens, mask):
      states = self.qformer(
        query_embeds=self.embeddings(input_ids=tokens), query_length=0, attention_mask=mask
      ).last_hidden_state
      weights = mask[..., None].to(states.dtype)
      pooled = (states * weights).sum(dim=1) / weights.sum(dim=1)
      return functional.normalize(self.text_projection(pooled).float(), dim=-1)

    def both_states(self, items, tokens, mask):
      """Of [queries; text]. mask: [B, S], or [B, 1, S, S] of who sees whom."""
      queries = self.queries.expand(len(items), -1, -1)
      return self.qformer(
        query_embeds=self.embeddings(input_ids=tokens, query_embeds=queries),
        query_length=QUERIES,
        attention_mask=mask,
        encoder_hidden_states=vectors[items][:, None],
      ).last_hidden_state

    def contrast_scores(self, items, tokens, mask):
      queries, text = self.query_features(items), self.text_features(tokens, mask)
      scores = torch.einsum('bkf,cf->bck', queries, text).amax(dim=-1)
      return scores / temperature(self.log_temperature_itc)

    def match_loss(self, items, tokens, mask, labels):
      mask = torch.cat([mask.new_ones(len(items), QUERIES), mask], dim=1)
      states = self.both_states(items, tokens, mask)[:, :QUERIES]
      return functional.cross_entropy(self.match(states).mean(dim=1), labels)

    def generation_loss(self, items, tokens, mask):
      inputs = torch.cat([torch.full_like(tokens[:, :1], WORDS), tokens[:, 1:-1]], dim=1)
      length = QUERIES + inputs.shape[1]
      sees = torch.ones(length, length, dtype=torch.bool).tril()
      sees[:, :QUERIES] = True
      present = torch.cat([mask.new_ones(len(items), QUERIES), mask[:, :-1]], dim=1).bool()
      states = self.both_states(items, inputs, (sees & present[:, None])[:, None])[:, QUERIES:]
      logits = functional.linear(states, self.embeddings.word_embeddings.weight)
      targets = tokens[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
      return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1)

    def item_text_loss(self, items, tokens, mask):
      scores = self.contrast_scores(items, tokens, mask)
      with torch.no_grad():
        others = torch.eye(len(items), dtype=torch.bool)
        texts = scores.float().masked_fill(others, -torch.inf).softmax(dim=1).multinomial(1)[:, 0]
        entities = scores.T.float().masked_fill(others, -torch.inf).softmax(dim=1).multinomial(1)
        entities = entities[:, 0]
      match = self.match_loss(
        torch.cat([items, items[entities], items]),
        torch.cat([tokens, tokens, tokens[texts]]),
        torch.cat([mask, mask, mask[texts]]),
        torch.arange(3 * len(items)).lt(len(items)).long(),
      )
      return contrast(scores) + match + self.generation_loss(items, tokens, mask)

    def user_item_loss(self, users, right, false_negatives):
      left, right = self.query_features(users), self.query_features(right)
      scores = torch.einsum('bkf,clf->bckl', left, right).amax(dim=(2, 3))
      scores = scores / temperature(self.log_temperature_ui)
      scores = scores.masked_fill(false_negatives, -1e9)
      return (
        functional.cross_entropy(scores, diagonal) + functional.cross_entropy(scores.T, diagonal)
      ) / 2

  def temperature(log):
    return log.clamp(math.log(0.01), math.log(1.0)).exp()

  def contrast(scores):
    ways = (
      functional.cross_entropy(each, diagonal, label_smoothing=0.1) for each in (scores, scores.T)
    )
    return sum(ways) / 2

  model = ItemText()
  model.load_state_dict(peer_state(leaves), strict=True)
  update = peer_update(model, Path(directory))
  precision = torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'bfloat16')
  items = data['items']

  model.eval()
  with precision:
    pairs = torch.cat([items, items.roll(1)]), tokens.repeat(2, 1), mask.repeat(2, 1)
    matches = torch.arange(2 * batch).lt(batch).long()
    fixed = {
      'itm': model.match_loss(*pairs, matches),
      'itc': contrast(model.contrast_scores(items, tokens, mask)),
      'itg': model.generation_loss(items, tokens, mask),
      'ui': model.user_item_loss(users, right, data['false_negatives']),
    }
  torch.stack([*fixed.values()]).sum().backward()
  same = {f'same/{name}': float(value.detach()) for name, value in fixed.items()}
  same['same/gradient_norm'] = float(
    nn.utils.get_total_norm([x.grad for x in model.parameters() if x.grad is not None])
  )
  same['same/number_of_parameters'] = sum(x.numel() for x in model.parameters())
  del fixed
  model.zero_grad()
  model.train()

  losses = {ITEM_TEXT: model.item_text_loss, USER_ITEM: model.user_item_loss}
  if compiled:
    # Layer by layer, as PyTorch advises for many that are alike: with the losses around them it
    # takes many minutes. Not dynamic: there are a few shapes, and each is compiled for itself.
    for layer in model.qformer.encoder.layer:
      layer.compile(dynamic=False)
  batches = {
    ITEM_TEXT: (items, tokens, mask),
    USER_ITEM: (users, right, data['false_negatives']),
  }

  def run() -> dict[str, float]:
    found = {}
    for source, arguments in batches.items():
      with precision:
        loss = losses[source](*arguments)
      update(loss)
      found[f'loss/{source}'] = float(loss.detach())
    return {**same, **finite(found)}

  return run


def peer_state(leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The state of the peer from our parameters."""
  own = {
    name.removeprefix('qformer/'): x for name, x in leaves.items() if name.startswith('qformer/')
  }
  state = {f'qformer.{name}': x for name, x in qformer_state(own).items()}
  state['embeddings.word_embeddings.weight'] = tensor(own['word_embedder/embedding'])
  state['embeddings.position_embeddings.weight'] = tensor(own['positions'])
  state['queries'] = tensor(own['queries'][None])
  for name in ('query_projection', 'text_projection', 'match'):
    state[f'{name}.weight'] = tensor(leaves[f'{name}/kernel'].T)
    state[f'{name}.bias'] = tensor(leaves[f'{name}/bias'])
  temperatures = [name for name in leaves if name.startswith('log_temperature_')]
  return {**state, **{name: tensor(leaves[name]) for name in temperatures}}

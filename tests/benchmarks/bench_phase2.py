"""Phase 2's training step on a frozen language model against the same in PyTorch, transformers.

  python tests/benchmarks/bench.py --only phase2

Prompts with the soft tokens of 20 items, the loss on the target's tokens alone; what is trained is
an item encoder (a Q-Former of MiniLM's size) and an adaptor. Ours is the step that `ilm train` runs
of jobs/phase2_ml100k.gin with 4 soft tokens an item, the vocabulary loss and no readout. That job
packs prompts into rows of 384 tokens. Here every prompt is as long as any other, 128 tokens, and
has a row of its own on both sides: as many prompts as two packed rows hold.

The peer is asked for the logits of targets only, which is less work than the loss that transformers
takes of labels, the documented way; that has a row of its own. Language models have random
weights, kept in bfloat16 as released ones are: in float32 both sides compute with those.

The job has no dropout, so that both sides train alike, step for step: `check_same` compares losses
and norms of gradients of the last step that was timed.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from paired import Run, Side, Workers
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

LMS = {'smollm2_135m': 'SmolLM2-135M', 'gemma3_270m': 'Gemma 3 270M'}
GOAL, MEMORY_GOAL = 1.5, 0.7
BY_LABELS = 'loss of labels'  # by transformers
TOLERANCES = {'float32': (1e-4, 1e-3), 'bfloat16': (5e-3, 5e-2)}  # relative: loss, gradient
PROMPTS, ITEMS_OF_PROMPT, SOFT_TOKENS, D_CF = 6, 20, 4, 64
WORDS_BEFORE, WORDS_BEHIND, TARGETS = 8, 8, 12
LENGTH = WORDS_BEFORE + ITEMS_OF_PROMPT * (SOFT_TOKENS + 1) + WORDS_BEHIND + TARGETS
ITEMS, USERS = 1349, 943  # of MovieLens-100K
BOS, SLOT, COMMA, EOS = 1, 5, 6, 2
TASK = 'sequential_seen_title'


def rows(rounds: int, peaks: Mapping[str, float]) -> Iterator[Row]:
  with Workers() as workers:
    yield from _rows(workers, rounds, peaks)


def _rows(workers: Workers, rounds: int, peaks: Mapping[str, float]) -> Iterator[Row]:
  ways = ways_of_torch()
  by_labels = {BY_LABELS: {'compiled': False, 'by_labels': True}}
  for lm, shown in LMS.items():
    with tempfile.TemporaryDirectory() as directory:
      # Where torch is imported anyway, and not in this process.
      workers.make(BY_LABELS, Side(__file__, 'save_lm', {'directory': directory, 'lm': lm}))
      for dtype in peaks:
        options = {'directory': directory, 'dtype': dtype}
        found = compare_checked(
          workers, __file__, options, ways, rounds, *TOLERANCES[dtype], also=by_labels
        )
        for some, logits in ((ways, 'logits of targets only'), (by_labels, BY_LABELS)):
          pair, note = with_peer(found, some)
          yield timed(
            f'phase 2, step with frozen {shown}, {PROMPTS} prompts of {LENGTH} tokens,'
            f' {ITEMS_OF_PROMPT} items x {SOFT_TOKENS} soft tokens, {dtype}: torch, transformers,'
            f' {logits}',
            pair,
            goal=GOAL,
            peak=peaks[dtype],
            note=f'{note}; memory: at most {MEMORY_GOAL} is wanted',
          )


def save_lm(directory: str, lm: str) -> None:
  """Saves a language model of that shape, with random weights, as transformers does."""
  import torch
  import transformers

  torch.manual_seed(0)
  configs = {
    'smollm2_135m': lambda: transformers.LlamaConfig(
      vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
      num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=8192,
      rms_norm_eps=1e-5, rope_parameters={'rope_type': 'default', 'rope_theta': 1e5},
      tie_word_embeddings=True,
    ),
    'gemma3_270m': lambda: transformers.Gemma3TextConfig(
      vocab_size=262_144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18,
      num_attention_heads=4, num_key_value_heads=1, head_dim=256, max_position_embeddings=32_768,
      query_pre_attn_scalar=256, sliding_window=512,
    ),
  }  # fmt: skip
  model = transformers.AutoModelForCausalLM.from_config(configs[lm](), dtype=torch.bfloat16)
  model.save_pretrained(directory)


def make_data() -> dict[str, np.ndarray]:
  """Vectors of entities, and prompts: the same whoever calls it.

  tokens: [PROMPTS, LENGTH + 1], BOS first: each one but the last predicts the next one.
  """
  rng = np.random.default_rng(0)
  vectors = rng.standard_normal([ITEMS + USERS, D_CF], np.float32)

  def words(number: int) -> np.ndarray:
    return rng.integers(100, 40_000, [PROMPTS, number])

  def always(*tokens: int) -> np.ndarray:
    return np.tile(np.array(tokens), (PROMPTS, 1))

  item = [SLOT] * SOFT_TOKENS + [COMMA]
  parts = [always(BOS), words(WORDS_BEFORE), always(*item * ITEMS_OF_PROMPT)]
  parts += [words(WORDS_BEHIND), words(TARGETS - 1), always(EOS)]
  return {
    'vectors': vectors / np.sqrt(np.square(vectors).mean(axis=1, keepdims=True)),
    'tokens': np.concatenate(parts, axis=1).astype(np.int32),
    'items': rng.integers(0, ITEMS, [PROMPTS, ITEMS_OF_PROMPT]).astype(np.int32),
  }


def ours(directory: str, dtype: str) -> Run:
  from ilm_jax.runtime.tensorflow import import_tensorflow

  import_tensorflow()
  import jax

  from ilm_jax import train
  from ilm_jax.config import reader as config
  from ilm_jax.lm.load import default_compute, load_lm
  from ilm_jax.models.item_language import Frozen, ItemLanguageConfig
  from ilm_jax.modules.layers import Compute
  from ilm_jax.phases.item_language_options import ItemLanguageData, LmOptions, soft_token_config
  from ilm_jax.phases.item_language_steps import ItemLanguageSteps
  from ilm_jax.runtime import sharding

  changes = [f'NUM_QUERIES={SOFT_TOKENS}', 'TARGET_LOSS=vocabulary', 'READOUT=False']
  if dtype == 'float32':
    changes.append('BF16_MATMUL=False')
  gin_files = ['jobs/phase2_ml100k.gin']
  job = config.parse(train.train, gin_files, ['MODEL_DIR=unused', *changes]).arguments
  lm_options = LmOptions(**{**job['lm'], 'name': directory})
  compute = default_compute() if dtype == 'bfloat16' else Compute(scan_layers=False)
  lm = load_lm(directory, compute=compute)
  sizes = {'max_inputs': LENGTH - TARGETS, 'max_targets': TARGETS}
  sizes |= {'max_entities': ITEMS_OF_PROMPT, 'pack': False, 'prefix': ''}
  text = ItemLanguageData(**{**job['text'], **sizes})
  encoder = {name: x for name, x in job['item_encoder'].items() if name != 'init_from'}
  steps = ItemLanguageSteps(
    lm.module,
    soft_token_config(
      encoder,
      text,
      lm_options,
      d_model=lm.module.config.d_model,
      gain=lm.embedding_rms,
      d_cf=D_CF,
    ),
    config=ItemLanguageConfig(**job['losses']),
    text=text,
    lm_options=lm_options,
    slot_id=SLOT,
    num_items=ITEMS,
    first_token=BOS,
  )
  data = make_data()
  mesh, rules, state, train_step = begin(job, steps, Path(directory))
  frozen = sharding.place_constants(Frozen(lm.params, data['vectors']), mesh, rules)
  rows = {
    'decoder_input_tokens': data['tokens'][:, :-1],
    'decoder_target_tokens': data['tokens'][:, 1:],
    'decoder_loss_weights': np.tile(np.arange(LENGTH) >= LENGTH - TARGETS, (PROMPTS, 1)),
    'entity_ids': data['items'],
  }
  rows = {name: np.ascontiguousarray(x, np.int32) for name, x in rows.items()}
  shapes = steps.batch_shapes(TASK, PROMPTS, pack=False)
  assert {name: x.shape for name, x in rows.items()} == shapes
  parameters = sum(x.size for x in jax.tree.leaves(state.params))
  flops = steps.flops(state.params, frozen, rows, TASK)
  key = jax.random.key(job['seed'])

  def run() -> dict[str, float]:
    nonlocal state
    with sharding.use_mesh(mesh, rules):
      batch = sharding.place_batch(rows, mesh)
      state, metrics = train_step(state, frozen, batch, key, source=TASK)
    jax.block_until_ready(state)
    same = {
      'loss': float(metrics['loss']),
      'gradient_norm': float(metrics['gradient_norm']),
      'number_of_targets': float(metrics['target_tokens']),
      'number_of_tokens': rows['decoder_input_tokens'].size,
      'number_of_parameters': parameters,
    }
    return {**finite({f'same/{name}': x for name, x in same.items()}), 'flops': flops}

  return run


def peer(directory: str, dtype: str, compiled: bool, by_labels: bool = False) -> Run:
  import torch
  from torch import nn
  from torch.nn import functional
  from transformers import AutoModelForCausalLM, Blip2QFormerConfig
  from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

  torch.set_num_threads(os.cpu_count() or 1)
  leaves = dict(np.load(Path(directory) / WEIGHTS))
  data = {name: torch.from_numpy(x) for name, x in make_data().items()}
  tokens, vectors = data['tokens'].long(), data['vectors']
  lm = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
  lm.requires_grad_(False)
  lm.eval()  # nothing is dropped

  class SoftTokens(nn.Module):
    def __init__(self):
      super().__init__()
      config = Blip2QFormerConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        encoder_hidden_size=D_CF,
        cross_attention_frequency=2,
        use_qformer_text_input=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
      )
      self.qformer = Blip2QFormerModel(config)
      self.queries = nn.Parameter(torch.zeros(1, SOFT_TOKENS, 384))
      self.adaptor = nn.Linear(384 + D_CF, lm.config.hidden_size)
      self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, vectors):
      """[U, d_cf] -> [U, K, D]."""
      queries = self.qformer(
        query_embeds=self.queries.expand(len(vectors), -1, -1),
        encoder_hidden_states=vectors[:, None],
      ).last_hidden_state
      beside = vectors[:, None].expand(-1, SOFT_TOKENS, -1)
      adapted = self.adaptor(torch.cat([queries, beside], dim=-1))
      return functional.layer_norm(adapted, adapted.shape[-1:], eps=1e-6) * self.gain

  model = SoftTokens()
  model.load_state_dict(peer_state(leaves), strict=True)
  update = peer_update(model, Path(directory))
  if compiled:
    # Layer by layer, as PyTorch advises for many that are alike: each kind is compiled once.
    for layer in [*lm.model.layers, *model.qformer.encoder.layer]:
      layer.compile()
  labels = torch.full_like(tokens, -100)
  labels[:, -TARGETS:] = tokens[:, -TARGETS:]
  inputs = tokens if by_labels else tokens[:, :-1]
  is_slot = (inputs == SLOT)[..., None]

  def loss_of_batch() -> Any:
    soft_tokens = model(vectors[data['items'].flatten()])
    embeddings = lm.get_input_embeddings()(inputs)
    embeddings = embeddings.masked_scatter(is_slot, soft_tokens.to(embeddings.dtype))
    if by_labels:
      return lm(inputs_embeds=embeddings, labels=labels, use_cache=False).loss
    logits = lm(inputs_embeds=embeddings, logits_to_keep=TARGETS, use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, -TARGETS:].flatten())

  def run() -> dict[str, float]:
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'bfloat16'):
      loss = loss_of_batch()
    norm = update(loss)
    same = {
      'loss': float(loss.detach()),
      'gradient_norm': norm,
      'number_of_targets': int((labels != -100).sum()),
      # The last target is read as well where the model takes labels; it predicts nothing.
      'number_of_tokens': tokens[:, :-1].numel(),
      'number_of_parameters': sum(x.numel() for x in model.parameters()),
    }
    return finite({f'same/{name}': x for name, x in same.items()})

  return run


def peer_state(leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The state of the peer from our parameters."""
  prefix = 'item_encoder/'
  own = {name.removeprefix(prefix): x for name, x in leaves.items() if name.startswith(prefix)}
  return {
    **{f'qformer.{name}': x for name, x in qformer_state(own).items()},
    'queries': tensor(own['queries'][None]),
    'adaptor.weight': tensor(leaves['adaptor/kernel'].T),
    'adaptor.bias': tensor(leaves['adaptor/bias']),
    'gain': tensor(leaves['gain']),
  }

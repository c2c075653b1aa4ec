"""The programs of a training job, with shapes in the place of arrays: no data, no weights."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ilm_jax.catalogue.trie import Trie
from ilm_jax.cf.entity_table import METADATA_FILE
from ilm_jax.checkpoints import bert
from ilm_jax.config.types import make_dataclass
from ilm_jax.data.prepared import read_metadata
from ilm_jax.errors import UsageError, did_you_mean
from ilm_jax.lm import huggingface
from ilm_jax.lm.decoder_sizes import DECODER_SIZES
from ilm_jax.lm.load import init_params, make_module
from ilm_jax.models.item_language import Frozen, ItemLanguageConfig
from ilm_jax.models.item_text import ITEM_TEXT, ItemTextConfig, SpecialTokens
from ilm_jax.models.item_text import Frozen as ItemTextFrozen
from ilm_jax.modules.decoder import DecoderConfig
from ilm_jax.modules.histories import UserHistories
from ilm_jax.modules.user_states import UserStates
from ilm_jax.phases.item_language_options import (
  ItemLanguageData,
  LmOptions,
  lm_compute,
  soft_token_config,
)
from ilm_jax.phases.item_language_steps import ITEM_SEQUENCE, ItemLanguageSteps
from ilm_jax.phases.item_text import ItemTextData, text_vocabulary
from ilm_jax.phases.item_text_steps import ItemTextSteps, encoder_config
from ilm_jax.phases.phase import batch_sizes
from ilm_jax.phases.train_step import abstract_state, jit_step, make_optimizer
from ilm_jax.runtime import sharding
from ilm_jax.runtime.flops import matmul_flops

_TOKEN = 3  # any: which id a special token has does not matter to a program
_BERT_TOKENS = 30_522
_LENGTHS = 32  # prompts are padded to a multiple of it


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What the data decide of a program.

  Attributes:
    items, users: I and the number of users.
    cf_dim: width of the entity table.
    interactions: training rows; for histories on the devices.
    longest_history: of a user.
    vocab_size: of phase 1's vocabulary, where that is not here.
    prefix_tokens: of train.text.prefix.
    trie_nodes, trie_children, trie_depth, trie_tokens: of the catalogue's trie: nodes, children of
      a node, tokens of an item and different tokens, at most.
  """

  items: int
  users: int
  cf_dim: int
  interactions: int | None = None
  longest_history: int = 1000
  vocab_size: int | None = None
  prefix_tokens: int | None = None
  trie_nodes: int | None = None
  trie_children: int = 16_384
  trie_depth: int | None = None
  trie_tokens: int = 65_536


class Program(NamedTuple):
  """Something to compile.

  Attributes:
    name: what it is.
    function: under jax.jit.
    args: shapes with shardings, by category.
    options: static arguments.
    model_flops: of all chips together, nothing computed twice; of the body of a loop whose number
      of turns depends on the data, one turn.
    flops: the same with what is computed again in the backward pass.
  """

  name: str
  function: Any
  args: tuple[Any, ...]
  options: Mapping[str, Any]
  model_flops: Callable[[], int]
  flops: Callable[[], int]


def read_sizes(shapes: Mapping[str, int] | None, data: Path | None) -> Sizes:
  """Sizes of a job: `compile.shapes`, and what a prepared data set says where there is one.

  Raises:
    UsageError: neither says enough.
  """
  values: dict[str, Any] = {}
  if data is not None and data.is_dir():
    metadata = read_metadata(data)
    counts = metadata['counts']
    table = json.loads((data / metadata['entity_table_dir'] / METADATA_FILE).read_text())
    values = {'items': counts['items'], 'users': counts['users'], 'cf_dim': table['dim']}
    values['interactions'] = counts['train']
  values |= shapes or {}
  if missing := {'items', 'users', 'cf_dim'} - set(values):
    raise UsageError(
      f'compile.shapes lacks {", ".join(sorted(missing))}, and {data} is no prepared data set that'
      " would say so. --shapes=\"{'items': 10_000_000, 'users': 5_000_000, 'cf_dim': 128}\""
    )
  return make_dataclass(Sizes, values, 'compile.shapes')


def programs(
  job: Mapping[str, Any],
  sizes: Sizes,
  devices: list[Any],
  *,
  lm: str | None = None,
  decode_rows: int | None = None,
  beam_size: int = 10,
) -> tuple[list[Program], jax.sharding.Mesh, sharding.Rules]:
  """All programs of a job, its mesh and its rules.

  Args:
    job: arguments of `train`.
    sizes: what the data decide.
    devices: of the topology.
    lm: name or path of the language model's configuration; by default the job's.
    decode_rows: prompts that are answered at once; by default one for each part of a batch.
    beam_size: of the search.

  Raises:
    UsageError: an option is wrong, or does not fit the mesh.
  """
  mesh = sharding.make_mesh(job['mesh'] or {'data': -1}, devices)
  rules = tuple((dict(sharding.DEFAULT_RULES) | (job['sharding_rules'] or {})).items())
  parts = mesh.shape['data'] * mesh.shape['fsdp']
  rows = batch_sizes(job['batch_size'], job['schedule'], job['accumulate_steps'])
  for source, size in rows.items():
    if size % (parts * job['accumulate_steps']):
      raise UsageError(
        f'train.batch_size={size} ({source}): {parts} parts of a batch (data x fsdp of mesh'
        f' {dict(mesh.shape)}) times accumulate_steps={job["accumulate_steps"]} do not divide it.'
      )
  context = _Context(job, sizes, mesh, rules, rows)
  if job['model'] == 'item_text':
    found = _item_text(context)
  else:
    found = _item_language(context, lm, decode_rows or max(16, parts), beam_size)
  return found, mesh, rules


class _Context(NamedTuple):
  job: Mapping[str, Any]
  sizes: Sizes
  mesh: jax.sharding.Mesh
  rules: sharding.Rules
  rows: Mapping[str, int]

  def placed(self, make: Callable[[], Any]) -> Any:
    """Shapes and shardings of what `make` returns, in boxes or not."""
    return sharding.abstract_init(lambda _: make(), self.mesh, self.rules, jax.random.key(0))

  def batch(self, shapes: Mapping[str, tuple[int, ...]], dtype: Any = jnp.int32) -> Any:
    """Arrays that are split by rows."""
    return sharding.abstract_batch(shapes, self.mesh, dtype)

  def entity_vectors(self) -> Any:
    """As `boxed_vectors` of a phase."""
    entities = self.sizes.items + self.sizes.users
    # Rows without a column: how many there are is all that is asked for.
    whole = sharding.pad_rows(np.zeros((entities, 0)), 'entities', self.mesh, self.rules)
    vectors = jnp.zeros((len(whole), self.sizes.cf_dim))
    return nn.LogicallyPartitioned(vectors, ('entities', 'cf'))

  def train(
    self, steps: Any, executed: Any, freeze: Callable[[], Any], shapes: Callable[..., Any]
  ) -> tuple[Any, Any, list[Program]]:
    """The state, what `freeze` returns, and one program for each source."""
    job = self.job
    seed = jax.random.key(0)
    if changes := tuple((job['sharding_rules'] or {}).items()):
      trees = sharding.boxed_shapes(steps.init, seed), sharding.boxed_shapes(freeze)
      sharding.check_changes(changes, *trees)
    frozen = self.placed(freeze)
    warmup = min(job['warmup_steps'], job['total_steps'] // 2)
    rates = optax.warmup_cosine_decay_schedule(
      0.0, job['learning_rate'], warmup, job['total_steps'], job['final_learning_rate']
    )
    optimizer = make_optimizer(
      rates,
      job['clip_norm'],
      b1=job['adam_b1'],
      b2=job['adam_b2'],
      weight_decay=job['weight_decay'],
      item_encoder_rate=job['item_encoder_rate'],
    )
    state = abstract_state(steps, optimizer, self.mesh, self.rules)
    step = jit_step(steps, optimizer, job['accumulate_steps'], state)
    key = self.placed(lambda: seed)

    def program(source: str) -> Program:
      batch = self.batch(shapes(source, self.rows[source]))

      def run_again() -> int:
        def gradient(params, frozen, batch, key):
          return jax.grad(lambda p: executed.loss(p, frozen, batch, key, source)[0])(params)

        return matmul_flops(gradient, state.params, frozen, batch, key)

      return Program(
        f'train {source}', step, (state, frozen, batch, key), {'source': source},
        lambda: steps.flops(state.params, frozen, batch, source), run_again,
      )  # fmt: skip

    return state, frozen, [program(source) for source in self.rows]


def _forward(
  name: str, steps: Any, plain: Any, method: str, args: tuple[Any, ...], **options: Any
) -> Program:
  """A program without a backward pass; `plain` counts the FLOPs of attention that is not fused."""
  function = jax.jit(getattr(steps, method), static_argnames=tuple(options))

  def count() -> int:
    return matmul_flops(lambda *args: getattr(plain, method)(*args, **options), *args)

  return Program(name, function, args, options, count, count)


def _item_text(context: _Context) -> list[Program]:
  job, sizes = context.job, context.sizes
  options = dict(job['item_encoder'] or {})
  options.pop('init_from', None)
  text = make_dataclass(ItemTextData, job['text'] or {}, 'train.text')
  config = make_dataclass(ItemTextConfig, job['losses'] or {}, 'train.losses')
  vocab_size = sizes.vocab_size
  if vocab_size is None:
    # A BERT by name would be fetched.
    by_name = text.vocabulary in bert.PACKAGES
    vocab_size = _BERT_TOKENS if by_name else text_vocabulary(text.vocabulary).vocab_size
  encoder = encoder_config(options, d_cf=sizes.cf_dim, vocab_size=vocab_size, platform='tpu')
  tokens = SpecialTokens(cls=_TOKEN, dec=vocab_size, eos=_TOKEN)
  steps = ItemTextSteps(
    encoder, config, tokens, num_items=sizes.items, max_text_tokens=text.max_text_tokens
  )
  interactions = sizes.interactions or 20 * sizes.users

  def freeze() -> ItemTextFrozen:
    offsets, items = jnp.zeros(sizes.users + 1, jnp.int32), jnp.zeros(interactions, jnp.int32)
    histories = UserHistories(offsets, items, sizes.longest_history)
    vectors = context.entity_vectors()
    return ItemTextFrozen(vectors, histories if config.false_negatives == 'history' else None)

  state, frozen, found = context.train(steps, steps, freeze, steps.batch_shapes)
  rows = text.eval_batch_size or max(context.rows.values())
  for source in context.rows:
    args = state.params, frozen, context.batch(steps.batch_shapes(source, rows))
    if source == ITEM_TEXT:
      found.append(_forward(f'evaluate {source}', steps, steps, 'item_features', args))
    else:
      found.append(
        _forward(f'evaluate {source}', steps, steps, 'pair_metrics', args, source=source)
      )
  return found


def _item_language(
  context: _Context, lm_name: str | None, decode_rows: int, beam_size: int
) -> list[Program]:
  job, sizes = context.job, context.sizes
  text = make_dataclass(ItemLanguageData, job['text'] or {}, 'train.text')
  config = make_dataclass(ItemLanguageConfig, job['losses'] or {}, 'train.losses')
  options = make_dataclass(LmOptions, job['lm'] or {}, 'train.lm')
  if text.prefix and sizes.prefix_tokens is None:
    raise UsageError('compile.shapes.prefix_tokens: how many tokens has train.text.prefix?')
  module = make_module(lm_config(lm_name or options.name), lm_compute(options, 'tpu'))
  encoder = dict(job['item_encoder'] or {})
  encoder.pop('init_from', None)
  soft_tokens = soft_token_config(
    encoder,
    text,
    options,
    d_model=module.config.d_model,
    gain=1.0,
    d_cf=sizes.cf_dim,
    platform='tpu',
  )

  def make(**compute: Any) -> ItemLanguageSteps:
    return ItemLanguageSteps(
      module.clone(compute=dataclasses.replace(module.compute, **compute)),
      soft_tokens,
      config=config,
      text=text,
      lm_options=options,
      slot_id=_TOKEN,
      num_items=sizes.items,
      first_token=_TOKEN,
      prefix_tokens=(_TOKEN,) * (sizes.prefix_tokens or 0),
    )

  # Of a fused kernel nobody counts the FLOPs: `plain` is what it computes without the fusion.
  steps, plain = make(), make(attention='xla')

  def freeze() -> Frozen:
    catalogue = 'catalogue' in config.target_losses
    interactions = sizes.interactions or 20 * sizes.users
    lm = None if options.trained else init_params(module, jax.random.key(0))
    unboxed = nn.unbox(lm)
    rows = jnp.zeros(interactions, jnp.int32)
    return Frozen(
      lm=lm,
      entity_vectors=context.entity_vectors(),
      log_popularity=jnp.zeros(sizes.items),
      user_states=UserStates(rows, rows, sizes.items + sizes.users)
      if text.users == 'items'
      else None,
      prefix=None if lm is None else steps.model.run_prefix(unboxed),
      trie=_trie(sizes, text) if catalogue else None,
      bias=jnp.zeros(_trie_nodes(sizes)) if catalogue else None,
    )

  pack = text.pack
  state, frozen, found = context.train(
    steps, plain, freeze, lambda source, rows: steps.batch_shapes(source, rows, pack=pack)
  )
  params = state.params
  rows = text.eval_batch_size or max(context.rows.values())
  for source in context.rows:
    if source != ITEM_SEQUENCE:
      batch = context.batch(steps.batch_shapes(source, rows, pack=False))
      loss = steps.target_loss(source)
      args = params, frozen, batch
      found.append(_forward(f'evaluate {source}', steps, plain, 'task_nll', args, target_loss=loss))
  if config.readout:
    found.append(_forward('encode catalogue', steps, plain, 'item_vectors', (params, frozen)))
    with sharding.use_mesh(context.mesh, context.rules):
      shape = jax.eval_shape(steps.item_vectors, params, frozen)
    axes = ('entities', 'cf') if steps.splits_catalogue else (None, None)
    vectors = context.placed(lambda: nn.LogicallyPartitioned(jnp.zeros(shape.shape), axes))
    ids = context.batch({'ids': (rows, text.sequence_length)})['ids']
    args = params, frozen, ids, vectors
    found.append(_forward('recommend readout', steps, plain, 'readout', args))
  if hasattr(module, 'init_cache') and not steps.model.has_encoder:
    length = -(-(text.max_inputs + 1) // _LENGTHS) * _LENGTHS
    batch = context.batch(
      {
        'tokens': (decode_rows, length),
        'lengths': (decode_rows,),
        'entity_ids': (decode_rows, text.max_entities),
      }
    )
    trie, bias = context.placed(lambda: (_trie(sizes, text), jnp.zeros(_trie_nodes(sizes))))
    forbidden = context.batch({'items': (decode_rows, sizes.items)}, jnp.bool_)['items']
    args = (params, frozen, trie, bias, forbidden, *batch.values())
    found.append(_forward('recommend beam', steps, plain, 'beams', args, size=beam_size))
  return found


def lm_config(name: str) -> DecoderConfig:
  """The configuration of a language model: a name, a directory with config.json, or one that is
  called by a name.

  Raises:
    UsageError: it is none of them.
  """
  path = Path(name).expanduser()
  if (path / 'config.json').is_file():
    return huggingface.decoder_config(huggingface.read_json(path / 'config.json'), str(path))
  if path.name in DECODER_SIZES:
    return DECODER_SIZES[path.name]
  raise UsageError(
    f'train.lm.name={name!r}: which language model is it? Give its name, --lm=..., one of'
    f' {", ".join(DECODER_SIZES)}.{did_you_mean(path.name, DECODER_SIZES)}'
  )


def _trie_nodes(sizes: Sizes) -> int:
  return sizes.trie_nodes or 4 * sizes.items


def _trie(sizes: Sizes, text: ItemLanguageData) -> Trie:
  nodes = jnp.zeros(_trie_nodes(sizes), jnp.int32)
  items = jnp.zeros(sizes.items, jnp.int32)
  return Trie(
    first_child=jnp.zeros(len(nodes) + 1, jnp.int32),
    parent=nodes,
    token=nodes,
    depth=nodes,
    first_item=nodes,
    end_item=nodes,
    items=items,
    leaf=items,
    alphabet=jnp.zeros(sizes.trie_tokens, jnp.int32),
    column=nodes,
    max_children=sizes.trie_children,
    max_depth=sizes.trie_depth or text.max_text_tokens + 1,
  )

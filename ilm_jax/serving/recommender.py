"""A trained run of phase 2 that ranks items and says what it knows of them.

  recommender = Recommender.load(Path('runs/ilm'))
  recommender.top([[12, 88, 401]], k=10)

| method | what a score is |
|---|---|
| readout | of the readout after the history: one forward pass |
| exact | the log-probability of the item's text after a prompt, among all items' texts |
| beam | the same, for those items that a beam search finds |

Letters: B rows, T tokens, E entities of a row, S items of a history, I items.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ilm_jax.cf.rankers import Sequences
from ilm_jax.checkpoints.manager import checkpoint_path, restore_params
from ilm_jax.data.prepared import PreparedData
from ilm_jax.data.text.template_programs import TemplatePrograms
from ilm_jax.decoding.exact import ScoringPlan, catalogue_scores
from ilm_jax.decoding.generator import Generator, bucket
from ilm_jax.decoding.sampling import SamplingOptions
from ilm_jax.errors import UsageError, did_you_mean
from ilm_jax.modules.decoder import Decoder
from ilm_jax.phases.item_language import ItemLanguagePhase
from ilm_jax.phases.settings import restore_phase
from ilm_jax.runtime import sharding
from ilm_jax.runtime.progress import Done, ignore

Ranking = list[tuple[int, float]]
_ROWS = 16  # prompts that are scored at once, at least; as many as split evenly over a mesh
_LENGTHS = 32  # a length is a multiple of it; a longer one, of more
_ITEM = '{item}'


class Prompts(NamedTuple):
  """Prompts as rows, padded on the right.

  Attributes:
    tokens: [B, T] int32, after the prefix; the first one is what an example begins with.
    lengths: [B].
    entity_ids: [B, E], padded with -1.
  """

  tokens: np.ndarray
  lengths: np.ndarray
  entity_ids: np.ndarray

  def rows(self, chosen: slice | np.ndarray) -> 'Prompts':
    """Some of them."""
    return Prompts(*(x[chosen] for x in self))


class Recommender:
  """See the top of the file.

  Attributes:
    phase: what was trained, with its data and language model.
    params, frozen: of the model, on the devices.
    methods: what it can rank by, the default first.
  """

  def __init__(self, phase: ItemLanguagePhase, params: Any, frozen: Any):
    self.phase = phase
    self.prepared: PreparedData = phase.prepared
    self.params = params
    self.frozen = frozen
    by_text = ('exact', 'beam') if isinstance(phase.lm.module, Decoder) else ()
    self.methods: tuple[str, ...] = (*(['readout'] if phase.config.readout else []), *by_text)

  @classmethod
  def load(
    cls,
    model_dir: Path,
    *,
    checkpoint: str | int = 'best',
    data: Path | None = None,
    mesh: Mapping[str, int] | None = None,
  ) -> 'Recommender':
    """Loads a run of phase 2.

    Args:
      model_dir: of `ilm train`.
      checkpoint: 'best' (on the validation items), 'latest', or a step.
      data: the prepared data set, where it is elsewhere now.
      mesh: as of `ilm train`.

    Raises:
      UsageError: there is no such run or checkpoint, or it is of phase 1.
    """
    devices = sharding.make_mesh(mesh or {'data': -1})
    rules = sharding.DEFAULT_RULES
    phase = restore_phase(model_dir, devices, rules, data=data)
    if not isinstance(phase, ItemLanguagePhase):
      raise UsageError(
        f'{model_dir} is a run of phase 1 ({phase.name}): it has no language model. Train phase 2'
        f' with it: --gin.PHASE1={model_dir}.'
      )
    path = checkpoint_path(model_dir, str(checkpoint), phase.best_metric, phase.best_mode)
    like = sharding.abstract_init(phase.init, devices, rules, jax.random.key(0))
    params = restore_params(path, like, identity=phase.identity)
    return cls(phase, params, sharding.place_constants(phase.frozen, devices, rules))

  # ---- ranking

  def top(
    self,
    histories: Sequence[Sequence[int]],
    *,
    k: int,
    method: str | None = None,
    exclude_seen: bool = True,
  ) -> list[Ranking]:
    """The best k items after each history, oldest item first, and their scores.

    Raises:
      UsageError: this run cannot rank by that method.
    """
    method = self._method(method)
    if not len(histories):
      return []
    if method == 'readout':
      scores = self.readout_scores(histories)
      return [self._best(row, h, k, exclude_seen) for row, h in zip(scores, histories)]
    return self._rank(self._render(histories), histories, k, method, exclude_seen)

  def scores(self, histories: Sequence[Sequence[int]], *, method: str | None = None) -> np.ndarray:
    """Of every item after each history, [B, I].

    Raises:
      UsageError: this run cannot rank by that method, or it is 'beam', which scores a few only.
    """
    method = self._method(method)
    if method == 'beam':
      raise UsageError("method='beam' scores a few items only: use 'exact' for all of them.")
    if method == 'readout':
      return self.readout_scores(histories)
    return self.prompt_scores(self._render(histories), bias=self.catalogue_bias)

  def top_for_prompts(
    self,
    prompts: Sequence[tuple[str, Sequence[int]]],
    *,
    k: int,
    method: str | None = None,
    exclude_seen: bool = True,
  ) -> list[Ranking]:
    """The best k items after each text, in which '{item}' stands for one of its items, in order.

    By the readout, the items are ranked as after a history, whatever the text says of them.
    """
    histories = [items for _, items in prompts]
    method = self._method(method)
    if method == 'readout' or not prompts:
      return self.top(histories, k=k, method=method, exclude_seen=exclude_seen)
    rows = [self._prompt_tokens(text, len(items)) for text, items in prompts]
    return self._rank(self._padded(rows, histories), histories, k, method, exclude_seen)

  def readout_scores(self, histories: Sequence[Sequence[int]]) -> np.ndarray:
    """[B, I]."""
    offsets = np.concatenate([[0], np.cumsum([len(h) for h in histories])]).astype(np.int64)
    items = np.concatenate([np.zeros(0, np.int64), *map(np.asarray, histories)]).astype(np.int64)
    sequences = Sequences(offsets, items, self.prepared.num_items)
    return self._readout_scorer(sequences, np.arange(len(histories)))

  @functools.cached_property
  def _readout_scorer(self) -> Callable[[Sequences, np.ndarray], np.ndarray]:
    return self.phase.readout_scorer(self.params, self.frozen)

  def prompt_scores(
    self,
    prompts: Prompts,
    *,
    params: Any = None,
    frozen: Any = None,
    plan: ScoringPlan | None = None,
    bias: jax.Array | None = None,
    done: Done = ignore,
  ) -> np.ndarray:
    """The log-probability of every item's text after prompts, [B, I].

    Args:
      prompts: the prompts.
      params, frozen: others than the model's own, for controls.
      plan: of other texts than the catalogue's.
      bias: [nodes], of the plan's trie.
      done: is told how many more prompts are scored.
    """
    params = self.params if params is None else params
    frozen = self.frozen if frozen is None else frozen
    plan = plan or self.phase.plan
    scores = []
    for part, size in self._batches(prompts):
      found = self._exact(params, frozen, plan, bias, *self._placed(part))
      scores.append(sharding.fetch(found)[:size])
      done(size)
    return np.concatenate(scores)

  @functools.cached_property
  def _exact(self):
    @jax.jit
    def run(params, frozen, plan, bias, tokens, lengths, entity_ids):
      steps = self.phase.steps
      inputs, lengths = steps.prompt_embeddings(params, frozen, tokens, lengths, entity_ids)
      lm, weights = self._decoder, self.phase.model.lm_params(params, frozen)
      return catalogue_scores(lm, weights, plan, inputs, lengths, bias=bias)

    return run

  @functools.cached_property
  def _beam(self):
    return jax.jit(self.phase.steps.beams, static_argnames='size')

  @property
  def _decoder(self) -> Decoder:
    lm = self.phase.model.lm
    assert isinstance(lm, Decoder)  # or there is neither 'exact' nor 'beam'
    return lm

  @functools.cached_property
  def catalogue_bias(self) -> jax.Array:
    """[nodes]: what makes log-probabilities of texts comparable between items."""
    return self.phase.catalogue_bias() if self.frozen.bias is None else self.frozen.bias

  def beams(
    self,
    prompts: Prompts,
    *,
    beam_size: int,
    forbidden: np.ndarray | None = None,
    params: Any = None,
    frozen: Any = None,
    done: Done = ignore,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Items [B, W] that a beam search finds, best first, -1 after the last; log-probabilities.

    Args:
      prompts: the prompts.
      beam_size: W.
      forbidden: [B, I] bool, items that must not come.
      params, frozen: others than the model's own, for controls.
      done: is told how many more prompts have theirs.
    """
    params = self.params if params is None else params
    frozen = self.frozen if frozen is None else frozen
    items, log_probs, start = [], [], 0
    for part, size in self._batches(prompts):
      mask = None
      if forbidden is not None:
        mask = np.zeros((len(part[1]), self.prepared.num_items), bool)
        mask[:size] = forbidden[start : start + size]
      mask, part = self._placed((mask, part))
      found = self._beam(
        params, frozen, self.phase.trie, self.catalogue_bias, mask, *part, size=beam_size
      )
      found = sharding.fetch(found)
      items.append(found.items[:size])
      log_probs.append(found.log_probs[:size])
      start += size
      done(size)
    return np.concatenate(items), np.concatenate(log_probs)

  def _rank(
    self,
    prompts: Prompts,
    histories: Sequence[Sequence[int]],
    k: int,
    method: str,
    exclude_seen: bool,
  ) -> list[Ranking]:
    if method == 'exact':
      scores = self.prompt_scores(prompts, bias=self.catalogue_bias)
      return [self._best(row, h, k, exclude_seen) for row, h in zip(scores, histories)]
    forbidden = None
    if exclude_seen:
      forbidden = np.zeros((len(histories), self.prepared.num_items), bool)
      for row, history in zip(forbidden, histories):
        row[list(history)] = True
    items, log_probs = self.beams(prompts, beam_size=k, forbidden=forbidden)
    return [[(int(i), float(p)) for i, p in zip(*row) if i >= 0] for row in zip(items, log_probs)]

  def _best(self, scores: np.ndarray, seen: Sequence[int], k: int, exclude: bool) -> Ranking:
    scores = scores.astype(np.float64)
    if exclude:
      scores[list(seen)] = -np.inf
    order = np.argsort(-scores, kind='stable')[:k]
    return [(int(i), float(scores[i])) for i in order if scores[i] > -np.inf]

  # ---- saying

  def describe(
    self, items: Sequence[int], *, prompt: str | None = None, max_new_tokens: int = 32
  ) -> list[str]:
    """What the language model goes on with after the soft tokens of each item.

    Args:
      items: of the catalogue.
      prompt: with '{item}' once; by default the data set's first template that is about an item.
      max_new_tokens: at most so many.
    """
    soft = self.soft_tokens(np.asarray(items, np.int32))
    return self.say(soft, prompt=prompt, max_new_tokens=max_new_tokens)

  def soft_tokens(self, entities: np.ndarray) -> np.ndarray:
    """[U, K, D] of entities by id.

    Raises:
      UsageError: the run has none.
    """
    if self.phase.model.soft_tokens is None:
      raise UsageError('this run was trained on text alone: it has no soft tokens.')
    encoded = self._encode(self.params, self.frozen, jnp.asarray(entities))
    return sharding.fetch(encoded.soft_tokens)

  @functools.cached_property
  def _encode(self):
    return jax.jit(self.phase.model.encode)

  def say(
    self,
    soft_tokens: np.ndarray,
    *,
    prompt: str | None = None,
    max_new_tokens: int = 32,
    done: Done = ignore,
  ) -> list[str]:
    """As `describe`, of soft tokens [U, K, D]; `done` is told how many more texts there are."""
    model = self.phase.model
    tokens = [*model.prefix_tokens, *self._prompt_tokens(prompt or self._about_an_item(), 1)]
    options = SamplingOptions(max_new_tokens)
    texts = []
    for start in range(0, len(soft_tokens), _ROWS):
      some = list(soft_tokens[start : start + _ROWS])
      found = self.generator.complete([tokens] * len(some), options, soft_tokens=some)
      texts += [(completion.text or '').strip() for completion in found]
      done(len(some))
    return texts

  def complete(self, text: str, items: Sequence[int], *, max_new_tokens: int = 32) -> str:
    """What the language model goes on with after a text, in which '{item}' stands for each item."""
    tokens = [*self.phase.model.prefix_tokens, *self._prompt_tokens(text, len(items))]
    soft = None
    if items:
      found = self.soft_tokens(np.asarray(items, np.int32))
      soft = [found.reshape(-1, found.shape[-1])]
    options = SamplingOptions(max_new_tokens)
    (completion,) = self.generator.complete([tokens], options, soft_tokens=soft)
    return (completion.text or '').strip()

  @functools.cached_property
  def generator(self) -> Generator:
    """The language model as it is in the run, to complete and to score prompts of one's own."""
    weights = self.phase.model.lm_params(self.params, self.frozen)
    return Generator(self.phase.lm.module, weights, self.phase.vocabulary, max_rows=_ROWS)

  # ---- prompts

  def prompts_of(self, batch: Mapping[str, np.ndarray]) -> Prompts:
    """Prompts of a converter's batch of unpacked rows, without their targets."""
    weights = np.asarray(batch['decoder_loss_weights'])
    lengths = np.where(weights.any(axis=1), weights.argmax(axis=1) + 1, 0)
    tokens = np.asarray(batch['decoder_input_tokens'])
    # After the end there are targets, which a longer row might make visible.
    tokens = np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens, 0)
    return Prompts(tokens, lengths.astype(np.int32), np.asarray(batch['entity_ids']))

  def _render(self, histories: Sequence[Sequence[int]]) -> Prompts:
    """Prompts of the first template that needs nothing but a history."""
    if any(not len(h) for h in histories):
      raise UsageError('a history is empty: by text, there is nothing to go on from.')
    text = self.phase.text
    rendered = [
      self._programs.prompt(
        {'history': h[-text.history_length :]},
        max_inputs=text.max_inputs,
        max_entities=text.max_entities,
      )
      for h in histories
    ]
    rows = [[self.phase.first_token, *prompt.inputs] for prompt in rendered]
    return self._padded(rows, [prompt.entity_ids for prompt in rendered])

  @functools.cached_property
  def _programs(self) -> TemplatePrograms:
    for template in self.phase.templates:
      if {slot.name for slot in template.slots()} == {'history', 'target'}:
        return TemplatePrograms(
          [template],
          self.phase.texts,
          num_soft_tokens=self.phase.model.num_soft_tokens,
          entity_text=self.phase.entity_text,
        )
    raise UsageError(
      f'{self.phase.text.templates}: no template has {{history}} and no other slot in its prompt,'
      ' so that by text nothing can be recommended to people unknown. Add one, or use the readout.'
    )

  def _about_an_item(self) -> str:
    """A prompt about one item, by its soft tokens."""
    prompts = self.phase.item_prompts()
    if not prompts:
      raise UsageError(f'{self.phase.text.templates}: no template is about one {{item:soft}} only.')
    return next(iter(prompts.values()))

  def _prompt_tokens(self, text: str, num_items: int) -> list[int]:
    """A text with '{item}' in it: tokens with slots, after the prefix."""
    pieces = text.split(_ITEM)
    if len(pieces) != num_items + 1:
      raise UsageError(f'prompt {text!r}: {len(pieces) - 1} times {_ITEM}, but {num_items} items.')
    vocabulary = self.phase.vocabulary
    slots = [vocabulary.slot_id] * self.phase.model.num_soft_tokens
    tokens = [self.phase.first_token]
    for i, piece in enumerate(pieces):
      tokens += slots if i else []
      # The space before an entity without text has no token.
      piece = piece.rstrip(' ') if i < num_items else piece
      tokens += vocabulary.encode_segment(piece, first=i == 0 and not self.phase.text.prefix)
    return tokens

  def _padded(self, rows: Sequence[Sequence[int]], entities: Sequence[Sequence[int]]) -> Prompts:
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    entity_ids = np.full((len(rows), max(1, *map(len, entities))), -1, np.int32)
    for padded, row in zip((*tokens, *entity_ids), (*rows, *entities)):
      padded[: len(row)] = row
    return Prompts(tokens, np.array([*map(len, rows)], np.int32), entity_ids)

  def _batches(self, prompts: Prompts) -> Iterator[tuple[Prompts, int]]:
    """Rows that are run together, of a length that few others have, filled up with empty ones."""
    most = int(prompts.lengths.max(initial=1))
    longest = self.phase.lm.module.config.max_length
    room = longest - len(self.phase.model.prefix_tokens) - int(self.phase.trie.max_depth)
    if most > room:
      raise UsageError(
        f'a prompt has {most} tokens; with the prefix and an item after it, {room} is the most'
        f' that {self.phase.lm.name} was trained for. Shorten the history.'
      )
    # Few lengths, each of which is compiled once, and little padding: a quarter at most.
    step = max(_LENGTHS, bucket(most, least=1) // 4)
    length = -(-most // step) * step
    entities = bucket(prompts.entity_ids.shape[1], least=1)
    rows = sharding.rows_for(_ROWS, self.phase.inputs.mesh)
    for start in range(0, len(prompts.lengths), rows):
      part = prompts.rows(slice(start, start + rows))
      size = len(part.lengths)
      tokens = np.zeros((rows, length), np.int32)
      ids = np.full((rows, entities), -1, np.int32)
      width = min(length, part.tokens.shape[1])
      tokens[:size, :width] = part.tokens[:, :width]
      ids[:size, : part.entity_ids.shape[1]] = part.entity_ids
      lengths = np.zeros(rows, np.int32)
      lengths[:size] = part.lengths
      yield Prompts(tokens, lengths, ids), size

  def _placed(self, tree: Any) -> Any:
    """Rows, on the devices that score them."""
    return sharding.place_rows(tree, self.phase.inputs.mesh)

  def _method(self, method: str | None) -> str:
    if method is None:
      return self.methods[0]
    if method not in self.methods:
      hint = did_you_mean(method, self.methods)
      raise UsageError(f'method={method!r}: this run has {", ".join(self.methods)}.{hint}')
    return method

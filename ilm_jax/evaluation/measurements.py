"""What is measured of a trained model: rankings, losses, ratings, generated texts; and controls.

Controls say whether soft tokens are read at all:

  own             as they are
  shuffled_users  the soft tokens of another user's history
  shuffled_items  every item encoded from another item's vector
  zeroed          soft tokens of zeros
  text_only       prompts with titles and no soft tokens: the language model alone
"""

import dataclasses
import functools
import itertools
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ilm_jax.catalogue.trie import build_trie
from ilm_jax.cf import rankers
from ilm_jax.data.input.feature_converter import ItemLMFeatureConverter
from ilm_jax.data.input.reader import InputShards, read_once
from ilm_jax.data.input.sources import InteractionSource
from ilm_jax.data.text import prompts as templates
from ilm_jax.data.text.entity_text import EntityText
from ilm_jax.decoding.calibration import calibrated, tune_calibration
from ilm_jax.decoding.exact import scoring_plan
from ilm_jax.evaluation.results import Ranked
from ilm_jax.metrics import generation, ranking
from ilm_jax.metrics.ranking import Interval
from ilm_jax.runtime.progress import Done, Show, ignore, silent
from ilm_jax.serving.recommender import Prompts, Recommender
from ilm_jax.tasks import recommendation
from ilm_jax.tasks.names import FORMS

OWN, TEXT_ONLY = 'own', 'text_only'
CONTROLS = ('shuffled_users', 'shuffled_items', 'zeroed')
CONDITIONS = (OWN, *CONTROLS, TEXT_ONLY)
_READ = 64  # examples that are put together as a batch
_KEPT_SCORES = 100_000_000  # 400 MB of float32


@dataclasses.dataclass(frozen=True, eq=False)
class Measure:
  """A model under measurement.

  Attributes:
    recommender: the model.
    name: of the model in tables.
    split: 'test' or 'validation'.
    max_users: of prompts, which are slow; None: all. The readout ranks for all users.
    max_texts: examples whose loss is measured, and users on whose validation item the weights of
      'text_only' are tuned.
    seed: of what is shuffled.
    show: how far each measurement is.
  """

  recommender: Recommender
  name: str
  split: str = 'test'
  max_users: int | None = None
  max_texts: int = 256
  seed: int = 0
  show: Show = silent

  @property
  def phase(self):
    return self.recommender.phase

  # ---- rankings

  def references(self, names: Sequence[str]) -> list[Ranked]:
    """Reference rankers on the same users."""
    bar = jax.process_index() == 0 and sys.stderr.isatty()
    with self.show('reference rankers', len(names)) as done:
      found = rankers.evaluate_rankers(
        self.phase.prepared,
        rankers=names,
        splits=[self.split],
        ials_settings={'progress': bar},
        seed=self.seed,
        done=done,
      )
    return [
      Ranked(
        'reference', '', e.ranker, '', 'removed' if e.seen_removed else 'kept', e.users, e.ranks
      )
      for e in found
    ]

  def readout(self, condition: str = OWN) -> list[Ranked]:
    """All users by the readout, seen items removed and kept."""
    params, frozen = self.changed(condition)
    own = self.recommender.params, self.recommender.frozen
    prepared, split = self.phase.prepared, self.split
    history = rankers.histories(prepared, split)
    others = self._other_users if condition == 'shuffled_users' else np.arange(history.num_users)
    total = int((self._targets(split) >= 0).sum())
    with self.show(f'readout, {condition}', total) as done:
      scorer = self.phase.readout_scorer(params, frozen, candidates=own, done=done)
      if condition in (OWN, 'shuffled_users') and others.size * prepared.num_items <= _KEPT_SCORES:
        scorer = functools.partial(self._scores_once, scorer, done)
      found = rankers.evaluate_scores(
        'readout', lambda users: scorer(history, others[users]), prepared, split
      )
    return [
      Ranked(self.name, 'history', 'readout', condition, seen, e.users, e.ranks)
      for seen, e in zip(('removed', 'kept'), found)
    ]

  @functools.cached_property
  def _scores_of_users(self) -> dict[int, np.ndarray]:
    return {}

  def _scores_once(
    self, scorer: Any, done: Done, history: rankers.Sequences, users: np.ndarray
  ) -> np.ndarray:
    """[n, I] of users as they are: the model is asked once, whoever is ranked by the scores."""
    known = self._scores_of_users
    new = np.array([user for user in users.tolist() if user not in known], np.int64)
    if len(new) < len(users):
      done(len(users) - len(new))
    known.update(zip(new.tolist(), scorer(history, new)))
    return np.stack([known[user] for user in users.tolist()])

  def prompts(
    self, task: str, *, method: str = 'exact', condition: str = OWN, beam_size: int = 10
  ) -> list[Ranked]:
    """Users by the items' texts after the prompts of a SeqIO task, seen items removed and kept."""
    own = self._own_name(task)
    users, targets = self._users_and_targets()
    if condition == TEXT_ONLY:
      tuned_on = () if own in self._text_calibrations else self._users_and_targets('validation')[0]
      with self.show(f'{own}, {condition}', len(tuned_on) + len(users)) as done:
        weights = self.text_calibration(own, done)
        scores, users, targets = self._text_scores(own, self.split, done)
      scores = calibrated(scores, *self._text_priors, *weights)
      return self._ranked(own, method, condition, scores, users, targets)
    asked = self._prompts_of(task)
    history = rankers.histories(self.phase.prepared, self.split)
    label = f'{own}, {method}, {condition}'
    if method == 'exact':
      with self.show(label, len(users)) as done:
        scores = self._exact(asked, condition=condition, done=done)
      return self._ranked(own, method, condition, scores, users, targets)
    rows = []
    with self.show(label, 2 * len(users)) as done:
      for seen in ('removed', 'kept'):
        mask = _mask(history, users) if seen == 'removed' else None
        scores = self._beams(asked, condition=condition, size=beam_size, mask=mask, done=done)
        ranks = ranking.ranks(scores, targets, history.of(users) if seen == 'removed' else None)
        rows.append(Ranked(self.name, own, method, condition, seen, users, ranks))
    return rows

  def _ranked(self, task, method, condition, scores, users, targets) -> list[Ranked]:
    history = rankers.histories(self.phase.prepared, self.split)
    return [
      Ranked(
        self.name, task, method, condition, seen, users, ranking.ranks(scores, targets, exclude)
      )
      for seen, exclude in (('removed', history.of(users)), ('kept', None))
    ]

  def _users_and_targets(self, split: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Of the prompts' examples, in their order."""
    targets = self._targets(split or self.split)
    users = np.flatnonzero(targets >= 0)[: self._num_examples(split)]
    return users, targets[users]

  def _own_name(self, task: str) -> str:
    return task.removeprefix(f'{self.phase.prepared.name}_')

  def _targets(self, split: str) -> np.ndarray:
    return getattr(self.phase.prepared, f'{split}_items')

  def _num_examples(self, split: str | None) -> int | None:
    # What is tuned is tuned on fewer.
    return self.max_users if split in (None, self.split) else self.max_texts

  @functools.cached_property
  def _prompts_read(self) -> dict[tuple[str, str], Prompts]:
    return {}

  def _prompts_of(self, task: str, split: str | None = None, *, soft: bool = True) -> Prompts:
    """Those of a task's examples, in their order; read once for all conditions."""
    key = task, split or self.split
    if key not in self._prompts_read:
      phase, lengths = self.phase, self.phase.lengths(task) if soft else self._text_lengths
      batches = read_once(
        task,
        split=key[1],
        task_feature_lengths=lengths,
        converter=ItemLMFeatureConverter(
          slot_id=phase.vocabulary.slot_id,
          num_soft_tokens=phase.model.num_soft_tokens if soft else 0,
          bos_id=phase.first_token,
          pack=False,
          apply_length_check=False,
        ),
        shards=InputShards(_READ),
      )
      size = len(self._users_and_targets(split)[0])
      parts = list(itertools.islice(batches, math.ceil(size / _READ)))
      features = {name: np.concatenate([part[name] for part in parts])[:size] for name in parts[0]}
      self._prompts_read[key] = self.recommender.prompts_of(features)
    return self._prompts_read[key]

  def _exact(self, prompts: Prompts, *, condition: str, done: Done) -> np.ndarray:
    params, frozen = self.changed(condition)
    if condition == 'shuffled_users':
      prompts = _with_others(prompts)
    return self.recommender.prompt_scores(
      prompts, params=params, frozen=frozen, bias=self.recommender.catalogue_bias, done=done
    )

  def _beams(
    self, prompts: Prompts, *, condition: str, size: int, mask: np.ndarray | None, done: Done
  ) -> np.ndarray:
    params, frozen = self.changed(condition)
    if condition == 'shuffled_users':
      prompts = _with_others(prompts)
    items, log_probs = self.recommender.beams(
      prompts, beam_size=size, forbidden=mask, params=params, frozen=frozen, done=done
    )
    scores = np.full((len(items), self.phase.prepared.num_items), -np.inf, np.float32)
    for row, found, values in zip(scores, items, log_probs):
      row[found[found >= 0]] = values[found >= 0]
    return scores

  # ---- the language model alone

  @functools.cached_property
  def _text_priors(self) -> tuple[np.ndarray, np.ndarray]:
    """Of each item: its log-probability after the neutral prompt, and its log popularity."""
    tokens = self.phase.neutral_tokens()[len(self.phase.model.prefix_tokens) :]
    nobody = np.full((1, 1), -1, np.int32)
    prompt = Prompts(tokens[None], np.array([len(tokens)], np.int32), nobody)
    return self.recommender.prompt_scores(prompt)[0], np.log(self.phase.counts + 1.0)

  @functools.cached_property
  def _text_calibrations(self) -> dict[str, tuple[float, float]]:
    return {}

  def text_calibration(self, own: str, done: Done = ignore) -> tuple[float, float]:
    """The weights of the two priors in 'text_only': those that rank the validation items best.

    Args:
      own: a task of prompts, without the data set's name.
      done: is told how many more prompts have their scores.
    """
    if own not in self._text_calibrations:
      scores, users, targets = self._text_scores(own, 'validation', done)
      seen = rankers.histories(self.phase.prepared, 'validation').of(users)
      found = tune_calibration(scores, *self._text_priors, targets, seen)
      self._text_calibrations[own] = found
    return self._text_calibrations[own]

  def _text_scores(
    self, own: str, split: str, done: Done = ignore
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    prompts = self._prompts_of(self._text_task(own), split, soft=False)
    scores = self.recommender.prompt_scores(prompts, done=done)
    return scores, *self._users_and_targets(split)

  @property
  def _text_lengths(self) -> dict[str, int]:
    text = self.phase.text
    needed = text.history_length * (text.max_text_tokens + 2) + 128
    room = self.phase.lm.module.config.max_length - len(self.phase.model.prefix_tokens)
    targets = text.max_text_tokens + 8
    return {'inputs': min(needed, room - 2 * targets), 'targets': targets, 'entity_ids': 1}

  def _text_task(self, own: str) -> str:
    """Registers the task with text in place of soft tokens."""
    kind, group, form = re.fullmatch(r'(.+)_(seen|unseen)_(\w+)', own).groups()  # pyright: ignore
    name = f'{self.phase.prepared.name}_{own}_text_only'
    source = InteractionSource(
      self.phase.prepared,
      history_length=self.phase.text.history_length if kind == 'sequential' else 0,
      min_history=1 if kind == 'sequential' else 0,
    )
    entity_text: EntityText = FORMS[form]
    recommendation.add_prompt_task(
      name,
      source,
      [_as_text(t) for t in templates.select(self.phase.templates, kind, group)],
      self.phase.texts,
      num_soft_tokens=0,
      entity_text=entity_text,
      metric=recommendation.RANKING,
    )
    return name

  # ---- controls

  @functools.cached_property
  def _other_users(self) -> np.ndarray:
    """[num_users], for each another one."""
    return derangement(self.phase.prepared.num_users, self.seed)

  def changed(self, condition: str) -> tuple[Any, Any]:
    """Parameters and constants under a condition."""
    params, frozen = self.recommender.params, self.recommender.frozen
    if condition == 'zeroed':
      params = {**params, 'adaptor': jax.tree.map(jnp.zeros_like, params['adaptor'])}
    if condition == 'shuffled_items':
      vectors = frozen.entity_vectors
      items = self.phase.prepared.num_items
      order = np.concatenate([derangement(items, self.seed), np.arange(items, vectors.shape[0])])
      frozen = dataclasses.replace(frozen, entity_vectors=vectors[order])
    return params, frozen

  # ---- texts

  def perplexity(self, task: str, condition: str = OWN) -> Interval:
    """The log-perplexity of a task's targets, nats a token, over all of the vocabulary."""
    params, frozen = self.changed(condition)
    label = f'{self._own_name(task)}, log-perplexity, {condition}'
    with self.show(label, self.max_texts) as done:
      nll, tokens = self.phase.task_nll(
        params,
        frozen,
        task,
        self.split,
        most=self.max_texts,
        target_loss='vocabulary',
        done=done,
      )
    return generation.corpus_perplexity(nll, tokens)

  def rating_rmse(self, task: str, condition: str = OWN) -> Interval:
    """Of expected ratings, by what the model says of each rating's text."""
    phase = self.phase
    ratings = phase.texts.ratings
    eos = phase.vocabulary.eos_id
    texts = [[*phase.texts.encode(f' {rating:g}').tolist(), eos] for rating in ratings]
    plan = scoring_plan(build_trie(texts, eos))
    params, frozen = self.changed(condition)

    prompts = self._prompts_of(task)
    if condition == 'shuffled_users':
      prompts = _with_others(prompts)
    users, _ = self._users_and_targets()
    with self.show(f'{self._own_name(task)}, RMSE, {condition}', len(users)) as done:
      log_probs = self.recommender.prompt_scores(
        prompts, params=params, frozen=frozen, plan=plan, done=done
      )
    predicted = generation.expected_rating(log_probs, ratings)
    truth = getattr(phase.prepared, f'{self.split}_ratings')[users]
    return generation.rmse(np.square(predicted - truth))

  def descriptions(
    self, field: str, prompt: str, embedder: Any, *, max_new_tokens: int = 24
  ) -> tuple[dict[str, dict[str, np.ndarray]], list[dict[str, Any]]]:
    """What is said of held-out items from their soft tokens, beside another held-out item's.

    Args:
      field: the text field that is the truth.
      prompt: with '{item}'.
      embedder: of sentences.
      max_new_tokens: of what is said.

    Returns:
      metric -> condition -> [n] values; and the texts.
    """
    prepared = self.phase.prepared
    truth = prepared.item_text[field]
    items = np.flatnonzero(prepared.heldout_items & np.array([bool(t) for t in truth]))
    soft = self.recommender.soft_tokens(items)
    others = derangement(len(items), self.seed)
    with self.show(f'held-out items, {field}', len(items)) as done:
      said = self.recommender.say(soft, prompt=prompt, max_new_tokens=max_new_tokens, done=done)
    by_condition = {'own': said, 'shuffled_items': [said[i] for i in others]}
    references = [truth[i] for i in items]
    labels = generation.labels_of(truth)
    found: dict[str, dict[str, np.ndarray]] = {}
    for condition, texts in by_condition.items():
      values = generation.semantic_consistency(texts, references, embedder)
      found.setdefault(f'{field}: semantic consistency', {})[condition] = values
      if 2 * len(labels) < prepared.num_items:  # a field of labels, such as genres
        predicted = [generation.parse_labels(text, labels) for text in texts]
        expected = [generation.split_labels(text) for text in references]
        f1 = generation.set_f1(predicted, expected)
        found.setdefault(f'{field}: F1', {})[condition] = f1
    titles = prepared.item_text['title']
    examples = [
      {'item': titles[i], 'field': field, 'truth': truth[i], 'generated': own, 'shuffled': other}
      for i, own, other in zip(items, *by_condition.values())
    ]
    return found, examples


def _as_text(template: templates.Template) -> templates.Template:
  """The template with the texts of its entities and no soft token."""

  def part(x: Any) -> Any:
    soft = isinstance(x, templates.Slot) and x.name in templates.ENTITY_SLOTS
    return dataclasses.replace(x, mode='text') if soft else x

  return dataclasses.replace(template, prompt=tuple(map(part, template.prompt)))


def _with_others(prompts: Prompts) -> Prompts:
  """Each prompt with the entities of the next one, as many as it needs."""
  entities = prompts.entity_ids
  changed = np.full_like(entities, -1)
  for row, own, other in zip(changed, entities, np.roll(entities, 1, axis=0)):
    needed, there = int((own >= 0).sum()), other[other >= 0]
    row[:needed] = np.resize(there if len(there) else own[own >= 0], needed)
  return prompts._replace(entity_ids=changed)


def _mask(history: rankers.Sequences, users: np.ndarray) -> np.ndarray:
  """[n, I] bool, which items users have."""
  offsets, items = history.of(users)
  mask = np.zeros((len(users), history.num_items), bool)
  mask[np.repeat(np.arange(len(users)), np.diff(offsets)), items] = True
  return mask


def derangement(size: int, seed: int) -> np.ndarray:
  """A permutation [size] in which, but for a size of 1, nothing stays in its place."""
  order = np.random.default_rng(seed).permutation(size)
  other = np.empty(size, np.int64)
  other[order] = np.roll(order, 1)
  return other


def paired(values: Mapping[str, np.ndarray]) -> dict[str, Interval]:
  """Means of each condition, and of 'own' less each control."""
  found = {name: ranking.bootstrap_interval(x) for name, x in values.items()}
  for name, x in values.items():
    if name != OWN:
      found[f'own - {name}'] = ranking.paired_bootstrap(values[OWN], x)
  return found

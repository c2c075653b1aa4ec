"""`ilm evaluate`: what a trained run is worth, with intervals, controls and reference rankers."""

import functools
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from ilm_jax.cf.rankers import RANKERS, affordable
from ilm_jax.errors import UsageError, did_you_mean
from ilm_jax.evaluation.measurements import CONDITIONS, CONTROLS, OWN, TEXT_ONLY, Measure, paired
from ilm_jax.evaluation.results import Comparison, Ranked, Results, compare
from ilm_jax.metrics.ranking import Interval
from ilm_jax.metrics.sentence_embedding import SentenceEmbedder
from ilm_jax.phases.item_language import ItemLanguagePhase
from ilm_jax.runtime.processes import on_first
from ilm_jax.runtime.progress import Parts
from ilm_jax.serving.recommender import Recommender

_RANKED = ('sequential', 'straightforward')


def evaluate(
  *,
  model_dir: Path,
  output: Path | None = None,
  name: str | None = None,
  split: Literal['test', 'validation'] = 'test',
  methods: Sequence[str] = ('readout', 'exact'),
  tasks: Sequence[str] | None = None,
  conditions: Sequence[str] = (OWN, 'shuffled_users', TEXT_ONLY),
  rankers: Sequence[str] | None = None,
  max_users: int | None = None,
  max_texts: int = 256,
  beam_size: int = 10,
  losses: Sequence[str] | None = None,
  fields: Sequence[str] | None = None,
  compare_to: Sequence[Path] = (),
  checkpoint: str | int = 'best',
  data: Path | None = None,
  mesh: dict[str, int] | None = None,
  seed: int = 0,
) -> Results:
  """Measures a run of phase 2 on held-out items of users.

    ilm evaluate --model_dir=runs/ilm
    ilm evaluate --model_dir=runs/ilm --compare_to=runs/mlp/evaluation_test

  On several hosts, the same on each with --multiprocess (see `ilm_jax.runtime.processes`).

  Rankings: HR, NDCG, MRR and the mean rank percentile (0 is best, .5 chance), over all items, the
  user's own removed and kept. Controls say what the soft tokens are worth. What is tuned (the
  checkpoint, the weights of text_only) is tuned on the validation items.

  Args:
    model_dir: of `ilm train`, phase 2.
    output: a directory to make; by default MODEL_DIR/evaluation_SPLIT.
    name: of the model in tables; by default the directory's.
    split: which item of a user is to be found.
    methods: 'readout' (all users in one pass), 'exact' (every item's text) and 'beam'.
    tasks: SeqIO tasks of prompts for 'exact' and 'beam': by default the sequential and
      straightforward ones, seen and unseen, in the form of the run.
    conditions: 'own', and controls: 'shuffled_users', 'shuffled_items', 'zeroed'; 'text_only', the
      language model alone by exact scores, whatever the methods.
    rankers: reference rankers; by default all that fit into memory.
    max_users: users whose prompts are scored; by default all of them.
    max_texts: examples of each task whose perplexity is measured.
    beam_size: of 'beam'.
    losses: SeqIO tasks of prompts whose perplexity is measured, and of ratings the error: by
      default all of seen templates, in the form of the run.
    fields: text fields of held-out items that are to be told from soft tokens; by default those
      that templates ask for.
    compare_to: other evaluations (their directories), compared user by user.
    checkpoint: 'best' on the validation items, 'latest', or a step.
    data: the prepared data set, where it is elsewhere now.
    mesh: as of `ilm train`.
    seed: of what is shuffled.

  Returns:
    What was found, as it is in the output directory.

  Raises:
    UsageError: there is no such run, or a setting is not right.
  """
  for key, values, allowed in (
    ('methods', methods, ('readout', 'exact', 'beam')),
    ('conditions', conditions, CONDITIONS),
    ('rankers', rankers or (), RANKERS),
  ):
    for value in values:
      if value not in allowed:
        hint = did_you_mean(value, allowed)
        raise UsageError(f'evaluate.{key}: {value!r} is none of {", ".join(allowed)}.{hint}')
  output = output or model_dir / f'evaluation_{split}'
  on_first(functools.partial(_refuse_existing, output))
  others = [Results.load(path) for path in compare_to]
  recommender = Recommender.load(model_dir, checkpoint=checkpoint, data=data, mesh=mesh)
  phase = recommender.phase
  for path, other in zip(compare_to, others):
    for key, own in (('data', phase.prepared.name), ('split', split)):
      if other.facts[key] != own:
        raise UsageError(
          f'evaluate.compare_to: {path} has {key}={other.facts[key]!r}, this has {own!r}: runs are'
          ' compared on the same items of the same users.'
        )
  chosen = _tasks(phase, tasks)
  asked = _fields(phase, fields)
  if phase.model.soft_tokens is None and set(conditions) & set(CONTROLS):
    _say('this run has no soft tokens: there is nothing to shuffle')
    conditions = [c for c in conditions if c not in CONTROLS]
  by_tokens = list(_losses(phase, split, conditions, losses))
  rankings = list(_rankings(recommender, methods, chosen, conditions, beam_size))
  names = rankers if rankers is not None else affordable(phase.prepared)[0]
  parts = Parts('evaluate', len(rankings) + bool(names) + len(by_tokens) + len(asked))
  measure = Measure(
    recommender, name or model_dir.name, split, max_users, max_texts, seed, show=parts
  )
  rows: list[Ranked] = []
  for ranking in rankings:
    rows += ranking(measure)
  comparisons = list(_comparisons(rows))
  for other in others:
    comparisons += _across(rows, other.rows)
  rows += measure.references(names) if names else []
  texts: dict[str, dict[str, Interval]] = {}
  for label, condition, loss in by_tokens:
    texts.setdefault(label, {})[condition] = loss(measure)
  described, examples = _descriptions(measure, asked)
  texts |= described
  facts = {
    'model': measure.name,
    'model_dir': str(model_dir),
    'split': split,
    'data': phase.prepared.name,
    'lm': phase.lm.name,
    'checkpoint': checkpoint,
    'tuned_on': 'validation',
  }
  results = Results(facts, rows, comparisons, texts, examples)
  on_first(functools.partial(results.save, output))
  if jax.process_index() == 0:
    print(results.table())
    print(f'\nin {output}')
  return results


def _refuse_existing(output: Path) -> None:
  if output.exists():
    raise UsageError(f'{output} exists already: name another output, or remove it.')


def _rankings(
  recommender: Recommender,
  methods: Sequence[str],
  tasks: Sequence[str],
  conditions: Sequence[str],
  beam_size: int,
) -> Iterator[Callable[[Measure], list[Ranked]]]:
  """What ranks, in order."""
  soft = [condition for condition in conditions if condition != TEXT_ONLY]
  for method in methods:
    if method not in recommender.methods:
      _say(f'{method}: not with this run, which has {", ".join(recommender.methods)}')
    elif method == 'readout':
      for condition in soft:
        yield functools.partial(Measure.readout, condition=condition)
    else:
      how = {'method': method, 'beam_size': beam_size}
      for task, condition in itertools.product(tasks, soft):
        yield functools.partial(Measure.prompts, task=task, condition=condition, **how)
  if TEXT_ONLY in conditions and 'exact' in recommender.methods:
    for task in tasks:
      yield functools.partial(Measure.prompts, task=task, condition=TEXT_ONLY)


def _tasks(phase: ItemLanguagePhase, given: Sequence[str] | None) -> list[str]:
  """Full names of tasks of prompts."""
  known = [
    f'{phase.prepared.name}_{source}'
    for source in phase.own_prompts()
    if re.match(f'({"|".join(_RANKED)})_(seen|unseen)_', source)
  ]
  if given is None:
    wanted = [
      f'{phase.prepared.name}_{kind}_{group}_{phase.text.form}'
      for kind in _RANKED
      for group in ('seen', 'unseen')
    ]
    return [task for task in wanted if task in known]
  found = []
  for task in given:
    name = task if task in known else f'{phase.prepared.name}_{task}'
    if name not in known:
      own = [name.removeprefix(f'{phase.prepared.name}_') for name in known]
      raise UsageError(
        f'evaluate.tasks: no task {task!r} ranks items; those are {", ".join(own)}.'
        f'{did_you_mean(task, own)}'
      )
    found.append(name)
  return found


def _comparisons(rows: Sequence[Ranked]) -> Iterator[Comparison]:
  """Own soft tokens less each control, same task, method and candidates."""
  for a in rows:
    for b in rows:
      same = (a.task, a.method, a.seen) == (b.task, b.method, b.seen)
      if same and a.condition == OWN != b.condition:
        yield compare(a, b)
  # The readout has no prompt with text: it is compared with the texts' best.
  for a in rows:
    for b in rows:
      if (a.method, a.condition, b.condition) == ('readout', OWN, TEXT_ONLY) and a.seen == b.seen:
        yield compare(a, b)


def _across(rows: Sequence[Ranked], others: Sequence[Ranked]) -> list[Comparison]:
  """Own soft tokens of two runs."""

  def way(row: Ranked) -> tuple[str, ...]:
    return row.task, row.method, row.condition, row.seen

  return [compare(a, b) for a in rows for b in others if a.condition == OWN and way(a) == way(b)]


def _fields(phase: ItemLanguagePhase, given: Sequence[str] | None) -> list[str]:
  """Text fields of held-out items that a template asks for."""
  known = list(phase.item_prompts()) if phase.model.soft_tokens else []
  if unknown := set(given or ()) - set(known):
    raise UsageError(
      f'evaluate.fields: no template asks for {min(unknown)!r} of an {{item:soft}}; they ask for'
      f' {", ".join(known) or "nothing"}.{did_you_mean(min(unknown), known)}'
    )
  if not phase.prepared.heldout_items.any():
    return []
  return known if given is None else [field for field in known if field in given]


def _losses(
  phase: ItemLanguagePhase, split: str, conditions: Sequence[str], given: Sequence[str] | None
) -> Iterator[tuple[str, str, Callable[[Measure], Interval]]]:
  """Perplexities and ratings of the run's tasks: name, condition, what measures it."""
  controls = [c for c in conditions if c in (OWN, *CONTROLS)]
  known = [x for x in phase.own_prompts() if x.endswith(f'_seen_{phase.text.form}')]
  for source in known if given is None else given:
    if source not in known:
      raise UsageError(
        f'evaluate.losses: no task {source!r} is of seen templates; those are {", ".join(known)}.'
        f'{did_you_mean(source, known)}'
      )
    task = f'{phase.prepared.name}_{source}'
    if phase.tasks_of(source, split):
      for c in controls:
        if c != 'shuffled_users':
          loss = functools.partial(Measure.perplexity, task=task, condition=c)
          yield f'{source}: log-perplexity', c, loss
    if source.startswith('rating_') and not phase.lm.has_encoder:
      for c in controls:
        loss = functools.partial(Measure.rating_rmse, task=task, condition=c)
        yield f'{source}: RMSE', c, loss


def _descriptions(
  measure: Measure, fields: Sequence[str]
) -> tuple[dict[str, dict[str, Interval]], list[dict[str, Any]]]:
  """What is said of held-out items, measured and as it is."""
  texts: dict[str, dict[str, Interval]] = {}
  examples: list[dict[str, Any]] = []
  if fields:
    embedder = SentenceEmbedder.minilm()
    prompts = measure.phase.item_prompts()
    for field in fields:
      found, said = measure.descriptions(field, prompts[field], embedder)
      texts |= {name: paired(values) for name, values in found.items()}
      examples += said
  return texts, examples


def _say(text: str) -> None:
  if jax.process_index() == 0:
    print(f'evaluate: {text}', file=sys.stderr, flush=True)

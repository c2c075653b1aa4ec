"""`ilm recommend`: ranked items for users, histories and prompts; JSON lines in and out."""

import contextlib
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TextIO

import numpy as np

from ilm_jax.data.prepared import PreparedData
from ilm_jax.errors import UsageError, did_you_mean
from ilm_jax.runtime.progress import Progress, duration
from ilm_jax.serving.requests import Reader, Request

Ranking = list[tuple[int, float]]  # (item, score), the best first


class _Ranked(NamedTuple):
  item: int
  score: float
  tied: bool


class Ranker(Protocol):
  """What ranks: `ilm_jax.serving.recommender.Recommender` for a trained model."""

  prepared: PreparedData
  methods: tuple[str, ...]  # what it can rank by, the default first

  def top(
    self,
    histories: Sequence[Sequence[int]],
    *,
    k: int,
    method: str | None = None,
    exclude_seen: bool = True,
  ) -> list[Ranking]:
    """Ranks the catalogue for each history, oldest item first."""
    ...

  def top_for_prompts(
    self,
    prompts: Sequence[tuple[str, Sequence[int]]],
    *,
    k: int,
    method: str | None = None,
    exclude_seen: bool = True,
  ) -> list[Ranking]:
    """Ranks it for each prompt: a text with an '{item}' for each of the items, in order."""
    ...

  def describe(self, items: Sequence[int]) -> list[str]:
    """Says of each item what its soft tokens tell the language model."""
    ...


def recommend(
  *,
  model_dir: Path,
  input: str = '-',
  output: str = '-',
  k: int = 10,
  method: str | None = None,
  seen: Literal['removed', 'kept'] = 'removed',
  history: Literal['all', 'test'] = 'all',
  checkpoint: str = 'best',
  batch_size: int = 64,
  on_error: Literal['stop', 'report'] = 'stop',
  interactive: bool = False,
  data: Path | None = None,
) -> None:
  """Recommends items with a trained model, for a file of JSON lines or in a dialogue.

    ilm recommend --model_dir=runs/mine --input=requests.jsonl --output=recommended.jsonl
    echo '{"history": ["Heat (1995)", "Alien"]}' | ilm recommend --model_dir=runs/mine --k=5
    ilm recommend --model_dir=runs/mine --interactive

  A line of the input has one of

    {"user": "196"}                                      a user of the data set, by the source's id
    {"history": ["Heat (1995)", "Alien", "#50"]}         items, oldest first
    {"prompt": "I loved {Heat (1995)}. What now?"}       a text with items in braces

  and any keys besides. An item is written by its title, as people write it ("the matrix"), or by
  the source's id: "#50", or the number 50. The line comes out with

    "recommendations": [{"rank": 1, "item": "183", "title": "Alien (1979)", "score": -3.2}, ...]

  where items whose score equals that of another one have "tied": true: their order says nothing.

  Args:
    model_dir: the directory of a training run.
    input: a file of JSON lines; - is standard input.
    output: a file to make, complete or not at all, never overwritten; - is standard output.
    k: so many items a line.
    method: what to rank by, where the model has several ways; the default is its first.
    seen: whether the items of the history itself are removed from what is recommended.
    history: what a user's history is. all: everything the data set has of the user. test: all but
      the last item, the test item, which is told under "next", with its rank if it is among the k.
    checkpoint: best, last, or a step.
    batch_size: so many lines at once.
    on_error: at a line with a mistake, stop; or report it in that line, under "error", and go on.
    interactive: ask for titles on the terminal; :help there tells more.
    data: the prepared directory, where it is no longer where the model was trained.

  Raises:
    UsageError: there is no such model, checkpoint or method, or a mistake in a line of the input,
      which is told by its number.
  """
  options = Options(k, method, seen == 'removed', history == 'test', batch_size, on_error)
  if interactive:
    given = {'input': input != '-', 'output': output != '-', 'history': history != 'all'}
    if names := [name for name, is_given in given.items() if is_given]:
      raise UsageError(
        f'ilm recommend: --interactive asks on the terminal, but {", ".join(names)} is given too.'
        ' Leave out the one or the other.'
      )
  _check_files(input, output)
  from ilm_jax.serving.recommender import Recommender  # which loads JAX

  recommender = Recommender.load(
    model_dir.expanduser(), checkpoint=checkpoint, data=data.expanduser() if data else None
  )
  if interactive:
    interact(recommender, typed_lines('items> '), options)
  else:
    run(recommender, options, input, output)


@dataclasses.dataclass(frozen=True)
class Options:
  """How to recommend; see `recommend`. `hide_last`: a user's test item is no history.

  Raises:
    UsageError: k or batch_size is not positive.
  """

  k: int = 10
  method: str | None = None
  exclude_seen: bool = True
  hide_last: bool = False
  batch_size: int = 64
  on_error: str = 'stop'

  def __post_init__(self):
    for name in ('k', 'batch_size'):
      if getattr(self, name) < 1:
        raise UsageError(f'ilm recommend: {name}={getattr(self, name)}, but it is at least 1.')

  def check(self, recommender: Ranker) -> None:
    """Raises UsageError where `recommender` has not that method or not so many items."""
    methods, num_items = recommender.methods, recommender.prepared.num_items
    if self.method is not None and self.method not in methods:
      raise UsageError(
        f'method={self.method!r}: this model ranks by {", ".join(methods)}.'
        f'{did_you_mean(self.method, methods)}'
      )
    if self.k > num_items:
      raise UsageError(f'k={self.k:,}, but the catalogue has {num_items:,} items.')


def run(recommender: Ranker, options: Options, input: str = '-', output: str = '-') -> None:
  """Recommends for all lines of a file, or of standard input, and writes them to another.

  A file is read to its end first, so that a mistake in it is told before anything is ranked.

  Raises:
    UsageError: as `recommend`.
  """
  options.check(recommender)
  _check_files(input, output)
  reader = Reader(recommender.prepared, hide_last=options.hide_last)
  if input == '-':
    if sys.stdin.isatty():
      print('JSON lines, one by one; Ctrl-D ends. Or --interactive.', file=sys.stderr)
    requests = reader.read(sys.stdin, 'standard input', options.on_error)
    total = 0
  else:
    requests = list(reader.read(_lines_of(Path(input).expanduser()), input, options.on_error))
    total = len(requests)
  start = time.monotonic()
  done = errors = 0
  with contextlib.ExitStack() as stack:
    # A bar among the lines of the output would spoil both.
    shown = total > options.batch_size and not (output == '-' and sys.stdout.isatty())
    progress = stack.enter_context(Progress(total, 0, 'recommend')) if shown else None
    file = sys.stdout if output == '-' else stack.enter_context(_whole_file(Path(output)))
    for lines in answer(recommender, requests, options):
      for line in lines:
        file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + '\n')
      file.flush()
      done += len(lines)
      errors += sum('error' in line for line in lines)
      if progress is not None:
        progress.advance(len(lines), {'errors': errors} if errors else {})
  seconds = time.monotonic() - start
  wrong = f', {errors:,} of them with errors' if errors else ''
  speed = f'{done / max(seconds, 1e-9):,.1f} lines/s, compiling included'
  print(f'{done:,} lines{wrong} in {duration(seconds)}: {speed}', file=sys.stderr)


def answer(
  recommender: Ranker, requests: Iterable[Request], options: Options
) -> Iterator[list[dict[str, Any]]]:
  """Yields the lines of the output, batch by batch, in the order of the requests.

  Raises:
    UsageError: the recommender cannot do a request (a prompt that is too long) and `on_error` is
      'stop'; it tells the line.
  """
  requests = iter(requests)
  while batch := list(itertools.islice(requests, options.batch_size)):
    lines: list[dict[str, Any] | None] = [None] * len(batch)
    for index, request in enumerate(batch):
      if request.error is not None:
        lines[index] = {**request.line, 'error': request.error}
    for is_prompt in (False, True):
      group = [
        index
        for index, request in enumerate(batch)
        if request.error is None and (request.prompt is not None) == is_prompt
      ]
      found = _rank(recommender, [batch[index] for index in group], options)
      for index, line in zip(group, found):
        lines[index] = line
    yield [line for line in lines if line is not None]


def interact(
  recommender: Ranker, lines: Iterable[str], options: Options, out: TextIO | None = None
) -> None:
  """Answers what a person types: titles separated by ';', a prompt with {titles}, or a command.

  Args:
    recommender: what ranks.
    lines: as they are typed; their end, or `:quit`, ends the dialogue.
    options: to begin with.
    out: where the answers go; None is standard output.

  Raises:
    UsageError: the options do not suit the recommender. Later mistakes are told in the dialogue.
  """
  options.check(recommender)
  reader = Reader(recommender.prepared)
  titles = recommender.prepared.item_text['title']
  for line in lines:
    text = line.strip()
    if text.split()[:1] == [':quit']:
      return
    try:
      if text.startswith(':'):
        options, answered = _command(recommender, reader, options, text)
      elif text:
        answered = _table(_top(recommender, [_typed_request(reader, text)], options)[0], titles)
      else:
        continue
    except UsageError as error:
      answered = str(error)
    print(answered, file=out, flush=True)


_HELP = """\
Heat (1995); alien      what to recommend to who liked these, the last one last
I loved {alien}. Now?   the same, for a prompt with titles in braces
:about TITLE            what the item's soft tokens tell the language model
:k 5                    so many items
:method NAME            rank by: {methods}
:quit                   or Ctrl-D"""

_EXAMPLES = {'about': ':about Alien', 'k': ':k 5', 'method': ':method exact'}


def _command(
  recommender: Ranker, reader: Reader, options: Options, text: str
) -> tuple[Options, str]:
  """Does what a line such as ':k 5' says; returns the options from now on, and the answer."""
  command, _, argument = text[1:].partition(' ')
  argument = argument.strip()
  if command == 'help':
    return options, _HELP.replace('{methods}', ', '.join(recommender.methods))
  if command not in _EXAMPLES:
    commands = [f':{name}' for name in (*_EXAMPLES, 'help', 'quit')]
    raise UsageError(
      f'no command :{command}.{did_you_mean(f":{command}", commands)}'
      f' Commands: {", ".join(commands)}.'
    )
  if not argument or (command == 'k' and not argument.isdecimal()):
    raise UsageError(f'{text}: write it as {_EXAMPLES[command]!r}.')
  if command == 'about':
    return options, recommender.describe([reader.item(argument)])[0]
  changed: dict[str, Any] = {command: int(argument) if command == 'k' else argument}
  options = dataclasses.replace(options, **changed)
  options.check(recommender)
  return options, f'{command} is {argument} now'


def _typed_request(reader: Reader, text: str) -> Request:
  if '{' in text:
    return reader.request({'prompt': text})
  return reader.request({'history': [name for name in text.split(';') if name.strip()] or [text]})


def _table(ranking: Sequence[_Ranked], titles: Sequence[str]) -> str:
  """Numbered titles and scores; '=' marks a score that another item has too."""
  width = max((len(titles[row.item]) for row in ranking), default=0)
  lines = [
    f'{rank:>4}{"=" if row.tied else " "} {titles[row.item]:<{width}}  {row.score:>10.4f}'
    for rank, row in enumerate(ranking, start=1)
  ]
  if any(row.tied for row in ranking):
    lines.append('   = equal scores: the order among these says nothing')
  return '\n'.join(lines) if lines else 'nothing is left to recommend'


def _top(recommender: Ranker, requests: Sequence[Request], options: Options) -> list[list[_Ranked]]:
  """The k best of each request; the requests are all prompts, or all histories."""
  # One more than k, to know whether the last one ties with what is not shown.
  ask: dict[str, Any] = {
    'k': min(options.k + 1, recommender.prepared.num_items),
    'method': options.method,
    'exclude_seen': options.exclude_seen,
  }
  prompts = [(request.prompt, request.items) for request in requests if request.prompt is not None]
  if prompts:
    rankings = recommender.top_for_prompts(prompts, **ask)
  else:
    rankings = recommender.top([request.items for request in requests], **ask)
  return [_with_ties(ranking)[: options.k] for ranking in rankings]


def _with_ties(ranking: Ranking) -> list[_Ranked]:
  scores = np.array([np.nan, *(score for _, score in ranking), np.nan])
  tied = (scores[1:-1] == scores[:-2]) | (scores[1:-1] == scores[2:])
  return [_Ranked(item, float(score), bool(t)) for (item, score), t in zip(ranking, tied)]


def _rank(
  recommender: Ranker, requests: Sequence[Request], options: Options
) -> list[dict[str, Any]]:
  """The lines of the output for requests of one kind."""
  if not requests:
    return []
  try:
    rankings = _top(recommender, requests, options)
  except UsageError as error:
    if len(requests) > 1:  # one by one, to know which
      return [line for request in requests for line in _rank(recommender, [request], options)]
    if options.on_error == 'stop':
      raise UsageError(f'{requests[0].where}: {error}') from error
    return [{**requests[0].line, 'error': str(error)}]
  prepared = recommender.prepared
  return [_line(request, ranking, prepared) for request, ranking in zip(requests, rankings)]


def _line(request: Request, ranking: Sequence[_Ranked], prepared: PreparedData) -> dict[str, Any]:
  def told(item: int) -> dict[str, Any]:
    return {'item': prepared.item_keys[item], 'title': prepared.item_text['title'][item]}

  rows = [
    {'rank': rank, **told(row.item), 'score': row.score, **({'tied': True} if row.tied else {})}
    for rank, row in enumerate(ranking, start=1)
  ]
  line = {**request.line, 'recommendations': rows}
  if request.next_item is not None:
    places = [rank for rank, row in enumerate(ranking, 1) if row.item == request.next_item]
    line['next'] = {'rank': places[0] if places else None, **told(request.next_item)}
    if places and ranking[places[0] - 1].tied:
      line['next']['tied'] = True
  return line


def _check_files(input: str, output: str) -> None:
  if input != '-' and not Path(input).expanduser().is_file():
    raise UsageError(f'input={input!r}: no such file; - reads standard input.')
  if output != '-':
    path = Path(output).expanduser()
    if os.path.lexists(path):
      raise UsageError(f'output={output!r} exists already: name another file, or remove it first.')
    if not path.parent.is_dir():
      raise UsageError(f'output={output!r}: there is no directory {str(path.parent)!r}.')


def _lines_of(path: Path) -> Iterator[str]:
  with open(path, encoding='utf-8-sig') as file:
    try:
      yield from file
    except UnicodeDecodeError as error:
      raise UsageError(f'input={str(path)!r} is not text in UTF-8: {error}.') from error


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[TextIO]:
  """Yields a file that gets the name `path` when the block ends without an exception."""
  path = path.expanduser()
  unfinished = path.with_name(f'.{path.name}.incomplete-{os.getpid()}')
  try:
    with open(unfinished, 'w', encoding='utf-8') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(unfinished, path)
  except BaseException:
    unfinished.unlink(missing_ok=True)
    raise


def typed_lines(prompt: str) -> Iterator[str]:
  """Yields lines as they are typed, with the terminal's line editing, until Ctrl-D."""
  with contextlib.suppress(ImportError):
    import readline  # noqa: F401, which `input` then uses
  print('titles separated by ";" - :help tells more', file=sys.stderr)
  while True:
    try:
      yield input(prompt)
    except EOFError:
      print()
      return

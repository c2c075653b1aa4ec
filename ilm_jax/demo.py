"""`ilm demo`: all of it on real data, from interactions to a report that a person can read.

Each stage is one command, which is shown, and can be run by hand. A stage that is done is not done
again, and one that was interrupted goes on.

DIR/ml100k       prepared data           DIR/mlp, DIR/ilm      runs of phase 2
DIR/phase1       a run of phase 1        DIR/*/evaluation      what they are worth
DIR/stages.json  what is done            DIR/report.{html,json}
"""

import contextlib
import fcntl
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ilm_jax.errors import UsageError
from ilm_jax.runtime.progress import duration
from ilm_jax.runtime.tensorflow import import_tensorflow

STAGES_FILE = 'stages.json'


class Stage(NamedTuple):
  """One command.

  Attributes:
    name: for people.
    words: of `ilm`.
    output: what it makes; where it may not exist before, and is no run that goes on, `fresh`.
    fresh: whether an unfinished output is to be removed first.
  """

  name: str
  words: tuple[str, ...]
  output: Path
  fresh: bool = False


def demo(
  *, output: Path, lm: str = 'smollm2_135m', jobs: str = 'demo', smoke: bool = False, seed: int = 0
) -> None:
  """MovieLens-100K, from the interactions to recommendations: trained, measured, told.

    ilm demo --output=runs/demo
    ilm demo --output=runs/demo_gemma --lm=gemma3_270m

  Args:
    output: a directory; the demo goes on where it was interrupted.
    lm: a language model by name or path; 'gemma3_270m' comes under Google's terms.
    jobs: which gin files: gin/jobs/JOBS_phase1.gin, JOBS_mlp.gin and JOBS_ilm.gin.
    smoke: tiny models and a few steps, to see that everything works; figures mean nothing.
    seed: of the runs.

  Raises:
    UsageError: output holds a demo with another language model, another demo is at work there, or
      a stage failed.
  """
  output = output.expanduser()
  output.mkdir(parents=True, exist_ok=True)
  with _alone(output) as lock:
    _demo(output, lm, jobs, smoke, seed, lock)


def _demo(output: Path, lm: str, jobs: str, smoke: bool, seed: int, lock: int) -> None:
  done = _Done(output / STAGES_FILE, {'lm': lm, 'jobs': jobs, 'smoke': smoke, 'seed': seed})
  for stage in _stages(output, lm, jobs, smoke, seed):
    if stage.name in done:
      _say(f'{stage.name}: done before, in {duration(done.seconds(stage.name))}')
      continue
    if stage.fresh and stage.output.exists():
      shutil.rmtree(stage.output)
    _say(f'{stage.name}:\n  ilm {" ".join(map(_quoted, stage.words))}')
    start = time.monotonic()
    status = _run(stage.words, lock)
    if status:
      raise UsageError(
        f'demo: {stage.name} ended with status {status}; what it said is above. Run the demo again'
        ' to go on from there.'
      )
    done.add(stage.name, time.monotonic() - start)
    _say(f'{stage.name}: {duration(done.seconds(stage.name))}')
  import_tensorflow()
  from ilm_jax.evaluation.demo_report import report_of  # JAX, and the models

  start = time.monotonic()
  summary = report_of(output, done.all(), smoke=smoke)
  _say(f'report: {duration(time.monotonic() - start)}')
  print(summary)
  print(f'\n{output / "report.html"} has all of it, {output / "report.json"} the same figures.')


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[int]:
  """Refuses a second demo in a directory; yields the lock, which a stage inherits.

  So it lasts until both have ended: a stage goes on where its demo was killed with SIGKILL.
  """
  with open(output / '.lock', 'w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise UsageError(
        f'{output}: another demo is at work there, or a stage of one that was killed. Wait for it,'
        f' stop it (`pgrep -af {output}` finds it), or name another output.'
      ) from error
    yield file.fileno()


def _run(words: tuple[str, ...], lock: int) -> int:
  """Runs a command of `ilm` to its end, which SIGTERM and Ctrl-C ask for; returns its status.

  Training saves before it ends. A command that was asked to end has not finished, whatever its
  status: then this process ends as the signal says.
  """
  heard: list[int] = []

  def note(number: int, _: Any) -> None:
    heard.append(number)
    if number == signal.SIGTERM:  # Ctrl-C reaches all processes of the terminal by itself
      stage.send_signal(number)

  command = [sys.executable, '-m', 'ilm_jax.main', *words]
  with subprocess.Popen(command, pass_fds=(lock,)) as stage:
    before = {n: signal.signal(n, note) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
      status = stage.wait()
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)
  if heard:
    signal.raise_signal(heard[0])
  return status


def _stages(output: Path, lm: str, jobs: str, smoke: bool, seed: int) -> list[Stage]:
  data, phase1 = output / 'ml100k', output / 'phase1'
  tiny: dict[str, list[str]] = {'phase1': [], 'ilm': [], 'mlp': []}
  users, texts, less = 200, 64, {}
  if smoke:
    overlay, never = '--gin_file=local_tiny_phase2.gin', '--gin.EVAL_EVERY=None'
    # What takes time is to compile, and each source is another program. The overlay of phase 1 has
    # its own number of queries; phase 2 takes over what the jobs say.
    tiny = {
      'phase1': ['--gin_file=local_tiny.gin', '--gin.NUM_QUERIES=1', *_sources(item_text=32)],
      'ilm': [overlay, never, *_sources(item_sequence=32, items_title=2)],
      'mlp': [overlay, never, *_sources(item_sequence=32)],
    }
    users, texts = 16, 8
    rankers = ['popularity', 'itemknn_recency', 'ials_recency']
    less = {'fields': "['genres']", 'rankers': str(rankers)}
  common = (f'--gin.DATA={data}', f'--gin.SEED={seed}')

  def train(name: str, *more: str) -> Stage:
    run = output / name
    words = ['train', f'--gin_file=jobs/{jobs}_{name}.gin', *tiny[name], *more, *common]
    return Stage(f'train {name}', (*words, f'--gin.MODEL_DIR={run}'), run)

  def evaluate(name: str, **flags: Any) -> Stage:
    directory = output / name / 'evaluation'
    words = ['evaluate', f'--model_dir={output / name}', f'--output={directory}']
    words += [f'--{flag}={value}' for flag, value in flags.items()]
    return Stage(f'evaluate {name}', tuple(words), directory, fresh=True)

  # What is left out here is not in the report, or is measured by the last stage.
  small: dict[str, Any] = {'max_users': users, 'max_texts': texts, 'losses': '[]'}
  prepare = ('prepare', '--dataset=ml100k', f'--output={data}', '--rankers=False')
  return [
    Stage('prepare', prepare, data, fresh=True),
    train('phase1'),
    train('ilm', f'--gin.LM={lm}', f'--gin.PHASE1={phase1}'),
    train('mlp', f'--gin.LM={lm}'),
    evaluate(
      'mlp',
      methods="['readout']",
      conditions="['own']",
      rankers='[]',
      fields='[]',
      **small,
    ),
    evaluate(
      'ilm',
      methods="['readout']",
      tasks="['sequential_seen_title']",
      conditions="['own', 'shuffled_users', 'text_only']",
      compare_to=f"['{output / 'mlp' / 'evaluation'}']",
      **small,
      **less,
    ),
  ]


def _sources(**batch_size: int) -> tuple[str, str]:
  """One after another."""
  return f'--gin.SCHEDULE={list(batch_size)}', f'--gin.BATCH_SIZE={batch_size}'


class _Done:
  """The stages that are done, and how long they took; on disk."""

  def __init__(self, file: Path, settings: dict[str, Any]):
    self._file = file
    self._values: dict[str, Any] = {'settings': settings, 'seconds': {}}
    if file.exists():
      self._values = json.loads(file.read_text())
      if self._values['settings'] != settings:
        raise UsageError(
          f'{file.parent} holds a demo with {self._values["settings"]}, not with {settings}: name'
          ' another output.'
        )

  def __contains__(self, name: str) -> bool:
    return name in self._values['seconds']

  def seconds(self, name: str) -> float:
    return self._values['seconds'][name]

  def all(self) -> dict[str, float]:
    return dict(self._values['seconds'])

  def add(self, name: str, seconds: float) -> None:
    self._values['seconds'][name] = seconds
    unfinished = self._file.with_suffix('.incomplete')
    unfinished.write_text(json.dumps(self._values, indent=2) + '\n')
    unfinished.replace(self._file)


def _quoted(word: str) -> str:
  name, equals, value = word.partition('=')
  return f'{name}{equals}"{value}"' if set(value) & set(" '[]{}") else word


def _say(text: str) -> None:
  print(f'demo: {text}', file=sys.stderr, flush=True)

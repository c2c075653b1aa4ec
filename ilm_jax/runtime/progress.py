"""How far something long is and how fast: a bar on a terminal, plain lines elsewhere."""

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, Self, TextIO

import jax
import tqdm

_SECONDS_BETWEEN_LINES = 10
Done = Callable[[int], object]  # takes how many more are done


class Show(Protocol):
  """How a part of something long is shown: `with show(label, total) as done: done(count)`."""

  def __call__(self, label: str, total: int) -> contextlib.AbstractContextManager[Done]: ...


@contextlib.contextmanager
def silent(label: str, total: int) -> Iterator[Done]:
  """Shows nothing."""
  del label, total
  yield ignore


def ignore(count: int) -> None:
  del count


class Progress:
  """Tells how far the training is, on process 0; counts the time that training takes.

    with Progress(total_steps, start_step, 'item_text') as progress:
      for step in range(start_step + 1, total_steps + 1):
        state, metrics = train_step(state, batch)
        progress.step(step)
        if step % log_every == 0:
          means = fetch(metrics)  # waits for the device, so that the rates are true
          rates = progress.rates(step, {'examples': 3_200, 'target_tokens': 51_000})
          progress.log(step, {'loss': means['loss']}, mfu=...)
        if step % eval_every == 0:
          with progress.paused():
            evaluate()

  On a terminal that is a bar, elsewhere one line a log:

    item_text: step 200/2,000 (10 %)  loss 3.21  81.2 examples/s  ETA 4 min 10 s  MFU 31.2 %
  """

  def __init__(
    self,
    total_steps: int,
    start_step: int,
    label: str,
    *,
    unit: str = 'step',
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Starts the clock: `start_step` of `total_steps` are done. `stream` is standard error.

    `unit` is what steps are called.
    """
    self._unit = unit
    self._total = total_steps
    self._label = label
    self._clock = clock
    self._window_step = start_step
    self._window_start = clock()
    self._rates: dict[str, float] = {}
    self._stream = (stream or sys.stderr) if jax.process_index() == 0 else None
    self._compiled: set[str] = set()
    self._done = start_step
    self._shown_at = self._window_start
    self._warm = False
    self._bar = None
    if self._stream is not None and self._stream.isatty():
      self._bar = tqdm.tqdm(
        total=total_steps,
        initial=start_step,
        desc=label,
        unit=unit,
        file=self._stream,
        dynamic_ncols=True,
      )

  def step(self, step: int) -> None:
    """Moves the bar: `step` was handed to the device."""
    if self._bar is not None:
      self._bar.update(step - self._bar.n)

  def advance(self, count: int, metrics: Mapping[str, float] | None = None) -> None:
    """`count` more are done; without a terminal that is a line, every ten seconds and at the end.

    The first ones wait for compilation and are in no rate.
    """
    self._done += count
    self.step(self._done)
    now = self._clock()
    due = now - self._shown_at >= _SECONDS_BETWEEN_LINES or self._done >= self._total
    if due or not self._warm:
      rates = self.rates(self._done, {'examples': self._done - self._window_step})
      if not self._warm:
        rates.clear()
      self._warm = True
    if due:
      self.log(self._done, metrics or {})
      self._shown_at = now

  def rates(self, step: int, counts: Mapping[str, float]) -> dict[str, float]:
    """Returns what was done a second since the last call, pauses left out.

    rates(200, {'examples': 3_200}) -> {'steps_per_second': 5.0, 'examples_per_second': 160.0}
    """
    now = self._clock()
    seconds = max(now - self._window_start, 1e-9)
    counts = {'steps': step - self._window_step, **counts}
    self._rates = {f'{name}_per_second': count / seconds for name, count in counts.items()}
    self._window_step, self._window_start = step, now
    return self._rates

  def log(self, step: int, metrics: Mapping[str, float], mfu: float | None = None) -> None:
    """Shows a few metrics, the rates as `rates` has last returned them, and MFU, a fraction."""
    shown = [f'{name} {value:.4g}' for name, value in metrics.items()]
    if 'examples_per_second' in self._rates:
      shown.append(f'{self._rates["examples_per_second"]:,.1f} examples/s')
    utilisation = [] if mfu is None else [f'MFU {100 * mfu:.1f} %']
    if self._bar is not None:
      self._bar.set_postfix_str('  '.join([*shown, *utilisation]))
    elif self._stream is not None:
      percent = 100 * step // self._total
      line = [f'{self._label}: {self._unit} {step:,}/{self._total:,} ({percent} %)', *shown]
      if rate := self._rates.get('steps_per_second'):
        line.append(f'ETA {duration((self._total - step) / rate)}')
      print('  '.join([*line, *utilisation]), file=self._stream, flush=True)

  def note(self, text: str) -> None:
    """Prints a line, above the bar where there is one."""
    if self._stream is not None:
      tqdm.tqdm.write(text, file=self._stream)
      self._stream.flush()

  @contextlib.contextmanager
  def compiling(self, program: str) -> Iterator[None]:
    """The first time for a `program`, tells how long the block has waited for its compilation.

    That time is not counted.
    """
    if program in self._compiled:
      yield
      return
    self._compiled.add(program)
    start = self._clock()
    with self.paused():
      yield
    waited = duration(self._clock() - start)
    self.note(f'{self._label}: the {program} step is compiled, after {waited} of waiting')

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Time in the block, for evaluating or saving, is not time of training.

    Steps that the device has not finished when it begins are finished on its time.
    """
    start = self._clock()
    try:
      yield
    finally:
      self._window_start += self._clock() - start
      if self._bar is not None:
        self._bar.unpause()

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()


class Parts:
  """Shows the parts of a command, one after the other, each with its own rate and ETA.

    parts = Parts('evaluate', 14)
    with parts('readout, own', 943) as done:
      done(32)

  evaluate 1/14, readout, own: example 32/943 (3 %)  81.2 examples/s  ETA 11 s
  evaluate 1/14, readout, own: 12 s

  Args:
    command: its name.
    number: of parts.
    stream, clock: as of `Progress`.
  """

  def __init__(
    self,
    command: str,
    number: int,
    *,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._command = command
    self._number = number
    self._begun = 0
    self._stream = stream
    self._clock = clock

  @contextlib.contextmanager
  def __call__(self, label: str, total: int) -> Iterator[Done]:
    self._begun += 1
    label = f'{self._command} {self._begun}/{self._number}, {label}'
    start = self._clock()
    with Progress(
      total, 0, label, unit='example', stream=self._stream, clock=self._clock
    ) as progress:
      progress.log(0, {})
      yield progress.advance
    progress.note(f'{label}: {duration(self._clock() - start)}')


def duration(seconds: float) -> str:
  """Returns '9 s', '4 min 10 s', '2 h 5 min' or '3 d 4 h'."""
  seconds = round(seconds)
  units = [('d', 86_400), ('h', 3_600), ('min', 60), ('s', 1)]
  for (unit, length), (smaller, part) in itertools.pairwise(units):
    if seconds >= length:
      return f'{seconds // length} {unit} {seconds % length // part} {smaller}'
  return f'{seconds} s'

"""How far the training is and how fast: a bar on a terminal, plain lines elsewhere."""

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self, TextIO

import jax
import tqdm


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
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Starts the clock: `start_step` of `total_steps` are done. `stream` is standard error."""
    self._total = total_steps
    self._label = label
    self._clock = clock
    self._window_step = start_step
    self._window_start = clock()
    self._rates: dict[str, float] = {}
    self._stream = (stream or sys.stderr) if jax.process_index() == 0 else None
    self._compiled: set[str] = set()
    self._bar = None
    if self._stream is not None and self._stream.isatty():
      self._bar = tqdm.tqdm(
        total=total_steps,
        initial=start_step,
        desc=label,
        unit='step',
        file=self._stream,
        dynamic_ncols=True,
      )

  def step(self, step: int) -> None:
    """Moves the bar: `step` was handed to the device."""
    if self._bar is not None:
      self._bar.update(step - self._bar.n)

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
      line = [f'{self._label}: step {step:,}/{self._total:,} ({percent} %)', *shown]
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


def duration(seconds: float) -> str:
  """Returns '9 s', '4 min 10 s', '2 h 5 min' or '3 d 4 h'."""
  seconds = round(seconds)
  units = [('d', 86_400), ('h', 3_600), ('min', 60), ('s', 1)]
  for (unit, length), (smaller, part) in itertools.pairwise(units):
    if seconds >= length:
      return f'{seconds // length} {unit} {seconds % length // part} {smaller}'
  return f'{seconds} s'

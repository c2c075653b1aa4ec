"""Which phase a run trains, and with what: made of settings, and made again from MODEL_DIR."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ilm_jax.errors import UsageError, did_you_mean
from ilm_jax.phases.phase import InputOptions, Phase
from ilm_jax.runtime.sharding import Rules

SETTINGS_FILE = 'phase.json'
MODELS = ('item_text', 'item_language')


class PhaseSettings(NamedTuple):
  """A model and its options, JSON values.

  Attributes:
    model: 'item_text' or 'item_language'.
    options: keyword arguments of the phase.
  """

  model: str
  options: Mapping[str, Any]

  def make(self, inputs: InputOptions) -> Phase:
    """Imports only the phase that is asked for.

    Raises:
      UsageError: there is no such model, or an option is not right.
    """
    phase: Any
    if self.model == 'item_text':
      from ilm_jax.phases.item_text import ItemTextPhase as phase
    elif self.model == 'item_language':
      from ilm_jax.phases.item_language import ItemLanguagePhase as phase
    else:
      hint = did_you_mean(self.model, MODELS)
      raise UsageError(f'train.model={self.model!r}: one of {", ".join(MODELS)}.{hint}')
    if unused := set(self.options) - set(phase.OPTIONS):
      raise UsageError(
        f'train.{min(unused)}: train.model={self.model!r} has no such options; it has'
        f' {", ".join(phase.OPTIONS)}.'
      )
    return phase(inputs, **{name: self.options.get(name, {}) for name in phase.OPTIONS})

  def save(self, model_dir: Path, inputs: InputOptions) -> None:
    """Writes them beside the checkpoints, for `restore_phase`."""
    if jax.process_index() != 0:
      return
    model_dir.mkdir(parents=True, exist_ok=True)
    values = {
      'model': self.model,
      'options': dict(self.options),
      'data': str(inputs.data.absolute()),
      'entity_table': inputs.entity_table and str(inputs.entity_table.absolute()),
      'batch_size': dict(inputs.batch_size),
      'seed': inputs.seed,
    }
    unfinished = model_dir / f'.{SETTINGS_FILE}.incomplete'
    unfinished.write_text(json.dumps(values, indent=2) + '\n')
    unfinished.replace(model_dir / SETTINGS_FILE)


def restore_phase(
  model_dir: Path, mesh: jax.sharding.Mesh, rules: Rules, *, data: Path | None = None
) -> Phase:
  """The phase that a run was trained with.

  Args:
    model_dir: the run.
    mesh, rules: where arrays will live.
    data: the prepared data set, where it is elsewhere now.

  Raises:
    UsageError: there is no run.
  """
  file = model_dir / SETTINGS_FILE
  if not file.is_file():
    near = [path.parent.name for path in model_dir.parent.glob(f'*/{SETTINGS_FILE}')]
    raise UsageError(
      f'{model_dir} is no run of `ilm train`: it has no {SETTINGS_FILE}.'
      f'{did_you_mean(model_dir.name, near)}'
    )
  values = json.loads(file.read_text())
  table = values['entity_table']
  inputs = InputOptions(
    Path(values['data']) if data is None else data,
    Path(table) if table else None,
    values['batch_size'],
    values['seed'],
    mesh,
    rules,
  )
  return PhaseSettings(values['model'], values['options']).make(inputs)

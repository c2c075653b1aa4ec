"""Language models converted once: parameters as Orbax keeps them, beside what describes them.

DIRECTORY/
  params/            stacked layers, float32
  lm.json            format, configuration, tokenizer, content hash of what it was made from
  tokenizer.json or tokenizer.model
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ilm_jax.errors import UsageError
from ilm_jax.lm.orbax_source import OrbaxSource

FACTS = 'lm.json'
_PARAMS = 'params'


def open_params(directory: Path) -> OrbaxSource:
  """The parameters, under our own names: 'layers/mlp/wo/kernel'."""
  return OrbaxSource(directory / _PARAMS)


def write(directory: Path, params: Any, facts: Mapping[str, Any]) -> None:
  """Writes parameters and lm.json into an empty directory that exists."""
  import orbax.checkpoint as ocp  # reading needs none of it

  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
    writer.save(directory.absolute() / _PARAMS, args=ocp.args.PyTreeSave(params))
  (directory / FACTS).write_text(json.dumps(facts, indent=2) + '\n')


def read_facts(directory: Path) -> dict[str, Any]:
  """What lm.json says.

  Raises:
    UsageError: it is not there, or is not what `write` wrote.
  """
  try:
    return json.loads((directory / FACTS).read_text())
  except (OSError, ValueError) as error:
    raise UsageError(f'{directory}: no converted language model: {error}.') from error

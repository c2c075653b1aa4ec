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

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ilm_jax.checkpoints.lm.assemble import Leaf, Recipe
from ilm_jax.errors import UsageError

FACTS = 'lm.json'
_PARAMS = 'params'


class ConvertedSource:
  """The parameters of a converted language model, a `TensorSource`.

  Attributes:
    where, shapes: see TensorSource; names are those of our parameters, 'layers/mlp/wo/kernel'.
  """

  def __init__(self, directory: Path):
    self.where = str(directory)
    self._path = epath.Path(directory.absolute()) / _PARAMS
    self._reader = ocp.PyTreeCheckpointHandler()
    tree = self._reader.metadata(self._path).tree
    self._leaves: dict[str, Any] = flax.traverse_util.flatten_dict(tree, sep='/')
    self.shapes = {name: tuple(leaf.shape) for name, leaf in self._leaves.items()}

  def read(self, name: str) -> np.ndarray:
    leaf = self._leaves[name]
    wanted = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)}
    nested = flax.traverse_util.unflatten_dict(wanted, sep='/')
    restored = self._reader.restore(
      self._path,
      args=ocp.args.PyTreeRestore(
        nested,
        restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), nested),
        partial_restore=True,
      ),
    )
    flat: dict[str, Any] = flax.traverse_util.flatten_dict(restored, sep='/')
    return flat[name]

  def recipe(self) -> Recipe:
    """Every parameter is what it is called."""
    return {name: Leaf(name) for name in self.shapes}


def write(directory: Path, params: Any, facts: Mapping[str, Any]) -> None:
  """Writes parameters and lm.json into an empty directory that exists."""
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

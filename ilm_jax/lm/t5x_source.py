"""Reads checkpoints that T5X wrote, without T5X: only the parameters, one tensor at a time.

Two layouts. The older one is a file `checkpoint` (msgpack) that lists TensorStore arrays beside it:
`target.decoder.layers_0.mlp.wo.kernel/`. The newer one is Orbax's, in a directory `state`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import flax.serialization
import flax.traverse_util
import numpy as np
import tensorstore
from etils import epath

from ilm_jax.errors import UsageError
from ilm_jax.lm.orbax_source import OrbaxSource


class T5XSource:
  """The parameters of a T5X checkpoint, a `TensorSource`.

  Names are T5X's without 'target': 'decoder/layers_0/mlp/wo/kernel'. State of the optimizer is
  never read.

  Attributes:
    where: the directory.
    shapes: name -> shape.
  """

  def __init__(self, path: epath.PathLike):
    """Finds out what there is; reads no array.

    Args:
      path: the directory of one step, 'checkpoint_1000000', local or in a bucket.

    Raises:
      UsageError: it is not a T5X checkpoint.
    """
    self.where = str(path)
    self._directory = epath.Path(path).expanduser()
    if not self._directory.is_absolute():
      self._directory = self._directory.absolute()  # which would spoil a bucket's URL
    self._orbax: OrbaxSource | None = None
    if (self._directory / 'state' / '_METADATA').exists():
      self._orbax = OrbaxSource(self._directory / 'state')
      tree = flax.traverse_util.unflatten_dict(self._orbax.shapes, sep='/')
    elif (self._directory / 'checkpoint').is_file():
      tree = self._read_index(self._directory / 'checkpoint')
    else:
      raise UsageError(f'{path} is not a checkpoint of T5X.{_hint(self._directory)}')
    if not isinstance(tree, Mapping) or 'target' not in tree:
      raise UsageError(f"{path}: there is no 'target' in it, under which T5X keeps parameters.")
    self._leaves = {'/'.join(name): leaf for name, leaf in _leaves(tree['target'])}
    self.shapes: Mapping[str, tuple[int, ...]] = {
      name: _shape(leaf) for name, leaf in self._leaves.items()
    }

  def read(self, name: str) -> np.ndarray:
    """The tensor."""
    if self._orbax is not None:
      return self._orbax.read(f'target/{name}')
    leaf = self._leaves[name]
    # Small ones may stand in the index.
    return leaf if isinstance(leaf, np.ndarray) else self._read_tensorstore(leaf)

  def _read_index(self, file: epath.Path) -> Any:
    try:
      index = flax.serialization.msgpack_restore(file.read_bytes())
    except ValueError as error:
      raise UsageError(f'{file}: cannot be read as msgpack: {error}.') from error
    return index.get('optimizer') if isinstance(index, Mapping) else None

  def _read_tensorstore(self, spec: Mapping[str, Any]) -> np.ndarray:
    # The index has the path that the array had when it was written, whose last part stays true.
    array = self._directory / spec['kvstore']['path'].rstrip('/').split('/')[-1]
    kvstore: Any = f'{array}/' if '://' in str(array) else {'driver': 'file', 'path': f'{array}/'}
    spec = {'driver': spec['driver'], 'kvstore': kvstore}
    try:
      return tensorstore.open(spec, read=True).result().read().result()
    except ValueError as error:
      raise UsageError(f'{array}: cannot be read; is the copy complete? {error}') from error


def _leaves(tree: Any, name: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
  """(name, array or its description) of all arrays; a TensorStore spec is a dictionary, too."""
  if isinstance(tree, Mapping) and not {'driver', 'kvstore'} <= tree.keys():
    for key, value in tree.items():
      yield from _leaves(value, (*name, key))
  else:
    yield name, tree


def _shape(leaf: Any) -> tuple[int, ...]:
  """Of an array, of a TensorStore spec, or itself."""
  if isinstance(leaf, tuple):
    return leaf
  return tuple(leaf['metadata']['shape'] if isinstance(leaf, dict) else leaf.shape)


def _hint(directory: epath.Path) -> str:
  """What the user may have meant."""
  if not directory.is_dir():
    return ' There is no such directory.'
  steps = [child.name for child in directory.iterdir() if child.name.startswith('checkpoint_')]
  if steps:
    return f' Name one of those in it: {max(steps, key=lambda name: (len(name), name))}, say.'
  return " One has a file 'checkpoint' or a directory 'state' in it."

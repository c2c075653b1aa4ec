"""Python modules of the user, imported by name: sources, tasks and mixtures of their own."""

import importlib
from collections.abc import Sequence
from pathlib import Path

from ilm_jax.errors import UsageError, did_you_mean
from ilm_jax.runtime.tensorflow import import_tensorflow


def module_names(modules: str | Sequence[str]) -> list[str]:
  """The names in a list, or in 'one,two'."""
  names = modules.split(',') if isinstance(modules, str) else modules
  return [name.strip() for name in names if name.strip()]


def import_task_modules(modules: str | Sequence[str]) -> None:
  """As `import_modules`, of modules that register SeqIO tasks, and so import TensorFlow."""
  if module_names(modules):
    import_tensorflow()
  import_modules(modules)


def import_modules(modules: str | Sequence[str]) -> None:
  """Imports the modules that a command was given, as `module_names` reads them.

  Raises:
    UsageError: there is no such module. What a module itself raises passes.
  """
  for name in module_names(modules):
    try:
      importlib.import_module(name)
    except ModuleNotFoundError as error:
      if error.name is None or not f'{name}.'.startswith(f'{error.name}.'):
        raise  # the module is there, and something it imports is not
      here = [path.stem for path in Path().glob('*.py')]
      raise UsageError(
        f'modules: no module {name!r}; looked for in {Path().absolute()}, on PYTHONPATH and among'
        f' the installed packages.{did_you_mean(name, here)}'
      ) from error

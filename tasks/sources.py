"""The data sources by name, and what they share.

`ilm prepare --dataset=NAME` calls the function that is registered under NAME; its parameters are
the options. To add one, copy a file of this directory and register a function:

  @source('my_shop')
  def my_shop(export: str) -> RawData:
    ...

in `my_tasks.py`, and `ilm prepare --modules=my_tasks --dataset=my_shop --source.export=...` works.
"""

import importlib
import inspect
import os
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from ilm_jax.config.types import convert, describe
from ilm_jax.data.prepare.fetch import sha256_of
from ilm_jax.data.prepare.raw import RawData
from ilm_jax.errors import UsageError, did_you_mean

_Source = TypeVar('_Source', bound=Callable[..., RawData])

SOURCES: dict[str, Callable[..., RawData]] = {}
"""Name -> function, of the modules imported so far; `all_sources` imports the shipped ones."""

_SHIPPED = ('amazon', 'movielens', 'openp5', 'tabular')


def source(*names: str) -> Callable[[_Source], _Source]:
  """Decorator: registers a function that returns `RawData` under one or several names.

  Raises:
    UsageError: another module has taken the name.
  """

  def register(function: _Source) -> _Source:
    for name in names:
      holder = SOURCES.get(name, function)
      if holder.__module__ != function.__module__:  # the same module again is a reload
        raise UsageError(
          f'data source {name!r} of {function.__module__} is taken by {holder.__module__}; choose'
          ' another name.'
        )
      SOURCES[name] = function
    return function

  return register


def all_sources() -> dict[str, Callable[..., RawData]]:
  """Returns name -> function: the shipped sources, and those of modules imported so far."""
  for module in _SHIPPED:
    importlib.import_module(f'ilm_jax.tasks.{module}')
  return dict(SOURCES)


def load_raw(dataset: str, /, **options: Any) -> RawData:
  """Reads a data set: `load_raw('tabular', name='books', interactions='a.csv', items='b.csv')`.

  Args:
    dataset: a name in `all_sources()`.
    **options: the arguments of that source's function.

  Raises:
    UsageError: unknown data set, unknown option, option left out, an option of another type than
      the function's annotation says, or whatever is wrong with the data.
  """
  sources = all_sources()
  if dataset not in sources:
    raise UsageError(
      f'dataset={dataset!r}: unknown; allowed: {", ".join(sorted(sources))}.'
      f'{did_you_mean(dataset, sources)} A data set of your own: --dataset=tabular, or --modules='
      ' with the module that registers it.'
    )
  parameters = inspect.signature(sources[dataset]).parameters
  allowed = f'allowed: {", ".join(parameters)}' if parameters else 'it takes none'
  for option in options:
    if option not in parameters:
      hint = did_you_mean(option, parameters)
      raise UsageError(f'dataset={dataset!r} has no option {option!r}; {allowed}.{hint}')
  missing = [n for n, p in parameters.items() if p.default is p.empty and n not in options]
  if missing:
    raise UsageError(f'dataset={dataset!r} needs {", ".join(map(repr, missing))}; {allowed}.')
  hints = typing.get_type_hints(sources[dataset])
  values = {}
  for option, value in options.items():
    annotation = hints.get(option, Any)
    try:
      values[option] = convert(value, annotation)
    except TypeError as error:
      raise UsageError(
        f'dataset={dataset!r}: option {option!r} takes {describe(annotation)}, and {error}. On the'
        f' command line a string that looks like a number is --source.{option}="\'{value}\'".'
      ) from error
  return sources[dataset](**values)


def source_file(folder: str | os.PathLike[str], name: str, advice: str) -> Path:
  """Returns the path of a file that the user downloaded; UsageError with `advice` if missing."""
  path = Path(folder).expanduser() / name
  if not path.is_file():
    raise UsageError(f'{path}: no such file. {advice}')
  return path


def describe_files(paths: Iterable[Path]) -> list[dict[str, Any]]:
  """Returns path, bytes and sha256 of files, for the provenance of a data set."""
  return [{'path': str(p), 'bytes': p.stat().st_size, 'sha256': sha256_of(p)} for p in paths]

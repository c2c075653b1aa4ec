"""What a command takes: its parameters, and the check of a value against an annotation."""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from etils import epath

from ilm_jax.errors import UsageError, did_you_mean

_T = typing.TypeVar('_T')


class Parameter(typing.NamedTuple):
  """One parameter of a command: `annotation` is Any where there is none."""

  annotation: Any
  default: Any
  required: bool


def parameters_of(function: Callable[..., Any]) -> dict[str, Parameter]:
  """Returns the parameters of a command by name, in the order of its signature.

  Raises:
    TypeError: one of them is not keyword-only.
  """
  hints = typing.get_type_hints(function)
  found = {}
  for name, parameter in inspect.signature(function).parameters.items():
    if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
      raise TypeError(f'{function.__qualname__}({name}): a command takes keyword-only parameters.')
    required = parameter.default is inspect.Parameter.empty
    found[name] = Parameter(hints.get(name, Any), parameter.default, required)
  return found


def describe(annotation: Any) -> str:
  """Returns the annotation as a user reads it: `int | None`, `Literal['a', 'b']`, `Path`."""
  text = inspect.formatannotation(annotation)
  # Module names go, except in the quoted choices of a Literal.
  return re.sub(r"('[^']*')|\b(?:\w+\.)+(?=\w)", lambda match: match[1] or '', text)


def is_dict(annotation: Any) -> bool:
  """Whether the annotation is a dict or a Mapping, or a union with one."""
  origin = typing.get_origin(annotation) or annotation
  if origin in (typing.Union, types.UnionType):
    return any(map(is_dict, typing.get_args(annotation)))
  return origin in (dict, Mapping)


def choices(annotation: Any) -> list[Any]:
  """Returns the values that the `Literal`s of an annotation allow, those in a union included."""
  if typing.get_origin(annotation) is typing.Literal:
    return list(typing.get_args(annotation))
  if typing.get_origin(annotation) in (typing.Union, types.UnionType):
    return [choice for option in typing.get_args(annotation) for choice in choices(option)]
  return []


def convert(value: Any, annotation: Any) -> Any:
  """Returns `value` as `annotation` asks, changed only where nothing is lost.

  Changed are: an int for a float; an integral float for an int (people write 1e5 steps); a str for
  a Path; a list for a tuple and the reverse. A bool is never a number. In a union the member that
  takes the value unchanged wins over one that would change it.

  Raises:
    TypeError: the value does not fit; the message says which part of it.
  """
  kind, parts = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
  if kind in (Any, object):
    return value
  if kind in (typing.Union, types.UnionType):
    return _convert_to_one_of(value, parts)
  if kind is typing.Literal:
    # Compared with the type: 1 == True == 1.0, but only one of them is the allowed one.
    if not any(value == part and type(value) is type(part) for part in parts):
      raise TypeError(_found(value))
    return value
  if kind in (None, types.NoneType):
    if value is not None:
      raise TypeError(_found(value))
    return value
  if kind is Callable:
    if not callable(value):
      raise TypeError(_found(value))
    return value
  if kind in (list, tuple, Sequence):
    return _convert_sequence(value, kind, parts)
  if kind in (dict, Mapping):
    if not isinstance(value, dict):
      raise TypeError(_found(value))
    of_key, of_value = parts or (Any, Any)
    return {convert(k, of_key): convert(v, of_value) for k, v in value.items()}
  if kind in (int, float):
    return _convert_number(value, kind)
  if issubclass(kind, PurePath) and isinstance(value, str):
    if '://' in value and not issubclass(kind, epath.Path):
      raise TypeError(f'{value!r} is remote, and this is read and written as a local path')
    return kind(value)
  if not isinstance(value, kind):
    raise TypeError(_found(value))
  return value


def _found(value: Any) -> str:
  return f'{value!r} is {"None" if value is None else describe(type(value))}'


def _convert_to_one_of(value: Any, options: Sequence[Any]) -> Any:
  changed = []
  errors = []
  for option in options:
    try:
      result = convert(value, option)
    except TypeError as error:
      if option is not types.NoneType:
        errors.append(error)
      continue
    if type(result) is type(value):
      return result
    changed.append(result)
  if not changed:
    # Of `X | None` the error of X says more: which element it is.
    raise errors[0] if len(errors) == 1 else TypeError(_found(value))
  return changed[0]


def _convert_sequence(value: Any, kind: Any, parts: Sequence[Any]) -> Any:
  if not isinstance(value, (list, tuple)):
    raise TypeError(_found(value))
  if kind is tuple and parts and parts[-1] is not ...:
    if len(value) != len(parts):
      raise TypeError(f'{value!r} has {len(value)} elements')
    return tuple(convert(element, part) for element, part in zip(value, parts))
  elements = [convert(element, parts[0] if parts else Any) for element in value]
  return type(value)(elements) if kind is Sequence else kind(elements)


def _convert_number(value: Any, kind: type) -> Any:
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    raise TypeError(_found(value))
  if kind is int and isinstance(value, float) and not value.is_integer():
    raise TypeError(f'{value!r} is not a whole number')
  return kind(value)


def make_dataclass(kind: type[_T], values: Mapping[str, Any], where: str) -> _T:
  """Makes a dataclass of options that a user gave as a dict, checked as arguments are.

  Args:
    kind: the dataclass; its annotations say what is allowed.
    values: the options that are not left at their defaults.
    where: the parameter that they come from, for messages.

  Raises:
    UsageError: an unknown option, one that is missing, or a value that does not fit.
  """
  hints = typing.get_type_hints(kind)
  fields = [field.name for field in dataclasses.fields(kind)]  # pyright: ignore[reportArgumentType]
  arguments = {}
  for name, value in values.items():
    if name not in fields:
      raise UsageError(
        f'{where} has no option {name!r}.{did_you_mean(name, fields)} Options: {", ".join(fields)}.'
      )
    try:
      arguments[name] = convert(value, hints[name])
    except TypeError as error:
      raise UsageError(
        f'{where}.{name}: {error}, but {describe(hints[name])} is needed.'
      ) from error
  try:
    return kind(**arguments)
  except (TypeError, ValueError) as error:
    raise UsageError(f'{where}: {error}') from error

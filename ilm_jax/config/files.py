"""What a configuration was resolved to; where gin files are found and how the result is written."""

import contextvars
import dataclasses
import math
import pprint
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from etils import epath

from ilm_jax.errors import UsageError, did_you_mean

_running: contextvars.ContextVar['Config | None'] = contextvars.ContextVar('config', default=None)


@dataclasses.dataclass(frozen=True)
class Config:
  """The checked arguments of one function, and the texts that reproduce them.

  A snapshot: a later `parse` in the same process changes nothing here. (A function passed by
  `@reference` is the exception: it is gin's own and looks its bindings up when it is called.)

  Attributes:
    function: the function itself, not gin's wrapper: its errors come out as they were raised.
    arguments: every argument that will be passed, resolved and converted; defaults included.
    text: the content of `config.gin`: all bindings of files and overrides, macros kept.
    operative_text: the content of `operative_config.gin`: each argument's resolved value, with the
      macro to override and the file it came from as a comment.
    warnings: one line for each macro that a file sets and nothing uses.
  """

  function: Callable[..., Any]
  arguments: Mapping[str, Any]
  text: str
  operative_text: str
  warnings: tuple[str, ...]

  def call(self) -> Any:
    """Calls the function with `arguments` and returns what it returns."""
    token = _running.set(self)
    try:
      return self.function(**self.arguments)
    finally:
      _running.reset(token)

  def save(self, directory: str | Path) -> None:
    """Writes `config.gin` and `operative_config.gin` into `directory`, made if absent.

    Each file is there whole or not at all; see `write`.
    """
    texts = {'config.gin': self.text, 'operative_config.gin': self.operative_text}
    write(directory, texts)


def running() -> Config | None:
  """Returns the Config whose `call` is under way; None where the function was called directly.

  For a command that has to save its configuration itself, because its directory is complete or
  absent (`ilm prepare`).
  """
  return _running.get()


def gin_root() -> Path:
  """Returns the folder of the shipped gin files: beside the package in a clone, else inside it."""
  package = Path(__file__).resolve().parents[1]
  beside = package.parent / 'gin'
  # In site-packages the folder beside us is gin-config itself; ours never has an __init__.py.
  if beside.is_dir() and not (beside / '__init__.py').exists():
    return beside
  return package / 'gin'


def find(name: str, search_paths: Sequence[Path], asked_by: str) -> Path:
  """Returns the gin file `name`: in the working directory, else in the first search path with it.

  Raises:
    UsageError: it is in none of them; the message opens with `asked_by`, a flag or a file's line.
  """
  wanted = Path(name).expanduser()
  folders = [Path()] if wanted.is_absolute() else [Path(), *search_paths]
  tried = [folder / wanted for folder in folders]
  for path in tried:
    if path.is_file():
      return path
  # Search paths are listed as a whole, but of the working directory, which may be someone's home,
  # only the wanted file's own folder.
  there = {str(wanted.with_name(file.name)) for path in tried for file in path.parent.glob('*.gin')}
  for folder in search_paths:
    there.update(file.relative_to(folder).as_posix() for file in folder.rglob('*.gin'))
  raise UsageError(
    f'{asked_by}: no gin file {name!r}.{did_you_mean(name, sorted(there))}'
    f' Tried: {", ".join(str(path.absolute()) for path in tried)}.'
  )


def shown(path: Path) -> str:
  """Returns a file's name for messages: a shipped one is gin/..., from wherever it is read."""
  root = gin_root()
  whole = path.resolve()
  return str('gin' / whole.relative_to(root)) if whole.is_relative_to(root) else str(path)


def write(directory: str | Path, texts: Mapping[str, str]) -> None:
  """Writes files (name -> text) into a directory, made if absent.

  Each is written under a temporary name and renamed: a reader, or another host of the same run,
  finds a whole file or none. A remote directory (gs://) works where etils.epath reaches it.
  """
  folder = epath.Path(directory)
  folder.mkdir(parents=True, exist_ok=True)
  for name, text in texts.items():
    temporary = folder / f'.{name}.{uuid.uuid4().hex}'
    temporary.write_text(text)
    temporary.replace(folder / name)


def line(key: str, value: Any, origin: str, reference_type: type) -> str:
  """Returns `key = value  # origin`, and only a comment where gin has no literal for the value.

  `reference_type` is the class of gin's references, which print as they are parsed (`@name`).
  """
  plain = _plain(value)
  if not _is_literal(plain, reference_type):
    return f'# {key} = {" ".join(repr(value).split())} (no gin literal)  # {origin}'
  text = pprint.pformat(plain, width=90, sort_dicts=False)
  if '\n' in text:
    text = '\\\n    ' + text.replace('\n', '\n    ')
  return f'{key} = {text}  # {origin}'


def _plain(value: Any) -> Any:
  if isinstance(value, dict):
    return {_plain(key): _plain(element) for key, element in value.items()}
  if isinstance(value, (list, tuple)):
    return type(value)(map(_plain, value))
  return str(value) if isinstance(value, PurePath) else value


def _is_literal(value: Any, reference_type: type) -> bool:
  if type(value) in (list, tuple):
    return all(_is_literal(element, reference_type) for element in value)
  if type(value) is dict:
    return _is_literal([*value.keys(), *value.values()], reference_type)
  if type(value) is float:
    return math.isfinite(value)
  return type(value) in (type(None), bool, int, str, bytes, reference_type)

"""Configuration: gin files and overrides -> the checked arguments of ONE function.

A command of `ilm` is one top-level function with keyword-only, annotated parameters. Gin binds
those parameters and nothing else; the rest of the library takes plain arguments and knows no
configuration system. This is the only file of the library that imports gin.

    # jobs/phase1.gin                        ilm train --gin_file=jobs/phase1.gin
    include 'runs/train.gin'                   --gin.TOTAL_STEPS=10 --gin.MODEL_DIR=/tmp/run
    TOTAL_STEPS = 1000
    train.total_steps = %TOTAL_STEPS

Gin's parser and store are used, with what gin leaves out: every binding remembers the file and
line it came from, values are checked against annotations, and a name that binds nothing is an
error. Dynamic registration is off, so that a parameter can be overridden as well as a macro, and
so are scopes: one function is called once.

The grammar of an override, `--gin.NAME=VALUE` (NAME: a macro or function.parameter):

    10, 1e-4, -1, None, [1, 2], {'a': 1}     the Python literal
    true, false (any case)                   the boolean
    '10', "a, b"                             a quoted string, once the shell took its own quotes
    %NAME, @function, @function()            a macro, a reference
    /tmp/run, gs://b/x, v5e:16x16, a,b, 1,2  not one literal: the text itself is the string
    a=b, 10#3, 007, 1.0.0, 50%               strings too: nothing is cut off, no comments

`--gin.FUNCTION.PARAMETER.KEY=VALUE` sets one key of a dict, and leaves its other keys as they are.

A text that opens with a quote, a bracket, `%` or `@` must be complete; it never turns into a
string silently. An empty value is an error (an unset shell variable); the empty string is `''`.
"""

import copy
import dataclasses
import importlib.util  # before gin, which uses importlib.util without importing it
import logging
import tokenize
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import gin
from gin import config as gin_config
from gin import config_parser

from ilm_jax.config import files as config_files
from ilm_jax.config.files import Config
from ilm_jax.config.types import choices, convert, describe, is_dict, parameters_of
from ilm_jax.errors import UsageError, did_you_mean

COMMAND_LINE = 'command line'
# Functions are registered as `ilm.<name>`: `train` is ours even where t5x.train.train is imported.
_MODULE = 'ilm'
# An override that opens with one of these is meant as a literal or a reference.
_EXPLICIT = tuple('\'"[({%@')
# Gin's registry forgets nothing. A function that the present parse was not given must be as
# unknown as if no earlier one had registered it.
_registered: set[str] = set()

_log = logging.getLogger(__name__)


def parse(
  function: Callable[..., Any],
  gin_files: Iterable[str | Path] = (),
  overrides: Iterable[str] = (),
  *,
  search_paths: Iterable[str | Path] = (),
  other_commands: Iterable[str] = (),
) -> Config:
  """Reads gin files, then overrides, and returns the checked arguments of `function`.

  Args:
    function: a top-level function with keyword-only parameters; files bind it by its name.
    gin_files: read in this order; a later binding replaces an earlier one. A relative name, here
      or in an `include`, is looked for in the working directory, in `search_paths`, then in the
      shipped folder (`config_files.gin_root`).
    overrides: 'NAME=VALUE', what follows `--gin.` on the command line; read after the files.
    search_paths: folders to look for gin files in.
    other_commands: names of the other top-level functions. Their bindings in files are kept in
      `Config.text` unchecked, so that one job file serves `ilm train` and `ilm evaluate`.

  Raises:
    UsageError: no such file, a syntax error, a name that nothing has, an override that changes
      nothing, a value that is missing or of another type. All missing and mistyped values are
      reported together, each with where it came from.
    TypeError: `function` has a parameter that is not keyword-only.
  """
  gin.clear_config()
  reader = _Reader(function, search_paths, other_commands)
  for name in gin_files:
    reader.read_file(str(name), asked_by='--gin_file', chain=())
  for override in overrides:
    reader.read_override(override)
  config = reader.finish()
  # A warning, not an error: shared files may declare what one of several jobs uses.
  for warning in config.warnings:
    _log.warning('%s', warning)
  return config


@dataclasses.dataclass(frozen=True, eq=False)
class _Binding:
  """One `key = value`, of a macro (`NAME`) or of a parameter (`function.parameter`)."""

  key: str
  value: Any
  source: str  # a file's name, or COMMAND_LINE
  line: int | None = None

  @property
  def where(self) -> str:
    return self.source if self.line is None else f'{self.source}:{self.line}'


class _Delegate(gin_config.ParserDelegate):
  """Gin's delegate, for which a reference to an unknown function is an error with a line."""

  def __init__(self, reader: '_Reader'):
    super().__init__()
    self._reader = reader

  def configurable_reference(self, scoped_selector: str, evaluate: bool) -> Any:
    problem = self._reader.problem_with(scoped_selector)
    if not problem and scoped_selector in self._reader.others:
      problem = f'is another command than `{self._reader.command}`, and is not loaded.'
    if problem:
      raise SyntaxError(f'@{scoped_selector} {problem}')  # gin and we add the location
    return super().configurable_reference(self._reader.full_name(scoped_selector), evaluate)


class _Reader:
  """Reads files and overrides into gin, remembering where each binding came from."""

  def __init__(
    self,
    function: Callable[..., Any],
    search_paths: Iterable[str | Path],
    other_commands: Iterable[str],
  ):
    self.function = function
    self.command = function.__name__
    self.parameters = parameters_of(function)
    self.others = set(other_commands) - {self.command}
    self.search_paths = [Path(path).expanduser() for path in search_paths]
    self.search_paths.append(config_files.gin_root())
    self.macros: dict[str, _Binding] = {}
    self.file_macros: dict[str, _Binding] = {}  # as the files set them, before any override
    self.bindings: dict[tuple[str, str], _Binding] = {}  # (full function name, parameter)
    self.elements: dict[str, dict[str, Any]] = {}  # parameter -> keys that overrides set
    self.imports: list[str] = []
    self.history: list[str] = []  # the files and overrides, for the header of what is saved
    self.reached: set[str] = set()  # macros that the function's arguments depend on
    self.problems: list[str] = []
    with gin_config.interactive_mode():  # of two functions of one name the last one counts
      gin.external_configurable(function, name=self.command, module=_MODULE)
      for name in self.others:
        gin.external_configurable(_another_command, name=name, module=_MODULE)
    _registered.update(self.others, {self.command})

  def full_name(self, selector: str) -> str:
    """Returns `ilm.<name>` for a command's name, and any other selector as it is."""
    return f'{_MODULE}.{selector}' if selector in {self.command, *self.others} else selector

  def problem_with(self, selector: str) -> str:
    """Says why no function is meant by `selector`, or nothing."""
    if '/' in selector:
      return 'has a scope, and scopes are not used here: a command is one function, called once.'
    commands = {self.command, *self.others}
    name = selector.removeprefix(f'{_MODULE}.')
    if name in commands or (name not in _registered and _gin_knows(selector)):
      return ''
    return (
      f'is no function that can be configured.{did_you_mean(selector, commands)}'
      f' Functions: {", ".join(sorted(commands))}.'
    )

  def read_file(self, name: str, asked_by: str, chain: tuple[Path, ...]) -> None:
    """Reads one file and what it includes; `chain` is the files that led here."""
    path = config_files.find(name, self.search_paths, asked_by)
    if path.resolve() in chain:
      raise UsageError(f'{asked_by}: {name!r} includes itself.')
    chain = (*chain, path.resolve())
    source = config_files.shown(path)
    if len(chain) == 1:
      self.history.append(source)
    with path.open(encoding='utf-8') as file:
      for statement in self._statements(file, source):
        line = statement.location.line_num
        if isinstance(statement, config_parser.IncludeStatement):
          self.read_file(statement.filename, f'{source}:{line}: include', chain)
        elif isinstance(statement, config_parser.ImportStatement):
          self._import(statement, f'{source}:{line}')
        elif isinstance(statement, config_parser.BindingStatement):
          self._bind_statement(statement, source)

  def read_override(self, override: str) -> None:
    """Reads 'NAME=VALUE', by the grammar at the top of this file."""
    key, equals, text = override.partition('=')
    if not equals or not config_parser.MODULE_RE.match(key):
      raise UsageError(
        f'--gin.{override}: write --gin.NAME=VALUE, where NAME is a macro or function.parameter.'
      )
    if not text.strip():
      raise UsageError(f'--gin.{key}= has no value; the empty string is --gin.{key}="\'\'".')
    _, selector, parameter = config_parser.parse_binding_key(key)
    if selector.startswith(f'{self.command}.'):
      self._bind_element(key, parameter, self._value_of(key, text), f'--gin.{override}')
      return
    if parameter and selector in self.others:
      raise UsageError(
        f'--gin.{key} binds a parameter of `{selector}`, and this command is `{self.command}`.'
      )
    value = self._value_of(key, text)
    self.history.append(f'--gin.{key}={text}')
    self._bind(_Binding(key, value, COMMAND_LINE), selector, parameter)

  def finish(self) -> Config:
    """Resolves and checks everything that was read."""
    self._merge_elements()
    ours = self.full_name(self.command)
    unchecked = {self.full_name(name) for name in self.others}
    trees = {
      key: self._without_macros(binding.value, (binding,))
      for key, binding in self.bindings.items()
      if key[0] not in unchecked
    }
    self._check_overrides()
    arguments, lines = {}, []
    for name, parameter in self.parameters.items():
      key = f'{self.command}.{name}'
      if (ours, name) in trees:
        tree, binding = trees.pop((ours, name)), self.bindings[ours, name]
        arguments[name] = self._checked(tree, parameter.annotation, binding)
        # A reference is written as it was bound, everything else as it is passed.
        lines.append(self._line(key, tree if _references(tree) else arguments[name], binding))
      elif parameter.required:
        self.problems.append(f'{key} is required: set it with --{name}=..., or in a gin file.')
      else:
        arguments[name] = parameter.default
        lines.append(self._line(key, parameter.default, None))
    if self.problems:
      raise UsageError('\n'.join(dict.fromkeys(self.problems)))
    for key, tree in trees.items():  # of functions that an argument refers to
      lines.append(self._line('.'.join(key), tree, self.bindings[key]))
    history = '\n'.join('# ' + source.replace('\n', '\\n') for source in self.history)
    resolved = '\n'.join([*self.imports, *lines])
    return Config(
      function=self.function,
      arguments=arguments,
      text=f'# All that was bound, from:\n{history}\n\n{gin.config_str(max_line_length=100)}',
      operative_text=f'# What `{self.command}` gets, from:\n{history}\n\n{resolved}\n',
      warnings=self._unused(),
    )

  def _statements(self, file: Any, source: str) -> Iterator[Any]:
    parser = None
    try:
      parser = config_parser.ConfigParser(file, _Delegate(self))
      yield from parser
    except SyntaxError as error:
      line = error.lineno or (parser.current_token.start[0] if parser else 1)
      raise UsageError(f'{source}:{line}: {_reason(error)}') from error
    except tokenize.TokenError as error:
      raise UsageError(f'{source}:{error.args[1][0]}: {_reason(error)}') from error

  def _import(self, statement: config_parser.ImportStatement, where: str) -> None:
    if statement.module.startswith('__gin__'):
      raise UsageError(f'{where}: dynamic registration is not used here; remove this import.')
    try:
      importlib.import_module(statement.module)
    except ModuleNotFoundError as error:
      if error.name and f'{statement.module}.'.startswith(f'{error.name}.'):
        raise UsageError(
          f'{where}: no module {error.name!r}; is its folder on PYTHONPATH?'
        ) from error
      raise  # the module is there, and something it imports is not
    gin.parse_config(statement.format())  # for gin's record of imports
    if statement.format() not in self.imports:
      self.imports.append(statement.format())

  def _bind_statement(self, statement: config_parser.BindingStatement, source: str) -> None:
    scope, selector, parameter, value, location = statement
    key = f'{selector}.{parameter}' if parameter else selector
    binding = _Binding(key, value, source, location.line_num)
    if scope:
      raise UsageError(f'{binding.where}: {scope}/{key} {self.problem_with(f"{scope}/")}')
    self._bind(binding, selector, parameter)

  def _bind(self, binding: _Binding, selector: str, parameter: str) -> None:
    """Binds `selector.parameter` in gin, or the macro `selector` where there is no parameter."""
    if not parameter:
      self.macros[selector] = binding
      if binding.source != COMMAND_LINE:
        self.file_macros[selector] = binding
      gin.bind_parameter((selector, 'gin.macro', 'value'), binding.value)
      return
    problem = self.problem_with(selector)
    if problem:
      raise UsageError(f'{binding.where}: {binding.key}: {selector!r} {problem}')
    function = self.full_name(selector.removeprefix(f'{_MODULE}.'))
    if function == self.full_name(self.command) and parameter not in self.parameters:
      raise UsageError(
        f'{binding.where}: `{self.command}` has no parameter {parameter!r}.'
        f'{did_you_mean(parameter, self.parameters)} Parameters: {", ".join(self.parameters)}.'
      )
    try:
      gin.bind_parameter(('', function, parameter), binding.value)
    except ValueError as error:  # of a function that is not ours: gin knows its parameters
      raise UsageError(f'{binding.where}: {error}') from error
    self.bindings[function, parameter] = binding
    if function == self.full_name(self.command):
      self.elements.pop(parameter, None)  # of the value before

  def _bind_element(self, key: str, element: str, value: Any, override: str) -> None:
    """Notes `command.parameter.element`, one key of a dict: the others stay as they are."""
    name = key.removeprefix(f'{self.command}.').removesuffix(f'.{element}')
    if name not in self.parameters:
      self._bind(_Binding(key, value, COMMAND_LINE), self.command, name)  # says what there is
    if not is_dict(self.parameters[name].annotation):
      annotation = describe(self.parameters[name].annotation)
      raise UsageError(f'{override}: {self.command}.{name} takes {annotation}, which has no keys.')
    self.history.append(override)
    self.elements.setdefault(name, {})[element] = value

  def _merge_elements(self) -> None:
    """Sets the keys that overrides named, once all macros of the rest of the dict are known."""
    for name, elements in list(self.elements.items()):
      before = self.bindings.get((self.full_name(self.command), name))
      tree = self._without_macros(before.value, (before,)) if before else None
      if tree is None or isinstance(tree, dict):  # else the type is wrong, as will be said
        whole = _Binding(f'{self.command}.{name}', {**(tree or {}), **elements}, COMMAND_LINE)
        self._bind(whole, self.command, name)

  def _value_of(self, key: str, text: str) -> Any:
    explicit = text.startswith(_EXPLICIT)
    if not explicit:
      if text.lower() in ('true', 'false'):
        return text.lower() == 'true'
      if '#' in text:  # gin would take the rest for a comment
        return text
    try:
      statements = list(config_parser.ConfigParser(f'value = {text}', _Delegate(self)))
      if len(statements) == 1 and isinstance(statements[0], config_parser.BindingStatement):
        return statements[0].value
      reason = 'more than one value'
    except (SyntaxError, tokenize.TokenError) as error:
      reason = _reason(error)
    if not explicit:
      return text
    raise UsageError(
      f'--gin.{key}={text}: opens like a literal or a reference and is none: {reason}'
      ' For a string that opens so, add quotes around it.'
    )

  def _without_macros(self, value: Any, trail: tuple[_Binding, ...]) -> Any:
    """Returns `value` with macros replaced by what they are bound to, and notes what is missing.

    `trail` is the bindings that led here: the parameter's, then those of macros.
    """
    if isinstance(value, dict):
      return {
        self._without_macros(key, trail): self._without_macros(element, trail)
        for key, element in value.items()
      }
    if isinstance(value, (list, tuple)):
      return type(value)(self._without_macros(element, trail) for element in value)
    if not isinstance(value, gin_config.ConfigurableReference):
      return value
    name = _macro_name(value)
    if value.selector == 'gin.constant' and value.scoped_configurable_fn() is gin.REQUIRED:
      key = trail[-1].key
      self.problems.append(
        f'{key} is required ({trail[-1].where}): set it with --gin.{key}=..., or bind it in a gin'
        ' file.'
      )
    if name is None:
      return value
    self.reached.add(name)
    if name not in self.macros:
      known = [*self.macros, 'gin.REQUIRED']
      self.problems.append(
        f'{trail[-1].where}: {trail[-1].key} uses the macro %{name}, which nothing'
        f' sets.{did_you_mean(name, known)}'
      )
      return value
    binding = self.macros[name]
    if any(binding is earlier for earlier in trail):
      self.problems.append(f'{binding.where}: the macro {name} is defined by itself.')
      return value
    return self._without_macros(binding.value, (*trail, binding))

  def _checked(self, tree: Any, annotation: Any, binding: _Binding) -> Any:
    """Returns the value to pass; a wrong type is noted as a problem."""
    if self.problems and _references(tree):
      return None  # it may hold what could not be resolved
    value = copy.deepcopy(tree)  # this is how gin evaluates `@function()`
    try:
      return convert(value, annotation)
    except TypeError as error:
      source = self._source_of(binding)
      macro = '' if source is binding else f'{source.key}, '
      hint = ''
      if isinstance(value, str):
        hint = did_you_mean(value, [word for word in choices(annotation) if isinstance(word, str)])
      elif value is not None and source.source == COMMAND_LINE:
        hint = f' For a string: --gin.{source.key}="\'{value}\'".'
      self.problems.append(
        f'{binding.key} ({macro}{source.where}) takes {describe(annotation)}, and {error}.{hint}'
      )

  def _check_overrides(self) -> None:
    for name, binding in self.macros.items():
      if binding.source != COMMAND_LINE or name in self.reached:
        continue
      if name in self.file_macros:
        self.problems.append(
          f'--gin.{name} changes nothing: {self.file_macros[name].where} sets the macro, and no'
          f' argument of `{self.command}` uses it.'
        )
      else:
        parameters = [f'{self.command}.{parameter}' for parameter in self.parameters]
        macros = sorted(self.reached)
        self.problems.append(
          f'--gin.{name}: no gin file declares or uses a macro {name!r}.'
          f'{did_you_mean(name, [*macros, *parameters])} Macros: {", ".join(macros) or "none"}.'
        )

  def _unused(self) -> tuple[str, ...]:
    everything = [b.value for b in (*self.macros.values(), *self.bindings.values())]
    names = map(_macro_name, _references(everything))
    used = {name for name in names if name is not None}
    return tuple(
      f'{binding.where}: nothing uses the macro {name}.{did_you_mean(name, sorted(used))}'
      for name, binding in self.macros.items()
      if name not in used
    )

  def _source_of(self, binding: _Binding) -> _Binding:
    """Returns the binding that gives the value: the last one of a chain of macros."""
    for _ in self.macros:
      name = _macro_name(binding.value)
      if name not in self.macros:
        break
      binding = self.macros[name]
    return binding

  def _line(self, key: str, value: Any, binding: _Binding | None) -> str:
    origin = 'default'
    if binding:
      source = self._source_of(binding)
      origin = source.source if source is binding else f'{source.key}, {source.source}'
    return config_files.line(key, value, origin, gin_config.ConfigurableReference)


def _another_command(**arguments: Any) -> None:
  """Stands in gin's registry for a command that is not loaded; it takes any binding."""


def _gin_knows(selector: str) -> bool:
  try:
    gin.get_configurable(selector)
  except (ValueError, KeyError):  # unknown; of several modules
    return False
  return True


def _references(value: Any) -> list[Any]:
  return list(gin_config.iterate_references(value))


def _macro_name(value: Any) -> str | None:
  """Returns NAME of a value `%NAME`, None for any other value."""
  is_reference = isinstance(value, gin_config.ConfigurableReference)
  return '/'.join(value.scopes) if is_reference and value.selector == 'gin.macro' else None


def _reason(error: Exception) -> str:
  """Returns what is wrong with a text, where gin's message shows Python's insides."""
  if isinstance(error, tokenize.TokenError):
    return 'a bracket or a quote is not closed.'
  assert isinstance(error, SyntaxError)
  message = error.msg.splitlines()[-1].strip()
  if not error.lineno:
    return message  # ours
  hint = ''
  if message.startswith('Failed to parse token'):
    word = message.split("'")[1]
    hint = did_you_mean(word.capitalize(), ['True', 'False', 'None'])
  line = (error.text or '').strip()
  return (
    f'{message.rstrip(".")}: {line!r}.{hint} A value is a Python literal (a string has quotes),'
    ' %MACRO or @function.'
  )

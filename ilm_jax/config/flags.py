"""The flags of one command: argv -> gin files and overrides -> one call."""

import argparse
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ilm_jax.config import files as config_files
from ilm_jax.config import reader
from ilm_jax.config.types import describe, is_dict, parameters_of
from ilm_jax.errors import UsageError, did_you_mean

_OWN_FLAGS = ('--gin_file', '--gin_search_paths', '--print_config', '--help')


def parse_argv(
  function: Callable[..., Any], argv: Sequence[str], *, other_commands: Iterable[str] = ()
) -> tuple[reader.Config, bool]:
  """Reads the flags of a command; returns its config, and whether `--print_config` was given.

  The flags: `--gin_file=FILE` (repeatable), `--gin_search_paths=DIR,DIR` (repeatable),
  `--gin.NAME=VALUE` (see `ilm_jax.config.reader`), `--print_config`, `--help`, and
  `--<parameter>=VALUE` for each parameter of `function`, short for
  `--gin.<function>.<parameter>=VALUE`: one grammar for all values. `--<parameter>.KEY=VALUE` sets
  one key of a parameter that is a dict. Of several flags for one name the last one wins.

  Raises:
    UsageError: an unknown flag; and as `reader.parse`.
  """
  parser = _parser(function)
  dicts = [name for name, p in parameters_of(function).items() if is_dict(p.annotation)]
  flags, rest = parser.parse_known_args([_declared(word, function, dicts) for word in argv])
  if rest:
    known = [*_OWN_FLAGS, *(f'--{name}' for name in parameters_of(function))]
    flag = rest[0].partition('=')[0]
    raise UsageError(
      f'{parser.prog}: unknown flag {flag!r}.{did_you_mean(flag, known)} Flags:'
      f' {", ".join(sorted(known))} and --gin.NAME=VALUE (with its "=").'
    )
  parsed = reader.parse(
    function,
    flags.gin_file,
    flags.overrides,
    search_paths=[path for paths in flags.gin_search_paths for path in paths.split(',') if path],
    other_commands=other_commands,
  )
  return parsed, flags.print_config


def run(
  function: Callable[..., Any],
  argv: Sequence[str],
  *,
  other_commands: Iterable[str] = (),
) -> Any:
  """Runs one command and returns what `function` returns.

  With `--print_config` the operative configuration is printed instead; the result is None.

  Args:
    function: a top-level function with annotated, keyword-only parameters.
    argv: the words after the command's name.
    other_commands: see `reader.parse`.

  Raises:
    UsageError: as `parse_argv`; and whatever `function` raises.
  """
  parsed, print_config = parse_argv(function, argv, other_commands=other_commands)
  if print_config:
    print(parsed.operative_text, end='')
    return None
  return parsed.call()


def run_about(
  function: Callable[..., Any],
  subject: Callable[..., Any],
  argv: Sequence[str],
  *,
  placeholders: Sequence[str] = (),
  other_commands: Iterable[str] = (),
) -> Any:
  """Runs a command that is about what another command would do, and returns what it returns.

  `function` has a parameter by the name of `subject`, which gets the arguments of that one, from
  the same gin files. Flags are those of both: a flag of `function` is its own, every other one the
  subject's.

  Args:
    function, argv, other_commands: as of `run`.
    subject: the other command.
    placeholders: parameters of the subject that `function` does not use; where they are not given,
      they are not asked for.

  Raises:
    UsageError: as `parse_argv`; and whatever `function` raises.
  """
  own, others = _split(function, subject, argv)
  own_config, print_own = parse_argv(function, own, other_commands=other_commands)
  declared = _macros(others)
  for name in placeholders:
    macro = name.upper()
    given = (f'--{name}=', f'--gin.{macro}=', f'--gin.{subject.__name__}.{name}=')
    if not any(word.startswith(given) for word in others):
      others = [f'--gin.{macro}=-' if macro in declared else f'--{name}=-', *others]
  about, print_config = parse_argv(subject, others, other_commands=other_commands)
  if print_config or print_own:
    print(own_config.operative_text + about.operative_text, end='')
    return None
  arguments = {**own_config.arguments, subject.__name__: dict(about.arguments)}
  return function(**arguments)


def _macros(argv: Sequence[str]) -> set[str]:
  """Macros that the gin files of a command line set, in the files that they include, too."""
  found: set[str] = set()
  words = [word.partition('=') for word in argv]
  folders = [Path(x) for flag, _, paths in words if flag == '--gin_search_paths'
             for x in paths.split(',')]  # fmt: skip
  folders.append(config_files.gin_root())
  names = [name for flag, _, name in words if flag == '--gin_file']
  while names:
    text = config_files.find(names.pop(), folders, '--gin_file').read_text()
    found.update(re.findall(r'^(\w+) *=', text, re.MULTILINE))
    names += re.findall(r"^include +['\"](.*?)['\"]", text, re.MULTILINE)
  return found


def _split(
  function: Callable[..., Any], subject: Callable[..., Any], argv: Sequence[str]
) -> tuple[list[str], list[str]]:
  """The words of `function`, and those of `subject`; gin files are of both."""
  mine = {name for name in parameters_of(function) if name != subject.__name__}
  own: list[str] = []
  others: list[str] = []
  to: tuple[list[str], ...] = (own,)
  for word in argv:
    if word.startswith('-'):  # else it is the value of the flag before
      name = word.removeprefix('--').partition('=')[0]
      if name in ('gin_file', 'gin_search_paths', 'print_config'):
        to = own, others
      elif name.startswith(f'gin.{function.__name__}.') or word in ('--help', '-h'):
        to = (own,)
      else:
        to = (own if name.partition('.')[0] in mine else others,)
    for words in to:
      words.append(word)
  return own, others


def _declared(word: str, function: Callable[..., Any], dicts: Iterable[str]) -> str:
  """Returns a flag as argparse knows it, which cannot declare the families --gin.X and --source.X.

  --gin.NAME=VALUE is read as --gin=NAME=VALUE, and --source.KEY=VALUE, for a parameter `source`
  that is a dict, as --gin=FUNCTION.source.KEY=VALUE.
  """
  name, dot, rest = word.removeprefix('--').partition('.')
  if not word.startswith('--') or not dot:
    return word
  if name in dicts:
    if not re.match(r'[A-Za-z_]\w*=', rest):
      raise UsageError(f'ilm {function.__name__}: {word}: write --{name}.KEY=VALUE.')
    return f'--gin={function.__name__}.{name}.{rest}'
  return f'--gin={rest}' if name == 'gin' else word


def _parser(function: Callable[..., Any]) -> argparse.ArgumentParser:
  command = function.__name__
  parser = argparse.ArgumentParser(
    prog=f'ilm {command}',
    description=inspect.getdoc(function),
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add('--gin_file', action='append', default=[], metavar='FILE', help='a gin file; repeatable')
  add('--gin_search_paths', action='append', default=[], metavar='DIR,DIR')
  add('--print_config', action='store_true', help='print the resolved configuration and exit')
  add('--gin', dest='overrides', action='append', default=[], metavar='.NAME=VALUE')
  for name, parameter in parameters_of(function).items():
    default = '' if parameter.required else f', default {parameter.default!r}'
    keys = f'; one key: --{name}.KEY=VALUE' if is_dict(parameter.annotation) else ''
    # `--resume` alone is `--resume=True`.
    optional: dict[str, Any] = {'nargs': '?', 'const': 'True'}
    add(
      f'--{name}',
      dest='overrides',  # in one list with --gin.NAME, so that the last one wins
      action='append',
      type=f'{command}.{name}={{}}'.format,
      metavar='VALUE',
      help=f'{describe(parameter.annotation)}{default}{keys}'.replace('%', '%%'),
      **(optional if parameter.annotation is bool else {}),
    )
  return parser

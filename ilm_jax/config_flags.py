"""The flags of one command: argv -> gin files and overrides -> one call."""

import argparse
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ilm_jax import config
from ilm_jax.config_types import describe, is_dict, parameters_of
from ilm_jax.errors import UsageError, did_you_mean

_OWN_FLAGS = ('--gin_file', '--gin_search_paths', '--print_config', '--help')


def parse_argv(
  function: Callable[..., Any], argv: Sequence[str], *, other_commands: Iterable[str] = ()
) -> tuple[config.Config, bool]:
  """Reads the flags of a command; returns its config, and whether `--print_config` was given.

  The flags: `--gin_file=FILE` (repeatable), `--gin_search_paths=DIR,DIR` (repeatable),
  `--gin.NAME=VALUE` (see `ilm_jax.config`), `--print_config`, `--help`, and `--<parameter>=VALUE`
  for each parameter of `function`, short for `--gin.<function>.<parameter>=VALUE`: one grammar for
  all values. `--<parameter>.KEY=VALUE` sets one key of a parameter that is a dict. Of several flags
  for one name the last one wins.

  Raises:
    UsageError: an unknown flag; and as `config.parse`.
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
  parsed = config.parse(
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
  output_dir_argument: str | None = None,
) -> Any:
  """Runs one command and returns what `function` returns.

  With `--print_config` the operative configuration is printed instead; the result is None.

  Args:
    function: a top-level function with annotated, keyword-only parameters.
    argv: the words after the command's name.
    other_commands: see `config.parse`.
    output_dir_argument: the parameter that holds the run directory. The configuration is saved in
      it BEFORE the call, so that a run that fails can be explained. None saves nothing: for a
      command whose directory must not exist until it is complete (`ilm prepare`), take
      `parse_argv`, call, then save.

  Raises:
    UsageError: as `parse_argv`; and whatever `function` raises.
  """
  parsed, print_config = parse_argv(function, argv, other_commands=other_commands)
  if print_config:
    print(parsed.operative_text, end='')
    return None
  if output_dir_argument and parsed.arguments[output_dir_argument] is not None:
    parsed.save(parsed.arguments[output_dir_argument])
  return parsed.call()


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

"""The `ilm` command: `ilm COMMAND --flag=value ...`. Each command is one function of one module."""

import contextlib
import gc
import importlib
import os
import sys
from collections.abc import Sequence

import ilm_jax
from ilm_jax.data.prepare.fetch import cache_dir
from ilm_jax.errors import UsageError, did_you_mean
from ilm_jax.runtime.tensorflow import import_tensorflow

# Command -> what it does. Command `x` is the function `x` of `ilm_jax/x.py`, imported when asked
# for: `ilm --help` waits for no TensorFlow.
COMMANDS = {
  'prepare': 'make a prepared data set: splits, ids, statistics, entity table, rankers',
  'embed': 'make or import another entity table for a prepared data set',
  'train': 'train the item encoder (phase 1), or it with a language model (phase 2)',
  'evaluate': 'measure a run of phase 2: rankings, texts, controls, intervals',
  'recommend': 'rank items for users, histories and prompts: JSON lines, or a dialogue',
  'demo': 'all of it on real data, from interactions to a report',
  'compile': 'compile a training job for a TPU topology, without a TPU: memory, speed, collectives',
  'complete': 'let a language model, by name or path, go on from a prompt',
}

# Commands whose module imports TensorFlow; the others do so when they read a SeqIO task, training
# while its step is compiled.
_IMPORTS_TENSORFLOW = ('evaluate',)

# Commands about what another one would do, and what of that one's settings does not matter.
_ABOUT = {'compile': ('train', ('model_dir', 'data'))}

# Commands that several processes can run together.
_MULTIPROCESS = ('train', 'evaluate')


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command.

  Args:
    argv: the words after `ilm`; None takes those of this process.

  Returns:
    The exit status: 0; 2 for a mistake in what the user gave, which is told without a traceback;
    130 after Ctrl-C; 141 where nobody reads on. Everything else that goes wrong is raised.
  """
  argv = list(sys.argv[1:] if argv is None else argv)
  # A console script has its own folder on the path; the user's modules are where the user is.
  if os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')  # or it tells of each library it lacks
  # It reads data here, no more: without this, it says that it cannot do it for int64.
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
  # A program that was compiled once is not compiled again, by a restart or by the next run.
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(cache_dir() / 'xla'))
  # Small programs too: a start has dozens of them.
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')
  # Imports and tracing make millions of objects that stay. Looked through for garbage as often as
  # is usual, they take a fifth of the time to the first step.
  gc.set_threshold(100_000, 20, 100)
  try:
    return _run(argv)
  except UsageError as error:
    sys.stdout.flush()
    print(f'ilm: {error}', file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print('ilm: interrupted', file=sys.stderr)
    return 130
  except BrokenPipeError:  # `ilm recommend ... | head`
    # What is left in the buffer has no reader either; Python would complain of it at the end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141  # as of a program that SIGPIPE ends


def _run(argv: list[str]) -> int:
  command = argv[0] if argv else '--help'
  if command in ('--help', '-h', 'help'):
    print(_help())
    return 0
  if command == '--version':
    print(f'ilm_jax {ilm_jax.__version__}')
    return 0
  if command not in COMMANDS:
    raise UsageError(
      f'unknown command {command!r}.{did_you_mean(command, COMMANDS)} Commands:'
      f' {", ".join(COMMANDS)}; `ilm --help` tells what they do.'
    )
  if command in _IMPORTS_TENSORFLOW:
    import_tensorflow()
  function = getattr(importlib.import_module(f'ilm_jax.{command}'), command)
  from ilm_jax.config import flags as config_flags

  words, joined = argv[1:], contextlib.nullcontext()
  if command in _MULTIPROCESS:
    from ilm_jax.runtime import processes

    cluster, words = processes.take_flags(words)
    if not {'--help', '-h', '--print_config'} & set(words):
      joined = processes.joined(cluster, stops_on_sigterm=command == 'train')
  if command in _ABOUT:
    name, placeholders = _ABOUT[command]
    subject = getattr(importlib.import_module(f'ilm_jax.{name}'), name)
    config_flags.run_about(
      function, subject, words, placeholders=placeholders, other_commands=COMMANDS
    )
    return 0
  with joined:
    config_flags.run(function, words, other_commands=COMMANDS)
  return 0


def _help() -> str:
  width = max(map(len, COMMANDS))
  commands = '\n'.join(f'  {name:<{width}}  {what}' for name, what in COMMANDS.items())
  return (
    'usage: ilm COMMAND [--FLAG=VALUE ...] [--gin_file=FILE ...] [--gin.NAME=VALUE ...]\n\n'
    'Item-Language Models in JAX: recommendation through a frozen language model.\n\n'
    f'Commands:\n{commands}\n\n'
    '`ilm COMMAND --help` tells its flags; `ilm --version` the version.\n'
    f'On several hosts: --multiprocess, on each ({", ".join(_MULTIPROCESS)}).'
  )


if __name__ == '__main__':
  sys.exit(main())

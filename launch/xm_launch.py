"""Starts a job through XManager, which keeps a record of experiments: one machine, all its devices.

  python launch/xm_launch.py train --gin_file=jobs/phase1_ml100k.gin --gin.MODEL_DIR=runs/phase1
  python launch/xm_launch.py --executor=vertex --image=IMAGE --resource=H100=8 train ...

What follows the command (train or evaluate) is given to `ilm` as it is. XManager is not among what
ilm_jax installs: `pip install xmanager`. For several machines see the other launchers.
"""

import argparse
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

EXECUTORS = ('local', 'vertex', 'kubernetes')
COMMANDS = ('train', 'evaluate')


def main(argv: Sequence[str] | None = None) -> None:
  """Runs one experiment of one job; waits for it where it runs on this machine."""
  parser = _parser()
  flags = parser.parse_args(argv)
  _check(parser, flags)
  environment = dict(pair.split('=', 1) for pair in flags.env)
  program = [] if flags.image else [flags.ilm]
  words = [*(f'{name}={value}' for name, value in environment.items()), *program, *flags.words]
  print('env ' * bool(environment) + shlex.join(words))
  where = [flags.executor, flags.image or 'this machine', *flags.resource]
  print(', '.join(where), file=sys.stderr)
  if flags.dry_run:
    return

  try:
    from absl import flags as absl_flags
    from xmanager import xm, xm_local  # pyright: ignore[reportMissingImports]
  except ModuleNotFoundError as error:
    parser.exit(2, f'{parser.prog}: {error}: pip install xmanager, in this environment.\n')
  absl_flags.FLAGS([sys.argv[0]])  # XManager's own, which it reads and we do not offer
  resources = {name: int(size) for name, size in (each.split('=') for each in flags.resource)}
  kinds = {'local': xm_local.Local, 'vertex': xm_local.Vertex, 'kubernetes': xm_local.Kubernetes}
  try:
    executor = kinds[flags.executor](requirements=xm.JobRequirements(**resources))
  except (KeyError, TypeError) as error:
    parser.error(f'--resource={flags.resource}: {error}')
  if flags.image:
    package = xm.container(executor.Spec(), image_path=flags.image)
  else:
    package = xm.binary(executor.Spec(), path=flags.ilm)
  with xm_local.create_experiment(experiment_title=flags.title) as experiment:
    [executable] = experiment.package([package])
    experiment.add(xm.Job(executable, executor, args=flags.words, env_vars=environment))


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='xm_launch.py',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add('--executor', choices=EXECUTORS, default='local', help='where (default: local)')
  add('--image', help='made from the Containerfile; not needed on this machine')
  add(
    '--resource',
    action='append',
    default=[],
    metavar='NAME=N',
    help='as XManager names it: H100=8, TPU_V5E=8, CPU=96, RAM=BYTES; repeatable',
  )
  add('--title', default='ilm_jax', help='of the experiment')
  add(
    '--ilm', default=shutil.which('ilm') or 'ilm', metavar='PATH', help='program, without --image'
  )
  add('--env', action='append', default=[], metavar='NAME=VALUE', help="job's; repeatable")
  add('--dry_run', action='store_true', help='print the command and run nothing')
  add('words', nargs=argparse.REMAINDER, metavar='COMMAND --FLAG=VALUE ...', help='for ilm')
  return parser


def _check(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> None:
  """Exits with status 2 where something is missing or cannot be."""
  command, *rest = flags.words or ['']
  if command not in COMMANDS:
    parser.error(f'{command!r}: what is to run? One of {", ".join(COMMANDS)}, and its flags.')
  for word in rest:
    if not word.startswith('--'):
      parser.error(f"{word!r} is no flag. A value with spaces is quoted: --gin.NAME='[1, 2]'.")
  for pair in flags.env:
    if not re.match(r'[A-Za-z_]\w*=', pair):
      parser.error(f'--env={pair}: write --env=NAME=VALUE.')
  for pair in flags.resource:
    if not re.fullmatch(r'\w+=\d+', pair):
      parser.error(f'--resource={pair}: write --resource=NAME=N.')
  if flags.executor != 'local':
    if not flags.image:
      parser.error(f'--executor={flags.executor} needs --image=..., which it can pull.')
    for word in flags.words:
      if '$(' in word or '$$' in word:
        parser.error(f'{word}: "$(" and "$$" mean something to Kubernetes; use a gin file.')
  elif not (flags.image or flags.dry_run or Path(flags.ilm).is_file()):
    parser.error(f'no program {flags.ilm!r}: install ilm_jax, or name it: --ilm=PATH.')


if __name__ == '__main__':
  main()

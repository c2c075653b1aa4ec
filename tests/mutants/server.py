"""Runs pytest again and again, in forks of a process that has imported what is not ours.

That takes seconds, which each fault would take again. A line of the standard input asks for a run:
{"words": of pytest, "said": file for what it prints}. The answers are two lines, the fork's process
id when it begins and its exit status when it has ended.
"""

import importlib
import json
import os
import sys

import pytest

_OURS = ('ilm_jax', 'tests', 'conftest')
_OTHERS = (
  'flax.linen', 'hypothesis', 'jax.numpy', 'optax', 'orbax.checkpoint', 'pandas', 'scipy.sparse',
  'seqio', 'tensorflow', 'tensorflow_datasets', 'tokenizers',
)  # fmt: skip


def main() -> None:
  sys.path.insert(0, os.getcwd())
  importlib.import_module('tests.conftest')  # sets what JAX reads from the environment
  for name in _OTHERS:
    importlib.import_module(name)
  for name in [name for name in sys.modules if name.partition('.')[0] in _OURS]:
    del sys.modules[name]
  for line in sys.stdin:
    fork = os.fork()
    if not fork:
      _run(**json.loads(line))
    print(fork, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]), flush=True)


def _run(words: list[str], said: str) -> None:
  """In the fork: does not return."""
  os.setsid()
  status = 3
  try:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    status = int(pytest.main(words))
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == '__main__':
  main()

"""`python tests/smoke.py DIR`: the whole demo in a minute or two, with a tiny language model.

MovieLens-100K is real; the models are of random weights and trained for a few steps, so that the
figures mean nothing. What is to be seen is that every stage works.
"""

import os
import sys
from pathlib import Path

# A script has its own folder on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ilm_jax.demo import demo
from ilm_jax.errors import UsageError
from tests.support import tiny_run


def smoke(directory: Path) -> None:
  """Runs the demo into a directory, or goes on with it; DIR/lm is the language model."""
  # Most of the time goes into compiling programs that then run for moments.
  os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
  lm = directory / 'lm'
  if not lm.exists():
    tiny_run.write_lm(lm)
  demo(output=directory, lm=str(lm), smoke=True)


if __name__ == '__main__':
  if len(sys.argv) != 2:
    sys.exit('usage: python tests/smoke.py DIR')
  try:
    smoke(Path(sys.argv[1]))
  except UsageError as error:
    sys.exit(str(error))

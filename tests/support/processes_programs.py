"""What `runtime/processes_test.py` runs as processes: some runs, one after another, of one group.

python processes_programs.py FILE [--multiprocess ...]: FILE has [[command, settings], ...].
"""

import json
import sys
from pathlib import Path

from ilm_jax.runtime import processes
from ilm_jax.runtime.tensorflow import import_tensorflow


def run(command: str, settings: dict) -> None:
  """Calls a command as a library, with the model_dir that `ilm` would make of a string."""
  import_tensorflow()
  from ilm_jax.evaluate import evaluate
  from ilm_jax.train import train

  paths = {
    name: Path(settings[name]) for name in ('model_dir', 'data', 'output') if name in settings
  }
  {'train': train, 'evaluate': evaluate}[command](**settings | paths)


if __name__ == '__main__':
  file, *words = sys.argv[1:]
  cluster, _ = processes.take_flags(words)
  with processes.joined(cluster, stops_on_sigterm=True):
    for command, settings in json.loads(Path(file).read_text()):
      run(command, settings)

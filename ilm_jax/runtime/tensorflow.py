"""TensorFlow for reading data: without a GPU, and without what it prints while it is loaded."""

import os
import re
import sys
import tempfile

# 'I0000 00:00:1795.31 21225 cudart_stub.cc:31] Could not find cuda drivers ...': no log level
# applies before the library that has them is there.
_NOISE = re.compile(
  rb'I0000 |WARNING: All log messages before absl::InitializeLog|E0000 .* failed call to cuInit'
)


def import_tensorflow() -> None:
  """Imports it; of what goes to stderr meanwhile, lines that tell nothing are left out.

  GPUs are JAX's: TensorFlow would take all of their memory.
  """
  if 'tensorflow' in sys.modules:
    return
  sys.stderr.flush()
  saved = os.dup(2)
  with tempfile.TemporaryFile() as captured:
    os.dup2(captured.fileno(), 2)
    try:
      import tensorflow
      import tensorflow_text  # noqa: F401  # pyright: ignore[reportUnusedImport]

      tensorflow.config.set_visible_devices([], 'GPU')
    finally:
      os.dup2(saved, 2)
      os.close(saved)
      captured.seek(0)
      lines = [line for line in captured if not _NOISE.match(line)]
      os.write(2, b''.join(lines))

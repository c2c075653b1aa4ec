"""What is imported before a command answers: TensorFlow alone takes seconds of every start."""

import subprocess
import sys

# In one process, since each of these waits for JAX.
_COMMANDS = """
import sys
from ilm_jax.main import main

def loaded(*names):
  return [name for name in names if name in sys.modules]

run, lm, folder = sys.argv[1:]
request = folder + '/request.jsonl'
open(request, 'w').write('{"history": ["#f0", "#f5"]}')
words = ['recommend', '--model_dir=' + run, '--input=' + request, '--k=2']
for method in ('readout', 'exact'):
  assert main([*words, '--method=' + method, '--output=' + folder + '/' + method]) == 0
assert main(['complete', '--lm=' + lm, '--prompt=Film', '--max_new_tokens=2']) == 0
import ilm_jax.train  # what a step needs is traced before a batch is read
slow = 'tensorflow', 'seqio', 'tensorflow_datasets', 'clu', 'pandas', 'pyarrow', 'matplotlib'
assert not loaded(*slow), loaded(*slow)
"""


def test_recommending_and_completing_do_not_wait_for_tensorflow(run, tmp_path):
  words = [str(run), str(run.parent / 'lm'), str(tmp_path)]
  done = subprocess.run(
    [sys.executable, '-c', _COMMANDS, *words], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  assert {path.name for path in tmp_path.iterdir()} == {'request.jsonl', 'readout', 'exact'}

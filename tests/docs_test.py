"""The commands of the documentation work, in the order in which a reader runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / 'docs'
BLOCK = re.compile(r'```(python|bash)\n(.*?)```', re.DOTALL)


def test_add_a_domain(tmp_path: Path):
  environment = {**os.environ, 'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}'}
  output = ''
  for language, text in BLOCK.findall((DOCS / 'add_a_domain.md').read_text()):
    if language == 'python':
      name = re.match(r'# (\w+\.py)\n', text).group(1)
      (tmp_path / name).write_text(text)
      continue
    done = subprocess.run(
      ['bash', '-e', '-c', text], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f'{text}\n{done.stdout}\n{done.stderr}'
    output += done.stdout
  first, second = (
    (tmp_path / 'data' / name / 'dataset.json').read_text().split('"fingerprint": "')[1][:64]
    for name in ('books', 'books_again')
  )
  assert first == second
  assert re.search(r'decoder_target_tokens +\(8, 1120\)', output)
  assert (tmp_path / 'runs' / 'tiny' / 'checkpoints' / '4').is_dir()
  # What a domain has to write stays about 30 lines.
  code = [line for line in (tmp_path / 'my_books.py').read_text().splitlines() if line.strip()]
  assert len(code) <= 36


@pytest.mark.network
def test_language_models(capsys):
  (code,) = (text for _, text in BLOCK.findall((DOCS / 'language_models.md').read_text()))
  exec(compile(code, 'language_models.md', 'exec'), {})
  token, completion = capsys.readouterr().out.split('\n', 1)
  assert token == ' Paris'
  assert len(completion.split()) > 3

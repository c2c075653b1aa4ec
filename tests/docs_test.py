"""The commands of the documentation work, in the order in which a reader runs them."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from ilm_jax.main import main

DOCS = Path(__file__).parent.parent / 'docs'
BLOCK = re.compile(r'```(python|bash)\n(.*?)```', re.DOTALL)


def run(text: str):
  """Runs a block of one command in this process: a new one would spend seconds on imports."""
  program, *argv = shlex.split(text.replace('\\\n', ' '))
  if program == 'python':
    runpy.run_path(*argv, run_name='__main__')
  else:
    assert program == 'ilm'
    assert main(argv) == 0


@pytest.mark.parametrize('trained', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_add_a_domain(tmp_path: Path, monkeypatch, capsys, trained):
  """To compile a training takes a minute, and jobs_test trains with the same gin files."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', [str(tmp_path), *sys.path])  # as `python FILE` has it
  monkeypatch.delitem(sys.modules, 'my_books', raising=False)
  item_text = None
  for language, text in BLOCK.findall((DOCS / 'add_a_domain.md').read_text()):
    if language == 'python':
      name = re.match(r'# (\w+\.py)\n', text).group(1)
      (tmp_path / name).write_text(text)
    elif text.startswith('ilm train') and not trained:
      run(text.strip() + ' --print_config')
      item_text = re.search(r'--gin.ITEM_TEXT="(.*)"', text).group(1)
    else:
      run(text)
  output = capsys.readouterr().out
  first, second = (
    json.loads((tmp_path / 'data' / name / 'dataset.json').read_text())
    for name in ('books', 'books_again')
  )
  assert first['fingerprint'] == second['fingerprint']
  assert re.search(r'decoder_target_tokens +\(8, 1120\)', output)
  if trained:
    assert (tmp_path / 'runs' / 'tiny' / 'checkpoints' / '4').is_dir()
  else:
    assert item_text in output
    assert set(re.findall(r'{(\w+)}', item_text)) <= set(first['text_fields'])
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

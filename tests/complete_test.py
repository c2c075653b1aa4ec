"""`ilm complete`, run as a user does."""

import io

import pytest

from ilm_jax.main import main
from tests.support import tiny_gguf


@pytest.fixture
def model(tmp_path, monkeypatch):
  monkeypatch.setenv('ILM_CACHE', str(tmp_path / 'cache'))
  tiny_gguf.write_model(
    tmp_path / 'tiny.gguf',
    'llama',
    {'tokenizer.chat_template': '{% for m in messages %}{{ m.content }}{% endfor %}'},
  )
  return str(tmp_path / 'tiny.gguf')


def test_prompts_are_completed(model, capsys, monkeypatch):
  assert main(['complete', f'--lm={model}', '--prompt=ab', '--max_new_tokens=5']) == 0
  out, err = capsys.readouterr()
  assert out.startswith('ab')
  assert 'tokens for 1 prompt(s)' in err
  monkeypatch.setattr('sys.stdin', io.StringIO('ab\n\nba\n'))
  flags = ['--chat', '--temperature=1', '--top_k=3', '--int8', '--max_new_tokens=5']
  assert main(['complete', f'--lm={model}', *flags]) == 0
  out, err = capsys.readouterr()
  assert '2 prompt(s)' in err
  assert out.count('> ') == 2


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (["--prompt=''"], 'no prompt'),
    (['--prompt=a', '--temperature=-1'], 'temperature=-1'),
    (['--prompt=a', '--tokenizer=nowhere.json'], "tokenizer='nowhere.json'"),
    (['--prompt=a', '--max_new_tokens=1000'], 'trained for'),
  ],
)
def test_mistakes(model, flags, message, capsys):
  assert main(['complete', f'--lm={model}', *flags]) == 2
  assert message in capsys.readouterr().err

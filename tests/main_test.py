"""The `ilm` command: dispatch, exit statuses, and what importing it costs."""

import subprocess
import sys
from pathlib import Path

import pytest

import ilm_jax
from ilm_jax.config import flags as config_flags
from ilm_jax.main import COMMANDS, main

HEAVY = ('tensorflow', 'jax', 'gin', 'numpy', 'pandas', 'seqio')


def python(code: str) -> str:
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  return done.stdout


def test_importing_the_package_is_quick_and_loads_nothing_heavy():
  code = (
    'import sys, time; start = time.perf_counter(); import ilm_jax;'
    ' print(time.perf_counter() - start);'
    f' print([m for m in {HEAVY} if m in sys.modules])'
  )
  results = [python(code).splitlines() for _ in range(3)]
  assert min(float(seconds) for seconds, _ in results) < 0.2
  assert {loaded for _, loaded in results} == {'[]'}


@pytest.mark.parametrize('flag', ['--help', '--version', 'prepar'])
def test_help_version_and_mistakes_load_nothing_heavy(flag):
  code = (
    f'import sys; from ilm_jax.main import main; main([{flag!r}]);'
    f' print([m for m in {HEAVY} if m in sys.modules])'
  )
  assert python(code).splitlines()[-1] == '[]'


def test_the_help_of_a_command_loads_no_tensorflow():
  code = (
    'import sys\nfrom ilm_jax.main import main\ntry:\n  main(["prepare", "--help"])\n'
    'except SystemExit as done:\n  print(done.code, "tensorflow" in sys.modules)'
  )
  out = python(code)
  assert out.splitlines()[-1] == '0 False'
  for part in ('usage: ilm prepare', '--dataset', '--source.KEY=VALUE', '--ials_factors'):
    assert part in out


@pytest.mark.parametrize('argv', [[], ['--help'], ['-h'], ['help']])
def test_help(argv, capsys):
  assert main(argv) == 0
  out = capsys.readouterr().out
  for command, what in COMMANDS.items():
    assert f'  {command:<{max(map(len, COMMANDS))}}  {what}\n' in out
  assert max(map(len, out.splitlines())) <= 100


def test_version(capsys):
  assert main(['--version']) == 0
  assert capsys.readouterr().out == f'ilm_jax {ilm_jax.__version__}\n'


def test_unknown_command(capsys):
  assert main(['prepar', '--x=1']) == 2
  captured = capsys.readouterr()
  assert captured.out == ''
  assert captured.err == (
    "ilm: unknown command 'prepar'. Did you mean 'prepare'? Commands: prepare, embed, train,"
    ' evaluate, recommend, demo, compile, complete; `ilm --help` tells what they do.\n'
  )


def test_unknown_and_missing_flags(capsys):
  assert main(['prepare', '--dataste=ml100k']) == 2
  assert "'--dataste'. Did you mean '--dataset'?" in capsys.readouterr().err
  assert main(['prepare', '--dataset=ml100k']) == 2
  assert 'prepare.output is required: set it with --output=...' in capsys.readouterr().err


def test_print_config_does_nothing_else(capsys, tmp_path):
  assert main(['prepare', '--dataset=ml100k', f'--output={tmp_path}/out', '--print_config']) == 0
  assert f"prepare.output = '{tmp_path}/out'  # command line" in capsys.readouterr().out
  assert list(tmp_path.iterdir()) == []


def test_one_gin_file_serves_several_commands(capsys, tmp_path):
  file = tmp_path / 'job.gin'
  file.write_text(
    "prepare.dataset = 'ml100k'\nprepare.output = 'a'\nembed.data = 'a'\n"
    "train.data = 'a'\ntrain.total_steps = 5\ncomplete.prompt = 'a'\n"
    "evaluate.split = 'test'\nrecommend.k = 3\ndemo.seed = 1\ncompile.lm = 'a'\n"
  )
  outputs = {
    'prepare': 'output',
    'embed': 'output',
    'train': 'model_dir',
    'evaluate': 'model_dir',
    'recommend': 'model_dir',
    'demo': 'output',
    'compile': 'topology',
    'complete': 'lm',
  }
  assert set(outputs) == set(COMMANDS)
  for command, output in outputs.items():
    assert main([command, f'--gin_file={file}', f'--{output}=b', '--print_config']) == 0
    assert f"{command}.{output} = 'b'" in capsys.readouterr().out


def test_interrupts_and_errors(monkeypatch, capsys):
  def interrupted(*args, **kwargs):
    raise KeyboardInterrupt

  monkeypatch.setattr(config_flags, 'run', interrupted)
  assert main(['prepare']) == 130
  assert capsys.readouterr().err == 'ilm: interrupted\n'

  def broken(*args, **kwargs):
    raise ValueError('a bug keeps its traceback')

  monkeypatch.setattr(config_flags, 'run', broken)
  with pytest.raises(ValueError, match='traceback'):
    main(['prepare'])


def test_the_console_script_and_its_exit_status(tmp_path):
  ilm = Path(sys.executable).with_name('ilm')
  done = subprocess.run([ilm, 'prepar'], capture_output=True, text=True, cwd=tmp_path)
  assert done.returncode == 2
  assert done.stderr.startswith('ilm: unknown command')
  assert 'Traceback' not in done.stderr


def test_nothing_is_said_while_tensorflow_is_loaded():
  code = (
    'import sys\nfrom ilm_jax.main import main\ntry:\n  main(["evaluate", "--help"])\n'
    'except SystemExit:\n  assert "tensorflow" in sys.modules'
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert done.stderr == ''

"""The flags of a command: argv to a call."""

from pathlib import Path

import pytest

from ilm_jax.config import flags as config_flags
from ilm_jax.errors import UsageError


def prepare(
  *, dataset: str, output: Path, k_core: int = 5, resume: bool = False, share: float = 0.5
):
  """Prepares a data set: 100% of it.

  Args:
    dataset: its name.
  """
  return dataset, output, k_core, resume, share


def error(argv) -> str:
  with pytest.raises(UsageError) as caught:
    config_flags.parse_argv(prepare, argv)
  return str(caught.value)


def test_flags_of_the_function_need_no_gin_file():
  argv = ['--dataset=ml100k', '--output', '/tmp/x', '--k_core=1e1', '--share=1']
  assert config_flags.run(prepare, argv) == ('ml100k', Path('/tmp/x'), 10, False, 1.0)


@pytest.mark.parametrize(
  ('words', 'resume'),
  [
    ([], False),
    (['--resume'], True),
    (['--resume=true'], True),
    (['--resume=False'], False),
    (['--resume', '--k_core=3'], True),
  ],
)
def test_a_boolean_flag(words, resume):
  assert config_flags.run(prepare, ['--dataset=a', '--output=b', *words])[3] is resume


@pytest.mark.parametrize(
  ('words', 'k_core'),
  [
    (['--k_core=1', '--gin.prepare.k_core=2'], 2),
    (['--gin.prepare.k_core=2', '--k_core=1'], 1),
    (['--k_core=-3'], -3),
    (['--k_core', '-3'], -3),
  ],
)
def test_the_last_of_several_flags_wins(words, k_core):
  assert config_flags.run(prepare, ['--dataset=a', '--output=b', *words])[2] == k_core


def test_gin_files_search_paths_and_overrides(tmp_path):
  for name, text in {
    'one/a.gin': 'prepare.dataset = %NAME\nNAME = "x"',
    'two/b.gin': 'prepare.k_core = 7',
  }.items():
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text(text)
  got = config_flags.run(
    prepare,
    [
      f'--gin_search_paths={tmp_path}/one,{tmp_path}/two,',
      '--gin_file=a.gin',
      '--gin_file=b.gin',
      '--gin.NAME=k=v w',
      '--output=out',
    ],
  )
  assert got == ('k=v w', Path('out'), 7, False, 0.5)


def test_unknown_flags():
  assert "unknown flag '--datset'. Did you mean '--dataset'?" in error(['--datset=ml100k'])
  assert "unknown flag '--gin_fil'. Did you mean '--gin_file'?" in error(['--gin_fil=x'])
  assert "unknown flag '--data'." in error(['--data=x'])  # no abbreviations
  assert '(with its "=")' in error(['--gin.X', '3'])
  assert 'write --gin.NAME=VALUE' in error(['--gin.X'])


def test_missing_and_mistyped_flags_name_the_flag():
  message = error(['--k_core=many'])
  assert 'prepare.dataset is required: set it with --dataset=...' in message
  assert 'prepare.output is required: set it with --output=...' in message
  assert "prepare.k_core (command line) takes int, and 'many' is str." in message


def test_print_config_prints_and_does_not_call(capsys, tmp_path):
  def boom(*, model_dir: str, steps: int = 3):
    raise AssertionError('called')

  argv = [f'--model_dir={tmp_path}/run', '--print_config']
  assert config_flags.run(boom, argv) is None
  assert capsys.readouterr().out == (
    f'# What `boom` gets, from:\n# --gin.boom.model_dir={tmp_path}/run\n\n'
    f"boom.model_dir = '{tmp_path}/run'  # command line\nboom.steps = 3  # default\n"
  )
  assert not (tmp_path / 'run').exists()


def test_help_shows_the_docstring_and_every_flag(capsys):
  with pytest.raises(SystemExit) as caught:
    config_flags.run(prepare, ['--help'])
  assert caught.value.code == 0
  out = capsys.readouterr().out
  assert 'usage: ilm prepare' in out
  assert '100% of it' in out
  for part in ('--dataset', '--print_config', '--gin .NAME=VALUE', 'int, default 5'):
    assert part in out

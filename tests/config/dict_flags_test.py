"""Flags for one key of a dict: --source.user=reader_id."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ilm_jax.config import files as config_files
from ilm_jax.config import flags as config_flags
from ilm_jax.errors import UsageError


def prepare(
  *,
  source: dict[str, Any] | None = None,
  weights: Mapping[str, float] | None = None,
  k_core: int = 5,
):
  return source, weights, k_core


def run(*argv):
  return config_flags.run(prepare, argv)


def error(*argv) -> str:
  with pytest.raises(UsageError) as caught:
    run(*argv)
  return str(caught.value)


def test_values_are_typed_like_overrides():
  source, weights, k_core = run(
    '--source.interactions=a/b.csv',
    '--source.title_from_id=true',
    "--source.text_fields=['a', 'b']",
    '--source.user=007',
    '--source.rating=None',
    '--source.filter=a=b.c',
    '--source.limit=10',
    '--k_core=3',
    '--weights.news=1',
  )
  assert source == {
    'interactions': 'a/b.csv',
    'title_from_id': True,
    'text_fields': ['a', 'b'],
    'user': '007',
    'rating': None,
    'filter': 'a=b.c',
    'limit': 10,
  }
  assert weights == {'news': 1.0}
  assert isinstance(weights['news'], float)
  assert k_core == 3


def test_the_last_of_several_wins():
  assert run('--source.a=1', '--source.b=2', '--source.a=3')[0] == {'a': 3, 'b': 2}
  assert run('--source.a=1', "--source={'b': 2}")[0] == {'b': 2}
  assert run("--source={'b': 2}", '--source.a=1')[0] == {'a': 1, 'b': 2}
  assert run('--gin.prepare.source.a=1', '--source.b=2')[0] == {'a': 1, 'b': 2}
  assert run('--source=None', '--source.a=1')[0] == {'a': 1}


def test_keys_of_a_gin_file_stay(tmp_path):
  file = tmp_path / 'books.gin'
  file.write_text(
    "prepare.source = %SOURCE\nSOURCE = {'user': %USER, 'item': 'book'}\nUSER = 'u'\n"
  )
  argv = [f'--gin_file={file}', '--source.item=isbn', '--gin.USER=reader']
  assert run(*argv[:2])[0] == {'user': 'u', 'item': 'isbn'}
  for order in (argv, argv[::-1]):
    assert run(*order)[0] == {'user': 'reader', 'item': 'isbn'}
  assert run(*argv[:2], "--gin.SOURCE={'a': 1}")[0] == {'a': 1, 'item': 'isbn'}
  file.write_text("prepare.source = 'books'\n")
  assert f"prepare.source ({file}:1) takes dict[str, Any] | None, and 'books'" in error(*argv[:2])


def test_what_is_saved_reads_back(tmp_path):
  parsed, _ = config_flags.parse_argv(prepare, ['--source.a=x y', '--source.b=2'])
  parsed.save(tmp_path)
  for name in ('config.gin', 'operative_config.gin'):
    assert run(f'--gin_file={tmp_path / name}')[0] == {'a': 'x y', 'b': 2}
    assert '# --gin.prepare.source.a=x y' in (tmp_path / name).read_text()


def test_mistakes():
  assert error('--k_core.x=3') == (
    "ilm prepare: unknown flag '--k_core.x'. Did you mean '--k_core'? Flags: --gin_file,"
    ' --gin_search_paths, --help, --k_core, --print_config, --source, --weights and'
    ' --gin.NAME=VALUE (with its "=").'
  )
  assert 'prepare.k_core takes int, which has no keys' in error('--gin.prepare.k_core.x=3')
  assert "`prepare` has no parameter 'sorce'. Did you mean 'source'?" in error(
    '--gin.prepare.sorce.x=3'
  )
  assert '--source.a: write --source.KEY=VALUE' in error('--source.a', '3')
  assert '--source.=3: write --source.KEY=VALUE' in error('--source.=3')
  assert 'has no value' in error('--source.a=')
  message = error('--weights.news=many')
  assert 'prepare.weights (command line) takes Mapping[str, float] | None' in message
  assert "'many' is str" in message


def test_help_names_the_form(capsys):
  with pytest.raises(SystemExit):
    run('--help')
  assert '--source.KEY=VALUE' in capsys.readouterr().out


def test_a_command_finds_its_own_configuration(tmp_path):
  def save(*, output: Path):
    running = config_files.running()
    assert running is not None
    running.save(output)

  config_flags.run(save, [f'--output={tmp_path}/run'])
  assert config_files.running() is None
  assert f"save.output = '{tmp_path}/run'" in (tmp_path / 'run' / 'config.gin').read_text()

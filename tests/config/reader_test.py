"""Configuration against real gin files: resolution, provenance, errors, saving, isolation."""

import logging
import re
from pathlib import Path
from typing import Any, Literal

import gin
import pytest

from ilm_jax.config import files as config_files
from ilm_jax.config import reader as config
from ilm_jax.errors import UsageError
from tests.support.config_helpers import error, reparse, take, write


def train(
  *,
  model_dir: Path,
  total_steps: int,
  learning_rate: float = 1e-3,
  mesh: dict[str, int] | None = None,
  dtype: Literal['float32', 'bfloat16'] = 'float32',
  resume: bool = True,
  note: Any = None,
):
  return locals()


def evaluate(*, checkpoint: str, batch_size: int = 8):
  return locals()


@pytest.fixture
def layers(tmp_path, monkeypatch):
  """A job file over a run file, in the working directory."""
  write(
    tmp_path,
    runs__train=(
      '# Required\n'
      'MODEL_DIR = %gin.REQUIRED\n'
      'TOTAL_STEPS = %gin.REQUIRED\n'
      '\n'
      'PEAK = 0.1\n'
      'train:\n'
      '  model_dir = %MODEL_DIR\n'
      '  total_steps = %TOTAL_STEPS\n'
      "  mesh = {'data': 4, 'tensor': %TENSOR}\n"
      'train.learning_rate = %PEAK\n'
      'TENSOR = 2\n'
    ),
    jobs__phase1="include 'runs/train.gin'\nTOTAL_STEPS = 1e3\nevaluate.batch_size = %TOTAL_STEPS",
  )
  monkeypatch.chdir(tmp_path)
  return tmp_path


# ---------------------------------------------------------------- files, macros, overrides


def test_layers_then_overrides_resolve_to_typed_arguments(layers):
  parsed = config.parse(
    train,
    ['jobs/phase1.gin'],
    ['MODEL_DIR=/tmp/run', 'train.dtype=bfloat16', 'TENSOR=8'],
    other_commands=['evaluate'],
  )
  assert parsed.arguments == {
    'model_dir': Path('/tmp/run'),
    'total_steps': 1000,
    'learning_rate': 0.1,
    'mesh': {'data': 4, 'tensor': 8},
    'dtype': 'bfloat16',
    'resume': True,
    'note': None,
  }
  assert isinstance(parsed.arguments['total_steps'], int)
  assert parsed.call() == dict(parsed.arguments)
  assert parsed.warnings == ()


def test_later_file_and_later_override_win(tmp_path):
  write(tmp_path, a='take.value = 1', b='take.value = 2')
  files = [tmp_path / 'a.gin', tmp_path / 'b.gin']
  assert config.parse(take, files).call() == 2
  assert config.parse(take, reversed(files)).call() == 1
  assert config.parse(take, files, ['take.value=3', 'take.value=4']).call() == 4


def test_macro_may_be_declared_by_override_alone_when_a_file_uses_it(tmp_path):
  write(tmp_path, a='take.value = [%A, %B]\nB = %A')
  assert config.parse(take, [tmp_path / 'a.gin'], ['A=5']).call() == [5, 5]


def test_search_paths_come_after_the_working_directory(tmp_path, monkeypatch):
  write(tmp_path / 'here', x='take.value = "here"')
  write(tmp_path / 'one', x='take.value = "one"', y="include 'sub/z.gin'")
  write(tmp_path / 'two', x='take.value = "two"', sub__z='take.value = "z"')
  paths = [tmp_path / 'one', tmp_path / 'two']
  monkeypatch.chdir(tmp_path / 'here')
  assert config.parse(take, ['x.gin'], search_paths=paths).call() == 'here'
  monkeypatch.chdir(tmp_path)
  assert config.parse(take, ['x.gin'], search_paths=paths).call() == 'one'
  assert config.parse(take, ['x.gin'], search_paths=reversed(paths)).call() == 'two'
  assert config.parse(take, ['y.gin'], search_paths=paths).call() == 'z'


def test_one_file_may_be_included_twice_but_not_by_itself(tmp_path):
  write(tmp_path, base='A = 1', x="include 'base.gin'", y="include 'x.gin'\ninclude 'base.gin'")
  write(tmp_path, z='take.value = %A\ninclude "y.gin"', loop='include "pool.gin"')
  write(tmp_path, pool='# a loop\ninclude "loop.gin"')
  assert config.parse(take, ['z.gin'], search_paths=[tmp_path]).call() == 1
  message = error(take, ['loop.gin'], search_paths=[tmp_path])
  assert 'pool.gin:2: include' in message
  assert 'includes itself' in message


def test_missing_file_lists_tried_paths_and_the_nearest_name(layers, caplog):
  message = error(train, ['jobs/phase2.gin'])
  assert "--gin_file: no gin file 'jobs/phase2.gin'. Did you mean 'jobs/phase1.gin'?" in message
  assert str(layers / 'jobs/phase2.gin') in message
  assert str(config_files.gin_root() / 'jobs/phase2.gin') in message
  assert 'runs/train.gin' in error(train, ['runs/tran.gin'], search_paths=[layers])
  write(layers, bad="A = 1\ninclude 'runs/trian.gin'")
  assert (
    "bad.gin:2: include: no gin file 'runs/trian.gin'. Did you mean 'runs/train.gin'?"
    in error(train, ['bad.gin'])
  )
  assert 'Path not found' not in caplog.text


def test_bindings_of_another_command_are_kept_unchecked(layers):
  parsed = config.parse(
    train, ['jobs/phase1.gin'], ['MODEL_DIR=/r'], other_commands=['train', 'evaluate']
  )
  assert 'evaluate.batch_size = %TOTAL_STEPS' in parsed.text
  assert 'evaluate' not in parsed.operative_text
  message = error(train, ['jobs/phase1.gin'], ['evaluate.x=1'], other_commands=['evaluate'])
  assert '--gin.evaluate.x binds a parameter of `evaluate`, and this command is `train`' in message


# ---------------------------------------------------------------- what is misspelt


def test_misspelt_macro_override(layers):
  message = error(train, ['runs/train.gin'], ['MODEL_DIRR=/r', 'TOTAL_STEPS=3', 'MODEL_DIR=/r'])
  assert message == (
    "--gin.MODEL_DIRR: no gin file declares or uses a macro 'MODEL_DIRR'. Did you mean"
    " 'MODEL_DIR'? Macros: MODEL_DIR, PEAK, TENSOR, TOTAL_STEPS."
  )
  # The parameter's name without its function.
  assert "Did you mean 'train.total_steps'?" in error(train, overrides=['total_steps=3'])


def test_override_of_a_declared_but_unused_macro_is_an_error(tmp_path):
  write(tmp_path, a='LERNING_RATE = 1\ntake.value = %LEARNING_RATE\nLEARNING_RATE = 3')
  message = error(take, [tmp_path / 'a.gin'], ['LERNING_RATE=2'])
  assert '--gin.LERNING_RATE changes nothing' in message
  assert 'a.gin:1 sets the macro, and no argument of `take` uses it' in message


def test_override_that_only_another_command_uses_is_an_error(layers):
  write(layers, e='evaluate.batch_size = %SIZE\nSIZE = 3\ntake.value = 1')
  assert 'no argument of `take` uses it' in error(
    take, ['e.gin'], ['SIZE=4'], other_commands=['evaluate']
  )
  # A file may hold it: no error, and no warning, for something does use it.
  assert config.parse(take, ['e.gin'], other_commands=['evaluate']).warnings == ()


def test_unused_macro_of_a_file_is_a_warning(tmp_path, caplog):
  write(tmp_path, a='LERNING_RATE = 1\ntake.value = %LEARNING_RATE\nLEARNING_RATE = 3')
  with caplog.at_level(logging.WARNING):
    (warning,) = config.parse(take, [tmp_path / 'a.gin']).warnings
  assert 'a.gin:1: nothing uses the macro LERNING_RATE. Did you mean' in warning
  assert "'LEARNING_RATE'" in warning
  assert warning in caplog.text


@pytest.mark.parametrize(
  ('text', 'line', 'parts'),
  [
    ('\ntrain.total_stesp = 3', 2, ["no parameter 'total_stesp'", "'total_steps'?", 'model_dir']),
    ('train:\n  resume = True\n  dtpye = 3', 3, ["no parameter 'dtpye'. Did you mean 'dtype'?"]),
    ('# x\ntrian.resume = True', 2, ["'trian' is no function", "Did you mean 'train'?"]),
    ('trian:\n  resume = True', 2, ["Did you mean 'train'?"]),
    ('A = 1\nB = @trian', 2, ['@trian is no function', "Did you mean 'train'?"]),
    ('A = @evaluate', 1, ['@evaluate is another command than `train`']),
    ('A = @evaluate()', 1, ['@evaluate is another command than `train`']),
    ('eval/train.resume = True', 1, ['has a scope, and scopes are not used']),
    ('eval/A = True', 1, ['has a scope, and scopes are not used']),
    ('A = @eval/train', 1, ['has a scope, and scopes are not used']),
    ('A = true', 1, ["Failed to parse token 'true'", "Did you mean 'True'?"]),
    ('\nA = /tmp/run', 2, ["Unable to parse value: 'A = /tmp/run'", 'a string has quotes']),
    ('train.resume True', 1, ["expected ':' or '='"]),
    ('train:\n  resume = True\n dtype = 3', 3, ['unindent does not match']),
    ('include 3', 1, ['Expected file path']),
    ('import ilm_jax\nimport no_such_module.x', 2, ["no module 'no_such_module'", 'PYTHONPATH']),
    ('from __gin__ import dynamic_registration', 1, ['dynamic registration is not used here']),
    ('train.model_dir = %MODLE\nMODEL = 1', 1, ['macro %MODLE, which nothing sets', "'MODEL'?"]),
    ('train.model_dir = %gin.REQUIERD', 1, ["Did you mean 'gin.REQUIRED'?"]),
    ('A = %B\ntrain.model_dir = %A\nB = %A', 1, ['the macro A is defined by itself']),
  ],
)
def test_mistake_in_a_file_names_file_line_and_fix(tmp_path, text, line, parts):
  path = write(tmp_path, bad=text) / 'bad.gin'
  message = error(train, [path], other_commands=['evaluate'])
  assert f'{path}:{line}: ' in message
  for part in parts:
    assert part in message
  assert '<ast.' not in message


@pytest.mark.parametrize('text', ["A = 'abc", 'A = [1,\n2', 'A = {1: 2', "A = [1, 'b\n]"])
def test_an_unclosed_bracket_or_quote(tmp_path, text):
  # Which line is named differs between Python's tokenizers.
  path = write(tmp_path, bad=text) / 'bad.gin'
  assert re.match(rf'{path}:[123]: .*(closed|quotes)', error(take, [path]))


def test_error_inside_an_imported_module_is_not_hidden(tmp_path, monkeypatch):
  (tmp_path / 'my_domain_broken.py').write_text('import absent_dependency_of_mine\n')
  monkeypatch.syspath_prepend(tmp_path)
  path = write(tmp_path, a='import my_domain_broken') / 'a.gin'
  with pytest.raises(ModuleNotFoundError, match='absent_dependency_of_mine'):
    config.parse(take, [path])


# ---------------------------------------------------------------- types and required values


def test_wrong_types_are_reported_together_with_their_origin(layers):
  write(
    layers, bad="include 'runs/train.gin'\nTOTAL_STEPS = 'many'\ntrain.resume = 1\nTENSOR = 2.5"
  )
  message = error(train, ['bad.gin'], ['MODEL_DIR=/r', 'train.dtype=bfloat', 'PEAK=fast'])
  assert message.splitlines() == [
    "train.total_steps (TOTAL_STEPS, bad.gin:2) takes int, and 'many' is str.",
    "train.learning_rate (PEAK, command line) takes float, and 'fast' is str.",
    'train.mesh (runs/train.gin:9) takes dict[str, int] | None, and 2.5 is not a whole number.',
    "train.dtype (command line) takes Literal['float32', 'bfloat16'], and 'bfloat' is"
    " str. Did you mean 'bfloat16'?",
    'train.resume (bad.gin:3) takes bool, and 1 is int.',
  ]


def test_number_for_a_string_says_how_to_quote():
  message = error(evaluate, overrides=['evaluate.checkpoint=2024'])
  assert (
    'takes str, and 2024 is int. For a string: --gin.evaluate.checkpoint="\'2024\'".' in message
  )
  parsed = config.parse(evaluate, overrides=["evaluate.checkpoint='2024'"])
  assert parsed.arguments['checkpoint'] == '2024'


def test_all_required_values_are_reported_at_once_with_their_flags(layers):
  write(
    layers,
    job="include 'runs/train.gin'\ntrain.learning_rate = %gin.REQUIRED\nTENSOR = %T2\n"
    'T2 = %gin.REQUIRED',
  )
  assert error(train, ['job.gin']).splitlines() == [
    'MODEL_DIR is required (runs/train.gin:2): set it with --gin.MODEL_DIR=..., or bind it in a'
    ' gin file.',
    'TOTAL_STEPS is required (runs/train.gin:3): set it with --gin.TOTAL_STEPS=..., or bind it'
    ' in a gin file.',
    'T2 is required (job.gin:4): set it with --gin.T2=..., or bind it in a gin file.',
    'train.learning_rate is required (job.gin:2): set it with --gin.train.learning_rate=..., or'
    ' bind it in a gin file.',
  ]
  fixes = ['MODEL_DIR=/r', 'TOTAL_STEPS=1', 'T2=1', 'train.learning_rate=1']
  assert config.parse(train, ['job.gin'], fixes).arguments['mesh'] == {'data': 4, 'tensor': 1}


def test_parameters_without_default_or_binding_are_required():
  assert error(train).splitlines() == [
    'train.model_dir is required: set it with --model_dir=..., or in a gin file.',
    'train.total_steps is required: set it with --total_steps=..., or in a gin file.',
  ]


# ---------------------------------------------------------------- references and imports


def test_reference_to_a_function_of_an_imported_module(tmp_path, monkeypatch):
  (tmp_path / 'my_domain_schedules.py').write_text(
    'import gin\n@gin.configurable\ndef cosine(peak=1.0):\n  return ("cosine", peak)\n'
  )
  monkeypatch.syspath_prepend(tmp_path)
  text = (
    'import my_domain_schedules\ntake.value = [@cosine, @my_domain_schedules.cosine()]\n'
    'cosine.peak = %PEAK\nPEAK = 2.0\n'
  )
  path = write(tmp_path, a=text) / 'a.gin'
  parsed = config.parse(take, [path], ['PEAK=3.0'])
  function, result = parsed.call()
  assert function() == ('cosine', 3.0)
  assert result == ('cosine', 3.0)
  for saved in (parsed.text, parsed.operative_text):
    function, result = reparse(take, saved).call()
    assert function() == result == ('cosine', 3.0)
  assert "doesn't have a parameter named 'peek'" in error(take, [path], ['cosine.peek=1'])


# ---------------------------------------------------------------- what is saved


def test_saved_texts_say_what_was_asked_and_what_was_passed(layers):
  parsed = config.parse(
    train,
    ['jobs/phase1.gin'],
    ['MODEL_DIR=/r', 'train.note=two words'],
    other_commands=['evaluate'],
  )
  parsed.save(layers / 'new/run')
  assert sorted(path.name for path in (layers / 'new/run').iterdir()) == [
    'config.gin',
    'operative_config.gin',
  ]
  assert (layers / 'new/run/operative_config.gin').read_text() == (
    '# What `train` gets, from:\n'
    '# jobs/phase1.gin\n'
    '# --gin.MODEL_DIR=/r\n'
    '# --gin.train.note=two words\n'
    '\n'
    "train.model_dir = '/r'  # MODEL_DIR, command line\n"
    'train.total_steps = 1000  # TOTAL_STEPS, jobs/phase1.gin\n'
    'train.learning_rate = 0.1  # PEAK, runs/train.gin\n'
    "train.mesh = {'data': 4, 'tensor': 2}  # runs/train.gin\n"
    "train.dtype = 'float32'  # default\n"
    'train.resume = True  # default\n'
    "train.note = 'two words'  # command line\n"
  )
  for name in ('config.gin', 'operative_config.gin'):
    again = config.parse(train, [layers / 'new/run' / name], other_commands=['evaluate'])
    assert again.arguments == parsed.arguments
  # Macros live on in config.gin, so that a rerun can change them; saving again replaces.
  again = config.parse(train, ['new/run/config.gin'], ['TENSOR=16'], other_commands=['evaluate'])
  again.save(layers / 'new/run')
  assert 'TENSOR = 16' in (layers / 'new/run/config.gin').read_text()
  assert len(list((layers / 'new/run').iterdir())) == 2


def test_long_values_and_values_without_a_literal(tmp_path):
  def chat(
    *, prompts: list[str], paths: list[Path], limit: float = float('inf'), key: Any = object
  ):
    return prompts

  prompts = [f"What is 'item {i}' about, in one line?\n" for i in range(9)] + ['x' * 200, '#5 %A']
  parsed = config.parse(chat, overrides=[f'chat.prompts={prompts!r}', "chat.paths=['/a']"])
  assert '# chat.limit = inf (no gin literal)  # default' in parsed.operative_text
  assert "# chat.key = <class 'object'> (no gin literal)  # default" in parsed.operative_text
  assert parsed.arguments['paths'] == [Path('/a')]
  for text in (parsed.text, parsed.operative_text):
    assert reparse(chat, text).arguments == parsed.arguments


def test_a_multi_line_override_stays_inside_the_header_comment():
  parsed = config.parse(take, overrides=['take.value=a\ntake.value = 6'])
  for text in (parsed.text, parsed.operative_text):
    assert reparse(take, text).call() == 'a\ntake.value = 6'


# ---------------------------------------------------------------- one process, many parses


def test_parses_do_not_leak_into_each_other(tmp_path):
  write(tmp_path, a='take.value = %A\nA = 1', b='evaluate.batch_size = 1')
  first = config.parse(take, [tmp_path / 'a.gin'])
  config.parse(evaluate, [tmp_path / 'b.gin'], ['evaluate.checkpoint=x'])
  assert 'take.value is required' in error(take)
  assert "'evaluate' is no function" in error(take, [tmp_path / 'b.gin'])
  assert '@evaluate is no function' in error(take, overrides=['take.value=@evaluate'])
  assert 'no gin file declares or uses a macro' in error(take, overrides=['take.value=1', 'A=2'])
  assert first.call() == 1
  assert 'A = 1' in first.text


def test_a_function_may_be_registered_again_and_another_take_its_name(tmp_path):
  assert config.parse(take, overrides=['take.value=1']).call() == 1
  assert config.parse(take, overrides=['take.value=2']).call() == 2

  def impostor(*, other: int):
    return other

  impostor.__name__ = 'take'
  assert config.parse(impostor, overrides=['take.other=3']).call() == 3
  assert "`take` has no parameter 'other'" in error(take, overrides=['take.other=3'])


def test_ours_is_meant_where_another_library_registered_the_same_name():
  def train_of_another_library(lr=1):
    return lr

  with gin.config.interactive_mode():
    gin.external_configurable(train_of_another_library, name='train', module='t9x.train')
  parsed = config.parse(train, overrides=['train.total_steps=1', 'train.model_dir=/r'])
  assert parsed.arguments['total_steps'] == 1
  assert reparse(train, parsed.text).arguments == parsed.arguments


def test_errors_of_the_function_come_out_as_they_are():
  def boom(*, value: int):
    raise UsageError(f'value {value}')

  with pytest.raises(UsageError) as caught:
    config.parse(boom, overrides=['boom.value=1']).call()
  assert type(caught.value) is UsageError
  assert str(caught.value) == 'value 1'


def test_a_positional_parameter_is_the_programmers_mistake():
  def positional(steps: int):
    return steps

  with pytest.raises(TypeError, match=r'positional\(steps\): a command takes keyword-only'):
    config.parse(positional)

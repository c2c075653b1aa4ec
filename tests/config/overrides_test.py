"""The grammar of overrides: what a value on the command line means."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ilm_jax.config import reader as config
from tests.support.config_helpers import error, reparse, take, write


@pytest.mark.parametrize(
  ('text', 'value'),
  [
    ('10', 10),
    ('-1', -1),
    ('1e-4', 1e-4),
    ('1_000', 1000),
    ('0x10', 16),
    ('None', None),
    ('True', True),
    ('true', True),
    ('FALSE', False),
    ("'10'", '10'),
    ("'true'", 'true'),
    ('"a, b"', 'a, b'),
    ("'a' 'b'", 'ab'),
    ("''", ''),
    ('[1, 2]', [1, 2]),
    ("{'a': (1, None)}", {'a': (1, None)}),
    ('(1)', 1),
    ('/tmp/run', '/tmp/run'),
    ('gs://b/x', 'gs://b/x'),
    ('v5e:16x16', 'v5e:16x16'),
    ('ml100k', 'ml100k'),
    ('a,b', 'a,b'),
    ('1,2', '1,2'),
    ('a b', 'a b'),
    ('a=b', 'a=b'),
    ('5=3', '5=3'),
    ('10#3', '10#3'),
    ('5 # five', '5 # five'),
    ('007', '007'),
    ('1.0.0', '1.0.0'),
    ('50%', '50%'),
    ('none', 'none'),
    ('-', '-'),
    ('inf', 'inf'),
    ('$HOME', '$HOME'),
    ("it's", "it's"),
    ('say "no"', 'say "no"'),
    ('5\n6', '5\n6'),
    ('5\ntake.value = 6', '5\ntake.value = 6'),
    ('\n5', '\n5'),
    ("'two\\nlines'", 'two\nlines'),
    ('日本', '日本'),
    ('import os', 'import os'),
    ('a:b:', 'a:b:'),
  ],
)
def test_value_of_an_override(text, value):
  got = config.parse(take, overrides=[f'take.value={text}']).call()
  assert got == value
  assert type(got) is type(value)


def test_an_override_may_be_a_macro(tmp_path):
  path = write(tmp_path, a='take.value = 1\nA = 2') / 'a.gin'
  assert config.parse(take, [path], ['take.value=%A']).call() == 2
  message = error(take, [path], ['take.value=[%AA]'])
  assert message.startswith('command line: take.value uses the macro %AA, which nothing sets.')
  assert 'take.value is required (command line)' in error(
    take, overrides=['take.value=%gin.REQUIRED']
  )


def test_bare_and_quoted_strings_are_equal():
  bare, quoted = (
    config.parse(take, overrides=[f'take.value={text}']) for text in ('/tmp/run', "'/tmp/run'")
  )
  assert bare.arguments == quoted.arguments


@pytest.mark.parametrize('text', ['[1, 2', "'abc", '[train]', '(a)', '%', '@', '"a" "b" c', '{1'])
def test_a_broken_literal_is_an_error_not_a_string(text):
  message = error(take, overrides=[f'take.value={text}'])
  assert f'--gin.take.value={text}: opens like a literal' in message
  assert config.parse(take, overrides=[f'take.value={text!r}']).call() == text


@pytest.mark.parametrize('override', ['take.value=', 'take.value=  '])
def test_an_empty_value_is_an_error(override):
  assert 'the empty string is --gin.take.value="\'\'"' in error(take, overrides=[override])


@pytest.mark.parametrize('override', ['take.value', '=3', 'take value=3', 'a/take.value=3', '1x=3'])
def test_an_override_without_a_name_is_an_error(override):
  assert 'write --gin.NAME=VALUE' in error(take, overrides=[override])


SCALARS = st.none() | st.booleans() | st.integers() | st.text()
SCALARS |= st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
  SCALARS,
  lambda of: (
    st.lists(of, max_size=3) | st.tuples(of, of) | st.dictionaries(st.text(), of, max_size=3)
  ),
  max_leaves=8,
)


@given(VALUES)
def test_every_literal_survives_override_and_both_saved_texts(value):
  parsed = config.parse(take, overrides=[f'take.value={value!r}'])
  assert parsed.call() == value
  for text in (parsed.text, parsed.operative_text):
    again = reparse(take, text)
    assert again.call() == value
    assert type(again.call()) is type(value)

"""Values against annotations: what is taken, what is changed, what is refused."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Optional, Union

import pytest
from etils import epath

from ilm_jax.config.types import choices, convert, describe, parameters_of


@pytest.mark.parametrize(
  ('value', 'annotation', 'expected'),
  [
    (3, int, 3),
    (1e5, int, 100000),
    (-0.0, int, 0),
    (3, float, 3.0),
    (True, bool, True),
    ('a', str, 'a'),
    ('/a/b', Path, Path('/a/b')),
    ('/a/b', pathlib.PurePosixPath, pathlib.PurePosixPath('/a/b')),
    (Path('/a'), Path, Path('/a')),
    ('gs://b/x', epath.Path, epath.Path('gs://b/x')),
    (None, None, None),
    (None, int | None, None),
    (5, Optional[int], 5),  # noqa: UP045 - both spellings are in use
    (5.0, Union[int, None], 5),  # noqa: UP007
    (1e3, int | float, 1e3),  # taken unchanged by float, although int comes first
    (3, float | int, 3),
    ('x', Path | str, 'x'),
    ('x', Path | None, Path('x')),
    ('a', Literal['a', 1], 'a'),
    (1, Literal['a', 1], 1),
    ([1, 2.0], list[int], [1, 2]),
    ((1, 2), list[int], [1, 2]),
    ([1, 2], tuple[int, ...], (1, 2)),
    ([1, 'a'], tuple[int, str], (1, 'a')),
    ([], tuple[int, ...], ()),
    ((1,), tuple, (1,)),
    ((1, 2), Sequence[float], (1.0, 2.0)),
    ([[1], [2]], Sequence[tuple[float, ...]], [(1.0,), (2.0,)]),
    ({'a': 1}, dict[str, float], {'a': 1.0}),
    ({'a': [1]}, Mapping[str, Sequence[int]], {'a': [1]}),
    ({1: 2}, dict, {1: 2}),
    (len, Callable[..., Any], len),
    (object, Any, object),
  ],
)
def test_taken(value, annotation, expected):
  got = convert(value, annotation)
  assert got == expected
  assert type(got) is type(expected)


@pytest.mark.parametrize(
  ('value', 'annotation', 'message'),
  [
    (True, int, 'True is bool'),
    (False, float, 'False is bool'),
    (1, bool, '1 is int'),
    (1.5, int, '1.5 is not a whole number'),
    (float('inf'), int, 'inf is not a whole number'),
    (float('nan'), int, 'nan is not a whole number'),
    ('1', int, "'1' is str"),
    ('1', int | None, "'1' is str"),
    (1, str, '1 is int'),
    (None, str, 'None is None'),
    (1, None, '1 is int'),
    (1, Path, '1 is int'),
    ('gs://b/x', Path, 'is remote'),
    ('b', Literal['a'], "'b' is str"),
    (True, Literal[1], 'True is bool'),
    (1.0, Literal[1], '1.0 is float'),
    ('ab', list[str], "'ab' is str"),
    ('ab', Sequence[str], "'ab' is str"),
    ([1, 'a'], list[int], "'a' is str"),
    ((1, 2, 3), tuple[int, int], 'has 3 elements'),
    ({'a': '1'}, dict[str, int], "'1' is str"),
    ({1: 1}, dict[str, int], '1 is int'),
    ([1], dict[str, int], r'\[1\] is list'),
    (1, Callable[..., Any], '1 is int'),
    (1, complex, '1 is int'),
  ],
)
def test_refused(value, annotation, message):
  with pytest.raises(TypeError, match=message):
    convert(value, annotation)


@pytest.mark.parametrize(
  ('annotation', 'text'),
  [
    (int, 'int'),
    (Path | None, 'Path | None'),
    (Literal['a.b', 'c'], "Literal['a.b', 'c']"),
    (dict[str, Sequence[int]], 'dict[str, Sequence[int]]'),
  ],
)
def test_describe(annotation, text):
  assert describe(annotation) == text


def test_choices_of_a_union():
  assert choices(Literal['a', 'b'] | int | Literal['c']) == ['a', 'b', 'c']
  assert choices(list[Literal['a']]) == []


def test_parameters_of_reads_annotations_written_as_text():
  def command(*, steps: 'int', path: 'Path | None' = None, free=3):
    return steps, path, free

  found = parameters_of(command)
  assert found['steps'] == (int, found['steps'].default, True)
  assert found['path'] == (Path | None, None, False)
  assert found['free'] == (Any, 3, False)

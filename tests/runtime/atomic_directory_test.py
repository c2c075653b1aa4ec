"""A directory is complete or absent."""

import os

import pytest

from ilm_jax.errors import UsageError
from ilm_jax.runtime.atomic_directory import complete_or_absent, is_incomplete, leftovers


def test_it_appears_at_the_end_with_the_permissions_of_any_directory(tmp_path):
  target = tmp_path / 'a' / 'b'
  with complete_or_absent(target, 'a thing') as directory:
    assert directory.parent == target.parent
    assert is_incomplete(directory)
    assert not is_incomplete(target)
    assert leftovers(target) == [directory]
    assert str(os.getpid()) in directory.name
    (directory / 'sub').mkdir()
    (directory / 'sub' / 'file').write_text('x')
    assert not target.exists()
  assert (target / 'sub' / 'file').read_text() == 'x'
  assert leftovers(target) == []
  (tmp_path / 'plain').mkdir()
  assert target.stat().st_mode == (tmp_path / 'plain').stat().st_mode


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_removes_it(tmp_path, error):
  def make():
    with complete_or_absent(tmp_path / 'a', 'a thing') as directory:
      (directory / 'file').write_text('x')
      raise error

  with pytest.raises(error):
    make()
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('kind', ['directory', 'full', 'file', 'broken link'])
@pytest.mark.parametrize('when', ['before', 'meanwhile'])
def test_what_exists_stays(tmp_path, kind, when):
  target = tmp_path / 'a'

  def appear():
    if kind == 'file':
      target.write_text('mine')
    elif kind == 'broken link':
      target.symlink_to(tmp_path / 'nowhere')
    else:
      target.mkdir()
      if kind == 'full':
        (target / 'file').write_text('mine')

  if when == 'before':
    appear()

  def make():
    with complete_or_absent(target, 'a thing') as directory:
      assert when == 'meanwhile', 'the block must not be entered'
      (directory / 'file').write_text('x')
      appear()

  with pytest.raises(UsageError, match='exists already, and a thing is never overwritten'):
    make()
  assert [path.name for path in tmp_path.iterdir()] == ['a']
  if kind == 'full':
    assert (target / 'file').read_text() == 'mine'


def test_a_place_where_nothing_can_be_made(tmp_path):
  (tmp_path / 'file').write_text('x')
  with (
    pytest.raises(UsageError, match='cannot be made'),
    complete_or_absent(tmp_path / 'file' / 'a', 'a thing'),
  ):
    pass

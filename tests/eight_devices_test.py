"""All tests that need eight devices, in one process: JAX starts once, and compiles once."""

from pathlib import Path

import pytest

from tests.support import eight_devices

FILES = [
  file
  for file in sorted(Path(__file__).parent.rglob('*_test.py'))
  if '@eight_devices.needed' in file.read_text() and file != Path(__file__)
]


def test_those_of_every_change():
  eight_devices.run('not slow', FILES)


@pytest.mark.slow
def test_those_before_a_release():
  eight_devices.run('slow', FILES)

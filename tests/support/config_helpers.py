"""What the tests of the configuration share."""

import tempfile
from pathlib import Path
from typing import Any

import pytest

from ilm_jax.config import reader as config
from ilm_jax.errors import UsageError


def take(*, value: Any):
  """A command that takes anything, to see what an override means."""
  return value


def write(folder: Path, **files: str) -> Path:
  """Writes `a__b=text` to folder/a/b.gin."""
  for name, text in files.items():
    path = folder / f'{name.replace("__", "/")}.gin'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  return folder


def error(*args, **kwargs) -> str:
  with pytest.raises(UsageError) as caught:
    config.parse(*args, **kwargs)
  return str(caught.value)


def reparse(function, text):
  with tempfile.TemporaryDirectory() as folder:
    return config.parse(function, [write(Path(folder), again=text) / 'again.gin'])

"""The error that means "your input is wrong", and the spelling hint it carries."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
  """Something the user gave is wrong: a file, a column, a configuration key.

  The message names the key, where it came from, what is allowed and the likely fix.
  The `ilm` command prints it without a traceback and exits with status 2.
  """


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
  """Returns " Did you mean 'x'?" for the nearest of `allowed`, or an empty string."""
  near = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
  return f' Did you mean {near[0]!r}?' if near else ''

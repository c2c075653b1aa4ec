"""Names of tensors in the order in which people count."""

import re


def natural_order(name: str) -> list[tuple[int, str]]:
  """A key for `sorted` by which layer 10 stands after layer 9."""
  return [(int(part), '') if part.isdigit() else (-1, part) for part in re.split(r'[./]', name)]

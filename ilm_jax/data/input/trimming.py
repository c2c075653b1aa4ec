"""Batches without padding that none of their rows needs."""

import jax
import numpy as np
from jax.experimental import multihost_utils

from ilm_jax.data.input.model_features import PAD_VALUES

_LEAST = 16
# Features whose names begin alike are aligned, and cut together.
_ALIGNED = ('encoder_', 'decoder_', 'entity_')


def without_padding(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """This process's rows of a global batch, as long as its longest row needs, or a little longer.

  Lengths are powers of two, so that few are compiled, and the same in all processes, which must
  all call it.
  """
  lengths: dict[str, int] = {}
  for group in _ALIGNED:
    names = [name for name in batch if name.startswith(group)]
    longest = max((_longest(name, batch[name]) for name in names), default=0)
    if jax.process_count() > 1:
      longest = int(multihost_utils.process_allgather(np.array(longest)).max())
    lengths |= dict.fromkeys(names, max(_LEAST, 1 << (longest - 1).bit_length()))
  return {name: x[:, : lengths[name]] if name in lengths else x for name, x in batch.items()}


def _longest(name: str, rows: np.ndarray) -> int:
  """Of rows [B, T]: where padding begins in all of them."""
  there = np.flatnonzero((rows != PAD_VALUES.get(name, 0)).any(axis=0))
  return int(there[-1]) + 1 if len(there) else 0

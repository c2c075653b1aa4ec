"""The Q-Former that `train.item_encoder` asks for, in both phases."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from ilm_jax.config.types import make_dataclass
from ilm_jax.errors import UsageError, did_you_mean
from ilm_jax.modules.precision import multiplies_bfloat16
from ilm_jax.modules.qformer import SIZES, QFormerConfig


def qformer_config(
  options: Mapping[str, Any], platform: str | None = None, **decided: Any
) -> QFormerConfig:
  """A size with changes.

  Args:
    options: 'size', and fields of QFormerConfig; bf16_matmul may be None: where that is faster.
    platform: where it will run ('cpu', 'gpu', 'tpu'; by default where JAX runs), which decides
      whether its layers are scanned, and what None is.
    **decided: fields that the data decide.

  Raises:
    UsageError: an option is unknown, or decided by the data.
  """
  options = dict(options)
  size = options.pop('size', 'minilm')
  if size not in SIZES:
    raise UsageError(
      f'train.item_encoder.size={size!r}: one of {", ".join(SIZES)}.{did_you_mean(size, SIZES)}'
    )
  if given := [name for name in decided if name in options]:
    raise UsageError(f'train.item_encoder.{given[0]} is decided by the data: leave it out.')
  if 'bf16_matmul' in options and options['bf16_matmul'] is None:
    options['bf16_matmul'] = multiplies_bfloat16(platform)
  values = dataclasses.asdict(SIZES[size])
  values['scan_layers'] = (platform or jax.default_backend()) != 'cpu'
  return make_dataclass(QFormerConfig, values | options | decided, 'train.item_encoder')

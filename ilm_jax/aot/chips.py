"""What a TPU chip has, as published, and topologies of them by name.

Sources: the pages v5e, v5p, v6e and tpu7x of docs.cloud.google.com/tpu/docs (November 2026). Of a
chip's bidirectional interconnect bandwidth, half is what it can send while it receives as much.
"""

import dataclasses
import fnmatch
import importlib.util
import os
import re
import warnings
from collections.abc import Mapping
from importlib.metadata import requires, version
from typing import Any

from ilm_jax.errors import UsageError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Chip:
  """One JAX device: a chip, or half of a TPU7x, which is two devices.

  Attributes:
    flops: dense bfloat16, FLOP/s.
    hbm: bytes, as published in GB; the compiler's own limit is a little less than in GiB.
    hbm_bandwidth: bytes/s.
    ici_bandwidth: bytes/s that it sends to its neighbours, over all links.
    cycles: of its clock a second, from the FLOP/s and the multipliers of its matrix units.
    multipliers: of all matrix units.
    longest: chips along the longest side of the largest slice.
    example: of a topology.
  """

  flops: float
  hbm: float
  hbm_bandwidth: float
  ici_bandwidth: float
  multipliers: int
  longest: int
  example: str

  @property
  def cycles(self) -> float:
    return self.flops / (2 * self.multipliers)


# v5e: 4 units of 128 x 128; v5p: 2 cores of 4; v6e: 2 units of 256 x 256 at twice the products.
CHIPS: Mapping[str, Chip] = {
  'v5e': Chip(197e12, 16e9, 819e9, 200e9, 4 * 128**2, 16, 'v5e:16x16'),
  'v5p': Chip(459e12, 95e9, 2765e9, 600e9, 8 * 128**2, 28, 'v5p:4x4x4'),
  'v6e': Chip(918e12, 32e9, 1638e9, 400e9, 4 * 256**2, 16, 'v6e:16x16'),
  'tpu7x': Chip(2307e12 / 2, 96e9, 7380e9 / 2, 600e9 / 2, 4 * 256**2, 24, 'tpu7x:4x4x4'),
}
_ENVIRONMENT = {
  'JAX_PLATFORMS': 'cpu',
  'TPU_SKIP_MDS_QUERY': '1',  # there is no metadata server to ask
  'TPU_ACCELERATOR_TYPE': 'v5litepod-16',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # nothing is held that a second process could want
}


def prepare_environment() -> None:
  """Lets libtpu compile where there is no TPU; before JAX has looked for devices.

  Warnings and errors are those of `check_libtpu`.
  """
  check_libtpu()
  os.environ.update(_ENVIRONMENT)
  import jax

  jax.config.update('jax_platforms', 'cpu')  # JAX may have read the environment already
  # What was compiled without a TPU can be written to the cache, but not read from it.
  jax.config.update('jax_enable_compilation_cache', False)


def check_libtpu() -> None:
  """Warns where libtpu is not the one that goes with JAX.

  Raises:
    UsageError: it is not installed.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise UsageError(
      'ilm compile: libtpu, the compiler for TPUs, is not installed. It needs no TPU:'
      " pip install 'ilm_jax[tpu]'"
    )
  # 'libtpu==0.0.42.*; extra == "tpu"'
  asked = [re.match(r'libtpu==([\d.*]+)', line) for line in requires('jax') or ()]
  found, wanted = version('libtpu'), next((match[1] for match in asked if match), '*')
  if not fnmatch.fnmatch(found, wanted):
    warnings.warn(
      f'libtpu {found} is installed, but jax {version("jax")} goes with {wanted}: what one writes'
      " the other may not read. pip install 'ilm_jax[tpu]' brings the right one.",
      stacklevel=3,
    )


def chip_of(topology: str) -> Chip:
  """The chip of 'v5e:16x16'.

  Raises:
    UsageError: there is no such chip.
  """
  name = topology.partition(':')[0]
  if name not in CHIPS or ':' not in topology:
    examples = ', '.join(chip.example for chip in CHIPS.values())
    raise UsageError(
      f'--topology={topology}: CHIP:SIZE is needed, such as {examples}.{did_you_mean(name, CHIPS)}'
    )
  return CHIPS[name]


def devices_of(topology: str) -> list[Any]:
  """The devices of a topology, which can be compiled for and nothing else.

  Raises:
    UsageError: libtpu knows no such topology.
  """
  chip = chip_of(topology)
  if any(int(side) > chip.longest for side in re.findall(r'\d+', topology.partition(':')[2])):
    # The compiler, which does not refuse it, would abort.
    raise UsageError(
      f'--topology={topology}: no side of a slice has more than {chip.longest} chips, as in'
      f' {chip.example}.'
    )
  from jax.experimental import topologies

  try:
    return list(topologies.get_topology_desc(platform='tpu', topology_name=topology).devices)
  except Exception as error:  # whatever libtpu raises
    reason = str(error).splitlines()[0]
    raise UsageError(
      f'--topology={topology}: libtpu has no such topology: {reason} Sizes are even, as in'
      f' {chip.example}.'
    ) from error

"""The best that this machine does: a large matrix product through XLA and through torch."""

from collections.abc import Iterator

from paired import Run, Side, compare
from table import Row, timed

from ilm_jax.modules.precision import multiplies_bfloat16

SIZE = 2048
PRODUCTS = 8  # a call
FLOPS = 2.0 * SIZE**3 * PRODUCTS


def xla(dtype: str) -> Run:
  import jax
  import jax.numpy as jnp

  # The form of bfloat16 that is fast on a CPU has its sums in float32 (ilm_jax.modules.layers).
  product = jax.jit(lambda x, w: jnp.matmul(x, w, preferred_element_type=jnp.float32))
  x, w = jax.random.normal(jax.random.key(0), [2, SIZE, SIZE]).astype(dtype)

  def run() -> dict[str, float]:
    for _ in range(PRODUCTS):
      out = product(x, w)
    out.block_until_ready()
    return {}

  return run


def torch(dtype: str) -> Run:
  import torch

  x, w = torch.randn([2, SIZE, SIZE]).to(getattr(torch, dtype))

  def run() -> dict[str, float]:
    for _ in range(PRODUCTS):
      torch.matmul(x, w)
    return {}

  return run


def rows(rounds: int) -> Iterator[tuple[str, Row]]:
  """Yields a precision and its row; the best precision of this machine comes last."""
  # Without instructions for it, torch needs minutes for a product in bfloat16.
  for dtype in ('float32', 'bfloat16') if multiplies_bfloat16('cpu') else ('float32',):
    found = compare(
      {
        'ours': Side(__file__, 'xla', {'dtype': dtype}, 2),
        'peer': Side(__file__, 'torch', {'dtype': dtype}, 2),
      },
      rounds,
    )
    row = timed(
      f'matrix product {SIZE} x {SIZE}, {dtype}: XLA, torch',
      found,
      note='the others are a fraction of the better of the two',
    )
    ours, peer = (FLOPS / found[name].median / 1e9 for name in ('ours', 'peer'))
    yield dtype, row._replace(unit='GFLOP/s', ours=ours, peer=peer, memory_ratio=None)

"""Prefill and decoding speed of a decoder of SmolLM2-135M's shape, against transformers on torch.

  python tests/benchmarks/lm_decoding.py [--rounds=5] [--prompt=256] [--new=64]

Both sides have the same random weights (ours are read from what transformers saves), the same
prompts, a KV cache, greedy choice, and all cores. In one process they take turns, round by round:
the time to the first token, and to all new tokens; decoding is the difference. Printed are medians
over the rounds, with the least and the most. What else runs on the machine slows torch more than
XLA: look at the spread.
"""

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ilm_jax.decoding.sampling import SamplingOptions, generate
from ilm_jax.lm.load import load_lm
from ilm_jax.modules.layers import Compute
from ilm_jax.modules.precision import multiplies_bfloat16

SMOLLM2_135M = dict(
  vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
  num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=8192,
  rope_parameters={'rope_type': 'default', 'rope_theta': 1e5}, tie_word_embeddings=True,
)  # fmt: skip
COMPUTE = {
  'float32': Compute(scan_layers=False),
  'bfloat16': Compute(param_dtype=jnp.bfloat16, bf16_matmul=True, scan_layers=False),
}


class Side(NamedTuple):
  """run(prompts, n): n new tokens [B, n]; it returns when they are there."""

  name: str
  run: Callable[[np.ndarray, int], np.ndarray]


def torch_side(model, dtype: str) -> Side:
  import torch

  model = model.to(getattr(torch, dtype))

  def run(prompts: np.ndarray, new: int) -> np.ndarray:
    tokens = torch.tensor(prompts)
    with torch.inference_mode():
      made = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
      )
    return made[:, prompts.shape[1] :].numpy()

  return Side('transformers', run)


def our_side(directory: Path, dtype: str, max_new_tokens: int) -> Side:
  model = load_lm(str(directory), compute=COMPUTE[dtype])
  program = jax.jit(functools.partial(generate, model.module), static_argnames='max_new_tokens')

  def run(prompts: np.ndarray, new: int) -> np.ndarray:
    lengths = np.full(len(prompts), prompts.shape[1], np.int32)
    options = SamplingOptions(max_new_tokens=new).traced()
    out = program(model.params, prompts, lengths, options, max_new_tokens=max_new_tokens)
    return np.asarray(out.tokens)[:, :new]

  return Side('ilm_jax', run)


def measure(side: Side, prompts: np.ndarray, new: int) -> tuple[float, float]:
  """Prompt tokens a second until the first new token, and new tokens a second from then on."""
  time.sleep(0.3)  # threads of the other side stop waiting for work
  start = time.perf_counter()
  side.run(prompts, 1)
  first = time.perf_counter()
  side.run(prompts, new)
  decoding = (time.perf_counter() - first) - (first - start)
  return prompts.size / (first - start), len(prompts) * (new - 1) / decoding


def shown(values: list[float]) -> str:
  return f'{statistics.median(values):7,.0f} ({min(values):,.0f} to {max(values):,.0f})'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--prompt', type=int, default=256)
  parser.add_argument('--new', type=int, default=64)
  parser.add_argument('--batches', type=int, nargs='+', default=[1, 8])
  # Without instructions for it, torch needs minutes for a product in bfloat16.
  usual = ['float32', 'bfloat16'] if multiplies_bfloat16('cpu') else ['float32']
  parser.add_argument('--dtypes', nargs='+', choices=sorted(COMPUTE), default=usual)
  arguments = parser.parse_args()

  import torch
  import transformers

  torch.set_num_threads(os.cpu_count() or 1)
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMOLLM2_135M)).eval()
  print(
    f'{os.cpu_count()} cores, jax {jax.__version__}, torch {torch.__version__}, transformers'
    f' {transformers.__version__}; prompts of {arguments.prompt}, {arguments.new} new tokens,'
    f' {arguments.rounds} rounds: median (least to most)'
  )
  print('| precision | rows | side | prefill, tokens/s | decoding, tokens/s | same tokens |')
  print('|---|---|---|---|---|---|')
  with tempfile.TemporaryDirectory() as directory:
    model.save_pretrained(directory)
    for dtype in arguments.dtypes:
      ours = our_side(Path(directory), dtype, arguments.new)
      theirs = torch_side(model, dtype)
      for rows in arguments.batches:
        prompts = np.random.default_rng(rows).integers(5, 49_000, (rows, arguments.prompt))
        outputs = [side.run(prompts, arguments.new) for side in (ours, theirs)]  # compiles ours
        same = np.mean(np.logical_and.accumulate(outputs[0] == outputs[1], axis=1))
        rates: dict[str, list[tuple[float, float]]] = {ours.name: [], theirs.name: []}
        for _ in range(arguments.rounds):
          for side in (ours, theirs):
            rates[side.name].append(measure(side, prompts, arguments.new))
        medians = {}
        for name, found in rates.items():
          prefill, decoding = (list(column) for column in zip(*found))
          medians[name] = [statistics.median(column) for column in (prefill, decoding)]
          print(f'| {dtype} | {rows} | {name} | {shown(prefill)} | {shown(decoding)} | |')
        ratios = [f'{a / b:.2f} x' for a, b in zip(medians[ours.name], medians[theirs.name])]
        print(f'| {dtype} | {rows} | ratio | {ratios[0]} | {ratios[1]} | {same:.0%} |', flush=True)


if __name__ == '__main__':
  main()

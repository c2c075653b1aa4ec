"""Makes hf_g2.npz and hf_g3.npz: a random tiny Gemma 2 and 3, and what transformers makes of ids.

  python tests/golden/gemma/make.py DIRECTORY

Needs the `torch` extra. Random numbers differ from version to version, and with them the files.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

_COMMON = dict(
  vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
  num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, max_position_embeddings=64,
  sliding_window=8, layer_types=['sliding_attention', 'full_attention'],
  attn_implementation='eager',  # the others leave out the soft cap
)  # fmt: skip


def model_of(family: int) -> torch.nn.Module:
  """2 or 3, random, float32."""
  if family == 2:
    model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**_COMMON))
  else:
    model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**_COMMON))
  with torch.no_grad():
    for parameter in model.parameters():  # scales of norms are vectors, and added to 1
      parameter.normal_(0, 0.2 if parameter.ndim == 2 else 0.1)
  return model.eval()


def values(model: torch.nn.Module, ids: np.ndarray) -> dict[str, np.ndarray]:
  """What a file has: `ids` [2, 20], `logits` [2, 20, 512], and the state dict."""
  with torch.no_grad():
    logits = model(torch.from_numpy(ids)).logits
  state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
  return {'ids': ids, 'logits': logits.numpy(), **state}


def main(directory: Path) -> None:
  directory.mkdir(parents=True)
  ids = np.random.default_rng(0).integers(5, 300, (2, 20))
  for family in (2, 3):
    torch.manual_seed(family)
    np.savez(directory / f'hf_g{family}.npz', **values(model_of(family), ids))


if __name__ == '__main__':
  main(Path(sys.argv[1]))

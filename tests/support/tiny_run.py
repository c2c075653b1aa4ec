"""A tiny language model and tiny data on disk, for runs of `ilm train` on real files."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from ilm_jax.runtime.metric_log import read_jsonl
from ilm_jax.tasks import recommendation

NUM_USERS, NUM_ITEMS, D_CF = 40, 30, 8
LAYERS, D_MODEL, D_MLP, HEADS, VOCAB = 2, 32, 48, 4, 400
GENRES = ('Crime', 'Comedy', 'Drama', 'Horror')
BOS, EOS, SLOT = '<s>', '</s>', '<empty_output>'
# How phase 2 reads the data in short rows.
TEXT = {
  'templates': 'templates_films.txt',
  'prefix': 'Films.\n',
  'history_length': 4,
  'sequence_length': 8,
  'max_text_tokens': 12,
  'max_inputs': 64,
  'max_targets': 32,
  'max_entities': 12,
}
# One template of each kind of task; `trained` reads them.
TEMPLATES = """
sequential; seen; After {history:soft} comes; {target}
sequential; unseen; {user} has seen {history}. Next:; {target}
straightforward; seen; What would {user:soft} like?; {target}
rating; seen; {user:soft} saw {history:soft} and rates {item:soft} with; {rating}
item_title; seen; The title of the film {item:soft} is; {item.title}
item_genres; seen; The genres of the film {item:soft} are; {item.genres}
"""


def write_lm(directory: Path, seed: int = 0) -> Path:
  """Writes a Llama of random weights as transformers saves it, with a tokenizer of its own."""
  directory.mkdir(parents=True)
  rng = np.random.default_rng(seed)

  def matrix(*shape: int) -> np.ndarray:
    return rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)

  tensors = {
    'model.embed_tokens.weight': matrix(VOCAB, D_MODEL),
    'model.norm.weight': np.ones(D_MODEL, np.float32),
  }
  for i in range(LAYERS):
    layer = {f'self_attn.{x}_proj': matrix(D_MODEL, D_MODEL) for x in 'qkvo'}
    layer |= {'mlp.gate_proj': matrix(D_MLP, D_MODEL), 'mlp.up_proj': matrix(D_MLP, D_MODEL)}
    layer |= {'mlp.down_proj': matrix(D_MODEL, D_MLP)}
    for name in ('input_layernorm', 'post_attention_layernorm'):
      layer[name] = np.ones(D_MODEL, np.float32)
    tensors |= {f'model.layers.{i}.{name}.weight': value for name, value in layer.items()}
  safetensors.numpy.save_file(tensors, directory / 'model.safetensors', {'format': 'pt'})
  config = {
    'model_type': 'llama',
    'num_hidden_layers': LAYERS,
    'hidden_size': D_MODEL,
    'num_attention_heads': HEADS,
    'num_key_value_heads': HEADS,
    'intermediate_size': D_MLP,
    'vocab_size': VOCAB,
    'max_position_embeddings': 512,
    'tie_word_embeddings': True,
  }
  (directory / 'config.json').write_text(json.dumps(config))
  _write_tokenizer(directory)
  return directory


def _write_tokenizer(directory: Path) -> None:
  """Byte-level BPE, trained on our templates and titles."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(  # pyright: ignore[reportCallIssue]
    vocab_size=VOCAB,
    special_tokens=[BOS, EOS, SLOT],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  # By name: a new file of templates would change every number of every run.
  files = [recommendation.TEMPLATES.with_name(f'templates{x}.txt') for x in ('', '_films')]
  texts = [file.read_text() for file in files]
  tokenizer.train_from_iterator([*texts, *map(title, range(NUM_ITEMS))], trainer)
  assert tokenizer.get_vocab_size() == VOCAB
  tokenizer.save(str(directory / 'tokenizer.json'))
  special = {'bos_token': BOS, 'eos_token': EOS, 'pad_token': EOS}
  (directory / 'tokenizer_config.json').write_text(json.dumps(special))


def title(item: int) -> str:
  return f'{GENRES[item % 4]} Film {item} ({1960 + item})'


def title_of_twins(item: int) -> str:
  """As `title`, but films 4 and 8 have the same one."""
  return title(4 if item == 8 else item)


def write_data(directory: Path, title: Callable[[int], str] = title) -> Path:
  """What `ilm prepare` makes of two CSV files: ratings of 40 users, 30 films of four genres.

  A user keeps to one genre, mostly, and goes through its films in one order: there is something to
  learn.
  """
  from ilm_jax.prepare import prepare

  rng = np.random.default_rng(0)
  directory.mkdir(parents=True)
  films = [f'f{i},{title(i)},{GENRES[i % 4]}' for i in range(NUM_ITEMS)]
  (directory / 'films.csv').write_text('\n'.join(['item,title,genres', *films]) + '\n')
  rows = ['user,item,timestamp,rating']
  for user in range(NUM_USERS):
    seen = [i for i in range(NUM_ITEMS) if i % 4 == user % 4 or rng.random() < 0.1]
    start = int(rng.integers(len(seen)))
    for time, item in enumerate(seen[start:] + seen[:start]):
      rows.append(f'u{user},f{item},{time},{rng.integers(1, 6)}')
  (directory / 'ratings.csv').write_text('\n'.join(rows) + '\n')
  return prepare(
    dataset='tabular',
    output=directory / 'prepared',
    source={
      'name': 'films',
      'interactions': str(directory / 'ratings.csv'),
      'items': str(directory / 'films.csv'),
      'rating': 'rating',
    },
    k_core=3,
    heldout_items=0.2,
    ials_factors=D_CF,
    rankers=False,
  )


def shared(tmp_path_factory: Any, name: str, make: Callable[[Path], None]) -> Path:
  """A directory that is made once for all of pytest's workers; for tests that only read it."""
  base = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    base = base.parent  # the workers' common directory
  folder, done = base / f'shared_{name}', base / f'shared_{name}.done'
  with open(base / f'shared_{name}.lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not done.exists():
      shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
      folder.mkdir()
      make(folder)
      done.touch()
  return folder


def trained(tmp_path_factory: Any) -> Path:
  """A run of phase 2: checkpoints at 4, 8 and 12, each measured.

  An MLP with two soft tokens, a readout and the catalogue loss; films 4 and 8 are twins.
  """

  def make(folder: Path) -> None:
    from ilm_jax.train import train

    train(model_dir=folder / 'run', **settings_of_trained(folder))

  return shared(tmp_path_factory, 'trained', make) / 'run'


def settings_of_trained(folder: Path) -> dict[str, Any]:
  """Settings of `train`; writes the data, the templates and the language model that they name."""
  (folder / 'templates.txt').write_text(TEMPLATES)
  return {
    'model': 'item_language',
    'data': write_data(folder / 'films', title_of_twins),
    'schedule': ['item_sequence', 'sequential_seen_title', 'items_title'],
    'batch_size': 8,
    'total_steps': 12,
    'item_encoder': {'kind': 'mlp', 'num_queries': 2},
    'losses': {'target_loss': {'sequential_seen_title': 'catalogue'}},
    'text': {
      'templates': str(folder / 'templates.txt'),
      'prefix': 'Films.\n',
      'neutral_prompt': 'One person saw films, and then',
      'history_length': 6,
      'sequence_length': 8,
      'max_text_tokens': 16,
      'max_inputs': 160,
      'max_targets': 64,
      'max_entities': 32,
      'eval_examples': 8,
    },
    'lm': {'name': str(write_lm(folder / 'lm'))},
    'learning_rate': 3e-2,
    'warmup_steps': 1,
    'eval_every': 4,
    'save_every': 4,
    'keep_latest': 10,
  }


def arrays_of(model_dir: Path, step: int) -> dict[str, np.ndarray]:
  """Every array of a checkpoint as Orbax itself reads it, by its path: 'params/gain'."""
  import orbax.checkpoint as ocp

  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    tree = reader.restore((model_dir / 'checkpoints' / str(step) / 'state').absolute())
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(x)
    for path, x in jax.tree.leaves_with_path(tree)
  }


def curves(model_dir: Path) -> list[dict]:
  """What metrics.jsonl says but for speed."""
  rows = read_jsonl(model_dir / 'metrics.jsonl')
  return [
    {k: v for k, v in row.items() if 'per_second' not in k and 'mfu' not in k} for row in rows
  ]

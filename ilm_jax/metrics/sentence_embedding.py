"""Sentence embeddings: texts to unit vectors, whose dot product says how alike two texts mean.

all-MiniLM-L6-v2 by default, computed by the Q-Former's text branch, which is a BERT: the mean of
the last states over the tokens of a text, '[CLS]' and '[SEP]' among them, scaled to length 1
(Reimers and Gurevych 2019, arXiv:1908.10084).
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import linen as nn

from ilm_jax.checkpoints import bert
from ilm_jax.errors import UsageError
from ilm_jax.modules import qformer

_MAX_TOKENS = 256  # of the model card; what comes after is cut off
_BUCKET = 16  # texts are padded to a multiple of it, so that few shapes are compiled
_TOKENS_PER_BATCH = 1024

_CONFIG_KEYS = {  # BERT's config.json -> QFormerConfig
  'num_hidden_layers': 'num_layers',
  'hidden_size': 'd_model',
  'num_attention_heads': 'num_heads',
  'intermediate_size': 'd_mlp',
  'vocab_size': 'vocab_size',
  'max_position_embeddings': 'max_text_length',
  'layer_norm_eps': 'layer_norm_epsilon',
}


class SentenceEmbedder:
  """Embeds texts by a BERT that was trained for it, with mean pooling.

  Args:
    name_or_path: 'minilm', or a checkpoint of `bert_files` with config.json and tokenizer.json.

  Attributes:
    dim: D, the length of a vector: 384 of MiniLM.

  Raises:
    UsageError: there is no such checkpoint, or a file of it is missing.
  """

  def __init__(self, name_or_path: str | os.PathLike[str]):
    files = bert.bert_files(name_or_path)
    if files.tokenizer is None or files.config is None:
      missing = 'config.json' if files.tokenizer else 'tokenizer.json'
      raise UsageError(
        f'sentence embeddings: no {missing} beside {files.weights}. Copy it there from where the'
        ' weights came from.'
      )
    config = _text_branch(files)
    self.dim = config.d_model
    self._tokenizer = _read_tokenizer(files.tokenizer)
    self._tokenizer.no_padding()
    self._tokenizer.enable_truncation(min(_MAX_TOKENS, config.max_text_length))
    module = qformer.QFormer(config)
    shapes = jax.eval_shape(module.init, jax.random.key(0), None, jnp.zeros((1, 1), jnp.int32))
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), nn.meta.unbox(shapes)['params'])
    weights = bert.load_bert(files.weights)
    params, _ = bert.init_qformer_from_bert(params, weights, files.config, str(files.weights))
    self._params = jax.device_put(params)
    self._embed = jax.jit(lambda params, *args: _embed(module, params, *args))

  @classmethod
  def minilm(cls) -> 'SentenceEmbedder':
    """all-MiniLM-L6-v2, fetched where it is not in the cache."""
    return cls('minilm')

  def embed(self, texts: Sequence[str]) -> np.ndarray:
    """Returns [n, D] float32 unit vectors, one per text; a text's does not depend on the others."""
    encodings = self._tokenizer.encode_batch(list(texts))
    lengths = np.array([len(encoding.ids) for encoding in encodings], np.int64)
    padded = -(-lengths // _BUCKET) * _BUCKET
    vectors = np.zeros((len(encodings), self.dim), np.float32)
    for length in np.unique(padded).tolist():
      members = np.flatnonzero(padded == length)
      batch = _TOKENS_PER_BATCH // length
      for start in range(0, len(members), batch):
        rows = members[start : start + batch]
        tokens = np.zeros((batch, length), np.int32)
        for row, place in zip(rows, tokens):
          place[: lengths[row]] = encodings[row].ids
        # Rows that are left over count as one token, so that nothing divides by 0.
        counts = np.ones(batch, np.int32)
        counts[: len(rows)] = lengths[rows]
        vectors[rows] = self._embed(self._params, tokens, counts)[: len(rows)]
    return vectors


def _embed(
  module: qformer.QFormer, params: Any, tokens: jax.Array, lengths: jax.Array
) -> jax.Array:
  """Tokens [B, T] and how many of each row are text, [B], to [B, D] unit vectors."""
  present = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
  mask = qformer.attention_mask('unimodal', 0, present)
  # A metric is to be the same number on a TPU, which multiplies in bfloat16 by default.
  with jax.default_matmul_precision('float32'):
    outputs: Any = module.apply({'params': params}, None, tokens, mask)
  states = outputs[1]
  mean = jnp.sum(states * present[..., None], axis=1) / lengths[:, None]
  return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
  try:
    return tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # tokenizers raises nothing narrower
    raise UsageError(f'{path}: cannot be read as a tokenizer: {error}.') from error


def _text_branch(files: bert.BertFiles) -> qformer.QFormerConfig:
  """The Q-Former whose text branch is this BERT."""
  config = files.config or {}
  missing = [key for key in _CONFIG_KEYS if key not in config]
  if missing:
    raise UsageError(
      f'sentence embeddings: config.json beside {files.weights} has no {", ".join(missing)}. Give'
      ' the config.json of a BERT.'
    )
  sizes = {name: config[key] for key, name in _CONFIG_KEYS.items()}
  # Any number of layers is a multiple of 1; without encoder tokens nothing cross-attends.
  return qformer.QFormerConfig(**sizes, cross_attention_every=1)

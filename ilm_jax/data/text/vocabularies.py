"""Vocabularies with a slot token: SeqIO vocabularies that can also tokenise a prompt in pieces.

A prompt is put together from pieces of text (the template's, the titles of items) that are
tokenised once and joined as tokens, with the slots of entities in between:

  'Toy Story'    first, with whatever the vocabulary puts at the start of a text
  ' (1995)'      later pieces begin with the space that separates them from what is before
  slot slot      num_soft_tokens times `slot_id`
  ','

`encode_segment` tokenises one such piece. Text that is split in front of whitespace gives, joined,
the tokens of the whole text: a prompt looks to the LM as if it had been tokenised at once.

Vocabularies read their file at first use, so that tasks can be registered before it is there.
Two of them are equal if the content of their files and their slot are, as SeqIO needs for mixtures.
Padding: SeqIO and the feature converter pad with 0 whatever `pad_id` is; loss weights, masks and
segment ids tell padding from a real token 0.
"""

import functools
import hashlib
import json
import re
import threading
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from ilm_jax.data.text.slot_vocabulary import (
  RESERVED,
  SLOT_CANDIDATES,
  SlotVocabulary,
  choose_slot,
  read_file,
)
from ilm_jax.errors import UsageError, did_you_mean
from ilm_jax.runtime.tensorflow import import_tensorflow

_SPACE = '\N{LOWER ONE EIGHTH BLOCK}'  # how SentencePiece writes a space
_USER_DEFINED = 4  # a type of pieces
_SPECIAL_BYTES = 3  # tokens before those of bytes: PAD, EOS, UNK
# Loading a SentencePiece model is not thread-safe, and tf.data calls from several threads.
_LOAD_LOCK = threading.Lock()

# Names that mean one thing only. '<|endoftext|>', for one, begins, ends or separates texts.
_KNOWN_NAMES = {
  'bos_token': ('<s>', '<bos>', '[CLS]', '<|begin_of_text|>'),
  'eos_token': ('</s>', '<eos>', '[SEP]', '<|end_of_text|>'),
  'pad_token': ('<pad>', '[PAD]', '<|pad|>'),
}


class ByteVocabulary(SlotVocabulary):
  """UTF-8 bytes (ByT5's vocabulary) and a slot: needs no file. For smoke tests and local runs.

  >>> vocabulary = ByteVocabulary()
  >>> vocabulary.encode_segment('Hé')
  [75, 198, 172]
  >>> vocabulary.slot_id, vocabulary.vocab_size
  (259, 260)

  Args:
    extra_ids: ids after the 259 of bytes and special tokens; the last of them is the slot.
  """

  bos_id, eos_id, unk_id = 0, 1, 2  # pyright: ignore[reportAssignmentType]

  def __init__(self, extra_ids: int = 1):
    if extra_ids < 1:
      raise UsageError(f'ByteVocabulary: extra_ids={extra_ids}; the slot needs 1 or more.')
    super().__init__(extra_ids)

  @property
  def _base_vocab_size(self) -> int:
    return _SPECIAL_BYTES + 256

  @property
  def slot_id(self) -> int:
    return self.vocab_size - 1

  @property
  def slot_token(self) -> str:
    return '<extra_id_0>'

  def encode(self, s: str | bytes) -> list[int]:
    return [byte + _SPECIAL_BYTES for byte in (s if isinstance(s, bytes) else s.encode())]

  def _encode_segment(self, text: str, first: bool) -> list[int]:
    return self.encode(text)

  def _decode(self, ids: Sequence[int]) -> str:
    found = [i - _SPECIAL_BYTES for i in ids if _SPECIAL_BYTES <= i < self._base_vocab_size]
    return bytes(found).decode(errors='ignore')

  def encode_tf(self, s: Any) -> Any:
    return self._in_seqio().encode_tf(s)

  def decode_tf(self, ids: Any) -> Any:
    return self._in_seqio().decode_tf(ids)

  def _in_seqio(self) -> Any:
    import_tensorflow()
    import seqio

    return seqio.ByteVocabulary(self.extra_ids)

  def _identity(self) -> tuple:
    return (self.extra_ids,)


class SentencePieceVocabulary(SlotVocabulary):
  """A SentencePiece model (Gemma, T5) and a slot.

  Args:
    model_file: path of the model, local or any that TensorFlow can read.
    slot_token: a reserved piece of the model, e.g. '<unused7>', or '<extra_id_N>'. By default the
      first of SLOT_CANDIDATES that exists: Gemma's '<unused0>', T5's '<extra_id_0>'.
    extra_ids: '<extra_id_N>' to add after the pieces of the model, as T5 does: 100.
  """

  def __init__(self, model_file: str, slot_token: str | None = None, extra_ids: int = 0):
    super().__init__(extra_ids)
    self.sentencepiece_model_file = str(model_file)
    self._slot_token = slot_token

  def __getstate__(self) -> dict[str, Any]:
    cached = ('sp_model', 'tokenizer', '_slot', '_seam', '_in_seqio')
    return {key: value for key, value in self.__dict__.items() if key not in cached}

  @functools.cached_property
  def sp_model(self) -> bytes:
    """The model, with the extra ids as pieces."""
    data = read_file('SentencePieceVocabulary: model_file', self.sentencepiece_model_file)
    proto = _model_proto(data)
    for i in reversed(range(self.extra_ids)):  # T5 numbers them from the end
      proto.pieces.add(piece=f'{_SPACE}<extra_id_{i}>', score=0.0, type=_USER_DEFINED)
    return proto.SerializeToString()

  @functools.cached_property
  def tokenizer(self) -> sentencepiece.SentencePieceProcessor:
    """The processor of the model."""
    return _processor(self.sp_model)

  @functools.cached_property
  def _in_seqio(self) -> Any:
    """SeqIO's vocabulary of the same file."""
    import_tensorflow()
    import seqio

    with _LOAD_LOCK:
      made = seqio.SentencePieceVocabulary(self.sentencepiece_model_file, self.extra_ids)
      made.load_model()
    return made

  @property
  def bos_id(self) -> int:
    bos_id = self.tokenizer.bos_id()
    return bos_id if bos_id >= 0 else self.pad_id

  @property
  def eos_id(self) -> int:
    return self.tokenizer.eos_id()

  @property
  def unk_id(self) -> int:
    return self.tokenizer.unk_id()

  @property
  def _base_vocab_size(self) -> int:
    return self.tokenizer.GetPieceSize()

  @property
  def vocab_size(self) -> int:
    return self._base_vocab_size  # the extra ids among them

  @property
  def slot_id(self) -> int:
    return self._slot[0]

  @property
  def slot_token(self) -> str:
    return self._slot[1]

  @functools.cached_property
  def _slot(self) -> tuple[int, str]:
    special = {self.pad_id, self.bos_id, self.eos_id, self.unk_id}
    ids: dict[str, int] = {}
    for i, piece in enumerate(_model_proto(self.sp_model).pieces):
      # The extra ids have a space in front, which is no part of their name.
      name = piece.piece.removeprefix(_SPACE)
      if i not in special and (piece.type != piece.NORMAL or RESERVED.search(name)):
        ids[name] = i
    where = f'SentencePieceVocabulary({self.sentencepiece_model_file}, extra_ids={self.extra_ids})'
    token = choose_slot(self._slot_token, list(ids), where, 'extra_ids=1 adds <extra_id_0>.')
    return ids[token], token

  @functools.cached_property
  def _seam(self) -> tuple[Any, Any, bool, bool]:
    """Returns (normaliser, encoder, whether texts begin with a space, whether runs collapse).

    The model's own rules about whitespace are about whole texts. So the work is done by two
    copies: one only normalises characters, the other only segments, and in between the rules
    are applied as they fit the place of the piece in its text.
    """
    proto = _model_proto(self.sp_model)
    spec = proto.normalizer_spec
    prefix, collapse = spec.add_dummy_prefix, spec.remove_extra_whitespaces
    spec.add_dummy_prefix = spec.remove_extra_whitespaces = False
    normalizer = _processor(proto.SerializeToString())
    spec.name, spec.precompiled_charsmap = 'identity', b''
    return normalizer, _processor(proto.SerializeToString()), prefix, collapse

  def encode(self, s: str | bytes) -> list[int]:
    return self.tokenizer.EncodeAsIds(s)

  def _encode_segment(self, text: str, first: bool) -> list[int]:
    normalizer, encoder, prefix, collapse = self._seam
    text = normalizer.normalize(text)
    if collapse:
      text = re.sub(f'{_SPACE}+', _SPACE, text)
      text = text.removeprefix(_SPACE) if first else text
    if first and prefix and text:
      text = _SPACE + text
    return encoder.encode(text)

  def _decode(self, ids: Sequence[int]) -> str:
    return self.tokenizer.DecodeIds([i for i in ids if i != self.slot_id])

  def encode_tf(self, s: Any) -> Any:
    return self._in_seqio.encode_tf(s)

  def decode_tf(self, ids: Any) -> Any:
    seqio_vocabulary = self._in_seqio
    import tensorflow as tf

    return seqio_vocabulary.decode_tf(tf.where(tf.equal(ids, self.slot_id), self.pad_id, ids))

  def _identity(self) -> tuple:
    return hashlib.sha256(self.sp_model).hexdigest(), self.slot_id


def _model_proto(data: bytes) -> Any:
  return sentencepiece_model_pb2.ModelProto.FromString(data)  # pyright: ignore[reportAttributeAccessIssue]


def _processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
  processor = sentencepiece.SentencePieceProcessor()
  with _LOAD_LOCK:
    processor.LoadFromSerializedProto(model)
  return processor


class HuggingFaceVocabulary(SlotVocabulary):
  """A Hugging Face `tokenizer.json` (SmolLM2, Llama, BERT, ...) and a slot.

  SmolLM2 has 49,152 tokens, among them ids 0 to 16 for chats and source code. Those for code
  serve as slots, and the LM knows their ids:

    HuggingFaceVocabulary(file, bos_token='<|im_start|>', eos_token='<|im_end|>')
    ->  slot_token '<empty_output>', slot_id 16

  Special tokens that are written out in a text, '<|im_start|>user' say, are recognised, as chat
  templates need. The file's post-processor, truncation and padding are not applied.

  Args:
    tokenizer_file: path of tokenizer.json, local or any that TensorFlow can read.
    slot_token: a special or reserved token of the file. By default the first of SLOT_CANDIDATES
      that exists.
    add_slot_token: add `slot_token`, which the file does not have, as a new last token. It makes
      vocab_size one greater; the LM's embedding table must have a row for it, as tables padded
      to a round size do, or the model must not look slots up.
    bos_token, eos_token, pad_token: tokens of the file, which does not say itself what its tokens
      are for. By default those with a name like '<s>', '</s>', '<pad>'; EOS stands in for PAD.
    unk_token: by default what the file says; byte-level vocabularies have none.
  """

  def __init__(
    self,
    tokenizer_file: str,
    slot_token: str | None = None,
    *,
    add_slot_token: bool = False,
    bos_token: str | None = None,
    eos_token: str | None = None,
    pad_token: str | None = None,
    unk_token: str | None = None,
  ):
    super().__init__()
    if add_slot_token and slot_token is None:
      raise UsageError('HuggingFaceVocabulary: add_slot_token=True needs the slot_token to add.')
    self._file = str(tokenizer_file)
    self._slot_token = slot_token
    self._add_slot_token = add_slot_token
    self._names = {
      'bos_token': bos_token,
      'eos_token': eos_token,
      'pad_token': pad_token,
      'unk_token': unk_token,
    }

  def __getstate__(self) -> dict[str, Any]:
    cached = ('_json', 'tokenizer', '_seam_tokenizer', 'slot_token', '_reserved', 'unk_id')
    cached += ('_base_vocab_size',)
    return {key: value for key, value in self.__dict__.items() if key not in cached}

  @functools.cached_property
  def _json(self) -> str:
    return read_file('HuggingFaceVocabulary: tokenizer_file', self._file).decode()

  @functools.cached_property
  def tokenizer(self) -> tokenizers.Tokenizer:
    """The tokenizer of the file, with the slot token."""
    return self._build(json.loads(self._json))

  @functools.cached_property
  def _seam_tokenizer(self) -> tokenizers.Tokenizer:
    """The same for text that is not the first: without what is put before a text."""
    spec = json.loads(self._json)
    for part in ('normalizer', 'pre_tokenizer'):
      spec[part] = _without_prefix(spec.get(part))
    return self._build(spec)

  def _build(self, spec: dict[str, Any]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if self._add_slot_token:
      name = str(self._slot_token)
      if tokenizer.token_to_id(name) is not None:
        raise UsageError(
          f'HuggingFaceVocabulary({self._file}): add_slot_token=True, but slot_token={name!r}'
          ' exists already. Leave add_slot_token out, or choose another name.'
        )
      tokenizer.add_special_tokens([name])
    return tokenizer

  @functools.cached_property
  def slot_token(self) -> str:
    hint = "add_slot_token=True adds slot_token='<slot>' as a new token."
    where = f'HuggingFaceVocabulary({self._file})'
    return choose_slot(self._slot_token, self._reserved, where, hint)

  @functools.cached_property
  def _reserved(self) -> list[str]:
    """Tokens that could be the slot."""
    taken = {self._named_id(name) for name in self._names}
    names = {i: token.content for i, token in self.tokenizer.get_added_tokens_decoder().items()}
    names |= {i: name for name, i in self.tokenizer.get_vocab().items() if RESERVED.search(name)}
    return [name for i, name in sorted(names.items()) if i not in taken]

  @property
  def slot_id(self) -> int:
    return cast(int, self.tokenizer.token_to_id(self.slot_token))

  def _named_id(self, name: str) -> int | None:
    """Returns the id of 'bos_token', ..., or None if it is neither given nor known by its name."""
    token = self._names[name]
    if token is not None:
      token_id = self.tokenizer.token_to_id(token)
      if token_id is None:
        raise UsageError(
          f'HuggingFaceVocabulary({self._file}): {name}={token!r} is no token of the file.'
          + did_you_mean(token, self._special_tokens())
        )
      return token_id
    known = (self.tokenizer.token_to_id(token) for token in _KNOWN_NAMES.get(name, ()))
    ids = [token_id for token_id in known if token_id is not None]
    return ids[0] if len(ids) == 1 else None

  def _required_id(self, name: str) -> int:
    token_id = self._named_id(name)
    if token_id is None:
      raise UsageError(
        f'HuggingFaceVocabulary({self._file}): the file does not say which token is {name}. Give'
        f' {name}, one of: {", ".join(self._special_tokens())}.'
      )
    return token_id

  def _special_tokens(self) -> list[str]:
    return [token.content for token in self.tokenizer.get_added_tokens_decoder().values()]

  @property
  def bos_id(self) -> int:
    return self._required_id('bos_token')

  @property
  def eos_id(self) -> int:
    return self._required_id('eos_token')

  @property
  def pad_id(self) -> int:
    pad_id = self._named_id('pad_token')
    return self.eos_id if pad_id is None else pad_id

  @functools.cached_property
  def unk_id(self) -> int | None:
    if self._names['unk_token'] is not None:
      return self._named_id('unk_token')
    model = json.loads(self._json)['model']
    if model.get('unk_id') is not None:  # Unigram
      return model['unk_id']
    unk_token = model.get('unk_token')
    return None if unk_token is None else self.tokenizer.token_to_id(unk_token)

  @functools.cached_property
  def _base_vocab_size(self) -> int:
    # Not the number of tokens: ids may have gaps.
    return max(self.tokenizer.get_vocab().values()) + 1

  def encode(self, s: str | bytes) -> list[int]:
    text = s.decode() if isinstance(s, bytes) else s
    return self.tokenizer.encode(text, add_special_tokens=False).ids

  def _encode_segment(self, text: str, first: bool) -> list[int]:
    if first:
      return self.encode(text)
    return self._seam_tokenizer.encode(text, add_special_tokens=False).ids

  def _decode(self, ids: Sequence[int]) -> str:
    # Not slot_id: text can be decoded where no token is fit to be a slot.
    slots = (
      [self._slot_token]
      if self._slot_token
      else [t for t in SLOT_CANDIDATES if t in self._reserved]
    )
    slot_id = self.tokenizer.token_to_id(slots[0]) if slots else None
    text_ids = [int(i) for i in ids if i != slot_id]
    return self.tokenizer.decode(text_ids, skip_special_tokens=True)

  def encode_tf(self, s: Any) -> Any:
    import_tensorflow()
    import tensorflow as tf

    def encode(text: bytes) -> np.ndarray:
      return np.array(self.encode(text), np.int32)

    return tf.ensure_shape(tf.numpy_function(encode, [s], tf.int32, stateful=False), [None])

  def decode_tf(self, ids: Any) -> Any:
    import_tensorflow()
    import tensorflow as tf

    def decode(ids: np.ndarray) -> np.ndarray:
      rows = ids.reshape(-1, ids.shape[-1])
      return np.array([self.decode(row).encode() for row in rows], object).reshape(ids.shape[:-1])

    texts = tf.numpy_function(decode, [ids], tf.string, stateful=False)
    return tf.ensure_shape(texts, ids.shape[:-1])

  def _identity(self) -> tuple:
    digest = hashlib.sha256(self._json.encode()).hexdigest()
    return digest, self.slot_token, self._add_slot_token, *self._names.values()

  def __str__(self) -> str:
    return f'HuggingFaceVocabulary({self._file}, slot_token={self.slot_token!r})'


def _without_prefix(part: dict[str, Any] | None, inner: bool = False) -> dict[str, Any] | None:
  """Removes from a normaliser or pre-tokeniser of tokenizer.json what acts on a text's start.

  A pre-tokeniser that is not the first of its sequence (`inner`) acts on every fragment that the
  ones before it made. It stays, or the fragments inside a piece would change too.
  """
  if part is None or part['type'] == 'Prepend':
    return None
  if part['type'] == 'Sequence':
    key = 'normalizers' if 'normalizers' in part else 'pretokenizers'
    fragments = key == 'pretokenizers'
    children = (_without_prefix(child, fragments and i > 0) for i, child in enumerate(part[key]))
    return {**part, key: [child for child in children if child is not None]}
  if part['type'] == 'ByteLevel' and not inner:
    return {**part, 'add_prefix_space': False}
  if part['type'] == 'Metaspace' and (not inner or part['prepend_scheme'] == 'first'):
    return {**part, 'prepend_scheme': 'never'}
  if part['type'] == 'Strip':
    return {**part, 'strip_left': False, 'strip_right': False}
  return part

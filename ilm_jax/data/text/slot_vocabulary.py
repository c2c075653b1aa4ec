"""What a vocabulary needs for prompts with entities: a slot token, and text in pieces."""

import abc
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ilm_jax.errors import UsageError, did_you_mean
from ilm_jax.runtime.tensorflow import import_tensorflow

# Tokens that models reserve for their users, or that plain text does not need, best first.
SLOT_CANDIDATES = (
  '<unused0>',  # Gemma
  '[unused0]',  # BERT
  '<extra_id_0>',  # T5
  '<|reserved_special_token_0|>',  # Llama 3
  '<|vision_pad|>',  # Qwen 2 and 3, whose text models do not see
  '<empty_output>',  # StarCoder and SmolLM: marks up code notebooks
  '<gh_stars>',
)
RESERVED = re.compile('unused|reserved|extra_id')


class SlotVocabulary(abc.ABC):
  """A SeqIO vocabulary with a slot token, which stands in a prompt for one soft token.

  It has what SeqIO asks of its own Vocabulary, and is none by inheritance: TensorFlow, whose import
  takes seconds, is imported by `encode_tf` and `decode_tf` alone.

  Decoding stops at the first EOS, as in SeqIO, and leaves out slots and special tokens.

  Attributes:
    slot_id, slot_token: the slot. Its embedding is replaced by a soft token, so the LM need not
      know it; but a slot_id beyond the rows of the LM's embedding table cannot be looked up.
    bos_id: what the decoder's input begins with. Never None: T5's kind has no BOS and uses 0.
    eos_id, pad_id, unk_id, vocab_size: SeqIO's.
  """

  def __init__(self, extra_ids: int = 0):
    self._extra_ids = extra_ids

  @property
  @abc.abstractmethod
  def bos_id(self) -> int: ...

  @property
  @abc.abstractmethod
  def eos_id(self) -> int: ...

  @property
  def pad_id(self) -> int:
    return 0

  @property
  @abc.abstractmethod
  def unk_id(self) -> int | None: ...

  @property
  def extra_ids(self) -> int:
    return self._extra_ids

  @property
  def vocab_size(self) -> int:
    return self._base_vocab_size + self.extra_ids

  @property
  @abc.abstractmethod
  def _base_vocab_size(self) -> int:
    """Without the extra ids that are not tokens of the file."""

  @property
  @abc.abstractmethod
  def slot_id(self) -> int: ...

  @property
  @abc.abstractmethod
  def slot_token(self) -> str: ...

  @abc.abstractmethod
  def _encode_segment(self, text: str, first: bool) -> list[int]: ...

  @abc.abstractmethod
  def _identity(self) -> tuple:
    """What makes two vocabularies of the same class equal."""

  @abc.abstractmethod
  def encode(self, s: str | bytes) -> list[int]:
    """Tokens of a whole text, without BOS and EOS."""

  @abc.abstractmethod
  def _decode(self, ids: Sequence[int]) -> str: ...

  def decode(self, ids: Iterable[int]) -> str:
    """The text of tokens, up to the first EOS."""
    unk_id, eos_id, size = self.unk_id, self.eos_id, self._base_vocab_size
    found = [int(i) for i in ids]
    if unk_id is not None:
      found = [unk_id if i >= size else i for i in found]
    if eos_id in found:
      found = found[: found.index(eos_id) + 1]
    return self._decode(found)

  @abc.abstractmethod
  def encode_tf(self, s: Any) -> Any:
    """`encode` as a TensorFlow op: a string [] -> int32 [n]."""

  @abc.abstractmethod
  def decode_tf(self, ids: Any) -> Any:
    """`decode` as a TensorFlow op: [..., n] -> strings [...]."""

  def encode_segment(self, text: str, first: bool = False) -> list[int]:
    """Tokenises a piece of text that will be joined with other pieces.

    With a SentencePiece model of T5's kind, whose texts begin with a space of their own:

      encode_segment('Toy Story', first=True)  ->  '▁Toy', '▁Story'
      encode_segment(' Toy Story')             ->  '▁Toy', '▁Story'
      encode_segment('Toy Story')              ->  'Toy', '▁Story'   (glued to what is before)

    The tokens of the pieces, joined, are those of the joined text if every piece but the first
    begins with the one whitespace character, or the whole run of them, that separates it from
    the piece before. They may differ (the text never does) where
      * two pieces meet inside a word or at punctuation: 'super' + 'man', '(1995)' + ',';
      * a run of whitespace is cut in two, or a piece ends with whitespace;
      * the vocabulary has tokens with whitespace in the middle or at the end ('of▁the');
      * a unigram model finds two segmentations of a word with scores equal up to rounding.
    Vocabularies that split a text into words before anything else (BERT's, the tokenizer.json of
    T5) begin a new word with every piece, also with one that is glued to what is before.

    Args:
      text: the piece; no BOS or EOS is added to it.
      first: whether it begins the text.

    Raises:
      UsageError: the text contains the slot token.
    """
    ids = self._encode_segment(text, first) if text else []
    if self.slot_id in ids:
      raise UsageError(
        f'the text {text!r} contains the slot token {self.slot_token!r}, which stands for entities'
        ' only. Remove it from the text or template, or choose another slot_token.'
      )
    return ids

  def __eq__(self, other: Any) -> bool:
    return type(self) is type(other) and self._identity() == other._identity()

  def __hash__(self) -> int:
    return hash(self._identity())


def read_file(key: str, path: str) -> bytes:
  """A file, local or any that TensorFlow can read ('gs://...').

  Raises:
    UsageError: there is none, which `key` was to name.
  """
  if '://' not in path:
    if not Path(path).exists():
      raise UsageError(f'{key}={path!r} does not exist.')
    return Path(path).read_bytes()
  import_tensorflow()
  import tensorflow as tf

  if not tf.io.gfile.exists(path):
    raise UsageError(f'{key}={path!r} does not exist.')
  with tf.io.gfile.GFile(path, 'rb') as file:
    return file.read()


def choose_slot(wanted: str | None, reserved: Sequence[str], where: str, hint: str) -> str:
  """Returns `wanted`, or the best of the tokens that no text needs; raises if there is none."""
  shown = ', '.join(reserved[:20]) + (', ...' if len(reserved) > 20 else '')
  if wanted is None:
    found = [token for token in SLOT_CANDIDATES if token in reserved]
    if not found:
      raise UsageError(
        f'{where} has none of the usual slot tokens ({", ".join(SLOT_CANDIDATES)}). Give'
        f' slot_token, a reserved token that no text contains: {shown or "(none)"}. Or {hint}'
      )
    return found[0]
  if wanted not in reserved:
    raise UsageError(
      f'{where}: slot_token={wanted!r} is not a reserved token. Allowed: {shown or "none"}.'
      f'{did_you_mean(wanted, reserved)} Or {hint}'
    )
  return wanted

"""What the file of a tokenizer does not say about itself: which tokens are for what."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from ilm_jax.errors import UsageError, did_you_mean

FILES = {'huggingface': 'tokenizer.json', 'sentencepiece': 'tokenizer.model'}


@dataclasses.dataclass(frozen=True)
class TokenizerFacts:
  """How a language model uses its tokenizer.

  Attributes:
    kind: which vocabulary of data/text/vocabularies.py reads the file, and which of FILES it is.
    bos_token, eos_token, pad_token: None where the model has none.
    slot_token: stands for entities; None leaves the choice to the vocabulary.
    add_bos: whether the model expects its texts to begin with BOS. A chat template writes it
      itself where it is wanted.
    stop_tokens: those that end what the model generates; EOS is one of them.
    chat_template: Jinja, as in Hugging Face's tokenizer_config.json; None for a base model.
  """

  kind: Literal['huggingface', 'sentencepiece']
  bos_token: str | None = None
  eos_token: str | None = None
  pad_token: str | None = None
  slot_token: str | None = None
  add_bos: bool = False
  stop_tokens: tuple[str, ...] = ()
  chat_template: str | None = None

  @property
  def file(self) -> str:
    """Name of the tokenizer's file."""
    return FILES[self.kind]

  def to_dict(self) -> dict[str, Any]:
    """For a JSON file."""
    return {**dataclasses.asdict(self), 'stop_tokens': list(self.stop_tokens)}

  @classmethod
  def from_dict(cls, values: Mapping[str, Any], where: str) -> 'TokenizerFacts':
    """What `to_dict` gave.

    Raises:
      UsageError: an unknown key or kind. `where` is the file, for the message.
    """
    allowed = [field.name for field in dataclasses.fields(cls)]
    for key in values:
      if key not in allowed:
        raise UsageError(
          f'{where}: unknown key {key!r} of a tokenizer; allowed: {", ".join(allowed)}.'
          + did_you_mean(key, allowed)
        )
    if values.get('kind') not in FILES:
      raise UsageError(
        f'{where}: kind={values.get("kind")!r} of a tokenizer; allowed: {", ".join(FILES)}.'
      )
    return cls(**{**values, 'stop_tokens': tuple(values.get('stop_tokens', ()))})

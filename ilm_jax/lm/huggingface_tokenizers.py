"""What a Hugging Face directory says about the tokenizer of its language model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from ilm_jax.errors import UsageError
from ilm_jax.lm.huggingface import read_json
from ilm_jax.lm.tokenizer_facts import TokenizerFacts

# What language models' tokenizers are called, best first: T5's spiece.model lacks the extra ids.
FILES = ('tokenizer.json', 'tokenizer.model', 'spiece.model')


def huggingface_tokenizer(directory: Path) -> tuple[TokenizerFacts, Path] | None:
  """The tokenizer beside a model: what it is like, and its file; None where there is none.

  Raises:
    UsageError: a file cannot be read.
  """
  for name in FILES:
    if (directory / name).is_file():
      return tokenizer_facts(directory / name), directory / name
  return None


def tokenizer_facts(file: Path) -> TokenizerFacts:
  """What is known of a tokenizer.json or a SentencePiece model, from the files beside it.

  Raises:
    UsageError: a file cannot be read.
  """
  path = file.parent / 'tokenizer_config.json'
  config = read_json(path) if path.is_file() else {}
  names = {f'{key}_token': _text(config.get(f'{key}_token')) for key in ('bos', 'eos', 'pad')}
  template = _chat_template(file.parent, config)
  if file.suffix != '.json':
    return TokenizerFacts(
      kind='sentencepiece',
      **names,
      add_bos=bool(config.get('add_bos_token', False)),
      stop_tokens=tuple(token for token in [names['eos_token']] if token),
      chat_template=template,
    )
  tokenizer = _read(file)
  first = tokenizer.encode('a').tokens[:1]
  return TokenizerFacts(
    kind='huggingface',
    **names,
    add_bos=names['bos_token'] is not None and first == [names['bos_token']],
    stop_tokens=_stop_tokens(file.parent, tokenizer, names['eos_token']),
    chat_template=template,
  )


def _read(file: Path) -> tokenizers.Tokenizer:
  try:
    return tokenizers.Tokenizer.from_file(str(file))
  except Exception as error:  # tokenizers raises nothing narrower
    raise UsageError(f'{file}: cannot be read as a tokenizer: {error}.') from error


def _text(token: Any) -> str | None:
  """A special token, which may be written with its properties."""
  return token['content'] if isinstance(token, Mapping) else token


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
  file = directory / 'chat_template.jinja'
  if file.is_file():
    return file.read_text()
  template = config.get('chat_template')
  if isinstance(template, list):  # several, by name
    template = next((t['template'] for t in template if t['name'] == 'default'), None)
  return template


def _stop_tokens(
  directory: Path, tokenizer: tokenizers.Tokenizer, eos_token: str | None
) -> tuple[str, ...]:
  """EOS, and what generation_config.json has besides, which is how chat models end a turn."""
  file = directory / 'generation_config.json'
  ids = read_json(file).get('eos_token_id') if file.is_file() else None
  ids = ids if isinstance(ids, list) else [ids] if ids is not None else []
  tokens = [eos_token, *(tokenizer.id_to_token(i) for i in ids)]
  return tuple(dict.fromkeys(token for token in tokens if token))

"""Tokenizers of GGUF files against transformers, which converts them in its own way."""

import re

import pytest
import sentencepiece
import tokenizers
from tokenizers import pre_tokenizers

from ilm_jax.data.prepare.fetch import fetch_package_file
from ilm_jax.lm import packages
from ilm_jax.lm.gguf_files import GgufSource
from ilm_jax.lm.gguf_tokenizers import write_tokenizer
from tests.lm.gguf_tokenizers_test import metadata_of, texts, train
from tests.support import tiny_gguf

pytestmark = pytest.mark.parity


def oracle_of(path):
  from transformers import AutoTokenizer

  return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def titles():
  """Those of MovieLens-100K."""
  path = fetch_package_file(
    'recbole==1.2.1',
    'recbole/dataset_example/ml-100k/ml-100k.item',
    '51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532',
  )
  return [line.split('\t')[1] for line in path.read_text().splitlines()[1:]]


@pytest.mark.parametrize('pre', ['gpt-2', 'llama-bpe'])
def test_byte_level(tmp_path, pre):
  path = tmp_path / 'model.gguf'
  model = {f'.{key}': value for key, value in tiny_gguf.METADATA['llama'].items()}
  tiny_gguf.write_gguf(path, 'llama', model | metadata_of(train(pre), pre), {})
  write_tokenizer(GgufSource(path), tmp_path)
  written, oracle = (
    tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json')),
    oracle_of(path),
  )
  for text in texts():
    assert written.encode(text).ids == oracle.encode(text, add_special_tokens=False), text


def test_qwen(tmp_path):
  """Of the tokenizer that transformers has for Qwen; its conversion of GGUF files forgets NFC."""
  from transformers import Qwen2Tokenizer

  path, original = tmp_path / 'model.gguf', train('qwen2')
  metadata = metadata_of(original, 'qwen2')
  tiny_gguf.write_gguf(path, 'qwen2', metadata, {})
  write_tokenizer(GgufSource(path), tmp_path)
  written = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
  oracle = Qwen2Tokenizer(
    vocab=original.get_vocab(),
    merges=[tuple(merge.split(' ')) for merge in metadata['tokenizer.ggml.merges']],
    additional_special_tokens=['<|im_start|>', '<|im_end|>', '<|reserved_special_token_0|>'],
  )
  oracle.add_tokens([tokenizers.AddedToken(tag, normalized=False) for tag in ('<think>', '    ')])
  for text in texts():
    assert written.encode(text).ids == oracle.encode(text, add_special_tokens=False), text


@pytest.mark.network
def test_smollm2(tmp_path):
  path = packages.fetch('smollm2_135m')
  write_tokenizer(GgufSource(path), tmp_path)
  written, oracle = (
    tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json')),
    oracle_of(path),
  )

  def unequal(tried):
    wrong = []
    for text in tried:
      ids = written.encode(text).ids
      if ids != oracle.encode(text, add_special_tokens=False):
        wrong.append(text)
      assert written.decode(ids, skip_special_tokens=False) == oracle.decode(ids) == text
    return wrong

  assert unequal(titles()) == []
  # transformers forgets that SmolLM cuts a text at every digit. Its vocabulary has no tokens with
  # one, so that this shows only where more than a space is in front of a digit.
  wrong = unequal(texts(2000))
  assert all(re.search(r'\s\s+[\d½²]|\s[½²]', text) for text in wrong)
  backend = oracle.backend_tokenizer
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
  )
  assert len(wrong) > 20
  assert unequal(texts(2000)) == []


@pytest.mark.network
def test_gemma3(tmp_path):
  path = packages.fetch('gemma3_270m')
  write_tokenizer(GgufSource(path), tmp_path)
  written = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / 'tokenizer.model'))
  oracle = oracle_of(path)
  chat = '<start_of_turn>user\nHi <b>there</b>, <unused7>!<end_of_turn>\n<start_of_turn>model\n'
  # Up to the longest piece of spaces. Beyond it, SentencePiece takes as many as it can, and the
  # merges that transformers makes up take half.
  spaces = [f'a{" " * n}b{" " * n}' for n in range(1, 32)]
  for text in [*titles(), *texts(2000), *spaces, chat]:
    ids = written.encode(text)
    assert ids == oracle.encode(text, add_special_tokens=False), text
    assert written.decode(ids) == oracle.decode(ids) == text

"""Tokenizers that are trained here, written to GGUF as llama.cpp's converter does, and read back.

The original is the oracle: the tokenizer must cut every text as it does.
"""

import io
import json
import random

import gguf
import pytest
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from ilm_jax.data.text import vocabularies
from ilm_jax.errors import UsageError
from ilm_jax.lm.gguf_files import GgufSource
from ilm_jax.lm.gguf_tokenizers import write_tokenizer
from ilm_jax.lm.tokenizer_facts import TokenizerFacts
from tests.support import tiny_gguf

CORPUS = [
  "It's 1995, and we'll see the Toy Story (1995) that they've made; I'M sure he'd like 12 of 345.",
  'The Good, the Bad and the Ugly (1966)... a movie of 161 minutes!!  Don\u2019t miss it.',
  'Crème brûlée, naïve café, Ünïcödé; 東京 物語 Ωmega при вет\n\n\nand\tsome\r\nmore   lines.',
  'for i in range(100):\n    if x[i] == "a":\n        return  x_i--',
] * 3
SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|reserved_special_token_0|>']
TAGS = ['<think>', '    ']
TURNS = ['<start_of_turn>', '<end_of_turn>']


def texts(count=400):
  rng = random.Random(0)
  parts = [
    *'aAbT.,!-/()"_\n\t\u00a0\u200b\u3000\x07',
    'the ',
    'The',
    ' movie',
    '  ',
    '    ',
    '\n\n',
  ]
  parts += ['\r\n', '1', '19', '1995', "'s", "'LL", '\u2019s', 'e\u0301', '<think>', '<|im_start|>']
  parts += ['é', 'ß', 'ﬁ', '東京', '😀', '👨\u200d👩\u200d👧', '½', '²', 'עב', 'हि', '<b>']
  mixed = [''.join(rng.choice(parts) for _ in range(rng.randint(1, 16))) for _ in range(count)]
  return ['', ' ', 'Toy Story (1995)', *CORPUS[:4], *mixed]


def split_then_bytes(pattern):
  split = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior='isolated')
  return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
# From the tokenizer.json of the releases: SmolLM2, Llama 3, Qwen 2.5.
LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
  r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
ORIGINALS = {
  'gpt-2': (None, GPT2),
  'smollm': (None, pre_tokenizers.Sequence([pre_tokenizers.Digits(True), GPT2])),
  'llama-bpe': (None, split_then_bytes(LLAMA3)),
  'qwen2': (normalizers.NFC(), split_then_bytes(LLAMA3.replace('{1,3}', ''))),
}


def train(pre):
  """A byte-level tokenizer, in which SPECIAL come first and TAGS last."""
  normalizer, pre_tokenizer = ORIGINALS[pre]
  tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == 'llama-bpe'))
  tokenizer.pre_tokenizer = pre_tokenizer
  tokenizer.decoder = decoders.ByteLevel()
  if normalizer is not None:
    tokenizer.normalizer = normalizer
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=480, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
  )
  tokenizer.train_from_iterator(CORPUS, trainer)
  tokenizer.add_tokens([tokenizers.AddedToken(tag, normalized=False) for tag in TAGS])
  return tokenizer


def metadata_of(tokenizer, pre):
  """What the converter writes for a byte-level tokenizer."""
  vocab = tokenizer.get_vocab()
  tokens = sorted(vocab, key=vocab.__getitem__)
  kinds = {
    **dict.fromkeys(SPECIAL, int(gguf.TokenType.CONTROL)),
    **dict.fromkeys(TAGS, int(gguf.TokenType.USER_DEFINED)),
  }
  return {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': pre,
    'tokenizer.ggml.tokens': tokens,
    'tokenizer.ggml.token_type': [kinds.get(token, 1) for token in tokens],
    'tokenizer.ggml.merges': [
      ' '.join(merge) for merge in json.loads(tokenizer.to_str())['model']['merges']
    ],
    'tokenizer.ggml.bos_token_id': 1,
    'tokenizer.ggml.eos_token_id': 2,
    'tokenizer.ggml.padding_token_id': 0,
    'tokenizer.chat_template': '{{ messages }}',
  }


def source_of(path, metadata):
  present = {key: value for key, value in metadata.items() if value is not None}
  return GgufSource(tiny_gguf.write_gguf(path, 'any', present, {}))


@pytest.mark.parametrize('pre', ORIGINALS)
def test_byte_level(tmp_path, pre):
  original = train(pre)
  facts = write_tokenizer(source_of(tmp_path / 'x.gguf', metadata_of(original, pre)), tmp_path)
  assert facts == TokenizerFacts(
    kind='huggingface',
    bos_token='<|im_start|>',
    eos_token='<|im_end|>',
    pad_token='<|endoftext|>',
    add_bos=pre == 'llama-bpe',
    stop_tokens=('<|im_end|>', '<|endoftext|>'),
    chat_template='{{ messages }}',
  )
  written = tokenizers.Tokenizer.from_file(str(tmp_path / facts.file))
  for text in texts():
    ids = original.encode(text).ids
    assert written.encode(text).ids == ids, text
    for skip in (True, False):
      decoded = written.decode(ids, skip_special_tokens=skip)
      assert decoded == original.decode(ids, skip_special_tokens=skip)
  assert written.get_vocab() == original.get_vocab()


def test_ways_of_cutting_differ():
  """So that equality with the one that is meant says something."""
  cuts = {}
  for pre, (_, pre_tokenizer) in ORIGINALS.items():
    cuts[pre] = [tuple(pre_tokenizer.pre_tokenize_str(text)) for text in texts()]
  names = list(cuts)
  for i, one in enumerate(names):
    for other in names[i + 1 :]:
      assert sum(a != b for a, b in zip(cuts[one], cuts[other])) > 20, (one, other)


@pytest.mark.parametrize(('pre', 'expected'), [('llama-bpe', ['abc']), ('gpt-2', ['ab', 'c'])])
def test_words_that_are_tokens(tmp_path, pre, expected):
  """Llama 3 has some that no merge makes."""
  metadata = {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': pre,
    'tokenizer.ggml.tokens': ['a', 'b', 'c', 'ab', 'abc'],
    'tokenizer.ggml.token_type': 5 * [1],
    'tokenizer.ggml.merges': ['a b'],
  }
  write_tokenizer(source_of(tmp_path / 'x.gguf', metadata), tmp_path)
  written = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
  assert written.encode('abc').tokens == expected


def train_sentencepiece(**options):
  """A SentencePiece model of Gemma's kind: runs of spaces and tags are pieces."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([line for text in CORPUS for line in text.splitlines() if line]),
    model_writer=model,
    model_type='bpe',
    vocab_size=520,
    byte_fallback=True,
    normalization_rule_name='identity',
    user_defined_symbols=['▁▁', '▁▁▁', '▁▁▁▁', '\n', '\n\n', '\t', '<b>', *TURNS],
    pad_id=0,
    eos_id=1,
    bos_id=2,
    unk_id=3,
    minloglevel=2,
    **options,
  )
  return model.getvalue()


def metadata_of_sentencepiece(model, add_space_prefix):
  """What the converter writes: user-defined pieces with real spaces, chat tokens as control."""
  proto = sentencepiece_model_pb2.ModelProto()
  proto.ParseFromString(model)
  defined = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
  tokens, kinds = [], []
  for piece in proto.pieces:
    tokens.append(piece.piece.replace('▁', ' ') if piece.type == defined else piece.piece)
    control = piece.piece in (*TURNS, '<unk>')
    kinds.append(int(gguf.TokenType.CONTROL) if control else piece.type)
  return {
    'tokenizer.ggml.model': 'llama',
    'tokenizer.ggml.pre': 'default',
    'tokenizer.ggml.tokens': tokens,
    'tokenizer.ggml.scores': [piece.score for piece in proto.pieces],
    'tokenizer.ggml.token_type': kinds,
    'tokenizer.ggml.bos_token_id': 2,
    'tokenizer.ggml.eos_token_id': 1,
    'tokenizer.ggml.unknown_token_id': 3,
    'tokenizer.ggml.padding_token_id': 0,
    'tokenizer.ggml.add_space_prefix': add_space_prefix,
  }


@pytest.mark.parametrize('prefix', [False, True])  # Gemma, Llama 2
def test_sentencepiece(tmp_path, prefix):
  model = train_sentencepiece(add_dummy_prefix=prefix, remove_extra_whitespaces=False)
  source = source_of(tmp_path / 'x.gguf', metadata_of_sentencepiece(model, prefix))
  facts = write_tokenizer(source, tmp_path)
  assert facts == TokenizerFacts(
    kind='sentencepiece',
    bos_token='<s>',
    eos_token='</s>',
    pad_token='<pad>',
    add_bos=True,
    stop_tokens=('</s>', '<end_of_turn>'),
  )
  original = sentencepiece.SentencePieceProcessor(model_proto=model)
  written = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / 'tokenizer.model'))
  for text in [*texts(), 'a  b   c    d     e      f', '<start_of_turn>user\nhi', '<b>x</b>']:
    ids = original.encode(text)
    assert written.encode(text) == ids, text
    assert written.decode(ids) == original.decode(ids)
  for name in ('pad_id', 'eos_id', 'bos_id', 'unk_id', 'vocab_size'):
    assert getattr(written, name)() == getattr(original, name)()


def test_end_of_turn_as_eos(tmp_path):
  """As in files of Gemma's chat models. Prompts spell it, so that it must be found in a text."""
  model = train_sentencepiece(add_dummy_prefix=False, remove_extra_whitespaces=False)
  metadata = metadata_of_sentencepiece(model, False)
  end = metadata['tokenizer.ggml.tokens'].index('<end_of_turn>')
  metadata['tokenizer.ggml.eos_token_id'] = end
  facts = write_tokenizer(source_of(tmp_path / 'x.gguf', metadata), tmp_path)
  assert (facts.eos_token, facts.stop_tokens) == ('</s>', ('</s>', '<end_of_turn>'))
  written = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / 'tokenizer.model'))
  assert written.eos_id() == 1
  assert written.encode('movie<end_of_turn>')[-1] == end


def test_vocabularies_read_what_was_written(tmp_path):
  pre = 'smollm'
  original = train(pre)
  facts = write_tokenizer(source_of(tmp_path / 'x.gguf', metadata_of(original, pre)), tmp_path)
  vocabulary = vocabularies.HuggingFaceVocabulary(
    str(tmp_path / facts.file), bos_token=facts.bos_token, eos_token=facts.eos_token,
    pad_token=facts.pad_token,
  )  # fmt: skip
  assert vocabulary.slot_token == '<|reserved_special_token_0|>'
  assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id) == (1, 2, 0)
  text = 'Toy  Story 1995'
  assert vocabulary.encode_segment(text, first=True) == original.encode(text).ids

  model = train_sentencepiece(add_dummy_prefix=False, remove_extra_whitespaces=False)
  facts = write_tokenizer(
    source_of(tmp_path / 'y.gguf', metadata_of_sentencepiece(model, False)), tmp_path
  )
  vocabulary = vocabularies.SentencePieceVocabulary(str(tmp_path / facts.file), '<start_of_turn>')
  assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id) == (2, 1, 3)
  text = ' Toy  Story   1995 '
  expected = sentencepiece.SentencePieceProcessor(model_proto=model).encode(text)
  assert vocabulary.encode_segment(text, first=True) == expected
  assert vocabulary.encode_tf(text).numpy().tolist() == expected


@pytest.mark.parametrize(
  ('metadata', 'message'),
  [
    ({'tokenizer.ggml.model': 't5'}, r"model='t5'; allowed: 'gpt2' .*, 'llama'"),
    ({'tokenizer.ggml.pre': 'llama-bpm'}, r"'llama-bpm'.*Did you mean 'llama-bpe'.*tokenizer.json"),
    ({'tokenizer.ggml.pre': None}, 'no .tokenizer.ggml.pre. in its metadata'),
    ({'tokenizer.ggml.merges': None}, 'no .tokenizer.ggml.merges.'),
    ({'tokenizer.ggml.merges': ['a c']}, "merge 'a c' does not make one token"),
    ({'tokenizer.ggml.merges': ['a']}, "merge 'a' does not make one token"),
    ({'tokenizer.ggml.token_type': [1, 1]}, '3 tokens, but 2 types'),
    ({'tokenizer.ggml.tokens': ['a', 'b', 'a']}, 'two tokens of the same text'),
    ({'tokenizer.ggml.bos_token_id': 3}, 'bos_token_id=3, but there are 3 tokens'),
    ({'tokenizer.ggml.model': 'llama'}, 'no .tokenizer.ggml.scores.'),
    (
      {'tokenizer.ggml.model': 'llama', 'tokenizer.ggml.scores': [0.0]},
      '3 tokens, but 1 scores',
    ),
    (
      {'tokenizer.ggml.model': 'llama', 'tokenizer.ggml.scores': [0.0, 0.0, 0.0]},
      'no SentencePiece model: .*unk',
    ),
  ],
)
def test_refused(tmp_path, metadata, message):
  good = {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': 'gpt-2',
    'tokenizer.ggml.tokens': ['a', 'b', 'ab'],
    'tokenizer.ggml.token_type': [1, 1, 1],
    'tokenizer.ggml.merges': ['a b'],
  }
  source = source_of(tmp_path / 'x.gguf', {**good, **metadata})
  with pytest.raises(UsageError, match=message) as error:
    write_tokenizer(source, tmp_path)
  assert str(tmp_path) in str(error.value)


def test_facts_in_json():
  facts = TokenizerFacts('sentencepiece', bos_token='<bos>', stop_tokens=('<eos>', '<end>'))
  assert TokenizerFacts.from_dict(facts.to_dict(), 'lm.json') == facts
  assert (facts.file, TokenizerFacts('huggingface').file) == ('tokenizer.model', 'tokenizer.json')
  with pytest.raises(
    UsageError, match=r"lm.json: unknown key 'bos_tokn'.*Did you mean 'bos_token'"
  ):
    TokenizerFacts.from_dict({**facts.to_dict(), 'bos_tokn': 'x'}, 'lm.json')
  with pytest.raises(UsageError, match='kind=None of a tokenizer; allowed: huggingface, sent'):
    TokenizerFacts.from_dict({}, 'lm.json')

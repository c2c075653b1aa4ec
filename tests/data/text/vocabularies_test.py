"""Vocabularies: pieces joined are the whole, slots are found, and SeqIO can use them."""

import copy
import doctest
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import seqio
import tensorflow as tf
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from ilm_jax.data.text import vocabularies
from ilm_jax.data.text.vocabularies import (
  ByteVocabulary,
  HuggingFaceVocabulary,
  SentencePieceVocabulary,
)
from ilm_jax.errors import UsageError

SEQIO_MODEL = str(
  Path(seqio.__file__).parent / 'test_data' / 'sentencepiece' / 'sentencepiece.model'
)

TEXTS = (
  'Toy Story (1995), GoldenEye (1995), Four Rooms (1995), Get Shorty (1995), Copycat (1995)',
  'Shanghai Triad (Yao a yao yao dao waipo qiao) (1995), Twelve Monkeys (1995), Babe (1995)',
  "Dead Man Walking (1995), Mr. Holland's Opus (1995), French Twist (Gazon maudit) (1995)",
  'Muppet Treasure Island (1996), Braveheart (1995), Taxi Driver (1976), Bad Boys (1995)',
  'Star Wars: Episode VI - Return of the Jedi (1983), Léon: The Professional (1994)',
  'Cité des enfants perdus, La (1995) is a surreal tale; Amélie (2001) is a gentle one.',
  'Recommend the next movie for a user who has watched these films in this order:',
  'What would this user enjoy watching tonight? Answer with the title of one movie only.',
  'The user liked Die Hard 2 and Speed, rated 4.5 stars, but not Batman & Robin ½ (1997)!',
  '七人の侍 (1954), 千と千尋の神隠し (2001) and Ран (1985) are rated 5 out of 5.',
)
# Pieces as a template joins them: every one but the first begins with its whitespace.
words = st.sampled_from(sorted({word for text in TEXTS for word in text.split()}))
pieces_of_text = st.lists(
  st.lists(words, min_size=1, max_size=4).map(' '.join), min_size=1, max_size=6
).map(lambda pieces: [pieces[0]] + [f' {piece}' for piece in pieces[1:]])


def _train_sentencepiece(path: Path, model_type: str, vocab_size: int = 180, **options) -> str:
  corpus = path / f'{model_type}.txt'
  corpus.write_text('\n'.join(TEXTS * 20))
  prefix = path / f'{model_type}_{len(options)}'
  sentencepiece.SentencePieceTrainer.train(
    input=str(corpus),
    model_prefix=str(prefix),
    vocab_size=vocab_size,
    model_type=model_type,
    character_coverage=1.0,
    pad_id=0,
    eos_id=1,
    bos_id=2,
    unk_id=3,
    minloglevel=2,
    **options,
  )
  return f'{prefix}.model'


def _save(tokenizer: tokenizers.Tokenizer, path: Path) -> str:
  tokenizer.save(str(path))
  return str(path)


def _byte_level(path: Path, special: list[str], digits: bool, add_prefix_space: bool) -> str:
  """A byte-level BPE of GPT-2's kind, or SmolLM2's (`digits`)."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  byte_level = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
  tokenizer.pre_tokenizer = (
    pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if digits
    else byte_level
  )
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=500,
    special_tokens=special,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(TEXTS, trainer)
  return _save(tokenizer, path)


def _smollm(path: Path) -> str:
  special = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<gh_stars>', '<empty_output>']
  return _byte_level(path, special, digits=True, add_prefix_space=False)


def _metaspace(path: Path, split_words: bool) -> str:
  """A BPE that writes spaces as SentencePiece does; T5's kind also splits words first."""
  tokenizer = tokenizers.Tokenizer(models.BPE(unk_token='<unk>'))
  metaspace = pre_tokenizers.Metaspace(prepend_scheme='always')
  tokenizer.pre_tokenizer = (
    pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    if split_words
    else metaspace
  )
  tokenizer.decoder = decoders.Metaspace()
  special = ['<pad>', '</s>', '<s>', '<unk>', '<unused0>']
  trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
  tokenizer.train_from_iterator(TEXTS, trainer)
  return _save(tokenizer, path)


def _prepend(path: Path) -> str:
  """Llama 2's kind: no pre-tokeniser, the normaliser writes spaces and puts one in front."""
  tokenizer = tokenizers.Tokenizer(models.BPE(unk_token='<unk>'))
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
  )
  # Trained word by word, so that no token has a space in the middle.
  tokenizer.pre_tokenizer = pre_tokenizers.Split('▁', 'merged_with_next')
  tokenizer.decoder = decoders.Metaspace()
  special = ['<pad>', '</s>', '<s>', '<unk>', '<unused0>']
  trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
  tokenizer.train_from_iterator(TEXTS, trainer)
  tokenizer.pre_tokenizer = None
  return _save(tokenizer, path)


def _word_piece(path: Path) -> str:
  tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token='[UNK]'))
  tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  tokenizer.decoder = decoders.WordPiece()
  special = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '[unused0]']
  trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
  tokenizer.train_from_iterator(TEXTS, trainer)
  tokenizer.enable_truncation(8)  # as the files of sentence encoders do
  tokenizer.enable_padding(length=8)
  return _save(tokenizer, path)


@pytest.fixture(scope='module')
def all_vocabularies(tmp_path_factory) -> dict[str, vocabularies.SlotVocabulary]:
  path = tmp_path_factory.mktemp('vocabularies')
  gemma = {
    'normalization_rule_name': 'identity',
    'add_dummy_prefix': False,
    'remove_extra_whitespaces': False,
    'byte_fallback': True,
    'user_defined_symbols': '<unused0>,▁▁,▁▁▁',
  }
  smollm = {'bos_token': '<|im_start|>', 'eos_token': '<|im_end|>'}
  special = ['<s>', '</s>', '<unused0>']
  roberta = _byte_level(path / 'roberta.json', special, digits=False, add_prefix_space=True)
  every = _byte_level(path / 'every.json', special, digits=True, add_prefix_space=True)
  return {
    'bytes': ByteVocabulary(),
    'seqio': SentencePieceVocabulary(SEQIO_MODEL, extra_ids=2),
    't5': SentencePieceVocabulary(_train_sentencepiece(path, 'unigram'), extra_ids=2),
    'sp_bpe': SentencePieceVocabulary(_train_sentencepiece(path, 'bpe'), extra_ids=2),
    'gemma': SentencePieceVocabulary(_train_sentencepiece(path, 'bpe', 500, **gemma)),
    'smollm': HuggingFaceVocabulary(_smollm(path / 'smollm.json'), **smollm),
    'roberta': HuggingFaceVocabulary(roberta),
    'every_fragment': HuggingFaceVocabulary(every),
    'metaspace': HuggingFaceVocabulary(_metaspace(path / 'metaspace.json', False)),
    't5_json': HuggingFaceVocabulary(_metaspace(path / 't5.json', True)),
    'llama': HuggingFaceVocabulary(_prepend(path / 'llama.json')),
    'bert': HuggingFaceVocabulary(_word_piece(path / 'bert.json')),
  }


NAMES = (
  'bytes',
  'seqio',
  't5',
  'sp_bpe',
  'gemma',
  'smollm',
  'roberta',
  'every_fragment',
  'metaspace',
  't5_json',
  'llama',
  'bert',
)


@pytest.fixture(params=NAMES)
def vocabulary(request, all_vocabularies):
  return all_vocabularies[request.param]


def join(vocabulary, pieces):
  return [
    token
    for i, piece in enumerate(pieces)
    for token in vocabulary.encode_segment(piece, first=i == 0)
  ]


@given(pieces=pieces_of_text)
@settings(
  max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_joined_pieces_are_the_tokens_of_the_whole(vocabulary, pieces):
  assert join(vocabulary, pieces) == list(vocabulary.encode(''.join(pieces)))


@pytest.mark.parametrize('name', ['seqio', 't5', 'sp_bpe', 'gemma', 'llama', 'smollm', 'bert'])
@pytest.mark.parametrize(
  'pieces',
  [
    ['Rate:', '\nToy Story', '\n\n(1995)', ' now'],
    ['a', '   Taxi   Driver', ' \t 1976'],
    ['  leading', ' space'],
    ['ﬁlm ½', ' \uff21mélie\u00a0(2001)', ' e\u0301t\u0301'],
    ['Amélie', '', ' (2001)'],
  ],
)
def test_joined_pieces_with_odd_whitespace_and_characters(all_vocabularies, name, pieces):
  vocabulary = all_vocabularies[name]
  assert join(vocabulary, pieces) == list(vocabulary.encode(''.join(pieces)))


def test_a_piece_glued_to_a_slot_has_no_space_of_its_own(all_vocabularies):
  """The first encoding of 'Toy' begins with the space that T5 puts before a text."""
  t5 = all_vocabularies['t5'].tokenizer
  for name in ('t5', 'sp_bpe', 'metaspace', 'llama', 'roberta'):
    vocabulary = all_vocabularies[name]
    first = vocabulary.encode_segment('Toy', first=True)
    assert first == vocabulary.encode_segment(' Toy')
    assert first != vocabulary.encode_segment('Toy')
  pieces = [t5.id_to_piece(i) for i in all_vocabularies['t5'].encode_segment('Toy, ')]
  assert ''.join(pieces) == 'Toy,▁'  # nor does a space at the end get lost


@given(text=st.text(st.characters(exclude_categories=['Cs']), max_size=40))
@settings(deadline=None)
def test_bytes_survive_any_text(text):
  vocabulary = ByteVocabulary()
  ids = vocabulary.encode_segment(text)
  assert vocabulary.decode([*ids, vocabulary.eos_id, 70]) == text
  assert vocabulary.decode_tf(tf.constant([*ids, vocabulary.slot_id])).numpy().decode() == text


@pytest.mark.parametrize('text', TEXTS[4:])
def test_text_survives_encoding_and_decoding(all_vocabularies, text):
  for name in ('t5', 'gemma', 'smollm', 'metaspace', 'llama'):
    vocabulary = all_vocabularies[name]
    expected = text.replace('½', '1\u20442') if name == 't5' else text
    tokens = vocabulary.encode(text)
    answer = [vocabulary.slot_id, *tokens, vocabulary.eos_id, tokens[0]]
    assert vocabulary.decode(answer) == expected
    assert vocabulary.decode(np.array(answer)) == expected
    assert vocabulary.decode_tf(tf.constant(answer)).numpy().decode().strip() == expected


def test_the_tensorflow_side_agrees(vocabulary):
  def encode(text):
    ids = vocabulary.encode_tf(text)
    return ids, vocabulary.decode_tf(ids)

  dataset = tf.data.Dataset.from_tensor_slices(list(TEXTS)).map(encode)
  for text, (ids, decoded) in zip(TEXTS, dataset.as_numpy_iterator(), strict=True):
    assert ids.dtype == np.int32
    assert ids.tolist() == list(vocabulary.encode(text))
    assert decoded.decode() == vocabulary.decode(ids)


def test_decode_tf_takes_a_batch(all_vocabularies):
  vocabulary = all_vocabularies['smollm']
  a, b = vocabulary.encode('Toy Story'), vocabulary.encode('Babe')
  eos = vocabulary.eos_id
  batch = tf.constant([[*a, eos], [*b, eos] + [a[0]] * (len(a) - len(b))])
  assert vocabulary.decode_tf(batch).numpy().tolist() == [b'Toy Story', b'Babe']


def test_the_slot_is_one_reserved_id(vocabulary):
  ids = [token for text in TEXTS for token in vocabulary.encode(text)]
  assert 0 <= vocabulary.slot_id < vocabulary.vocab_size
  assert max(ids) < vocabulary.vocab_size
  assert vocabulary.slot_id not in ids
  assert vocabulary.slot_id not in (vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id)
  assert vocabulary.bos_id >= 0


def test_default_slots(all_vocabularies):
  slots = {name: vocabulary.slot_token for name, vocabulary in all_vocabularies.items()}
  assert slots['gemma'] == slots['llama'] == '<unused0>'
  assert slots['seqio'] == slots['t5'] == slots['bytes'] == '<extra_id_0>'
  assert slots['smollm'] == '<empty_output>'
  assert slots['bert'] == '[unused0]'
  # T5 numbers its extra ids from the end; SeqIO's model has 26 pieces.
  assert all_vocabularies['seqio'].slot_id == 27
  assert SentencePieceVocabulary(SEQIO_MODEL, '<extra_id_1>', extra_ids=2).slot_id == 26
  assert all_vocabularies['seqio'].bos_id == 0
  assert all_vocabularies['gemma'].bos_id == 2


def test_text_that_contains_the_slot_is_refused(all_vocabularies):
  for name in ('gemma', 't5', 'smollm', 'llama'):
    vocabulary = all_vocabularies[name]
    with pytest.raises(UsageError, match='contains the slot token'):
      vocabulary.encode_segment(f' Toy {vocabulary.slot_token} Story')


def test_special_tokens_of_a_chat_template_are_recognised(all_vocabularies):
  vocabulary = all_vocabularies['smollm']
  ids = vocabulary.encode_segment('<|im_start|>user\nHi<|im_end|>', first=True)
  assert ids[0] == 1
  assert ids[-1] == 2


def test_equal_by_content_and_picklable(vocabulary, all_vocabularies):
  vocabulary.encode_segment('Toy Story')  # what is loaded lazily must not be in the way
  for other in (copy.deepcopy(vocabulary), pickle.loads(pickle.dumps(vocabulary))):
    assert other == vocabulary
    assert hash(other) == hash(vocabulary)
    assert other.encode_segment(' Toy Story') == vocabulary.encode_segment(' Toy Story')
  assert sum(vocabulary == other for other in all_vocabularies.values()) == 1


def test_equality_looks_at_content_and_slot_not_at_the_path(tmp_path):
  first, second = (_smollm(tmp_path / name) for name in ('a.json', 'b.json'))
  assert HuggingFaceVocabulary(first) == HuggingFaceVocabulary(second)
  assert HuggingFaceVocabulary(first) != HuggingFaceVocabulary(first, '<gh_stars>')
  moved = tmp_path / 'moved.model'
  moved.write_bytes(Path(SEQIO_MODEL).read_bytes())
  here = SentencePieceVocabulary(SEQIO_MODEL, extra_ids=1)
  assert here == SentencePieceVocabulary(str(moved), extra_ids=1)
  assert here != SentencePieceVocabulary(str(moved), extra_ids=2)


def test_adding_a_slot_token_must_be_asked_for(tmp_path):
  file = _byte_level(tmp_path / 'gpt2.json', ['<|endoftext|>'], False, False)
  size = HuggingFaceVocabulary(file).vocab_size
  with pytest.raises(UsageError, match='none of the usual slot tokens'):
    _ = HuggingFaceVocabulary(file).slot_id
  with pytest.raises(UsageError, match=r"slot_token='<slot>' is not .*add_slot_token=True"):
    _ = HuggingFaceVocabulary(file, '<slot>').slot_id
  added = HuggingFaceVocabulary(
    file,
    '<slot>',
    add_slot_token=True,
    bos_token='<|endoftext|>',
    eos_token='<|endoftext|>',
  )
  assert added.slot_id == size
  assert added.vocab_size == size + 1
  assert added.decode([added.slot_id, *added.encode('Babe')]) == 'Babe'
  with pytest.raises(UsageError, match='exists already'):
    _ = HuggingFaceVocabulary(file, '<|endoftext|>', add_slot_token=True).slot_id


def test_what_the_user_got_wrong(tmp_path):
  file = _smollm(tmp_path / 'smollm.json')
  with pytest.raises(UsageError, match=r"Did you mean '<empty_output>'"):
    _ = HuggingFaceVocabulary(file, '<empty_outputs>').slot_id
  with pytest.raises(UsageError, match='not a reserved token'):
    _ = HuggingFaceVocabulary(file, '<|im_end|>', eos_token='<|im_end|>').slot_id
  with pytest.raises(UsageError, match=r'which token is eos_token.*<\|im_end\|>'):
    _ = HuggingFaceVocabulary(file).eos_id
  with pytest.raises(UsageError, match=r"eos_token='<im_end>' is no token .*'<\|im_end\|>'"):
    _ = HuggingFaceVocabulary(file, eos_token='<im_end>').eos_id
  with pytest.raises(UsageError, match='slot_token to add'):
    HuggingFaceVocabulary(file, add_slot_token=True)
  with pytest.raises(UsageError, match=r'tokenizer_file=.*does not exist'):
    _ = HuggingFaceVocabulary(str(tmp_path / 'none.json')).vocab_size
  with pytest.raises(UsageError, match=r'model_file=.*does not exist'):
    _ = SentencePieceVocabulary(str(tmp_path / 'none.model')).vocab_size
  with pytest.raises(UsageError, match=r'extra_ids=1 adds'):
    _ = SentencePieceVocabulary(SEQIO_MODEL).slot_id
  with pytest.raises(UsageError, match=r"'▁test'|not a reserved"):
    _ = SentencePieceVocabulary(SEQIO_MODEL, 'test').slot_id
  with pytest.raises(UsageError, match='extra_ids=0'):
    ByteVocabulary(extra_ids=0)


def test_padding_is_told_apart_from_a_real_token_0(all_vocabularies):
  """SmolLM2's id 0 is '<|endoftext|>': as padding it is no text either."""
  vocabulary = all_vocabularies['smollm']
  assert vocabulary.pad_id == vocabulary.eos_id == 2
  assert vocabulary.decode([*vocabulary.encode('Babe'), 0, 0]) == 'Babe'
  assert all_vocabularies['bert'].pad_id == 0


def test_files_with_gaps_in_their_ids(tmp_path):
  file = tmp_path / 'gap.json'
  spec = json.loads(Path(_smollm(tmp_path / 'smollm.json')).read_text())
  last = max(spec['model']['vocab'].values())
  token = max(spec['model']['vocab'], key=spec['model']['vocab'].get)
  spec['model']['vocab'][token] = last + 10
  file.write_text(json.dumps(spec))
  assert HuggingFaceVocabulary(str(file)).vocab_size == last + 11


def test_examples_of_the_documentation():
  failures, attempted = doctest.testmod(vocabularies)
  assert attempted
  assert not failures

"""Our Hugging Face vocabulary beside transformers' own tokenizer class, on one tokenizer file."""

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from ilm_jax.data.text.vocabularies import HuggingFaceVocabulary

pytestmark = pytest.mark.parity

SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<unused0>']
CORPUS = (
  'Toy Story (1995), GoldenEye (1995), Four Rooms (1995), Get Shorty (1995), Copycat (1995)',
  'The user watched 七人の侍 (1954) and Léon: The Professional (1994), in this order.',
  "What would this user enjoy? Answer with one title: Mr. Holland's Opus (1995).",
)


@pytest.fixture
def file(tmp_path):
  """A byte-level BPE of SmolLM2's kind."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=420,
    special_tokens=SPECIAL,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(CORPUS, trainer)
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  return str(tmp_path / 'tokenizer.json')


def test_hugging_face_vocabulary(file):
  import transformers  # of the `torch` extra

  theirs = transformers.PreTrainedTokenizerFast(
    tokenizer_file=file, bos_token='<|im_start|>', eos_token='<|im_end|>', pad_token='<|im_end|>'
  )
  ours = HuggingFaceVocabulary(file, bos_token='<|im_start|>', eos_token='<|im_end|>')
  assert ours.vocab_size == len(theirs)
  assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
  assert ours.slot_id == theirs.convert_tokens_to_ids('<unused0>')
  rng = np.random.default_rng(0)
  words = sorted({word for text in CORPUS for word in text.split()} | {'½', '\n', '  ', '🎬'})
  for choice in (words, words + SPECIAL):
    for _ in range(200):
      text = ' '.join(rng.choice(choice, size=rng.integers(1, 12)))
      ids = theirs.encode(text, add_special_tokens=False)
      assert list(ours.encode(text)) == ids
      if choice is words:  # SeqIO's decode ends at EOS and leaves special tokens out
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False) == text

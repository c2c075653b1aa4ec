"""Completions and scores of prompts, however they are put into batches."""

import numpy as np
import pytest

from ilm_jax.decoding.generator import Completion, Generator
from ilm_jax.decoding.sampling import SamplingOptions
from ilm_jax.errors import UsageError
from ilm_jax.modules.decoder import Decoder
from tests.support import tiny_lms

NEW = 6
GREEDY = SamplingOptions(max_new_tokens=NEW)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(5, tiny_lms.VOCAB, n).tolist() for n in (3, 12, 1, 7, 5)]


class Letters:
  """A vocabulary of ASCII: 'A' is 5."""

  pad_id, eos_id, bos_id, slot_id = 0, 1, 2, 3

  def encode(self, text):
    return [ord(letter) - 60 for letter in text]

  def decode(self, ids):
    return ''.join(chr(i + 60) for i in ids)


@pytest.fixture(scope='module')
def tiny():
  return tiny_lms.tiny_lm('llama', scan_layers=False)


@pytest.fixture(scope='module')
def generator(tiny):
  return Generator(tiny.lm, tiny.params, max_rows=4)


@pytest.fixture(scope='module')
def lettered(tiny):
  """With a vocabulary."""
  return Generator(tiny.lm, tiny.params, Letters(), max_rows=4)


def expected(tiny, prompt, new=NEW):
  tokens, log_probs = tiny.greedy(tiny.embed(prompt), new)
  return tokens, log_probs


def test_every_prompt_is_completed_as_if_alone(tiny, generator):
  completions = generator.complete(PROMPTS, GREEDY)
  for prompt, completion in zip(PROMPTS, completions):
    tokens, log_probs = expected(tiny, prompt)
    assert completion.tokens == tuple(tokens)
    assert completion.log_prob == pytest.approx(log_probs.sum(), abs=1e-4)
    assert (completion.text, completion.stopped) == (None, False)


def test_text(tiny, lettered):
  prompt = Letters().encode('Hello')
  tokens, log_probs = expected(tiny, [Letters.bos_id, *prompt])
  [got] = lettered.complete(['Hello'], GREEDY, add_bos=True)
  assert got == Completion(Letters().decode(tokens), tuple(tokens), got.log_prob, False)
  assert got.log_prob == pytest.approx(log_probs.sum(), abs=1e-4)
  assert lettered.complete(['Hello'], GREEDY)[0].tokens == tuple(expected(tiny, prompt)[0])


def test_a_stop_token_is_counted_but_not_said(tiny, lettered, monkeypatch):
  tokens, log_probs = expected(tiny, PROMPTS[1])
  end = tokens.index(tokens[3])
  options = SamplingOptions(max_new_tokens=NEW, stop_ids=(tokens[3],))
  monkeypatch.setattr(Letters, 'eos_id', tokens[3])
  for got in (
    lettered.complete([PROMPTS[1]], options)[0],
    lettered.complete([PROMPTS[1]], GREEDY)[0],  # EOS where nothing else is said
  ):
    assert (got.tokens, got.stopped) == (tuple(tokens[:end]), True)
    assert got.text == Letters().decode(tokens[:end])
    assert got.log_prob == pytest.approx(log_probs[: end + 1].sum(), abs=1e-4)
  never = SamplingOptions(max_new_tokens=NEW, stop_ids=())
  assert lettered.complete([PROMPTS[1]], never)[0].tokens == tuple(tokens)


def test_draws_depend_on_the_place_of_a_prompt_only(tiny, generator):
  options = SamplingOptions(max_new_tokens=NEW, temperature=2.0, top_k=50, seed=3)
  together = generator.complete(PROMPTS, options)
  one_by_one = Generator(tiny.lm, tiny.params, max_rows=1).complete(PROMPTS, options)
  assert [x.tokens for x in together] == [x.tokens for x in one_by_one]
  twice = generator.complete([PROMPTS[0]] * 4, options)  # as many as a batch has
  assert twice[0].tokens != twice[1].tokens


def test_what_is_compiled(tiny):
  """One program for lengths up to 16, 32, ..., rows up to 1, 2, 4 and tokens up to 16, 32, ..."""
  generator = Generator(tiny.lm, tiny.params, max_rows=4)
  for length in (1, 2, 9, 16):
    generator.complete([[5] * length], GREEDY)
  for options in (
    SamplingOptions(max_new_tokens=16),
    SamplingOptions(max_new_tokens=1, temperature=0.3),
    SamplingOptions(max_new_tokens=3, temperature=1.0, top_k=7, top_p=0.5, seed=2**32 - 1),
    SamplingOptions(max_new_tokens=3, stop_ids=(1, 2, 3)),
  ):
    generator.complete([[5, 6]], options)
  assert generator.num_compiled == 1
  generator.complete([[5] * 17], GREEDY)
  generator.complete([[5] * 32], GREEDY)
  assert generator.num_compiled == 2
  generator.complete([[5] * 3] * 7, GREEDY)  # 4 and 3, which is as 4
  assert generator.num_compiled == 3


@pytest.mark.parametrize('name', ['llama', 't5'])
def test_soft_tokens_take_the_places_of_slots(name):
  tiny = tiny_lms.tiny_lm(name, name == 't5')
  slot = 500  # no token of the model
  generator = Generator(tiny.lm, tiny.params, slot_id=slot, max_rows=4)
  soft = [RNG.normal(size=(n, 16)).astype(np.float32) for n in (3, 0, 1)]
  prompts = [[slot, 7, 9, slot, slot, 5], [8, 9], [6, 7, slot, 5]]
  got = generator.complete(prompts, GREEDY, soft_tokens=[soft[0], None, soft[2]])
  continuations = [[9, 4, 6], [5], [7, 7]]
  scores = generator.score(prompts, continuations, soft_tokens=soft)
  for i, prompt in enumerate(prompts):
    row = np.array(prompt)
    embeddings = tiny.embed(np.where(row == slot, 0, row))
    embeddings[row == slot] = soft[i]
    assert got[i].tokens == tuple(tiny.greedy(embeddings, NEW)[0])
    np.testing.assert_allclose(
      scores[i], log_probs_of(tiny, embeddings, continuations[i]), atol=1e-5
    )


def log_probs_of(tiny, embeddings, continuation):
  """By a whole forward pass."""
  if tiny.lm.__class__.__name__ == 'T5':
    row, text, begin = tiny.embed([0, *continuation[:-1]]), embeddings, 0
  else:
    row = np.concatenate([embeddings, tiny.embed(continuation[:-1])])
    text, begin = None, len(embeddings) - 1
  return tiny.log_probs(row, text)[begin:][np.arange(len(continuation)), continuation]


@pytest.mark.parametrize('held', [1 << 25, tiny_lms.VOCAB * 5])
def test_scores_are_those_of_whole_forward_passes(tiny, held):
  generator = Generator(tiny.lm, tiny.params, max_rows=4, max_logits=held)
  continuations = [RNG.integers(0, tiny_lms.VOCAB, n).tolist() for n in (4, 1, 0, 6, 3)]
  scores = generator.score(PROMPTS, continuations)
  assert [len(x) for x in scores] == [4, 1, 0, 6, 3]
  for i in (0, 1, 3, 4):
    by_hand = log_probs_of(tiny, tiny.embed(PROMPTS[i]), continuations[i])
    np.testing.assert_allclose(scores[i], by_hand, atol=1e-5)


def test_a_completion_scores_what_it_says(tiny, generator):
  completions = generator.complete(PROMPTS, GREEDY)
  scores = generator.score(PROMPTS, [x.tokens for x in completions])
  for completion, score in zip(completions, scores):
    assert completion.log_prob == pytest.approx(score.sum(), abs=1e-4)


def test_scoring_holds_few_logits(tiny):
  """Of 4 x 64 tokens of the vocabulary, 16 at a time."""
  asked = []

  class Recording(Decoder):
    def logits(self, hidden):
      asked.append(hidden.shape)
      return super().logits(hidden)

  lm = Recording(tiny.lm.config, tiny.lm.compute)
  generator = Generator(lm, tiny.params, max_logits=tiny_lms.VOCAB * 16)
  generator.score([[5] * 64] * 4, [[6] * 64] * 4)
  assert set(asked) == {(16, tiny.lm.config.d_model)}


def test_nothing_is_done_with_nothing(generator):
  assert generator.complete([]) == []
  assert generator.score([], []) == []


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda g: g.complete(['Hello']), "prompt 'Hello': text, but there is no vocabulary"),
    (lambda g: g.complete([[5], []]), 'prompt 1 has no token'),
    (lambda g: g.complete([[5, 97]]), 'prompt 0: token 97, but the model has 97'),
    (lambda g: g.complete([[-1]]), 'token -1'),
    (lambda g: g.complete([[5] * 190]), '190 tokens and max_new_tokens=64 are more than the 200'),
    (lambda g: g.complete([[5]], soft_tokens=[None]), 'give slot_id'),
    (lambda g: g.score([[5]], []), '1 prompts, but 0 continuations'),
    (lambda g: g.score([[5]], [[98]]), 'continuation 0: token 98'),
  ],
)
def test_bad_prompts(generator, call, message):
  with pytest.raises(UsageError, match=message):
    call(generator)


@pytest.mark.parametrize(
  ('soft_tokens', 'message'),
  [
    ([], '1 prompts, but soft tokens for 0'),
    ([np.zeros((2, 16))], r'it has 1 slots \(token 3\), but soft tokens of shape \[2, 16\]'),
    ([np.zeros((1, 8))], r'\[1, 16\] are needed'),
    ([None], r'soft tokens of shape \[0, 16\]'),
  ],
)
def test_bad_soft_tokens(lettered, soft_tokens, message):
  with pytest.raises(UsageError, match=message):
    lettered.complete([[5, 3]], soft_tokens=soft_tokens)

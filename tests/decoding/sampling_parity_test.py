"""Parity of what is generated with Hugging Face transformers (torch) on the same random weights."""

import jax
import numpy as np
import pytest

from ilm_jax.decoding.generator import Generator
from ilm_jax.decoding.sampling import SamplingOptions, candidates
from ilm_jax.modules.layers import Compute
from tests.lm import t5_recipes_parity_test as t5_parity
from tests.modules.decoder_parity_test import make_pair

pytestmark = pytest.mark.parity

NEW = 24
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(1, 97, n).tolist() for n in (5, 17, 11)]


@pytest.fixture(scope='module', params=['gemma2', 'gemma3', 'llama', 'qwen3'])
def pair(request, tmp_path_factory):
  compute = Compute(scan_layers=request.param != 'llama')
  return make_pair(request.param, tmp_path_factory.mktemp(request.param), compute)


def reference(model, prompts, **options):
  """The new tokens, and their log-probabilities; transformers pads on the left."""
  import torch

  longest = max(map(len, prompts))
  tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
  there = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
  with torch.no_grad():
    made = model.generate(
      tokens,
      attention_mask=there,
      do_sample=False,
      pad_token_id=0,
      return_dict_in_generate=True,
      output_logits=True,
      **{'max_new_tokens': NEW, 'eos_token_id': None, **options},
    )
  new = made.sequences[:, longest:]
  log_probs = torch.stack(made.logits, 1).log_softmax(-1).gather(2, new[..., None])[..., 0]
  return new.numpy(), log_probs.numpy()


def test_greedy_text(pair):
  generator = Generator(pair.lm, pair.variables['params'])
  completions = generator.complete(PROMPTS, SamplingOptions(max_new_tokens=NEW))
  tokens, log_probs = reference(pair.torch_model, PROMPTS)
  for got, row, log_p in zip(completions, tokens, log_probs):
    assert list(got.tokens) == row.tolist()
    assert got.log_prob == pytest.approx(log_p.sum(), abs=1e-3)
  stop = int(tokens[0, 7])
  stopped = generator.complete(PROMPTS, SamplingOptions(max_new_tokens=NEW, stop_ids=(stop,)))
  tokens, _ = reference(pair.torch_model, PROMPTS, eos_token_id=stop)
  for got, row in zip(stopped, tokens.tolist()):
    assert got.stopped == (stop in row)
    assert list(got.tokens) == row[: row.index(stop) if stop in row else NEW]


oracle = t5_parity.oracle  # a fixture


@pytest.mark.parametrize('oracle', ['t5_1_1', 'mt5'], indirect=True)
def test_greedy_text_of_an_encoder_decoder(oracle):
  import torch

  model, directory = oracle
  generator = Generator(*t5_parity.load(directory, scan_layers=True))
  prompts = [[i % 70 for i in prompt] for prompt in PROMPTS]
  completions = generator.complete(prompts, SamplingOptions(max_new_tokens=NEW))
  for prompt, got in zip(prompts, completions):
    with torch.no_grad():  # its cache has as many layers as the encoder, which are fewer
      made = model.generate(
        torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None,
        use_cache=False,
      )  # fmt: skip
    assert list(got.tokens) == made[0, 1:].tolist()


def test_scores(pair):
  generator = Generator(pair.lm, pair.variables['params'])
  continuations = [RNG.integers(1, 97, n).tolist() for n in (9, 3, 6)]
  scores = generator.score(PROMPTS, continuations)
  for prompt, continuation, score in zip(PROMPTS, continuations, scores):
    logits = pair.reference(np.array([prompt + continuation]))[0, len(prompt) - 1 : -1]
    expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(continuation)), continuation]
    np.testing.assert_allclose(score, expected, atol=1e-4)


@pytest.mark.parametrize('temperature', [0.5, 1.0, 3.0])
@pytest.mark.parametrize('top_k', [None, 1, 20, 400])
@pytest.mark.parametrize('top_p', [None, 0.2, 0.9])
def test_what_is_drawn_from(temperature, top_k, top_p):
  import torch
  from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

  logits = 4 * np.random.default_rng(5).normal(size=(6, 300)).astype(np.float32)
  scores = TemperatureLogitsWarper(temperature)(None, torch.tensor(logits))
  if top_k is not None:
    scores = TopKLogitsWarper(top_k)(None, scores)
  if top_p is not None:
    scores = TopPLogitsWarper(top_p)(None, scores)
  options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p).traced()
  kept = candidates(logits / temperature, options.top_k, options.top_p)
  assert (np.asarray(kept) == scores.isfinite().numpy()).all()

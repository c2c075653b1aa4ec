"""T5s of Hugging Face, saved by transformers and read by us: the same logits."""

import functools
import json

import jax
import numpy as np
import pytest

from ilm_jax.lm.assemble import assemble
from ilm_jax.lm.huggingface import SafetensorsSource
from ilm_jax.lm.t5_recipes import huggingface_config, huggingface_recipe
from ilm_jax.modules.layers import Compute
from ilm_jax.modules.t5 import T5
from tests.support.t5x_golden import params_like

pytestmark = pytest.mark.parity

SIZES = dict(
  vocab_size=70, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_decoder_layers=3, num_heads=4,
  feed_forward_proj='gated-gelu', decoder_start_token_id=0,
)  # fmt: skip
CASES = {
  't5_1_1': ('T5', dict(tie_word_embeddings=False)),
  'tied': ('T5', {}),
  'mt5': ('MT5', dict(feed_forward_proj='gated-silu')),
  'umt5': ('UMT5', dict(tie_word_embeddings=False)),
}


@pytest.fixture(scope='module', params=CASES)
def oracle(request, tmp_path_factory):
  """A model with random weights, and the directory where it is saved."""
  import torch
  import transformers

  family, more = CASES[request.param]
  torch.manual_seed(0)
  config = getattr(transformers, f'{family}Config')(**{**SIZES, **more})
  model = getattr(transformers, f'{family}ForConditionalGeneration')(config).eval()
  if request.param != 'tied':  # transformers 5 ties every T5 until weights come that differ
    model.lm_head.weight = torch.nn.Parameter(torch.empty(70, 24))
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.copy_(torch.randn_like(parameter) / max(1, parameter.shape[-1] ** 0.5))
    for name, parameter in model.named_parameters():
      if 'layer_norm' in name or 'shared' in name or 'relative' in name:
        parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
  directory = tmp_path_factory.mktemp(request.param)
  model.save_pretrained(directory)
  return model, directory


def load(directory, scan_layers):
  source = SafetensorsSource(directory)
  config = huggingface_config(json.loads((directory / 'config.json').read_text()), source.where)
  compute = Compute(scan_layers=scan_layers)
  recipe, dropped = huggingface_recipe(config, source.shapes)
  params, report = assemble(source, recipe, params_like(config, compute), dropped=dropped)
  assert report.dropped == ()
  return T5(config, compute), params


@pytest.mark.parametrize('scan_layers', [True, False])
def test_logits_are_those_of_transformers(oracle, scan_layers):
  """Texts longer than the distances that are told apart, and padding."""
  import torch

  model, directory = oracle
  lm, params = load(directory, scan_layers)
  rng = np.random.default_rng(0)
  inputs, targets = rng.integers(1, 70, (2, 300)), rng.integers(1, 70, (2, 200))
  there = (np.arange(300) < np.array([[300], [170]])).astype(np.int32)
  with torch.no_grad():
    expected = model(
      input_ids=torch.tensor(inputs),
      attention_mask=torch.tensor(there),
      decoder_input_ids=torch.tensor(targets),
    ).logits.numpy()
  apply = jax.jit(functools.partial(lm.apply, method='logits_of'))
  logits = apply({'params': params}, targets, inputs, encoder_segment_ids=there)
  print(
    f'largest difference: {np.abs(logits - expected).max():.2e} of {np.abs(expected).max():.1f}'
  )
  np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_greedy_decoding_gives_the_same_tokens(oracle):
  import torch

  model, directory = oracle
  lm, params = load(directory, scan_layers=True)
  inputs = np.random.default_rng(1).integers(2, 70, (2, 12))
  with torch.no_grad():
    # Its cache has as many layers as the encoder, which are fewer.
    options = dict(do_sample=False, eos_token_id=None, use_cache=False)
    generated = model.generate(torch.tensor(inputs), max_new_tokens=10, **options)
    expected = generated[:, 1:].numpy()

  @functools.partial(jax.jit, static_argnames='method')
  def run(method, *args, **kwargs):
    return lm.apply({'params': params}, *args, method=method, **kwargs)

  source = run('cross_cache', run('encode', run('embed_tokens', inputs)))
  cache, tokens, made = lm.init_cache(2, 10), np.zeros((2, 1), np.int32), []
  for step in range(10):
    hidden, new = run(
      'decode', run('embed_tokens', tokens), source, positions=np.full((2, 1), step), cache=cache
    )
    cache = cache.append(new)
    tokens = np.asarray(run('logits', hidden).argmax(-1))
    made.append(tokens)
  np.testing.assert_array_equal(np.concatenate(made, axis=1), expected)

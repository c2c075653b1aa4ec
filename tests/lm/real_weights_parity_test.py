"""Real weights against transformers on the same GGUF files: next tokens and perplexity.

A minute for each model on two cores, most of it transformers dequantising.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from ilm_jax.lm import packages
from ilm_jax.lm.load import load_lm
from ilm_jax.modules.layers import Compute

pytestmark = [pytest.mark.parity, pytest.mark.network]

PROMPTS = (
  'The capital of France is',
  'Water boils at a temperature of',
  'My favourite film is',
  'In 1969, the first man on the',
  'She opened the door and',
  'The recipe needs two cups of',
  'Star Wars is a film by',
  'To be or not to',
  'def add(a, b):\n  return',
  'The opposite of hot is',
  'Once upon a time there was a',
  "Toy Story, A Bug's Life, Finding Nemo,",
  'The largest planet of the solar system is',
  'He plays the piano and the',
  'I would like to thank my',
  'The film was boring, because the',
  '1, 2, 3, 4,',
  'London is the capital of',
  'A horror film with a haunted',
  'The detective looked at the body and',
)
TEXT = """
When the two brothers came back to the village after the long winter, nobody at the inn knew their
faces. The older one had left as a boy with a wooden box under his arm, and he had sworn to the
priest that he would not return before he had filled it. Now the box was on the table between the
glasses, and the landlord, who had seen many boxes and many oaths in his life, did not ask what was
inside. He asked whether they wanted soup. The younger brother laughed, for the first time in weeks,
and said that soup was the only thing he had thought about since they crossed the river. Outside it
had begun to rain again. A dog came in, shook itself beside the fire and lay down on the boots of
the older brother, as if it had been waiting for exactly those boots all day long. So they stayed.
"""


@dataclasses.dataclass
class Both:
  """One model twice: in float32 here and in torch."""

  lm: object
  model: object
  tokenizer: object

  def encode(self, text):
    return self.tokenizer(text)['input_ids']

  def reference(self, ids):
    import torch

    with torch.no_grad():
      return self.model(torch.tensor([ids])).logits[0].float().numpy()

  @functools.cached_property
  def forward(self):
    apply = functools.partial(self.lm.module.apply, method='logits_of')
    return jax.jit(lambda params, tokens: apply({'params': params}, tokens)[0])

  def ours(self, ids):
    padded = -(-len(ids) // 32) * 32  # two programs: what is after does not matter
    tokens = np.pad(ids, (0, padded - len(ids)))[None]
    return np.asarray(self.forward(self.lm.params, tokens))[: len(ids)]


@pytest.fixture(scope='module', params=sorted(packages.PACKAGES))
def both(request):
  import transformers

  lm = load_lm(request.param, compute=Compute())
  file = packages.fetch(request.param)
  kwargs = {'gguf_file': file.name}
  model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype='float32', **kwargs)
  tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **kwargs)
  return Both(lm, model.eval(), tokenizer)


def test_the_five_likeliest_next_tokens(both):
  for prompt in PROMPTS:
    ids = both.encode(prompt)
    ours, theirs = both.ours(ids)[-1], both.reference(ids)[-1]
    assert np.argsort(-ours)[:5].tolist() == np.argsort(-theirs)[:5].tolist(), prompt


def test_perplexity(both):
  ids = both.encode(TEXT.strip().replace('\n', ' '))

  def perplexity(logits):
    log_p = np.asarray(jax.nn.log_softmax(logits[:-1]))
    return np.exp(-log_p[np.arange(len(ids) - 1), ids[1:]].mean())

  ours, theirs = perplexity(both.ours(ids)), perplexity(both.reference(ids))
  print(f'{both.lm.name}: perplexity {ours:.4f}, transformers {theirs:.4f}, {len(ids)} tokens')
  assert abs(ours / theirs - 1) < 0.005


def test_our_tokenizer_gives_the_same_ids(both):
  vocabulary, facts = both.lm.vocabulary, both.lm.tokenizer.facts
  begin = [vocabulary.bos_id] if facts.add_bos else []
  for text in (*PROMPTS, TEXT.strip().replace('\n', ' ')):
    assert begin + vocabulary.encode(text) == both.encode(text), text

"""`ilm complete`: a language model by name or path goes on from a prompt."""

import dataclasses
import sys
import time

from ilm_jax.decoding.generator import Generator
from ilm_jax.decoding.sampling import SamplingOptions
from ilm_jax.errors import UsageError
from ilm_jax.lm.load import default_compute, load_lm
from ilm_jax.runtime.sharding import make_mesh


def complete(
  *,
  lm: str,
  prompt: str = '-',
  chat: bool = False,
  tokenizer: str | None = None,
  max_new_tokens: int = 64,
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
  seed: int = 0,
  int8: bool = False,
  mesh: dict[str, int] | None = None,
) -> list[str]:
  """Loads a language model, completes prompts, and tells how fast.

    ilm complete --lm=smollm2_135m --prompt="The capital of France is"
    ilm complete --lm=smollm2_135m --prompt="Name three films by Hitchcock." --chat
    ilm complete --lm=path/to/model.gguf --prompt=- < one_prompt_a_line.txt

  Args:
    lm: smollm2_135m or gemma3_270m, fetched on first use; or a path: a .gguf file, a directory of
      Hugging Face (config.json, safetensors), of Google's Gemma (Orbax), or of T5X.
    prompt: the text; - reads one prompt a line from standard input.
    chat: put each prompt into the model's chat template, as a user's message.
    tokenizer: tokenizer.json or SentencePiece model, where the model has none beside it.
    max_new_tokens: at most so many.
    temperature: 0 takes the most likely token each time.
    top_k: draw from so many of the most likely tokens.
    top_p: draw from the most likely tokens that have this probability together.
    seed: of what is drawn.
    int8: keep the weights in 8 bits.
    mesh: {'data': 1, 'tensor': 4}: sizes, -1 is the rest of the devices.

  Returns:
    The completions.

  Raises:
    UsageError: there is no such model, it has no tokenizer or no chat template, or an option is
      not allowed.
  """
  options = SamplingOptions(max_new_tokens, temperature, top_k, top_p, seed=seed)
  compute = default_compute()
  if int8:
    compute = dataclasses.replace(compute, param_dtype='int8')
  devices = make_mesh(mesh) if mesh else None
  model = load_lm(lm, tokenizer=tokenizer, compute=compute, mesh=devices)
  lines = [line.rstrip('\n') for line in sys.stdin] if prompt == '-' else [prompt]
  prompts = [line for line in lines if line]
  if not prompts:
    raise UsageError('ilm complete: no prompt; --prompt=TEXT, or one a line on standard input.')
  tokens = [
    model.chat_tokens([{'role': 'user', 'content': text}]) if chat else model.prompt_tokens(text)
    for text in prompts
  ]
  options = dataclasses.replace(options, stop_ids=model.stop_ids)
  generator = Generator(model.module, model.params, model.vocabulary)
  start = time.monotonic()
  completions = generator.complete(tokens, options)
  seconds = time.monotonic() - start
  for text, completion in zip(prompts, completions):
    print(f'{text}\n> {completion.text}\n' if chat else f'{text}{completion.text}\n')
  made = sum(len(completion.tokens) for completion in completions)
  what = f'{made} tokens for {len(prompts)} prompt(s) in {seconds:.1f} s, compiling included'
  print(what, file=sys.stderr)
  return [completion.text or '' for completion in completions]

"""Conversations as prompts, by the chat template that a language model was trained with.

Templates are Jinja, as in Hugging Face's tokenizer_config.json, and are rendered as transformers
does. They come from a checkpoint, so they run in Jinja's sandbox.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from ilm_jax.errors import UsageError


def render_chat(
  template: str,
  messages: Sequence[Mapping[str, str]],
  *,
  bos_token: str | None = None,
  eos_token: str | None = None,
  add_generation_prompt: bool = True,
) -> str:
  """The text of a conversation, BOS in it where the template wants one: tokenise it without.

  >>> template = '{% for m in messages %}[{{ m.role }}] {{ m.content }}\\n{% endfor %}'
  >>> render_chat(template, [{'role': 'user', 'content': 'Hello'}])
  '[user] Hello\\n'

  Args:
    template: Jinja.
    messages: {'role': 'system' | 'user' | 'assistant', 'content': text}, in turn.
    bos_token, eos_token: as text; None where the model has none.
    add_generation_prompt: ends with what an answer begins with.

  Raises:
    UsageError: a message lacks its role or text, the template is no Jinja, or refuses the messages,
      as some do where roles do not alternate or there is a system message.
  """
  for i, message in enumerate(messages):
    for key in ('role', 'content'):
      if not isinstance(message.get(key), str):
        raise UsageError(
          f'message {i} {dict(message)!r}: {key!r} must be text. A message is'
          " {'role': 'system' | 'user' | 'assistant', 'content': ...}."
        )
  tokens = {'bos_token': bos_token, 'eos_token': eos_token}
  try:
    return _ENVIRONMENT.from_string(template).render(
      messages=[dict(message) for message in messages],
      tools=None,
      documents=None,
      add_generation_prompt=add_generation_prompt,
      **{name: token for name, token in tokens.items() if token is not None},
    )
  except jinja2.TemplateSyntaxError as error:
    raise UsageError(f'chat template, line {error.lineno}: {error.message}.') from error
  except _Refusal as error:
    roles = ', '.join(message['role'] for message in messages) or 'none'
    raise UsageError(f'the chat template refuses the messages ({roles}): {error}') from error
  except Exception as error:  # a template is a program: anything can come of it
    raise UsageError(f'chat template: {type(error).__name__}: {error}.') from error


class _Refusal(Exception):
  """Of the template itself, by `raise_exception`."""


def _raise_exception(message: str) -> NoReturn:
  raise _Refusal(message)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
  """Not Jinja's, which writes '<' as an HTML page needs it."""
  return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _strftime_now(format: str) -> str:
  return datetime.datetime.now().strftime(format)


class _Generation(jinja2.ext.Extension):
  """{% generation %} ... {% endgeneration %}: marks what a model is to be trained to say."""

  tags = {'generation'}  # noqa: RUF012

  def parse(self, parser: Any) -> jinja2.nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return jinja2.nodes.Scope(body, lineno=line)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
  )
  environment.filters['tojson'] = _tojson
  environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
  return environment


_ENVIRONMENT = _environment()

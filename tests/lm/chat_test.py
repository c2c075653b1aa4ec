"""Chat templates: small ones in the constructs of the models that are shipped or known.

With `make parity`, they are rendered by transformers, too.
"""

import datetime
import json
import subprocess
import sys

import pytest

from ilm_jax.errors import UsageError
from ilm_jax.lm.chat import render_chat

# The constructs, not the texts, of published templates.
SMOLLM = (
  '{% for message in messages %}{% if loop.first and messages[0]["role"] != "system" %}'
  "{{ '<|im_start|>system\nBe short.<|im_end|>\n' }}{% endif %}"
  "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set rest = messages[1:] -%}
{%- else -%}
    {%- set prefix = '' -%}
    {%- set rest = messages -%}
{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') }}
    {{- message['content'] | trim }}
    {{- '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\n' }}
{%- endif -%}
"""
LLAMA3 = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now('%d %b %Y') %}
    {%- else %}
        {%- set date_string = '26 Jul 2024' %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{%- if tools is not none %}
    {{- 'Environment: ipython\n' }}
{%- endif %}
{{- 'Today: ' + date_string + '\n\n' + system_message + '<|eot_id|>' }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {{- message.tool_calls | tojson(indent=4) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\n# Tools' }}
    {%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == 'user' and not ns.last %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- generation %}
        {{- '<|im_start|>assistant\n' + content + '<|im_end|>\n' }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
{# Last question: #}{{ ns.last }}
"""
BLOCKS = """{% for message in messages %}
  {% if message.role == 'user' %}
    - {{ message.content | tojson }}
  {% endif %}
{% endfor %}
{{ messages | map(attribute='role') | list | tojson }} {{ eos_token }}
"""
TEMPLATES = {'smollm': SMOLLM, 'gemma': GEMMA, 'llama3': LLAMA3, 'qwen': QWEN, 'blocks': BLOCKS}
SYSTEM = {'role': 'system', 'content': ' You know films. '}
ASK = {'role': 'user', 'content': '  Is "Alien" <b>good</b> & scary?\n'}
ANSWER = {'role': 'assistant', 'content': '<think>hm</think>\nJa, «sehr» gut.'}
CONVERSATIONS = {
  'ask': [ASK],
  'system': [SYSTEM, ASK],
  'long': [SYSTEM, ASK, ANSWER, {'role': 'user', 'content': 'And "Heat"?'}],
  'answered': [ASK, ANSWER],
}


def render(name, messages, **options):
  tokens = dict(bos_token='<bos>', eos_token='</s>')
  return render_chat(TEMPLATES[name], messages, **{**tokens, **options})


@pytest.mark.parity
@pytest.mark.parametrize('conversation', CONVERSATIONS)
@pytest.mark.parametrize('name', TEMPLATES)
@pytest.mark.parametrize('prompt', [True, False])
def test_as_transformers_renders_it(name, conversation, prompt):
  import tokenizers
  import transformers

  messages = CONVERSATIONS[conversation]
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()),
    bos_token='<bos>',
    eos_token='</s>',
  )
  expected = tokenizer.apply_chat_template(
    messages, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=prompt
  )
  assert render(name, messages, add_generation_prompt=prompt) == expected


def test_smollm():
  assert render('smollm', [ASK]) == (
    '<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n'
    f'{ASK["content"]}<|im_end|>\n<|im_start|>assistant\n'
  )


def test_gemma():
  rendered = render('gemma', CONVERSATIONS['long'])
  assert rendered == (
    '<bos><start_of_turn>user\n You know films. \n\nIs "Alien" <b>good</b> & scary?<end_of_turn>\n'
    '<start_of_turn>model\n<think>hm</think>\nJa, «sehr» gut.<end_of_turn>\n'
    '<start_of_turn>user\nAnd "Heat"?<end_of_turn>\n<start_of_turn>model\n'
  )


def test_llama3():
  today = datetime.datetime.now().strftime('%d %b %Y')
  assert render('llama3', [SYSTEM, ASK], add_generation_prompt=False) == (
    '<bos><|start_header_id|>system<|end_header_id|>\n\n'
    f'Today: {today}\n\nYou know films.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n'
    'Is "Alien" <b>good</b> & scary?<|eot_id|>'
  )


def test_qwen():
  rendered = render('qwen', CONVERSATIONS['long'], add_generation_prompt=False)
  assert rendered == (
    '<|im_start|>system\n You know films. <|im_end|>\n'
    f'<|im_start|>user\n{ASK["content"]}<|im_end|>\n'
    '<|im_start|>assistant\nJa, «sehr» gut.<|im_end|>\n'
    '<|im_start|>user\nAnd "Heat"?<|im_end|>\n3'
  )


def test_blocks_leave_no_lines_and_json_is_no_html():
  assert render('blocks', CONVERSATIONS['answered']) == (
    '    - ' + json.dumps(ASK['content']) + '\n["user", "assistant"] </s>'
  )


def test_a_token_that_the_model_lacks_is_undefined():
  template = '{{ bos_token if bos_token is defined else "none" }}{{ eos_token }}'
  assert render_chat(template, [ASK]) == 'none'
  assert render_chat(template, [ASK], bos_token='<s>', eos_token='</s>') == '<s></s>'


@pytest.mark.parametrize(
  ('template', 'messages', 'message'),
  [
    (GEMMA, [ASK, ASK], r'refuses the messages \(user, user\): Roles must alternate'),
    ('a\n{% if %}', [ASK], 'chat template, line 2: '),
    ('{{ messages[3].role }}', [ASK], 'chat template: UndefinedError: '),
    ('{{ 1 / 0 }}', [ASK], 'chat template: ZeroDivisionError: '),
    ("{{ ''.__class__.__mro__ }}", [ASK], 'chat template: SecurityError: '),
    ("{{ messages.append('x') }}", [ASK], 'chat template: SecurityError: '),
    (SMOLLM, [{'role': 'user'}], r"message 0 {'role': 'user'}: 'content' must be text"),
    (SMOLLM, [ASK, {'role': 1, 'content': ''}], "message 1 .*: 'role' must be text"),
  ],
)
def test_what_is_wrong_is_told(template, messages, message):
  with pytest.raises(UsageError, match=message):
    render_chat(template, messages, bos_token='<bos>')


def test_tensorflow_is_not_needed():
  code = 'import sys, ilm_jax.lm.chat; sys.exit("tensorflow" in sys.modules)'
  assert subprocess.run([sys.executable, '-c', code]).returncode == 0

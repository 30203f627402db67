"""Chat templates in the styles of the families, conversations for them, and a tokenizer with one token a character."""

import json

from tokenizers import Tokenizer, decoders, models, processors

CHATML = """{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<s>system
Be kind.</s>
' }}{% endif %}{{ '<s>' + m['role'] + '
' + m['content'] + '</s>' + '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant
' }}{% endif %}"""

BRACKETS = """{% if messages[0]['role'] == 'system' %}
    {%- set rest = messages[1:] %}{% set first = messages[0]['content'] %}
{%- else %}{% set rest = messages %}{% set first = false %}{% endif %}
{%- for m in rest %}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {%- if m['role'] == 'user' %}{% if loop.index0 == 0 and first %}{% set text = first + '\\n' + m['content'] %}
    {%- else %}{% set text = m['content'] %}{% endif %}
    {{- bos_token + '[ask] ' + text.strip() + ' [/ask]' }}
    {%- else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}"""

HEADERS = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}
    {%- else %}{% set date_string = '1 May 2024' %}{% endif %}
{%- endif %}
{%- if messages[0].role == 'system' %}{% set said = messages[0].content|trim %}{% set messages = messages[1:] %}
{%- else %}{% set said = '' %}{% endif %}
{{- '<h>system</h>\\n\\nToday: ' ~ date_string ~ '\\n' ~ said ~ '<e>' }}
{%- if tools is not none %}{{ tools | tojson(indent=4) }}{% endif %}
{%- for m in messages %}
    {%- if not (m.role == 'tool' or 'tool_calls' in m) %}
        {{- '<h>' + m.role + '</h>\\n\\n' + m.content | trim + '<e>' }}
    {%- elif 'tool_calls' in m %}{{ '<h>assistant</h>\\n\\n' + m.tool_calls[0].function | tojson + '<e>' }}
    {%- else %}{{ '<h>tool</h>\\n\\n' }}{% if m.content is mapping %}{{ m.content | tojson }}{% else %}{{ m.content }}
    {%- endif %}{{ '<e>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<h>assistant</h>\\n\\n' }}{% endif %}
"""

ROLES = """{% for m in messages %}
{% if m['role'] == 'user' %}
{{ '<|user|>\\n' + m['content'] + eos_token }}
{% elif m['role'] == 'system' %}
{{ '<|system|>\\n' + m['content'] + eos_token }}
{% elif m['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + m['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

TURNS = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}
{%- for m in messages %}{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}
{%- endif %}{{ '<t>' + role + '\\n' + m['content'] | trim + '</t>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<t>model\\n' }}{% endif %}"""

THINKING = """{%- set ns = namespace(last=messages|length - 1, seek=true) %}
{%- for m in messages[::-1] %}{% set i = messages|length - 1 - loop.index0 %}
    {%- if ns.seek and m.role == 'user' %}{% set ns.seek = false %}{% set ns.last = i %}{% endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set said, why = m.content, '' %}
        {%- if m.reasoning_content is string %}{% set why = m.reasoning_content %}
        {%- elif '</think>' in said %}{% set why = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set said = said.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or why) %}
            {{- '<s>assistant\\n<think>\\n' + why.strip('\\n') + '\\n</think>\\n\\n' + said + '</s>\\n' }}
        {%- else %}{{ '<s>assistant\\n' + said + '</s>\\n' }}{% endif %}
    {%- else %}{{ '<s>' + m.role + '\\n' + m.content + '</s>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<s>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

NAMES = """{%- macro say(who, what) %}{{ who }}: {{ what }}{% endmacro %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}{% continue %}{% endif %}
    {%- if m.content == 'stop' %}{% break %}{% endif %}
    {%- if m.role == 'system' %}{{ m.content ~ '\\n' }}
    {%- elif m.role == 'user' %}{{ say('USER', m.content) ~ ' ' }}
    {%- else %}{{ say('ASSISTANT', m.content) ~ eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}ASSISTANT:{% endif %}"""

OPENED = """{{ bos_token }}{% for m in messages %}
    {%- if m.role == 'system' %}{{ m.content }}
    {%- elif m.role == 'user' %}{{ '<U>' + m.content }}
    {%- else %}{{ '<A>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<A><think>\\n' }}{% endif %}"""

MARKED = """{% for m in messages %}
{%- if m.role == 'assistant' %}<s>assistant
{% generation %}{{ m.content }}</s>{% endgeneration %}

{% else %}{{ '<s>' + m.role + '\\n' + m.content + '</s>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"""

PARTS = """{% for m in messages %}{{ m.role | upper }}:{% if m.content is string %}{{ m.content }}
{%- else %}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}<{{ part.type }}>{% endif %}
{%- endfor %}{% endif %}|{{ m.name | default('nobody') }}|{{ m.get('weight', 1.5) }}
{% endfor %}{{ dict(a=1).a }}{{ [3, 1, 2] | sort | join(',') }}{{ range(3) | list }}{{ '%s' | format(unk_token) }}
{%- if add_generation_prompt %}ASSISTANT:{% endif %}"""

STYLES = dict(chatml=CHATML, brackets=BRACKETS, headers=HEADERS, roles=ROLES, turns=TURNS, thinking=THINKING,
              names=NAMES, opened=OPENED, marked=MARKED, parts=PARTS)


def said(*texts, system=None):
    """The user and the assistant in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system else []) + turns


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2, None]}}}
CONVERSATIONS = [
    said("Hi <b>&amp;</b> \"quoted\""),
    said("  spaces \n", "so ", "and?", system="Answer in ' one ' word."),
    said("a", "<think>\nwhy\n</think>\n\nb", "c", "<think>\nwhy not\n</think>\n\nd"),
    said("once", "upon a "),
    [*said("what is 1 + 2"), {"role": "assistant", "content": None, "tool_calls": [CALL]},
     {"role": "tool", "name": "add", "content": "3"}],
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "see?"}], "name": "Ann", "weight": 0.1}],
    [*said("why"), {"role": "assistant", "content": "so", "thinking": "hm \u00e9\u4e2d"}, *said("more")],
    said("one", system="system alone"), said("stop", "it", "now"), [{"role": "assistant", "content": "I begin"}],
]

SPECIAL = ["<unk>", "<s>", "</s>"]
CHARACTERS = " \n.,?:#=*0123456789abcdefghijklmnopqrstuvwxyz"


def write_tokenizer(folder, template=None, **config):
    """One token a character; texts begin with <s>."""
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}, merges=[],
                                       unk_token="<unk>"))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", unk_token="<unk>",
        eos_token={"__type": "AddedToken", "content": "</s>"}) | config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder

"""Renderings of transformers' own Jinja environment for chat template tests.

python tests/golden/make_chat.py > tests/golden/chat.json

`families`: one template for each way published models lay out a conversation (same tokens, same constructs, written
here; the published files themselves are compared by tests/interop/chat_templates.py). `snippets`: one construct each.
`refused`: what Jinja would render and pare must refuse. expect null: transformers raises.
"""

import json

import jinja2
import transformers
from transformers.utils import chat_template_utils

from chat_conversations import CONVERSATIONS, SPECIAL, VARIANTS, at_fixed_time

CHATML = """{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are a small assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

FAMILIES = {
    "llama3": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
<|start_header_id|>system<|end_header_id|>

Today: {{ date_string }}
{{ system }}
{%- if tools is not none %}
    {% for t in tools %}{{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}<|eot_id|>
{%- for message in messages %}
    {%- if message.role == 'tool' or message.role == 'ipython' %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or (message.content is iterable and message.content is not string) %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("one tool call at a time") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "qwen2.5 and smollm2": CHATML,
    "qwen3": """{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and message.content is string
           and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {%- if loop.first and content or not loop.first %}{{- '\\n' }}{% endif %}
            {%- if call.function %}
                {%- set call = call.function %}
            {%- endif %}
            {{- '<tool_call>{"name": "' ~ call.name ~ '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}{{- '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' ~ content ~ '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != "tool" %}{{- '<|im_end|>\\n' }}{% endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}""",
    "deepseek-r1-distill": """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(is_tool=false, system_prompt='') -%}
{%- for message in messages %}{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor -%}
{{bos_token}}{{ns.system_prompt}}{%- for message in messages -%}
{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<｜User｜>' + message['content']}}{%- endif -%}
{%- if message['role'] == 'assistant' and message['content'] is not none -%}
{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif -%}
{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif -%}
{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}{{'<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>'}}{%- endif -%}
{%- endfor -%}{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜><think>\\n'}}{% endif %}""",
    "smollm3": """{%- set mode = "/no_think" if enable_thinking is defined and not enable_thinking else "/think" -%}
{%- macro turn(role, text="") -%}
<|im_start|>{{ role }}
{{ text }}<|im_end|>
{% endmacro -%}
{%- if messages[0].role == "system" -%}
  {%- set instructions = messages[0].content.replace("/no_think", "").replace("/think", "").rstrip() -%}
{%- endif -%}
{{- turn("system", "Date: " ~ strftime_now("%d %B %Y") ~ "\\nMode: " ~ mode ~ "\\n" ~ instructions|default("none given")) -}}
{%- for message in messages if message.role != "system" -%}
  {%- generation %}{{ turn(message.role, text=message.content if message.content is string else "") }}{% endgeneration -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ "<|im_start|>assistant\\n" ~ ("<think>\\n\\n</think>\\n" if mode == "/no_think" else "") }}
{%- endif -%}""",
    "phi3": """{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{'<|system|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] in ['user', 'assistant'] %}{{'<|' ~ message['role'] ~ '|>' ~ '
' + message['content'] + '<|end|>' + '
'}}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>
' }}{% else %}{{ eos_token }}{% endif %}""",
    "gemma": """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}<start_of_image>
            {%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\\n'}}
{%- endif -%}
""",
    "mistral": """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{{- bos_token }}
{%- for message in loop_messages | rejectattr("role", "equalto", "tool") %}
    {%- if not message.tool_calls is defined and (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- for key, val in tool.function.items() if key != "return" %}
                    {{- '"' + key + '": ' + (val|tojson if val is not string else '"' + val + '"') }}
                    {%- if not loop.last %}{{- ", " }}{% endif %}
                {%- endfor %}
                {{- "}}" ~ ("]" if loop.last else ", ") }}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {%- for call in message.tool_calls %}
            {%- set out = call.function|tojson %}
            {{- out[:-1] + ', "id": "' + call.id + '"}' }}
            {%- if call.id|length != 9 %}{{- raise_exception("ids have 9 letters") }}{% endif %}
        {%- endfor %}
        {{- eos_token }}
    {%- else %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- endif %}
{%- endfor %}
""",
}

DATA = {
    "messages": [{"role": "user", "content": "hi"}], "n": 7, "neg": -7, "f": 2.5, "big": 1e16, "tiny": 0.00001, "whole": 3.0,
    "text": "  Grüne Welt\n", "words": "a b  c", "quotes": "it's \"so\"", "letters": ["b", "a", "C"], "empty": [], "no": None,
    "flag": True, "d": {"b": 1, "A": [1, 2.0, None, True, "ü"], "c": {"x": "y<&>"}}, "list": [1, 2, 3, 4, 5],
    "people": [{"name": "ann", "age": 3, "on": True}, {"name": "bob", "age": 5}, {"name": "cyn", "age": 5, "on": False}],
    "emoji": "🌍\u200bé\x7f\u00a0", "items": "shadow", "pairs": [["k", 1], ["l", 2]],
}

SNIPPETS = r"""
{{ text }}|{{ text|trim }}|{{ text.strip() }}|{{ text.lstrip() }}|{{ text.rstrip('\\n') }}|{{ 'xxaxx'.strip('x') }}
{{ n + 2 }} {{ n - 2 }} {{ n * 2 }} {{ n / 2 }} {{ n // 2 }} {{ neg // 2 }} {{ n % 3 }} {{ neg % 3 }} {{ n % -3 }} {{ -n }} {{ - n|string }}
{{ f * 2 }} {{ f + n }} {{ big }} {{ tiny }} {{ whole }} {{ 0.1 + 0.2 }} {{ 10 / 5 }}
{{ n / 0 }}
{{ n % 0 }}
{{ 'a' + 1 }}
{{ 'a' ~ 1 ~ none ~ true ~ 1.0 ~ [1, 'b'] ~ missing }}
{{ 'ab' * 3 }}{{ 2 * 'c' }}{{ [1] + [2] }}{{ (1, 2) + (3,) }}
{{ '1' + 2 ~ 3 + '4' }}
{% for a, b in [[1, 2, 3]] %}{{ a }}{% endfor %}
{{ 1 ~ 2 + 3 }}
{{ n == 7.0 }} {{ n != 7 }} {{ n < 8 <= 8 }} {{ 1 < 2 > 1 }} {{ 'a' < 'b' }} {{ 'a' == 1 }} {{ [1] == [1.0] }} {{ (1,) == [1] }} {{ true == 1 }}
{{ none < 1 }}
{{ 'b' in letters }} {{ 'x' not in letters }} {{ 'el' in 'Welt' }} {{ 'b' in d }} {{ 1 in d }} {{ '' in 'x' }} {{ 3 in list }}
{{ 1 in 'x' }}
{{ missing in 'x' }}
{{ 'x' in missing }} {{ missing == other }} {{ missing == none }} {{ missing|length }} {{ missing|list }} {{ missing or 'dflt' }}
{{ missing.name }}
{{ missing + 'x' }}
{{ missing() }}
{{ n() }}
{{ no.name is defined }} {{ d.zz is defined }} {{ d.b is defined }} {{ d['c'].x }} {{ d.c['x'] }} {{ d.A[0] }} {{ d.A.1 }} {{ d.A[-1] }} {{ d.A[99] is defined }}
{{ d }}
{{ d.A }}{{ ('a',) }}{{ () }}{{ (1, 'b') }}{{ [] }}{{ {} }}{{ {'a': n, "q'": none} }}
{{ quotes|list }}{{ [quotes] }}{{ [emoji] }}{{ ["tab\\t", "nl\\n", "back\\\\", "it's"] }}
{{ d|tojson }}|{{ d|tojson(indent=2) }}|{{ emoji|tojson(ensure_ascii=true) }}|{{ emoji|tojson }}|{{ [big, tiny, f, n, flag, no]|tojson }}
{{ d|tojson(separators=(',', ':')) }}{{ d|tojson(sort_keys=true) }}{{ {}|tojson(indent=1) }}{{ []|tojson(indent=1) }}{{ "a/b\\u2028\\x1f\\b\\f"|tojson }}
{{ d|tojson(indent='--') }}{{ d.A|tojson(indent=0) }}
{{ missing|tojson }}
{{ list[1:3] }}{{ list[:-1] }}{{ list[::-1] }}{{ list[::2] }}{{ list[-2:] }}{{ list[10:] }}{{ list[3:1:-1] }}{{ list[-100:100:3] }}{{ list[4::-2] }}
{{ text[2:7] }}{{ text[::-1] }}{{ text[2] }}{{ text[-2] }}{{ emoji[0] }}{{ emoji[1:3]|length }}{{ 'abc'[5] is defined }}
{{ n[1:] }}
{{ letters|join(', ') }}|{{ [1, none, 'x']|join('-') }}|{{ people|join(';', attribute='name') }}|{{ 'abc'|join('.') }}|{{ letters|join }}|{{ ', '.join(letters) }}
{{ ', '.join(list) }}
{{ letters|length }} {{ text|length }} {{ d|length }} {{ emoji|length }} {{ ''|count }}
{{ n|length }}
{{ 'hElLo wORLD'|upper }}{{ 'HeLLo'|lower }}{{ 'hElLo wORLD'|capitalize }}{{ 'hello wORLD-foo (bar)'|title }}{{ text|upper }}{{ n|upper }}
{{ 'hElLo'.upper() }}{{ 'HeLLo'.lower() }}{{ 'hELLO wORLD'.capitalize() }}
{{ words.split(' ') }}{{ words.split() }}{{ words.split('b', 1) }}{{ 'a,b,c'.split(',', 1) }}{{ 'a,b,c'.rsplit(',', 1) }}{{ ' x  y z '.split(none, 1) }}{{ ''.split() }}{{ ''.split(',') }}
{{ words.split('') }}
{{ 'hello'.startswith('he') }}{{ 'hello'.endswith('he') }}{{ 'hello'.startswith(('x', 'h')) }}{{ 'hello'.find('l') }}{{ 'hello'.rfind('l') }}{{ 'üx'.find('x') }}{{ 'a'.find('b') }}{{ 'banana'.count('an') }}
{{ 'aXbX'.replace('X', '--') }}{{ 'aXbX'.replace('X', '-', 1) }}{{ 'abc'|replace('b', 5) }}{{ 'abc'.replace('', '.') }}{{ 'aaa'|replace('a', 'b', 2) }}
{{ 'prefix-x'.removeprefix('prefix-') }}{{ 'x.txt'.removesuffix('.txt') }}
{{ missing|default('x') }}{{ none|default('x') }}{{ none|default('x', true) }}{{ ''|d('y', boolean=true) }}{{ ''|d('y') }}{{ missing|default }}
{{ letters|first }}{{ letters|last }}{{ empty|first is defined }}{{ 'xyz'|first }}{{ 'xyz'|last }}{{ d|first }}{{ missing|first is defined }}
{{ letters|reverse|list }}{{ 'abc'|reverse }}
{{ '42'|int }}{{ ' -7 '|int }}{{ 'x'|int }}{{ 'x'|int(5) }}{{ 3.9|int }}{{ true|int }}{{ none|int }}
{{ d|items|list }}{{ d.items()|list }}{{ d.keys()|list }}{{ d.values()|list }}{{ missing|items|list }}
{{ n|items|list }}
{{ d|dictsort }}
{{ d.get('b') }}{{ d.get('zz') }}{{ d.get('zz', 'fb') }}{{ d.get(1, 'fb') }}
{{ people|map(attribute='name')|list }}{{ letters|map('upper')|list }}{{ people|map(attribute='on', default='?')|list }}{{ people|map(attribute='zz')|list|length }}{{ [[d, 2]]|map(attribute='0.c.x')|list }}
{{ people|selectattr('on')|map(attribute='name')|join }}{{ people|rejectattr('on')|map(attribute='name')|join }}{{ people|selectattr('age', 'eq', 5)|list|length }}{{ people|selectattr('on', 'defined')|list|length }}{{ people|selectattr('age', 'gt', 4)|map(attribute='name')|first }}{{ people|selectattr('name', 'in', ['ann', 'cyn'])|list|length }}
{{ list|select('odd')|list }}{{ list|reject('odd')|list }}{{ list|select('divisibleby', 2)|list }}{{ [0, 1, '', 'a']|select|list }}{{ none|map('upper')|list }}{{ 0|select|list }}
{{ list|select('nope')|list }}
{{ 5|map('upper')|list }}
{{ n is odd }}{{ n is even }}{{ n is divisibleby 7 }}{{ n is divisibleby(2) }}{{ n is number }}{{ f is number }}{{ flag is number }}{{ n is integer }}{{ flag is integer }}{{ f is float }}{{ flag is boolean }}
{{ text is string }}{{ d is mapping }}{{ d is sequence }}{{ letters is sequence }}{{ text is sequence }}{{ d is iterable }}{{ n is iterable }}{{ missing is iterable }}{{ missing is sequence }}{{ missing is string }}{{ no is none }}{{ missing is none }}{{ d.items() is sequence }}{{ d.items() is iterable }}
{{ flag is true }}{{ flag is false }}{{ 1 is true }}{{ flag is sameas true }}{{ n is not odd }}{{ not n is odd }}{{ missing is undefined }}{{ missing is not defined }}{{ n is eq 7 }}{{ n is ne(7) }}{{ 'a' is in letters }}{{ 1 is lt 2 }}{{ 2 is ge 2 }}
{{ 'odd' if n is odd else 'even' }}{{ 'x' if false }}{{ ('x' if false) is defined }}{{ 1 if 0 else 2 if 0 else 3 }}
{{ not true and false }}{{ (true or false) and 'v' }}{{ 0 or '' or none }}{{ 1 and 2 }}{{ false or 'x' }}
{% for x in list %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.previtem }}{{ loop.nextitem }};{% endfor %}
{% for x in list if x is odd %}{{ loop.index }}/{{ loop.length }}={{ x }}{% if not loop.last %},{% endif %}{% else %}none{% endfor %}
{% for x in empty %}{{ x }}{% else %}none{% endfor %}{% for x in missing %}{{ x }}{% else %}none{% endfor %}{% for c in 'aü🌍' %}[{{ c }}]{% endfor %}{% for k in d %}{{ k }}{% endfor %}{% for i in range(3) %}{{ i }}{% endfor %}{% for i in range(5, 1, -2) %}{{ i }}{% endfor %}
{% for x in n %}{{ x }}{% endfor %}
{% for x in none %}{{ x }}{% endfor %}
{% for k, v in pairs %}{{ k }}={{ v }};{% endfor %}{% for k, v in d.items() %}{{ k }},{% endfor %}{% for a, b in ['xy', (1, 2)] %}{{ a }}{{ b }}{% endfor %}
{% for k, v in d|items %}{{ k }}{{ loop.length }},{% endfor %}{% for (a, b) in pairs %}{{ a }}{% endfor %}
{% for x in list %}{% if x == 2 %}{% continue %}{% endif %}{% if x == 4 %}{% break %}{% endif %}{{ x }}{% else %}e{% endfor %}
{% for x in list %}{% continue %}{% else %}e{% endfor %}{% for x in list %}{% break %}{% else %}e{% endfor %}
{% set x = 1 %}{% for i in list %}{% set x = i %}{{ x }}{% endfor %}{{ x }}
{% set x = 1 %}{% for i in [1, 2] %}{{ x }}{% set x = 5 %}{{ x }}{% endfor %}{% if true %}{% set x = 9 %}{% endif %}{{ x }}
{% set ns = namespace(found=false, n=0) %}{% for i in list %}{% set ns.n = ns.n + i %}{% if i == 3 %}{% set ns.found = true %}{% endif %}{% endfor %}{{ ns.n }}{{ ns.found }}{{ ns.zz is defined }}
{% set ns = namespace() %}{% set ns._x = 1 %}
{% set d.x = 1 %}
{% set t %}a{{ n }}b{% endset %}[{{ t }}]{{ t|length }}
{% macro m(a, b='B', c=a) %}({{ a }}{{ b }}{{ c }}){% endmacro %}{{ m(1) }}{{ m(1, 2) }}{{ m(b=3, a=4) }}{{ m() }}{{ m(1, 2, 3) }}
{% macro m(a) %}{{ a }}{% endmacro %}{{ m(1, 2) }}
{% macro m(a) %}{{ a }}{% endmacro %}{{ m(zz=2) }}
{% macro f(n) %}{{ n }}{% if n > 0 %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(5) }}
{% set x = 1 %}{% macro m() %}{{ x }}{% set x = 3 %}{{ x }}{% endmacro %}{{ m() }}{{ x }}{% set x = 2 %}{{ m() }}
{% if empty %}a{% elif n == 7 %}b{% else %}c{% endif %}{% if d %}1{% endif %}{% if '' %}2{% endif %}{% if 0.0 %}3{% endif %}{% if none %}4{% endif %}
  {% if true %}  \n  x  \n  {% endif %}  \ny
a  {%- if true -%}  b  {%- endif -%}  c
a  {{- 'x' -}}  b {{ 'y' }}\n c
  {%+ if true %}x{% endif +%}\n y
{# comment #}a{#- trimmed -#}  b  {# c #}\nd
  {# on its own line #}\nx\n  {% set y = 1 %}\n  {{ y }}\n
{% raw %}{{ not }} {% this %}{% endraw %}x{%- raw -%}  y {% endraw -%}  z
{{ 'a' 'b' "c" }}{{ "\\x41\\u00e9\\U0001F30D\\q" }}{{ 'it\\'s' }}{{ "new\nline" }}
{{ strftime_now('%d %b %Y') }} {{ strftime_now('%A %B %-d %H:%M:%S %p %j %y %m') }}
{{ raise_exception('no ' ~ n) }}
{{ messages[0].content }}{{ messages[0]['role'] }}{{ messages[-1]['content'] }}{{ bos_token }}{{ unk_token }}{{ tools }}
{{ d.items is defined }}{{ d['b'] }}{{ d['items'] is defined }}{{ items }}
{{ (d.A|tojson|safe) ~ '<x>' }}{{ text|safe }}{{ '<b>'|safe|length }}{{ {'a': '<b>'|safe}|tojson }}{% set s = '<i>'|safe %}{{ s }}{{ s if s is string }}
{% generation %}x{% set q = 1 %}{{ q }}{% endgeneration %}{{ q is defined }}
{{ true }}{{ True }}{{ none }}{{ None }}{{ false }}
{{ letters.append('x') }}
{{ d.update({'x': 1}) }}
{{ [].__class__.__mro__ }}
{{ range(1000000)|length }}
{{ range(3)|list }}{{ range(3)|length }}{{ range(2, 9)[1] }}
{% if %}x{% endif %}
{% for x in list %}{{ x }}
{{ n
{{ (n }}
{{ n) }}
{% endif %}
{% break %}
{% unknown %}
{{ n is string if true else 1 }}
{{ n|nofilter }}
{{ 1 2 }}
{{ }}
{{ 'unclosed }}
{{ n! }}
{{ d.b.c.e }}
{{ [1, 2,] }}{{ {'a': 1,} }}{{ (1, 2,) }}{{ n, 2 }}
"""

REFUSED = r"""
{{ 'a%s' % 1 }}
{{ '{}'.format(1) }}
{{ 2 ** 3 }}
{{ range(3) }}
{{ d.items() }}
{{ people|selectattr('on') }}
{{ letters|sort }}
{{ letters|unique|list }}
{{ ('<i>'|safe) + '<b>' }}
{{ ('<i>'|safe).strip() }}
{{ loop }}{% for x in list %}{{ loop }}{% endfor %}
{% for x in list %}{{ loop.cycle('a', 'b') }}{% endfor %}
{% set a, b = 1, 2 %}{{ a }}
{% set x | upper %}a{% endset %}
{% call m() %}{% endcall %}{% macro m() %}{{ caller() }}{% endmacro %}
{% filter upper %}a{% endfilter %}
{% with a = 1 %}{{ a }}{% endwith %}
{% include 'x' %}
{% import 'x' as y %}
{% extends 'x' %}
{% block b %}{% endblock %}
{% macro m() %}{{ varargs }}{% endmacro %}{{ m(1) }}
{{ dict(a=1) }}
{{ lipsum() }}
{{ cycler(1) }}
{{ m(*list) }}
{{ {1: 2} }}
{{ {'a': 1}.copy() }}
{{ 'straße'|upper }}
{{ strftime_now('%c') }}
{{ n.real }}
{{ ''.__class__ }}
{{ messages.__class__ }}
{{ d.__init__ }}
{{ d|map('attr', '__class__')|list }}
{% set g = people|selectattr('on') %}{{ g|list|length }}{{ g|list|length }}
{% set ns = namespace(x=2) %}{% for x in list if x != ns.x %}{% set ns.x = x %}{{ x }}{% endfor %}
{% for x in list recursive %}{{ x }}{% endfor %}
{{ 0x10 }}
{{ 1_000 }}
{{ 1.5e0 }}
{{ '\\101' }}
"""


def render(source, variables):
    try:
        return chat_template_utils._compile_jinja_template(source).render(**variables)
    except Exception:  # whatever transformers raises, the conversation is not rendered
        return None


def unescaped(block):
    return [line.replace("\\\\", "\0").replace("\\n", "\n").replace("\0", "\\")
            for line in block.strip("\n").split("\n")]


at_fixed_time(chat_template_utils)
out = {"transformers": transformers.__version__, "jinja2": jinja2.__version__, "special": SPECIAL,
       "conversations": CONVERSATIONS, "variants": VARIANTS, "families": {}, "data": DATA}
for name, source in FAMILIES.items():
    texts, cases = [], {}
    for conversation, messages in CONVERSATIONS.items():
        cases[conversation] = []
        for variant in VARIANTS:
            text = render(source, {**SPECIAL, "messages": messages, "tools": None, "documents": None, **variant})
            if text not in texts:
                texts.append(text)
            cases[conversation].append(texts.index(text))
    out["families"][name] = {"template": source, "texts": texts, "cases": cases}
variables = {**SPECIAL, "tools": None, "documents": None, "add_generation_prompt": False, **DATA}
out["snippets"] = [[source, render(source, variables)] for source in unescaped(SNIPPETS)]
out["refused"] = unescaped(REFUSED)
print(json.dumps(out, ensure_ascii=False, indent=None, separators=(",", ":")).replace('],["', '],\n["'))

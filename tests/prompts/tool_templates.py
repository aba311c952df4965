"""Chat templates that know tools and reasoning, in the forms of Qwen3 and Qwen3.5 but shorter."""

from __future__ import annotations

_TEXT = (
    "{%- macro text(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for item in content %}{{ item.text }}{% endfor %}{% endif %}{% endmacro %}"
)
_TOOLS = (
    "{%- if tools %}{{ '<|im_start|>system\n# Tools\n<tools>' }}{% for tool in tools %}{{ '\n' ~ (tool | tojson) }}"
    "{% endfor %}{{ '\n</tools>' ~ TEACHING ~ '<|im_end|>\n' }}{% endif %}"
)
_TURNS = (
    "{%- set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = text(m.content) %}{% if m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' ~ content ~ '\n</tool_response><|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{% set thought = '' %}{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last and thought %}{{ '<think>\n' ~ thought ~ '\n</think>\n\n' }}{% endif %}{{ content }}"
    "{% for c in m.tool_calls or [] %}{% set c = c.function %}CALL{% endfor %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ content ~ '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
_JSON_CALL = (
    "{{ '\n<tool_call>\n{\"name\": \"' ~ c.name ~ '\", \"arguments\": ' ~ (c.arguments | tojson) ~ '}\n</tool_call>' }}"
)
_XML_CALL = (
    "{{ '<tool_call>\n<function=' ~ c.name ~ '>\n' }}{% for key, value in c.arguments | items %}"
    "{{ '<parameter=' ~ key ~ '>\n' ~ (value if value is string else value | tojson) ~ '\n</parameter>\n' }}"
    "{% endfor %}"
    "{{ '</function>\n</tool_call>' }}"
)
_ASK = "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}SWITCH{% endif %}"
_CLOSED = "{{ '<think>\n\n</think>\n\n' }}"
# Qwen3 thinks by itself unless it is told not to; Qwen3.5's prompt opens the reasoning.
_JSON_SWITCH = "{% if enable_thinking is defined and enable_thinking is false %}" + _CLOSED + "{% endif %}"
_XML_SWITCH = _JSON_SWITCH.replace("{% endif %}", "{% else %}{{ '<think>\n' }}{% endif %}")


def _template(teaching: str, call: str, switch: str) -> str:
    tools, ask = _TOOLS.replace("TEACHING", repr(teaching)), _ASK.replace("SWITCH", switch)
    return _TEXT + tools + _TURNS.replace("CALL", call) + ask


JSON_TOOLS = _template("\nAnswer <tool_call>{name, arguments}</tool_call>", _JSON_CALL, _JSON_SWITCH)
XML_TOOLS = _template("\nAnswer <tool_call><function=example></function></tool_call>", _XML_CALL, _XML_SWITCH)
ALWAYS_THINKS = XML_TOOLS.replace(_XML_SWITCH, "{{ '<think>\n' }}")

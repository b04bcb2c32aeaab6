"""A chat template as Jinja, for the folders that other engines open (vLLM, SGLang, transformers' processors).

Nothing here is used to make our own prompts: a Jinja template only makes text, and text cannot keep a person's `</s>`
from becoming a special token. Not covered: `plain` (captions are no chat) and the mmtag templates (they invent turns).
"""

from __future__ import annotations

import json

from llava.prompt.chat_template import ChatTemplate


def write_jinja(template: ChatTemplate, *, with_bos: bool) -> str | None:
    """The Jinja source that renders what `template` renders, None where it cannot; one long line, as blanks count.

    with_bos: begin with the tokenizer's BOS, since chat endpoints tokenize without adding it.
    """
    if template.drops_user_text or template.received is not None or template.preset:
        return None
    system = f"{_say(template.system_prefix)}{{{{ found.system }}}}{_say(template.system_suffix)}"
    head = "" if template.system_in_first_turn else f"{{% if found.system %}}{system}{{% endif %}}"
    first = f"{{% if found.system and not found.user %}}{system}{{% endif %}}" if template.system_in_first_turn else ""
    drop = "{% if messages and messages[0]['role'] == 'assistant' %}{% set messages = messages[1:] %}{% endif %}"
    user = (
        f"{{% if found.user %}}{_say(template.before_user)}{{% endif %}}{_say(template.user_prefix)}"
        + _unless_open(template, _say(template.user_lead) + first + "{{ said }}" + _say(template.user_suffix))
        + "{% set found.user = true %}"
    )
    answer = ("" if template.fresh_turns else _say(template.assistant_prefix)) + _unless_open(
        template,
        _say(template.answer_lead) + "{{ said }}" + _say(template.answer_suffix) + _say(template.after_answer),
    )
    return (
        _WORDS
        + f"{{% set found = namespace(user=false, system={json.dumps(template.system, ensure_ascii=False)}) %}}"
        + "{% if messages and messages[0]['role'] == 'system' %}{% set found.system = words(messages[0]['content']) %}"
        + "{% set messages = messages[1:] %}{% endif %}"
        + (drop if template.drops_leading_answer else "")
        + ("{{ bos_token }}" if with_bos else "")
        + head
        + "{% for message in messages %}{% set said = words(message['content']) %}"
        + f"{{% if message['role'] == 'user' %}}{user}{{% else %}}{answer}{{% endif %}}{{% endfor %}}"
        + f"{{% if add_generation_prompt %}}{_say(template.assistant_prefix)}"
        + (f"{{% else %}}{_say(template.tail)}" if template.tail else "")
        + "{% endif %}"
    )


# Pictures first, one line each, then the words without the blanks around them; words alone stay as they are.
_WORDS = (
    "{% macro words(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% set all = namespace(text='', images=0) %}"
    "{% for part in content %}{% if part['type'] == 'text' %}{% set all.text = all.text + part['text'] %}"
    "{% else %}{% set all.images = all.images + 1 %}{% endif %}{% endfor %}"
    "{% if all.images %}{% set all.text = all.text | trim %}{% endif %}"
    "{% for number in range(all.images) %}<image>"
    "{% if all.text or not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}{{ all.text }}"
    "{% endif %}{% endmacro %}"
)


def _say(text: str) -> str:
    """Jinja that writes a piece of markup, the tokenizer's own tokens by name."""
    if not text:
        return ""
    for name in ("bos", "eos"):
        before, mark, after = text.partition(f"{{{name}}}")
        if mark:
            return _say(before) + f"{{{{ {name}_token }}}}" + _say(after)
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}"


def _unless_open(template: ChatTemplate, body: str) -> str:
    """An empty turn stays open, where the template has it so (the first one that carries a system text excepted)."""
    if not template.empty_is_open:
        return body
    keep = "said or (found.system and not found.user)" if template.system_in_first_turn else "said"
    return f"{{% if {keep} %}}{body}{{% endif %}}"

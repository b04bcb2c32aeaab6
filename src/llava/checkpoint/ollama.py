"""A chat template in the two languages of llama.cpp's world: Jinja (llama-server) and Ollama's Go templates.

Both are made from the fields of `ChatTemplate`, so that a conversation there is cut into the same tokens as here.
Not covered: the preset turns of the original's `default` template, and its mmtag tags around pictures.
"""

from __future__ import annotations

import json

from llava.prompt.chat_template import ChatTemplate
from llava.prompt.tokenizer import Tokenizer

LONGEST_CONTEXT = 4096  # what Ollama reserves memory for; a model with less says so


def write_jinja(template: ChatTemplate, tokenizer: Tokenizer, *, images_on_own_lines: bool = False) -> str:
    """The template in Jinja, as `tokenizer.chat_template` of a GGUF file. BOS is the tokenizer's, not in the text.

    images_on_own_lines: end the line after a picture, as our templates do with pictures in front of the words.
    llama-server puts a mark like `<__media_x__>` in a picture's place, and the words right behind it.
    """
    put = _JinjaText(tokenizer)
    line_ends = (
        "{%- if '<__media' in text -%}"
        "{%- set text = text | replace('__>', '__>\\n') | replace('__>\\n\\n', '__>\\n') -%}{%- endif -%}"
        if images_on_own_lines
        else ""
    )
    system = (
        put(template.system_prefix) + "{{- ns.system -}}" + put(template.system_suffix)
        if template.system or template.system_prefix or template.system_suffix
        else "{{- ns.system -}}"
    )
    in_turn = template.system_in_first_turn
    shown = "{%- if ns.system -%}" + system + "{%- endif -%}"
    user = (
        put(template.user_prefix)
        + put(template.user_lead)
        + ("{%- if not ns.seen -%}" + shown + "{%- endif -%}" if in_turn else "")
        + "{{- text -}}"
        + put(template.user_suffix)
    )
    before = "{%- if ns.seen -%}" + put(template.before_user) + "{%- endif -%}" if template.before_user else ""
    answer = (
        put("" if template.fresh_turns else template.assistant_prefix)
        + put(template.answer_lead)
        + "{{- text -}}"
        + put(template.answer_suffix)
        + put(template.after_answer)
    )
    return (
        "{%- set ns = namespace(seen=false, system=" + json.dumps(template.system, ensure_ascii=False) + ") -%}"
        "{%- if messages and messages[0]['role'] == 'system' -%}"
        "{%- set ns.system = messages[0]['content'] -%}{%- endif -%}"
        + ("" if in_turn else shown)
        + "{%- for message in messages -%}{%- set text = message['content'] -%}"
        + "{%- if message['role'] == 'user' -%}"
        + line_ends
        + before
        + user
        + "{%- set ns.seen = true -%}"
        + "{%- elif message['role'] == 'assistant' -%}"
        + answer
        + "{%- endif -%}{%- endfor -%}"
        + "{%- if add_generation_prompt -%}"
        + put(template.assistant_prefix)
        + "{%- endif -%}"
    )


class _JinjaText:
    """Literal text as a Jinja expression, so that blanks and line ends stay and nothing in it is code."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: str) -> str:
        text = fill_marks(text, self.tokenizer)
        return "{{- " + json.dumps(text, ensure_ascii=False) + " -}}" if text else ""


def fill_marks(text: str, tokenizer: Tokenizer) -> str:
    """Template text with `{bos}` and `{eos}` written out as this tokenizer's tokens."""
    for mark, i in (("{bos}", tokenizer.bos_token_id), ("{eos}", tokenizer.eos_token_id)):
        if mark in text:
            text = text.replace(mark, "" if i is None else tokenizer.decode([i], skip_special=False))
    return text


def write_modelfile(
    template: ChatTemplate, tokenizer: Tokenizer, *, language_model: str, mmproj: str, context_length: int
) -> str:
    """An Ollama Modelfile beside the two GGUF files: `ollama create NAME -f Modelfile`."""
    stops = list(dict.fromkeys(fill_marks(text, tokenizer) for text in template.stop_strings))
    lines = [
        f"FROM ./{language_model}",
        f"FROM ./{mmproj}",
        f'TEMPLATE """{_go_template(template, tokenizer)}"""',
        *([f'SYSTEM """{template.system}"""'] if template.system else []),
        *(f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in stops if text),
        f"PARAMETER num_ctx {min(context_length, LONGEST_CONTEXT)}",
    ]
    return "\n".join(lines) + "\n"


def _go_template(template: ChatTemplate, tokenizer: Tokenizer) -> str:
    def put(text: str) -> str:
        return fill_marks(text, tokenizer).replace("{{", '{{ "{{" }}')

    shown = (
        "{{ if $.System }}" + put(template.system_prefix) + "{{ $.System }}" + put(template.system_suffix) + "{{ end }}"
    )
    in_turn = template.system_in_first_turn
    before = "{{ if $seen }}" + put(template.before_user) + "{{ end }}" if template.before_user else ""
    user = put(template.user_prefix + template.user_lead)
    first = "{{ if not $seen }}" + shown + "{{ end }}" if in_turn else ""
    prefix = "" if template.fresh_turns else template.assistant_prefix
    return (
        "{{ $seen := false }}"
        + ("" if in_turn else shown)
        + '{{ range .Messages }}{{ if eq .Role "user" }}'
        + before
        + user
        + first
        + "{{ .Content }}"
        + put(template.user_suffix)
        + '{{ $seen = true }}{{ else if eq .Role "assistant" }}'
        + put(prefix + template.answer_lead)
        + "{{ .Content }}"
        + put(template.answer_suffix + template.after_answer)
        + "{{ end }}{{ end }}"
        + put(template.assistant_prefix)
    )

"""The Jinja templates that other engines read write the same text as the renderer here."""

from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llava.prompt.chat_template import render_text
from llava.prompt.conversation import Conversation, Message, from_openai
from llava.prompt.jinja import write_jinja
from llava.prompt.templates import TEMPLATES

IMAGE = {"type": "image", "image": "cat.png"}
TALKS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "What?"}],
    "many": [
        {"role": "user", "content": [IMAGE, {"type": "text", "text": " What is it? "}]},
        {"role": "assistant", "content": 'A "cat".\n'},
        {"role": "user", "content": "Sure? {{ no }}"},
    ],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}],
    "pictures": [{"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE, IMAGE]}],
    "picture": [{"role": "user", "content": [IMAGE]}],
    "answer first": [{"role": "assistant", "content": "Welcome."}, {"role": "user", "content": "Hi."}],
    "answered": [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Ho."},
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": ""},
    ],
}
WRITTEN = [name for name, template in TEMPLATES.items() if write_jinja(template, with_bos=False) is not None]


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("talk", TALKS)
def test_jinja_writes_what_the_renderer_writes(name: str, talk: str) -> None:
    source = write_jinja(TEMPLATES[name], with_bos=False)
    assert source is not None
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    conversation: Conversation = from_openai(TALKS[talk])
    last: Message = conversation.messages[-1]
    for open_turn in (False, True):
        if open_turn and last.role == "assistant":
            continue
        written = environment.from_string(source).render(
            messages=TALKS[talk], add_generation_prompt=open_turn, bos_token="<s>", eos_token="</s>"
        )
        assert written == render_text(TEMPLATES[name].render(conversation, open_turn=open_turn))


def test_captions_invented_turns_and_presets_have_no_jinja() -> None:
    assert set(TEMPLATES) - set(WRITTEN) == {
        "plain", "v0_plain", "v0_mmtag", "v1_mmtag", "v0_mmtag_training", "default", "v0"
    }  # fmt: skip


def test_bos_comes_first_when_the_tokenizer_adds_it() -> None:
    source = write_jinja(TEMPLATES["llava_hf"], with_bos=True)
    assert source is not None
    environment = ImmutableSandboxedEnvironment()
    written = environment.from_string(source).render(
        messages=TALKS["one"], add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    assert written == "<s>USER: What? ASSISTANT:"

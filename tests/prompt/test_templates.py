"""Rendered texts against the original's 16 templates, XTuner's strings, and what a template refuses."""

import pytest

from llava.errors import PromptError
from llava.prompt.chat_template import render_text
from llava.prompt.conversation import Conversation, Image, Message, Text
from llava.prompt.templates import TEMPLATES, get_template
from tests.prompt.prompt_recordings import read

RECORDED = read("conversations.json")
QUESTION, ANSWER, NEXT = RECORDED["dialogue"]
PICTURE = Image(b"")


def user(*parts: str | Image) -> Message:
    return Message("user", tuple(Text(part) if isinstance(part, str) else part for part in parts))


def answer(text: str) -> Message:
    return Message("assistant", (Text(text),))


def write(name: str, *messages: Message, open_turn: bool = True, **changes: bool | str) -> str:
    return render_text(get_template(name).render(Conversation(messages), open_turn=open_turn, **changes))


DIALOGUES = {
    "prompt": ((user(QUESTION), answer(ANSWER), user(NEXT)), True),
    "prompt_without_open_assistant": ((user(QUESTION), answer(ANSWER), user(NEXT)), False),
    "prompt_all_answered": ((user(QUESTION), answer(ANSWER), user(NEXT), answer("Red.")), False),
    "prompt_one_message": ((user(QUESTION),), False),
    "prompt_single_turn": ((user(QUESTION),), True),
    "prompt_image_tuple": ((user(PICTURE, "\n", QUESTION),), True),
    "prompt_image_tuple_tag_last": ((user(QUESTION, "\n", PICTURE),), True),
    "prompt_empty_first_user": ((user(),), False),
}
# docs/differences.md: "plain" takes a picture and a caption only; the presets do not keep a picture from the front;
# an empty first question is written, where the original's Llama-2 code stops.
DIFFERENT = {
    (name, case) for name in ("default", "v0") for case in ("prompt_image_tuple_tag_last",)
} | {
    (name, "prompt_empty_first_user") for name in ("llama_2", "llava_llama_2", "mistral_instruct")
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in RECORDED["templates"] if "plain" not in name])
@pytest.mark.parametrize("case", DIALOGUES)
def test_text_equals_the_originals(name: str, case: str) -> None:
    messages, open_turn = DIALOGUES[case]
    expected = RECORDED["templates"][name][case]
    written = write(name, *messages, open_turn=open_turn)
    assert (written == expected) is ((name, case) not in DIFFERENT)


@pytest.mark.parametrize("name", ["plain", "v0_plain"])
def test_plain_is_the_picture_and_its_caption_whatever_was_asked(name: str) -> None:
    assert write(name, user("Describe.", PICTURE), answer("a dog"), open_turn=False) == "<image>a dog\n"
    assert write(name, user(PICTURE)) == "<image>"
    with pytest.raises(PromptError, match="one picture and its caption"):
        write(name, user("no picture"), answer("x"), open_turn=False)
    with pytest.raises(PromptError, match="found user, assistant, user, assistant"):
        write(name, user(PICTURE), answer("x"), user("more"), answer("y"), open_turn=False)


XTUNER = {
    "xtuner_vicuna": "USER: hi ASSISTANT:ok</s>\n<s>USER: more ASSISTANT:",
    "xtuner_mistral": "[INST] hi [/INST]ok</s>\n<s>[INST] more [/INST]",
    "internlm_chat": "<|User|>:hi<eoh>\n<|Bot|>:ok<eoa>\n<|User|>:more<eoh>\n<|Bot|>:",
    "internlm2_chat": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nok<|im_end|>\n"
    "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n",
    "qwen_chat": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nok<|im_end|>\n"
    "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n",
    "llama3_chat": "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nok<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nmore<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "phi3_chat": "<|user|>\nhi<|end|>\n<|assistant|>\nok<|end|>\n<|user|>\nmore<|end|>\n<|assistant|>\n",
}
XTUNER_SYSTEM = {
    "xtuner_vicuna": "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. Be brief.\n USER: hi ASSISTANT:",
    "xtuner_mistral": "[INST] Be brief. [/INST]\n[INST] hi [/INST]",
    "internlm_chat": "<|System|>:Be brief.\n<|User|>:hi<eoh>\n<|Bot|>:",
    "internlm2_chat": "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "llama3_chat": "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "phi3_chat": "<|system|>\nBe brief.<|end|>\n<|user|>\nhi<|end|>\n<|assistant|>\n",
}


@pytest.mark.parametrize("name", XTUNER)
def test_xtuners_seven_write_its_strings(name: str) -> None:
    assert write(name, user("hi"), answer("ok"), user("more")) == XTUNER[name]


@pytest.mark.parametrize("name", XTUNER_SYSTEM)
def test_xtuners_system_text_appears_only_when_one_is_given(name: str) -> None:
    assert write(name, Message("system", (Text("Be brief."),)), user("hi")) == XTUNER_SYSTEM[name]


def test_llava_hf_is_vicuna_without_system_text() -> None:
    written = write("llava_hf", user(PICTURE, "What?"), answer("A cat."), user("Sure?"))
    assert written == "USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:"


def test_a_system_message_replaces_the_templates_own() -> None:
    assert write("vicuna_v1", Message("system", (Text("Be brief."),)), user("hi")) == "Be brief. USER: hi ASSISTANT:"
    written = write("llava_llama_2", Message("system", (Text("Be brief."),)), user("hi"))
    assert written == "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nhi [/INST]"


def test_two_pictures_in_a_message_stay_two_and_come_first() -> None:
    assert write("llava_hf", user("a", PICTURE, " b ", PICTURE)) == "USER: <image>\n<image>\na b ASSISTANT:"


def test_inline_pictures_stay_where_they_are() -> None:
    assert write("llava_hf", user("a ", PICTURE, " b"), image_position="inline") == "USER: a <image> b ASSISTANT:"


def test_start_and_end_tokens_wrap_each_picture() -> None:
    written = write("llava_hf", user(PICTURE, PICTURE, "q"), start_end_tokens=True)
    assert written == "USER: <im_start><image><im_end>\n<im_start><image><im_end>\nq ASSISTANT:"


def test_mmtag_wraps_a_training_picture_and_announces_a_chat_picture() -> None:
    trained = write("v1_mmtag", user(PICTURE, "q"), answer("a"), open_turn=False)
    assert trained.endswith("USER: <Image><image></Image>\nq ASSISTANT: a</s>")
    assert write("v1_mmtag", user(PICTURE, "q")).endswith(
        "USER: <Image><image></Image> ASSISTANT: Received.</s>USER: q ASSISTANT:"
    )


def test_a_first_answer_is_left_out_unless_it_holds_a_picture() -> None:
    assert write("llava_hf", answer("Welcome."), user("hi")) == "USER: hi ASSISTANT:"
    with pytest.raises(PromptError, match="first turn is an answer with a picture"):
        write("llava_hf", Message("assistant", (PICTURE,)), user("hi"))


def test_a_prompt_that_ends_with_an_answer_or_says_nothing_is_refused() -> None:
    with pytest.raises(PromptError, match="must end with the user's turn"):
        write("llava_hf", user("hi"), answer("ok"))
    with pytest.raises(PromptError, match="no user turn"):
        write("llava_hf")


def test_an_unknown_template_names_the_nearest_and_all_others() -> None:
    with pytest.raises(PromptError, match=r"unknown template 'vicuna_v2'; did you mean 'vicuna_v1'\? Known: .*mpt"):
        get_template("vicuna_v2")


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_has_its_own_name_and_a_way_to_stop(name: str) -> None:
    template = TEMPLATES[name]
    assert template.name == name or TEMPLATES[template.name] is template
    assert template.stop_strings or template.answer_suffix == "{eos}"

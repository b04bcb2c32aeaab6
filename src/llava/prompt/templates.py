"""The chat templates by name. Each is one description; `chat_template` renders them all.

`TEMPLATES` holds those of the original LLaVA by their own names, XTuner's, and the families that came later. Texts of
the original's 16 are tested against its recordings (tests/golden/conversations).
"""

from __future__ import annotations

from dataclasses import replace

from llava.errors import PromptError, name_nearest
from llava.prompt.chat_template import ChatTemplate as ChatTemplate
from llava.prompt.conversation import Message, Text
from llava.prompt.template_texts import (
    PRESET_ANSWER,
    PRESET_QUESTION,
    SYSTEM_LLAMA_2,
    SYSTEM_MMTAG,
    SYSTEM_MPT,
    SYSTEM_V0,
    SYSTEM_V1,
    SYSTEM_VISION,
)


def get_template(name: str) -> ChatTemplate:
    """The template of that exact name. Raises PromptError naming the nearest and all known ones."""
    if name not in TEMPLATES:
        raise PromptError(f"unknown template {name!r}; {name_nearest(name, TEMPLATES)}")
    return TEMPLATES[name]


def _vicuna(name: str, system: str) -> ChatTemplate:
    return ChatTemplate(
        name=name,
        system=system,
        system_suffix=" ",
        user_prefix="USER:",
        user_lead=" ",
        user_suffix=" ",
        assistant_prefix="ASSISTANT:",
        answer_lead=" ",
        answer_suffix="</s>",
        stop_strings=("</s>",),
    )


def _single(name: str, system: str) -> ChatTemplate:
    """The original's first layout, with `###` between turns."""
    return ChatTemplate(
        name=name,
        system=system,
        system_suffix="###",
        user_prefix="Human:",
        user_lead=" ",
        user_suffix="###",
        assistant_prefix="Assistant:",
        answer_lead=" ",
        answer_suffix="###",
        stop_strings=("###",),
    )


def _v0_training(name: str, system: str) -> ChatTemplate:
    """What the original trains on for `llava_v0`; it is not what it prompts with. Answers end with `###`."""
    return ChatTemplate(
        name=name,
        system=system,
        system_suffix="\n\n###",
        user_prefix=" Human: ",
        user_suffix="\n###",
        assistant_prefix=" Assistant:",
        answer_lead=" ",
        answer_suffix="\n###",
        tail=" ",
        stop_strings=("###",),
        empty_is_open=False,
        drops_leading_answer=False,
    )


def _llama_2(name: str, system: str, before_user: str) -> ChatTemplate:
    return ChatTemplate(
        name=name,
        system=system,
        system_prefix="<<SYS>>\n",
        system_suffix="\n<</SYS>>\n\n",
        system_in_first_turn=True,
        before_user=before_user,
        user_prefix="[INST] ",
        user_suffix=" [/INST]",
        assistant_prefix="",
        answer_lead=" ",
        answer_suffix=" </s>",
        stop_strings=("</s>",),
    )


def _mmtag(template: ChatTemplate) -> ChatTemplate:
    """Pictures in tags; in a chat, those of the first turn get a turn of their own."""
    return replace(template, image_prefix="<Image>", image_suffix="</Image>", received="Received.")


def _chatml(
    name: str, system: str, newline: str = "\n", stop_strings: tuple[str, ...] = ("<|im_end|>",)
) -> ChatTemplate:
    """ChatML; the original's own (`mpt`, `chatml_direct`) has no newline between turns."""
    return ChatTemplate(
        name=name,
        system=system,
        system_prefix="<|im_start|>system\n",
        system_suffix="<|im_end|>" + newline,
        user_prefix="<|im_start|>user\n",
        user_suffix="<|im_end|>" + newline,
        assistant_prefix="<|im_start|>assistant\n",
        answer_suffix="<|im_end|>",
        after_answer=newline,
        stop_strings=stop_strings,
    )


def _llama_3(name: str, system: str) -> ChatTemplate:
    def header(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    return ChatTemplate(
        name=name,
        system=system,
        system_prefix=header("system"),
        system_suffix="<|eot_id|>",
        user_prefix=header("user"),
        user_suffix="<|eot_id|>",
        assistant_prefix=header("assistant"),
        answer_suffix="<|eot_id|>",
        stop_strings=("<|eot_id|>",),
    )


def _xtuner(
    name: str,
    instruction: tuple[str, str],
    *,
    system: tuple[str, str],
    suffix: str = "{eos}",
    separator: str = "\n",
    stop_strings: tuple[str, ...] = (),
) -> ChatTemplate:
    """XTuner's: no system text unless one is given; prompt, answer and separator are tokenized apart; and a turn
    that ended in the tokenizer's own EOS is followed by another BOS."""
    return ChatTemplate(
        name=name,
        system_prefix=system[0],
        system_suffix=system[1],
        user_prefix=instruction[0],
        user_suffix=instruction[1],
        assistant_prefix="",
        answer_suffix=suffix,
        after_answer=separator,
        before_user="{bos}" if suffix == "{eos}" else "",
        stop_strings=stop_strings,
        empty_is_open=False,
        fresh_turns=True,
    )


_PRESET = (
    Message("user", (Text(PRESET_QUESTION),)),
    Message("assistant", (Text(PRESET_ANSWER),), supervised=False),
)
_PLAIN = ChatTemplate(
    name="plain",
    user_prefix="",
    user_suffix="",
    assistant_prefix="",
    answer_suffix="\n",
    stop_strings=("\n",),
    empty_is_open=False,
    drops_user_text=True,
)
_XTUNER_VICUNA = _xtuner("xtuner_vicuna", ("USER: ", " ASSISTANT:"), system=(SYSTEM_V1 + " ", "\n "))
_XTUNER_MISTRAL = _xtuner("xtuner_mistral", ("[INST] ", " [/INST]"), system=("[INST] ", " [/INST]\n"))

TEMPLATES: dict[str, ChatTemplate] = {
    # The original's, by its own names.
    "plain": _PLAIN,
    "v0_plain": replace(_PLAIN, name="v0_plain"),
    "default": replace(_single("default", SYSTEM_V0), preset=_PRESET),
    "v0": replace(_single("v0", SYSTEM_V0), preset=_PRESET),
    "llava_v0": _single("llava_v0", SYSTEM_V0),
    "v0_mmtag": _mmtag(_single("v0_mmtag", SYSTEM_MMTAG)),
    "llava_v0_training": _v0_training("llava_v0_training", SYSTEM_V0),
    "v0_mmtag_training": _mmtag(_v0_training("v0_mmtag_training", SYSTEM_MMTAG)),
    "v1": _vicuna("v1", SYSTEM_V1),
    "vicuna_v1": _vicuna("vicuna_v1", SYSTEM_V1),
    "llava_v1": _vicuna("llava_v1", SYSTEM_V0),
    "v1_mmtag": _mmtag(_vicuna("v1_mmtag", SYSTEM_MMTAG)),
    "llama_2": _llama_2("llama_2", SYSTEM_LLAMA_2, "<s>"),
    "llava_llama_2": _llama_2("llava_llama_2", SYSTEM_VISION, "<s>"),
    "mistral_instruct": _llama_2("mistral_instruct", "", ""),
    "mpt": _chatml("mpt", SYSTEM_MPT, newline=""),
    "chatml_direct": _chatml("chatml_direct", "Answer the questions.", newline=""),
    "mistral_direct": _chatml("mistral_direct", "Answer the questions.", newline=""),
    # Hugging Face's LLaVA-1.5 layout: Vicuna without system text.
    "llava_hf": _vicuna("llava_hf", ""),
    # XTuner's seven. Its `vicuna` and `mistral` are not the original's vicuna_v1 and mistral_instruct.
    "xtuner_vicuna": _XTUNER_VICUNA,
    "xtuner_mistral": _XTUNER_MISTRAL,
    "mistral": _XTUNER_MISTRAL,
    "internlm_chat": _xtuner(
        "internlm_chat",
        ("<|User|>:", "<eoh>\n<|Bot|>:"),
        system=("<|System|>:", "\n"),
        suffix="<eoa>",
        stop_strings=("<eoa>",),
    ),
    "internlm2_chat": _xtuner(
        "internlm2_chat",
        ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        suffix="<|im_end|>",
        stop_strings=("<|im_end|>",),
    ),
    "qwen_chat": _xtuner(
        "qwen_chat",
        ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        suffix="<|im_end|>",
        stop_strings=("<|im_end|>", "<|endoftext|>"),
    ),
    "llama3_chat": _xtuner(
        "llama3_chat",
        (
            "<|start_header_id|>user<|end_header_id|>\n\n",
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        suffix="<|eot_id|>",
        separator="",
        stop_strings=("<|eot_id|>",),
    ),
    "phi3_chat": _xtuner(
        "phi3_chat",
        ("<|user|>\n", "<|end|>\n<|assistant|>\n"),
        system=("<|system|>\n", "<|end|>\n"),
        suffix="<|end|>",
        stop_strings=("<|end|>",),
    ),
    # Families that came after the original (LLaVA-NeXT's names where it has one).
    "chatml": _chatml("chatml", ""),
    "qwen_1_5": _chatml("qwen_1_5", "You are a helpful assistant.", stop_strings=("<|im_end|>", "<|endoftext|>")),
    "llama_3": _llama_3("llama_3", SYSTEM_VISION),
    "gemma": ChatTemplate(
        name="gemma",
        system_in_first_turn=True,
        system_suffix="\n\n",
        user_prefix="<start_of_turn>user\n",
        user_suffix="<end_of_turn>\n",
        assistant_prefix="<start_of_turn>model\n",
        answer_suffix="<end_of_turn>",
        after_answer="\n",
        stop_strings=("<end_of_turn>",),
    ),
}

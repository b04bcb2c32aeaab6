"""Published LLaVA models by name: what they are, and what to say when opening them. For `llava model list`.

A list to choose from and nothing else: no code looks a model up here, what decides how a folder is opened is what is
in it (`llava model show`). Names and parts are from the pages in SOURCES; template and image mode are what the folder's
files come to when it is opened here, or `needs` says what has to be told.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCES = {
    "LLaVA": "github.com/haotian-liu/LLaVA, docs/MODEL_ZOO.md",
    "LLaVA-NeXT": "github.com/LLaVA-VL/LLaVA-NeXT, README.md and docs/",
    "Hugging Face": "huggingface.co/llava-hf and transformers' pages on llava, llava_next and llava_onevision",
    "XTuner": "github.com/InternLM/xtuner, xtuner/configs/llava",
    "PaddleMIX": "github.com/PaddlePaddle/PaddleMIX, paddlemix/examples/llava",
    "MMPretrain": "github.com/open-mmlab/mmpretrain, configs/llava",
}


@dataclass(frozen=True)
class KnownModel:
    """A published model.

    name: hub id, or its publisher's own name where `hub` is False: then it is opened from a folder of files fetched
    there. layout: a key of `llava.checkpoint.load.FORMATS`. source: a key of SOURCES. size: the language model's
    parameters. needs: options that opening it takes.
    """

    name: str
    source: str
    layout: str
    version: str
    language_model: str
    size: str
    template: str
    image_mode: str
    needs: str = ""
    hub: bool = True


def _llava(
    name: str,
    version: str,
    language_model: str,
    size: str,
    template: str = "vicuna_v1",
    image_mode: str = "crop",
    needs: str = "",
) -> KnownModel:
    return KnownModel(
        f"liuhaotian/{name}", "LLaVA", "original", version, language_model, size, template, image_mode, needs
    )


def _hf(name: str, version: str, language_model: str, size: str, template: str, needs: str = "") -> KnownModel:
    mode = "crop" if version == "1.5" else "anyres"
    return KnownModel(
        f"llava-hf/{name}", "Hugging Face", "huggingface", version, language_model, size, template, mode, needs
    )


def _next(name: str, version: str, language_model: str, size: str, template: str) -> KnownModel:
    return KnownModel(f"lmms-lab/{name}", "LLaVA-NeXT", "original", version, language_model, size, template, "anyres")


def _xtuner(
    name: str, language_model: str, size: str, template: str, *, base: str = "", layout: str = "xtuner", needs: str = ""
) -> KnownModel:
    mode = "crop" if layout == "huggingface" else "pad"
    needs = f"--base {base}" if base else needs
    return KnownModel(f"xtuner/{name}", "XTuner", layout, "1.5", language_model, size, template, mode, needs)


def _paddle(name: str, version: str, language_model: str, size: str, image_mode: str) -> KnownModel:
    return KnownModel(
        f"paddlemix/llava/{name}",
        "PaddleMIX",
        "paddlemix",
        version,
        language_model,
        size,
        "vicuna_v1",
        image_mode,
        hub=False,
    )


def _mmpretrain(name: str, version: str, language_model: str, base: str) -> KnownModel:
    return KnownModel(
        name,
        "MMPretrain",
        "mmpretrain",
        version,
        language_model,
        "7B",
        "vicuna_v1",
        "pad" if version == "1.5" else "crop",
        f"--base {base}",
        hub=False,
    )


_LLAMA_2 = "--template llava_llama_2"
_CHATML = "--template chatml_direct"

KNOWN_MODELS: tuple[KnownModel, ...] = (
    _llava("llava-v1.6-vicuna-7b", "1.6", "Vicuna 7B", "7B", image_mode="anyres"),
    _llava("llava-v1.6-vicuna-13b", "1.6", "Vicuna 13B", "13B", image_mode="anyres"),
    _llava("llava-v1.6-mistral-7b", "1.6", "Mistral 7B", "7B", "mistral_instruct", "anyres"),
    _llava("llava-v1.6-34b", "1.6", "Hermes Yi 34B", "34B", "chatml_direct", "anyres", _CHATML),
    _llava("llava-v1.5-7b", "1.5", "Vicuna 7B v1.5", "7B", image_mode="pad"),
    _llava("llava-v1.5-13b", "1.5", "Vicuna 13B v1.5", "13B", image_mode="pad"),
    _llava("llava-v1.5-7b-lora", "1.5", "Vicuna 7B v1.5", "7B", image_mode="pad", needs="--base lmsys/vicuna-7b-v1.5"),
    _llava(
        "llava-v1.5-13b-lora", "1.5", "Vicuna 13B v1.5", "13B", image_mode="pad", needs="--base lmsys/vicuna-13b-v1.5"
    ),
    _llava(
        "llava-v1-0719-336px-lora-vicuna-13b-v1.3",
        "1",
        "Vicuna 13B v1.3",
        "13B",
        needs="--base lmsys/vicuna-13b-v1.3",
    ),
    _llava("llava-v1-0719-336px-lora-merge-vicuna-13b-v1.3", "1", "Vicuna 13B v1.3", "13B"),
    _llava("llava-llama-2-13b-chat-lightning-preview", "1", "Llama 2 13B Chat", "13B", "llava_llama_2", needs=_LLAMA_2),
    _llava(
        "llava-llama-2-7b-chat-lightning-lora-preview",
        "1",
        "Llama 2 7B Chat",
        "7B",
        "llava_llama_2",
        needs=f"--base meta-llama/Llama-2-7b-chat-hf {_LLAMA_2}",
    ),
    _llava("llava-lcs558k-scienceqa-vicuna-13b-v1.3", "1", "Vicuna 13B v1.3, ScienceQA", "13B"),
    _llava("LLaVA-Lightning-MPT-7B-preview", "0", "MPT 7B Chat", "7B", "mpt"),
    _llava("LLaVA-Lightning-7B-delta-v1-1", "0", "Vicuna 7B v1.1", "7B", needs="--base LLAMA_7B (a delta)"),
    _llava("LLaVA-13b-delta-v1-1", "0", "Vicuna 13B v1.1", "13B", needs="--base LLAMA_13B (a delta)"),
    _llava("LLaVA-7b-delta-v0", "0", "Vicuna 7B v0", "7B", "llava_v0", needs="--base LLAMA_7B (a delta)"),
    _llava("LLaVA-13b-delta-v0", "0", "Vicuna 13B v0", "13B", "llava_v0", needs="--base LLAMA_13B (a delta)"),
    _llava(
        "LLaVA-13b-delta-v0-science_qa",
        "0",
        "Vicuna 13B v0, ScienceQA",
        "13B",
        "llava_v0",
        needs="--base LLAMA_13B (a delta)",
    ),
    _next("llama3-llava-next-8b", "1.6", "Llama 3 8B Instruct", "8B", "llama_3"),
    _next("llava-next-72b", "1.6", "Qwen1.5 72B", "72B", "qwen_1_5"),
    _next("llava-onevision-qwen2-0.5b-si", "OneVision", "Qwen2 0.5B", "0.5B", "qwen_1_5"),
    _next("llava-onevision-qwen2-0.5b-ov", "OneVision", "Qwen2 0.5B", "0.5B", "qwen_1_5"),
    _next("llava-onevision-qwen2-7b-ov", "OneVision", "Qwen2 7B", "7B", "qwen_1_5"),
    _next("llava-onevision-qwen2-7b-ov-chat", "OneVision", "Qwen2 7B", "7B", "qwen_1_5"),
    _next("llava-onevision-qwen2-72b-ov-chat", "OneVision", "Qwen2 72B", "72B", "qwen_1_5"),
    _hf("llava-1.5-7b-hf", "1.5", "Vicuna 7B v1.5", "7B", "llava_hf"),
    _hf("llava-1.5-13b-hf", "1.5", "Vicuna 13B v1.5", "13B", "llava_hf"),
    _hf("llava-v1.6-vicuna-7b-hf", "1.6", "Vicuna 7B", "7B", "vicuna_v1"),
    _hf("llava-v1.6-vicuna-13b-hf", "1.6", "Vicuna 13B", "13B", "vicuna_v1"),
    _hf("llava-v1.6-mistral-7b-hf", "1.6", "Mistral 7B", "7B", "mistral_instruct"),
    _hf("llava-v1.6-34b-hf", "1.6", "Hermes Yi 34B", "34B", "chatml_direct", _CHATML),
    _hf("llama3-llava-next-8b-hf", "1.6", "Llama 3 8B Instruct", "8B", "llama_3"),
    _hf("llava-next-72b-hf", "1.6", "Qwen1.5 72B", "72B", "qwen_1_5"),
    _hf("llava-onevision-qwen2-0.5b-ov-hf", "OneVision", "Qwen2 0.5B", "0.5B", "qwen_1_5"),
    _hf("llava-onevision-qwen2-7b-ov-hf", "OneVision", "Qwen2 7B", "7B", "qwen_1_5"),
    _hf("llava-onevision-qwen2-72b-ov-hf", "OneVision", "Qwen2 72B", "72B", "qwen_1_5"),
    _xtuner("llava-v1.5-7b-xtuner", "Vicuna 7B v1.5", "7B", "xtuner_vicuna", base="lmsys/vicuna-7b-v1.5"),
    _xtuner("llava-v1.5-13b-xtuner", "Vicuna 13B v1.5", "13B", "xtuner_vicuna", base="lmsys/vicuna-13b-v1.5"),
    _xtuner("llava-internlm2-7b", "InternLM2 7B Chat", "7B", "internlm2_chat", base="internlm/internlm2-chat-7b"),
    _xtuner("llava-internlm2-20b", "InternLM2 20B Chat", "20B", "internlm2_chat", base="internlm/internlm2-chat-20b"),
    _xtuner("llava-llama-3-8b", "Llama 3 8B Instruct", "8B", "llama3_chat"),
    _xtuner("llava-llama-3-8b-v1_1", "Llama 3 8B Instruct", "8B", "llama3_chat"),
    _xtuner(
        "llava-llama-3-8b-v1_1-hf",
        "Llama 3 8B Instruct",
        "8B",
        "llama3_chat",
        layout="original",
        needs="--template llama3_chat",
    ),
    _xtuner(
        "llava-llama-3-8b-v1_1-transformers",
        "Llama 3 8B Instruct",
        "8B",
        "llama3_chat",
        layout="huggingface",
        needs="--template llama3_chat",
    ),
    _xtuner("llava-phi-3-mini-xtuner", "Phi-3 mini 4k", "3.8B", "phi3_chat"),
    _xtuner("llava-phi-3-mini", "Phi-3 mini 4k", "3.8B", "phi3_chat", layout="original"),
    _xtuner("llava-phi-3-mini-hf", "Phi-3 mini 4k", "3.8B", "phi3_chat", layout="huggingface"),
    _paddle("llava-v1.5-7b", "1.5", "Vicuna 7B v1.5", "7B", "pad"),
    _paddle("llava-v1.5-13b", "1.5", "Vicuna 13B v1.5", "13B", "pad"),
    _paddle("llava-v1.6-vicuna-7b", "1.6", "Vicuna 7B", "7B", "anyres"),
    _mmpretrain("llava-7b-v1_caption", "0", "Vicuna 7B v1.1", "liuhaotian/LLaVA-Lightning-7B-delta-v1-1"),
    _mmpretrain("llava-7b-v1.5_caption", "1.5", "Vicuna 7B v1.5", "liuhaotian/llava-v1.5-7b"),
    _mmpretrain("llava-7b-v1.5_vqa", "1.5", "Vicuna 7B v1.5", "liuhaotian/llava-v1.5-7b"),
)

"""GGUF: what is written is what was planned, and llama.cpp itself gives the answers that our engine gives."""

from __future__ import annotations

import base64
import io
import json
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PilImage

from llava.checkpoint.gguf import GgufPlan, plan_gguf, verify_gguf, write_gguf
from llava.checkpoint.gguf_parts import llama3_factors, pair_rotary
from llava.checkpoint.gguf_vocabulary import CONTROL, PRE_TOKENIZERS, UNUSED, USER_DEFINED, make_vocabulary
from llava.checkpoint.names import common_name
from llava.checkpoint.weights import Source, held
from llava.errors import CheckpointError, MissingExtraError
from llava.inference.engine import Engine
from llava.inference.requests import Request
from llava.inference.sampling import SamplingParams
from llava.model.config import LlavaConfig
from llava.model.llava import Llava
from llava.prompt.chat_template import render_text
from llava.prompt.conversation import Conversation, Image, Message, Text
from llava.prompt.images import ImageSettings
from llava.prompt.processor import Processor
from llava.prompt.templates import get_template
from llava.prompt.tokenizer import load_tokenizer
from llava.quickstart.tokenizer_building import save_tokenizer

gguf = pytest.importorskip("gguf", reason="the export extra is not installed")

SIDE = 64
NUM_TOKENS = 10
# llama.cpp looks GELU up in a table of 16-bit numbers, and its projector's GELU is the tanh form
TABLE_TOLERANCE = 0.01
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 8,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
SIGLIP = {
    **{key: value for key, value in CLIP.items() if key != "projection_dim"},
    "model_type": "siglip_vision_model",
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": False,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Tiny:
    """A small model with random weights wide enough for clear margins."""

    model: Llava
    processor: Processor

    @property
    def tensors(self) -> dict[str, Source]:
        return {
            common_name(name, self.model): held(name, value.detach(), file=Path("memory"))
            for name, value in self.model.named_parameters()
        }

    def plan(self, **options: Any) -> GgufPlan:
        return plan_gguf(self.tensors, self.model.config, processor=self.processor, **{"name": "tiny", **options})


def tiny(
    folder: Path,
    vision: dict[str, Any] = CLIP,
    text: dict[str, Any] | None = None,
    *,
    seed: int = 0,
    save_tokenizer: Callable[[Path], None] = save_tokenizer,
    **changes: Any,
) -> Tiny:
    save_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    (image_id,) = tokenizer.add_special_tokens(["<image>"])
    rows = -(-tokenizer.vocab_size // 64) * 64
    config = LlavaConfig(
        vision_config=dict(vision),
        text_config={**LLAMA, **(text or {}), "vocab_size": rows},
        image_token_id=image_id,
        template="llava_hf",
        **changes,
    )
    torch.manual_seed(seed)
    model = Llava.from_config(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() > 1:
                value.normal_(0, 0.1 if "patch_embedding" in name else value.shape[-1] ** -0.5)
            elif name.endswith(("bias", "class_embedding")):
                value.normal_(0, 0.1 if name.endswith("bias") else 1.0)
            value.copy_(value.half().float())  # the same model in every number format
        model.lm_head.weight *= 5 if model.config.text_config["tie_word_embeddings"] else 3  # type: ignore[operator]
        model.lm_head.weight.copy_(model.lm_head.weight.half())  # type: ignore[operator,arg-type]
        # no specials, no bytes of half a character, no rows without a token
        model.lm_head.weight[:259] = model.lm_head.weight[image_id:] = 0  # type: ignore[index,operator]
    settings = ImageSettings(size=SIDE, patches_per_side=8, tokens_per_tile=64)
    return Tiny(model, Processor(tokenizer, "llava_hf", image_settings=settings, image_token_id=image_id))


def picture(width: int = SIDE, height: int = SIDE) -> PilImage.Image:
    blocks = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3))
    return PilImage.fromarray(np.kron(blocks, np.ones((8, 8, 1))).astype(np.uint8))


def question(image: PilImage.Image, words: str = "What color is the circle?") -> Conversation:
    return Conversation((Message("user", (Image(image), Text("\n" + words))),))


# --- the files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number_format", ["f32", "f16", "q8_0"])
def test_what_is_written_is_read_back_the_same(tmp_path: Path, number_format: Any) -> None:
    plan = tiny(tmp_path).plan(number_format=number_format)
    written: list[int] = []
    files = write_gguf(tmp_path, plan, advance=written.append)
    assert sum(written) == plan.num_bytes
    assert verify_gguf(tmp_path, plan) == len(plan.language_model.tensors) + len(plan.mmproj.tensors) == len(written)
    expected = [f"tiny-{number_format.upper()}.gguf", "mmproj-tiny-F32.gguf", "Modelfile"]
    if number_format != "f32":
        expected[1] = "mmproj-tiny-F16.gguf"
    assert [file.name for file in files] == expected


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    plan = tiny(tmp_path).plan()
    file = write_gguf(tmp_path, plan)[0]
    data = bytearray(file.read_bytes())
    data[-40] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="differs from"):
        verify_gguf(tmp_path, plan)


def test_every_tensor_of_the_model_has_a_place_or_is_not_run(tmp_path: Path) -> None:
    made = tiny(tmp_path, vision_feature_layer=-3)
    plan = made.plan()
    placed = {tensor.origin for tensor in (*plan.language_model.tensors, *plan.mmproj.tensors)}
    left = {source.key for source in made.tensors.values()} - placed
    assert left and all("post_layernorm" in key or ".layers.3." in key for key in left)
    assert plan.mmproj.keys["clip.vision.block_count"] == 3
    assert plan.mmproj.keys["clip.vision.feature_layer"] == [2]


def test_rotary_pairs_are_put_side_by_side() -> None:
    rows = torch.arange(8)[:, None]  # two heads of four numbers: 0 goes with 2, 1 with 3
    assert pair_rotary(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_llama3_scaling_leaves_fast_turns_and_slows_slow_ones() -> None:
    rope = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    factors = llama3_factors(rope, theta=500000.0, head=128)
    assert (len(factors), factors[0], factors[-1]) == (64, 1.0, 8.0)
    assert factors == sorted(factors)


@pytest.mark.parametrize(
    ("changes", "text", "message"),
    [
        ({"projector": "mlp3x_gelu"}, {}, "projector 'mlp3x_gelu'; .* linear or mlp2x_gelu"),
        ({"vision_feature_select": "cls_patch"}, {}, "never the class token"),
        ({"vision_feature_layer": 0}, {}, "outputs of blocks"),
        ({}, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rotary scaling"),
        ({}, {"model_type": "gemma", "head_dim": 32}, "language model of type 'gemma'"),
    ],
)
def test_what_llama_cpp_cannot_hold_is_refused(
    tmp_path: Path, changes: dict[str, Any], text: dict[str, Any], message: str
) -> None:
    made = tiny(tmp_path, text=text, **changes)
    with pytest.raises(CheckpointError, match=message):
        made.plan()


def test_a_number_too_large_for_f16_is_refused(tmp_path: Path) -> None:
    made = tiny(tmp_path)
    with torch.no_grad():
        made.model.lm_head.weight[0, 0] = 1e6  # type: ignore[union-attr,index,operator]
    with pytest.raises(CheckpointError, match=r"lm_head.*beyond 65504"):
        write_gguf(tmp_path, made.plan())
    write_gguf(tmp_path, made.plan(number_format="f32"))


def test_without_the_package_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tiny(tmp_path).plan()
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"llava\[export\]"):
        write_gguf(tmp_path, plan)


def test_a_turns_end_is_named_where_it_is_not_the_end_of_the_text(tmp_path: Path) -> None:
    made = tiny(tmp_path)
    made.processor.tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    chatml = replace(made, processor=made.processor.with_template("chatml")).plan(name="my model")
    assert chatml.language_model.keys["tokenizer.ggml.eot_token_id"] == made.processor.tokenizer.token_id("<|im_end|>")
    assert "tokenizer.ggml.eot_token_id" not in made.plan().language_model.keys
    assert chatml.files[0][0] == "my-model-F16.gguf"


def test_the_class_tokens_place_is_told(tmp_path: Path) -> None:
    clip, siglip = tiny(tmp_path).plan(), tiny(tmp_path, SIGLIP).plan()
    assert clip.mmproj.keys["llava.class_token"] == "last" and "issue 25814" in clip.notes[0]
    assert "llava.class_token" not in siglip.mmproj.keys and siglip.notes == ()


def test_the_vocabulary_fills_the_embeddings_rows(tmp_path: Path) -> None:
    made = tiny(tmp_path)
    vocabulary = make_vocabulary(made.processor.tokenizer, made.model.config.vocab_size)
    assert len(vocabulary.pieces) == len(set(vocabulary.pieces)) == made.model.config.vocab_size
    assert vocabulary.types[made.processor.image_token_id] == CONTROL
    assert vocabulary.types[-1] == UNUSED
    assert vocabulary.add_bos and vocabulary.add_blank
    assert USER_DEFINED not in vocabulary.types


def test_the_modelfile_names_both_files_and_the_stop_string(tmp_path: Path) -> None:
    text = tiny(tmp_path).plan().modelfile
    lines = text.splitlines()
    assert lines[:2] == ["FROM ./tiny-F16.gguf", "FROM ./mmproj-tiny-F16.gguf"]
    assert 'PARAMETER stop "</s>"' in lines and "PARAMETER num_ctx 512" in lines
    assert "USER: {{ .Content }} " in text and text.count("ASSISTANT:") == 2


TALK = (
    Message("user", (Text("Hello {{ there }}"),)),
    Message("assistant", (Text("Hi."),)),
    Message("user", (Text("Bye"),)),
)


@pytest.mark.parametrize("system", [(), (Message("system", (Text("Be brief."),)),)], ids=["plain", "system"])
@pytest.mark.parametrize(
    "name", ["vicuna_v1", "llava_hf", "llava_v0", "mpt", "chatml", "llama_3", "llava_llama_2", "xtuner_vicuna", "gemma"]
)
def test_the_jinja_template_writes_what_our_template_writes(
    tmp_path: Path, name: str, system: tuple[Message, ...]
) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from llava.checkpoint.ollama import write_jinja

    save_tokenizer(tmp_path)
    template = get_template(name)
    messages = [{"role": m.role, "content": m.text} for m in (*system, *TALK)]
    source = write_jinja(template, load_tokenizer(tmp_path))
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    got = environment.from_string(source).render(messages=messages, add_generation_prompt=True)
    assert got == render_text(template.render(Conversation((*system, *TALK)), open_turn=True))


# --- llama.cpp ----------------------------------------------------------------------------------------------------


class LlamaCpp:
    """The real llama.cpp on two files, with 32-bit keys and values so that only its own shortcuts differ."""

    def __init__(self, language_model: Path, mmproj: Path) -> None:
        xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp (llama.cpp) is not installed")
        params = xllamacpp.CommonParams()
        params.model.path, params.mmproj.path = str(language_model), str(mmproj)
        params.n_ctx, params.n_parallel, params.verbosity = 512, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.warmup = params.fit_params = False
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(params)

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.server.listening_address + path, data)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)

    def answer(self, prompt: str, image: PilImage.Image) -> list[dict[str, Any]]:
        """Greedy: for each new token its id and `top_logprobs`. `<image>` in the prompt is the picture's place."""
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        marker = self.post("/props")["media_marker"]
        body = {
            "prompt": {
                "prompt_string": prompt.replace("<image>", marker),
                "multimodal_data": [base64.b64encode(buffer.getvalue()).decode()],
            },
            "n_predict": NUM_TOKENS,
            "temperature": 0,
            "samplers": ["temperature"],
            "n_probs": 5,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        found: list[dict[str, Any]] = self.post("/completion", body)["completion_probabilities"]
        return found


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., LlamaCpp]]:
    def start(plan: GgufPlan) -> LlamaCpp:
        language_model, mmproj, _ = write_gguf(tmp_path, plan)
        return LlamaCpp(language_model, mmproj)

    yield start


def our_answer(made: Tiny, image: PilImage.Image) -> tuple[list[int], list[torch.Tensor]]:
    """Greedy ids of our engine, and the log-probabilities that our forward gives at each of them."""
    encoded = made.processor.encode(question(image), open_turn=True)
    params = SamplingParams(max_new_tokens=NUM_TOKENS)
    (completion,) = Engine(made.model).generate([Request(encoded, params)])
    ids = list(completion.token_ids)
    row = torch.tensor([[*encoded.input_ids.tolist(), *ids]])
    with torch.no_grad():
        hidden = made.model(row, pixel_values=torch.from_numpy(encoded.pixel_values))
        scores = made.model.logits(hidden[0, -len(ids) - 1 : -1]).log_softmax(-1)
    return ids, list(scores)


def furthest(theirs: list[dict[str, Any]], ours: list[torch.Tensor]) -> float:
    """The largest difference of a log-probability among llama.cpp's five best at each place."""
    return max(
        abs(top["logprob"] - float(scores[top["id"]]))
        for place, scores in zip(theirs, ours, strict=True)
        for top in place["top_logprobs"]
    )


def assert_same(
    theirs: list[dict[str, Any]], ids: list[int], scores: list[torch.Tensor], tolerance: float = TABLE_TOLERANCE
) -> None:
    """llama.cpp chose our tokens with our log-probabilities.

    Random weights have near ties; from the first one on, which is not the first token, two right answers may part.
    """
    best = [row.topk(2).values for row in scores]
    clear = next((i for i, two in enumerate(best) if two[0] - two[1] < 2 * tolerance), len(ids))
    assert clear >= (2 if tolerance == TABLE_TOLERANCE else 1)
    assert [place["id"] for place in theirs[:clear]] == ids[:clear]
    assert furthest(theirs[:clear], scores[:clear]) < tolerance


def prompt_of(made: Tiny, image: PilImage.Image) -> str:
    return render_text(made.processor.template.render(question(image), open_turn=True))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"projector": "linear", "seed": 1},
        {"vision_feature_layer": -1, "seed": 4},
        {"vision_feature_layer": (-2, -4), "seed": 1},
        {"vision": {**SIGLIP, "intermediate_size": SIGLIP["hidden_size"]}},
        {"text": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, "seed": 2},
    ],
    ids=["mlp", "linear", "last-layer", "two-layers", "equal-widths", "tied-with-biases"],
)
def test_llama_cpp_answers_as_our_engine(tmp_path: Path, serve: Any, changes: dict[str, Any]) -> None:
    made = tiny(tmp_path, **{"vision": SIGLIP, **changes})
    ids, scores = our_answer(made, picture())
    theirs = serve(made.plan(number_format="f32")).answer(prompt_of(made, picture()), picture())
    assert_same(theirs, ids, scores)


@pytest.mark.parametrize("size", [(SIDE, SIDE // 2), (SIDE // 2, SIDE)], ids=["wide", "tall"])
def test_llama_cpp_pads_a_picture_as_we_do(tmp_path: Path, serve: Any, size: tuple[int, int]) -> None:
    made = tiny(tmp_path, SIGLIP)
    ids, scores = our_answer(made, picture(*size))
    theirs = serve(made.plan(number_format="f32")).answer(prompt_of(made, picture(*size)), picture(*size))
    assert_same(theirs, ids, scores)


@pytest.mark.parametrize(("number_format", "tolerance"), [("f16", 0.03), ("q8_0", 0.3)])
def test_smaller_number_formats_move_the_scores_little(
    tmp_path: Path, serve: Any, number_format: Any, tolerance: float
) -> None:
    made = tiny(tmp_path, SIGLIP, {"model_type": "qwen2"})
    ids, scores = our_answer(made, picture())
    theirs = serve(made.plan(number_format=number_format)).answer(prompt_of(made, picture()), picture())
    assert_same(theirs, ids, scores, tolerance)


@pytest.mark.parametrize(("family", "seed"), [("mistral", 0), ("qwen2", 1)])
def test_other_language_models_answer_the_same(tmp_path: Path, serve: Any, family: str, seed: int) -> None:
    made = tiny(tmp_path, SIGLIP, {"model_type": family, "sliding_window": None}, seed=seed)
    ids, scores = our_answer(made, picture())
    theirs = serve(made.plan(number_format="f32")).answer(prompt_of(made, picture()), picture())
    assert_same(theirs, ids, scores)


class ClassTokenBehind(torch.nn.Module):
    """llama.cpp's issue 25814 at work on a CLIP tower: the class token stands behind the patches, while positions are
    counted and the first output is dropped as if it stood before them. own_positions: what `class_token="last"` mends.
    """

    def __init__(self, tower: Any, own_positions: bool) -> None:
        super().__init__()
        stack = getattr(tower, "vision_model", tower)
        self.embeddings = stack.embeddings
        self.position = stack.embeddings.position_embedding
        self.shift = -1 if own_positions else 0

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        behind = torch.cat([patches, self.embeddings.class_embedding.expand(len(patches), 1, -1)], dim=1)
        return behind + self.position.weight.roll(self.shift, 0)


@pytest.mark.parametrize("class_token", ["first", "last"])
def test_a_clip_tower_answers_as_ours_or_as_ours_with_the_known_defect(
    tmp_path: Path, serve: Any, class_token: Any
) -> None:
    made = tiny(tmp_path, seed=3)
    prompt = prompt_of(made, picture())
    theirs = serve(made.plan(number_format="f32", class_token=class_token)).answer(prompt, picture())
    exact = our_answer(made, picture())
    tower: Any = made.model.vision_tower
    stack = getattr(tower, "vision_model", tower)
    stack.embeddings = ClassTokenBehind(tower, own_positions=class_token == "last")
    with_defect = our_answer(made, picture())
    # "first" is right where llama.cpp is mended; if only "last" fails here, it is: turn plan_gguf's default
    is_mended = class_token == "first" and furthest(theirs[:1], exact[1][:1]) < TABLE_TOLERANCE
    assert_same(theirs, *(exact if is_mended else with_defect))


CUT = (
    "What color is the circle?",
    "\nIs there a red square at [0.10, 0.25, 0.99, 1.00]?",
    "Zwölf Boxkämpfer, naïve 猫 🐈",
    "  two  blanks ",
    "USER: it's 12345 ASSISTANT:",
)


def test_llama_cpp_cuts_text_into_our_tokens(tmp_path: Path, serve: Any) -> None:
    assert_cut_alike(tiny(tmp_path, SIGLIP), serve)


GOLDEN_BASES = Path(__file__).parent.parent / "golden" / "checkpoints" / "bases"


@pytest.mark.parametrize("base", ["vicuna-tiny-v1.5", "llama-tiny"])
def test_llama_cpp_cuts_text_as_sentencepiece_does(tmp_path: Path, serve: Any, base: str) -> None:
    def copy(folder: Path) -> None:
        for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copyfile(GOLDEN_BASES / base / name, folder / name)

    assert_cut_alike(tiny(tmp_path, SIGLIP, save_tokenizer=copy), serve)


@pytest.mark.parametrize("family", PRE_TOKENIZERS.values())
def test_llama_cpp_cuts_text_as_a_byte_level_tokenizer_does(tmp_path: Path, serve: Any, family: str) -> None:
    def train(folder: Path) -> None:
        """A byte-level BPE of some 600 tokens with this family's pre-tokenizer."""
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

        pattern = next(text for text, name in PRE_TOKENIZERS.items() if name == family)
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        made.decoder = decoders.ByteLevel()
        marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=marks, initial_alphabet=alphabet, show_progress=False
        )
        made.train_from_iterator([*CUT, "the quick brown fox 2024 isn't there 1234567"] * 3, trainer)
        made.save(str(folder / "tokenizer.json"))
        named = {"eos_token": marks[2], "pad_token": marks[0], "add_bos_token": False}
        (folder / "tokenizer_config.json").write_text(json.dumps(named))

    assert_cut_alike(tiny(tmp_path, SIGLIP, {"model_type": "qwen2"}, save_tokenizer=train), serve)


def assert_cut_alike(made: Tiny, serve: Any) -> None:
    server = serve(made.plan())
    for text in CUT:
        body = {"content": text, "add_special": False, "parse_special": False}
        assert server.post("/tokenize", body)["tokens"] == made.processor.tokenizer.encode_plain(text), text
    whole = server.post("/tokenize", {"content": CUT[0], "add_special": True})["tokens"]
    assert whole == made.processor.tokenizer.encode_markup(CUT[0])


def test_the_chat_endpoint_gives_the_same_answer(tmp_path: Path, serve: Any) -> None:
    made = tiny(tmp_path, SIGLIP)
    made = replace(made, processor=made.processor.with_template("vicuna_v1"))
    ids, _ = our_answer(made, picture())
    server = serve(made.plan(number_format="f32"))
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What color is the circle?"},
    ]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": NUM_TOKENS, "temperature": 0}
    reply = server.post("/v1/chat/completions", body)
    assert reply["choices"][0]["message"]["content"].strip() == made.processor.decode(ids).strip()
    assert reply["usage"]["prompt_tokens"] == len(made.processor.encode(question(picture()), open_turn=True).input_ids)

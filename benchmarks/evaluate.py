"""A benchmark of 18 questions a picture: asked as trees, as `llava eval` does, against one question at a time.

    python benchmarks/evaluate.py [--record] [--repeats 2]

One at a time is what the family's own runners do: the picture is opened, encoded and read again for every question.
Answers are compared; in float32 they must be equal. Random weights, one thread, answers short as the benchmarks are;
a picture is 576 tokens, a question with its instruction 26, as one of POPE's is to LLaMA's tokenizer. Measured is the
whole path, files to texts, in processor time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image as Pictures
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import llava
from llava.eval.answers import AnswerLog
from llava.eval.runner import LocalModel, ask_all
from llava.eval.task import Question
from llava.inference.engine import Engine
from llava.inference.requests import EngineLimits
from llava.inference.talk import Model

PICTURES, EACH, NEW_TOKENS = 3, 18, 3
IMAGE_TOKEN_ID = 259


def write_model(folder: Path) -> Path:
    """A LLaVA of the 1.5 kind in small: 24 x 24 patches a picture, 6 blocks of width 512."""
    from tests.cli.tiny_model import write_tokenizer

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=3,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=6,
        num_attention_heads=8,
        vocab_size=260,
        max_position_embeddings=2048,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN_ID, image_seq_length=576)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)  # with the usual weights all logits are nearly equal
    model.save_pretrained(folder)
    write_tokenizer(folder)
    picture = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": 336}, "crop_size": 336}
    (folder / "preprocessor_config.json").write_text(json.dumps(picture))
    return folder


def let_it_say_letters(model: Model) -> Model:
    """Random bytes are mostly no text, so that nearly all answers would be equal."""
    head = model.model.language_model.lm_head.weight
    with torch.no_grad():
        letters = head[3 + ord("a") : 3 + ord("z") + 1].clone()
        head.zero_()
        head[3 + ord("a") : 3 + ord("z") + 1] = letters
        model.model.multi_modal_projector.linear_2.weight.mul_(20)
    return model


def make_questions(folder: Path) -> list[Question]:
    random = np.random.default_rng(0)
    questions = []
    for picture in range(PICTURES):
        path = folder / f"{picture}.png"
        Pictures.fromarray(random.integers(0, 80 * (picture + 1), (480, 640, 3), dtype=np.uint8)).save(path)
        for number in range(EACH):
            text = f"Is there a {'abcdefghijklmnopqrstuvwxyz'[number]}?"
            questions.append(Question(f"{picture}-{number}", text, (path,), {}, NEW_TOKENS))
    return questions


def ask_trees(model: Model, questions: list[Question], out: Path) -> list[str]:
    """What `llava eval` does, its file of answers included."""
    model.assistant.engine.clear()
    with AnswerLog(out, questions, run={"model_id": "m"}, force=True) as log:
        return [row.text for row in ask_all(LocalModel(model), questions, {"temperature": 0.0}, log)]


def ask_one_by_one(model: Model, questions: list[Question]) -> list[str]:
    """A loop over the questions, nothing kept from one to the next."""
    answers = []
    for question in questions:
        model.assistant.engine.clear()
        answers.append(model.chat(question.images[0], question.prompt, max_new_tokens=question.max_new_tokens))
    return answers


def best_of(repeats: int, ask: Callable[[], list[str]]) -> tuple[float, list[str]]:
    seconds, said = float("inf"), []
    for _ in range(repeats):
        start = time.process_time()
        said = ask()
        seconds = min(seconds, time.process_time() - start)
    return seconds, said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="append the figures to results.csv")
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = let_it_say_letters(llava.load(write_model(folder / "model"), dtype="float32", device="cpu"))
        model.assistant.engine = Engine(model.model, limits=EngineLimits())
        questions = make_questions(folder)
        trees, said = best_of(arguments.repeats, lambda: ask_trees(model, questions, folder / "a.jsonl"))
        alone, said_alone = best_of(arguments.repeats, lambda: ask_one_by_one(model, questions))
    result = {
        "one by one, ms a question": round(alone * 1e3 / len(questions), 2),
        "trees, ms a question": round(trees * 1e3 / len(questions), 2),
        "ratio": round(alone / trees, 2),
        "answers equal": said == said_alone,
        "different answers": len(set(said)),
    }
    print(json.dumps(result))
    if arguments.record:
        from record import record

        case = f"{EACH} questions a picture, 6x512"
        record("evaluate", case, "ratio", alone / trees)
        record("evaluate", case, "answers equal", float(said == said_alone))
        record("evaluate", case, "trees, ms a question", trees * 1e3 / len(questions))


if __name__ == "__main__":
    main()

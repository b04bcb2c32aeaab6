"""The model that `llava quickstart` leaves in the current folder, asked as a newcomer would ask it.

Runs where the quickstart ran before (as in the gate: the README's first line, then these tests), else skips.
"""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from llava.cli.main import main

OUT = Path(__file__).parents[2] / "llava-quickstart"
pytestmark = pytest.mark.skipif(
    not (OUT / "report.json").is_file(), reason="no finished quickstart in this checkout; run `llava quickstart` first"
)


@pytest.fixture
def drawing(tmp_path: Path) -> Path:
    """Three shapes without smooth edges, on paper that no training picture had, neither square nor 64 pixels wide."""
    picture = Image.new("RGB", (480, 320), (245, 240, 225))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((40, 60, 180, 200), fill="red")
    draw.rectangle((300, 150, 420, 270), fill="blue")
    draw.polygon([(240, 20), (280, 90), (200, 90)], fill="green")
    path = tmp_path / "drawing.png"
    picture.save(path)
    return path


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What color is the square?", "blue"),
        ("What shape is the red object?", "circle"),
        ("How many shapes are there?", "3"),
        ("Is there a red circle?", "yes"),
        ("Is there a red square?", "no"),
        ("Is the red circle left or right of the blue square?", "left"),
    ],
)
def test_it_answers_about_a_hand_made_picture(
    question: str, answer: str, drawing: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(OUT.parent)  # without MODEL, chat opens the quickstart of the folder one stands in
    assert main(["chat", "-p", question, "--image", str(drawing)]) == 0
    assert capsys.readouterr().out.strip() == answer


def test_messages_and_stock_transformers_give_the_same_greedy_tokens(
    drawing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import LlavaForConditionalGeneration

    import llava
    from llava.prompt.conversation import Conversation, Message, Text
    from llava.prompt.conversation import Image as Picture

    content = [
        {"type": "image_url", "image_url": {"url": drawing.name}},
        {"type": "text", "text": "Describe the image in detail."},
    ]
    messages = tmp_path / "messages.json"
    messages.write_text(json.dumps([{"role": "user", "content": content}]))
    model = str(OUT / "model")
    command = ["chat", model, "--messages", str(messages), "--json", "--dtype", "float32", "--device", "cpu"]
    assert main([*command, "--temperature", "0", "--max-new-tokens", "60"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["finish_reason"] == "stop" and "red circle" in said["text"]

    stock, loading = LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    processor = llava.load(model, dtype="float32").processor
    talk = Conversation((Message("user", (Picture(drawing), Text("\nDescribe the image in detail."))),))
    encoded = processor.encode(talk, open_turn=True)
    assert encoded.input_ids.tolist() == said["prompt_token_ids"]
    ids = torch.from_numpy(encoded.input_ids)[None]
    out = stock.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.from_numpy(encoded.pixel_values),
        max_new_tokens=60, do_sample=False,
    )  # fmt: skip
    assert out[0, ids.shape[1] :].tolist() == said["token_ids"]


def test_every_kind_of_the_report_lies_above_its_controls() -> None:
    accuracy = json.loads((OUT / "report.json").read_text())["accuracy"]
    for kind, row in accuracy.items():
        controls = [value for name, value in row.items() if name != "model" and value is not None]
        assert row["model"] > max(controls) + 0.1, kind

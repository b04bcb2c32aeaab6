"""What a recipe reads: several sources and formats in one run, faults among them, resumed, and the same each time."""

import io
import json
import logging
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from llava.errors import DataError
from llava.train.feeding import list_sources, open_conversations
from llava.train.metrics import read_metrics
from llava.train.prepare import prepare_run
from llava.train.recipe import load_recipe
from llava.train.run import RunStoppedError, run_recipe
from llava.train.sections import Recipe
from tests.train.test_run import StopAfter
from tests.train.tiny_training import write_tiny_bases


def llava_record(image: str | None, answer: str = "Red.") -> dict[str, object]:
    turns = [{"from": "human", "value": ("<image>\n" if image else "") + "Colour?"}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **({"image": image} if image else {})}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases, pictures, and the same kind of data in four formats, with faults in the first."""
    folder = tmp_path_factory.mktemp("feeding")
    write_tiny_bases(folder)
    (folder / "images").mkdir()
    for number in range(6):
        Image.new("RGB", (16, 16), (40 * number, 0, 0)).save(folder / "images" / f"{number}.png")
    (folder / "images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    lines = [json.dumps(llava_record(f"{n % 6}.png")) for n in range(16)]
    lines[3] = json.dumps(llava_record("broken.png"))
    lines[7] = "{oops"
    lines[11] = json.dumps(llava_record(None, ""))
    (folder / "mix.jsonl").write_text("\n".join(lines) + "\n")
    pairs = [
        {"image": f"{n}.png", "conversations": [["<image>\nColour?", "Dark."], ["Sure?", "Yes."]]} for n in range(4)
    ]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    with tarfile.open(folder / "s-000.tar", "w") as tar:
        for number in range(4):
            picture = (folder / "images" / f"{number}.png").read_bytes()
            for name, data in ((f"{number}.png", picture), (f"{number}.txt", f"Picture {number}.".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


def make_recipe(world: Path, out: Path, *changes: str, files: str = "[mix.jsonl]") -> Recipe:
    path = out.parent / "recipe.yaml"
    files = files.replace("mix.jsonl", str(world / "mix.jsonl"))
    path.write_text(
        f"""\
model: {{language_model: {world}/language_model, vision_tower: {world}/vision_tower, template: llava_hf}}
data:
  files: {files}
  images: {world}/images
  max_tokens: 120
  row_tokens: 256
  workers: 2
  max_bad_share: 0.5
  sources:
    - {{file: {world}/pairs.json, format: pairs, weight: 2.0}}
    - {{file: "{world}/s-{{000..000}}.tar", weight: 0.5}}
optim: {{learning_rate: 1e-3, batch_conversations: 4, epochs: 2.0}}
run: {{out: {out}, device: cpu, dtype: float32, save_every: 2}}
"""
    )
    return load_recipe(path, changes)


def bad_lines(out: Path) -> list[str]:
    return sorted(
        json.loads(line)["origin"].rpartition("/")[2] for line in (out / "bad_samples.jsonl").read_text().splitlines()
    )


def test_faults_among_several_sources_end_no_run_and_are_listed(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = make_recipe(world, tmp_path / "run")
    assert [(Path(source.file).name, source.format, source.weight) for source in list_sources(recipe)] == [
        ("mix.jsonl", "auto", 1.0),
        ("pairs.json", "pairs", 2.0),
        ("s-{000..000}.tar", "auto", 0.5),
    ]
    with caplog.at_level(logging.WARNING):
        result = run_recipe(recipe)
    assert bad_lines(result.out_dir) == ["mix.jsonl:12", "mix.jsonl:4", "mix.jsonl:8"]
    lines = read_metrics(result.metrics_path)
    assert sum(line["conversations"] for line in lines) == 2 * (16 + 8 + 2)
    assert sum(line.get("bad", 0) for line in lines) == 6, "each of three in each of two epochs"
    assert json.loads((result.out_dir / "run.json").read_text())["bad_samples"] == 3
    assert "3 conversations could not be used; see" in caplog.text
    assert "1 of 24 conversations cannot be used and will be left out" in caplog.text, "the broken line, at the start"


def test_a_stopped_run_goes_on_with_the_same_bad_samples_and_weights(world: Path, tmp_path: Path) -> None:
    whole = run_recipe(make_recipe(world, tmp_path / "whole"))
    recipe = make_recipe(world, tmp_path / "stopped")
    with pytest.raises(RunStoppedError):
        run_recipe(recipe, watcher=StopAfter(6))
    run_recipe(recipe)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(first[name].equal(second[name]) for name in first)
    assert (tmp_path / "stopped" / "bad_samples.jsonl").read_text() == (whole.out_dir / "bad_samples.jsonl").read_text()


def test_the_token_cache_changes_no_weight(world: Path, tmp_path: Path) -> None:
    plain = run_recipe(make_recipe(world, tmp_path / "plain", "data.max_tokens=60", "data.too_long=truncate"))
    changes = ("data.max_tokens=60", "data.too_long=truncate", f"data.token_cache={tmp_path / 'cache'}")
    expected = load_file(plain.out_dir / "model.safetensors")
    for name in ("first", "second"):
        found = load_file(run_recipe(make_recipe(world, tmp_path / name, *changes)).out_dir / "model.safetensors")
        assert all(found[key].equal(expected[key]) for key in expected)
    assert len(list((tmp_path / "cache").glob("*.tokens"))) == 1


def test_more_faults_than_the_cap_end_the_run_with_the_first_of_them(world: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"mix.jsonl:8: not JSON.*1 of 24 conversations.*max_bad_share=0"):
        open_conversations(make_recipe(world, tmp_path / "run", "data.max_bad_share=0.0"))
    only_tar = make_recipe(world, tmp_path / "run", "data.max_bad_share=0.0", files="[]")
    assert len(open_conversations(only_tar)) == 8


def test_web_addresses_are_left_out_unless_they_are_allowed(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "web.jsonl"
    path.write_text("".join(json.dumps(llava_record("http://127.0.0.1:9/a.png")) + "\n" for _ in range(3)))
    recipe = make_recipe(world, tmp_path / "run", files=f"[{path}]")
    assert [*open_conversations(recipe).unusable()] == [0, 1, 2]
    allowed = make_recipe(world, tmp_path / "run", "data.allow_urls=true", files=f"[{path}]")
    conversations = open_conversations(allowed)
    assert [*conversations.unusable()] == []
    with pytest.raises(DataError, match="not a public address"):
        conversations[0]


def test_processes_prepare_the_same_steps_as_one_alone(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(world, tmp_path / "run", "data.workers=0")
    alone = prepare_run(recipe).loader
    shares = []
    for rank in (0, 1):
        loader = prepare_run(recipe).loader
        loader._rank, loader._world_size = rank, 2
        shares.append(loader)
    for step in range(alone.plan.total_steps):
        whole, one, other = (loader.make(step) for loader in (alone, *shares))
        assert whole.conversations == one.conversations == other.conversations
        assert whole.num_answer_tokens == one.num_answer_tokens + other.num_answer_tokens
        assert {bad.number for bad in whole.bad} == {bad.number for bad in (*one.bad, *other.bad)}


def test_a_template_that_fits_no_record_is_refused_before_the_first_step(world: Path, tmp_path: Path) -> None:
    recipe = make_recipe(world, tmp_path / "run", "data.template=plain", "data.max_bad_share=0.0", files="[]")
    with pytest.raises(DataError, match=r"of the \d conversations .* cannot be used.*template 'plain' takes one"):
        prepare_run(recipe)
    assert not (tmp_path / "run" / "bad_samples.jsonl").exists()

"""A whole run on disk: from two bases and a data set to a model that opens again; stopped, damaged and resumed."""

import json
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava.checkpoint.load import load
from llava.errors import DataError, LlavaError, RecipeError, TrainingError
from llava.prompt.conversation import Conversation, Message, Text
from llava.train.loop import StepRecord
from llava.train.metrics import read_metrics
from llava.train.prepare import prepare_run
from llava.train.progress import RunInfo, Sample, Watcher
from llava.train.recipe import load_recipe
from llava.train.run import RunStoppedError, run_recipe
from llava.train.sections import Recipe
from tests.train.tiny_training import write_tiny_bases

COLOURS = {"red": (220, 20, 20), "blue": (20, 20, 220)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases and a data set: twelve plain pictures, two questions each."""
    folder = tmp_path_factory.mktemp("world")
    write_tiny_bases(folder)
    (folder / "images").mkdir()
    records = []
    for number in range(12):
        name = ("red", "blue")[number % 2]
        Image.new("RGB", (16, 16), COLOURS[name]).save(folder / "images" / f"{number}.png")
        for question in ("Colour?", "Which?"):
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": name}]
            records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "mix.json").write_text(json.dumps(records, indent=1))
    return folder


def make_recipe(world: Path, out: Path, *changes: str) -> Recipe:
    path = out.parent / "recipe.yaml"
    path.write_text(
        f"""\
model:
  language_model: {world}/language_model
  vision_tower: {world}/vision_tower
  template: llava_hf
data:
  files: [{world}/mix.json]
  images: {world}/images
  max_tokens: 200
  row_tokens: 256
  workers: 1
tune:
  language_model: full
optim:
  learning_rate: 5e-3
  batch_conversations: 8
  epochs: 2.0
run:
  out: {out}
  device: cpu
  dtype: float32
"""
    )
    return load_recipe(path, changes)


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out / "metrics.jsonl")]


class StopAfter(Watcher):
    """Presses Ctrl-C after a step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.message = ""

    def stepped(self, record: StepRecord) -> None:
        if record.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)

    def stopped(self, message: str) -> None:
        self.message = message


def test_a_run_lowers_the_loss_and_leaves_a_model_that_opens(world: Path, tmp_path: Path) -> None:
    result = run_recipe(make_recipe(world, tmp_path / "run", "optim.epochs=10.0"))
    made = losses(result.out_dir)
    assert len(made) == result.total_steps == 30
    assert sum(made[-5:]) < 0.5 * sum(made[:5])
    assert {"config.json", "recipe.yaml", "run.json", "metrics.jsonl", "loss.svg", "loss.png"} <= {
        path.name for path in result.out_dir.iterdir()
    }
    assert not (result.out_dir / "checkpoints").exists()
    loaded = load(result.out_dir, device="cpu", dtype="float32")
    asked = Conversation((Message("user", (Text("Colour?"),)),))
    assert loaded.processor.template.name == "llava_hf"
    assert len(loaded.processor.encode(asked, open_turn=True).input_ids)
    described = json.loads((result.out_dir / "run.json").read_text())
    assert described["state"] == "finished"
    assert described["versions"]["torch"] == torch.__version__
    assert load_recipe(result.out_dir / "recipe.yaml").optim.epochs == 10.0


def test_the_second_stage_starts_from_the_firsts_folder(world: Path, tmp_path: Path) -> None:
    align = run_recipe(make_recipe(world, tmp_path / "align", "tune.language_model=frozen", "data.template=plain"))
    before = load(align.out_dir, device="cpu", dtype="float32").model
    assert load(align.out_dir).processor.template.name == "llava_hf", "`plain` was this run's text, not the model's"
    start = f"model={{path: {align.out_dir}}}"
    instruct = run_recipe(
        make_recipe(world, tmp_path / "instruct", start, "optim.max_steps=1", "optim.learning_rate=1e-9")
    )
    after = load(instruct.out_dir, device="cpu", dtype="float32").model
    for (name, left), (_, right) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("step", [1, 4])
def test_ctrl_c_saves_and_the_same_call_goes_on_to_the_same_bits(world: Path, tmp_path: Path, step: int) -> None:
    whole = run_recipe(make_recipe(world, tmp_path / "whole"))
    recipe = make_recipe(world, tmp_path / "cut")
    watcher = StopAfter(step)
    with pytest.raises(RunStoppedError, match=f"stopped after step {step} of 6; the same command goes on"):
        run_recipe(recipe, watcher=watcher)
    assert watcher.message
    resumed = run_recipe(recipe)
    assert resumed.first_step == step
    assert [loss.hex() for loss in losses(resumed.out_dir)] == [loss.hex() for loss in losses(whole.out_dir)]
    weights = "model.safetensors"
    assert (resumed.out_dir / weights).read_bytes() == (whole.out_dir / weights).read_bytes()


def test_the_same_seed_gives_the_same_run(world: Path, tmp_path: Path) -> None:
    first, second = (run_recipe(make_recipe(world, tmp_path / name)).out_dir for name in ("a", "b"))
    other = run_recipe(make_recipe(world, tmp_path / "c", "run.seed=1")).out_dir
    assert losses(first) == losses(second) != losses(other)


def test_a_damaged_newest_checkpoint_falls_back_and_still_ends_the_same(world: Path, tmp_path: Path) -> None:
    whole = run_recipe(make_recipe(world, tmp_path / "whole"))
    recipe = make_recipe(world, tmp_path / "cut", "run.save_every=2")
    with pytest.raises(RunStoppedError):
        run_recipe(recipe, watcher=StopAfter(5))
    newest = tmp_path / "cut" / "checkpoints" / "step-00000005" / "state.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    resumed = run_recipe(recipe)
    assert resumed.first_step == 4
    assert losses(resumed.out_dir) == losses(whole.out_dir)


def test_a_finished_run_is_not_trained_again(world: Path, tmp_path: Path) -> None:
    recipe = make_recipe(world, tmp_path / "run")
    first = run_recipe(recipe)
    again = run_recipe(recipe)
    assert again.first_step == again.total_steps == first.total_steps
    assert again.loss == first.loss
    with pytest.raises(TrainingError, match=r"finished run of another recipe: optim.learning_rate: 0.005 -> 0.001"):
        run_recipe(make_recipe(world, tmp_path / "run", "optim.learning_rate=1e-3"))
    assert run_recipe(recipe, resume=False).first_step == 0


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", "null", '{"state": "finished"}', '{"state"', '{"state": "finished", "recipe": 2, "total_steps": 1}'],
)
def test_a_damaged_record_of_a_run_is_no_finished_run(world: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(text)
    assert run_recipe(make_recipe(world, tmp_path / "run", "optim.max_steps=1")).first_step == 0


@pytest.mark.parametrize(
    "change", ["optim.learning_rate=1e-3", "run.seed=3", "optim.batch_conversations=4", "data.group_by_picture=false"]
)
def test_a_checkpoint_of_another_recipe_is_refused_with_the_difference(
    world: Path, tmp_path: Path, change: str
) -> None:
    with pytest.raises(RunStoppedError):
        run_recipe(make_recipe(world, tmp_path / "run"), watcher=StopAfter(1))
    with pytest.raises(TrainingError, match=f"of another recipe: {change.split('=')[0]}"):
        run_recipe(make_recipe(world, tmp_path / "run", change))


def test_changed_data_is_refused(world: Path, tmp_path: Path) -> None:
    copy = tmp_path / "mix.json"
    shutil.copy(world / "mix.json", copy)
    recipe = make_recipe(world, tmp_path / "run", f"data.files=[{copy}]")
    with pytest.raises(RunStoppedError):
        run_recipe(recipe, watcher=StopAfter(1))
    copy.write_text(copy.read_text().replace("Which?", "What?"))
    with pytest.raises(TrainingError, match="made with another data"):
        run_recipe(recipe)


def test_where_and_how_may_change_between_a_run_and_its_continuation(world: Path, tmp_path: Path) -> None:
    with pytest.raises(RunStoppedError):
        run_recipe(make_recipe(world, tmp_path / "run"), watcher=StopAfter(2))
    changes = ("data.workers=0", "run.micro_batch_tokens=300", "run.save_every=1", "run.keep=1")
    assert run_recipe(make_recipe(world, tmp_path / "run", *changes)).first_step == 2


def test_sample_answers_are_kept_and_shown(world: Path, tmp_path: Path) -> None:
    class Collect(Watcher):
        def __init__(self) -> None:
            self.samples: list[Sample] = []
            self.info: RunInfo | None = None

        def started(self, info: RunInfo) -> None:
            self.info = info

        def sampled(self, sample: Sample) -> None:
            self.samples.append(sample)

    watcher = Collect()
    picture = f"run.sample_images=[{world}/images/0.png]"
    changes = (picture, "run.sample_every=3", "run.sample_questions=['Colour?']")
    sampled = run_recipe(make_recipe(world, tmp_path / "run", *changes), watcher=watcher)
    assert [sample.step for sample in watcher.samples] == [0, 3, 6]
    assert len((sampled.out_dir / "samples.jsonl").read_text().splitlines()) == 3
    page = (sampled.out_dir / "samples.html").read_text()
    assert "data:image/jpeg;base64," in page
    assert all(f"<td>{step}</td>" in page for step in (0, 3, 6))
    assert watcher.info is not None
    assert watcher.info.total_steps == 6
    plain = run_recipe(make_recipe(world, tmp_path / "plain"))
    assert losses(sampled.out_dir) == losses(plain.out_dir), "asking must not change what is learnt"


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        (["data.files=[none.json]"], DataError, "none.json: cannot be read"),
        (["data.images=/nowhere"], DataError, r"mix.json:\d+ \(record 0\): picture '0.png' is not in /nowhere"),
        (["data.max_tokens=3"], DataError, "at most 3 fit"),
        (["model.language_model=/nowhere"], LlavaError, "/nowhere"),
        (["model.template=vicuna_v9"], LlavaError, "vicuna_v9"),
        (["run.sample_images=[none.png]"], RecipeError, "none.png: no such file"),
        (["run.device=teapot"], LlavaError, "teapot"),
        (["run.out=null"], RecipeError, "run.out is missing"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    world: Path, tmp_path: Path, changes: Sequence[str], kind: type[LlavaError], says: str
) -> None:
    with pytest.raises(kind, match=says):
        run_recipe(make_recipe(world, tmp_path / "run", *changes))
    assert not (tmp_path / "run").exists()


def test_a_disk_that_is_too_small_is_refused_before_the_first_step(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(TrainingError, match=r"the run needs 0\.\d GB, 0.0 GB are free"):
        run_recipe(make_recipe(world, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_too_long_conversations_are_dropped_when_asked(world: Path, tmp_path: Path) -> None:
    lines = json.loads((world / "mix.json").read_text())
    lines[0]["conversations"][1]["value"] = "red " * 200
    (tmp_path / "mix.json").write_text(json.dumps(lines))
    changes = (f"data.files=[{tmp_path}/mix.json]", "data.too_long=drop", "optim.epochs=1.0")
    result = run_recipe(make_recipe(world, tmp_path / "run", *changes))
    assert sum(line.get("dropped", 0) for line in read_metrics(result.metrics_path)) == 1


def test_a_tower_can_be_tuned(world: Path, tmp_path: Path) -> None:
    before = prepare_run(make_recipe(world, tmp_path / "x")).loaded.model.vision_tower.state_dict()
    result = run_recipe(
        make_recipe(world, tmp_path / "run", "tune.vision_tower=full", "optim.vision_tower_learning_rate=1e-3")
    )
    after = load(result.out_dir, device="cpu", dtype="float32").model.vision_tower.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)

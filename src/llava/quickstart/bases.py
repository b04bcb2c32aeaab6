"""The quickstart's two base models: where the shipped ones lie, and the recipe that made them.

    assets/vision_tower/      CLIPVisionModel and its preprocessor (features: hidden_states[-1], without CLS)
    assets/vision_probe.safetensors   the dense head the tower was trained with, kept for the gates only
    assets/language_model/    LlamaForCausalLM and its tokenizer
    assets/bases.json         recipe hash, seed, settings, gate figures, versions
    assets/MODEL_CARD.md      the same in words

`rebuild_bases` makes them again from nothing: on a CPU within two hours on one thread, faster on a GPU. The result is a
function of the seed, the settings and the sources that `recipe_hash` covers, up to the arithmetic of the machine.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import re
import shutil
import time
import tokenize
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import CLIPVisionModel, LlamaForCausalLM

import llava
from llava.errors import CheckpointError
from llava.quickstart.gates import LANGUAGE_GATES, TOWER_GATES, list_short_gates, measure_bases
from llava.quickstart.language_pretraining import (
    LanguageState,
    averaged_model,
    load_language_state,
    pretrain_language_model,
    save_language_state,
    start_language_state,
)
from llava.quickstart.language_start import LanguageSettings
from llava.quickstart.model_card import write_model_card
from llava.quickstart.tokenizer_building import build_tokenizer, save_tokenizer
from llava.quickstart.tower_pretraining import DenseHead, TowerSettings, pretrain_tower

VISION_FEATURE_LAYER = -1  # the dense loss sat on the last block's output; there is no untrained block after it
STORED_DTYPE = torch.float16
# what decides the bases: changing any of these without training again fails a test
RECIPE_SOURCES = (
    "data/scenes.py",
    "data/scene_turns.py",
    "quickstart/scene_text.py",
    "quickstart/tokenizer_building.py",
    "quickstart/tower_pretraining.py",
    "quickstart/random_tokens.py",
    "quickstart/language_start.py",
    "quickstart/language_pretraining.py",
)


@dataclass(frozen=True)
class Bases:
    """Where a pair of bases lies."""

    vision_tower: Path
    language_model: Path
    facts: dict[str, Any]  # bases.json


@dataclass(frozen=True)
class RebuildProgress:
    """How far a part is; figures are its mean losses since the last report."""

    part: str
    step: int
    num_steps: int
    seconds_left: float
    figures: dict[str, float]


@dataclass(frozen=True)
class RebuildSettings:
    """Both parts' settings; the shipped bases were made with the defaults."""

    tower: TowerSettings = field(default_factory=TowerSettings)
    language: LanguageSettings = field(default_factory=LanguageSettings)
    num_gate_scenes: int = 400


def shipped_bases() -> Bases:
    """The bases inside the package. Raises CheckpointError when the installation lacks them."""
    return open_bases(Path(str(resources.files("llava.quickstart") / "assets")))


def open_bases(folder: Path) -> Bases:
    """The bases in a folder that `rebuild_bases` wrote. Raises CheckpointError naming what is missing."""
    for name in ("bases.json", "vision_tower/model.safetensors", "language_model/model.safetensors"):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder}: no {name}; install llava again, or run `llava quickstart --rebuild-bases`"
            )
    return Bases(folder / "vision_tower", folder / "language_model", json.loads((folder / "bases.json").read_text()))


def rebuild_bases(
    out_dir: Path,
    *,
    seed: int = 0,
    device: torch.device | None = None,
    settings: RebuildSettings | None = None,
    progress: Callable[[RebuildProgress], None] | None = None,
) -> Bases:
    """Make tower, tokenizer and language model from nothing and measure their gates.

    A stopped run goes on when it is called again with the same arguments: the tower is kept once it is whole, the
    language model goes on at its last saved step. One thread is used on a CPU, so that sums are added in one order.
    """
    settings, device = settings or RebuildSettings(), device or torch.device("cpu")
    made_of = {"recipe_hash": recipe_hash(settings), "seed": seed}
    out_dir.mkdir(parents=True, exist_ok=True)
    marker = out_dir / "rebuild.json"
    if not marker.exists() or json.loads(marker.read_text()) != made_of:
        for part in ("vision_tower", "language_model"):
            shutil.rmtree(out_dir / part, ignore_errors=True)
        (out_dir / "language.state.pt").unlink(missing_ok=True)
        marker.write_text(json.dumps(made_of))
    with _one_thread(device):
        if not (out_dir / "vision_tower" / "model.safetensors").exists():
            tower, head = pretrain_tower(
                settings.tower, seed=seed, device=device, report=_reporter("vision tower", progress)
            )
            save_tower(tower, head, out_dir)
        save_tokenizer(out_dir / "language_model")
        state = _pretrain_language(settings, out_dir / "language.state.pt", seed, device, progress)
        save_language_model(averaged_model(state), out_dir / "language_model")
        return finish_bases(out_dir, seed=seed, settings=settings, device=device)


def finish_bases(out_dir: Path, *, seed: int, settings: RebuildSettings, device: torch.device) -> Bases:
    """Measure the gates on the written files and add bases.json and the model card."""
    tower, head, language, tokenizer = load_bases(out_dir, device=device)
    gates = measure_bases(tower, head, language, tokenizer, device=device, num_scenes=settings.num_gate_scenes)
    facts: dict[str, Any] = {
        "recipe_hash": recipe_hash(settings),
        "seed": seed,
        "settings": asdict(settings),
        "gates": gates,
        "short": list_short_gates(gates),
        "wanted": {"vision_tower": TOWER_GATES, "language_model": LANGUAGE_GATES},
        "vision_feature_layer": VISION_FEATURE_LAYER,
        "parameters": {"vision_tower": _count(tower), "language_model": _count(language)},
        "versions": {
            name: metadata.version(name) for name in ("torch", "transformers", "tokenizers", "numpy", "pillow")
        }
        | {"python": platform.python_version(), "llava": llava.__version__},
    }
    (out_dir / "bases.json").write_text(json.dumps(facts, indent=2) + "\n")
    (out_dir / "MODEL_CARD.md").write_text(write_model_card(facts))
    for path in out_dir.rglob("*.safetensors"):  # written readable by their owner only
        path.chmod(0o644)
    return open_bases(out_dir)


def load_bases(folder: Path, *, device: torch.device) -> tuple[CLIPVisionModel, DenseHead, LlamaForCausalLM, Tokenizer]:
    """Tower, its probe, language model and tokenizer in float32, for measuring."""
    tower = CLIPVisionModel.from_pretrained(folder / "vision_tower", dtype=torch.float32).to(device).eval()
    head = DenseHead(tower.config.hidden_size)
    head.load_state_dict({k: v.float() for k, v in load_file(folder / "vision_probe.safetensors").items()})
    language = LlamaForCausalLM.from_pretrained(folder / "language_model", dtype=torch.float32).to(device).eval()
    return tower, head.to(device).eval(), language, Tokenizer.from_file(str(folder / "language_model/tokenizer.json"))


def save_tower(tower: CLIPVisionModel, head: DenseHead, out_dir: Path) -> None:
    """Write tower, preprocessor and probe; the weights last, so that a tower with weights is whole."""
    folder = out_dir / "vision_tower"
    folder.mkdir(parents=True, exist_ok=True)
    side = tower.config.image_size
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    save_file(
        {name: value.detach().to("cpu", STORED_DTYPE).contiguous() for name, value in head.state_dict().items()},
        out_dir / "vision_probe.safetensors",
    )
    tower.to(device="cpu", dtype=STORED_DTYPE).save_pretrained(folder)


def save_language_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the language model beside its tokenizer."""
    model.to(device="cpu", dtype=STORED_DTYPE).save_pretrained(folder)


def recipe_hash(settings: RebuildSettings | None = None) -> str:
    """sha256 over the settings and the code of RECIPE_SOURCES; comments, docstrings and layout do not count."""
    settings = settings or RebuildSettings()
    digest = hashlib.sha256(json.dumps(asdict(replace(settings, num_gate_scenes=0)), sort_keys=True).encode())
    package = Path(str(resources.files("llava")))
    for name in RECIPE_SOURCES:
        digest.update(name.encode() + b"\0" + strip_source((package / name).read_text()).encode())
    return digest.hexdigest()


def strip_source(source: str) -> str:
    """Python source without comments, docstrings and white space, and without the commas that a formatter adds."""
    pieces: list[str] = []
    line_start = True
    lines = source.splitlines(keepends=True)
    spans: list[tuple[tuple[int, int], tuple[int, int]]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and line_start):
            spans.append((token.start, token.end))
        if token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            line_start = True
        elif token.type not in (tokenize.NL, tokenize.COMMENT):
            line_start = False
    place = (1, 0)
    for start, end in [*spans, ((len(lines) + 1, 0), (len(lines) + 1, 0))]:
        pieces.append(_cut(lines, place, start))
        place = end
    return re.sub(r",(?=[)\]}])", "", re.sub(r"\s+", "", "".join(pieces)))


def _cut(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    """The text between two (line, column) places, lines counted from 1."""
    if start[0] == end[0]:
        return lines[start[0] - 1][start[1] : end[1]]
    middle = "".join(lines[start[0] : end[0] - 1])
    last = lines[end[0] - 1][: end[1]] if end[0] <= len(lines) else ""
    first = lines[start[0] - 1][start[1] :] if start[0] <= len(lines) else ""
    return first + middle + last


def _pretrain_language(
    settings: RebuildSettings,
    state_path: Path,
    seed: int,
    device: torch.device,
    progress: Callable[[RebuildProgress], None] | None,
) -> LanguageState:
    tokenizer = build_tokenizer()
    state = start_language_state(settings.language, tokenizer, seed=seed, device=device)
    if state_path.exists():
        load_language_state(state, state_path)
    return pretrain_language_model(
        settings.language,
        tokenizer,
        seed=seed,
        device=device,
        state=state,
        report=_reporter("language model", progress, first_step=state.step),
        save=lambda now: save_language_state(now, state_path),
    )


def _reporter(
    part: str, progress: Callable[[RebuildProgress], None] | None, *, first_step: int = 0
) -> Callable[[int, int, dict[str, float]], None]:
    started = time.monotonic()

    def report(step: int, num_steps: int, figures: dict[str, float]) -> None:
        if progress is not None:
            left = (time.monotonic() - started) / max(step - first_step, 1) * (num_steps - step)
            progress(RebuildProgress(part, step, num_steps, left, figures))

    return report


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

"""Run a recipe: open the model, lay out the data, train, save. What `llava train` and the quickstart both call.

    result = run_recipe(load_recipe("quickstart-align", ["run.out=runs/align"]))

The run's folder ends as a LLaVA that `llava chat` opens. Beside the model lie `recipe.yaml` (every value, resolved),
`run.json` (versions, seed, state), `metrics.jsonl`, `loss.svg`, `samples.jsonl` and, while it runs, `checkpoints/`. The
same call again goes on from the newest whole checkpoint, and returns at once when the run is finished.
Not covered yet: several processes, LoRA.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import llava
from llava.checkpoint.huggingface import save
from llava.errors import TrainingError
from llava.model.llava import Llava
from llava.train.loop import StepRecord
from llava.train.metrics import MetricsLog, draw_loss, read_metrics
from llava.train.prepare import Prepared, out_dir_of, prepare_run
from llava.train.progress import Watcher
from llava.train.samples import answer_samples
from llava.train.sections import Recipe
from llava.train.state import collect_tensors, load_newest, restore_tensors, save_state, write_durably

_log = logging.getLogger(__name__)

# What may differ between a run and its continuation: where and how, never what is learnt.
_FREE_TO_CHANGE = {
    ("description",),
    ("data", "workers"),
    ("run", "out"),
    ("run", "device"),
    ("run", "micro_batch_tokens"),
    ("run", "log_every"),
    ("run", "save_every"),
    ("run", "keep"),
    ("run", "max_bad_steps"),
    ("run", "sample_every"),
    ("run", "sample_images"),
    ("run", "sample_questions"),
}
_SPARE_BYTES = 64 << 20


class RunStoppedError(KeyboardInterrupt):
    """The run was asked to stop: its step was finished and saved. The message says how to go on."""


@dataclass(frozen=True)
class RunResult:
    """A finished run. first_step: where this call began (the end of the run when it was finished before)."""

    out_dir: Path
    total_steps: int
    first_step: int
    loss: float | None
    seconds: float

    @property
    def metrics_path(self) -> Path:
        return self.out_dir / "metrics.jsonl"


def run_recipe(recipe: Recipe, *, resume: bool = True, watcher: Watcher | None = None) -> RunResult:
    """Run a recipe to its end, or on to its end when an earlier call was interrupted.

    resume=False starts anew and drops the checkpoints of an earlier run in the same folder. Raises RunStoppedError
    (a KeyboardInterrupt) after Ctrl-C or SIGTERM, once the step is saved; LlavaError for what the user can set right.
    """
    watcher = watcher or Watcher()
    started = time.perf_counter()
    out_dir = out_dir_of(recipe)
    if resume and (finished := _finished(out_dir, recipe)) is not None:
        return finished
    if not resume:
        shutil.rmtree(out_dir / "checkpoints", ignore_errors=True)
    prepared = prepare_run(recipe)
    _check_space(prepared)
    _restore(prepared)
    first_step = prepared.loader.position
    _describe(prepared, state="running")
    watcher.started(prepared.info)
    try:
        last = _train(prepared, watcher)
    finally:
        watcher.ended()
    _finish(prepared)
    return RunResult(out_dir, prepared.loader.plan.total_steps, first_step, last, time.perf_counter() - started)


# --- training ----------------------------------------------------------------------------------------------------


def _train(prepared: Prepared, watcher: Watcher) -> float | None:
    """Steps until the plan ends or somebody asks to stop; returns the last step's loss."""
    run, loader = prepared.recipe.run, prepared.loader
    metrics = MetricsLog(prepared.out_dir / "metrics.jsonl", resume_at=loader.position)
    loss: float | None = None
    saved_at = loader.position
    with _asked_to_stop() as asked:
        for record in prepared.trainer.run(iter(loader)):
            loss = record.loss
            if record.step % run.log_every == 0 or record.step == loader.plan.total_steps:
                metrics.write(record)
            watcher.stepped(record)
            if run.sample_every and run.sample_images and record.step % run.sample_every == 0:
                _sample(prepared, record.step, watcher)
            last = record.step == loader.plan.total_steps
            if not last and (record.step % run.save_every == 0 or asked.is_set()):
                watcher.saved(_save(prepared, record))
                saved_at = record.step
            if asked.is_set() and not last:
                message = (
                    f"stopped after step {saved_at} of {loader.plan.total_steps}; the same command goes on from there"
                )
                watcher.stopped(message)
                raise RunStoppedError(message)
    return loss


def _save(prepared: Prepared, record: StepRecord) -> Path:
    trainer = prepared.trainer
    loader_state = {**prepared.loader.state_dict(), "position": record.step}
    facts = {
        "loader": loader_state,
        "recipe": prepared.recipe.model_dump(mode="json"),
        "frozen": prepared.notes["frozen"],
        "versions": _versions(),
    }
    tensors = collect_tensors(trainer.model, trainer.optimizer, trainer.device)
    root = prepared.out_dir / "checkpoints"
    return save_state(root, record.step, tensors=tensors, facts=facts, keep=prepared.recipe.run.keep)


def _restore(prepared: Prepared) -> None:
    """Go on from the newest whole checkpoint, if there is one and it is of this run."""
    prepared.notes["frozen"] = _digest_frozen(prepared.loaded.model)
    saved = load_newest(prepared.out_dir / "checkpoints")
    if saved is None:
        return
    different = _differences(saved.facts["recipe"], prepared.recipe.model_dump(mode="json"))
    if different:
        raise TrainingError(
            f"{saved.folder} is of another recipe: {'; '.join(different[:3])}; take those values back, choose another "
            "run.out, or start anew with --restart"
        )
    if saved.facts["frozen"] != prepared.notes["frozen"]:
        raise TrainingError(
            f"{saved.folder}: the frozen weights of the model that the run started from have changed; "
            "restore them, or start anew with --restart"
        )
    restore_tensors(saved.tensors, prepared.trainer.model, prepared.trainer.optimizer, prepared.trainer.device)
    prepared.loader.load_state_dict(saved.facts["loader"])


def _finish(prepared: Prepared) -> None:
    """The model, the plot, the record that the run is done; the checkpoints have done their service."""
    out_dir = prepared.out_dir
    save(prepared.loaded.model, prepared.loaded.processor, out_dir)
    plot = draw_loss(read_metrics(out_dir / "metrics.jsonl"), title=prepared.recipe.description or out_dir.name)
    write_durably(out_dir / "loss.svg", plot)
    _describe(prepared, state="finished")
    shutil.rmtree(out_dir / "checkpoints", ignore_errors=True)


def _sample(prepared: Prepared, step: int, watcher: Watcher) -> None:
    run, loaded = prepared.recipe.run, prepared.loaded
    images = [Path(name) for name in run.sample_images]
    samples = answer_samples(loaded.model, loaded.processor, step=step, images=images, questions=run.sample_questions)
    with (prepared.out_dir / "samples.jsonl").open("a", encoding="utf-8") as file:
        for sample in samples:
            watcher.sampled(sample)
            line = {"step": step, "image": str(sample.image), "question": sample.question, "answer": sample.answer}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; a second Ctrl-C stops at once. Only in the main thread."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- the run's folder --------------------------------------------------------------------------------------------


def _finished(out_dir: Path, recipe: Recipe) -> RunResult | None:
    """The result of a run that is done already, None when it is not."""
    path = out_dir / "run.json"
    if not path.is_file():
        return None
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    if run.get("state") != "finished":
        return None
    different = _differences(run["recipe"], recipe.model_dump(mode="json"))
    if different:
        raise TrainingError(
            f"{out_dir} holds a finished run of another recipe: {'; '.join(different[:3])}; choose another run.out, or "
            "start anew with --restart"
        )
    lines = read_metrics(out_dir / "metrics.jsonl")
    steps = int(run["total_steps"])
    return RunResult(out_dir, steps, steps, lines[-1]["loss"] if lines else None, 0.0)


def _describe(prepared: Prepared, *, state: str) -> None:
    """Write recipe.yaml and run.json."""
    prepared.out_dir.mkdir(parents=True, exist_ok=True)
    recipe = prepared.recipe
    run = {
        "state": state,
        "total_steps": prepared.loader.plan.total_steps,
        "seed": recipe.run.seed,
        "versions": _versions(),
        "device": str(prepared.trainer.device),
        "dtype": str(prepared.dtype).removeprefix("torch."),
        "data": prepared.conversations.fingerprint,
        "parts": [vars(summary) for summary in prepared.summaries],
        "recipe": recipe.model_dump(mode="json"),
    }
    write_durably(prepared.out_dir / "recipe.yaml", recipe.as_yaml())
    write_durably(prepared.out_dir / "run.json", json.dumps(run, indent=1))


def _check_space(prepared: Prepared) -> None:
    """Refuse a run whose model and checkpoints would not fit on the disk."""
    parameters = list(prepared.loaded.model.parameters())
    model_bytes = sum(p.numel() * p.element_size() for p in parameters)
    # Weights and two moments of what is trained; one checkpoint more than is kept exists while a new one is written.
    state_bytes = 3 * sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    wanted = model_bytes + (prepared.recipe.run.keep + 1) * state_bytes + _SPARE_BYTES
    place = prepared.out_dir
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < wanted:
        raise TrainingError(
            f"{prepared.out_dir}: the run needs {wanted / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "free some space, choose another run.out, or lower run.keep"
        )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`key: before -> now` of every value that decides what is learnt."""
    found = []
    for section in sorted(set(before) | set(now)):
        old, new = before.get(section), now.get(section)
        if not isinstance(old, Mapping) or not isinstance(new, Mapping):
            if old != new and (section,) not in _FREE_TO_CHANGE:
                found.append(f"{section}: {old!r} -> {new!r}")
            continue
        for key in sorted(set(old) | set(new)):
            if old.get(key) != new.get(key) and (section, key) not in _FREE_TO_CHANGE:
                found.append(f"{section}.{key}: {old.get(key)!r} -> {new.get(key)!r}")
    return found


def _digest_frozen(model: Llava) -> str:
    """A digest of some numbers of every frozen tensor: enough to notice another base model, cheap at any size."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            flat = parameter.detach().flatten()
            sampled = flat[:: max(1, flat.numel() // 64)].float().cpu().contiguous()
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            digest.update(sampled.numpy().tobytes())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    import transformers

    return {
        "llava": llava.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }

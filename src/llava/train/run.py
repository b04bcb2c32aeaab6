"""Run a recipe: open the model, lay out the data, train, save. What `llava train` and the quickstart both call.

    result = run_recipe(load_recipe("quickstart-align", ["run.out=runs/align"]))

The run's folder ends as a LLaVA that `llava chat` opens (with LoRA: adapters that name their base). Beside the model
lie `recipe.yaml` (every value, resolved), `run.json` (versions, seed, state), `metrics.jsonl`, `loss.svg`,
`samples.jsonl` and, while it runs, `checkpoints/`. The same call again goes on from the newest whole checkpoint, and
returns at once when the run is finished.
With several processes (train/launch.py, torchrun) all of them make the same call; process 0 reads and writes the
folder, so the others need not see it. Checkpoints hold whole tensors: any number of processes goes on from them.
"""

from __future__ import annotations

import json
import logging
import platform
import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import llava
from llava.data.sources import iterate_origins
from llava.distributed import any_process, joined, pick_device, process_count, process_number, share_object
from llava.errors import TrainingError
from llava.train.feature_choice import FOLDER as FEATURES
from llava.train.feeding import BAD_SAMPLES
from llava.train.journal import Journal, UnsavedError, naming_unsaved, read_lines, write_durably
from llava.train.loop import StepRecord
from llava.train.meter import Meter
from llava.train.metrics import MetricsLog, read_metrics
from llava.train.observers import observe
from llava.train.preflight import check_disk, disk_bytes
from llava.train.prepare import Prepared, out_dir_of, prepare_run
from llava.train.progress import Watcher
from llava.train.resume import differences, held_folder, refuse_another_run
from llava.train.samples import answer_samples, why_not_now, write_sample_page
from llava.train.saving import bytes_to_save, save_run
from llava.train.sections import Recipe
from llava.train.state import collect_tensors, load_newest, restore_tensors, save_state
from llava.train.stopping import RunStoppedError, asked_to_stop
from llava.train.trackers import require_trackers

_log = logging.getLogger(__name__)


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
    out_dir = out_dir_of(recipe)
    with joined(pick_device(recipe.run.device)), held_folder(out_dir) if _is_first() else nullcontext():
        return _run(recipe, out_dir, resume=resume, watcher=watcher if watcher and _is_first() else Watcher())


def _is_first() -> bool:
    """Whether this is the process that reads and writes the run's folder."""
    return process_number() == 0


def _run(recipe: Recipe, out_dir: Path, *, resume: bool, watcher: Watcher) -> RunResult:
    started = time.perf_counter()
    finished = share_object(_finished(out_dir, recipe) if resume and _is_first() else None)
    if finished is not None:
        return finished
    if not resume and _is_first():
        shutil.rmtree(out_dir / "checkpoints", ignore_errors=True)
    require_trackers(recipe.run.track)
    prepared = prepare_run(recipe)
    if _is_first():
        left = bytes_to_save(recipe, prepared.loaded)
        check_disk(out_dir, disk_bytes(prepared.loaded.model, left=left, keep=recipe.run.keep))
    _restore(prepared)
    first_step = prepared.loader.position
    if _is_first():
        with naming_unsaved(out_dir):
            _describe(prepared, state="running")
        watcher = observe(recipe, watcher)
    trainer = prepared.trainer
    meter = Meter(trainer.model, device=trainer.device, dtype=prepared.dtype, processes=process_count())
    prepared.notes["meter"] = meter
    watcher.started(replace(prepared.info, meter=meter))
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
    conversations = prepared.conversations
    prepared.trainer.guard.report_to(None, lambda numbers: [*iterate_origins(conversations, numbers)])
    journals = _Journals.open(prepared) if _is_first() else None
    lines = read_metrics(journals.metrics.path) if journals else []
    loss: float | None = lines[-1]["loss"] if lines else None
    saved_at = loader.position
    with asked_to_stop() as asked:
        if journals and loader.position == 0:
            _sample(prepared, 0, watcher, journals.samples)
        for record in prepared.trainer.run(iter(loader)):
            loss = record.loss
            last = record.step == loader.plan.total_steps
            if journals and (record.step % run.log_every == 0 or last):
                journals.metrics.write(record)
            watcher.stepped(record)
            if journals and run.sample_every and record.step % run.sample_every == 0:
                _sample(prepared, record.step, watcher, journals.samples)
            stops = any_process(asked.is_set())
            if last or record.step % run.save_every == 0 or stops:
                try:
                    _save(prepared, record, journals, watcher)
                    saved_at = record.step
                except UnsavedError as error:
                    # What is already trained is worth more than stopping: the next save may find the disk well again.
                    _log.error("%s", error)
            if stops and not last:
                message = (
                    f"stopped after step {saved_at} of {loader.plan.total_steps}; the same command goes on from there"
                )
                watcher.stopped(message)
                raise RunStoppedError(message)
    guard = prepared.trainer.guard
    if journals is None:
        return loss
    journals.sync()
    if guard.bad_steps:
        _log.warning("%d steps were skipped: not finite; see %s", guard.bad_steps, journals.bad_steps.path)
    if bad := len(loader.bad_samples):
        _log.warning("%d conversations could not be used; see %s", bad, prepared.out_dir / BAD_SAMPLES)
    return loss


@dataclass(frozen=True)
class _Journals:
    """What a run writes line by line."""

    metrics: MetricsLog
    samples: Journal
    bad_steps: Journal

    @classmethod
    def open(cls, prepared: Prepared) -> _Journals:
        """Open them, cut back to the step that the run goes on from."""
        out_dir, position, conversations = prepared.out_dir, prepared.loader.position, prepared.conversations
        with naming_unsaved(out_dir):
            opened = cls(
                MetricsLog(out_dir / "metrics.jsonl", resume_at=position, meter=prepared.notes["meter"]),
                Journal(out_dir / "samples.jsonl", resume_at=position),
                Journal(out_dir / "bad_steps.jsonl", resume_at=position),
            )
        prepared.trainer.guard.report_to(opened.bad_steps, lambda numbers: [*iterate_origins(conversations, numbers)])
        return opened

    def sync(self) -> None:
        """Put every line on the disk. Raises UnsavedError when that cannot be done."""
        for journal in (self.metrics, self.samples, self.bad_steps):
            with naming_unsaved(journal.path):
                journal.sync()


def _save(prepared: Prepared, record: StepRecord, journals: _Journals | None, watcher: Watcher) -> None:
    trainer = prepared.trainer
    # Gathered before anything can go wrong on the first process alone: the others would wait for it for ever.
    tensors = trainer.parallel.gather(collect_tensors(trainer.model, trainer.optimizer, trainer.device))
    if journals is None:
        return
    journals.sync()  # a checkpoint of step 200 with lines up to 190 would lose ten for good
    facts = {
        "loader": {**prepared.loader.state_dict(), "position": record.step},
        "guard": trainer.guard.state_dict(),
        **_facts_of(prepared),
    }
    root = prepared.out_dir / "checkpoints"
    watcher.saved(save_state(root, record.step, tensors=tensors, facts=facts, keep=prepared.recipe.run.keep))


def _restore(prepared: Prepared) -> None:
    """Go on from the newest whole checkpoint, if there is one and it is of this run."""
    trainer = prepared.trainer
    saved = None
    if _is_first():
        with naming_unsaved(prepared.out_dir):
            saved = load_newest(prepared.out_dir / "checkpoints")
    if saved is not None:
        refuse_another_run(saved.folder, saved.facts, _facts_of(prepared))
    facts = share_object(None if saved is None else saved.facts)
    if facts is None:
        return
    tensors = trainer.parallel.spread(None if saved is None else saved.tensors)
    restore_tensors(tensors, trainer.model, trainer.optimizer, trainer.device)
    trainer.guard.load_state_dict(facts["guard"])
    prepared.loader.load_state_dict(facts["loader"])


def _facts_of(prepared: Prepared) -> dict[str, Any]:
    """What a checkpoint says of its run, and a continuation must agree with."""
    return {
        "recipe": prepared.recipe.model_dump(mode="json"),
        "dtype": str(prepared.dtype).removeprefix("torch."),
        "fingerprints": prepared.notes["fingerprints"],
        "versions": _versions(),
    }


def _finish(prepared: Prepared) -> None:
    """The model, the record that the run is done; the checkpoints have done their service."""
    if not prepared.trainer.parallel.make_whole():
        return
    out_dir = prepared.out_dir
    with naming_unsaved(out_dir):
        save_run(prepared.recipe, prepared.loaded, out_dir, summaries=prepared.summaries, versions=_versions())
        _describe(prepared, state="finished")
    shutil.rmtree(out_dir / "checkpoints", ignore_errors=True)
    shutil.rmtree(out_dir / FEATURES, ignore_errors=True)


def _sample(prepared: Prepared, step: int, watcher: Watcher, journal: Journal) -> None:
    """Ask the model as it stands, when the recipe wants it (`sample_every`, `sample_images`)."""
    run, loaded = prepared.recipe.run, prepared.loaded
    if not run.sample_every or not run.sample_images:
        return
    if (reason := why_not_now(loaded.model)) is not None:
        _log.warning("%s", reason)
        return
    images = [Path(name) for name in run.sample_images]
    samples = answer_samples(
        loaded.model,
        loaded.processor,
        step=step,
        images=images,
        questions=run.sample_questions,
        compute=prepared.dtype,
    )
    for sample in samples:
        watcher.sampled(sample)
        journal.write({"step": step, "image": str(sample.image), "question": sample.question, "answer": sample.answer})
    title = prepared.recipe.description or prepared.out_dir.name
    write_sample_page(prepared.out_dir / "samples.html", read_lines(journal.path), title=title)


# --- the run's folder --------------------------------------------------------------------------------------------


def _finished(out_dir: Path, recipe: Recipe) -> RunResult | None:
    """The result of a run that is done already, None when it is not."""
    path = out_dir / "run.json"
    if not path.is_file():
        return None
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        state, before, steps = run["state"], run["recipe"], int(run["total_steps"])
    except (ValueError, TypeError, KeyError):
        return None
    if state != "finished" or not isinstance(before, dict):
        return None
    different = differences(before, recipe.model_dump(mode="json"))
    if different:
        raise TrainingError(
            f"{out_dir} holds a finished run of another recipe: {'; '.join(different[:3])}; choose another run.out, or "
            "start anew with --restart"
        )
    shutil.rmtree(out_dir / "checkpoints", ignore_errors=True)  # where a kill interrupted the last act
    lines = read_metrics(out_dir / "metrics.jsonl")
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
        "processes": prepared.trainer.parallel.processes,
        "parallel": prepared.trainer.parallel.mode,
        "dtype": str(prepared.dtype).removeprefix("torch."),
        "data": prepared.conversations.fingerprint,
        "bad_samples": len(prepared.loader.bad_samples),
        "parts": [vars(summary) for summary in prepared.summaries],
        "recipe": recipe.model_dump(mode="json"),
    }
    write_durably(prepared.out_dir / "recipe.yaml", recipe.as_yaml())
    write_durably(prepared.out_dir / "run.json", json.dumps(run, indent=1))


def _versions() -> dict[str, str]:
    import transformers

    return {
        "llava": llava.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }

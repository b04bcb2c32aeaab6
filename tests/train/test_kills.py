"""Killed anywhere, or with a disk that fails anywhere, and started again: the same run, to the bit.

The default tier kills 200 times; `-m slow` another twelve hundred. What a real power cut adds (lost pages that were not
flushed) cannot be had here; that everything is flushed before it is renamed is held by tests/train/test_state.py.
"""

import errno
import hashlib
import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llava.train.journal import read_lines
from tests.train.kill_server import KillServer, write_world

KINDS = {
    "stage1": ["data.template=plain"],
    "stage2": ["tune.language_model=full", "run.micro_batch_tokens=96"],  # several micro-batches a step
    "lora": ["tune.language_model=lora", "tune.language_model_lora.rank=4"],
    "faulty": ["data.files=[WORLD/faulty.json]", "data.max_bad_share=0.2"],  # a picture is not there
}
SHORT = ["optim.epochs=0.5", "run.save_every=1", "run.keep=1"]  # three steps, each saved
EVERY = [3, pytest.param(1, marks=pytest.mark.slow)]  # slow: a minute for each of two hundred calls
CASES = [(kind, workers) for kind in KINDS for workers in (0, 2) if kind != "faulty" or workers]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


@pytest.fixture(scope="module")
def server(world: Path) -> Iterator[KillServer]:
    server = KillServer(world)
    yield server
    logging.getLogger(__name__).info("%d kills", server.kills)
    server.close()


@pytest.fixture(scope="module")
def unkilled(server: KillServer, world: Path) -> Callable[[str], tuple[object, float]]:
    """What a run of a kind ends as when nothing happens to it, and the seconds that it takes."""
    known: dict[str, tuple[object, float]] = {}

    def result(kind: str) -> tuple[object, float]:
        if kind not in known:
            out = world / f"whole-{kind}"
            outcome = server.run(f"run.out={out}", *changes_of(kind, world))
            assert outcome.status == "finished", outcome
            known[kind] = (ending(out), outcome.seconds)
        return known[kind]

    return result


def changes_of(kind: str, world: Path) -> list[str]:
    """The recipe's changes for a kind of run."""
    return [change.replace("WORLD", str(world)) for change in KINDS[kind]]


def ending(out: Path, *, steps: int = 9) -> tuple[list[tuple[int, str, str]], dict[str, str]]:
    """(step, loss, gradient norm) of every line of metrics.jsonl, and the digests of the weights and of the list of bad
    samples. Nothing else may be left behind."""
    lines = [
        (line["step"], float(line["loss"]).hex(), float(line["grad_norm"]).hex())
        for line in read_lines(out / "metrics.jsonl")
    ]
    assert [step for step, _, _ in lines] == list(range(1, steps + 1))
    assert not (out / "checkpoints").exists()
    assert not list(out.glob(".*"))
    assert not list(out.parent.glob(f".{out.name}.*"))
    files = [*out.glob("*.safetensors"), *out.glob("*.bin"), *out.glob("bad_*.jsonl")]
    weights = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert weights
    return lines, weights


def kill_and_go_on(
    server: KillServer, world: Path, kind: str, workers: int, *, kills: int, seed: int, whole: tuple[object, float]
) -> int:
    """Kill runs `kills` times, half of them while they save, and hold each to the end of the unkilled one. Returns how
    many kills met a run (the others came when it had finished)."""
    chance = random.Random(f"{seed} {kind} {workers}")
    expected, seconds = whole
    assert kind != "faulty" or "bad_samples.jsonl" in str(expected)
    met = 0
    while met < kills:
        out = world / f"killed-{kind}-{workers}-{seed}"
        changes = [f"run.out={out}", f"data.workers={workers}", *changes_of(kind, world)]
        finished = False
        for _ in range(min(chance.randint(3, 9), kills - met)):
            if chance.random() < 0.5:
                order = {"region": "save", "kill_at": chance.randint(1, 24), "kill_before": chance.random() < 0.5}
            else:
                order = {"kill_after": chance.uniform(0, seconds)}
            outcome = server.run(*changes, **order)
            assert outcome.status in ("killed", "finished"), outcome
            met += outcome.status == "killed"
            finished = outcome.status == "finished"
            if finished:
                break
        if not finished:
            outcome = server.run(*changes)
            assert outcome.status == "finished", outcome
        assert ending(out) == expected
        shutil.rmtree(out)
    return met


@pytest.mark.parametrize(("kind", "workers"), CASES)
def test_a_run_that_is_killed_again_and_again_ends_as_the_one_that_was_not(
    server: KillServer, world: Path, unkilled: Callable[[str], tuple[object, float]], kind: str, workers: int
) -> None:
    assert kill_and_go_on(server, world, kind, workers, kills=20, seed=0, whole=unkilled(kind)) >= 20


@pytest.mark.parametrize("kind", ["stage2", "lora"])
@pytest.mark.parametrize("every", EVERY)
def test_a_kill_in_the_last_act_leaves_the_steps_done(
    server: KillServer, world: Path, unkilled: Callable[[str], tuple[object, float]], kind: str, every: int
) -> None:
    """While the model is written, its files take their places, and the checkpoints go."""
    expected, _ = unkilled(kind)
    trained, out = world / f"trained-{kind}-{every}", world / f"last-{kind}-{every}"
    assert server.run(f"run.out={trained}", *changes_of(kind, world), region="finish", kill_at=1).status == "killed"
    shutil.copytree(trained, out)
    calls = server.run(f"run.out={out}", *changes_of(kind, world), region="finish").calls
    for number, call in enumerate(range(1, calls + 1, every)):
        shutil.rmtree(out)
        shutil.copytree(trained, out)
        order = {"region": "finish", "kill_at": call, "kill_before": number % 2 == 0}
        outcome = server.run(f"run.out={out}", *changes_of(kind, world), **order)
        assert outcome.status == "killed", (call, outcome)
        again = server.run(f"run.out={out}", *changes_of(kind, world))
        assert (again.status, again.first_step) == ("finished", 9), (call, again)
        assert ending(out) == expected, call


@pytest.fixture(scope="module")
def begun(server: KillServer, world: Path) -> tuple[Path, object, int]:
    """A short run that was killed after its first save; how the whole run ends; how many calls the rest of it makes."""
    whole = server.run(f"run.out={world}/short", *SHORT, region="save")
    begun = world / "begun"
    killed = server.run(f"run.out={begun}", *SHORT, region="save", kill_at=whole.calls // 2)
    assert (whole.status, killed.status) == ("finished", "killed")
    rest = server.run(f"run.out={shutil.copytree(begun, world / 'rest')}", *SHORT)
    assert rest.first_step in (1, 2), "there is something to go on from, and something to do"
    return begun, ending(world / "short", steps=3), rest.calls


@pytest.mark.parametrize("every", EVERY)
def test_a_kill_at_any_call_that_changes_the_disk(
    server: KillServer, world: Path, begun: tuple[Path, object, int], every: int
) -> None:
    half, expected, calls = begun
    for call in range(1, calls + 1, every):
        out = shutil.copytree(half, world / f"killed-{call}")
        # Before the call is as after the one before it, but for a file that was just opened, and so emptied.
        outcome = server.run(f"run.out={out}", *SHORT, kill_at=call, kill_before=False)
        assert outcome.status == "killed", (call, outcome)
        outcome = server.run(f"run.out={out}", *SHORT)
        assert outcome.status == "finished", (call, outcome)
        assert ending(out, steps=3) == expected, call
        shutil.rmtree(out)


@pytest.mark.parametrize("every", EVERY)
def test_a_disk_that_fails_at_any_call_loses_nothing(
    server: KillServer, world: Path, begun: tuple[Path, object, int], every: int
) -> None:
    half, expected, calls = begun
    for number, call in enumerate(range(1, calls + 1, every)):
        out = shutil.copytree(half, world / f"failed-{call}")
        reason = (errno.ENOSPC, errno.EIO, errno.EROFS)[number % 3]
        lasting = (1, 20, 10**9)[number // 3 % 3]
        outcome = server.run(f"run.out={out}", *SHORT, fail_at=call, fail_for=lasting, fail_with=reason)
        assert outcome.status in ("finished", "refused"), (call, outcome)
        if outcome.status == "refused":
            assert os.strerror(reason) in outcome.message, (call, outcome)
            assert "\n" not in outcome.message, (call, outcome)
            outcome = server.run(f"run.out={out}", *SHORT)
            assert outcome.status == "finished", (call, outcome)
            assert outcome.first_step >= 1, "the checkpoint that was there is not lost"
        # What could not be removed then goes when the command is given once more.
        assert server.run(f"run.out={out}", *SHORT).status == "finished"
        assert ending(out, steps=3) == expected, call
        shutil.rmtree(out)


def test_a_checkpoint_that_cannot_be_written_is_warned_of_and_tried_again_at_the_next_save(
    server: KillServer, world: Path, begun: tuple[Path, object, int]
) -> None:
    _, expected, _ = begun
    calls = server.run(f"run.out={world}/counted", *SHORT, region="save").calls
    for call in range(1, calls + 1, 4):
        out = world / f"unsaved-{call}"
        outcome = server.run(f"run.out={out}", *SHORT, region="save", fail_at=call)
        assert outcome.status == "finished", (call, outcome)
        assert call > 1 or "step-00000001: the checkpoint could not be written (No space left on device)" in outcome.log
        assert ending(out, steps=3) == expected


def test_a_file_system_that_takes_no_large_files_ends_the_run_only_when_its_model_cannot_be_saved(
    server: KillServer, world: Path, begun: tuple[Path, object, int]
) -> None:
    """RLIMIT_FSIZE makes the kernel refuse the bytes behind a limit, in the middle of a write, as a quota does."""
    _, expected, _ = begun
    model = (world / "short" / "model.safetensors").stat().st_size
    for limit in (0, 5_000, 50_000, model - 1):
        out = world / f"limited-{limit}"
        outcome = server.run(f"run.out={out}", *SHORT, file_bytes=limit)
        assert outcome.status == "refused", outcome
        assert "File too large" in outcome.message
        assert not list((out / "checkpoints").glob(".*")), "what was written in part is gone"
        again = server.run(f"run.out={out}", *SHORT)
        assert (again.status, again.first_step) == ("finished", 3 if limit > 10_000 else 0), "a checkpoint has 40 kB"
        assert ending(out, steps=3) == expected


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "cut": lambda data: data[: len(data) // 2],
    "a bit flipped": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]
    ),
    "zeros": lambda data: bytes(len(data)),
    "missing": lambda data: None,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_run_ends_the_same(
    server: KillServer, world: Path, begun: tuple[Path, object, int], name: str, damage: str
) -> None:
    _, expected, _ = begun
    two = world / "two"
    changes = [*SHORT, "run.keep=2"]
    if not two.exists():
        calls = server.run(f"run.out={world}/three", *changes, region="save").calls
        assert server.run(f"run.out={two}", *changes, region="save", kill_at=calls - 5).status == "killed"
    out = shutil.copytree(two, world / "damaged")
    newest, before = sorted((out / "checkpoints").glob("step-*"), reverse=True)[:2]
    changed = DAMAGES[damage]((newest / name).read_bytes())
    if changed is None:
        (newest / name).unlink()
    else:
        (newest / name).write_bytes(changed)
    outcome = server.run(f"run.out={out}", *changes)
    assert outcome.status == "finished", outcome
    assert outcome.first_step == int(before.name.removeprefix("step-"))
    assert f"set aside as damaged-{newest.name}" in outcome.log
    assert ending(out, steps=3) == expected
    shutil.rmtree(out)


@pytest.mark.slow  # about four minutes: a thousand kills
@pytest.mark.parametrize(("kind", "workers"), CASES)
@pytest.mark.parametrize("seed", range(1, 6))
def test_a_thousand_kills(
    server: KillServer,
    world: Path,
    unkilled: Callable[[str], tuple[object, float]],
    kind: str,
    workers: int,
    seed: int,
) -> None:
    assert kill_and_go_on(server, world, kind, workers, kills=34, seed=seed, whole=unkilled(kind)) >= 34

"""Killed anywhere, or with a disk that fails anywhere, and started again: the same run, to the bit.

The default tier kills 200 times; `-m slow` another thousand. What a real power cut adds (lost pages that were not
flushed) cannot be had here; that everything is flushed before it is renamed is held by tests/train/test_state.py.
"""

import hashlib
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llava.train.journal import read_lines
from tests.train.kill_server import KillServer, write_world

KINDS = {
    "stage1": ["data.template=plain"],
    "stage2": ["tune.language_model=full"],
    "lora": ["tune.language_model=lora", "tune.language_model_lora.rank=4"],
}
CASES = [(kind, workers) for kind in KINDS for workers in (0, 2)]
STEPS = 9


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


@pytest.fixture(scope="module")
def server(world: Path) -> Iterator[KillServer]:
    server = KillServer(world)
    yield server
    server.close()


@pytest.fixture(scope="module")
def unkilled(server: KillServer, world: Path) -> Callable[[str], tuple[object, float]]:
    """What a run of a kind ends as when nothing happens to it, and the seconds that it takes."""
    known: dict[str, tuple[object, float]] = {}

    def result(kind: str) -> tuple[object, float]:
        if kind not in known:
            out = world / f"whole-{kind}"
            outcome = server.run(f"run.out={out}", *KINDS[kind])
            assert outcome.status == "finished", outcome
            known[kind] = (ending(out), outcome.seconds)
        return known[kind]

    return result


def ending(out: Path) -> tuple[list[tuple[int, str, str]], dict[str, str]]:
    """(step, loss, gradient norm) of every line of metrics.jsonl, and the digests of the weights. Nothing else may be
    left behind."""
    lines = [
        (line["step"], float(line["loss"]).hex(), float(line["grad_norm"]).hex())
        for line in read_lines(out / "metrics.jsonl")
    ]
    assert [step for step, _, _ in lines] == list(range(1, STEPS + 1))
    assert not (out / "checkpoints").exists()
    assert not list(out.glob(".*"))
    assert not list(out.parent.glob(f".{out.name}.*"))
    weights = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("*.safetensors")}
    assert weights
    return lines, weights


def kill_and_go_on(
    server: KillServer, world: Path, kind: str, workers: int, *, kills: int, seed: int, whole: tuple[object, float]
) -> int:
    """Kill runs `kills` times, half of them while they save, and hold each to the end of the unkilled one. Returns how
    many kills met a run (the others came when it had finished)."""
    chance = random.Random(f"{seed} {kind} {workers}")
    expected, seconds = whole
    met = 0
    while met < kills:
        out = world / f"killed-{kind}-{workers}-{seed}"
        changes = [f"run.out={out}", f"data.workers={workers}", *KINDS[kind]]
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
    assert kill_and_go_on(server, world, kind, workers, kills=34, seed=0, whole=unkilled(kind)) >= 34


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

"""What two processes know of each other's bad samples: an importable function for ProcessPair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava.data.bad_samples import BadSamples
from llava.data.loader import Loader, StepPlan
from llava.distributed import process_count, process_number
from llava.errors import DataError
from tests.data.test_bad_samples import LAYOUT, encode


def read_all(argument: tuple[Path, float]) -> dict[str, Any]:
    """Hand out every step of this process's share; every fifth conversation is bad."""
    folder, max_share = argument
    path = folder / "bad.jsonl" if process_number() == 0 else None
    ledger = BadSamples(max_share=max_share, conversations=200, path=path)
    plan = StepPlan([(n,) for n in range(200)], 8, 3)
    loader = Loader(
        plan, encode, layout=LAYOUT, workers=1, rank=process_number(), world_size=process_count(), bad_samples=ledger
    )
    problem = ""
    try:
        for _ in loader:
            pass
    except DataError as error:
        problem = str(error)
    return {"position": loader.position, "problem": problem, "state": loader.state_dict()["bad_samples"]}

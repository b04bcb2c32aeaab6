"""Write drawn scenes to disk as an ordinary LLaVA data set: PNG files and conversation JSON.

    out_dir/images/000/000012.png
    out_dir/conversations.json    {id, image, conversations: [human, gpt]}, about twelve records a picture
    out_dir/captions.json         the same with a short and a detailed caption a picture: stage 1
    out_dir/scenes.json           how many, from which seed: a data set that is whole is not drawn again

A record asks one question of its picture (a few ask a second one); records of one picture follow each other, so that
the loader can put them into one row. Everything is a function of the seed.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from PIL import Image

from llava.data.scene_turns import KINDS, Turn, ask, ask_many
from llava.data.scenes import PICTURE_SIDE, Scene, draw_scene, render

TURNS_PER_PICTURE = 12
# Answers made of many tokens would own the loss; counting a kind and naming what is in a box are learnt last (with
# equal weights a whole run ended at .86 and .77 on them, and at .98 and more on those with less than 1 here).
TURN_WEIGHTS = dict.fromkeys(KINDS, 1.0) | {
    "existence": 0.9, "colour": 0.7, "shape": 0.7, "size": 0.7, "count": 2.0, "count_all": 0.8, "region": 0.8,
    "relation": 0.8, "caption": 0.7, "detail": 0.5, "refer": 2.2,
}  # fmt: skip
_SECOND_TURN_SHARE = 0.08
_SHARD = 500


@dataclass(frozen=True)
class SceneFiles:
    """Where a written data set lies: picture folder, conversations (stage 2) and captions (stage 1)."""

    image_root: Path
    conversations: Path
    captions: Path
    num_scenes: int


def draw_numbered_scene(seed: int, number: int) -> Scene:
    """Scene `number` of a data set: pictures can be drawn again, or in any order, without the others."""
    return draw_scene(random.Random(f"scene-{seed}-{number}"))


def write_scenes(
    out_dir: Path,
    num_scenes: int,
    seed: int,
    *,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SceneFiles:
    """Draw `num_scenes` scenes into out_dir and return where they lie; one that is already whole is returned as it is.

    progress(done, total) is called after every few hundred pictures. The files do not depend on `processes`.
    """
    files = SceneFiles(out_dir / "images", out_dir / "conversations.json", out_dir / "captions.json", num_scenes)
    facts = {"num_scenes": num_scenes, "seed": seed, "turns_per_picture": TURNS_PER_PICTURE, "format": 1}
    marker = out_dir / "scenes.json"
    if marker.exists() and json.loads(marker.read_text()) == facts:
        if progress is not None:
            progress(num_scenes, num_scenes)
        return files
    marker.unlink(missing_ok=True)
    starts = range(0, num_scenes, _SHARD)
    for start in starts:
        (files.image_root / f"{start // 1000:03d}").mkdir(parents=True, exist_ok=True)
    work = partial(_write_shard, files.image_root, num_scenes=num_scenes, seed=seed)
    workers = min(processes or os.cpu_count() or 1, len(starts))
    records: list[str] = []
    captions: list[str] = []
    # spawned, not forked: the caller may hold torch's threads; with one worker, no process at all
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers > 1 else None
    try:
        for number, (turns, told) in enumerate(pool.map(work, starts) if pool is not None else map(work, starts), 1):
            records.append(turns)
            captions.append(told)
            if progress is not None:
                progress(min(number * _SHARD, num_scenes), num_scenes)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    for path, parts in ((files.conversations, records), (files.captions, captions)):
        fresh = path.with_suffix(".new")
        fresh.write_text("[\n" + ",\n".join(part for part in parts if part) + "\n]\n", encoding="utf-8")
        fresh.replace(path)
    marker.write_text(json.dumps(facts) + "\n")
    return files


def write_records(scene: Scene, number: int, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A scene's conversation records and its caption records."""
    rng = random.Random(f"turns-{seed}-{number}")
    turns = ask_many(scene, TURNS_PER_PICTURE, rng, weights=TURN_WEIGHTS)
    pairs = [(turn, _maybe_second(scene, rng)) for turn in turns]
    records = [_record(f"{number:06d}-{place}", number, pair) for place, pair in enumerate(pairs)]
    told = [ask(scene, kind, rng) for kind in ("caption", "detail")]
    captions = [_record(f"{number:06d}-{turn.kind}", number, (turn, None)) for turn in told if turn is not None]
    return records, captions


def picture_name(number: int) -> str:
    """The picture's path under the image folder."""
    return f"{number // 1000:03d}/{number:06d}.png"


def _write_shard(image_root: Path, start: int, *, num_scenes: int, seed: int) -> tuple[str, str]:
    records: list[str] = []
    captions: list[str] = []
    for number in range(start, min(start + _SHARD, num_scenes)):
        scene = draw_numbered_scene(seed, number)
        pixels = render(scene, noise_seed=(seed << 24) + number, side=PICTURE_SIDE)
        Image.fromarray(pixels).save(image_root / picture_name(number), compress_level=1)
        turns, told = write_records(scene, number, seed)
        records.extend(json.dumps(record) for record in turns)
        captions.extend(json.dumps(record) for record in told)
    return ",\n".join(records), ",\n".join(captions)


def _maybe_second(scene: Scene, rng: random.Random) -> Turn | None:
    if rng.random() >= _SECOND_TURN_SHARE:
        return None
    return ask(scene, rng.choice(KINDS), rng)


def _record(name: str, number: int, turns: tuple[Turn, Turn | None]) -> dict[str, Any]:
    first, second = turns
    said = [("human", "<image>\n" + first.question), ("gpt", first.answer)]
    if second is not None:
        said += [("human", second.question), ("gpt", second.answer)]
    return {
        "id": name,
        "image": picture_name(number),
        "conversations": [{"from": who, "value": value} for who, value in said],
    }

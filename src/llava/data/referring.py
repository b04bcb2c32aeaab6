"""RefCOCO, RefCOCO+ and RefCOCOg as conversations, XTuner's way: words to a box, and a box to words.

    [refer] give me the location of the left cat   ->  {<6><6><32><39>}
    [identify] what is it in {<6><6><32><39>}      ->  the left cat

A box is its corners x1, y1, x2, y2 in hundredths of the picture's width and height, rounded down, 0 to 100. Each phrase
is written in all seven wordings of a task, so a phrase gives 7 records, or 14 for both tasks. Read are the authors'
folders (`refs(unc).p` beside `instances.json`), XTuner's train.json and MiniGPT-4's evaluation files.
"""

from __future__ import annotations

import io
import json
import pickle
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import DataError, UsageError

REFER = (
    "[refer] {}",
    "[refer] give me the location of {}",
    "[refer] where is {} ?",
    "[refer] from this image, tell me the location of {}",
    "[refer] the location of {} is",
    "[refer] could you tell me the location for {} ?",
    "[refer] where can I locate the {} ?",
)
IDENTIFY = (
    "[identify] {}",
    "[identify] what object is in this location {}",
    "[identify] identify the object present at this location {}",
    "[identify] what is it in {}",
    "[identify] describe this object in {}",
    "[identify] this {} is",
    "[identify] the object in {} is",
)
_TASKS = {"refer": (REFER, False), "identify": (IDENTIFY, True)}


@dataclass(frozen=True)
class Phrase:
    """Words for a box of a picture; box: corners in hundredths."""

    id: str
    image: str
    words: str
    box: tuple[int, int, int, int]
    origin: str


def read_referring(
    path: Path,
    *,
    task: str = "both",
    wordings: str = "7",
    split: str = "train",
    refs: str = "",
    limit: str = "",
    seed: str = "0",
) -> Iterator[tuple[str, Any]]:
    """(origin, LLaVA record) of each phrase in each wording.

    task: refer, identify or both. wordings: how many of the seven, the first ones. split, refs: of an authors' folder,
    and which of its refs files ("unc", "umd", "google") where there are several. limit: at most so many records,
    drawn at random from `seed` and left in their order (XTuner mixes 70,000 of each task into its stage 2).
    """
    tasks = ["refer", "identify"] if task == "both" else [task]
    if not set(tasks) <= set(_TASKS):
        raise UsageError(f"task={task}: one of refer, identify, both")
    if wordings not in map(str, range(1, 8)):
        raise UsageError(f"wordings={wordings}: a number from 1 to 7")
    phrases = list(_read_refs(path, split, refs) if path.is_dir() else _read_json(path))
    records = _write(phrases, tasks, int(wordings))
    if not limit:
        yield from records
        return
    if not limit.isdigit() or not seed.isdigit():
        raise UsageError(f"limit={limit} seed={seed}: whole numbers")
    total = len(phrases) * len(tasks) * int(wordings)
    chosen = set(random.Random(int(seed)).sample(range(total), min(int(limit), total)))
    yield from (record for number, record in enumerate(records) if number in chosen)


def _write(phrases: Sequence[Phrase], tasks: Sequence[str], wordings: int) -> Iterator[tuple[str, Any]]:
    for phrase in phrases:
        box = "{" + "".join(f"<{side}>" for side in phrase.box) + "}"
        for name in tasks:
            texts, from_box = _TASKS[name]
            for text in texts[:wordings]:
                asked = text.format(box if from_box else phrase.words) + "\n<image>"
                told = phrase.words if from_box else box
                turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": told}]
                yield phrase.origin, {"id": phrase.id, "image": phrase.image, "conversations": turns}


def to_hundredths(box: list[float], *, width: float, height: float) -> tuple[int, int, int, int]:
    """Corners in hundredths, rounded down, from [x, y, width, height] in pixels.

    >>> to_hundredths([40, 30, 170, 160], width=640, height=480)
    (6, 6, 32, 39)
    """
    x, y, across, down = box
    # 100 * x / width and not x / width * 100, which makes 28 of 29 of 100 pixels.
    sides = (100 * x / width, 100 * y / height, 100 * (x + across) / width, 100 * (y + down) / height)
    first, second, third, fourth = (min(100, max(0, int(side))) for side in sides)
    return first, second, third, fourth


def _read_json(path: Path) -> Iterator[Phrase]:
    """XTuner's records {id, image, sents, bbox, height, width}, or MiniGPT-4's {img_id, sents, bbox, height, width}.

    Without height and width a box is in hundredths already.
    """
    records = _load(path)
    if not isinstance(records, list):
        raise DataError(f"{path}: must hold a list of records with sents and bbox")
    for number, record in enumerate(records):
        origin = f"{path} (record {number})"
        if not isinstance(record, Mapping) or not isinstance(record.get("sents"), (str, list)):
            raise DataError(f"{origin}: no 'sents'; a record is {{image or img_id, sents, bbox, height, width}}")
        box = _numbers(record.get("bbox"), origin)
        if "height" in record and "width" in record:
            corners = to_hundredths(box, width=float(record["width"]), height=float(record["height"]))
        else:
            corners = (int(box[0]), int(box[1]), int(box[2]), int(box[3]))
        image = record.get("image")
        if not isinstance(image, str):
            image = f"{_image_number(record.get('img_id'), origin)}.jpg"
        sents = record["sents"]
        for words in [sents] if isinstance(sents, str) else sents:
            identity = record.get("id")
            yield Phrase(
                f"{Path(image).stem}-{words}" if identity is None else str(identity), image, words, corners, origin
            )


def _read_refs(folder: Path, split: str, refs: str) -> Iterator[Phrase]:
    """The authors' folder. A phrase that a picture has twice is written once, as XTuner does."""
    files = sorted(folder.glob(f"refs({refs or '*'}).p"))
    if len(files) != 1:
        found = ", ".join(sorted(file.name for file in folder.glob("refs(*).p"))) or "none"
        raise UsageError(f"{folder}: found {found}; say which of the refs files with refs=NAME (unc, umd, google)")
    (file,) = files
    instances = _load(folder / "instances.json")
    pictures = {picture["id"]: picture for picture in instances["images"]}
    boxes = {annotation["id"]: annotation["bbox"] for annotation in instances["annotations"]}
    author = file.name.removeprefix("refs(").removesuffix(").p")
    seen: set[str] = set()
    found_split = False
    for reference in _load_refs(file):
        origin = f"{file}: ref {reference.get('ref_id')}"
        if reference.get("split") != split and not (split == "test" and "test" in str(reference.get("split"))):
            continue
        found_split = True
        picture = pictures.get(reference["image_id"])
        box = boxes.get(reference["ann_id"])
        if picture is None or box is None:
            raise DataError(f"{origin}: its picture or its box is not in {folder / 'instances.json'}")
        corners = to_hundredths(_numbers(box, origin), width=picture["width"], height=picture["height"])
        number = f"{reference['image_id']:0>12}"
        for sentence in reference["sentences"]:
            words = sentence.get("raw", sentence.get("sent"))
            identity = f"{folder.name}-{author}-{number}-{'_'.join(words.split(' '))}"
            if identity not in seen:
                seen.add(identity)
                yield Phrase(identity, f"{number}.jpg", words, corners, origin)
    if not found_split:
        raise UsageError(f"split={split}: {file} has no phrase of it (train, val, testA, testB, test)")


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, texts, lists and dicts; a pickle that names a class or function is refused, not run."""

    def find_class(self, module: str, name: str) -> Any:
        raise DataError(f"the pickle names {module}.{name}; only plain data is read")


def _load_refs(file: Path) -> list[dict[str, Any]]:
    try:
        # Written by Python 2, so its texts are bytes.
        found = _PlainUnpickler(io.BytesIO(file.read_bytes()), encoding="utf-8", errors="replace").load()
    except DataError as error:
        raise DataError(f"{file}: {error}") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{file}: not a refs file ({error})") from error
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise DataError(f"{file}: must hold a list of references")
    return found


def _image_number(img_id: object, origin: str) -> str:
    """MiniGPT-4's img_id ends in the picture's number and the phrase's: COCO_train2014_000000580957_0."""
    parts = img_id.split("_") if isinstance(img_id, str) else []
    if len(parts) < 2:
        raise DataError(f"{origin}: neither 'image' nor an 'img_id' such as COCO_train2014_000000580957_0")
    return parts[-2]


def _numbers(box: object, origin: str) -> list[float]:
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(side, (int, float)) for side in box):
        raise DataError(f"{origin}: bbox must be four numbers, not {box!r}")
    return box


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error

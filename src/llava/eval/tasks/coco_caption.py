"""COCO Caption on Karpathy's validation split, as mmpretrain asks it and pycocoevalcap scores it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from llava.errors import DataError
from llava.eval.matching import check_rows, first_there
from llava.eval.metrics import caption_tokens
from llava.eval.metrics.captions import bleu, cider, rouge_l
from llava.eval.reading import check_keys, match_answers, read_json, row_notes
from llava.eval.task import AnswerRow, Question, Score, TaskFacts, TaskFile

PROMPT = "Describe the image in detail."
_ROWS = 5000
_PICTURES = "coco_caption/coco_karpathy_val.json"
_CAPTIONS = "coco_caption/coco_karpathy_val_gt.json"
_NUMBER = re.compile(r"\d{12}")


class COCOCaption:
    """One question a picture; id: the picture's number."""

    name = "coco_caption"

    def describe(self) -> TaskFacts:
        source = "https://storage.googleapis.com/sfr-vision-language-research/datasets/"
        return TaskFacts(
            title="COCO Caption, Karpathy's validation split",
            files=[
                TaskFile(_PICTURES, "the pictures of the split", source + Path(_PICTURES).name, rows=_ROWS),
                TaskFile(_CAPTIONS, "their captions, in COCO's layout", source + Path(_CAPTIONS).name, rows=_ROWS),
                TaskFile("coco/val2014", "COCO val2014 pictures", "https://cocodataset.org"),
            ],
            prompt=PROMPT,
            decoding={"temperature": 0.0, "max_new_tokens": 50, "num_beams": 3, "length_penalty": -1.0},
            published_metric="CIDEr",
            published={},
            needs=("java (for METEOR and the official tokens), extra caption",),
            traps=(
                "mmpretrain squashes a picture to 336 x 336 (bicubic, no padding) and searches 3 beams.",
                "CIDEr is CIDEr-D; its weights come from the pictures that were answered: a part has other figures.",
                "An answer much longer than the references has a CIDEr of nearly 0, by the length penalty.",
                "The names of brackets (-lrb-) stay among the tokens, since the text is in small letters when cut.",
            ),
        )

    def read(self, root: Path, *, split: str | None) -> list[Question]:
        if split not in (None, "val"):
            raise DataError(f"{self.name}: no split {split!r}; there is val")
        references = self._references(root)
        path, what = first_there(root / _PICTURES, root / Path(_PICTURES).name), "Karpathy's list of image and caption"
        questions = []
        for index, row in enumerate(read_json(path, what=what)):
            check_keys(row, ("image",), origin=f"{path}: row {index}", what=what)
            number = _NUMBER.search(str(row["image"]))
            if number is None:
                raise DataError(f"{path}: row {index}: image {row['image']!r} holds no COCO picture's twelve digits")
            key = str(int(number[0]))
            if key not in references:
                raise DataError(f"{path}: row {index}: picture {key} has no captions in {root / _CAPTIONS}")
            meta = {"captions": references[key], "split": "val"}
            picture = first_there(root / "coco" / row["image"], root / row["image"])
            questions.append(Question(key, PROMPT, (picture,), meta, 50))
        check_rows(len(questions), _ROWS, path=path)
        return questions

    def _references(self, root: Path) -> dict[str, tuple[str, ...]]:
        path, what = (
            first_there(root / _CAPTIONS, root / Path(_CAPTIONS).name),
            "the captions in COCO's layout: annotations of image_id and caption",
        )
        content = read_json(path, what=what)
        check_keys(content, ("annotations",), origin=str(path), what=what)
        found: dict[str, tuple[str, ...]] = {}
        for index, row in enumerate(content["annotations"]):
            check_keys(row, ("image_id", "caption"), origin=f"{path}: annotation {index}", what=what)
            key = str(int(row["image_id"]))
            found[key] = (*found.get(key, ()), row["caption"])
        return found

    def score(self, questions: Sequence[Question], answers: Sequence[AnswerRow], *, strict: bool = False) -> Score:
        """With pycocoevalcap and Java its own tokens and METEOR; without, this package's tokens, and a note."""
        pairs = match_answers(questions, answers, task=self.name)
        texts = {question.id: [answer.text] for question, answer in pairs}
        captions = {question.id: list(question.meta["captions"]) for question, _ in pairs}
        official = caption_tokens.java_is_there()
        cut = caption_tokens.tokenize_with_java if official else _tokenize
        hypotheses = {key: found[0] for key, found in cut(texts).items()}
        references = cut(captions)
        figures = {f"Bleu_{n}": figure for n, figure in enumerate(bleu(hypotheses, references), start=1)}
        headline = {name: figure.corpus for name, figure in figures.items()}
        if official:
            headline["METEOR"] = caption_tokens.meteor(hypotheses, references)[0]
        headline["ROUGE_L"] = rouge_l(hypotheses, references).corpus
        per_picture = cider(hypotheses, references)
        headline["CIDEr"] = per_picture.corpus
        notes = row_notes(len(pairs), _ROWS)
        if not official:
            notes.append(
                "tokens cut by this package, which differ from the PTB tokenizer's on rare marks, and no METEOR: "
                "pip install 'llava[caption]' and a Java runtime give both"
            )
        if empty := sum(not text for text in hypotheses.values()):
            notes.append(f"{empty:,} answers hold no word once marks are dropped")
        rows = [{"picture": key, "CIDEr": figure} for key, figure in zip(hypotheses, per_picture.each, strict=True)]
        return Score(
            headline=headline,
            tables={"pictures": rows},
            notes=notes,
            printed="\n".join(f"{name}: {figure:.3f}" for name, figure in headline.items()),
        )

    def write_upload(self, questions: Sequence[Question], answers: Sequence[AnswerRow], path: Path) -> Path | None:
        return None


def _tokenize(captions: caption_tokens.Captions) -> dict[str, list[str]]:
    return {key: [caption_tokens.tokenize(text) for text in texts] for key, texts in captions.items()}

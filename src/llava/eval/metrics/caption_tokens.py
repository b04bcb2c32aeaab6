"""Captions cut into tokens as the caption benchmark does: by the Stanford PTB tokenizer, which needs Java.

`tokenize_with_java` runs pycocoevalcap's own. `tokenize` is written here, needs nothing, and cuts ordinary captions
the same; rare marks (telephone numbers, emoticons, markup) may be cut otherwise, so figures for a paper take Java's.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from llava.errors import MissingExtraError, UsageError

Captions = Mapping[str, Sequence[str]]

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
# What the benchmark throws away. The brackets' own names are among its seventeen in capitals only, and the text is in
# small letters by then, so that they stay.
_DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_QUOTES = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "…": "...", "–": "--", "—": "--"})
_ABBREVIATIONS = "mr|mrs|ms|dr|st|vs|jr|sr|prof|rev|gen|sen|gov|capt|lt|col|ave|blvd|rd|etc|inc|co|corp|ltd"
_TOKEN = re.compile(
    rf"""
    https?://\S+ | www\.\S+
  | [\w.+-]+@[\w-]+(?:\.[\w-]+)+
  | (?:{_ABBREVIATIONS})\.(?=\s|$)
  | [^\W\d_]\.(?:[^\W\d_]\.)+
  | o'clock | 'n'
  | \d+[ ]\d+/\d+\b
  | \d+(?:[.,:/]\d+)*(?:[-\w]*\w)? | \.\d+
  | '(?:s|m|d|re|ve|ll|tis|twas|em|cause)\b
  | n't\b
  | (?:(?!n't\b)\w)+(?:[-/.&@](?:(?!n't\b)\w)+)*
  | n't | \.\.+ | --+ | `` | '' | ["'`] | \S
    """,
    re.VERBOSE,
)
_JOINED = {
    "cannot": "can not",
    "gonna": "gon na",
    "gotta": "got ta",
    "wanna": "wan na",
    "gimme": "gim me",
    "lemme": "lem me",
}


def tokenize(caption: str) -> str:
    """A caption's tokens between single spaces, in small letters, without the marks that the benchmark drops."""
    tokens = []
    for token in _TOKEN.findall(caption.replace("\n", " ").lower().translate(_QUOTES)):
        kept = _BRACKETS.get(token, _JOINED.get(token, token))
        if kept not in _DROPPED and kept != '"' and not re.fullmatch(r"\.\.+|--+", kept):
            # a mixed number (22 3/4) is one token, held together by a no-break space
            tokens.append(kept.replace(" ", "\xa0") if kept[0].isdigit() else kept)
    return " ".join(tokens)


def java_is_there() -> bool:
    """Whether pycocoevalcap and a `java` to run its jars are."""
    return find_spec("pycocoevalcap") is not None and shutil.which("java") is not None


def tokenize_with_java(captions: Captions) -> dict[str, list[str]]:
    """pycocoevalcap's own tokens. Raises MissingExtraError without the package, UsageError without Java."""
    _require_java()
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    cut = PTBTokenizer().tokenize({key: [{"caption": text} for text in texts] for key, texts in captions.items()})
    return {key: list(texts) for key, texts in cut.items()}


def meteor(answers: Mapping[str, str], references: Captions) -> tuple[float, list[float]]:
    """METEOR 1.5 over tokenised captions, for the corpus and for each picture, by its jar."""
    _require_java()
    from pycocoevalcap.meteor.meteor import Meteor

    corpus, each = Meteor().compute_score(
        {key: list(references[key]) for key in answers}, {key: [text] for key, text in answers.items()}
    )
    return float(corpus), [float(figure) for figure in each]


def _require_java() -> None:
    if find_spec("pycocoevalcap") is None:
        raise MissingExtraError("METEOR and the PTB tokenizer", "caption")
    if shutil.which("java") is None:
        raise UsageError("METEOR and the PTB tokenizer run on Java, and there is no `java` on the path; install a JRE")

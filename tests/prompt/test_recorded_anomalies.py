"""Every sample that the original was recorded to mask whole, or to stop at, is learnt from here, or refused by name."""

from collections import defaultdict
from typing import Any

import pytest

from llava.errors import PromptError
from llava.prompt.spans import tokenize
from llava.prompt.templates import TEMPLATES
from tests.prompt.prompt_recordings import (
    TEMPLATE_OF_VERSION,
    conversation_of,
    read,
    tokenizer_of,
    training_file,
    training_files,
)

ANOMALIES: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
for anomaly in read("h_text/anomalies.json"):
    ANOMALIES[anomaly["version"], anomaly["tokenizer"]].append(anomaly)


def sample(name: str, *, plain: bool) -> dict[str, Any]:
    """A recorded conversation by its name; the recordings of `plain` have their own."""
    for file in training_files():
        recorded = training_file(file)
        if (recorded["version"] == "plain") == plain and name in recorded["cases"]:
            case: dict[str, Any] = recorded["cases"][name]
            return case
    raise KeyError(name)


@pytest.mark.parametrize(("version", "tokenizer"), ANOMALIES)
def test_a_sample_that_the_original_loses_is_learnt_from(version: str, tokenizer: str) -> None:
    template = TEMPLATES[TEMPLATE_OF_VERSION.get(version, version)]
    for anomaly in ANOMALIES[version, tokenizer]:
        case = sample(anomaly["case"], plain=version == "plain")
        start_end = anomaly["mm_use_im_start_end"]
        conversation = conversation_of(case)
        if "AssertionError" in anomaly["what"]:
            with pytest.raises(PromptError, match="plain"):
                template.render(conversation, open_turn=False, start_end_tokens=start_end)
            continue
        segments = template.render(conversation, open_turn=False, start_end_tokens=start_end)
        supervised = tokenize(segments, tokenizer_of(tokenizer, version, start_end)).supervised
        answers = [turn["value"] for turn in case["conversations"] if turn["from"] == "gpt"]
        # An empty answer is learnt from where a template writes its end token, and is an open turn where not.
        assert any(supervised) == bool(any(answers) or not template.empty_is_open), anomaly

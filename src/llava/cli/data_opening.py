"""What `llava data` commands open before they look: conversation files, a model's processor, a recipe's limits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava.data.check_figures import CheckLimits
    from llava.data.records import ConversationFile
    from llava.data.sources import ConversationSet
    from llava.prompt.processor import Processor
    from llava.train.sections import ModelSection

_RAW_CHARACTERS = 4000


@dataclass(frozen=True)
class Opened:
    """Conversations, the processor that will read them (None: nothing is tokenised), and what a run would allow."""

    conversations: ConversationSet
    processor: Processor | None
    limits: CheckLimits
    model: str


def open_files(
    files: Sequence[str], *, images: Path | None, model: str | None, template: str | None, max_tokens: int | None
) -> Opened:
    """Conversation files by name. Raises UsageError for a folder that is not there."""
    from llava.data.check_figures import CheckLimits
    from llava.data.sources import ConversationSet, read_conversations
    from llava.errors import UsageError

    if images is not None and not images.is_dir():
        raise UsageError(f"--images {images}: no such folder")
    if template is not None and model is None:
        raise UsageError(f"--template {template}: only with --model, whose tokenizer it needs")
    if not files:
        raise UsageError("name a file to check, or a recipe with --recipe")
    conversations = ConversationSet([read_conversations(file, image_root=images) for file in files])
    processor = None if model is None else open_processor(model)
    if processor is not None and template is not None:
        processor = processor.with_template(template)
    limits = CheckLimits() if max_tokens is None else replace(CheckLimits(), max_tokens=max_tokens)
    return Opened(conversations, processor, limits, model or "")


def open_recipe(
    name: str, overrides: Sequence[str], *, model: str | None, template: str | None, max_tokens: int | None
) -> Opened:
    """All that a recipe reads, as its run would read it: every source, its model's processor, its limits.

    model: another one than the recipe's (one that is on this machine). Each conversation counts once, whatever its
    source's weight.
    """
    from llava.data.check_figures import CheckLimits
    from llava.data.mixture import open_sources
    from llava.train.feeding import list_sources
    from llava.train.recipe import load_recipe

    recipe = load_recipe(name, overrides)
    data = recipe.data
    conversations = open_sources(list_sources(recipe), allow_urls=data.allow_urls)
    processor = _processor_of(recipe.model) if model is None else open_processor(model)
    template = template or data.template
    if template is not None:
        processor = processor.with_template(template)
    limits = CheckLimits(
        max_tokens=max_tokens or data.max_tokens,
        too_long=data.too_long,
        max_bad_share=data.max_bad_share,
        row_tokens=data.row_tokens,
        group_by_picture=data.group_by_picture,
        conversations_per_tree=data.conversations_per_tree,
        batch_conversations=recipe.optim.batch_conversations,
    )
    return Opened(conversations, processor, limits, model or recipe.model.path or str(recipe.model.language_model))


def _processor_of(wanted: ModelSection) -> Processor:
    """The processor of the model that a recipe starts from; no tensor is read."""
    from llava.checkpoint.load import open_checkpoint, open_parts
    from llava.errors import UsageError

    if wanted.path is not None:
        processor = open_checkpoint(wanted.path, base=wanted.base, template=wanted.template).processor()
        if wanted.template is not None:
            processor = processor.with_template(wanted.template)
        if wanted.image_mode not in (None, processor.image_settings.mode):
            raise UsageError(
                f"model.image_mode={wanted.image_mode} changes the pictures of {wanted.path}; give --model with a "
                "folder that has it already (the run's own, after its first checkpoint)"
            )
        return processor
    assert wanted.language_model is not None and wanted.vision_tower is not None  # the recipe's validator saw to it
    choices: dict[str, Any] = {
        "template": wanted.template,
        "image_mode": wanted.image_mode,
        "image_grid_pinpoints": wanted.image_grid_pinpoints,
        "start_end_tokens": wanted.start_end_tokens,
        "vision_feature_layer": wanted.vision_feature_layer,
    }
    given = {key: value for key, value in choices.items() if value is not None}
    return open_parts(wanted.language_model, wanted.vision_tower, projector=wanted.projector, **given).processor()


def open_processor(model: str) -> Processor:
    """The processor of a model folder or hub id, of any layout; no tensor is read."""
    from llava.checkpoint.load import open_checkpoint

    return open_checkpoint(model).processor()


def find_record(file: ConversationFile, number: int, line: int | None) -> int:
    """The record's number, from itself or from a line. Raises UsageError when there is none."""
    from llava.data.record_view import find_line
    from llava.errors import UsageError

    if line is not None:
        number = find_line(file, line)
        if number < 0:
            raise UsageError(f"--line {line}: no record of {file.path} begins at or before it")
    if not 0 <= number < len(file):
        raise UsageError(f"record {number}: {file.path} has {len(file):,}, numbered from 0")
    return number


def raw_record(file: ConversationFile, number: int) -> str:
    """A record as it stands in its file, cut where it is long; for records that do not parse."""
    text = json.dumps(file.record(number), indent=1, ensure_ascii=False)
    return text if len(text) <= _RAW_CHARACTERS else f"{text[:_RAW_CHARACTERS]} ..."


def read_options(texts: Sequence[str]) -> dict[str, str]:
    """`key=value` arguments. Raises UsageError for anything else."""
    from llava.errors import UsageError

    options: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"{text!r}: an option of the reader is key=value, such as split=test")
        if key in options:
            raise UsageError(f"{text!r}: {key} is given twice")
        options[key] = value
    return options

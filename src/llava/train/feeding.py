"""What a recipe reads, and in which steps: its sources opened, mixed, grouped by picture, tokenised and laid out."""

from __future__ import annotations

import logging
from pathlib import Path

from llava.checkpoint.load import Loaded
from llava.data.bad_samples import BadSamples, refuse_unusable
from llava.data.encoding import GroupEncoder
from llava.data.loader import GlobalStep, Layout, Loader, StepPlan
from llava.data.mixture import Mixture, SourceSpec, open_sources
from llava.data.order import signed_lengths
from llava.data.sources import ConversationSet
from llava.data.token_cache import TokenCache, open_token_cache
from llava.distributed import is_main, process_count, process_number
from llava.model.tree_support import find_tree_support
from llava.prompt.processor import Processor
from llava.train.sections import Recipe

_log = logging.getLogger(__name__)

BAD_SAMPLES = "bad_samples.jsonl"


def open_conversations(recipe: Recipe) -> ConversationSet:
    """The recipe's conversations, all sources one after another.

    Raises DataError when a file is not there or not what it should be, and when more pictures are missing than
    `data.max_bad_share` forgives.
    """
    conversations = open_sources(list_sources(recipe), allow_urls=recipe.data.allow_urls)
    refuse_unusable(conversations, max_share=recipe.data.max_bad_share)
    return conversations


def list_sources(recipe: Recipe) -> list[SourceSpec]:
    """What the recipe reads: `data.files`, then `data.sources`."""
    data = recipe.data
    plain = [SourceSpec(name, images=data.images) for name in data.files]
    return plain + [
        SourceSpec(source.file, source.format, data.images if source.images is None else source.images, source.weight)
        for source in data.sources
    ]


def build_loader(recipe: Recipe, loaded: Loaded, conversations: ConversationSet, *, out_dir: Path) -> Loader:
    """The loader of a run: this process's share of each step. `out_dir` gets the list of bad samples."""
    data, optim = recipe.data, recipe.optim
    support = find_tree_support(loaded.model.language_model)
    shared = data.group_by_picture and support.trees
    limit = min(data.conversations_per_tree, optim.batch_conversations) if shared else 1
    weights = [source.weight for source in list_sources(recipe)]
    plan = StepPlan(
        Mixture(conversations, limit=limit, seed=recipe.run.seed, weights=weights),
        optim.batch_conversations,
        recipe.run.seed,
        epochs=optim.epochs,
        max_steps=optim.max_steps,
        order=data.order,
        lengths=_lengths_of(conversations) if data.order == "grouped_by_length" else (),
    )
    processor = loaded.processor if data.template is None else loaded.processor.with_template(data.template)
    cache = _open_cache(recipe, processor, conversations)
    encode = GroupEncoder(conversations, processor, max_tokens=data.max_tokens, too_long=data.too_long, cache=cache)
    pad = processor.tokenizer.pad_token_id
    # Attention by trees does not care where trees lie; a mask costs the square of a row; without either: no company.
    row_tokens = {"layout": recipe.run.micro_batch_tokens, "none": 1}.get(support.way, data.row_tokens)
    layout = Layout(
        tree_tokens=data.row_tokens,
        row_tokens=row_tokens,
        micro_batch_tokens=recipe.run.micro_batch_tokens,
        image_token_id=processor.image_token_id,
        pad_token_id=0 if pad is None else pad,  # masked out; any id in the vocabulary does
    )
    return Loader(
        plan,
        encode,
        layout=layout,
        workers=data.workers,
        rank=process_number(),
        world_size=process_count(),
        fingerprint=conversations.fingerprint,
        bad_samples=BadSamples(
            max_share=data.max_bad_share,
            conversations=len(conversations),
            path=out_dir / BAD_SAMPLES if is_main() else None,
        ),
    )


def report_first_step(recipe: Recipe, conversations: ConversationSet, first: GlobalStep) -> None:
    """Say what of the first step cannot be used, before an hour is spent on getting there.

    Warns of three; raises DataError when there are more than a run would forgive (a template that fits no record).
    """
    for bad in first.bad[:3]:
        _log.warning("%s: left out: %s", bad.origin, bad.reason)
    ledger = BadSamples(max_share=recipe.data.max_bad_share, conversations=len(conversations))
    ledger.note(first.bad, seen=len(first.conversations))


def _lengths_of(conversations: ConversationSet) -> list[int]:
    return signed_lengths(conversations, [(number,) for number in range(len(conversations))])


def _open_cache(recipe: Recipe, processor: Processor, conversations: ConversationSet) -> TokenCache | None:
    data = recipe.data
    if data.token_cache is None:
        return None
    return open_token_cache(
        data.token_cache,
        processor,
        max_tokens=data.max_tokens,
        too_long=data.too_long,
        fingerprint=" ".join([conversations.fingerprint, *(source.format for source in list_sources(recipe))]),
    )

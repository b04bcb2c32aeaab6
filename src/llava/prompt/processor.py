"""From a conversation to arrays: token ids with the placeholders already expanded, labels, pictures.

`Processor` is the one way in for training, chat, server and evaluation. What it does is decided by a model's folder
(`Processor.load`), never by the folder's name. It takes plain values, so that this room stays below `model`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llava.errors import CheckpointError, ContextLengthError, PromptError
from llava.prompt.chat_template import ChatTemplate, ImagePosition
from llava.prompt.conversation import Conversation, Image
from llava.prompt.images import ImageSettings, decode_image, preprocess, read_size
from llava.prompt.jinja import write_jinja
from llava.prompt.spans import IMAGE_SLOT, tokenize
from llava.prompt.templates import get_template
from llava.prompt.tiling import Size
from llava.prompt.tokenizer import Tokenizer, load_tokenizer

IGNORE_LABEL = -100

#: What to do with a conversation over the limit: refuse it, or cut its end off (whole pictures, answers left).
Overflow: TypeAlias = Literal["error", "truncate"]


def _no_pixels() -> NDArray[np.float32]:
    return np.zeros((0, 3, 0, 0), dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Encoded:
    """One conversation as arrays. T tokens, N tiles in all.

    input_ids: (T,) int64; every picture stands as its `image_token_id` once per feature row the model makes of it.
    labels: (T,) int64; the token itself inside supervised answers, IGNORE_LABEL elsewhere (not shifted).
    pixel_values: (N, 3, H, W) float32, all tiles of all pictures in reading order.
    image_sizes: original (height, width), one per picture. tiles_per_image: one per picture; sums to N.
    tokens_per_image: placeholders of each picture; sums to the number of placeholders.
    num_truncated: tokens cut off because of `max_length`.
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    pixel_values: NDArray[np.float32] = field(default_factory=_no_pixels)
    image_sizes: tuple[tuple[int, int], ...] = ()
    tiles_per_image: tuple[int, ...] = ()
    tokens_per_image: tuple[int, ...] = ()
    num_truncated: int = 0

    @property
    def num_answer_tokens(self) -> int:
        """Supervised positions."""
        return int((self.labels != IGNORE_LABEL).sum())


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """A picture as the tower takes it: tiles (N, 3, H, W) float32, and its original (height, width)."""

    pixel_values: NDArray[np.float32]
    size: Size


class Processor:
    """Encodes conversations for one model.

    image_token_id: stands for every feature row of a picture. start_end_tokens: a picture stands between `<im_start>`
    and `<im_end>`. image_position: "front" moves pictures before their message's words, "inline" leaves them.
    text_after_image: whether the words behind a picture are tokenized like the beginning of a prompt ("restart", the
    original) or like a continuation ("continue", Hugging Face); None takes the tokenizer family's habit.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | str,
        *,
        image_settings: ImageSettings,
        image_token_id: int,
        start_end_tokens: bool = False,
        image_position: ImagePosition = "front",
        text_after_image: Literal["restart", "continue"] | None = None,
        context_length: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = get_template(template) if isinstance(template, str) else template
        self.image_settings = image_settings
        self.image_token_id = image_token_id
        self.start_end_tokens = start_end_tokens
        self.image_position: ImagePosition = image_position
        self.text_after_image = text_after_image
        self.context_length = context_length
        if start_end_tokens:
            for token in ("<im_start>", "<im_end>"):
                tokenizer.token_id(token)
        self._restart = tokenizer.restarts_after_image if text_after_image is None else text_after_image == "restart"
        template_ids = {
            piece
            for text in self.template.markup()
            for piece in tokenizer.split_markup(text)
            if isinstance(piece, int) and piece != tokenizer.unk_token_id
        }
        self._forbidden = tokenizer.special_ids | template_ids | {image_token_id}

    @property
    def patches_per_tile(self) -> int:
        """Feature rows of one tile."""
        return self.image_settings.tokens_per_tile

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return self.template.stop_strings

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: those of the template that this tokenizer has as one token, and EOS."""
        ids = [self.tokenizer.split_markup(text) for text in (self.template.answer_suffix, *self.stop_strings)]
        ends = [pieces[-1] for pieces in ids if pieces]
        eos = self.tokenizer.eos_token_id
        found = [end for end in ends if isinstance(end, int)] + ([] if eos is None else [eos])
        return tuple(dict.fromkeys(found))

    def encode(
        self,
        conversation: Conversation,
        *,
        open_turn: bool = False,
        max_length: int | None = None,
        overflow: Overflow = "error",
        images: Sequence[PreparedImage] | None = None,
        pixels: bool = True,
    ) -> Encoded:
        """Encode a conversation; `open_turn` ends it with the beginning of an answer (inference).

        images: the pictures already prepared by `prepare_image`, for callers that use one several times. pixels=False
        reads only the headers of the pictures and leaves `pixel_values` empty. Raises ContextLengthError over
        max_length tokens; with overflow "truncate" the end is cut off instead, never through a picture, and only
        when a supervised answer remains (`Encoded.num_truncated` says how much went).
        """
        segments = self.template.render(
            conversation,
            open_turn=open_turn,
            image_position=self.image_position,
            start_end_tokens=self.start_end_tokens,
        )
        tokens = tokenize(segments, self.tokenizer, restart_after_image=self._restart, forbidden=self._forbidden)
        ids = np.array(tokens.ids, dtype=np.int64)
        labels = np.where(np.array(tokens.supervised, dtype=bool), ids, IGNORE_LABEL)
        sources = conversation.images
        if not sources:
            return self._limited(Encoded(ids, labels), max_length, overflow, conversation.origin)
        slots = np.flatnonzero(ids == IMAGE_SLOT)
        if len(slots) != len(sources):
            raise PromptError(
                f"{_at(conversation)}{len(sources)} pictures, but template {self.template.name!r} kept {len(slots)};"
                " put them into user turns"
            )
        if images is not None and len(images) != len(sources):
            raise PromptError(f"{_at(conversation)}{len(images)} prepared pictures for {len(sources)}")
        if images is None and pixels:
            images = [self.prepare_image(image) for image in sources]
        settings = self.image_settings
        if images is not None:
            sizes = tuple(image.size for image in images)
        else:
            sizes = tuple(read_size(image.source, settings.limits) for image in sources)
        counts = tuple(settings.count_tokens(size) for size in sizes)
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[slots] = counts
        ids[slots] = self.image_token_id
        labels[slots] = IGNORE_LABEL
        encoded = Encoded(
            input_ids=np.repeat(ids, repeats),
            labels=np.repeat(labels, repeats),
            pixel_values=_no_pixels() if images is None else _joined(images),
            image_sizes=sizes,
            tiles_per_image=tuple(settings.count_tiles(size) for size in sizes),
            tokens_per_image=counts,
        )
        return self._limited(encoded, max_length, overflow, conversation.origin)

    def prepare_image(self, image: Image) -> PreparedImage:
        """Decode a picture and cut it into tiles. Raises ImageError."""
        settings = self.image_settings
        decoded = decode_image(image.source, settings.limits, background=settings.background)
        return PreparedImage(preprocess(decoded, settings), (decoded.height, decoded.width))

    def decode(self, ids: Iterable[int] | NDArray[np.int64]) -> str:
        """The words of token ids; special tokens and pictures leave no trace."""
        image = self.image_token_id
        return self.tokenizer.decode(token for token in map(int, ids) if token != image)

    def with_template(self, template: ChatTemplate | str) -> Processor:
        """The same processor with another chat template."""
        return Processor(
            self.tokenizer,
            template,
            image_settings=self.image_settings,
            image_token_id=self.image_token_id,
            start_end_tokens=self.start_end_tokens,
            image_position=self.image_position,
            text_after_image=self.text_after_image,
            context_length=self.context_length,
        )

    def save(self, folder: Path | str) -> None:
        """Write tokenizer and preprocessor files, and a config.json with the `llava` block if there is none yet."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(folder)
        settings = self.image_settings
        _write_json(folder / "preprocessor_config.json", settings.to_preprocessor_config())
        anyres = settings.mode == "anyres"
        extra = settings.tokens_per_tile - settings.patches_per_side**2
        stock = {
            "processor_class": "LlavaNextProcessor" if anyres else "LlavaProcessor",
            "image_token": "<image>",
            "patch_size": settings.size // settings.patches_per_side,
            # transformers counts patches plus these, less one under "default"
            "num_additional_image_tokens": 1 if extra == 0 else extra,
            "vision_feature_select_strategy": "default" if extra == 0 else "full",
        }
        _write_json(folder / "processor_config.json", stock)
        jinja = write_jinja(self.template, with_bos=bool(self.tokenizer.prefix_ids))
        if jinja is not None:
            (folder / "chat_template.jinja").write_text(jinja, encoding="utf-8")
        if not (folder / "config.json").exists():
            _write_json(folder / "config.json", {"llava": self.block()})

    def block(self) -> dict[str, Any]:
        """This processor's part of the `llava` block in config.json."""
        settings = self.image_settings
        block: dict[str, Any] = {
            "template": self.template.name,
            "image_mode": settings.mode,
            "image_start_end": self.start_end_tokens,
            "image_token_id": self.image_token_id,
            "merge_type": settings.merge,
            "image_grid_pinpoints": [list(point) for point in settings.pinpoints],
            "anyres_max": settings.max_tiles,
            "image_size": settings.size,
            "patches_per_side": settings.patches_per_side,
            "features_per_tile": settings.tokens_per_tile,
            "image_position": self.image_position,
        }
        if self.text_after_image is not None:
            block["text_after_image"] = self.text_after_image
        return block

    @classmethod
    def load(cls, folder: Path | str) -> Processor:
        """Open a folder of our layout, or a stock Hugging Face LLaVA folder without the `llava` block."""
        folder = Path(folder)
        config = _read_json(folder / "config.json")
        if config is None:
            raise CheckpointError(f"{folder}: no config.json; this is not a model folder")
        block = {**_stock_block(config), **config.get("llava", {})}
        picture = _read_json(folder / "preprocessor_config.json")
        if picture is None:
            picture = (_read_json(folder / "processor_config.json") or {}).get("image_processor")
        if picture is None:
            raise CheckpointError(f"{folder}: no preprocessor_config.json; copy it from the vision tower's folder")
        token = block.get("image_token_id")
        if not isinstance(token, int):
            raise CheckpointError(f"{folder / 'config.json'}: no image_token_index; add the id of <image>")
        settings = ImageSettings.from_preprocessor_config(picture)
        changes: dict[str, Any] = {
            "mode": block.get("image_mode", settings.mode),
            "merge": block["merge_type"],
            "pinpoints": tuple((int(h), int(w)) for h, w in block.get("image_grid_pinpoints") or settings.pinpoints),
            "max_tiles": block.get("anyres_max"),
        }
        for ours, theirs in (
            ("size", "image_size"),
            ("patches_per_side",) * 2,
            ("tokens_per_tile", "features_per_tile"),
        ):
            if theirs in block:
                changes[ours] = int(block[theirs])
        if changes.get("size", settings.size) != settings.size:
            # Another tower's file: its normalisation holds, its sizes do not.
            changes["shortest_edge"] = None
        text = config.get("text_config") or {}
        return cls(
            load_tokenizer(folder),
            block["template"],
            image_settings=replace(settings, **changes),
            image_token_id=token,
            start_end_tokens=bool(block.get("image_start_end", False)),
            image_position=block.get("image_position", "front"),
            text_after_image=block.get("text_after_image"),
            context_length=text.get("max_position_embeddings"),
        )

    def _limited(self, encoded: Encoded, max_length: int | None, overflow: Overflow, origin: str) -> Encoded:
        length = len(encoded.input_ids)
        if max_length is None or length <= max_length:
            return encoded
        where = f"{origin}: " if origin else ""
        pictures = sum(encoded.tokens_per_image)
        spent = f" ({pictures} of them for {len(encoded.image_sizes)} pictures)" if pictures else ""
        if overflow == "error":
            raise ContextLengthError(
                f"{where}{length} tokens{spent}, but at most {max_length} fit; shorten the text or drop a picture"
            )
        shorter = _truncated(encoded, max_length, self.image_token_id)
        if encoded.num_answer_tokens and not shorter.num_answer_tokens:
            raise ContextLengthError(
                f"{where}{length} tokens{spent}; cut to {max_length} no answer is left; raise max_length or drop it"
            )
        return shorter


def _truncated(encoded: Encoded, max_length: int, image_token_id: int) -> Encoded:
    """The first max_length tokens; a picture that would be split goes as a whole."""
    cut = max_length
    kept = 0
    places = np.flatnonzero(encoded.input_ids == image_token_id)
    for count in encoded.tokens_per_image:
        begin, places = (int(places[0]) if count else 0), places[count:]
        if begin + count > cut:
            cut = min(cut, begin)
            break
        kept += 1
    tiles = sum(encoded.tiles_per_image[:kept])
    return Encoded(
        input_ids=encoded.input_ids[:cut],
        labels=encoded.labels[:cut],
        pixel_values=encoded.pixel_values[:tiles],
        image_sizes=encoded.image_sizes[:kept],
        tiles_per_image=encoded.tiles_per_image[:kept],
        tokens_per_image=encoded.tokens_per_image[:kept],
        num_truncated=len(encoded.input_ids) - cut,
    )


def _joined(images: Sequence[PreparedImage]) -> NDArray[np.float32]:
    if len(images) == 1:
        return images[0].pixel_values
    return np.concatenate([image.pixel_values for image in images])


def _stock_block(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a stock config.json says about prompts and pictures (transformers' defaults where it says nothing)."""
    anyres = config.get("model_type") == "llava_next"
    block: dict[str, Any] = {
        "template": "llava_hf",
        "image_token_id": config.get("image_token_index", config.get("image_token_id")),
        "merge_type": "spatial_unpad" if anyres else "flat",
    }
    if anyres:
        block["image_mode"] = "anyres"
        block["image_grid_pinpoints"] = config.get("image_grid_pinpoints") or [
            [336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]
        ]  # fmt: skip
    vision = config.get("vision_config")
    if isinstance(vision, Mapping):
        clip = "clip" in str(vision.get("model_type", "clip_vision_model")).split("_")
        side = int(vision.get("image_size", 224)) // int(vision.get("patch_size", 32 if clip else 16))
        full = config.get("vision_feature_select_strategy", "default") == "full"
        block["image_size"] = int(vision.get("image_size", 224))
        block["patches_per_side"] = side
        # "default" drops the first token, a class token in CLIP but a patch in SigLIP.
        block["features_per_tile"] = side**2 + int(clip) - int(not full)
    return block


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise CheckpointError(f"{path}: not JSON ({problem})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold an object")
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _at(conversation: Conversation) -> str:
    return f"{conversation.origin}: " if conversation.origin else ""

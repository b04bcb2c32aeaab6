"""A chat template: one description of how turns are written, and the one renderer.

A conversation is rendered once, into segments: template markup (whose special tokens count), words of people (whose
special tokens do not), and pictures. Each says whether it is supervised. `spans.tokenize` turns them into ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from llava.errors import PromptError
from llava.prompt.conversation import IMAGE_MARK, Conversation, Image, Message, Part, Text

ImagePosition: TypeAlias = Literal["front", "inline"]
IMAGE_POSITIONS: tuple[ImagePosition, ...] = ("front", "inline")


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered prompt.

    kind: "markup" (template text; special tokens in it are special), "text" (somebody's words), "image" (a slot), or
    "bos"/"eos" (the tokenizer's own). fresh: tokenized without regard to what stands before it, as XTuner does.
    """

    kind: Literal["markup", "text", "image", "bos", "eos"]
    text: str = ""
    supervised: bool = False
    fresh: bool = False


@dataclass(frozen=True)
class ChatTemplate:
    """How a conversation is written for one family of models. `{bos}` and `{eos}` stand for the tokenizer's own.

    A turn is `prefix + lead + words + suffix`; an empty turn is its prefix alone when `empty_is_open`. In an answer,
    lead, words and suffix are supervised. `before_user` stands before every user turn but the first.
    """

    name: str
    user_prefix: str
    user_suffix: str
    assistant_prefix: str
    answer_suffix: str
    system: str = ""
    system_prefix: str = ""
    system_suffix: str = ""
    system_in_first_turn: bool = False
    user_lead: str = ""
    answer_lead: str = ""
    after_answer: str = ""
    before_user: str = ""
    tail: str = ""
    stop_strings: tuple[str, ...] = ()
    preset: tuple[Message, ...] = ()
    empty_is_open: bool = True
    drops_leading_answer: bool = True
    drops_user_text: bool = False
    image_prefix: str = ""
    image_suffix: str = ""
    received: str | None = None
    fresh_turns: bool = False

    def markup(self) -> tuple[str, ...]:
        """All strings that the template itself writes."""
        return (
            self.system_prefix,
            self.system_suffix,
            self.before_user,
            self.user_prefix + self.user_lead,
            self.user_suffix,
            self.assistant_prefix + self.answer_lead,
            self.answer_suffix,
            self.after_answer,
            self.tail,
            "<im_start><im_end>",
        )

    def render(
        self,
        conversation: Conversation,
        *,
        open_turn: bool,
        image_position: ImagePosition = "front",
        start_end_tokens: bool = False,
    ) -> list[Segment]:
        """Write a conversation as segments; `open_turn` adds the beginning of an answer.

        image_position "front" moves the pictures of a message before its words, one line each, and strips the words,
        as the original does in training and in chat; "inline" leaves them where they are. start_end_tokens wraps each
        picture in `<im_start>` and `<im_end>`. Raises PromptError for a conversation that the template cannot hold.
        """
        where = f"{conversation.origin}: " if conversation.origin else ""
        system, turns = _split_system(conversation.messages, self.system)
        if self.drops_leading_answer and turns and turns[0].role == "assistant":
            if turns[0].images:
                raise PromptError(f"{where}the first turn is an answer with a picture; a user has to speak first")
            turns = turns[1:]
        if not turns:
            raise PromptError(f"{where}nothing to say: no user turn")
        if open_turn and turns[-1].role == "assistant":
            raise PromptError(f"{where}the last turn is an answer; a prompt must end with the user's turn")
        if self.drops_user_text:
            return self._render_caption(turns, open_turn, where)
        if self.received is not None and open_turn and turns[0].images:
            turns = _announce_images(turns, self.received)
        writer = _Writer(self, image_position, start_end_tokens)
        if not self.system_in_first_turn:
            writer.system(system)
        seen_user = False
        for message in (*self.preset, *turns):
            if message.role == "user":
                writer.user(message, system if self.system_in_first_turn and not seen_user else None, seen_user)
                seen_user = True
            else:
                writer.answer(message)
        if open_turn:
            writer.markup(self.assistant_prefix)
        elif self.tail:
            writer.markup(self.tail)
        return writer.segments

    def _render_caption(self, turns: Sequence[Message], open_turn: bool, where: str) -> list[Segment]:
        roles = [turn.role for turn in turns]
        if roles != (["user"] if open_turn else ["user", "assistant"]) or not turns[0].images:
            raise PromptError(
                f"{where}template {self.name!r} takes one picture and its caption, found {', '.join(roles)}"
                f" with {len(turns[0].images)} pictures; use a chat template such as vicuna_v1"
            )
        segments = [Segment("image") for _ in turns[0].images]
        if not open_turn:
            writer = _Writer(self, "inline", False)
            writer.answer(turns[1])
            segments += writer.segments
        return segments


class _Writer:
    """Collects the segments of one conversation."""

    def __init__(self, template: ChatTemplate, image_position: ImagePosition, start_end_tokens: bool) -> None:
        self.template = template
        self.front = image_position == "front"
        self.image_open = template.image_prefix + ("<im_start>" if start_end_tokens else "")
        self.image_close = ("<im_end>" if start_end_tokens else "") + template.image_suffix
        self.segments: list[Segment] = []

    def markup(self, text: str, *, supervised: bool = False, fresh: bool = False) -> None:
        for name in ("bos", "eos"):
            mark = f"{{{name}}}"
            if mark in text:
                before, _, after = text.partition(mark)
                self.markup(before, supervised=supervised, fresh=fresh)
                self.segments.append(Segment("bos" if name == "bos" else "eos", supervised=supervised))
                self.markup(after, supervised=supervised, fresh=self.template.fresh_turns)
                return
        if text:
            self.segments.append(Segment("markup", text, supervised, fresh))

    def system(self, text: str) -> None:
        if text:
            self.markup(self.template.system_prefix)
            # The template's own text is markup, so that its split is remembered; somebody else's is words.
            kind: Literal["markup", "text"] = "markup" if text == self.template.system else "text"
            self.segments.append(Segment(kind, text))
            self.markup(self.template.system_suffix)

    def user(self, message: Message, system: str | None, repeated: bool) -> None:
        template = self.template
        if repeated:
            self.markup(template.before_user, fresh=template.fresh_turns)
        self.markup(template.user_prefix, fresh=template.fresh_turns and repeated)
        parts = self._arranged(message.parts)
        if not parts and template.empty_is_open and system is None:
            return
        if template.user_lead:
            self.markup(template.user_lead)
        if system is not None:
            self.system(system)
        self._parts(parts, supervised=False)
        self.markup(template.user_suffix)

    def answer(self, message: Message) -> None:
        template = self.template
        supervised = message.supervised
        if not template.fresh_turns:
            self.markup(template.assistant_prefix)
        parts = [part for part in message.parts if isinstance(part, Image) or part.text]
        if not parts and template.empty_is_open:
            return
        self.markup(template.answer_lead, supervised=supervised)
        begun = len(self.segments)
        self._parts(parts, supervised=supervised)
        self.markup(template.answer_suffix, supervised=supervised)
        if template.fresh_turns and len(self.segments) > begun:
            self.segments[begun] = replace(self.segments[begun], fresh=True)
        self.markup(template.after_answer, fresh=template.fresh_turns)

    def _arranged(self, parts: Iterable[Part]) -> list[Part]:
        parts = [part for part in parts if isinstance(part, Image) or part.text]
        images = [part for part in parts if isinstance(part, Image)]
        if not self.front or not images:
            return parts
        words = "".join(part.text for part in parts if isinstance(part, Text)).strip()
        arranged: list[Part] = []
        for number, image in enumerate(images, start=1):
            arranged.append(image)
            if words or number < len(images):
                arranged.append(Text("\n"))
        return [*arranged, Text(words)] if words else arranged

    def _parts(self, parts: Iterable[Part], *, supervised: bool) -> None:
        for part in parts:
            if isinstance(part, Image):
                self.markup(self.image_open)
                self.segments.append(Segment("image"))
                self.markup(self.image_close)
            else:
                self.segments.append(Segment("text", part.text, supervised))


def render_text(segments: Iterable[Segment]) -> str:
    """Segments as one string, pictures as `<image>`: for people and tests; no tokenizer ever gets it."""
    shown = {"image": IMAGE_MARK, "bos": "<s>", "eos": "</s>"}
    return "".join(shown.get(segment.kind, segment.text) for segment in segments)


def _split_system(messages: Sequence[Message], default: str) -> tuple[str, tuple[Message, ...]]:
    if messages and messages[0].role == "system":
        return messages[0].text, tuple(messages[1:])
    return default, tuple(messages)


def _announce_images(turns: tuple[Message, ...], reply: str) -> tuple[Message, ...]:
    """Give the pictures of the first turn a turn of their own, answered by `reply` (the original's mmtag chat)."""
    first = turns[0]
    pictures = Message("user", first.images)
    words = Message("user", tuple(part for part in first.parts if isinstance(part, Text)))
    stripped = Message("user", (Text(words.text.strip()),))
    return (pictures, Message("assistant", (Text(reply),), supervised=False), stripped, *turns[1:])

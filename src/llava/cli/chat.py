"""`llava chat [MODEL]`: talk about pictures in the terminal, or ask once and leave."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llava.cli.opening import (
    BaseOption,
    DeviceOption,
    DtypeOption,
    LoadInOption,
    Opening,
    TemplateOption,
    TowerOption,
    UrlsOption,
    working,
)
from llava.errors import PromptError, UsageError

if TYPE_CHECKING:
    from llava.inference.answer import Answer
    from llava.inference.sampling import SamplingParams
    from llava.inference.talk import Model
    from llava.prompt.conversation import Conversation


def chat(
    model: Annotated[
        str | None, typer.Argument(help="Folder or hub id; without it the newest quickstart model.", show_default=False)
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="Ask this and leave; - reads the question from stdin.")
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", "-i", help="A picture for the first question: path, URL or clip; may be repeated."),
    ] = None,
    messages: Annotated[
        str | None, typer.Option(help="Answer a file of OpenAI chat messages and leave; - is stdin.", metavar="FILE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line with text, token ids and time.")] = False,
    save_boxes: Annotated[
        Path | None, typer.Option(help="Draw the boxes of the one answer on its picture.", metavar="FILE")
    ] = None,
    allow_urls: UrlsOption = False,
    system: Annotated[str | None, typer.Option(help="Replace the template's system text.")] = None,
    template: TemplateOption = None,
    base: BaseOption = None,
    vision_tower: TowerOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    load_in: LoadInOption = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest word every time.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest that reach this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw among the k likeliest; 0 for all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Draw among those this fraction as likely as the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 avoids words already said.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Repeat a random answer.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 512,
) -> None:
    """Talk with a model about pictures.

    Without -p, --messages or piped input it starts a conversation; /help there lists its commands, Ctrl-C stops an
    answer, Ctrl-D leaves.
    """
    if prompt is not None and messages is not None:
        raise UsageError("-p and --messages are two ways to ask; give one of them")
    if messages is not None and (image or system):
        raise UsageError("--messages brings its own pictures and system text; drop --image and --system")
    conversation = _read_conversation(prompt, messages, image or [], system, allow_urls)
    if conversation is None and as_json:
        raise UsageError("--json answers one question; give it with -p, --messages or on stdin")
    if conversation is None and save_boxes is not None:
        raise UsageError("--save-boxes goes with one question (-p); in a conversation it is /boxes FILE")
    opening = Opening(
        model, base=base, vision_tower=vision_tower, template=template, device=device, dtype=dtype, load_in=load_in
    ).found()
    with working("starting"):  # torch takes seconds
        from llava.inference.sampling import SamplingParams

    params = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_new_tokens=max_new_tokens,
    )
    opened = opening.open()
    name = str(opening.path)
    if conversation is not None:
        _answer_once(opened, conversation, params, name=name, as_json=as_json, save_boxes=save_boxes)
        return
    from llava.cli.chat_session import Session
    from llava.cli.chat_terminal import talk

    talk(
        Session(
            opened,
            params,
            name=name,
            images=image or [],
            system=system,
            allow_urls=allow_urls,
            open_model=lambda path: opening.of(path).open(),
        )
    )


def _read_conversation(
    prompt: str | None, messages: str | None, images: list[str], system: str | None, allow_urls: bool
) -> Conversation | None:
    """The one conversation to answer, None when a conversation in the terminal is wanted."""
    if messages is not None:
        from llava.cli.chat_files import read_messages

        read = read_messages(messages, allow_urls=allow_urls)
        if read.messages[-1].role != "user":
            raise PromptError(f"{messages}: the last message must be the user's; there is nothing to answer")
        return read
    if prompt is None and sys.stdin.isatty():
        return None
    question = sys.stdin.read().strip() if prompt is None or prompt == "-" else prompt
    if not question and not images:
        raise UsageError("nothing to answer on stdin; ask with -p TEXT, or start `llava chat` in a terminal")
    from llava.cli.chat_pictures import find_picture, grab_clipboard
    from llava.prompt.conversation import Conversation, Image, Message, Text

    shown = [
        found
        for name in images
        for found in (grab_clipboard() if name == "clip" else [Image(find_picture(name, allow_urls=allow_urls))])
    ]
    said = (Message("system", (Text(system),)),) if system is not None else ()
    return Conversation((*said, Message("user", (*shown, Text(question)))))


def _answer_once(
    model: Model,
    conversation: Conversation,
    params: SamplingParams,
    *,
    name: str,
    as_json: bool,
    save_boxes: Path | None,
) -> None:
    stream = model.assistant.stream(conversation, params)
    started = False
    for piece in stream:
        piece = piece if started else piece.lstrip()
        started = started or bool(piece)
        if not as_json:
            print(piece, end="", flush=True)
    answer = stream.answer()
    print(json.dumps(_as_record(answer, model, name), ensure_ascii=False) if as_json else "", flush=True)
    if save_boxes is not None:
        from llava.cli.chat_pictures import save_boxes as save
        from llava.prompt.conversation import Message, Text

        said = save(model, (*conversation.messages, Message("assistant", (Text(answer.text),))), save_boxes)
        print(said, file=sys.stderr)


def _as_record(answer: Answer, model: Model, name: str) -> dict[str, Any]:
    """What --json prints; image_token_id is the placeholder that stands once for each feature row of a picture."""
    return {
        "text": answer.text,
        "prompt_token_ids": list(answer.prompt_token_ids),
        "token_ids": list(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "seconds": round(answer.seconds, 6),
        "image_token_id": model.processor.image_token_id,
        "template": model.processor.template.name,
        "model": name,
    }

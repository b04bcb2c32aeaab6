"""`llava chat [MODEL]`: talk about pictures in the terminal, or ask once and leave."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llava.errors import PromptError, UsageError

if TYPE_CHECKING:
    from llava.inference.answer import Answer, Assistant
    from llava.inference.sampling import SamplingParams
    from llava.prompt.conversation import Conversation, ImageSource


def chat(
    model: Annotated[
        str | None, typer.Argument(help="Folder or hub id; without it the newest quickstart model.", show_default=False)
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="Ask this and leave; - reads the question from stdin.")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option("--image", "-i", help="A picture for the first question; may be repeated.")
    ] = None,
    messages: Annotated[
        str | None, typer.Option(help="Answer a file of OpenAI chat messages and leave; - is stdin.", metavar="FILE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line with text, token ids and time.")] = False,
    system: Annotated[str | None, typer.Option(help="Replace the template's system text.")] = None,
    template: Annotated[str | None, typer.Option(help="Chat template; decided by the model when not given.")] = None,
    base: Annotated[
        str | None, typer.Option(help="The model that a LoRA, projector or delta folder stands on.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps, xpu; chosen when not given.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16; chosen when not given.")] = None,
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
    conversation = _read_conversation(prompt, messages, image or [], system)
    if conversation is None and as_json:
        raise UsageError("--json answers one question; give it with -p, --messages or on stdin")
    path = model or str(_newest_quickstart())

    with _working(f"opening {path}"):
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
        assistant = _open(path, base, template, device, dtype)
    if conversation is None:
        from llava.cli.chat_session import Session
        from llava.cli.chat_terminal import talk

        talk(Session(assistant, params, images=image or [], system=system), name=path)
    elif as_json:
        answer = assistant.answer(conversation, params)
        print(json.dumps(_as_record(answer, assistant, path), ensure_ascii=False), flush=True)
    else:
        _print_answer(assistant, conversation, params)


def _read_conversation(
    prompt: str | None, messages: str | None, images: list[Path], system: str | None
) -> Conversation | None:
    """The one conversation to answer, None when a conversation in the terminal is wanted."""
    if messages is not None:
        return read_messages(messages)
    if prompt is None and sys.stdin.isatty():
        return None
    question = sys.stdin.read().strip() if prompt is None or prompt == "-" else prompt
    if not question and not images:
        raise UsageError("nothing to answer on stdin; ask with -p TEXT, or start `llava chat` in a terminal")
    from llava.prompt.conversation import Conversation, Image, Message, Text

    parts: tuple[Image | Text, ...] = (*(Image(path) for path in images), Text(question))
    said = (Message("system", (Text(system),)),) if system is not None else ()
    return Conversation((*said, Message("user", parts)))


def read_messages(name: str) -> Conversation:
    """Read OpenAI chat messages, a list or an object with `messages`, from a file or stdin (-).

    Paths of pictures are relative to the file's folder. Raises PromptError naming file, line or message.
    """
    from llava.prompt.conversation import from_openai

    folder = Path() if name == "-" else Path(name).parent
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"{name}: {reason}; --messages takes a JSON file of chat messages") from None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{name}: not JSON ({error}); it must hold a list of chat messages") from None
    conversation = from_openai(value, resolve_image=_resolver(folder, name), origin=name)
    if conversation.messages[-1].role != "user":
        raise PromptError(f"{name}: the last message must be the user's; there is nothing to answer")
    return conversation


def _resolver(folder: Path, origin: str) -> Callable[[str], ImageSource]:
    def resolve(url: str) -> ImageSource:
        if url.lower().startswith(("http://", "https://")):
            raise PromptError(f"{origin}: picture {url!r} is a web address; download it and give its path")
        return folder / url.removeprefix("file://")

    return resolve


def _newest_quickstart() -> Path:
    from llava.quickstart.latest import find_latest

    found = find_latest()
    if found is None:
        raise UsageError(
            "no model named, and no quickstart model found; run `llava quickstart` to make one in minutes, "
            "or name a model: llava chat llava-hf/llava-1.5-7b-hf"
        )
    return found


def _open(path: str, base: str | None, template: str | None, device: str | None, dtype: str | None) -> Assistant:
    import llava
    from llava.inference.answer import Assistant

    loaded = llava.load(path, base=base, device=device, dtype=dtype, template=template)
    loaded.model.eval()
    processor = loaded.processor
    if template is not None and processor.template.name != template:
        processor = processor.with_template(template)
    return Assistant(loaded.model, processor)


def _as_record(answer: Answer, assistant: Assistant, model: str) -> dict[str, Any]:
    """What --json prints; image_token_id is the placeholder that stands once for each feature row of a picture."""
    return {
        "text": answer.text,
        "prompt_token_ids": list(answer.prompt_token_ids),
        "token_ids": list(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "seconds": round(answer.seconds, 6),
        "image_token_id": assistant.processor.image_token_id,
        "template": assistant.processor.template.name,
        "model": model,
    }


def _print_answer(assistant: Assistant, conversation: Conversation, params: SamplingParams) -> None:
    started = False
    for piece in assistant.stream(conversation, params):
        piece = piece if started else piece.lstrip()
        started = started or bool(piece)
        print(piece, end="", flush=True)
    print()


def _working(what: str) -> AbstractContextManager[Any]:
    """A spinner on stderr while something takes seconds; nothing when stderr is not a terminal."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(what)

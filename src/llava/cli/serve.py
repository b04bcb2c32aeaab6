"""`llava serve [MODEL]`: a model over HTTP, in the OpenAI chat-completions protocol."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llava.errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    from llava.inference.requests import EngineLimits
    from llava.serve.keys import Keys
    from llava.serve.limits import ServeLimits
    from llava.serve.worker import Worker

_MIB = 1024 * 1024
_GIB = 1024 * _MIB


def serve(
    model: Annotated[
        str | None, typer.Argument(help="Folder or hub id; without it the newest quickstart model.", show_default=False)
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; other machines' only with a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What requests call the model; its folder's name when not given.")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="A key that requests must send; may be repeated. Others on this machine can see it: prefer a file.",
            envvar="LLAVA_API_KEY",
            show_envvar=True,
        ),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A file with one key a line.")] = None,
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Fetch pictures from public http and https addresses.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="The model that a LoRA, projector or delta folder stands on.")
    ] = None,
    template: Annotated[str | None, typer.Option(help="Chat template; decided by the model when not given.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps, xpu; chosen when not given.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16; chosen when not given.")] = None,
    load_in: Annotated[str | None, typer.Option(help="4bit or 8bit (needs 'llava[quant]').")] = None,
    max_active: Annotated[int, typer.Option(help="Answers made at the same time.", min=1)] = 64,
    max_waiting: Annotated[int, typer.Option(help="Answers that may wait; beyond them requests get 429.", min=1)] = 64,
    cache_gib: Annotated[float, typer.Option(help="Memory for keys and values of answers under way.", min=0.001)] = 4.0,
    default_max_tokens: Annotated[
        int, typer.Option(help="Longest answer to a request that names none, in tokens.", min=1)
    ] = 1024,
    max_body_mib: Annotated[int, typer.Option(help="Largest request, in MiB.", min=1)] = 48,
    max_images: Annotated[int, typer.Option(help="Pictures in one request.", min=0)] = 16,
    max_image_side: Annotated[int, typer.Option(help="Longest side of a picture, in pixels.", min=1)] = 8192,
    max_image_pixels: Annotated[int, typer.Option(help="Pixels of a picture.", min=1)] = 40_000_000,
    drain_seconds: Annotated[
        float, typer.Option(help="On SIGTERM, how long answers under way may take to end.", min=0)
    ] = 30.0,
) -> None:
    """Answer OpenAI chat-completions requests about pictures.

    Routes: /v1/chat/completions, /v1/models, /health, /metrics. Log lines (JSON, without words, pictures or keys) go
    to stderr. SIGTERM lets answers under way end.
    """
    try:
        from llava.serve.running import Server, address_of, bind
        from llava.serve.running import serve as run
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("llava"):
            raise
        raise MissingExtraError("the server", "serve") from None
    from llava.inference.requests import EngineLimits
    from llava.serve.keys import Keys
    from llava.serve.limits import ServeLimits
    from llava.serve.logs import configure

    keys = Keys([*(api_key or []), *_read_keys(api_key_file)])
    standard = ServeLimits()
    limits = replace(
        standard,
        default_answer_tokens=default_max_tokens,
        max_waiting=max_waiting,
        max_requests=4 * (max_active + max_waiting),
        max_body_bytes=max_body_mib * _MIB,
        max_pictures=max_images,
        picture=replace(standard.picture, max_side=max_image_side, max_pixels=max_image_pixels),
        max_total_pixels=max(standard.max_total_pixels, max_image_pixels),
    )
    path = model or str(_newest_quickstart())
    name = _check_name(_name_of(path) if name is None else name)
    quantisation = _quantisation(load_in)
    # Before the model, which takes longer to open than a wrong port takes to see.
    with bind(host, port, keys=keys) as sock:
        worker = _open(
            path,
            name=name,
            limits=limits,
            engine_limits=EngineLimits(max_active=max_active, max_cache_bytes=int(cache_gib * _GIB)),
            allow_urls=allow_urls,
            base=base,
            template=template,
            device=device,
            dtype=dtype,
            load_in=quantisation,
        )
        print(_welcome(worker, address_of(sock), keys), file=sys.stderr, flush=True)
        configure()
        run(Server(worker, keys=keys, drain_seconds=drain_seconds), [sock])


def _read_keys(path: Path | None) -> list[str]:
    from llava.serve.keys import read_key_file

    return [] if path is None else read_key_file(path)


def _newest_quickstart() -> Path:
    from llava.quickstart.latest import find_latest

    found = find_latest()
    if found is None:
        raise UsageError(
            "no model named, and no quickstart model found; run `llava quickstart` to make one in minutes, "
            "or name a model: llava serve llava-hf/llava-1.5-7b-hf"
        )
    return found


def _open(
    path: str,
    *,
    name: str,
    limits: ServeLimits,
    engine_limits: EngineLimits,
    allow_urls: bool,
    base: str | None,
    template: str | None,
    device: str | None,
    dtype: str | None,
    load_in: Literal["4bit", "8bit"] | None,
) -> Worker:
    from llava.checkpoint.load import load
    from llava.serve.worker import Worker

    loaded = load(path, base=base, device=device, dtype=dtype, load_in=load_in, template=template)
    loaded.model.eval()
    processor = loaded.processor
    if template is not None and processor.template.name != template:
        processor = processor.with_template(template)
    return Worker(
        loaded.model,
        processor,
        name=name,
        limits=limits,
        engine_limits=engine_limits,
        allow_urls=allow_urls,
    )


def _quantisation(value: str | None) -> Literal["4bit", "8bit"] | None:
    if value is None or value == "4bit":
        return value  # type: ignore[return-value]  # mypy does not narrow a str by comparison
    if value == "8bit":
        return "8bit"
    raise UsageError(f"--load-in {value}: must be 4bit or 8bit")


def _name_of(path: str) -> str:
    """A hub id is its own name; a folder's is its last part, or the one before where that is just "model"."""
    if not Path(path).exists():
        return path
    folder = Path(path).resolve()
    return folder.parent.name if folder.name == "model" and folder.parent.name else folder.name


def _check_name(name: str) -> str:
    if not name or len(name) > 512 or not name.isprintable():
        raise UsageError("--name must be 1 to 512 printable characters")
    return name


def _welcome(worker: Worker, address: str, keys: Keys) -> str:
    key = ' -H "Authorization: Bearer $LLAVA_API_KEY"' if keys else ""
    return (
        f"serving {worker.name} at {address}/v1 ({'with keys' if keys else 'this machine only, no key'}); try\n"
        f"  curl {address}/v1/chat/completions -H 'Content-Type: application/json'{key} "
        f'-d \'{{"model": "{worker.name}", "messages": [{{"role": "user", "content": "Hello"}}]}}\''
    )

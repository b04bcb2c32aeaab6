"""The pictures of a request: from addresses to bytes whose size is known, before a pixel is decoded.

First what costs nothing is checked for all of them (kind of address, length of the base64), then bytes are made, then
headers are read. Web pictures come through `llava.prompt.fetch`, which reaches public addresses only; why one was not
fetched is not told, because that would tell a stranger about this server's own network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor

from llava.errors import DataError, LlavaError
from llava.prompt.conversation import Conversation, Image, Message, Role, Text, read_data_url
from llava.prompt.fetch import Fetcher
from llava.prompt.images import ImageSettings, read_size
from llava.prompt.tiling import Size
from llava.serve.limits import ServeLimits
from llava.serve.problems import explain, invalid
from llava.serve.protocol import ChatRequest, ImagePart

_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_BASE64_OVERHEAD = 4 / 3


def read_conversation(
    request: ChatRequest,
    *,
    limits: ServeLimits,
    settings: ImageSettings,
    new_fetcher: Callable[[], Fetcher] | None,
    fetch_pool: Executor,
) -> Conversation:
    """The conversation of a request, pictures as bytes that fit the limits.

    new_fetcher: None refuses web addresses. Raises ApiError that names the part.
    """
    urls = dict(_picture_urls(request))
    for place, url in urls.items():
        _check_address(url, place, limits, web=new_fetcher is not None)
    data: dict[str, bytes] = {}
    if new_fetcher is not None:
        # A fetcher a request: it keeps what it fetched, and pictures of the web change.
        fetcher = new_fetcher()
        web = [place for place, url in urls.items() if not _is_data(url)]
        for place, got in zip(web, fetch_pool.map(lambda p: _fetch(fetcher, urls[p]), web), strict=True):
            if got is None:
                raise invalid(
                    "image_not_fetched",
                    f"{place}: the picture cannot be fetched; it must be at a public http or https address, at most "
                    f"{limits.picture.max_bytes} bytes and there within {limits.fetch_timeout_seconds:g} s",
                    place,
                )
            data[place] = got
            if sum(map(len, data.values())) > limits.max_body_bytes:
                raise invalid(
                    "image_too_large", f"{place}: the pictures together are over {limits.max_body_bytes} bytes", place
                )
    for place, url in urls.items():
        if place not in data:
            data[place] = _decode_base64(url, place)
    sizes = {place: _read_size(got, place, limits) for place, got in data.items()}
    _check_total(sizes, settings, limits)
    return _assemble(request, data)


def has_web_pictures(request: ChatRequest) -> bool:
    """Whether a request has pictures that must be fetched."""
    return any(not _is_data(url) for _, url in _picture_urls(request))


def _picture_urls(request: ChatRequest) -> Iterator[tuple[str, str]]:
    for i, message in enumerate(request.messages):
        for j, part in enumerate(message.content):
            if isinstance(part, ImagePart):
                yield f"messages[{i}].content[{j}]", part.image_url.url


def _is_data(url: str) -> bool:
    return url[:5].lower() == "data:"


def _check_address(url: str, place: str, limits: ServeLimits, *, web: bool) -> None:
    if _is_data(url):
        if len(url) > limits.picture.max_bytes * _BASE64_OVERHEAD + 1024:
            raise invalid(
                "image_too_large", f"{place}: more than {limits.picture.max_bytes} bytes; make it smaller", place
            )
        return
    if not url.lower().startswith(("http://", "https://")):
        raise invalid(
            "invalid_image_url", f"{place}: not a picture's address; send a data:image/...;base64, URL", place
        )
    if not web:
        raise invalid(
            "image_url_not_allowed",
            f"{place}: this server fetches nothing from the web; send the picture as a data:image/...;base64, URL",
            place,
        )


def _decode_base64(url: str, place: str) -> bytes:
    head = url[:1024].partition(",")[0]
    if not head.lower().endswith(";base64"):
        raise invalid("invalid_image_url", f"{place}: a data: URL must be data:image/...;base64,...", place)
    try:
        return read_data_url(url)
    except ValueError:
        raise invalid("invalid_image", f"{place}: broken base64", place) from None


def _fetch(fetcher: Fetcher, url: str) -> bytes | None:
    try:
        return fetcher.fetch(url)
    except DataError:
        return None


def _read_size(data: bytes, place: str, limits: ServeLimits) -> Size:
    try:
        return read_size(data, limits.picture, name=place)
    except LlavaError as error:
        raise explain(error, param=place) from None


def _check_total(sizes: dict[str, Size], settings: ImageSettings, limits: ServeLimits) -> None:
    """Count pixels as they will stand in memory: a narrow strip that is padded becomes a square."""
    total = 0
    for place, (height, width) in sizes.items():
        total += max(height, width) ** 2 if settings.mode == "pad" else height * width
        if total > limits.max_total_pixels:
            raise invalid(
                "image_too_large",
                f"{place}: {width} x {height} pixels bring the request's pictures over {limits.max_total_pixels} "
                "pixels (padding counted); make them smaller or send fewer",
                place,
            )


def _assemble(request: ChatRequest, data: dict[str, bytes]) -> Conversation:
    messages = []
    for i, message in enumerate(request.messages):
        parts: list[Image | Text] = []
        for j, part in enumerate(message.content):
            if isinstance(part, ImagePart):
                parts.append(Image(data[f"messages[{i}].content[{j}]"]))
            elif part.text:
                parts.append(Text(part.text))
        messages.append(Message(_ROLES[message.role], tuple(parts)))
    return Conversation(tuple(messages))

"""What one request, and all requests together, may cost; each is checked before the work that it bounds."""

from __future__ import annotations

from dataclasses import dataclass, field

from llava.prompt.decoding import ImageLimits

MIB = 1024 * 1024


@dataclass(frozen=True)
class ServeLimits:
    """Bounds of a server. Sizes in bytes, times in seconds."""

    max_body_bytes: int = 48 * MIB
    """One request's body; counted while it arrives, so that a body without a length is cut off too."""
    max_buffered_bytes: int = 512 * MIB
    """Bodies of all requests that are being read or prepared."""
    body_timeout_seconds: float = 60.0
    """A body must have arrived after so long."""
    send_timeout_seconds: float = 60.0
    """A client that takes nothing for so long has left."""
    max_depth: int = 16
    """Brackets within brackets in a body."""
    max_items: int = 200_000
    """Brackets and commas in a body."""
    max_messages: int = 1024
    max_parts: int = 1024
    """Content parts of one message."""
    max_text_chars: int = 1_000_000
    """Words of a conversation; what fits the model's context is counted in tokens later."""
    max_pictures: int = 16
    max_total_pixels: int = 100_000_000
    """Of all pictures of a request, each counted as the square it is padded to where the model pads."""
    picture: ImageLimits = field(default_factory=ImageLimits)
    max_choices: int = 8
    """The largest `n`."""
    default_answer_tokens: int = 1024
    """The longest answer to a request that names none. The engine keeps room for the longest answer of each request, so
    that a whole context for everybody would let few be answered at the same time."""
    max_waiting: int = 64
    """Answers that wait for the engine; beyond it requests are refused with 429."""
    max_requests: int = 256
    """Requests at once, streams under way among them."""
    prepare_threads: int = 4
    """Threads that decode pictures and count tokens."""
    fetch_timeout_seconds: float = 10.0
    """For one picture from the web, redirects included."""
    stall_seconds: float = 120.0
    """An engine that works on one step for longer is not healthy."""

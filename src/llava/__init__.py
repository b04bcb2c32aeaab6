"""Train, run, serve and measure vision-language assistants of the LLaVA family.

`import llava` costs milliseconds: what needs torch is imported at its first use (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from llava.inference.talk import load as load
    from llava.prompt.conversation import Conversation as Conversation
    from llava.prompt.conversation import Image as Image
    from llava.prompt.conversation import Message as Message
    from llava.prompt.conversation import Text as Text

_HOME = {
    "load": "llava.inference.talk",
    "Conversation": "llava.prompt.conversation",
    "Message": "llava.prompt.conversation",
    "Image": "llava.prompt.conversation",
    "Text": "llava.prompt.conversation",
}
__all__ = ["Conversation", "Image", "Message", "Text", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llava' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)

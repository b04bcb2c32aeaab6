"""What every test starts from."""

from __future__ import annotations

import signal

# A shell that starts a command in the background has it ignore Ctrl-C, and its children too; tests send Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

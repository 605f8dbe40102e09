"""The child's side of a comparison: one runtime in its own process, asked by lines of JSON.

Each runtime then has its own interpreter, imports and memory, and computes only while it is asked.
Knows the questions and the process; knows no runtime, no MLX and nothing outside the standard
library, as it is imported by other people's Python (`peer_process.py` says how).

A request is {"do": NAME, ...}, its reply one line: {"done": {...}} or {"error": TEXT}. Names are
those of `Peer`'s methods and `quit`; the end of the input quits too.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from fastvlm_mlx.bench.peer import Peer, Work

STARTED_S = time.monotonic()
"""When the interpreter was up and this file imported: from here on time is the runtime's own."""


def serve(peer: Peer) -> None:
    """Answer requests from standard input until it ends or says `quit`.

    Replies go to the standard output this process was started with; what anything else prints
    there goes to standard error.
    """
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        for line in sys.stdin:
            request = json.loads(line)
            if request["do"] == "quit":
                return
            _reply(replies, lambda request=request: _done(peer, request))  # type: ignore[misc]


def _reply(replies: TextIO, work: Callable[[], Any]) -> None:
    try:
        reply = {"done": work()}
    except Exception as error:  # whatever it is, the parent is told and decides
        traceback.print_exc()
        text = str(error).strip().splitlines()
        reply = {"error": f"{type(error).__name__}: {text[0] if text else 'no message'}"}
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


def _done(peer: Peer, request: dict[str, Any]) -> Any:
    """Do what one request asks; dataclasses become objects."""
    do = request.pop("do")
    if do == "memory":
        return peer.memory() | process_memory()
    if do == "about":
        return asdict(peer.about())
    if do == "load":
        loaded = peer.load(request["model"], dtype=request["dtype"], device=request["device"])
        return asdict(loaded) | {"started_s": STARTED_S}
    work = Work(**request["work"])
    if do == "profile":
        return peer.profile(work)
    if do == "ttft":
        reset_peak()
    ask: Callable[[Work], Any] = getattr(peer, do)
    return asdict(ask(work))


def process_memory() -> dict[str, int]:
    """Return `resident_bytes`, and on Linux `peak_resident_bytes` since `reset_peak`."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        names = {"resident_bytes": "VmRSS", "peak_resident_bytes": "VmHWM"}
        return {name: int(lines[theirs].split()[0]) * 1024 for name, theirs in names.items()}
    import subprocess  # not before it is needed: a cold start is timed with this file in it

    said = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True)
    return {"resident_bytes": int(said.stdout) * 1024} if said.stdout.strip() else {}


def reset_peak() -> None:
    """Let the peak of resident memory begin anew, where the system can (proc(5), clear_refs 5)."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")

"Where the program waits for the GPU, by the line of Python that was running."
import linecache
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

OURS = "/rlhf_nb/"
INSTALLED = Path(torch.__file__).parents[1]
LIBRARIES = "/transformers/", "/accelerate/", "/peft/", "/trl/", "/torch/optim/", "/torch/amp/", "/torch/nn/utils/"


def place(file: str, line: int) -> str:
    "A line as a reader would look it up."
    short = file.removeprefix(f"{INSTALLED}/")
    if OURS in short: short = short[short.rindex(OURS) + 1:]
    return f"{short}:{line} {linecache.getline(file, line).strip()[:90]}"


def is_followed(frame) -> bool:
    return any(part in frame.f_code.co_filename for part in (OURS, *LIBRARIES))


class Waits:
    "Counts waits while a function runs; what was counted since the last line of Python belongs to that line."
    def __init__(self):
        import pretend_gpu
        self.counts = pretend_gpu.counts
        self.found: Counter[tuple[str, str]] = Counter() # By place and kind
        self.last = ("?", 0)

    def note(self):
        for name, n in self.counts().items():
            if name.startswith("wait "): self.found[place(*self.last), name.removeprefix("wait ")] += n

    def trace(self, frame, event, argument):
        if event == "call" and not is_followed(frame): return None
        self.note()
        if event == "return": frame = frame.f_back # Its line goes on
        if frame and is_followed(frame): self.last = frame.f_code.co_filename, frame.f_lineno
        return self.trace

    def during(self, work: Callable):
        "The result of the work."
        before = sys.gettrace()
        self.counts()
        sys.settrace(self.trace)
        threading.settrace(self.trace)
        try: result = work()
        finally:
            sys.settrace(before)
            threading.settrace(None)
        self.note()
        return result


def waits(work: Callable) -> Counter: # By place and kind
    "Every wait of some work."
    torch.cuda.synchronize()
    counted = Waits()
    counted.during(work)
    return counted.found


def listed(found: Counter) -> str:
    "As lines for a message, the most frequent first."
    return "\n".join(f"{n:5} {kind}: {where}" for (where, kind), n in found.most_common() if n)

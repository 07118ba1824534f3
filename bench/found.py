"""What the steps of gpu.py share: arguments, a deadline, and findings that are on disk as soon as they are made."""
import argparse
import json
import platform
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

LIBRARIES = "torch", "transformers", "trl", "peft", "accelerate", "datasets"


def on_gpu() -> bool:
    "Is there one, be it a pretended one?"
    return torch.cuda.is_available()


def card() -> str:
    "Name of the GPU, or CPU."
    return torch.cuda.get_device_name() if on_gpu() else "CPU"


def facts() -> dict[str, Any]:
    "Card, versions and date."
    told = dict(
        cuda=on_gpu(),
        card=card(),
        pretended=card().startswith("pretended"),
        date=date.today().isoformat(),
        python=platform.python_version(),
    )
    if on_gpu(): told |= dict(memory=torch.cuda.get_device_properties(0).total_memory, cuda_version=torch.version.cuda)
    return told | dict(versions={name: version(name) for name in LIBRARIES} | dict(torch=torch.__version__))


def first_words(error: BaseException, most: int = 200) -> str:
    "An error in one line."
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:most]


def wait():
    "Until the GPU has done what it was told."
    if on_gpu(): torch.cuda.synchronize()


def timed(work: Callable[[], Any]) -> tuple[Any, float]: # What it returns, and seconds
    "Run it, and wait for the GPU before and after."
    wait()
    start = time.perf_counter()
    result = work()
    wait()
    return result, time.perf_counter() - start


def arguments(doc: str) -> argparse.ArgumentParser:
    "The arguments that all steps take."
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("out", type=Path, help="JSON file for what is found")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few updates")
    parser.add_argument("--seconds", type=float, default=600, help="time that the step has")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"), help="folder for models, kept between steps")
    return parser


class Found:
    "Findings of a step: `table` has a dict per row, `figures` is the sentence for the summary."

    def __init__(self, args: argparse.Namespace): # From `arguments`
        self.out = args.out
        since = time.time() - psutil.Process().create_time() # Imports take their time, too
        self.end = time.monotonic() + args.seconds - since
        self.told: dict[str, Any] = dict(figures="", table=[], notes=[], problems=[], lacking=[])
        self.write()

    def write(self, **values):
        "Add values, and write the file."
        self.told |= values
        new = self.out.with_suffix(".new")
        new.write_text(json.dumps(self.told, indent=1, default=str) + "\n")
        new.replace(self.out)

    def row(self, **values):
        "Add a row to the table."
        self.told["table"].append(values)
        self.write()
        print(values, flush=True)

    def note(self, text: str):
        "Add what a reader has to know."
        self.told["notes"].append(text)
        self.write()
        print(text, flush=True)

    def left(self) -> float: # Seconds
        "Time until the step must be done."
        return self.end - time.monotonic()

    def has(self, seconds: float, what: str) -> bool:
        "Is so much time left? If not, a note says what is left out."
        if self.left() >= seconds: return True
        self.note(f"{what}: left out for lack of time")
        return False

    @contextmanager
    def attempt(self, what: str, ours: bool = True) -> Iterator[None]:
        "Note an error inside, and go on; the step fails in the end, or only lacks something if the error is not ours."
        try: yield
        except Exception as error:
            traceback.print_exc()
            if ours: self.told["problems"].append(f"{what}: {first_words(error)}")
            else: self.told["lacking"].append(f"{what} ({type(error).__name__})")
            self.note(f"{what}: {first_words(error)}")

    def exit_status(self) -> int:
        "1 if something failed that must not."
        return 1 if self.told["problems"] else 0


class Until(TrainerCallback):
    "Ends a run after the update in which its time runs out."

    def __init__(self, end: float): # As `time.monotonic` tells it
        self.end = end

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= time.monotonic() > self.end


if __name__ == "__main__": print(json.dumps(facts()))

"Runs of the program, or of Python code, in several processes without a launcher, forked from this one: a JSON line in for each run, one out"
import json
import os
import signal # For a case's code
import socket
import sys
import time
import traceback
from pathlib import Path

import torch

from rlhf_nb import cli

torch.set_num_threads(1)
MAKE = cli.make_trainer


def judge(prompts, completions, trainer_state, **columns):
    "A reward function that misbehaves in one update of one process."
    if trainer_state.global_step + 1 == CASE["update"] and os.environ["RANK"] == str(CASE["rank"]): exec(CASE["what"], globals())
    return [float(len(c)) for c in completions]


def one(case: dict, rank: int, port: int, out: Path) -> int: # Process id
    "One of the processes."
    if pid := os.fork(): return pid
    file = os.open(out/f"said{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for fd in (1, 2): os.dup2(file, fd)
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(case["world"]), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1") | case["env"]
    status, sys.argv[1:] = 0, case["flags"]
    try:
        if case["code"]: exec(case["code"], dict(__name__="__main__"))
        elif case["what"]: launched(case, case["flags"])
        else: cli.main(case["flags"])
    except SystemExit as e: status = e.code
    except BaseException:
        status = 1
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr): stream.flush()
        os._exit(status)


def launched(case: dict, flags: list[str] | None = None): # Default: the program's own
    "In a process that a launcher has made."
    global CASE
    CASE, cli.make_trainer = case, lambda *args: MAKE(*args, judge)
    cli.main(flags)


def run(case: dict) -> dict: # status and said, by process; seconds until the last one ended
    "All of them, until they have ended."
    out, start = Path(case["out"]), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as s:
        s.bind(("", 0))
        if case["port_in_use"]: s.listen()
        port = s.getsockname()[1]
        if not case["port_in_use"]: s.close()
        every = [one(case, rank, port, out) for rank in range(case["world"])]
        ended = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in every]
    return dict(status=ended, said=[(out/f"said{rank}").read_text() for rank in range(case["world"])], seconds=time.monotonic() - start)


if __name__ == "__main__":
    for line in sys.stdin: print(json.dumps(run(json.loads(line))), flush=True)

"""Runs of the program, or of Python code, in several processes, as torchrun would start and end them.

The processes are forked from this one, which has imported everything: a JSON line in for each run, one out.
"""
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from torch.distributed import TCPStore

from rlhf_nb import cli, program

torch.set_num_threads(1)
MAKE = cli.make_trainer
GRACE = 5 # Seconds between SIGTERM and SIGKILL; torchrun's are 30


def judge(prompts, completions, trainer_state, **columns):
    "A reward function that misbehaves in one update of one process."
    mine = os.environ["RANK"] == str(CASE["rank"])
    if mine and trainer_state.global_step + 1 == CASE["update"]: exec(CASE["what"], globals())
    return [float(len(c)) for c in completions]


def launched(case: dict, flags: list[str] | None = None): # Default: the program's own
    "In a process that a launcher has made."
    global CASE
    CASE, cli.make_trainer = case, lambda *args: MAKE(*args, judge)
    program.main(flags)


def start(case: dict, rank: int, port: int, out: Path) -> int: # Process id
    "One of the processes."
    if pid := os.fork(): return pid
    file = os.open(out/f"said{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for fd in (1, 2): os.dup2(file, fd)
    world = str(case["world"])
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    os.environ |= dict(TORCHELASTIC_RUN_ID="none", TORCHELASTIC_RESTART_COUNT="0", TORCHELASTIC_USE_AGENT_STORE="True",
                       TORCHELASTIC_ERROR_FILE=str(out/f"error{rank}.json")) | case["env"]
    status, sys.argv[1:] = 0, case["flags"]
    try:
        if case["code"]: exec(case["code"], dict(__name__="__main__"))
        elif case["what"]: launched(case, case["flags"])
        else: program.main(case["flags"])
    except SystemExit as e: status = e.code
    except BaseException:
        status = 1
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr): stream.flush()
        os._exit(status)


def end(pids: list[int]) -> list[int]: # The exit status of each
    "Wait for all; when one fails, end the others."
    status, failed = {}, None
    while len(status) < len(pids):
        for pid in pids:
            if pid not in status and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                status[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        left = [pid for pid in pids if pid not in status]
        if failed is None and any(status.values()):
            failed = time.monotonic()
            for pid in left: os.kill(pid, signal.SIGTERM)
        elif failed is not None and time.monotonic() > failed + GRACE:
            for pid in left: os.kill(pid, signal.SIGKILL)
        time.sleep(.1)
    return [status[pid] for pid in pids]


def run(case: dict) -> dict: # status and said, by process; seconds until the last one ended
    "All processes of a case."
    out, begin = Path(case["out"]), time.monotonic()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ended = end([start(case, rank, store.port, out) for rank in range(case["world"])])
    errors = [json.loads(p.read_text())["message"]["message"] for p in sorted(out.glob("error*.json"))]
    said = [(out/f"said{rank}").read_text() for rank in range(case["world"])]
    return dict(status=ended, said=said, errors=errors, seconds=time.monotonic() - begin)


if __name__ == "__main__":
    for line in sys.stdin: print(json.dumps(run(json.loads(line))), flush=True)

"One of several processes is killed, fails or hangs: all end, with one message and a checkpoint that is whole."
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_cli import history, short, untimed
from test_shards import FSDP

from rlhf_nb.checkpoint import damage

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no_python"]
JUDGE = "Reward judge failed on the prompt 'Below"


def flags(tiny, out, *more):
    settings = """--batch_size 2 --mini_batch_size 1 --num_ppo_epochs 1 --max_steps 4 --save_steps 2 --log_with none
        --ddp_timeout 60"""
    return short(*tiny, out, *settings.split(), *more)


def message(found) -> str:
    "Our last words, of all processes; there must be one line, which torchrun's summary has, too."
    lines = "".join(found["said"]).splitlines()
    said, = [line for line in lines if re.match(r"rlhf-nb train:|[\w.]*(Error|Exception|Lost)\b", line)]
    assert 0 not in found["status"] and said.removeprefix("rlhf-nb train: ") in found["errors"], found
    assert found["seconds"] < 20, found
    return said


def result(out):
    folder = out/"checkpoint-4"
    adapter, value_head = load_file(folder/"adapter_model.safetensors"), load_file(folder/"value_head.safetensors")
    return [*map(untimed, history(out))], adapter | value_head


def same(a, b): return a[0] == b[0] and a[1].keys() == b[1].keys() and all(torch.equal(a[1][k], b[1][k]) for k in a[1])


@pytest.fixture(scope="module")
def run(tiny, ranks): return lambda out, *more, **what: ranks(*flags(tiny, out, *more), **dict(what="pass") | what)


@pytest.fixture(scope="module")
def straight(run, tmp_path_factory):
    "What a run gives that nothing happens to."
    found = run(out := tmp_path_factory.mktemp("straight")/"run")
    assert found["status"] == [0, 0], found
    return result(out)


def resumes(run, out, straight):
    found = run(out, "--resume_from_checkpoint", True)
    return found["status"] == [0, 0] and same(result(out), straight)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_process_is_killed(run, straight, tmp_path, rank):
    found = run(tmp_path, update=4, rank=rank, what="os.kill(os.getpid(), signal.SIGKILL)")
    said = message(found)
    assert found["status"][rank] == -9
    assert said.startswith("rlhf-nb train: Another process has ended, killed perhaps for memory (")
    assert said.endswith(f"{tmp_path}/checkpoint-2 is whole: resume_from_checkpoint=True continues from it")
    assert damage(tmp_path/"checkpoint-2") is None and resumes(run, tmp_path, straight)


@pytest.mark.slow
def test_a_process_with_its_shard_of_the_weights_is_killed(run, straight, tmp_path):
    found = run(tmp_path, update=4, what="os.kill(os.getpid(), signal.SIGKILL)", env=FSDP)
    assert found["status"][1] == -9 and f"{tmp_path}/checkpoint-2 is whole" in message(found)
    assert run(tmp_path, "--resume_from_checkpoint", True)["status"] == [0, 0]
    weights = result(tmp_path)[1]
    assert max((weights[k] - straight[1][k]).abs().max() for k in weights) < 1e-5


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_reward_function_fails_in_one_process(run, straight, tmp_path, rank):
    found = run(tmp_path, update=4, rank=rank, what="raise ConnectionError('it is down')")
    said = message(found)
    assert JUDGE in said and said.endswith("ConnectionError: it is down")
    assert said in found["said"][rank] and found["status"][rank] == 2
    assert damage(tmp_path/"checkpoint-2") is None and resumes(run, tmp_path, straight)


@pytest.mark.slow
def test_a_reward_function_hangs_in_one_process(run, tmp_path):
    found = run(tmp_path/"limited", "--reward_timeout", .5, update=2, what="time.sleep(100)")
    assert "Reward judge took more than 0.5 s for 2 prompts" in message(found)
    found = run(tmp_path/"unlimited", "--ddp_timeout", 2, "--save_steps", 1, rank=0, update=2, what="time.sleep(100)")
    said = message(found)
    assert said.startswith("rlhf-nb train: Another process did not answer within ddp_timeout=2 s")
    assert f"{tmp_path}/unlimited/checkpoint-1 is whole" in said


def test_an_evaluation_fails_in_one_process(run, tmp_path):
    for more in ([], ["--do_train", False]):
        found = run(tmp_path, "--do_eval", *more, update=1, what="raise KeyError('grade')")
        assert "KeyError: 'grade'" in message(found)


NO_MEMORY = """
import torch, rlhf_nb.models as m
plain, tried = m.ActorCritic.forward, []
def full(self, *args, **kw):
    tried.append(1)
    if {when}: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate everything.")
    return plain(self, *args, **kw)
m.ActorCritic.forward = full
"""


@pytest.mark.slow
def test_one_process_has_no_memory(run, tmp_path):
    found = run(tmp_path/"none", update=2, what=NO_MEMORY.format(when="True"))
    said = message(found)
    assert "Out of memory with one row at a time" in said and said in found["said"][1]
    found = run(tmp_path/"some", "--mini_batch_size", 2, update=2, what=NO_MEMORY.format(when="len(tried) == 1"))
    assert found["status"] == [0, 0]


def test_bad_input_is_said_once(run, tmp_path):
    assert "batch_sise is unknown (did you mean batch_size?)" in message(run(tmp_path/"0", "--batch_sise", 2))
    assert "nowhere" in message(run(tmp_path/"1", "--train_file_dir", tmp_path/"nowhere"))


LATE = """
import os
from rlhf_nb import cli, program
make = cli.PPOTrainer
def broken(**how):
    make(**how)
    raise ValueError("it is broken")
if os.environ["RANK"] == "1": cli.PPOTrainer = broken
program.main()
"""


def test_one_process_fails_at_the_end_of_the_start(run, tmp_path):
    assert message(run(tmp_path, code=LATE)) == "rlhf-nb train: it is broken"


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_to_one_process_stops_all_after_the_update(run, straight, tmp_path, number):
    found = run(tmp_path, update=3, what=f"os.kill(os.getpid(), {int(number)})")
    assert found["status"] == [128 + number] * 2 and not found["errors"]
    assert "Stopped after update 3" in found["said"][0] and not found["said"][1]
    assert damage(tmp_path/"checkpoint-3") is None and (number == signal.SIGINT or resumes(run, tmp_path, straight))


def launched(*flags, program=(Path(sys.executable).parent/"rlhf-nb",)):
    "Under torchrun."
    command = [*LAUNCH, *program, *map(str, flags)]
    env = os.environ | dict(OMP_NUM_THREADS="1")
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def workers(parent) -> list[int]: # By rank
    "The launcher's processes."
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


@pytest.mark.slow
def test_under_the_launcher(tiny, tmp_path):
    launcher = launched(*flags(tiny, tmp_path/"run", "--max_steps", 1000, "--save_steps", 1, "--save_total_limit", 2))
    while not (tmp_path/"run"/"checkpoint-1").exists(): time.sleep(.1)
    os.kill(workers(launcher.pid)[1], signal.SIGKILL)
    said = launcher.communicate(timeout=60)[0]
    print(said)
    newest = max(int(p.name.split("-")[1]) for p in (tmp_path/"run").glob("checkpoint-*"))
    assert launcher.returncode and damage(tmp_path/"run"/f"checkpoint-{newest}") is None
    assert said.count("rlhf-nb train:") == 1 and "rlhf-nb train: Another process has ended" in said
    assert f"checkpoint-{newest} is whole" in said


@pytest.mark.slow
def test_the_launchers_summary_has_the_cause(tiny, tmp_path):
    code = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import ranks
ranks.launched(dict(rank=1, update=2, what="raise ConnectionError()"))
"""
    launcher = launched(*flags(tiny, tmp_path/"run"), program=[sys.executable, "-c", code, ROOT/"tests"])
    said = launcher.communicate(timeout=60)[0]
    print(said)
    assert launcher.returncode == 1 and said.count("rlhf-nb train:") == 1
    assert f"traceback : {JUDGE}" in said.split("Root Cause")[1]

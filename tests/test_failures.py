"Several processes: one is killed, fails, hangs or has no memory. All end, soon, with one message and a checkpoint that is whole."
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
from test_cli import history, short
from test_shards import FSDP

from rlhf_nb.checkpoint import damage

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no_python"]
JUDGE = "Reward judge failed on the prompt 'Below"


def flags(tiny, out, *more):
    return short(*tiny, out, "--batch_size", 2, "--mini_batch_size", 1, "--num_ppo_epochs", 1, "--max_steps", 4, "--save_steps", 2, "--log_with", "none", "--ddp_timeout", 60, *more)


def ours(found) -> list[str]:
    "Our last words, of both processes."
    return [line for said in found["said"] for line in said.splitlines() if re.match(r"rlhf-nb train:|[\w.]*(Error|Elsewhere|Lost)\b", line)]


def result(out):
    timeless = lambda d: {k: v for k, v in d.items() if not k.startswith(("time", "tokens/second"))}
    return [*map(timeless, history(out))], load_file(out/"checkpoint-4"/"adapter_model.safetensors") | load_file(out/"checkpoint-4"/"value_head.safetensors")


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


def test_a_process_is_killed(run, straight, tmp_path):
    found = run(tmp_path, update=4, what="os.kill(os.getpid(), signal.SIGKILL)")
    assert found["status"] == [1, -9] and found["seconds"] < 20
    assert ours(found) == [f"rlhf-nb train: Process 1 of 2 is gone in score of update 4: killed, perhaps for memory. {tmp_path}/checkpoint-3 is whole: --resume_from_checkpoint True goes on"]
    assert damage(tmp_path/"checkpoint-3") is None and resumes(run, tmp_path, straight)


def test_the_main_process_is_killed(run, straight, tmp_path):
    found = run(tmp_path, rank=0, update=4, what="os.kill(os.getpid(), signal.SIGKILL)")
    said, = ours(found)
    assert found["status"] == [-9, 1] and found["seconds"] < 20 and said.startswith("rlhf-nb train: Process 0 of 2 is gone") and "checkpoint-2 is whole" in said
    assert resumes(run, tmp_path, straight)


def test_a_process_with_its_part_of_the_weights_is_killed(run, straight, tmp_path):
    found = run(tmp_path, update=4, what="os.kill(os.getpid(), signal.SIGKILL)", env=FSDP)
    said, = ours(found)
    assert found["status"] == [1, -9] and found["seconds"] < 20 and "Process 1 of 2 is gone in score of update 4" in said and f"{tmp_path}/checkpoint-2 is whole" in said
    assert run(tmp_path, "--resume_from_checkpoint", True)["status"] == [0, 0]
    weights = result(tmp_path)[1]
    assert max((weights[k] - straight[1][k]).abs().max() for k in weights) < 1e-5


def test_a_reward_function_fails_in_one_process(run, straight, tmp_path):
    found = run(tmp_path, update=4, what="raise ConnectionError('it is down')")
    said, = ours(found)
    assert found["status"] == [2, 2] and JUDGE in said and said.endswith("ConnectionError: it is down") and said in found["said"][1]
    assert "Saved checkpoint-3" in found["said"][0] and damage(tmp_path/"checkpoint-3") is None and resumes(run, tmp_path, straight)


def test_a_reward_function_hangs_in_one_process(run, tmp_path):
    found = run(tmp_path/"limited", "--reward_timeout", .5, update=2, what="time.sleep(100)")
    said, = ours(found)
    assert found["status"] == [2, 2] and "Reward judge took more than 0.5 s for 2 prompts" in said and damage(tmp_path/"limited"/"checkpoint-1") is None
    found = run(tmp_path/"unlimited", "--ddp_timeout", 2, rank=0, update=2, what="time.sleep(100)")
    said, = ours(found)
    assert found["status"] == [1, 1] and said in found["said"][1]
    assert f"Process 0 of 2 is still in score of update 2; the others have waited ddp_timeout=2 s in step of update 2. {tmp_path}/unlimited/checkpoint-1 is whole" in said


def test_an_evaluation_fails_in_one_process(run, tmp_path):
    for more in ([], ["--do_train", False]):
        found = run(tmp_path, "--do_eval", *more, update=1, what="raise KeyError('grade')")
        assert found["status"] == [2, 2] and len(ours(found)) == 1 and "KeyError: 'grade'" in found["said"][1]


NO_MEMORY = "import torch, rlhf_nb.models as m\nplain, tried = m.ActorCritic.forward, []\ndef full(self, *args, **kw):\n    tried.append(1)\n    if {when}: raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate everything.')\n    return plain(self, *args, **kw)\nm.ActorCritic.forward = full"


def test_one_process_has_no_memory(run, straight, tmp_path):
    found = run(tmp_path/"none", update=2, what=NO_MEMORY.format(when="True"))
    said, = ours(found)
    assert found["status"] == [1, 1] and "Out of memory with one answer at a time" in said and said in found["said"][1]
    found = run(tmp_path/"some", "--mini_batch_size", 2, update=2, what=NO_MEMORY.format(when="len(tried) == 1"))
    assert found["status"] == [0, 0] and not ours(found)


def test_the_port_is_in_use(run, tmp_path):
    found = run(tmp_path, "--ddp_timeout", 2, port_in_use=True)
    said = found["said"][0].splitlines()
    assert found["status"] == [2, 2] and found["seconds"] < 20
    assert len(said) == 1 and "the port is in use. Set MASTER_PORT to a free one" in said[0] and "did not find each other within 2 s" in found["said"][1]


def test_bad_input_is_said_once(run, tmp_path):
    for n, more, text in ((0, ["--batch_sise", 2], "unknown setting --batch_sise; did you mean --batch_size?"), (1, ["--train_file_dir", tmp_path/"nowhere"], "nowhere")):
        found = run(tmp_path/f"{n}", *more)
        said, = ours(found)
        assert found["status"] == [2, 2] and text in said and found["seconds"] < 20


LATE = """
import os
from rlhf_nb import cli
make = cli.PPOTrainer
def broken(*args):
    make(*args)
    raise ValueError("it is broken")
if os.environ["RANK"] == "1": cli.PPOTrainer = broken
cli.main()
"""


def test_one_process_fails_at_the_end_of_the_start(run, tmp_path):
    found = run(tmp_path, code=LATE)
    assert found["status"] == [2, 2] and ours(found) == ["rlhf-nb train: it is broken"] and found["seconds"] < 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_one_process_stops_all_after_the_update(run, straight, tmp_path, number):
    found = run(tmp_path, update=3, what=f"os.kill(os.getpid(), {int(number)})")
    assert found["status"] == [128 + number] * 2 and not ours(found) and "Stopped after update 3" in found["said"][0] and not found["said"][1]
    assert damage(tmp_path/"checkpoint-3") is None and (number == signal.SIGINT or resumes(run, tmp_path, straight))


def launched(*flags, program=(Path(sys.executable).parent/"rlhf-nb",)):
    "Under torchrun."
    return subprocess.Popen([*LAUNCH, *program, *map(str, flags)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))


def workers(parent) -> list[int]: # By rank
    "The launcher's processes."
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def test_under_the_launcher(tiny, tmp_path):
    launcher = launched(*flags(tiny, tmp_path/"run", "--max_steps", 1000, "--save_steps", 1, "--save_total_limit", 2))
    while not (tmp_path/"run"/"checkpoint-1").exists(): time.sleep(.1)
    os.kill(workers(launcher.pid)[1], signal.SIGKILL)
    said = launcher.communicate(timeout=60)[0]
    print(said)
    newest = max(int(p.name.split("-")[1]) for p in (tmp_path/"run").glob("checkpoint-*"))
    assert launcher.returncode and damage(tmp_path/"run"/f"checkpoint-{newest}") is None
    assert said.count("rlhf-nb train:") == 1 and "rlhf-nb train: Process 1 of 2 is gone" in said and f"checkpoint-{newest} is whole" in said


@pytest.mark.slow
def test_the_launchers_summary_has_the_cause(tiny, tmp_path):
    program = [sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv.pop(1)); import ranks; ranks.launched(dict(rank=1, update=2, what='raise ConnectionError()'))", ROOT/"tests"]
    launcher = launched(*flags(tiny, tmp_path/"run"), program=program)
    said = launcher.communicate(timeout=60)[0]
    print(said)
    assert launcher.returncode == 1 and said.count("rlhf-nb train:") == 1 and "exitcode  : 2" in said and "exitcode  : 1 " not in said and "-15" not in said
    assert f"traceback : {JUDGE}" in said.split("Root Cause")[1] and "Saved checkpoint-1" in said

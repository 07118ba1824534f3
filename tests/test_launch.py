"Several processes: our files for Accelerate, and the three ways to start them."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import _validate_launch_command
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from test_cli import run, short
from test_ranks import same_run
from torch.distributed.fsdp import OffloadPolicy
from torch.distributed.fsdp.fully_sharded_data_parallel import StateDictType

from rlhf_nb.cli import CONFIGS, train_settings
from rlhf_nb.testing import tiny_run

BIN = Path(sys.executable).parent


def surroundings(name):
    "The environment that Accelerate gives each process."
    told, _, _ = _validate_launch_command(train_settings(["--accelerate_config", name, "--num_processes", "2"])[1])
    told.deepspeed_fields_from_accelerate_config = ""
    return prepare_deepspeed_cmd_env(told)[1] if told.use_deepspeed else prepare_multi_gpu_env(told)


KINDS = dict(ddp="MULTI_GPU", fsdp2="FSDP", zero2="DEEPSPEED", zero3="DEEPSPEED")


@pytest.mark.parametrize("name, kind", KINDS.items())
def test_accelerate_reads_our_files(name, kind):
    config = load_config_from_file(str(CONFIGS[name]))
    assert (config.distributed_type, config.mixed_precision, config.num_processes) == (kind, None, -1)


def test_fsdp2_is_what_the_file_says():
    with patch_environment(**surroundings("fsdp2")): plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert not (plugin.cpu_ram_efficient_loading or plugin.activation_checkpointing)
    assert type(plugin.cpu_offload) is OffloadPolicy


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_is_what_the_file_says(stage):
    with patch_environment(**surroundings(f"zero{stage}")): plugin = DeepSpeedPlugin()
    assert (plugin.zero_stage, plugin.gradient_accumulation_steps, plugin.zero3_init_flag) == (stage, 1, False)
    zero = plugin.deepspeed_config["zero_optimization"]
    assert (zero["offload_optimizer"]["device"], zero["offload_param"]["device"]) == ("none", "none")


@pytest.mark.parametrize("launcher, said, used", [("bf16", False, "no"), ("no", True, "bf16"), ("bf16", None, "bf16")])
def test_the_launchers_precision_counts_where_the_settings_say_nothing(launcher, said, used, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    assert tiny_run(output_dir=tmp_path, bf16=said).accelerator.mixed_precision == used


def flags(tiny, out, rows, *more):
    settings = "--save_steps 2 --adam_epsilon 1e-3 --log_with none"
    return short(*tiny, out, "--batch_size", rows, "--mini_batch_size", rows // 2, *settings.split(), *more)


@pytest.fixture(scope="module")
def one(tiny, tmp_path_factory):
    "A run of one process with the batch of two."
    out = tmp_path_factory.mktemp("one")
    run(*flags(tiny, out, 8))
    return out


def same(two, one):
    same_run(one, two)
    assert json.loads((two/"run.json").read_text())["machine"]["processes"] == 2


@pytest.fixture
def own_signals():
    "torch's launcher leaves its handlers in the process that called it."
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items(): signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.usefixtures("own_signals")
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_our_program_starts_processes(name, tiny, one, tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    config = tmp_path/"run.yaml"
    config.write_text(f"accelerate_config: {name}\nnum_processes: 2\n")
    run(*flags(tiny, tmp_path/"two", 4, "--config", config, "--cpu", "--main_process_port", 0))
    said = capfd.readouterr()
    assert (said.out + said.err).count("Saved to") == 1 and ("FSDP2 on 2 processes" in said.err) == (name == "fsdp2")
    assert os.environ.pop("ACCELERATE_USE_CPU") == "true"
    same(tmp_path/"two", one)


STARTERS = ["torchrun --standalone --nproc_per_node 2".split(),
            f"accelerate launch --config_file {CONFIGS['ddp']} --num_processes 2 --main_process_port 0".split()]


@pytest.mark.slow
@pytest.mark.parametrize("starter", STARTERS, ids=lambda s: s[0])
def test_others_start_processes_of_our_program(starter, tiny, one, tmp_path):
    command = [BIN/starter[0], *starter[1:], "-m", "rlhf_nb", *map(str, flags(tiny, tmp_path/"two", 4))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and (done.stdout + done.stderr).count("Saved to") == 1, done.stdout + done.stderr
    same(tmp_path/"two", one)


def test_what_is_wrong_is_said_once_before_anything_starts(tiny, one, capfd):
    with pytest.raises(SystemExit) as stop:
        run(*flags(tiny, one, 4, "--accelerate_config", "ddp", "--num_processes", 2))
    err = capfd.readouterr().err
    assert stop.value.code == 2 and "holds an earlier run" in err and len(err.strip().splitlines()) == 1


def test_torchrun_and_a_configuration_for_accelerate_exclude_each_other(tiny, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(SystemExit) as stop: run(*flags(tiny, tmp_path, 4, "--accelerate_config", "ddp"))
    said = capfd.readouterr().err
    assert said == "rlhf-nb train: accelerate_config starts the processes itself: leave out torchrun\n"
    assert stop.value.code == 2


@pytest.mark.slow
def test_a_signal_stops_all_processes_after_the_update(tiny, tmp_path):
    settings = "--max_steps 100 --save_steps 0 --accelerate_config ddp --num_processes 2 --main_process_port 0"
    command = [BIN/"rlhf-nb", *map(str, flags(tiny, tmp_path, 4, *settings.split()))]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not list(tmp_path.glob("completions/*")):
        time.sleep(.05)
        assert program.poll() is None, program.stdout.read()
    program.send_signal(signal.SIGTERM)
    said = program.communicate(timeout=60)[0]
    assert program.returncode == 143 and "Stopped after update" in said, said
    assert list(tmp_path.glob("checkpoint-*"))

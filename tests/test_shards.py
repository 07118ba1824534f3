"FSDP2 on two processes trains like one process; what it writes does not tell."
import pandas as pd
import pytest
from safetensors.torch import load_file
from test_cli import history, run
from test_ranks import SAME, flags, two_ranks

FSDP = dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")


def same_run(one, two):
    "Log, weights and answers of two runs agree."
    for a, b in zip(history(two), history(one), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() & set(SAME) | {k for k in a if k.startswith("eval/")}: assert a[name] == pytest.approx(b[name], rel=1e-4, abs=2e-5), name
    files = [p.relative_to(one) for p in sorted(one.rglob("*.safetensors")) if "state" not in p.name and "checkpoint" not in str(p)]
    assert len(files) >= 2
    for file in files:
        x, y = load_file(two/file), load_file(one/file)
        assert x.keys() == y.keys() and max((x[k] - y[k]).abs().max() for k in y) < 1e-5, file
    for file in sorted(one.glob("completions/*.parquet")):
        x, y = (pd.read_parquet(run/"completions"/file.name) for run in (two, one))
        assert x[["prompt", "completion", "length"]].equals(y[["prompt", "completion", "length"]]), file.name


@pytest.mark.parametrize("more", [[], ["--critic", "adapter", "--ent_coef", .01, "--gradient_checkpointing", "--gather_for_generation", False, "--rollout_batch_size", 3],
                                  ["--use_peft", False, "--ptx_coef", .1]], ids=["plain", "layer-by-layer", "full"])
def test_shards_train_like_one(tiny, tmp_path, more):
    two_ranks(*flags(tiny, tmp_path/"two", 4, *more), **FSDP)
    run(*flags(tiny, tmp_path/"one", 8, *more))
    same_run(tmp_path/"one", tmp_path/"two")


def test_a_run_goes_on_in_any_number_of_processes(tiny, tmp_path):
    from_one, from_two = (lambda *more, rows=rows, out=out: flags(tiny, tmp_path/out, rows, "--lr_scheduler_type", "constant", *more) for rows, out in ((8, "all"), (4, "parts")))
    run(*from_one("--max_steps", 6, "--save_steps", 6))
    said = two_ranks(*from_two("--max_steps", 2, "--save_steps", 2), **FSDP)
    assert "FSDP: this process holds" in said
    on = ["--resume_from_checkpoint", True]
    run(*flags(tiny, tmp_path/"parts", 8, "--max_steps", 4, "--save_steps", 4, *on))
    two_ranks(*from_two("--max_steps", 6, "--save_steps", 6, *on), **FSDP)
    same_run(tmp_path/"all", tmp_path/"parts")

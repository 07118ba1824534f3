"Flags, files and help of the program: the original's names, today's, and what is said about others."
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from test_cli import ORIGINAL

from rlhf_nb import program
from rlhf_nb.chat import ChatArguments, EvalArguments
from rlhf_nb.cli import (
    COMMANDS,
    CONFIGS,
    DEFAULTS,
    DEMO,
    NAMES,
    Parser,
    as_flags,
    demo_settings,
    train_parser,
    train_settings,
)
from rlhf_nb.clinic import CLINIC
from rlhf_nb.config import REFUSED, DataArguments, ModelArguments, PPOConfig
from rlhf_nb.program import OPTIONS, main
from rlhf_nb.program import Parser as Shown

OTHERS = """--tokenizer_name_or_path T --load_in_8bit False --cache_dir C --use_fast_tokenizer True --trust_remote_code
    False --dataset_config_name c --dataset_name N --mini_batch_size 1 --min_target_length 4
    --max_eval_samples 10 --overwrite_cache --validation_split_percentage 5 --preprocessing_num_workers 2
    --target_modules q_proj,v_proj --modules_to_save lm_head --peft_path P --do_eval --init_kl_coef 0.2
    --adap_kl_ctrl True --gradient_accumulation_steps 1 --seed 0 --log_with tensorboard"""


def read(line: str): return train_parser().read(line.split())


def says(line: str, capsys) -> tuple[int, str]: # Exit status, and what was printed
    try: main(line.split())
    except SystemExit as e: status = e.code
    else: status = 0
    said = capsys.readouterr()
    return status, (said.out + said.err).strip()


def test_the_originals_command():
    model, data, args, *_ = read(
        ORIGINAL.format(policy="M", reward="R", data="D", steps=100, save=50, out="outputs-rl-v1")
    )
    assert (model.model_type, model.lora_r, model.lora_alpha, model.lora_dropout, model.use_peft, model.dtype) == (
        "bloom",
        8,
        16,
        0.05,
        True,
        "float16",
    )
    assert (data.max_train_samples, data.train_file_dir, data.validation_file_dir) == (1000, "D", "D")
    assert (
        args.per_device_train_batch_size,
        args.steps_per_generation,
        args.generation_batch_size,
        args.num_iterations,
    ) == (1, 2, 2, 4)
    assert (args.max_prompt_length, args.max_completion_length, args.min_completion_length) == (256, 256, 4)
    assert (args.max_steps, args.save_steps, args.learning_rate, args.output_dir) == (100, 50, 1e-5, "outputs-rl-v1")
    assert (args.early_stopping, args.target_kl, args.reward_baseline, args.beta, args.adap_kl_ctrl) == (
        True,
        0.1,
        0,
        0.2,
        True,
    )
    assert (args.seed, args.report_to, args.lr_scheduler_type, args.logging_steps, args.question_column) == (
        0,
        ["tensorboard"],
        "constant",
        1,
        "question",
    )


def test_the_originals_other_flags():
    model, data, args, *_ = read(OTHERS)
    assert (model.lora_target_modules, model.lora_modules_to_save, model.peft_path) == (
        ["q_proj", "v_proj"],
        ["lm_head"],
        "P",
    )
    assert (data.dataset_name, data.overwrite_cache, data.preprocessing_num_workers, data.max_eval_samples) == (
        "N",
        True,
        2,
        10,
    )
    assert (args.do_eval, args.eval_on_start, args.eval_strategy, args.beta, args.min_completion_length) == (
        True,
        True,
        "no",
        0.2,
        4,
    )


def test_without_flags_a_setting_is_the_programs_or_its_classs():
    model, data, args, *_ = read("")
    own = {name: value for name, value in DEFAULTS.items() if hasattr(args, name) and name != "dtype"} | dict(
        report_to=[], log_completions=False
    )  # Without do_train
    assert {name: getattr(args, name) for name in own} == own
    assert (model.dtype, args.steps_per_generation) == ("auto", 8)
    default = PPOConfig("out")
    changed = {f.name for f in fields(PPOConfig) if getattr(args, f.name) != getattr(default, f.name)}
    assert (
        changed
        <= {
            *DEFAULTS,
            "bf16",
            "steps_per_generation",
            "generation_batch_size",
            "run_name",
            "use_cpu",
            "dataloader_pin_memory",
        }
        and data == DataArguments()
    )


@pytest.mark.parametrize(
    "line, settings",
    [
        (
            "--batch_size 8 --mini_batch_size 2 --gradient_accumulation_steps 2",
            dict(
                per_device_train_batch_size=2,
                steps_per_generation=4,
                generation_batch_size=8,
                gradient_accumulation_steps=2,
            ),
        ),
        ("--per_device_train_batch_size 4 --steps_per_generation 3", dict(generation_batch_size=12)),
        ("--per_device_train_batch_size 4 --generation_batch_size 12", dict(steps_per_generation=3)),
        ("--score_clip 2", dict(reward_clip_range=[-2, 2])),
        (
            "--cliprange .1 --cliprange_high .3 --num_ppo_epochs 2 --rollout_batch_size 3",
            dict(epsilon=0.1, epsilon_high=0.3, num_iterations=2, local_rollout_forward_batch_size=3),
        ),
        ("--gather_for_generation False", dict(ds3_gather_for_generation=False)),
        ("--init_kl_coef 0", dict(beta=0, adap_kl_ctrl=False)),
        ("--do_eval --eval_steps 5", dict(do_eval=True, eval_on_start=True, eval_strategy="steps", eval_steps=5)),
        ("--do_eval --eval_on_start False", dict(do_eval=True, eval_on_start=False)),
        ("--eval_strategy epoch", dict(do_eval=True, eval_on_start=False, eval_strategy="epoch")),
        ("--num_train_epochs 2", dict(max_steps=-1, num_train_epochs=2)),
        ("--torch_dtype bfloat16", dict(bf16=True, fp16=False, mixed_precision="bf16")),
        ("--torch_dtype float32", dict(bf16=False, fp16=False, mixed_precision="no")),
        ("--do_train --log_with none", dict(report_to=[], log_completions=True)),
        (
            "--lora_rank=4 --disable_tqdm --top-k 5 --learning_rate=1e-4",
            dict(disable_tqdm=True, top_k=5, learning_rate=1e-4),
        ),
        (
            "--weight_decay .1 --optim adafactor --logging_first_step",
            dict(weight_decay=0.1, optim="adafactor", logging_first_step=True),
        ),
    ],
)
def test_flags_become_settings(line, settings):
    args = read(line)[2]
    assert {name: getattr(args, name) for name in settings} == settings


@pytest.mark.parametrize(
    "given, wanted",
    [
        ("--target_modules all-linear", "all-linear"),
        ("--lora_target_modules q_proj v_proj", ["q_proj", "v_proj"]),
        ("--target_modules query_key_value", {"query_key_value"}),
        ("--lora_target_modules .*_proj", ".*_proj"),
        ("", None),
    ],
)
def test_layers_to_adapt(given, wanted):
    from rlhf_nb.memory import lora
    modules = lora(read(given)[0]).target_modules
    assert (set(modules) if isinstance(modules, (set, list)) else modules) == (
        set(wanted) if isinstance(wanted, list) else wanted
    )


def test_a_file_and_flags(tmp_path):
    file = tmp_path/"run.yaml"
    file.write_text(
        "learning_rate: 1e-4\nbatch_size: 4\nadap_kl_ctrl: false\nmax_grad_norm: null\nreward_weights: [1, .5]\n"
        "lora_rank: 4\ntarget_modules: q_proj, v_proj\nmodel_init_kwargs:\n  dtype: float32\n"
    )
    model, _, args, *_ = read(f"--config={file} --batch_size 6")
    assert (args.learning_rate, args.generation_batch_size, args.adap_kl_ctrl, args.max_grad_norm) == (
        1e-4,
        6,
        False,
        0,
    )
    assert (args.reward_weights, args.model_init_kwargs, model.lora_r) == ([1, .5], dict(dtype="float32"), 4)
    assert model.lora_target_modules == ["q_proj", "v_proj"]
    assert read(f"--config {file} --lora_r 16")[0].lora_r == 16


@pytest.mark.parametrize(
    "line, text",
    [
        ("--do_train --config", "--config needs a file"),
        ("--learn_rate 1", "learn_rate is unknown (did you mean learning_rate?)"),
        (
            "--batchsize 1 --kl_coef .1 --output_dir x --qqqqq",
            "batchsize is unknown (did you mean batch_size?); kl_coef is beta here; qqqqq is unknown",
        ),
        ("--batch_size two", "invalid int value: 'two'"),
        ("--batch_size 0", "batch_size=0: must be at least 1"),
        ("--mini_batch_size 0", "per_device_train_batch_size=0: must be at least 1 (given as mini_batch_size)"),
        ("--max_target_length -1", "max_completion_length=-1: must be at least 1 (given as max_target_length)"),
        (
            "--batch_size 6 --mini_batch_size 4",
            "batch_size=6 must be a multiple of per_device_train_batch_size=4 (given as mini_batch_size)",
        ),
        ("--batch_size 6 --steps_per_generation 4", "batch_size is another word for steps_per_generation"),
        ("--torch_dtype float8", "invalid choice: 'float8'"),
        ("--torch_dtype float32 --bf16", "dtype=float32, but bf16=True"),
        ("--lora_rank 4 --lora_r 8", "lora_rank and lora_r are one setting: choose 4 or 8"),
        (
            "--target_modules q_proj --lora_target_modules q_proj v_proj",
            "target_modules and lora_target_modules are one setting: choose q_proj or q_proj v_proj",
        ),
        ("--eval_steps 5", "eval_steps=5.0 needs do_eval or eval_strategy"),
        ("stray", "unexpected stray"),
    ],
)
def test_what_is_wrong(line, text):
    with pytest.raises(ValueError) as e: read(line)
    assert text in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "text, said",
    [
        ("learningrate: 1\nkl_coef: 2", "learningrate is unknown (did you mean learning_rate?); kl_coef is beta here"),
        ("lora_rank: 4\nlora_r: 5", "lora_rank and lora_r are one setting: choose 4 or 5"),
        ("- 1", "must be a YAML mapping"),
        ("a: [", "not YAML"),
        ("batch_size: many", "invalid int value"),
        ("learning_rate: [1]", "learning_rate"),
        ("init_kl_coef: -1", "beta=-1: must be 0 or more (given as init_kl_coef)"),
    ],
)
def test_what_is_wrong_in_a_file(tmp_path, text, said):
    file = tmp_path/"run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as e: read(f"--config {file}")
    assert said in str(e.value)


def test_both_names_with_one_value():
    assert read("--lora_rank 4 --lora_r 4")[0].lora_r == 4


def test_help_lists_every_setting():
    text = Shown("train").format_help()
    for name in [
        *NAMES,
        "batch_size",
        *(f.name for c in (ModelArguments, DataArguments, PPOConfig) for f in fields(c)),
    ]:
        assert (f"\n  --{name} " in text) == (name not in REFUSED), name
    assert max(map(len, text.splitlines())) <= 120
    assert (
        "--reward_weights X ..." in text
        and "--save_total_limit N" in text
        and "--critic shared|detached|adapter" in text
    )
    for parser, names in ((Shown("chat"), fields(ChatArguments)), (Shown("eval"), fields(EvalArguments))):
        assert all(f"\n  --{f.name} " in parser.format_help() for f in names)


def test_a_dry_run_prints_what_config_reads(tmp_path, capsys):
    status, text = says("demo --dry_run --lora_rank 4", capsys)
    assert status == 0
    file = tmp_path/"demo.yaml"
    file.write_text(text)
    assert says(f"train --dry_run --config {file}", capsys) == (0, text)
    assert yaml.safe_load(text)["lora_r"] == 4 and yaml.safe_load(text)["beta"] == DEMO["beta"]
    file.write_text(text + "\nmax_grad_norm: null\n")
    assert "max_grad_norm: null" in says(f"train --dry_run --config {file}", capsys)[1]


def test_the_demos_settings():
    (model, data, args, *_), _ = demo_settings([])
    assert (
        args.generation_batch_size,
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        args.num_iterations,
        args.max_steps,
    ) == (64, 64, 1, 2, 100)
    assert (args.beta, args.adap_kl_ctrl, args.lam, args.cliprange_value, args.critic, args.temperature) == (
        0.04,
        False,
        1,
        1,
        "detached",
        0.7,
    )
    assert (
        args.learning_rate,
        args.lr_scheduler_type,
        args.max_completion_length,
        args.min_completion_length,
        args.seed,
    ) == (2e-3, "linear", 48, 0, 0)
    assert (
        args.do_eval,
        args.eval_on_start,
        args.eval_do_sample,
        args.save_steps,
        args.overwrite_output_dir,
        args.mixed_precision,
    ) == (True, True, True, 0, True, "no")
    assert (model.lora_r, model.lora_alpha, model.lora_target_modules, data.train_file_dir) == (
        16,
        32,
        "all-linear",
        str(CLINIC / "train.jsonl"),
    )
    assert not demo_settings(["--output_dir", "mine"])[0][2].overwrite_output_dir
    assert read(" ".join(as_flags(dict(max_steps=7, reward_weights=[1, 0]))))[2].reward_weights == [1, 0]


def test_several_processes():
    settings, told, _ = train_settings("--accelerate_config fsdp2 --num_processes 2 --batch_size 4".split())
    assert (settings[2].generation_batch_size, told.num_processes, told.config_file) == (4, 2, str(CONFIGS["fsdp2"]))
    assert told.training_script_args == "train --accelerate_config fsdp2 --num_processes 2 --batch_size 4".split()
    assert train_settings(["--batch_size", "4"])[1] is None


@pytest.mark.parametrize("line, text", [
    ("--num_processes 2", "num_processes is unknown"),
    ("--accelerate_config ddp --num_process 2", "num_process is unknown"),
    ("--accelerate_config ddp --num_processes two", "invalid int value: 'two'"),
    ("--accelerate_config ddp --num_processes 0", "num_processes=0: must be at least 1"),
    ("--accelerate_config ddp --mixed_precision bf16", "dtype says it here"),
    ("--accelerate_config zero4", "zero4: no such file, and none of ddp, fsdp2, zero2, zero3"),
    (f"--accelerate_config {ROOT/'nbs'/'index.ipynb'}", "Accelerate cannot read it"),
])
def test_wrong_ways_to_start_several_processes(line, text):
    with pytest.raises(ValueError) as e: train_settings(line.split())
    assert text in str(e.value)


@pytest.mark.parametrize(
    "line, text",
    [
        ("train --do_train", "rlhf-nb train: --model_name_or_path is missing"),
        (
            "train --model_name_or_path M --reward_model_name_or_path R",
            "rlhf-nb train: Nothing to do: give --do_train, --do_eval, or both",
        ),
        ("train --max_step 3", "rlhf-nb train: max_step is unknown (did you mean max_steps?)"),
        ("merge --output_dir x", "rlhf-nb merge: --base_model_name_or_path is missing"),
        ("chat", "rlhf-nb chat: the following arguments are required: OUTPUT_DIR"),
        ("report nowhere", "rlhf-nb report: "),
        ("report nowhere --quiet True", "rlhf-nb report: "),
        ("report nowhere --quiet", "rlhf-nb report: "),
        (
            f"plan --gpu A1000 --model_name_or_path {CLINIC}/policy --reward_model_name_or_path {CLINIC}/reward",
            "known are T4, V100,",
        ),
        ("completion perl", "rlhf-nb completion: perl: must be one of bash"),
        ("train --model_name_or_path ./nowhere", "rlhf-nb train: model_name_or_path=./nowhere: no such folder"),
        (
            "train --model_name_or_path M --reward_model_name_or_path R --do_train --train_file_dir X",
            "rlhf-nb train: X: no such file or folder",
        ),
    ],
)
def test_an_error_is_one_line_and_status_2(line, text, capsys):
    status, said = says(line, capsys)
    assert status == 2 and text in said and len(said.splitlines()) == 1


def test_unknown_commands_and_help(capsys):
    assert says("fly", capsys)[0] == 2
    assert [*OPTIONS] == [*COMMANDS, "completion"]
    assert all(name in says("--help", capsys)[1] for name in OPTIONS)
    assert says("--version", capsys)[1].startswith("rlhf-nb 0.")


@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_command_reads_the_program_lets_through(name):
    shown, flags = Shown(name), [flag for action in Parser(name)._actions for flag in action.option_strings]
    assert shown.unknown([flag for flag in flags if flag not in ("-h", "--help")]) is None
    assert shown.unknown(["-- User:", "--zzz"]) == "zzz is unknown"


def test_a_library_of_another_version_may_have_other_settings(monkeypatch):
    monkeypatch.setitem(program.LIBRARIES, "trl", "99.0")
    assert Shown("train").unknown(["--zzz"]) is None


def test_help_where_the_terminal_knows_ascii_only():
    command = [sys.executable, "-m", "rlhf_nb", "train", "--help"]
    run = subprocess.run(command, capture_output=True, env=os.environ | dict(PYTHONIOENCODING="ascii"), cwd=ROOT)
    assert run.returncode == 0 and b"--max_steps N" in run.stdout and not run.stderr


@pytest.mark.parametrize("line, status, text", [
    ("--version", 0, "rlhf-nb 0."),
    ("report -- -nowhere", 2, "rlhf-nb report: "),
    ("plan --help", 0, "--gpu TEXT"),
    ("completion bash", 0, "--max_completion_length"),
    ("completion perl", 2, "perl: must be one of bash"),
    ("completion", 2, "the following arguments are required: SHELL"),
    ("plan --max_step 3 --init_kl_coef=2 --zzz", 2, "max_step is unknown (did you mean max_steps?)"),
    ("train --max-step 3", 2, "rlhf-nb train: max_step is unknown (did you mean max_steps?)"),
])
def test_what_needs_no_torch(line, status, text):
    code = "import sys, rlhf_nb.program as p\ntry: p.main()\nfinally: print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code, *line.split()], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == status and text in run.stdout + run.stderr and "Traceback" not in run.stderr
    assert run.stdout.endswith("False\n") or line.startswith("report")


def test_python_m_is_the_program():
    run = subprocess.run(
        [sys.executable, "-m", "rlhf_nb", "train", "--max_step", "3"],
        capture_output=True,
        text=True,
        cwd=Path(ROOT),
    )
    assert (run.returncode, run.stderr) == (2, "rlhf-nb train: max_step is unknown (did you mean max_steps?)\n")

"""The commands of `rlhf-nb`: the original's flags and today's, errors of one line; `program` calls them."""

import argparse
import json
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any, NamedTuple

import torch
import yaml
from accelerate.commands.config import load_config_from_file
from accelerate.state import PartialState
from accelerate.utils import patch_environment
from datasets import disable_progress_bars
from huggingface_hub.utils import logging as huggingface_hub_logging
from rich.console import Console
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from transformers import AutoConfig, TrainerCallback
from transformers.hf_argparser import string_to_bool
from transformers.utils import logging as transformers_logging
from trl import TrlParser, get_quantization_config

from .chat import ChatArguments, EvalArguments, evaluate, save_rows, scores_table, talk
from .checkpoint import check_output_dir
from .clinic import CLINIC, PROMPT, accuracy, train_clinic, true_reward
from .config import (
    Count,
    DataArguments,
    MergeArguments,
    ModelArguments,
    Positive,
    PPOConfig,
    setting,
    validate,
)
from .data import find_files, load_prompts
from .distributed import PeerLost, first_to_report, process_failure, tell_launcher
from .errors import RunError
from .memory import GPUS, lora, plan_text
from .models import (
    check_model,
    check_whole,
    hub_arguments,
    load_decoder,
    load_tokenizer,
    loading,
    merge_adapter,
    with_adapter,
)
from .page import write_report
from .report import curves, in_notebook, samples_table, summarise, summary_table
from .rollout import Rollout
from .tables import table, unknown_settings
from .trainer import PPOTrainer

logger = logging.getLogger("rlhf_nb.cli")

# Names and defaults of the original program

PACKAGE = Path(str(files("rlhf_nb")))
TABLES = table("program")
NAMES, DEFAULTS = TABLES["names"], TABLES["defaults"]
CLINIC_FILES = {name: str(CLINIC/file) for name, file in TABLES["demo_files"].items()}
DEMO = TABLES["demo"] | CLINIC_FILES | dict(prompt_template=PROMPT)


@dataclass
class OriginalArguments:
    "Settings of the original program that are several of PPOConfig."

    batch_size: Count = setting(
        8, "Completions of a process per update: per_device_train_batch_size x steps_per_generation"
    )
    score_clip: Positive | None = setting(None, "Rewards count within +- this: reward_clip_range")

    def __post_init__(self): validate(self)


def translate(argv: list[str]) -> tuple[list[str], dict[str, str]]: # Flags; today's name -> the name that was used
    "The flags under today's names; `ValueError` where two names of one setting disagree."
    words, given, values = [], {}, []
    for word in argv:
        if word.startswith("--"):
            name, *values = word[2:].split("=", 1)
            name = name.replace("-", "_")
            given[name] = values
            words.append("=".join([f"--{NAMES.get(name, name)}", *values]))
        else:
            values.append(word)
            words.append(word)
    return words, check_agreement({name: " ".join(values) for name, values in given.items()})


def check_agreement(given: dict[str, Any]) -> dict[str, str]: # As given; today's name -> the first that was used
    "`ValueError` where two names of one setting have different values."
    used = {}
    for name, value in given.items():
        first = used.setdefault(NAMES.get(name, name), name)
        if value != given[first]:
            raise ValueError(f"{first} and {name} are one setting: choose {given[first]} or {value}")
    return used


def complete(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]: # By today's names
    "All settings of a run that are not at the default of their class."
    settings = defaults | given
    original = OriginalArguments(settings.pop("batch_size"), settings.pop("score_clip", None))
    rows, batch = max(settings["per_device_train_batch_size"], 1), original.batch_size
    if "steps_per_generation" not in given and "generation_batch_size" not in given:
        if batch % rows:
            raise ValueError(f"batch_size={batch} must be a multiple of per_device_train_batch_size={rows}")
        settings["steps_per_generation"] = batch // rows
    elif "batch_size" in given and settings.get("steps_per_generation") != batch / rows:
        raise ValueError("batch_size is another word for steps_per_generation and generation_batch_size: give one")
    if original.score_clip: settings.setdefault("reward_clip_range", [-original.score_clip, original.score_clip])
    if not settings["beta"] and "adap_kl_ctrl" not in given: settings["adap_kl_ctrl"] = False
    if "num_train_epochs" in given and "max_steps" not in given: del settings["max_steps"]
    for name in ("lora_target_modules", "lora_modules_to_save"):
        if value := settings.get(name):
            settings[name] = ",".join([value] if isinstance(value, str) else value).replace(" ", "").split(",")
    complete_evaluation(settings)
    complete_precision(settings)
    return settings


def complete_evaluation(settings: dict[str, Any]):
    "do_eval: before training, after it, and every eval_steps; evaluation alone leaves no files."
    if settings.get("eval_steps") and not (settings.get("do_eval") or settings.get("eval_strategy")):
        raise ValueError(f"eval_steps={settings['eval_steps']} needs do_eval or eval_strategy")
    if settings.get("do_eval"):
        settings.setdefault("eval_on_start", True)
        if settings.get("eval_steps"): settings.setdefault("eval_strategy", "steps")
    if not settings.get("do_train"): settings |= dict(report_to="none", log_completions=False)


def complete_precision(settings: dict[str, Any]):
    "bf16 and fp16 as dtype says, or dtype as they say."
    bf16, fp16, dtype = (settings.get(name) for name in ("bf16", "fp16", "dtype"))
    named = "bfloat16" if bf16 else "float16" if fp16 else "auto" if bf16 is None else "float32"
    if dtype == "auto": dtype = settings["dtype"] = named
    if named not in ("auto", dtype): raise ValueError(f"dtype={dtype}, but bf16={bf16} and fp16={fp16}: give one")
    if dtype != "auto": settings |= dict(bf16=dtype == "bfloat16", fp16=dtype == "float16")


# Flags and files

UNSET = object()  # Default of every flag, so that what was given is known


def program_flags(argv: list[str]) -> tuple[argparse.Namespace, list[str]]: # They, and the rest
    "`--debug` and `--quiet`, which every command takes, and `--config`."
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--debug", "--quiet"):
        own.add_argument(flag, type=string_to_bool, nargs="?", const=True, default=False)
    own.add_argument("--config", nargs="?", const="")
    return own.parse_known_args(argv)


def read_yaml(path: str) -> tuple[dict[str, Any], dict[str, str]]: # Settings; today's name -> the name that was used
    "The settings in a file, under today's names; `ValueError` if it has none."
    if not path: raise ValueError("--config needs a file")
    try: read = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as e: raise ValueError(f"{path}: not YAML ({' '.join(str(e).split())})") from None
    if not isinstance(read, dict): raise ValueError(f"{path}: must be a YAML mapping of settings to values")
    os.environ.update({name: str(value) for name, value in read.pop("env", {}).items()})
    used = check_agreement(read)
    return {today: read[name] for today, name in used.items()}, used


class Parser(TrlParser):
    "Settings from flags and YAML; errors are one line."

    def __init__(self, name: str): # Of a command
        run, dataclasses, positionals, self.defaults = COMMANDS[name]
        super().__init__(dataclasses, prog=f"rlhf-nb {name}", description=run.__doc__, allow_abbrev=False)
        for action in self._actions:
            if getattr(action.type, "__name__", "") == "string_to_bool": action.nargs, action.const = "?", True
        self.set_defaults(**{action.dest: UNSET for action in self._actions})
        self.first = [self.add_argument(at, nargs=n, metavar=at.upper()) for at, n in positionals.items()]

    def error(self, message: str): raise ValueError(message)

    def read(self, argv: list[str]) -> tuple: # One instance per dataclass, and a namespace where there are positionals
        "The settings; `ValueError` for what is unknown or wrong."
        parsed, unknown = self.divide(argv)
        self.refuse(unknown)
        return parsed

    def divide(self, argv: list[str]) -> tuple[tuple, list[str]]: # What `read` returns; words that are no settings
        "The settings, and what is left over."
        program, words = program_flags(argv)
        words, used = translate(words)
        given, in_file = ({}, {}) if program.config is None else read_yaml(program.config)
        try:
            left = self.set_defaults_with_config(**given)
            found, more = self.parse_known_args(words)
            return self.build({name: value for name, value in vars(found).items() if value is not UNSET}), left + more
        except (ValueError, TypeError) as e:
            said = [old for today, old in (in_file | used).items() if today != old and today in str(e)]
            raise ValueError(f"{e} (given as {', '.join(said)})" if said else str(e)) from e

    def build(self, given: dict[str, Any]) -> tuple: # By today's names
        "One instance per dataclass, and a namespace where there are positionals."
        at = argparse.Namespace(**{action.dest: given.pop(action.dest, None) for action in self.first})
        self.settings = complete(given, self.defaults) if self.defaults else given
        parts = self.parse_dict(self.settings, allow_extra_keys=True)
        return (*parts, at) if self.first else parts

    def refuse(self, unknown: list[str]): # Words from the command line or the file
        "`ValueError` if there are any, with today's name or the nearest one."
        names = [word[2:].split("=")[0] for word in unknown if word.startswith("--")]
        known = [action.dest for action in self._actions]
        known += [old for old, today in NAMES.items() if today in known]
        if names: raise ValueError(unknown_settings(names, known))
        if unknown: raise ValueError(f"unexpected {' '.join(unknown)}")


# `train`

CONFIGS = {path.stem: path for path in sorted((PACKAGE/"accelerate_configs").glob("*.yaml"))}


@dataclass
class ProgramArguments:
    "What is done with these settings."
    dry_run: bool = setting(False, "Print them as YAML, which --config reads, and stop")


@dataclass
class LaunchArguments:
    "In how many processes, and how they share the work."
    accelerate_config: str | None = setting(
        None,
        f"{', '.join(CONFIGS)} or a file: start accelerate launch; its flags may follow (--num_processes 2)",
    )


def read_accelerate_config(name: str): # One of ours, or a file; gives the path and Accelerate's ClusterConfig
    "What Accelerate makes of it; `ValueError` if it cannot be read."
    path = name if Path(name).is_file() else CONFIGS.get(name)
    if path is None: raise ValueError(f"accelerate_config={name}: no such file, and none of {', '.join(CONFIGS)}")
    try: return str(path), load_config_from_file(str(path))
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as e:
        raise ValueError(f"accelerate_config={name}: Accelerate cannot read it ({' '.join(str(e).split())})") from e


def launch_settings(parser: Parser,   # Of `train`
                    name: str,        # Of the configuration
                    more: list[str],  # Words that are no settings of ours
                    argv: list[str],  # All
) -> argparse.Namespace:
    "What `accelerate launch` is told; `ValueError` for flags that it does not know either."
    from accelerate.commands.launch import launch_command_parser  # Not above: it sets up logging

    path, config = read_accelerate_config(name)
    launcher = launch_command_parser()
    launcher.error = parser.error
    told, unknown = launcher.parse_known_args(
        ["--config_file", path, *more, "--module", "rlhf_nb", "train", *argv]
    )
    parser.refuse(unknown or [told.training_script] * (told.training_script != "rlhf_nb"))
    if told.mixed_precision: raise ValueError(f"mixed_precision={told.mixed_precision}: dtype says it here")
    if told.num_processes is None:
        told.num_processes = (
            config.num_processes if config.num_processes != -1 else max(torch.accelerator.device_count(), 1)
        )
    if told.num_processes < 1: raise ValueError(f"num_processes={told.num_processes}: must be at least 1")
    return told


def launched() -> bool:
    "Did `accelerate launch` start this process? `ValueError` if it was torchrun, which does not read its files."
    if "RLHF_NB_LAUNCHED" in os.environ or {"ACCELERATE_MIXED_PRECISION", "LOCAL_RANK"} <= os.environ.keys():
        return True
    if torch.distributed.is_torchelastic_launched():
        raise ValueError("accelerate_config starts the processes itself: leave out torchrun")
    return False


def launch(told: argparse.Namespace): # What `accelerate launch` is told
    "Run the processes; exit with the status of the first that failed."
    from accelerate.commands.launch import launch_command

    if told.cpu:
        told.cpu, os.environ["ACCELERATE_USE_CPU"] = False, "true"  # On CPUs it would leave starting them to MPI
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // told.num_processes)))
    try:
        with patch_environment(RLHF_NB_LAUNCHED="1"): launch_command(told)
    except ChildFailedError as e: status = e.get_first_failure()[1].exitcode
    except CalledProcessError as e: status = e.returncode
    except SignalException as e: status = -e.sigval
    else: return
    sys.exit(status if status >= 0 else 128 - status)


def check_settings(model_args: ModelArguments, data_args: DataArguments, args: PPOConfig):
    "`ValueError` for what can be seen to be wrong before anything is loaded."
    for name, *todo in (("model_name_or_path",), ("reward_model_name_or_path", "merge it into its base")):
        check_model(name, getattr(model_args, name))
        check_whole(name, getattr(model_args, name), *todo)
    if not (args.do_train or args.do_eval): raise ValueError("Nothing to do: give --do_train, --do_eval, or both")
    if args.do_train: check_output_dir(args.output_dir, args.overwrite_output_dir, bool(args.resume_from_checkpoint))
    for path in filter(None, (data_args.train_file_dir, data_args.validation_file_dir)): find_files(path)


class EvaluateAtEnd(TrainerCallback):
    "Evaluates after the last update, whatever `eval_steps` is."
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps: control.should_evaluate = True


def load_settings(model_args: ModelArguments, args: PPOConfig) -> dict[str, Any]:
    "Keyword arguments of `from_pretrained` for the policy."
    kwargs = dict(
        revision=model_args.model_revision,
        attn_implementation=model_args.attn_implementation,
        cache_dir=model_args.cache_dir,
    )
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    if model_args.device_map == "none": kwargs["device_map"] = None
    return kwargs | (args.model_init_kwargs or {})


def check_configs(model_args: ModelArguments, args: PPOConfig):
    "`ValueError` that names the setting if a model's config cannot be read, or is of another type."
    policy, reward = model_args.model_name_or_path, model_args.reward_model_name_or_path
    read = partial(AutoConfig.from_pretrained, trust_remote_code=args.trust_remote_code)
    with loading("model_name_or_path", policy): found = read(policy, **hub_arguments(args)).model_type
    with loading("reward_model_name_or_path", reward): read(reward, cache_dir=model_args.cache_dir)
    if model_args.model_type not in ("auto", found):
        raise ValueError(f"model_type={model_args.model_type}: {policy} is a {found}")


def make_trainer(model_args: ModelArguments,
                 data_args: DataArguments,
                 args: PPOConfig,
                 *more: Callable,   # Further reward functions; `reward_weights` has a weight for each
) -> PPOTrainer:
    "Prompts, policy and reward model, as the flags say."
    check_settings(model_args, data_args, args)
    if not args.should_log: logging.getLogger("rlhf_nb").setLevel(logging.ERROR)
    announce(args.trust_remote_code)
    dtype = str(args.dtype).removeprefix("torch.")
    if model_args.dtype not in ("auto", dtype):
        logger.warning("%s is not available on %s: using %s", model_args.dtype, args.device.type, dtype)
    args.model_init_kwargs = load_settings(model_args, args)
    check_configs(model_args, args)
    at = "tokenizer_name_or_path" if model_args.tokenizer_name_or_path else "model_name_or_path"
    with loading(at, getattr(model_args, at)):
        tokenizer = load_tokenizer(
            getattr(model_args, at),
            cache_dir=model_args.cache_dir,
            use_fast=model_args.use_fast_tokenizer,
            trust_remote_code=args.trust_remote_code,
        )
    data = load_prompts(
        data_args, tokenizer, args.max_prompt_length, args.seed, model_args.cache_dir, args.chat_template_kwargs
    )
    quantization = get_quantization_config(replace(model_args, dtype=dtype))
    model, adapter = model_args.model_name_or_path, lora(model_args)
    if model_args.peft_path:
        lm = load_decoder(model, args, quantization, adapter=True)
        with loading("peft_path", model_args.peft_path):
            model = with_adapter(lm, model_args.peft_path, is_trainable=True)
        adapter = quantization = None
    trainer = PPOTrainer(
        model=model,
        reward_funcs=[model_args.reward_model_name_or_path, *more],
        args=args,
        train_dataset=data["train"],
        eval_dataset=data.get("validation"),
        processing_class=tokenizer,
        callbacks=[EvaluateAtEnd()] if args.do_eval else None,
        peft_config=adapter,
        quantization_config=quantization,
    )
    trainer.data_settings = {
        name: getattr(data_args, name) for name in ("prompt_template", "system_prompt", "dataset_name")
    }
    return trainer


def train_settings(
    argv: list[str],
) -> tuple[
    tuple, argparse.Namespace | None, dict[str, Any]
]:  # As `read` gives them; what `accelerate launch` is told, if anything; by name
    "The settings of `train`; `ValueError` for flags that neither it nor `accelerate launch` knows."
    parser = train_parser()
    settings, more = parser.divide(argv)
    name = settings[-1].accelerate_config
    if not name: parser.refuse(more)
    return settings, launch_settings(parser, name, more, argv) if name else None, parser.settings


OF_THIS_CALL = "bf16", "fp16", "use_cpu", "dry_run" # dtype and the machine say the first three


def print_settings(settings: dict[str, Any]): # By name
    "Those that are not at the default of their class, as YAML."
    told = {name: value for name, value in settings.items() if name not in OF_THIS_CALL}
    print(yaml.safe_dump(told, allow_unicode=True), end="")


def announce(trust_remote_code: bool):
    "Say that foreign code is run, where it is."
    if trust_remote_code: logger.warning("trust_remote_code: code that comes with the models is run")


def tell_what_next(args: PPOConfig):
    "The commands that show what a run did."
    logger.info("Report: rlhf-nb report %s", args.output_dir)
    logger.info("Talk:   rlhf-nb chat %s", args.output_dir)
    if "tensorboard" in args.report_to: logger.info("Curves: tensorboard --logdir %s/trl", args.output_dir)


def stop_if_told(trainer: PPOTrainer):
    "Exit with 130 after Ctrl-C, with 143 after SIGTERM."
    if not trainer.stopped_by: return
    PartialState().destroy_process_group()
    sys.exit(128 + trainer.stopped_by)


def save(trainer: PPOTrainer):
    "Write the model to output_dir, and to the hub if it is wanted there."
    if trainer.args.push_to_hub: trainer.push_to_hub() # It saves, too
    else: trainer.save_model()


@contextmanager
def without_empty_folder(path: str) -> Iterator[None]:
    "Remove the folder that the base class makes, if nothing was written."
    existed = Path(path).exists()
    try: yield
    finally:
        with suppress(OSError):
            if not existed: Path(path).rmdir()


def train(argv: list[str]) -> PPOTrainer | None: # None: --dry_run, or other processes do the work
    "Train on your prompts with PPO, scored by your reward model; or evaluate; or both."
    (model_args, data_args, args, _, program, _), told, given = train_settings(argv)
    if program.dry_run: return print_settings(given)
    if told and not launched():
        check_settings(model_args, data_args, args)
        return launch(told)
    with process_failure(args), without_empty_folder(args.output_dir):
        trainer = make_trainer(model_args, data_args, args)
        if args.do_train:
            trainer.train()
            stop_if_told(trainer)
            save(trainer)
            logger.info("Saved to %s", args.output_dir)
            tell_what_next(args)
        else:
            metrics = trainer.evaluate()
            if trainer.is_world_process_zero():
                print("\n".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    PartialState().destroy_process_group()
    return trainer


# `demo`

@dataclass
class DemoArguments:
    "What only the demo has."

    rebuild: bool = setting(
        False, "Train the demo's policy and reward model again first, under output_dir/models: minutes"
    )


def as_flags(settings: dict[str, Any]) -> list[str]: # --name value --name value ...
    "Settings as they would stand on the command line."
    lists = {name: value if isinstance(value, (list, tuple)) else [value] for name, value in settings.items()}
    return [word for name, values in lists.items() for word in (f"--{name}", *map(str, values))]


def demo_settings(argv: list[str]) -> tuple: # Instances of the classes of settings
    "The demo's settings; its own folder may be overwritten."
    parser = demo_parser()
    if any(word.replace("-", "_").startswith("__output_dir") for word in argv): parser.defaults = DEFAULTS | DEMO
    return parser.read(argv), parser.settings


def answers_to(trainer: PPOTrainer, n: int = 6) -> tuple[Rollout, list[float]]: # With their true rewards
    "Completions of the first validation prompts, always from the same random numbers."
    rollout = trainer.rollout(trainer.eval_dataset.to_list()[:n], torch.Generator().manual_seed(0))
    return rollout, trainer.score(rollout).by_name["true_reward"].tolist()


def demo(argv: list[str]) -> PPOTrainer | None: # None: --dry_run
    "PPO in a tiny world with a known true reward; answers before and after. Its defaults are not those of train."
    (model_args, data_args, args, _, program, own), given = demo_settings(argv)
    if program.dry_run: return print_settings(given)
    if PartialState().num_processes > 1: raise ValueError("demo runs in one process; train runs in several")
    out = Path(args.output_dir)
    if own.rebuild:
        check_output_dir(out, args.overwrite_output_dir, bool(args.resume_from_checkpoint))
        logger.info("Training the policy and the reward model: about four minutes on two cores")
        policy, reward = train_clinic(out/"models", disable_tqdm=args.disable_tqdm)
        model_args.model_name_or_path, model_args.reward_model_name_or_path = str(policy), str(reward)
        logger.info("Reward model: %.3f of unseen pairs in the right order", accuracy(reward))
    trainer = make_trainer(model_args, data_args, args, true_reward)
    before, old = answers_to(trainer)
    seconds = trainer.train().metrics["train_runtime"]
    stop_if_told(trainer)
    save(trainer)
    after, new = answers_to(trainer)
    columns = {"question": [row["question"] for row in before.rows], "before": before.completions, "true": old,
               "after": after.completions, "true ": new}
    Console().print(samples_table("Answers to unseen questions", columns))
    summary = summarise(trainer.state.log_history) | dict(seconds=round(seconds, 1))
    (out/"summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    curves(trainer.state.log_history).savefig(out/"curves.png", dpi=120)
    title = f"{len(trainer.eval_dataset)} unseen questions, {trainer.state.global_step} updates, {seconds:.0f} s"
    Console().print(summary_table(summary, title))
    print(f"Picture: {out/'curves.png'}\nNumbers: {out/'summary.json'}")
    tell_what_next(args)
    return trainer


# The other commands


@dataclass
class PlanArguments:
    "Where it would run."
    gpu: str | None = setting(None, f"{', '.join(GPUS)}; default: this machine")


@dataclass
class ReportArguments:
    "Where the page goes."
    output_file: str | None = setting(None, "The page; default: report.html in the first run's folder")


def plan(argv: list[str]):
    "What a run would need in memory and time, and what to change, before anything is loaded."
    parser = Parser("plan")
    model_args, _, args, _, program, where = parser.read(argv)
    if program.dry_run: return print_settings(parser.settings)
    Console().print(plan_text(model_args, args, where.gpu))


def merge(argv: list[str]):
    "Write the base model with the adapter merged into its weights."
    args, = Parser("merge").read(argv)
    base, adapter = args.base_model_name_or_path, args.peft_model_path
    check_output_dir(args.output_dir, args.overwrite_output_dir, False)
    check_model("base_model_name_or_path", base)
    announce(args.trust_remote_code)
    if not (Path(adapter) / "adapter_config.json").exists():
        raise ValueError(f"peft_model_path={adapter} has no adapter_config.json")
    merge_adapter(base, adapter, args.output_dir, args.dtype, args.cache_dir, args.trust_remote_code)
    logger.info("Saved to %s", args.output_dir)


def chat(argv: list[str]):
    "Ask the base model and the tuned one; answers are streamed side by side."
    args, names = Parser("chat").read(argv)
    announce(args.trust_remote_code)
    talk(names.output_dir, args)


def eval_(argv: list[str]):
    "Answer prompts with a model, or with two, and score the answers, with intervals; of two, the win rate."
    args, names = Parser("eval").read(argv)
    announce(args.trust_remote_code)
    rows = evaluate(names.model, names.other, args)
    Console().print(scores_table(rows))
    if args.output_file:
        save_rows(rows, args.output_file)
        logger.info("Saved to %s", args.output_file)


def report(argv: list[str]):
    "One HTML page of a run, or of several compared."
    args, names = Parser("report").read(argv)
    logger.info(
        "Saved to %s", write_report(names.output_dir, args.output_file or Path(names.output_dir[0]) / "report.html")
    )


# All commands

class Command(NamedTuple):
    "What a command does, and what it can be told."
    run: Callable[[list[str]], Any]  # With the words after its name
    dataclasses: tuple[type, ...]    # Of settings
    positionals: dict[str, str | None] = {}  # What comes before them, and how many: "?", "+" or None for one
    defaults: dict[str, Any] = {}    # Where they are not those of the classes


RUN = ModelArguments, DataArguments, PPOConfig, OriginalArguments, ProgramArguments
COMMANDS = dict(
    train=Command(train, (*RUN, LaunchArguments), defaults=DEFAULTS),
    demo=Command(demo, (*RUN, DemoArguments), defaults=DEFAULTS | DEMO | dict(overwrite_output_dir=True)),
    plan=Command(plan, (*RUN, PlanArguments), defaults=DEFAULTS),
    report=Command(report, (ReportArguments,), dict(output_dir="+")),
    chat=Command(chat, (ChatArguments,), dict(output_dir=None)),
    eval=Command(eval_, (EvalArguments,), dict(model=None, other="?")),
    merge=Command(merge, (MergeArguments,)),
)
train_parser, demo_parser = partial(Parser, "train"), partial(Parser, "demo")


class Messages(logging.StreamHandler):
    "Lines to what is standard error now, where a live block puts them above itself; in a notebook to standard output."
    @property
    def stream(self): return sys.stdout if in_notebook() else sys.stderr

    @stream.setter
    def stream(self, _): pass


def quiet_libraries(quiet: bool = False): # Warnings only
    "Our own lines, without the loading bars of others."
    logging.basicConfig(format="%(message)s", handlers=[Messages()], force=in_notebook())
    logging.getLogger("rlhf_nb").setLevel(logging.WARNING if quiet else logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.disable_progress_bar()
    huggingface_hub_logging.set_verbosity_error()
    disable_progress_bars()


FLAGS = {"model": "model_name_or_path", "reward_funcs": "reward_model_name_or_path",
         "reward model": "reward_model_name_or_path"} # What the trainer calls them


def run(command: str,
        argv: list[str], # What follows it
):
    "A command, with errors of one line, and the exit status 2 where the input is wrong."
    told, _ = program_flags(argv)
    quiet_libraries(told.quiet)
    quietly = ["--disable_tqdm", "True"] * (told.quiet and command in ("train", "demo", "plan", "eval"))
    try: COMMANDS[command].run([*argv, *quietly])
    except KeyboardInterrupt: sys.exit(130)
    except Exception as e:
        if told.debug: traceback.print_exc()
        lines = [line.strip() for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
        text = " ".join(lines[:2])
        if command == "train": text = re.sub(rf"^({'|'.join(FLAGS)})(?=[=:])", lambda name: FLAGS[name[1]], text)
        if not isinstance(e, (ValueError, OSError, ImportError, RunError, PeerLost)): # Of a model, of a tracker
            text = f"{type(e).__name__}: {text} (--debug shows where)"
        tell_launcher(text)
        if first_to_report("error"): print(f"rlhf-nb {command}: {text}", file=sys.stderr)
        sys.exit(1 if isinstance(e, (RunError, PeerLost)) else 2)


if __name__ == "__main__": sys.exit("The program is python -m rlhf_nb")

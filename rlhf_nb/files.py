"""What a run writes and reads: its model, checkpoints, and what they say of the run."""
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from operator import length_hint
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object, set_seed
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerState
from transformers.trainer_callback import ExportableState

from . import __version__
from .callbacks import discard_completions
from .checkpoint import (
    check_same,
    checkpoints,
    differences,
    discard,
    find_checkpoint,
    keep_newest,
    random_states,
    read_state,
    set_aside,
    set_random_states,
    write_checkpoint,
)
from .config import PPOConfig
from .errors import RunError, Skips
from .hub import example_prompt, model_card, run_settings, upload
from .models import CRITIC, VALUE_HEAD, ActorCritic, load_weights, save_policy, unwrapped
from .ppo import RunningMoments
from .report import curves
from .rewards import RewardModel

if TYPE_CHECKING:
    from .trainer import PPOTrainer

logger = logging.getLogger(__name__)

Facts = dict[str, Any]
Weights = dict[str, Tensor] | None # What the strategy's `weights` gave

FROM_CHECKPOINT = (
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "beta",
    "seed",
)  # Kept when a run is resumed
EARLIER = (
    "adapter_config.json",
    "adapter_model*",
    "config.json",
    "generation_config.json",
    "model*.safetensors*",
    VALUE_HEAD,
    "run.json",
    "trainer_state.json",
    "curves.png",
    "trl/**/events.out.tfevents.*",
)


# What a run was


def count_weights(policy: ActorCritic) -> dict[str, int]:
    "How many weights there are, and how many are trained."
    weights = [*policy.parameters()]
    return dict(
        parameters=sum(p.numel() for p in weights), trained=sum(p.numel() for p in weights if p.requires_grad)
    )


def scalars(values: Facts, *without: str, prefix: str = "") -> Facts: # Put before the names
    "Numbers and texts of a configuration."
    return {prefix + k: v for k, v in values.items() if isinstance(v, (int, float, str)) and k not in without}


def kind_of_run(policy: ActorCritic, tokenizer: PreTrainedTokenizerBase, args: PPOConfig) -> Facts:
    "What must be the same where a checkpoint is resumed: shapes of model and adapter, vocabulary, what is trained."
    config = unwrapped(policy.lm).config
    words = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.eos_token, tokenizer.pad_token])
    kind = scalars(
        config.to_dict(), "_name_or_path", "transformers_version", "dtype", "use_cache", prefix="model."
    ) | dict(
        model=Path(config._name_or_path).name,
        tokenizer=f"{len(tokenizer)} tokens, {hashlib.sha256(words.encode()).hexdigest()[:8]}",
        critic=args.critic,
        optim=str(args.optim.value),
        trained=count_weights(policy)["trained"],
    )
    if not isinstance(policy.lm, PeftModel): return kind
    adapter = policy.lm.peft_config[policy.lm.active_adapter].to_dict()
    kind |= scalars(adapter, "base_model_name_or_path", "inference_mode", "peft_version", prefix="adapter.")
    return kind | {"adapter.target_modules": sorted(adapter.get("target_modules") or [])}


def about(trainer: "PPOTrainer") -> Facts:
    "What the run is, for run.json and the model card."
    args = trainer.args
    lm = trainer.policy.lm
    rewards = trainer.rewards
    return dict(
        settings=run_settings(args),
        model=dict(
            policy=unwrapped(lm).config._name_or_path,
            rewards=[ # Where models come from, and the names of functions; without those of weight 0
                f.model.config._name_or_path if isinstance(f, RewardModel) else name
                for f, name, weight in zip(rewards.funcs, rewards.names, rewards.weights)
                if weight
            ],
            adapter=isinstance(lm, PeftModel),
            **trainer.sizes,
        ),
        data=dict( # A stream counts as 0
            train_prompts=length_hint(trainer.train_dataset),
            eval_prompts=length_hint(trainer.eval_dataset),
            **trainer.data_settings,
        ),
        machine=dict(device=args.device.type, processes=args.world_size, dtype=str(lm.dtype).removeprefix("torch.")),
        versions=dict(rlhf_nb=__version__)
        | {name: version(name) for name in ("torch", "transformers", "trl", "peft", "accelerate")},
    )


# Models


def write_run(trainer: "PPOTrainer", folder: Path, weights: Weights = None):
    "Write model, tokenizer, state and run.json into a new folder."
    save_policy(trainer.policy, folder, weights)
    trainer.processing_class.save_pretrained(folder)
    trainer.state.save_to_json(str(folder/"trainer_state.json"))
    (folder/"run.json").write_text(json.dumps(about(trainer), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_model(trainer: "PPOTrainer", folder: Path, weights: Weights):
    "Write what a model's repository is made of; files replace earlier ones when all are complete."
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("tmp-model-*"): shutil.rmtree(old)
    with tempfile.TemporaryDirectory(dir=folder, prefix="tmp-model-") as name:
        aside = Path(name)
        write_run(trainer, aside, weights)
        if not (aside/CRITIC).exists(): shutil.rmtree(folder/CRITIC, ignore_errors=True)
        for file in sorted(aside.rglob("*")):
            if file.is_dir(): continue
            to = folder/file.relative_to(aside)
            to.parent.mkdir(exist_ok=True)
            file.replace(to)
    write_card(trainer, folder)


def write_card(
    trainer: "PPOTrainer", folder: Path, picture: bool = False, **how: Any
):  # With curves.png; model_name, dataset_name, tags
    "Write README.md."
    told = about(trainer)
    tokenizer = trainer.processing_class
    prompt = example_prompt(told["data"], tokenizer, trainer.args.chat_template_kwargs)
    if picture: curves(trainer.state.log_history).savefig(folder/"curves.png", dpi=120)
    repo = trainer.hub_model_id or folder.resolve().name
    model_card(told, trainer.state.log_history, repo, prompt, tokenizer, curves=picture, **how).save(folder/"README.md")


def publish(
    trainer: "PPOTrainer", weights: Weights, message: str, card: Facts, **how: Any
):  # blocking, token, revision
    "Upload what `write_model` writes, with the curves; `RunError` if that fails."
    folder = Path(tempfile.mkdtemp())
    write_run(trainer, folder, weights)
    write_card(trainer, folder, picture=True, **card)
    return upload(folder, trainer.hub_model_id, trainer.args, message, **how)


def clear_output_dir(trainer: "PPOTrainer"):
    "Make room for a new run: an earlier one in output_dir is set aside, or deleted with overwrite_output_dir."
    args = trainer.args
    trainer.accelerator.wait_for_everyone()
    if not args.should_save: return
    folder = Path(args.output_dir)
    if not args.overwrite_output_dir: return set_aside(folder, -1)
    for old in checkpoints(folder): discard(old)
    discard_completions(folder)
    for pattern in EARLIER:
        for old in folder.glob(pattern): old.unlink()
    shutil.rmtree(folder/CRITIC, ignore_errors=True)


# Checkpoints


def save_checkpoint(trainer: "PPOTrainer"):
    "Write `checkpoint-STEP`; a matter of all processes. `OSError` if that fails, with earlier ones as they were."
    args, state = trainer.args, trainer.state
    folder = Path(args.output_dir)/f"checkpoint-{state.global_step}"
    if state.best_global_step == state.global_step: state.best_model_checkpoint = str(folder)
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState): state.stateful_callbacks[type(callback).__name__] = callback.state()
    run = run_state(trainer)
    weights = trainer.strategy.weights(args.should_save)
    if args.should_save:
        write_checkpoint(folder, {} if args.save_only_model else run, partial(write_run, trainer, weights=weights))
        keep_newest(args.output_dir, args.save_total_limit, best=state.best_model_checkpoint)
    if args.push_to_hub and args.hub_strategy != "end":
        try: trainer.push_to_hub(f"Training in progress, step {state.global_step}")
        except RunError as e: logger.warning("%s", e)
    trainer.accelerator.wait_for_everyone()


def run_state(trainer: "PPOTrainer") -> Facts:
    "The state of every owner, the same for any number of processes."
    scaler = trainer.accelerator.scaler
    return dict(
        optimizer=trainer.strategy.optimizer_state(keep=trainer.args.should_save),
        scheduler=trainer.lr_scheduler.state_dict(),
        scaler=scaler.state_dict() if scaler else None,
        pending=trainer.runlog.pending,
        kl_coef=trainer.kl_controller.value,
        moments=vars(trainer.moments),
        skips=asdict(trainer.skips),
        order=trainer.order.state_dict(),
        random=gather_object([random_states(trainer.sampler.generator)]),
        kind=trainer.kind,
        settings=scalars(run_settings(trainer.args)),
    )


@contextmanager
def checkpoint_on_error(
    trainer: "PPOTrainer", place: dict[str, int] | None = None
) -> Iterator[None]:  # Of the prompts before
    "Save the last completed update if what is inside raises; with several processes the last regular one counts."
    random = random_states(trainer.sampler.generator)
    step = trainer.state.global_step
    try: yield
    except Exception:
        if trainer.between_updates and 0 < step == trainer.state.global_step and trainer.args.world_size == 1:
            set_random_states(random, trainer.sampler.generator)
            if place: trainer.order.load_state_dict(place)
            try: trainer.save_checkpoint()
            except OSError as e: logger.warning("%s", e)
            else: logger.warning("Saved checkpoint-%d", step)
        raise


def load_checkpoint(trainer: "PPOTrainer", resume: str | bool): # A folder, or True for the newest
    "Continue where a checkpoint was written; `ValueError` if it is of another run."
    args = trainer.args
    with trainer.accelerator.main_process_first(): path = find_checkpoint(resume, args.output_dir)
    trainer.accelerator.wait_for_everyone()
    saved = read_state(path)
    if "order" not in saved:
        raise ValueError(
            f"{path} has no training state (save_only_model, or an earlier version): a run cannot continue from it"
        )
    check_same(path, saved["kind"], trainer.kind)
    both = saved["settings"], scalars(run_settings(args))
    for change in differences(*({k: settings.get(k) for k in FROM_CHECKPOINT} for settings in both)):
        logger.warning("%s in this call; the checkpoint's value is kept", change)
    trainer.strategy.load(path, saved["optimizer"])
    trainer.lr_scheduler.load_state_dict(saved["scheduler"])
    if trainer.accelerator.scaler and saved["scaler"]: trainer.accelerator.scaler.load_state_dict(saved["scaler"])
    if not args.ignore_data_skip: trainer.order.load_state_dict(saved["order"])
    trainer.kl_controller.value = saved["kl_coef"]
    trainer.moments = RunningMoments(**saved["moments"])
    trainer.runlog.pending = saved["pending"]
    trainer.skips = Skips(**saved["skips"])
    trainer.seed = saved["settings"]["seed"]
    state = TrainerState.load_from_json(str(path/"trainer_state.json"))
    for name in ("max_steps", "num_train_epochs", "is_world_process_zero", "is_local_process_zero"):
        setattr(state, name, getattr(trainer.state, name)) # Of this call
    state.compute_steps(args, state.max_steps)
    trainer.state = state
    trainer.start_step = state.global_step
    # transformers' own: restores ExportableState callbacks if restore_callback_states_from_checkpoint is set
    trainer._load_callback_state()
    load_random(trainer, saved["random"])
    if trainer.is_world_process_zero():
        set_aside(args.output_dir, state.global_step)
        discard_completions(args.output_dir, after=state.global_step)


def load_random(trainer: "PPOTrainer", states: list[Facts]): # One of each process that wrote the checkpoint
    "Restore random states; a process that is new gets its own, except for the samples."
    rank = trainer.args.process_index
    set_random_states(states[min(rank, len(states) - 1)], trainer.sampler.generator)
    if rank >= len(states): set_seed(trainer.seed + trainer.args.world_size * (trainer.state.global_step + 1) + rank)


def load_best(trainer: "PPOTrainer"):
    "Load the weights of the best checkpoint."
    state = trainer.state
    logger.info(
        "Loading the best model, %s (%s %.4g)",
        state.best_model_checkpoint,
        trainer.args.metric_for_best_model,
        state.best_metric,
    )
    load_weights(trainer.policy, state.best_model_checkpoint)

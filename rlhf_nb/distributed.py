"""Several processes: where weights, gradients and optimizer state are stored, and what ends a run."""
import json
import logging
import math
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    broadcast,
    convert_outputs_to_fp32,
    parse_flag_from_env,
    recursively_apply,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl.models.utils import add_hooks, remove_hooks

from .checkpoint import checkpoints, damage
from .errors import first_line

logger = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq") # Of Adam
SCALE_GROWTH = 200 # Steps after which fp16's loss scale doubles; torch's 2,000 are longer than many runs
State = dict[str, Any]              # Of an optimizer, as one process would have it

# Sharded weights
def is_gathered(model: nn.Module) -> bool:
    "Are its weights plain tensors at the moment?"
    return not any(isinstance(p, DTensor) for p in model.parameters())

def unsharded(x: Tensor, keep: bool = True) -> Tensor | None: # Does this process need it?
    "All of a tensor, sharded or not, on the CPU, or None; every process must call this."
    if isinstance(x, DTensor): x = x.detach().full_tensor()
    return x.cpu() if keep else None

def sharded_like(x: Any, weight: Tensor) -> Any:
    "This process's shard of a tensor of a sharded weight's shape; anything else as it is."
    if not isinstance(weight, DTensor) or not isinstance(x, Tensor) or x.shape != weight.shape: return x
    return distribute_tensor(x.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)

@torch.no_grad()
def fill(weight: Tensor, value: Tensor): # Sharded or not; all of it
    "Set a weight; `ValueError` for another shape."
    refuse((weight.shape != value.shape, f"A weight of shape {tuple(value.shape)} for one of {tuple(weight.shape)}"))
    weight.copy_(sharded_like(value.to(weight.dtype), weight))

# Strategies
def load_whole_models():
    "Have transformers load whole models: the policy is sharded afterwards, and reward models never are."
    unset_hf_deepspeed_config()
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"

def refuse(*problems: tuple[Any, str]): # Is it so? What to say
    "`ValueError` for the first problem there is."
    for found, text in problems:
        if found: raise ValueError(text)

class Strategy:
    "DDP: each process has all weights; gradients are summed once per optimizer step."
    in_step = False # Does every pass need all processes?
    scale_fell = False # In the last step, because a gradient was infinite at fp16's loss scale
    optimizers: tuple[type, ...] = (Optimizer,)
    unsharded = staticmethod(unsharded)

    def __init__(self, policy: nn.Module, accelerator: Accelerator, args: TrainingArguments):
        self.accelerator = accelerator
        self.args = args
        self.autocast = accelerator.autocast
        if accelerator.scaler: accelerator.scaler.set_growth_interval(SCALE_GROWTH)
        for p in policy.parameters():
            if p.requires_grad: p.data.copy_(broadcast(p.data.to(accelerator.device)))
        self.policy = accelerator.prepare_model(policy, evaluation_mode=True)

    def gathered(self):
        "Around sampling: inside, each process has all weights, unless ds3_gather_for_generation is False."
        return nullcontext()

    def prepare_optimizer(self, optimizer: Optimizer) -> Optimizer:
        "Prepare it for this strategy; `ValueError` for one that cannot be."
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]
        names = ", ".join(kind.__name__ for kind in self.optimizers)
        refuse((not isinstance(optimizer, self.optimizers),
                f"optim: {type(optimizer).__name__} does not go with {type(self).__name__}: {names} of torch do"),
               (not {*self.policy.parameters()}.issuperset(self.trained),
                "optimizers: its weights are not those of the policy, which FSDP replaces: set optim"))
        self.optimizer = self.prepare(optimizer)
        return self.optimizer

    def prepare(self, optimizer: Optimizer) -> Optimizer: return self.accelerator.prepare_optimizer(optimizer)

    @contextmanager
    def passes(self) -> Iterator[None]:
        "Around the passes of an optimizer step: gradients are summed over all processes, also over those without one."
        yield
        if self.accelerator.num_processes == 1: return
        used = torch.tensor([p.grad is not None for p in self.trained], dtype=torch.int, device=self.accelerator.device)
        pending = []
        for p, count in zip(self.trained, self.sum(used).tolist()):
            if not count: continue
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.contiguous()
            pending.append(dist.all_reduce(p.grad, async_op=True))
        for work in pending: work.wait()

    def backward(self, loss: Tensor): self.accelerator.backward(loss) # A share of the sum over all processes
    def zero_grad(self): self.optimizer.zero_grad()

    def step(self, max_norm: float = 0.) -> tuple[float, bool]: # 0: no clipping; norm before it, was the step made?
        "Clip, step and forget the gradients; no step where one is not finite."
        norm = unsharded(self.accelerator.clip_grad_norm_(self.trained, max_norm or math.inf)).item()
        finite = math.isfinite(norm)
        scaler = self.accelerator.scaler
        if finite: self.optimizer.step()
        elif scaler: # If the scale does not fall, finite gradients have an infinite norm
            before = scaler.get_scale()
            scaler.update()
            self.scale_fell = scaler.get_scale() < before
        self.zero_grad()
        return norm, finite

    def weights(self, keep: bool = True) -> dict[str, Tensor] | None: # Does this process need them?
        "The trained weights by name, or None where each process has them; every process must call this."
        from .models import trained_weights  # Imports this module
        return trained_weights(self.policy, keep, self.unsharded) if self.in_step else None

    def optimizer_state(self, keep: bool = True) -> State: # Does this process need it?
        "A `state_dict` as one process would have it; every process must call this."
        state = self.optimizer.state_dict()
        return state | dict(state=recursively_apply(unsharded, state["state"], keep))

    def load(self, path: str | Path, state: State): # Folder with weights; what `optimizer_state` gave
        "Continue from a checkpoint of any strategy."
        from .models import load_weights
        load_weights(self.policy, path)
        own = {i: {k: sharded_like(x, self.trained[i]) for k, x in moments.items()}
               for i, moments in state["state"].items()}
        self.optimizer.load_state_dict(state | dict(state=own))

    def sum(self, x: Tensor) -> Tensor:
        "Over all processes."
        return self.accelerator.reduce(x) if self.accelerator.num_processes > 1 else x

    def gather(self, x: Tensor, left: bool = False) -> Tensor: # (B,) or (B, T), the same B everywhere; pad on the left?
        "The rows of all processes in order, padded with zeros to the widest."
        if self.accelerator.num_processes == 1: return x
        return self.accelerator.gather(self.accelerator.pad_across_processes(x, dim=1, pad_first=left))

    def any(self, flag: bool) -> bool:
        "Is it true in any process?"
        return self.sum(torch.tensor(int(flag), device=self.accelerator.device)).item() > 0

def fsdp_plugin(accelerator: Accelerator, args: TrainingArguments) -> FullyShardedDataParallelPlugin | None:
    "What FSDP was asked for; on a CPU Accelerate's state does not keep it."
    if not args.fsdp and not parse_flag_from_env("ACCELERATE_USE_FSDP"): return None
    made = getattr(accelerator.state, "fsdp_plugin", None)
    return made or FullyShardedDataParallelPlugin(**args.fsdp_plugin_args or {})

class FSDP2(Strategy):
    "Each process has a shard of every weight."
    in_step = True
    optimizers = (Adam, AdamW, SGD, Adagrad, RMSprop) # What they keep has the shape of the weights

    def __init__(self, policy: nn.Module, accelerator: Accelerator, args: TrainingArguments):
        plugin = fsdp_plugin(accelerator, args)
        refuse((plugin.fsdp_version != 2, "FSDP 1 is not supported: set fsdp_version to 2"),
               (isinstance(plugin.cpu_offload, CPUOffloadPolicy), "FSDP: offload_params is not supported"),
               (not plugin.reshard_after_forward, "FSDP: reshard_after_forward=False is not supported"),
               (plugin.activation_checkpointing, "FSDP: set gradient_checkpointing, not activation_checkpointing"),
               (plugin.min_num_params, "FSDP shards layer by layer: leave out min_num_params"))
        super().__init__(policy, accelerator, args)
        # There is no public name for it; peft's wrapper passes it on
        names = plugin.transformer_cls_names_to_wrap or policy.lm._no_split_modules or ()
        layers = [m for m in policy.modules() if type(m).__name__ in names]
        refuse((not layers, f"FSDP shards layer by layer; the model has none of {', '.join(names) or 'a known class'}"))
        mesh = DeviceMesh(accelerator.device.type, range(accelerator.num_processes))
        self.units = [*layers, policy] # Their weights are gathered together
        for m in self.units:
            fully_shard(m, mesh=mesh, reshard_after_forward=True)
            m.set_gradient_divide_factor(1.)
            m.set_force_sum_reduction_for_comms(True)
        register_fsdp_forward_method(policy, "next_logits")
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

    @contextmanager
    def gathered(self) -> Iterator[None]:
        if not self.args.ds3_gather_for_generation: return (yield)
        self.policy.set_reshard_after_forward(False)
        try:
            for m in self.units: m.unshard()
            yield
        finally:
            for m in self.units: m.reshard()
            self.policy.set_reshard_after_forward(True)

    def passes(self): return nullcontext()

class DeepSpeed(Strategy):
    "ZeRO, stage 2 or 3: weights in float32, products in autocast, steps by DeepSpeed's engine."
    optimizers = (Adam, AdamW)

    def __init__(self, policy: nn.Module, accelerator: Accelerator, args: TrainingArguments):
        import deepspeed  # Optional
        refuse((args.use_cpu and torch.accelerator.is_available(), "DeepSpeed: use_cpu is not supported"),
               (not dist.is_initialized(), "DeepSpeed needs torchrun or accelerate launch, also for one process"))
        self.deepspeed = deepspeed
        self.config = accelerator.state.deepspeed_plugin.deepspeed_config
        zero = self.config["zero_optimization"]
        clip = self.config.get("gradient_clipping", "auto")
        bf16 = self.config["bf16"]["enabled"]
        self.in_step = zero["stage"] == 3
        devices = {zero.get(name, {}).get("device", "none") for name in ("offload_optimizer", "offload_param")}
        refuse((zero["stage"] not in (2, 3), f"ZeRO: stage {zero['stage']} is not supported: set 2 or 3"),
               (devices != {"none"}, "ZeRO: offload_optimizer and offload_param are not supported"),
               ("scheduler" in self.config, "DeepSpeed: its scheduler is not supported: set lr_scheduler_type"),
               (clip not in ("auto", args.max_grad_norm), f"DeepSpeed: gradient_clipping={clip} is not max_grad_norm"),
               (self.config["fp16"]["enabled"] is True, "fp16 does not go with ZeRO: set bf16 to True or False"),
               (args.critic_warmup_steps, "critic_warmup_steps does not go with ZeRO: set 0"),
               (args.critic_pretraining_steps, "critic_pretraining_steps does not go with ZeRO: set 0"),
               (self.in_step and args.use_vllm, "use_vllm does not go with ZeRO stage 3: use stage 2 or FSDP2"),
               (self.in_step and not args.ds3_gather_for_generation,
                "ds3_gather_for_generation=False does not go with ZeRO: use FSDP2"))
        policy.config = policy.lm.config # Where Accelerate reads the hidden size for bucket sizes that are "auto"
        super().__init__(policy, accelerator, args)
        self.autocast = partial(torch.autocast, accelerator.device.type, dtype=torch.bfloat16, enabled=bf16)
        if bf16: policy.forward = convert_outputs_to_fp32(self.autocast()(policy.forward))

    def prepare(self, optimizer: Optimizer) -> Optimizer:
        self.adamw = optimizer
        # DeepSpeed drops empty groups
        self.places = [group["params"] for group in optimizer.state_dict()["param_groups"] if group["params"]]
        self.config.pop("train_batch_size", None)
        self.config |= dict(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, bf16=dict(enabled=False))
        self.engine, optimizer = self.accelerator.prepare(self.policy, optimizer)
        return optimizer

    def whole(self, params: list[Tensor], changed: bool = False): # Are they changed inside?
        "Inside, these weights are whole, whatever the stage."
        return self.deepspeed.zero.GatheredParameters(params, modifier_rank=0 if changed else None)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        if not self.in_step: return (yield)
        with self.whole([*self.policy.parameters()]):
            remove_hooks(self.engine)
            try: yield
            finally: add_hooks(self.engine)

    @contextmanager
    def passes(self) -> Iterator[None]:
        with self.engine.coalesce_grad_reduction():
            try: yield
            except BaseException:
                self.engine.zero_grad() # Or they would be summed with those of processes that may be gone
                raise

    def backward(self, loss: Tensor): self.engine.backward(loss * self.accelerator.num_processes)

    def zero_grad(self):
        self.engine.zero_grad()
        self.engine.optimizer.zero_grad()

    def step(self, max_norm: float = 0.) -> tuple[float, bool]:
        self.engine.optimizer.clip_grad = max_norm
        self.engine.step()
        return float(self.engine.get_global_grad_norm()), self.engine.was_step_applied()

    def unsharded(self, x: Tensor, keep: bool = True) -> Tensor | None:
        with self.whole([x]): return x.detach().cpu().clone() if keep else None

    def link_state(self):
        "Tell stage 2 where each weight's moments are: it looks when only the first parameter group has some."
        if self.in_step or not self.adamw.state: return
        zero = self.engine.optimizer
        for weights, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups):
            self.deepspeed.utils.lazy_init_hp_params_optimizer_state(weights, flat, self.adamw.state)

    def optimizer_state(self, keep: bool = True) -> State:
        self.link_state()
        state = {}
        get = self.deepspeed.utils.safe_get_full_optimizer_state
        for i, p in enumerate(self.trained if self.adamw.state else ()):
            moments = {name: get(p, name).cpu().clone() for name in MOMENTS}
            if keep: state[i] = moments | dict(step=next(iter(self.adamw.state.values()))["step"].cpu().clone())
        return dict(state=state, param_groups=[group | dict(params=places) for group, places
                                               in zip(self.adamw.param_groups, self.places)])

    def load(self, path: str | Path, state: State):
        from .models import load_weights
        moments = state["state"]
        steps = {float(s["step"]) for s in moments.values()} or {0.}
        refuse((len(steps) > 1 or 0 < len(moments) < len(self.trained),
                f"{path}: ZeRO cannot continue from it, for some weights have made fewer steps than others"))
        for group in self.adamw.param_groups: group["lr"] = 0.
        self.zero_grad()
        with self.passes(): pass
        self.step() # Changes nothing, but gives the optimizer a state
        self.link_state()
        with self.whole(self.trained, changed=True): load_weights(self.policy, path)
        self.engine.optimizer.refresh_fp32_params()
        for i, of_weight in moments.items():
            for name in MOMENTS: self.set_moment(self.trained[i], of_weight[name], name)
        for own in self.adamw.state.values(): own["step"].fill_(*steps)
        for group, saved in zip(self.adamw.param_groups, state["param_groups"]):
            group |= saved | dict(params=group["params"])

    def set_moment(self, p: Tensor, x: Tensor, name: str): # All of it
        "Set this process's part of one of Adam's moments."
        utils = self.deepspeed.utils
        if not self.in_step: return utils.safe_set_full_optimizer_state(p, x, name)
        n = p.ds_tensor.numel() # The last part is padded
        padded = F.pad(x.flatten(), (0, n * self.accelerator.num_processes - x.numel()))
        utils.safe_set_local_optimizer_state(p, padded.view(-1, n)[self.accelerator.process_index], name)

def make_strategy(policy: nn.Module, accelerator: Accelerator, args: TrainingArguments) -> Strategy:
    "What the launcher or the settings `fsdp` and `deepspeed` ask for; `ValueError` for what is not supported."
    load_whole_models() # Making the accelerator has told transformers of ZeRO once more
    if dist.is_initialized(): # transformers passes ddp_timeout on, but not with use_cpu
        dist.distributed_c10d._set_pg_timeout(args.ddp_timeout_delta, dist.group.WORLD)
    if args.deepspeed_plugin: kind = DeepSpeed
    elif accelerator.num_processes > 1 and fsdp_plugin(accelerator, args): kind = FSDP2
    else: return Strategy(policy, accelerator, args)
    refuse((not all(p.is_floating_point() for p in policy.parameters()),
            f"{kind.__name__} does not go with load_in_8bit and load_in_4bit"))
    logger.info("%s on %d processes", kind.__name__, accelerator.num_processes)
    return kind(policy, accelerator, args)

# What ends a run
class PeerLost(RuntimeError):
    "An exchange between processes failed because another one has ended, or did not answer in time."

def from_exchange(e: Exception) -> bool:
    "Was it raised by an exchange between processes? Then the cause is in another one."
    *_, (frame, _) = traceback.walk_tb(e.__traceback__)
    inside = Path(dist.__file__).parent in Path(frame.f_code.co_filename).parents
    return isinstance(e, dist.DistError) or type(e) is RuntimeError and inside

def peer_lost(e: Exception, args: TrainingArguments) -> PeerLost: # What an exchange raised
    "What happened, and where to resume."
    what = "has ended, killed perhaps for memory"
    if "timed out" in str(e).lower(): what = f"did not answer within ddp_timeout={args.ddp_timeout} s"
    whole = next((p for p in reversed(checkpoints(args.output_dir)) if damage(p) is None), None)
    then = f"{whole} is whole: resume_from_checkpoint=True continues from it" if whole else "There is no checkpoint yet"
    return PeerLost(f"Another process {what} ({first_line(e)}). {then}")

def first_to_report(what: str) -> bool:
    "Has no other process of this launch reported it? Only torchrun's store can tell, which outlives them all."
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True": return True
    key = f"rlhf_nb {os.environ['TORCHELASTIC_RESTART_COUNT']} {what}"
    rank = os.environ["RANK"]
    try: store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    except dist.DistError: return True # The launcher has ended
    return store.compare_set(key, "", rank) == rank.encode()

def tell_launcher(text: str):
    "Have torchrun's summary name the cause."
    if not (path := os.environ.get("TORCHELASTIC_ERROR_FILE")): return
    told = dict(message=dict(message=text, extraInfo=dict(py_callstack=text, timestamp=str(int(time.time())))))
    Path(path).write_text(json.dumps(told), encoding="utf-8")

@contextmanager
def process_failure(args: TrainingArguments) -> Iterator[None]:
    "Around a run: `PeerLost` where another process has ended without a word, `SystemExit` where it has said why."
    try: yield
    except Exception as e:
        if not dist.is_initialized(): raise
        lost = from_exchange(e)
        if lost and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN) # The launcher sends it now, but the cause must be said first
        if not first_to_report("failure") and lost: raise SystemExit(1) from e
        if not lost:
            tell_launcher(f"{type(e).__name__}: {e}")
            raise
        error = peer_lost(e, args)
        tell_launcher(str(error))
        raise error from e

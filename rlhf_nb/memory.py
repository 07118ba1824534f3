"""What a run would need, before anything is loaded: memory by part and time of an update, from the configs alone."""

import timeit
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest.mock import patch

import psutil
import torch
from peft import LoraConfig, PeftConfig
from rich import box
from rich.console import Group
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark.utils.timer import timer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.initialization import no_init_weights
from transformers.trainer_pt_utils import get_model_param_count
from trl import get_peft_config

from . import kernels
from .config import ModelArguments, PPOConfig, has_bf16
from .decoding import fits
from .kernels import fuse_layers, grow_in_blocks, packed_for_generation, replaced_head
from .learner import recomputed, rows_per_pass
from .models import (
    ActorCritic,
    Sampling,
    Tokens,
    add_adapter,
    check_adapter,
    check_decoder,
    check_model,
    loading,
    longest,
    router_coefficient,
    sampling_logits,
    unwrapped,
)
from .report import TEMPLATES
from .rollout import PROCESSORS, generation_settings, sample_tokens
from .tables import table

TABLES = table("memory")
OVER = TABLES["over"]

# Where it might run


class Device(NamedTuple):
    "What a run can have."
    name: str
    kind: str                  # "cpu" or "cuda"
    memory: float              # Bytes
    read: float | None         # Bytes per second; None: not known
    half: float | None         # Products and sums per second in float16 or bfloat16
    single: float | None       # Likewise in float32
    bf16: bool                 # Does it multiply bfloat16?


GPUS = {name: Device(name, "cuda", gib * 2**30, read * 1e9, half * 1e12, single * 1e12, bf16)
        for name, (gib, read, half, single, bf16) in TABLES["gpus"].items()}


def known_gpu(name: str) -> Device:
    "By name, in any case; `ValueError` with all names."
    plain = name.upper().replace(" ", "").replace("_", "-")
    if plain not in GPUS: raise ValueError(f"gpu={name}: known are {', '.join(GPUS)}")
    return GPUS[plain]


def this_machine() -> Device:
    "The accelerator's memory, or the free main memory; rates are measured, in about a second."
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")

    def per_second(amount: float, work: Callable) -> float: # What one call gets done: the best of five
        return amount / min(timeit.repeat(work, number=1, repeat=5, timer=timer)) # Which waits for a GPU

    def product(dtype: torch.dtype) -> float:
        x, w = (torch.randn(n, 1024, device=device).to(dtype) for n in (512, 1024))
        w = w.repeat(32, 1)
        return per_second(2 * 512 * w.numel(), lambda: x @ w.T)

    numbers = torch.ones(100_000_000, device=device)
    read, bf16 = per_second(numbers.nbytes, numbers.sum), has_bf16(device)
    half = product(torch.bfloat16 if bf16 else torch.float16) if bf16 or gpu else None
    memory = torch.cuda.get_device_properties(device).total_memory if gpu else psutil.virtual_memory().available
    return Device("this machine", device.type, memory, read, half, product(torch.float32), bf16)


def dtype_on(device: Device, name: str) -> torch.dtype: # A setting of dtype
    "The type of products that a run takes there."
    best = torch.bfloat16 if device.bf16 else torch.float16 if device.kind == "cuda" else torch.float32
    return best if name == "auto" or name == "float16" and device.kind == "cpu" else getattr(torch, name)


# Bytes by part


class Memory(TorchDispatchMode):
    "Bytes of the fake tensors that exist, by part, and the most of each phase; all rows and tokens are real ones."

    def __init__(self, vocab: int): # A tensor as wide as this holds logits
        super().__init__()
        self.vocab = vocab
        self.part: str | None = None # Of new tensors; None: activations, or logits
        self.phase = ""
        self.launched = 0 # Operations so far that a GPU would have a kernel for
        self.held: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}
        self.storages = weakref.WeakKeyDictionary() # Storage -> its part and bytes, as a dict

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = known_result(func.overloadpacket.__name__, *args[:3])
        if found is None: found = func(*args, **(kwargs or {}))
        self.launched += runs_kernel(func)
        for x in tree_leaves(found):
            if isinstance(x, Tensor): self.note(x)
        return found

    def note(self, x: Tensor, part: str | None = None, size: float | None = None): # Bytes; default: all of its storage
        "Count a tensor, once; or say which part it belongs to and what it takes."
        storage = x.untyped_storage()
        entry = self.storages.setdefault(storage, {})
        if not entry: weakref.finalize(storage, self.held.subtract, entry)
        elif not part: return
        self.held.subtract(entry)
        wide = x.ndim > 1 and x.shape[-1] >= self.vocab
        entry.clear()
        entry[part or self.part or ("logits" if wide else "activations")] = int(size or storage.nbytes())
        self.held.update(entry)
        if self.held.total() > self.peaks.get(self.phase, Counter()).total(): self.peaks[self.phase] = self.held.copy()


def runs_kernel(func: Any) -> bool: # An operation of torch
    "Does it run a kernel? Views and allocations do not."
    if func.overloadpacket.__name__ in TABLES["no_kernel"]: return False
    aliases = (result.alias_info for result in func._schema.returns)
    return not any(alias is not None and not alias.is_write for alias in aliases)


def known_result(name: str, x: Any = None, y: Any = None, z: Any = None) -> Any: # None: run the operation
    "Results that depend on numbers, which fake tensors do not have."
    match name:
        case "equal": return True
        case "mm" if isinstance(z, torch.dtype): return x.new_empty(len(x), y.shape[1], dtype=z) # On a GPU
        case "_local_scalar_dense": return x.dtype == torch.bool or 1
        case "nonzero": return x.new_empty(x.numel(), x.ndim, dtype=torch.long)
        case "_reorder_linear_weight": return x.new_empty(x.shape)
        case "split_with_sizes" if sum(y) != x.shape[z or 0]: # By counts of tokens
            return x.split_with_sizes([x.shape[z or 0], *[0] * (len(y) - 1)], z or 0)
        case "qlinear_prepack": return x.new_empty(x.shape[::-1])
        case "_grouped_mm": # Of a mixture of experts; in any type
            return x.new_empty(*[len(z)] * (y.ndim == 2), len(x), y.shape[-1])
        case "index" | "_index_put_impl_" if getattr(y[0], "dtype", None) == torch.bool:
            return x.new_empty(y[0].numel(), *x.shape[y[0].ndim:]) if name == "index" else x


def layer_norm_of_gpu(x: Tensor, *args, layer_norm=F.layer_norm, **kwargs) -> Tensor:
    "`F.layer_norm` as autocast computes it on a GPU: in float32."
    if torch.is_autocast_enabled("cpu"): x, *args = (y.float() if isinstance(y, Tensor) else y for y in (x, *args))
    return layer_norm(x, *args, **kwargs)


# Models without weights


def read_config(flag: str, model_args: ModelArguments, args: PPOConfig): # A setting that names a model
    "Its config.json; `ValueError` naming the setting."
    name = getattr(model_args, flag)
    check_model(flag, name)
    with loading(flag, name):
        return AutoConfig.from_pretrained(
            name, cache_dir=model_args.cache_dir, trust_remote_code=args.trust_remote_code
        )


def lora(model_args: ModelArguments) -> LoraConfig | None:
    "TRL's adapter; the name of a single layer is a name, where peft takes text for a regular expression."
    config = get_peft_config(model_args)
    if config and isinstance(config.target_modules, str) and config.target_modules.replace(".", "").isidentifier():
        if config.target_modules != "all-linear": config.target_modules = {config.target_modules}
    return config


def make_policy(
    model_args: ModelArguments, args: PPOConfig, config, dtype: torch.dtype
) -> ActorCritic:  # Of weights that are not trained
    "Policy, critic and reference as the trainer makes them."
    check_decoder(config, model_args.model_name_or_path)
    kwargs = dict(dtype=dtype if model_args.use_peft else torch.float32, trust_remote_code=args.trust_remote_code)
    with no_init_weights(): lm = AutoModelForCausalLM.from_config(config, **kwargs)
    lm.tie_weights() # Which does not happen without an initialization
    seen = []

    def first(hidden: Tensor) -> Tensor:
        seen.append(hidden[..., :1])
        return seen[0]

    with torch.no_grad(), replaced_head(lm, first):
        unchanged = lm(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False).logits is seen[0]
    if model_args.load_in_8bit or model_args.load_in_4bit:
        for p in {*lm.parameters()} - quantized(lm): p.data = p.data.float()
    if model_args.use_peft:
        saved = None
        if model_args.peft_path:
            with loading("peft_path", model_args.peft_path): saved = PeftConfig.from_pretrained(model_args.peft_path)
            check_adapter(saved)
        lm = add_adapter(lm.requires_grad_(False), saved or lora(model_args))
    policy = ActorCritic(lm, critic=args.critic, reference=bool(model_args.peft_path))
    if args.beta > 0 and not model_args.use_peft:
        with no_init_weights(): policy.ref_lm = AutoModelForCausalLM.from_config(config, **kwargs)
        fuse_layers(policy.ref_lm).requires_grad_(False)
        policy.ref_lm.tie_weights()
    policy.plain_head = policy.plain_head and unchanged
    return policy


def quantized(lm: PreTrainedModel) -> set[Tensor]:
    "Weights that bitsandbytes takes: those of linear layers, without the output layer's."
    return {m.weight for m in lm.modules() if type(m) is nn.Linear and m is not lm.get_output_embeddings()}


def note_weights(memory: Memory, policy: ActorCritic, reward: PreTrainedModel, model_args: ModelArguments):
    "Say which tensors are weights, and what they take."
    few = quantized(unwrapped(policy.lm))
    bits = next((size for flag, size in TABLES["quantized"].items() if getattr(model_args, flag)), None)
    for part, model in {"policy": policy, "reference": policy.ref_lm, "reward model": reward}.items():
        for x in [*model.parameters(), *model.buffers()] if model else ():
            memory.note(x, part, bits * x.numel() if bits and part == "policy" and x in few else x.nbytes)


# An update without numbers


@dataclass
class Rehearsal:
    "The phases of an update on fake tensors, by the trainer's own functions."
    policy: ActorCritic
    reward: PreTrainedModel
    memory: Memory
    args: PPOConfig
    device: Device
    dtype: torch.dtype
    cast: torch.autocast

    def __post_init__(self):
        args, self.lm = self.args, unwrapped(self.policy.lm)
        self.batch = args.per_device_train_batch_size * args.steps_per_generation
        self.rows = min(args.local_rollout_forward_batch_size or self.batch, self.batch)
        self.completion = args.max_completion_length
        # Without max_prompt_length, what the model can read
        self.prompt = args.max_prompt_length or max(1, (longest(self.lm.config) or 2048) - self.completion)
        self.length = self.prompt + self.completion
        self.passed = args.per_device_train_batch_size # Rows of a pass of an update
        if self.device.kind == "cpu" and not router_coefficient(self.lm, args):
            self.passed = rows_per_pass(self.passed, self.length, self.policy)
        self.judged = min(self.length, longest(self.reward.config) or self.length)
        self.launches: dict[str, int] = {} # Of a pass: by phase, of the prompt, of a later token, of a micro-batch
        self.sampling = Sampling(args.temperature, args.min_completion_length, (0,))

    def run(self):
        "Every phase, with the optimizer's states in memory."
        with ExitStack() as patches:
            if self.device.kind == "cuda":
                patches.enter_context(patch.object(F, "layer_norm", layer_norm_of_gpu))
                patches.enter_context(patch.object(kernels, "on_cpu", lambda _: False))
                half = self.dtype.itemsize == 2
                patches.enter_context(patch.multiple(
                    kernels, has_float32_products=lambda *_: half, gpu_memory=lambda _: self.device.memory,
                ))
            for p in self.policy.parameters():
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(lambda p: self.memory.note(p.grad, "gradients"))
            for phase in OVER:
                self.memory.phase = phase
                self.launches[phase] = self.counted(getattr(self, phase))

    def counted(self, work: Callable[[], None]) -> int:
        "Launches of kernels."
        before = self.memory.launched
        work()
        return self.memory.launched - before

    def tokens(self, rows: int) -> Tokens:
        "Prompts and completions of full length."
        query, response = (torch.ones(rows, n, dtype=torch.long) for n in (self.prompt, self.completion))
        return Tokens(query, query, response, response)

    @torch.no_grad()
    def generate(self):
        "Read the prompts, then sample one token with a full cache."
        n = self.length - 1
        with self.cast, patch.multiple(self.memory, part="cache", phase="filling"):
            full = self.next_token(None, n, n)
            self.fits = fits(self.policy, full)
            grow_in_blocks(full)
        with self.cast, ExitStack() as packed:
            with patch.object(self.memory, "part", "packed weights"):
                packed.enter_context(packed_for_generation(self.lm, self.rows))
            self.launches["prompt"] = self.counted(lambda: self.next_token(None, self.prompt, self.prompt))
            new = self.length if full is None else 1
            self.launches["token"] = self.counted(lambda: self.next_token(full, new, self.length))

    def next_token(self, cache: Cache | None, new: int, seen: int) -> Cache | None: # Tokens
        "Sample it; the cache as it is afterwards."
        mask = torch.ones(self.rows, seen, dtype=torch.long)
        logits, cache = self.policy.next_logits(mask[:, -new:], mask, cache)
        sample_tokens(sampling_logits(logits, self.sampling)[:, 0], torch.rand(self.rows))
        return cache

    @torch.no_grad()
    def logprobs(self):
        "Score tokens with the policy and with the reference."
        with self.cast:
            self.policy(self.tokens(self.rows), self.sampling, entropy=True)
            if self.args.beta > 0:
                with self.policy.as_reference(): self.policy(self.tokens(self.rows), self.sampling, values=False)

    @torch.no_grad()
    def score(self):
        "Pairs as long as prompt and completion, within the reward model's limit."
        pairs = torch.ones(min(self.args.reward_batch_size, self.batch), self.judged, dtype=torch.long)
        self.reward(input_ids=pairs, attention_mask=pairs)

    def update(self):
        "Passes of one optimizer step."
        more = self.args.gradient_accumulation_steps > 1 or self.passed < self.args.per_device_train_batch_size
        with recomputed(self.policy, self.args.recomputes):
            for _ in range(1 + more):
                self.launches["micro-batch"] = self.counted(self.micro_batch)

    def micro_batch(self):
        "Forward and backward pass."
        tokens = self.tokens(self.passed)
        with self.cast: out = self.policy(tokens, self.sampling, entropy=self.args.ent_coef > 0)
        (out.logprobs + out.values + (0. if out.entropy is None else out.entropy)).sum().backward()

    def least(self) -> dict[str, float]:
        "Seconds of an update that bytes and operations alone take; nothing where a rate is not known."
        def rate(dtype: torch.dtype) -> float | None:
            return self.device.single if dtype == torch.float32 else self.device.half

        speed, reward_speed = rate(self.dtype), rate(self.reward.dtype)
        if not (speed and reward_speed and self.device.read): return {}
        output, body = self.lm.get_output_embeddings().weight, self.lm.num_parameters(exclude_embeddings=True)
        head = output.numel()
        if output is not self.lm.get_input_embeddings().weight: body -= head
        rounds = -(-self.batch // self.rows)
        work = 2 * self.batch / speed # Seconds for a weight and a token of each row
        token = max(rounds * self.dtype.itemsize / self.device.read, work) * (body + head)
        once = work * (body * self.length + head * self.completion)
        passes = 2 + (self.policy.ref_lm is not None) + self.args.recomputes
        return dict(
            generate=self.completion * token + work * body * self.prompt,
            logprobs=2 * once,
            score=2 * self.batch / reward_speed * self.judged * self.reward.num_parameters(exclude_embeddings=True),
            update=self.args.num_iterations * passes * once,
        )

    @property
    def graph(self) -> bool:
        "Are tokens sampled from a CUDA graph, as far as the configuration can tell?"
        args = self.args
        reads_tokens = not args.use_vllm and {*generation_settings(args)} & {*PROCESSORS}
        chosen = args.cache_implementation != "dynamic" and not args.use_vllm
        return self.device.kind == "cuda" and chosen and self.fits and not reads_tokens

    def estimate(self, floor: dict[str, float]) -> dict[str, float]: # What `least` gives
        "Seconds of an update on a GPU: kernels take a time of their own, and may wait for Python to launch them."
        if not floor: return {}
        args, n = self.args, self.launches
        rounds = -(-self.batch // self.rows)
        times_run = dict(generate=rounds, logprobs=rounds, score=-(-self.batch // args.reward_batch_size),
                      update=args.num_iterations * -(-self.batch // args.per_device_train_batch_size))
        each = dict(n, generate=n["prompt"], update=n["micro-batch"])
        run = {phase: times_run[phase] * each[phase] for phase in floor}
        launched = dict(run)
        later = rounds * (self.completion - 1) * n["token"]
        run["generate"] += later
        if not self.graph: launched["generate"] += later
        return {phase: max(s + TABLES["kernel"] * run[phase], TABLES["launch"] * launched[phase])
                for phase, s in floor.items()}


# The plan


class Plan(NamedTuple):
    "What a run will take."
    device: Device
    dtype: torch.dtype                  # Of matrix products, and of weights that are not trained
    parameters: dict[str, int]          # By model; and what is trained
    phases: dict[str, Counter]  # Bytes by part, at the most of each phase
    floor: dict[str, float]  # Seconds of an update by phase, at the device's limits; empty where rates are not known
    times: dict[str, float]  # What they may be: measured over floor on a CPU, with launches on a GPU
    launches: dict[str, int] # Of kernels, in a pass over a `prompt`, `token` or `micro-batch`, and by phase
    graph: bool              # Is that step a CUDA graph?

    @property
    def phase(self) -> str:
        "The one with the peak."
        return max(self.phases, key=lambda phase: self.phases[phase].total())

    @property
    def peak(self) -> int: # Bytes
        "The most memory that is used at once."
        return self.phases[self.phase].total()

    @property
    def comfortable(self) -> bool:
        "Does it fit even if the peak is as much higher as measured ones may be?"
        return self.device.memory >= self.peak * (1 + TABLES["tolerance"])

    @property
    def verdict(self) -> str:
        "Whether it fits."
        peak, memory = self.peak / 1e9, self.device.memory / 1e9
        room = f"{self.device.name}: {peak:.1f} of {memory:.1f} GB"
        if peak > memory: return f"does not fit {room}, {peak - memory:.1f} GB too much"
        if not self.comfortable: return f"may not fit {room}, only {memory - peak:.1f} GB left"
        return f"fits {room}, {memory - peak:.1f} GB left"


def plan(model_args: ModelArguments, args: PPOConfig, device: Device) -> Plan:
    "Memory and time of a run, from the models' configs; `ValueError` where one cannot be read."
    dtype = dtype_on(device, model_args.dtype)
    ours, judges = (read_config(flag, model_args, args) for flag in ("model_name_or_path", "reward_model_name_or_path"))
    memory, cast = Memory(ours.get_text_config().vocab_size), torch.autocast("cpu", dtype, dtype != torch.float32)
    # Nothing is moved: all fake tensors are on one device
    stay = patch.object(nn.Module, "to", lambda module, *_, **__: module)
    with FakeTensorMode(allow_non_fake_inputs=True), memory, stay:
        try:
            with cast: policy = make_policy(model_args, args, ours, dtype)
        except DynamicOutputShapeException as e:
            raise ValueError(f"plan loads no weights, and this model or adapter reads their values ({e})") from e
        with no_init_weights():
            kind = getattr(torch, args.reward_dtype) if args.reward_dtype else dtype
            reward = AutoModelForSequenceClassification.from_config(
                judges, dtype=kind, trust_remote_code=args.trust_remote_code
            )
        fuse_layers(reward).eval().requires_grad_(False)
        note_weights(memory, policy, reward, model_args)
        trained = get_model_param_count(policy, trainable_only=True)
        memory.held["optimizer"] = int(trained * 8 * ((1 + 4 / 256) / 4 if "8bit" in str(args.optim) else 1))
        rehearsal = Rehearsal(policy, reward, memory, args, device, dtype, cast)
        rehearsal.run()
    phases = {phase: memory.peaks[phase] for phase in OVER}
    for held in phases.values():
        held["program"] = TABLES["program"][device.kind]
        if device.kind == "cpu": held["kept by malloc"] = int(TABLES["kept"] * (held["activations"] + held["logits"]))
    copied = get_model_param_count(policy.ref_lm) if policy.ref_lm else 0
    parameters = dict(policy=get_model_param_count(policy) - copied, trained=trained,
                      reward=get_model_param_count(reward))
    floor = rehearsal.least()
    times = {phase: s * OVER[phase] for phase, s in floor.items()}
    if device.kind == "cuda": times = rehearsal.estimate(floor)
    return Plan(device, dtype, parameters, phases, floor, times, rehearsal.launches, rehearsal.graph)


# What to change


def changes(model_args: ModelArguments, args: PPOConfig, gpu: bool) -> list[dict]: # Of either
    "Settings that save memory, those that change least of the run first."
    rows, half = args.per_device_train_batch_size, args.max_completion_length // 2
    batch = rows * args.steps_per_generation
    found = [
        dict(
            per_device_train_batch_size=1,
            gradient_accumulation_steps=rows * args.gradient_accumulation_steps,
            steps_per_generation=batch,
        ),
        dict(reward_batch_size=1),
        dict(local_rollout_forward_batch_size=max(1, (args.local_rollout_forward_batch_size or batch) // 4)),
        dict(gradient_checkpointing=True),
    ]
    if gpu and "8bit" not in str(args.optim): found.append(dict(optim="adamw_8bit"))
    found.append(dict(use_peft=True))
    if gpu and not model_args.load_in_4bit:
        found += [dict(load_in_8bit=True), dict(load_in_8bit=False, load_in_4bit=True)]
    return [*found, dict(max_completion_length=half, min_completion_length=min(args.min_completion_length, half))]


def changed(settings: Any, values: dict) -> Any: # A dataclass instance
    "A copy with those of the values that are its own, which were checked before."
    new = copy(settings)
    vars(new).update((name, value) for name, value in values.items() if name in vars(settings))
    return new


def advice(
    model_args: ModelArguments, args: PPOConfig, found: Plan
) -> list[tuple[str, int, Plan]]:  # Flags, the bytes that they save, and the plan with them
    "Changes, each on top of those before it, until it fits; without those that the model does not support."
    kept, first = [], found
    for values in changes(model_args, args, found.device.kind == "cuda"):
        if found.comfortable: break
        both = changed(model_args, values), changed(args, values)
        try: new = plan(*both, found.device)
        except ValueError: continue
        saved = found.peak - new.peak
        if saved < .01 * first.peak: continue
        now = vars(model_args) | vars(args)
        flags = " ".join(f"--{name} {value}" for name, value in values.items() if value != now[name])
        kept.append((flags, saved, new))
        (model_args, args), found = both, new
    return kept


# What a person sees


def plan_table(found: Plan) -> Table:
    "GB by part and phase."
    title = f"Memory on {found.device.name}, {str(found.dtype).removeprefix('torch.')}"
    table = Table("GB at the peak of", *found.phases, box=box.SIMPLE_HEAD, title=title)
    for column in table.columns[1:]: column.justify = "right"
    for part in TABLES["parts"]:
        sizes = [f"{held[part] / 1e9:.2f}" if held[part] >= 5e6 else "" for held in found.phases.values()]
        if any(sizes): table.add_row(part, *sizes)
    table.add_section()
    marks = {found.phase: " *"}
    table.add_row("all", *(f"{held.total() / 1e9:.2f}{marks.get(phase, '')}" for phase, held in found.phases.items()))
    return table


def plan_text(model_args: ModelArguments,
              args: PPOConfig,
              gpu: str | None = None, # A name from `GPUS`; None: this machine, and a line each for three GPUs
) -> Group:
    "The plan, for a terminal; `ValueError` for a GPU that is not known and a config that cannot be read."
    found = plan(model_args, args, known_gpu(gpu) if gpu else this_machine())
    on_gpu, n, others = found.device.kind == "cuda", found.parameters, []
    assumed = {name: TABLES[name] * 1e6 for name in ("launch", "kernel")}
    told = advice(model_args, args, found)
    if not gpu:
        half = found if on_gpu else plan(model_args, args, GPUS["T4"])
        others = [half._replace(device=GPUS[name]) for name in ("T4", "L4", "A100")]
    last = told[-1][2] if told else found
    text = TEMPLATES.get_template("plan.txt").render(
        found=found, assumed=assumed, told=told, last=last, others=others
    )
    return Group(
        f"Policy: {n['policy']:,} parameters, {n['trained']:,} of them trained. Reward model: {n['reward']:,}.",
        plan_table(found),
        text.rstrip(),
    )

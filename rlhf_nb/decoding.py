"""Sampling in steps of fixed shapes, replayed from a CUDA graph: launching kernels takes longer than running them.

Keys and values have their final size, and the position is a number on the device, so a step never waits for the host.
Every 8 tokens we check which rows have ended, and halve the batch when half of them have. `rollout.generate`, the plain
loop, gives the same tokens up to rounding; `tests/test_decoding.py` compares them. It takes over where transformers
does not say that a model computes with fixed shapes, where its step cannot be captured, for logits processors (they
read the tokens so far) and for sharded weights. What was sampled is scored anyway, and must have the same log-probs.
"""
import logging
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from .errors import first_line
from .kernels import token_logprobs
from .models import ActorCritic, unwrapped
from .ppo import masked_mean
from .rollout import Generated, Generation, generate, sample_tokens

logger = logging.getLogger(__name__)

CHECK_EVERY = 8 # Steps between two checks of which rows have ended; each waits for the GPU
MIN_ROWS = 4 # Rows that stay together: with fewer, a step takes as long, for it reads the same weights
FIXABLE = "DynamicLayer", "DynamicSlidingWindowLayer", "LinearAttentionLayer", "DummyLayer" # Layers of a cache
MAX_DIFFERENCE = .5 # Nats per token, a mean: far more than rounding, less than a mistake
WARM_UP = 2  # Steps before one is captured, in which libraries allocate what they need


class FixedLayer(StaticLayer):
    "A cache layer with space for all positions; `at`, on the device, is the next one."

    def __init__(self,
                 layer: DynamicLayer, # After the prompts
                 length: int,         # Positions
                 at: Tensor):         # The next one; all layers share it, (1,)
        super().__init__(length)
        self.is_sliding = layer.is_sliding # The mask hides what is outside of the window
        self.is_initialized = True
        self.cumulative_length = at
        found = layer.keys, layer.values
        self.dtype = min((x.dtype for x in found), key=lambda dtype: dtype.itemsize) # Autocast attends in it
        self.device = at.device
        self.keys, self.values = (x.new_zeros(*x.shape[:2], length, x.shape[3], dtype=self.dtype) for x in found)
        kept = layer.keys.shape[2] # Of the prompt; a sliding window has only its end
        start = layer.get_seq_length() - kept
        for space, x in zip((self.keys, self.values), found): space[:, :, start:start + kept] = x

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        "Write keys and values of one position, and return all."
        for space, new in ((self.keys, key_states), (self.values, value_states)):
            space.index_copy_(2, self.cumulative_length, new.to(space.dtype))
        return self.keys, self.values

    def get_seq_length(self) -> Tensor: # Scalar
        "The position that is next."
        return self.cumulative_length[0]

    def reorder_cache(self, beam_idx: Tensor):
        "Keep some rows."
        self.keys, self.values = self.keys[beam_idx], self.values[beam_idx]


def fits(policy: ActorCritic, cache: Cache | None) -> bool:
    "Does transformers say that the model computes with fixed shapes, can its cache have them, and is it on one device?"
    kinds = {type(layer) for layer in getattr(cache, "layers", ())}
    known = all(kind.__name__ in FIXABLE and kind.__module__ == Cache.__module__ for kind in kinds)
    together = len({p.device for p in policy.lm.parameters()}) == 1
    return bool(kinds) and known and together and unwrapped(policy.lm)._can_compile_fullgraph


class FixedBatch:
    "Rows that are sampled a token at a time, with all state on the device: a step neither waits nor changes a shape."

    def __init__(self,
                 policy: ActorCritic,
                 query_mask: Tensor,      # (B, P)
                 cache: Cache,            # After the prompts
                 generation: Generation,
                 uniforms: Tensor | None): # (B, max_length); None: the most likely tokens
        self.policy, self.cache, self.generation, self.uniforms = policy, cache, generation, uniforms
        device = query_mask.device
        n, width = query_mask.shape
        length = generation.max_length
        self.at = torch.full((1,), width, device=device)         # Of the next token, in the cache
        self.t = torch.zeros(1, dtype=torch.long, device=device) # And in the completion
        self.mask = F.pad(query_mask.long(), (0, length))
        self.token = torch.zeros(n, 1, dtype=torch.long, device=device)
        self.rows = torch.arange(n, device=device)               # Which these are among the B
        self.eos = torch.tensor(generation.sampling.eos_token_ids, device=device)
        self.completions = torch.full((n, length), generation.pad_id, device=device)
        self.sampled = torch.zeros_like(self.completions)
        self.logprobs = torch.zeros(n, length, device=device)
        self.ended = torch.zeros(n, dtype=torch.bool, device=device)
        for i, layer in enumerate(cache.layers):
            if isinstance(layer, DynamicLayer): cache.layers[i] = FixedLayer(layer, width + length, self.at)

    def take(self, logits: Tensor): # (n, 1, V)
        "Sample a token for each row, and note it."
        sampling = self.generation.sampling
        x = logits[:, -1].float()
        if sampling.temperature != 1: x = x / sampling.temperature
        if sampling.min_length:
            barred = x.index_fill(1, self.eos, torch.finfo(x.dtype).min)
            x = torch.where(self.t < sampling.min_length, barred, x)
        if self.uniforms is None:
            new = x.argmax(-1)
            found = token_logprobs(x, new)
        else:
            for warper in self.generation.warpers: x = warper(None, x)
            new, found = sample_tokens(x, self.uniforms[self.rows].index_select(1, self.t)[:, 0])
        place = self.rows, self.t.expand_as(self.rows)
        before = self.ended[self.rows]
        self.completions.index_put_(place, new.masked_fill(before, self.generation.pad_id))
        self.logprobs.index_put_(place, found.masked_fill(before, 0.))
        self.sampled.index_put_(place, (~before).long())
        self.ended.index_copy_(0, self.rows, before | (new[:, None] == self.eos).any(1))
        self.token.copy_(new[:, None])
        self.t.add_(1)

    def step(self):
        "Compute the next token of each row."
        self.mask.index_fill_(1, self.at, 1)
        inputs = self.policy.accepted(self.token, self.mask, self.mask.sum(1, keepdim=True) - 1, keep=1)
        self.take(self.policy.run_with_cache(inputs, self.cache).logits)
        self.at.add_(1)

    def running(self, start: int, end: int) -> list[int]: # Tokens since the last check
        "Apply stop strings; return the indices of rows that have not ended."
        for t in range(start, end) if self.generation.stop else ():
            hit = self.generation.stop(self.completions[:, :t + 1]) & (self.sampled[:, t] > 0)
            self.ended |= hit
            for x, rest in ((self.completions, self.generation.pad_id), (self.sampled, 0), (self.logprobs, 0.)):
                x[:, t + 1:].masked_fill_(hit[:, None], rest)
        return (~self.ended[self.rows]).nonzero()[:, 0].tolist()

    def shrink(self, running: list[int]) -> bool: # From `running`; is it smaller now?
        "Halve the batch while it still holds all rows that have not ended."
        n = len(self.rows)
        while n // 2 >= max(len(running), MIN_ROWS): n //= 2
        if n == len(self.rows): return False
        others = [i for i in range(len(self.rows)) if i not in {*running}]
        kept = torch.tensor([*running, *others][:n], device=self.rows.device)
        self.rows, self.mask, self.token = self.rows[kept], self.mask[kept], self.token[kept]
        self.cache.reorder_cache(kept)
        return True


class NotFixed(RuntimeError):
    "A model whose steps have no fixed shapes, or cannot be captured."


class Repeated:
    "A function without arguments that is called again and again: on a GPU captured, then replayed."

    def __init__(self, function: Callable[[], None], capture: bool):
        self.function, self.capture = function, capture
        self.calls, self.graph = 0, None

    def __call__(self):
        if self.capture and self.calls == WARM_UP: self.graph = capture(self.function)
        self.calls += 1
        if self.graph: self.graph.replay()
        elif self.capture and self.calls == WARM_UP: call_without_waits(self.function)
        else: self.function()


def call_without_waits(function: Callable[[], None]):
    "Call a function as a capture will; raise `NotFixed` if it waits for the GPU." # A failed capture leaves traces
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        # Where transformers asks this, it goes another way within a capture
        with patch.object(torch.cuda, "is_current_stream_capturing", lambda: True): function()
    except RuntimeError as e: raise_not_fixed(e)
    finally: torch.cuda.set_sync_debug_mode(before)


def capture(function: Callable[[], None]) -> torch.cuda.CUDAGraph:
    "Capture a function as a CUDA graph; raise `NotFixed` if that fails."
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"): function()
    except RuntimeError as e: raise_not_fixed(e.__context__ or e) # The end of a failed capture fails as well
    finally: torch.cuda.set_stream(stream) # Which it leaves as it is
    return graph


def raise_not_fixed(e: BaseException):
    "Raise `NotFixed` with the cause, but out of memory as it is: the sampler then takes fewer rows."
    if isinstance(e, torch.OutOfMemoryError): raise e
    raise NotFixed(first_line(e)) from e


@torch.no_grad()
def generate_static(policy: ActorCritic,
                    query_ids: Tensor,        # Prompts, padded on the left, (B, P)
                    query_mask: Tensor,       # 1 for real tokens, (B, P)
                    generation: Generation,   # Without processors
                    uniforms: Tensor | None,  # As for `generate`
) -> Generated:
    "Complete prompts in steps of fixed shapes, on a GPU from a CUDA graph; raise `NotFixed` where the model cannot."
    logits, cache = policy.next_logits(query_ids, query_mask.long(), None)
    if not fits(policy, cache): raise NotFixed(f"a {policy.lm.config.model_type} does not compute with fixed shapes")
    batch = FixedBatch(policy, query_mask, cache, generation, uniforms)
    batch.take(logits)
    step, seen, done = None, 0, 1
    while running := batch.running(seen, done):
        if done == generation.max_length: break
        if batch.shrink(running) or step is None: step = Repeated(batch.step, capture=query_ids.is_cuda)
        seen = done
        done = min(done + CHECK_EVERY, generation.max_length)
        for _ in range(seen, done): step()
    longest = batch.sampled.sum(1).max().item()
    found = (x[:, :longest] for x in (batch.completions, batch.sampled, batch.logprobs))
    return Generated(*found, batch.ended)


class FixedSteps:
    "Generates in steps of fixed shapes as long as that works; logs once why it no longer does."

    def __init__(self, usable: bool): self.usable = usable

    def generate(self,
                 policy: ActorCritic,
                 query_ids: Tensor,       # (B, P)
                 query_mask: Tensor,      # (B, P)
                 generation: Generation,
                 uniforms: Tensor | None, # (B, max_length)
    ) -> Generated:
        "Complete prompts, by `generate` where `generate_static` cannot."
        given = policy, query_ids, query_mask, generation, uniforms
        if self.usable:
            try: return generate_static(*given)
            except NotFixed as e: logger.warning("From now on the plain loop samples, without a CUDA graph: %s", e)
            self.usable = False
        return generate(*given)

    def agree(self, scored: list[dict[str, Tensor]]) -> bool: # From `score_batch`
        "Whether the steps computed the policy's log-probs; if not, they are not used again."
        if not self.usable: return True
        found = [masked_mean((x["logprobs"] - x["sampling_logprobs"]).abs(), x["response_mask"]) for x in scored]
        difference = torch.stack(found).nan_to_num().max().item() # NaN has another cause
        if difference < MAX_DIFFERENCE: return True
        logger.warning("Log-probs of steps of fixed shapes differ from the policy's by %.2g nats per token: the plain "
                       "loop samples these completions again, and all from now on", difference)
        self.usable = False
        return False

"""Completions from a vLLM server, through TRL's client; the server receives the policy's weights after each update.

The server must run in development mode, accept weights, and return log-probs of the distribution that it samples from:

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{"backend": "nccl"}' \\
        --logprobs-mode processed_logprobs
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from .config import PPOConfig
from .models import CRITIC, Sampling, unwrapped
from .rollout import NAMES, Batch, Generated, Generation, Stop, by_length, pad_rows, padded

__all__ = ["VLLMSampler", "base_weights"]

Decoder = PreTrainedModel | PeftModel
Reply = tuple[list[int], list[float]] # Tokens of a completion, and their log-probs
LOGPROBS_MODE = "processed_logprobs"


def base_layers(module: nn.Module,  # Of the model without peft's wrapper
                adapter: str | None,
                prefix: str = "",   # Of its parameters' names
) -> Iterator[tuple[str, nn.Module, BaseTunerLayer | None]]:
    "Modules of the base model with their prefix, and the adapter around each; `ValueError` for single trained tokens."
    if isinstance(module, ModulesToSaveWrapper): module = module.modules_to_save[adapter]
    if isinstance(module, AuxiliaryTrainingWrapper):
        raise ValueError(f"{prefix[:-1]}: single trained tokens are not weights of the base model")
    layer = module if isinstance(module, BaseTunerLayer) else None
    own = layer.get_base_layer() if layer else module
    yield prefix, own, layer
    for name, child in own.named_children(): yield from base_layers(child, adapter, f"{prefix}{name}.")


@torch.no_grad()
def base_weights(lm: Decoder,
                 merge: bool = True,  # False: as they are without the adapter
) -> Iterator[tuple[str, Tensor]]:    # Names as in the base model; tied weights once
    "Weights of the base model with the active adapter merged in; `ValueError` where that is not possible."
    adapter = lm.active_adapter if isinstance(lm, PeftModel) else None
    seen = {} # Weights, and the adapter around each
    for prefix, own, layer in base_layers(unwrapped(lm), adapter):
        merged = own
        if layer and merge:
            copy = deepcopy(layer)
            copy.merge(adapter_names=[adapter])
            merged = copy.get_base_layer()
        for (name, p), now in zip(own.named_parameters(recurse=False), merged.parameters(recurse=False)):
            if p not in seen: yield prefix + name, now.data
            elif layer or seen[p]:
                raise ValueError(f"{prefix + name} is tied to another layer, and only one of them is adapted")
            seen[p] = layer


def checksums(lm: Decoder) -> list[int]: # One per trained weight of the policy
    "Sums over the bits of trained weights; they differ after an update."
    trained = [p for name, p in lm.named_parameters() if p.requires_grad and CRITIC not in name.split(".")]
    return torch.stack([p.detach().view(torch.int32).sum() for p in trained]).tolist()


def end_of(ids: list[int],      # A completion
           sampling: Sampling,
           stop: Stop | None = None,
) -> tuple[int, bool]:          # Tokens that count; did it end by itself?
    "Where EOS or a stop string ends a completion."
    for n, token in enumerate(ids, 1):
        if token in sampling.eos_token_ids or stop and stop(torch.tensor([ids[:n]])).item(): return n, True
    return len(ids), False


class VLLMSampler:
    "Generates completions with a vLLM server, whose client is in the main process; `ValueError` if it cannot join."
    def __init__(self,
                 lm: Decoder,            # The policy's
                 args: PPOConfig,
                 device: torch.device):  # Where its weights are
        self.args = args
        self.client = None # In other processes
        self.sent = None   # Checksums of the weights that the server has
        if getattr(unwrapped(lm), "is_quantized", False):
            raise ValueError("use_vllm: the server cannot take over weights in 8 or 4 bits")
        for name in filter(NAMES["vllm"].get, args.generation_kwargs or {}):
            raise ValueError(f"generation_kwargs: {name} is set by {NAMES['vllm'][name]} here")
        if not PartialState().is_main_process: return
        from trl.generation.vllm_client import VLLMClient  # Needs `requests`

        address = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
        try:
            client = VLLMClient(base_url=address, group_port=args.vllm_group_port,
                                connection_timeout=args.vllm_server_timeout)
            mode = client.get_server_info()["model_config"]["logprobs_mode"]
            if mode != LOGPROBS_MODE:
                raise ValueError(f"the server at {address} gives {mode}; start it with --logprobs-mode {LOGPROBS_MODE}")
            self.shapes = [(name, str(p.dtype).removeprefix("torch."), list(p.shape))
                           for name, p in base_weights(lm, merge=False)]
            client.init_communicator(device)
        except Exception as e: raise ValueError(f"use_vllm: {e}") from e
        self.client = client

    def send_weights(self, lm: Decoder):
        "Send the weights if the server has others."
        now = checksums(lm)
        if self.sent == now: return
        with torch.autocast(lm.device.type, enabled=False):
            self.client.update_named_params(self.shapes, base_weights(lm))
        self.client.reset_prefix_cache()
        self.sent = now

    def request(self,
                prompt: list[int],  # Token ids
                seed: int | None,   # None: the most likely tokens
                generation: Generation,
    ) -> Reply:
        "Ask for one completion; `ValueError` if the reply is not one."
        args = self.args
        sampling = generation.sampling
        most = generation.max_length
        own = dict(min_tokens=sampling.min_length, ignore_eos=True, stop_token_ids=[*sampling.eos_token_ids],
                   stop=args.stop_strings, seed=seed, skip_special_tokens=False)
        reply = self.client.generate([prompt], temperature=0. if seed is None else sampling.temperature,
                                     max_tokens=most, top_p=args.top_p, top_k=args.top_k, min_p=args.min_p or 0.,
                                     repetition_penalty=args.repetition_penalty,
                                     generation_kwargs=(args.generation_kwargs or {}) | own)
        ids = reply["completion_ids"][0]
        logprobs = [math.nan if x is None else x for x, *_ in reply["logprobs"][0]]
        if 0 < len(ids) == len(logprobs) <= most: return ids, logprobs
        raise ValueError(f"{len(ids)} tokens and {len(logprobs)} log-probs for a completion of at most {most}")

    def __call__(self,
                 lm: Decoder,             # The policy's
                 queries: list[Tensor],   # Prompts, 1-D
                 generation: Generation,
                 uniforms: Tensor | None, # One number per prompt and position, (N, max_length); None: greedy
                 batch_size: int,         # Prompts of this process at once
    ) -> list[Batch]:
        "As `generate_batches`; `ConnectionError` in every process if the server fails."
        state = PartialState()
        seeds = [None] * len(queries) if uniforms is None else (uniforms[:, 0].double() * 2**24).long().tolist()
        asked = gather_object([(q.tolist(), seed) for q, seed in zip(queries, seeds)])
        reply: Any = None
        failed = None
        if self.client:
            try:
                self.send_weights(lm)
                # A request for each completion: within one, all would be sampled with the same seed
                with ThreadPoolExecutor(batch_size * state.num_processes) as pool:
                    reply = [*pool.map(lambda one: self.request(*one, generation), asked)]
            except Exception as e:
                failed = e
                reply = f"The vLLM server failed: {type(e).__name__}: {e}"
        reply, = broadcast_object_list([reply])
        if isinstance(reply, str): raise ConnectionError(reply) from failed
        with state.split_between_processes(reply) as mine:
            return [self.batch(batch, queries, mine, generation) for batch in by_length(queries, batch_size)]

    def batch(self,
              places: list[int],      # Of the batch's prompts
              queries: list[Tensor],  # All prompts
              replies: list[Reply],   # To all prompts
              generation: Generation,
    ) -> Batch:
        "Some replies as `generate_batches` gives completions, cut where they end."
        device = queries[0].device
        rows = []
        for tokens, found in (replies[i] for i in places):
            n, end = end_of(tokens, generation.sampling, generation.stop)
            rows.append([torch.tensor(x, device=device) for x in (tokens[:n], found[:n], end)])
        ids, logprobs, ended = zip(*rows)
        made = Generated(*padded(ids, generation.pad_id, "right"), pad_rows(logprobs, "right"), torch.stack(ended))
        return places, padded([queries[i] for i in places], generation.pad_id), made

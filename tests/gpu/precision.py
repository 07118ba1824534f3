"""How an architecture computes in 16 bits on the GPU, beside the same weights in float32 on the CPU.

python tests/gpu/precision.py [NAME ...] > TABLE: a line per decoder of `tests/architectures.py`.
"""
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent))
from architectures import DECODERS, REFUSED, VOCAB, decoder  # noqa: E402

from rlhf_nb.config import PPOConfig  # noqa: E402
from rlhf_nb.errors import first_line  # noqa: E402
from rlhf_nb.models import ActorCritic, Sampling, Tokens, load_policy  # noqa: E402
from rlhf_nb.rollout import Generation, generate_batches, score_batch  # noqa: E402

SAMPLING = Sampling(1., 0, tuple(range(2, 40))) # Many tokens end a completion, so that rows have several lengths
STREAM = "hidden_states" # Argument of decoder layers


class Precision(NamedTuple):
    "What was seen of one architecture."
    streams: set[torch.dtype]   # Of the hidden states that decoder layers receive
    largest: float              # Absolute activation among them
    finite: bool                # Are the log-probs of the rollout?
    difference: float           # Largest, of log-probs to float32
    usual: float                # Nine of ten log-probs differ less


def load(name: str, dtype: torch.dtype, device: str):
    "The model as it would be loaded from a folder."
    model = decoder(name)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder, dtype=dtype).eval().to(device)


def sample(policy: ActorCritic) -> tuple[Tokens, dict]:
    "Completions of prompts of four lengths, and what is known of their tokens."
    source = torch.Generator().manual_seed(1)
    device = policy.value_head.weight.device
    queries = [torch.randint(60, VOCAB, (n,), generator=source).to(device) for n in (3, 9, 6, 12)]
    uniforms = torch.rand(4, 8, generator=source).to(device)
    (_, query, made), = generate_batches(policy, queries, Generation(SAMPLING, 8, 3), uniforms)
    return Tokens(*query, made.ids, made.mask), score_batch(policy, query, made, SAMPLING, reference=True)


@torch.no_grad()
def measure(name: str,
            dtype: torch.dtype,                # A type of 16 bits
            change: Callable = lambda lm: None, # Applied to the loaded model
) -> Precision:
    "Load, sample and score with LoRA, as a run does."
    args = PPOConfig("unused", fp16=dtype == torch.float16, bf16=dtype == torch.bfloat16)
    lm = load(name, dtype, "cuda")
    change(lm)
    policy = load_policy(lm, args, None, LoraConfig(r=4, task_type="CAUSAL_LM"))
    streams: set[torch.dtype] = set()
    sizes = [0.]

    def note(module, positional, named):
        x = named[STREAM] if STREAM in named else positional[0]
        streams.add(x.dtype)
        sizes.append(x.abs().max().item())
    for module in policy.lm.modules():
        if isinstance(module, GradientCheckpointingLayer): module.register_forward_pre_hook(note, with_kwargs=True)
    with torch.autocast("cuda", dtype): tokens, found = sample(policy)
    mask = tokens.response_mask.cpu() > 0
    logprobs = found["logprobs"].cpu()[mask]
    plain = load(name, torch.float32, "cpu")
    change(plain)
    expected = ActorCritic(plain, reference=False)(Tokens(*(x.cpu() for x in tokens)), SAMPLING).logprobs[mask]
    both = torch.cat([logprobs, found["sampling_logprobs"].cpu()[mask]])
    difference = (logprobs - expected).abs()
    return Precision(streams, max(sizes), bool(both.isfinite().all()), difference.max().item(),
                     difference.quantile(.9).item())


def dtype_names(streams: set[torch.dtype]) -> str:
    return "+".join(sorted(str(x).removeprefix("torch.") for x in streams)) or "-"


def main(names: list[str]):
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    print("name | fp16, stream | largest | difference | of 9 in 10 | bf16, stream | largest | difference | of 9 in 10")
    for name in names or [name for name in DECODERS if name not in REFUSED]:
        cells = [name]
        for dtype in (torch.float16, torch.bfloat16):
            try:
                found = measure(name, dtype)
                differences = [f"{found.difference:.2g}", f"{found.usual:.2g}"] if found.finite else ["NOT FINITE", ""]
                cells += [dtype_names(found.streams), f"{found.largest:.3g}", *differences]
            except Exception as e: # Of many kinds, from the models' code
                cells += ["FAILS", "", f"{type(e).__name__}: {first_line(e)}"[:200], ""]
        print(" | ".join(cells), flush=True)


if __name__ == "__main__":
    with suppress(BrokenPipeError): main(sys.argv[1:])

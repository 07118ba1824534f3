"""Milliseconds per token: our sampler and transformers' `generate`, random models of real shapes: decode.py OUT.json"""
import gc
from functools import cache
from tempfile import mkdtemp
from typing import Any

import torch
from datasets import Dataset
from found import Found, arguments, on_gpu, timed
from models import decoder_config, random_decoder
from peft import LoraConfig, get_peft_model
from phases import generating
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rlhf_nb.config import PPOConfig, has_bf16
from rlhf_nb.models import Decoder
from rlhf_nb.rollout import Rollout
from rlhf_nb.testing import count_e, policy_tokenizer, shipped_texts
from rlhf_nb.trainer import PPOTrainer

SHAPES = "BLOOM 560m", "Gemma 3 270M", "Qwen3 0.6B", "Llama 3.2 1B"
ROWS = 1, 8, 32
PROMPT = 64                                     # Tokens
LOOPS = dict(eager="dynamic", graph=None)       # Name -> cache_implementation; None: what the trainer chooses
ADAPTER = dict(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
MANNERS = {"sampled": False, "most likely": True} # -> greedy
Key = tuple[int, str]                           # Rows, a key of `MANNERS`
Measured = dict[Key, tuple[float, Rollout]]     # Seconds, and what was generated


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    "Of all models; it is trained once."
    return policy_tokenizer()


def prompts(rows: int) -> list[dict]:
    "Different texts, all longer than the prompts may be."
    text = " ".join(shipped_texts())
    return [dict(prompt=text[1000 * i:1000 * i + 1000]) for i in range(rows)]


def dtype_here() -> torch.dtype:
    "What the card does best."
    return torch.bfloat16 if has_bf16(torch.device("cuda" if on_gpu() else "cpu")) else torch.float16


def trainer_of(name: str, implementation: str | None, length: int, args) -> PPOTrainer:
    "A trainer with an adapter on a random model; completions have this length."
    dtype = dtype_here()
    settings = {} if implementation is None else dict(cache_implementation=implementation)
    return PPOTrainer(
        random_decoder(decoder_config(name, args.quick), dtype),
        count_e,
        PPOConfig(
            output_dir=mkdtemp(dir=args.work),
            per_device_train_batch_size=max(ROWS),
            max_prompt_length=PROMPT,
            max_completion_length=length,
            min_completion_length=length,
            beta=0.,
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        ),
        Dataset.from_list(prompts(max(ROWS))),
        processing_class=tokenizer(),
        peft_config=LoraConfig(**ADAPTER),
    )


def sample(trainer: PPOTrainer, rows: int, manner: str) -> tuple[float, Rollout]: # Seconds of generating alone
    "Complete that many prompts, with the same random numbers each time."
    with generating() as seconds:
        made = trainer.rollout(prompts(rows), torch.Generator().manual_seed(0), greedy=MANNERS[manner])
    if not seconds: raise RuntimeError("neither generate nor generate_static was called")
    return sum(seconds), made


def measure(trainer: PPOTrainer, found: Found, what: str) -> tuple[Measured, dict[int, float]]: # And each first call
    "All numbers of rows, sampled and not."
    measured: Measured = {}
    first = {}
    for rows in ROWS:
        if not found.has(10, f"{what}, {rows} rows"): break
        first[rows] = sample(trainer, rows, "sampled")[0]
        for manner in MANNERS: measured[rows, manner] = sample(trainer, rows, manner)
    return measured, first


def same(one: Rollout, two: Rollout) -> float:
    "Share of completions with the same tokens."
    pairs = zip(one.tokens.response_ids.tolist(), two.tokens.response_ids.tolist())
    equal = [a == b for a, b in pairs]
    return sum(equal) / len(equal)


def adapted(name: str, args) -> Decoder:
    "The same model with an adapter, for transformers' own `generate`."
    lm = random_decoder(decoder_config(name, args.quick), dtype_here())
    return get_peft_model(lm, LoraConfig(**ADAPTER)).eval()


def inputs_of(rows: int, device: torch.device) -> dict[str, Tensor]:
    "Ids and mask of the prompts, (rows, PROMPT) each."
    ids = torch.tensor([tokenizer()(row["prompt"]).input_ids[-PROMPT:] for row in prompts(rows)], device=device)
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids))


def theirs(lm: Decoder, rows: int, length: int, **settings) -> float: # Seconds of the second call
    "Time transformers' `generate`, which samples."
    inputs = inputs_of(rows, lm.device)
    settings = dict(max_new_tokens=length, min_new_tokens=length, do_sample=True, top_k=0) | settings

    @torch.no_grad()
    def generate() -> Tensor:
        with torch.autocast(lm.device.type, dtype_here()): return lm.generate(**inputs, **settings)

    generate()
    ids, seconds = timed(generate)
    assert ids.shape[1] == PROMPT + length
    return seconds


def free():
    "Give memory back before the next model."
    gc.collect()
    if on_gpu(): torch.cuda.empty_cache()


def ours(name: str, length: int, found: Found, args) -> dict[str, tuple[Measured, dict[int, float]]]: # By loop
    "The eager loop and the graph."
    loops = {}
    for loop, implementation in LOOPS.items():
        free()
        with found.attempt(f"{name}, {loop}"):
            loops[loop] = measure(trainer_of(name, implementation, length, args), found, f"{name}, {loop}")
    return loops


def rows_of(name: str, length: int, loops: dict, their: dict[int, float]) -> list[dict[str, Any]]:
    "A row of the table for each number of rows and manner."
    eager, graph = (loops.get(loop, ({}, {})) for loop in LOOPS)
    table = []
    for key in dict.fromkeys([*eager[0], *graph[0]]):
        rows, manner = key
        one, two = eager[0].get(key), graph[0].get(key)
        slow, fast = (each and 1000 * each[0] / length for each in (one, two))
        row = {"shape": name, "rows": rows, "tokens are": manner, "eager, ms/token": slow, "graph, ms/token": fast}
        if slow and fast: row |= {"eager / graph": slow / fast, "same completions": f"{same(one[1], two[1]):.0%}"}
        if two: row |= {"graph, tokens/s": rows * length / two[0]}
        if rows in graph[1]: row |= {"first call, s": graph[1][rows]}
        if rows in their and not MANNERS[manner]: row |= {"generate, ms/token": 1000 * their[rows] / length}
        table.append(row)
    return table


def same_in_float32(found: Found, length: int, args):
    "Are the tokens of both loops the same where rounding does not decide between two tokens?"
    made = []
    for implementation in LOOPS.values():
        settings = {} if implementation is None else dict(cache_implementation=implementation)
        trainer = PPOTrainer(
            random_decoder(decoder_config("BLOOM 560m", args.quick), torch.float32),
            count_e,
            PPOConfig(output_dir=mkdtemp(dir=args.work), per_device_train_batch_size=8, max_prompt_length=PROMPT,
                      max_completion_length=length, min_completion_length=length, beta=0., bf16=False, fp16=False,
                      report_to="none", disable_tqdm=True, **settings),
            Dataset.from_list(prompts(8)),
            processing_class=tokenizer(),
            peft_config=LoraConfig(**ADAPTER),
        )
        made.append(sample(trainer, 8, "sampled")[1])
        del trainer
        free()
    apart = (made[0].sampling_logprobs - made[1].sampling_logprobs).abs().max().item()
    found.note(f"BLOOM 560m in float32, 8 rows: {same(*made):.0%} of the completions are the same; log-probs of the "
               f"sampled tokens differ by at most {apart:.1e}")


def compiled(found: Found, length: int, args):
    "Transformers' `generate` with a static cache, which it compiles on a GPU."
    for name in SHAPES:
        if not found.has(45, f"generate with a static cache, {name}"): return
        free()
        with found.attempt(f"generate with a static cache, {name}", ours=False):
            lm = adapted(name, args)
            seconds = theirs(lm, 8, length, cache_implementation="static")
            found.note(f"{name}, 8 rows: generate with cache_implementation=static, compiled: "
                       f"{1000 * seconds / length:.2f} ms/token")


def main(found: Found, args):
    "One shape after the other, then what takes longest to prepare."
    length = 4 if args.quick else 64
    args.work.mkdir(parents=True, exist_ok=True)
    for name in SHAPES:
        if not found.has(20, name): break
        loops = ours(name, length, found, args)
        free()
        their: dict[int, float] = {}
        with found.attempt(f"generate, {name}", ours=False):
            lm = adapted(name, args)
            for rows in ROWS:
                if found.has(10, f"generate, {name}, {rows} rows"): their[rows] = theirs(lm, rows, length)
            del lm
        for row in rows_of(name, length, loops, their): found.row(**row)
        tell(found)
    free()
    if found.has(20, "the same tokens in float32"):
        with found.attempt("the same tokens in float32"): same_in_float32(found, length, args)
    compiled(found, length, args)


def tell(found: Found):
    "The summary, of sampled rows."
    told = []
    for name in SHAPES:
        rows = [row for row in found.told["table"] if row["shape"] == name and row["rows"] == 8]
        row = next((row for row in rows if row["tokens are"] == "sampled"), {})
        times = [row.get(key) for key in ("eager, ms/token", "graph, ms/token", "generate, ms/token")]
        if row: told.append(f"{name} {' / '.join('?' if x is None else f'{x:.2f}' for x in times)}")
    found.write(figures="eager / graph / generate, ms per token of 8 rows: " + "; ".join(told),
                dtype=str(dtype_here()).removeprefix("torch."))


if __name__ == "__main__":
    args = arguments(__doc__).parse_args()
    found = Found(args)
    main(found, args)
    raise SystemExit(found.exit_status())

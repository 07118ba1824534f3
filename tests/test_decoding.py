"""Steps of fixed shapes give the tokens of the plain loop, for every architecture whose cache has fixed shapes."""
import pytest
import torch
from architectures import DECODERS, REFUSED, VOCAB, WITHOUT_CACHE, decoder
from test_architectures import SAMPLING, change, make

from rlhf_nb import decoding
from rlhf_nb.decoding import Batch, fits, generate_static
from rlhf_nb.rollout import Generation, generate, padded
from rlhf_nb.testing import tiny_run

QUICK = "llama", "qwen3", "gemma3_text", "gpt2", "bloom", "qwen3_moe", "qwen3_next", "lfm2", "mamba2", "openai-gpt"
each = pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in DECODERS if name not in REFUSED
])
# Caches with layers of other kinds
OTHER_CACHE: set[str] = set()


def prompts(*lengths: int):
    source = torch.Generator().manual_seed(1)
    queries = [torch.randint(60, VOCAB, (n,), generator=source) for n in lengths]
    return padded(queries, 3), torch.rand(len(lengths), 40, generator=source)


@each
def test_the_same_tokens_as_the_plain_loop(name):
    policy = make(name, lora=True)
    change(policy)
    query, uniforms = prompts(3, 9, 6, 12, 5, 7, 8, 3, 4)
    generation = Generation(SAMPLING, 24, 3)
    plain = generate(policy, *query, generation, uniforms)
    found, problem = generate_static(policy, *query, generation, uniforms)
    if name in WITHOUT_CACHE or name in OTHER_CACHE:
        assert found is None and "has no fixed shape" in problem
        return
    assert problem is None
    for x, y in zip(plain, found):
        if x.is_floating_point(): assert (x - y).abs().max() < 1e-4
        else: assert torch.equal(x, y)

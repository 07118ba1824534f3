"""Every architecture in float16: layers are summed in float32, and log-probs are those of float32 but for rounding.

By default five; with --slow all of `tests/architectures.py`.
"""
import pytest
import torch

from .precision import DECODERS, REFUSED, dtype_names, measure

QUICK = "llama", "qwen3", "gemma3_text", "gpt2", "bloom"
# Largest difference of nine of ten log-probs to float32: the rest may take another expert, or attend to other tokens
BOUND = .03
# The hidden states that decoder layers receive, where they are not float32
UNMARKED = "its layers are no GradientCheckpointingLayer, so nothing is seen of them"
NOT_FLOAT32 = dict(
    ctrl=("-", UNMARKED),
    gpt_neox_japanese=("-", UNMARKED),
    rembert=("float16+float32", "a linear layer follows its embeddings; layer norms are float32 again"),
) | {"openai-gpt": ("-", UNMARKED)}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in DECODERS if name not in REFUSED
])
def test_float16(name):
    found = measure(name, torch.float16)
    stream, _ = NOT_FLOAT32.get(name, ("float32", ""))
    assert dtype_names(found.streams) == stream
    assert found.finite
    assert 0 < found.usual < BOUND


def test_a_stream_beyond_float16_is_kept():
    "Embeddings and the first layer's result fit into float16, and their sum does not."
    def enlarge(lm):
        embeddings = lm.get_input_embeddings().weight.data
        embeddings.copy_(embeddings.sign() * 4e4)
        lm.model.layers[0].mlp.down_proj.weight.data.mul_(3e3)
    found = measure("llama", torch.float16, change=enlarge)
    assert found.largest > 65504 and found.finite and found.usual < BOUND

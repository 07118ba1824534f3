"Quantized base weights and optimizers, where bitsandbytes is installed (pip install '.[bnb]')."
import pytest
from test_cli import history, run, short

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("critic", ("shared", "adapter"))
@pytest.mark.parametrize("bits", (8, 4))
def test_a_quantized_base_is_trained_through(tiny, tmp_path, bits, critic):
    run(
        *short(
            *tiny,
            tmp_path / "out",
            f"--load_in_{bits}bit",
            "--torch_dtype",
            "auto",
            "--learning_rate",
            1e-4,
            "--critic",
            critic,
        )
    )
    first, second = history(tmp_path/"out")
    assert first["objective/kl"] == 0 and abs(first["val/ratio"] - 1) < 1e-2
    assert first["grad_norm"] > 0 and second["objective/kl"] != 0


@pytest.mark.parametrize("optim", ("adamw_8bit", "paged_adamw_8bit"))
def test_8_bit_optimizers_train(tiny, tmp_path, optim):
    run(*short(*tiny, tmp_path/"out", "--optim", optim))
    assert history(tmp_path/"out")[-1]["objective/kl"] != 0

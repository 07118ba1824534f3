"Modules that are trained beside LoRA, in 16 bits."
import pytest
from test_adapters import test_modules_beside_lora_in_16_bits  # noqa: F401

pytestmark = pytest.mark.slow

"Modules that are trained beside LoRA, in 16 bits."
from test_adapters import test_modules_beside_lora_in_16_bits  # noqa: F401

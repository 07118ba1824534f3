"""What both programs tell of their memory."""
import re
from pathlib import Path

import torch


def peak_gb() -> float:
    "The most that this process held: on the GPU where there is one, else in main memory (Linux)."
    if torch.cuda.is_available(): return torch.cuda.max_memory_allocated() / 1e9
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1e6

"""A pretended GPU: `cuda:0` for a PyTorch without CUDA, with the CPU's arithmetic.

Tensors on `cuda:0` are real ones: own storage, own dispatch key, CUDA's autocast lists, autograd's device thread,
GradScaler. What a GPU refuses is refused: tensors of two devices in one operation, a CPU generator for a tensor on the
GPU, `numpy()`. Operations, copies between devices, waits for the GPU, and bytes are counted. Graphs are in
`pretend_graph`. It finds wrong devices, wrong types and waits; it proves nothing about time or rounding. There is no
NCCL and no bitsandbytes.

To use it, put this folder on PYTHONPATH, or call `pretend_library.load()` before torch is imported, and `install()`
after it.
"""
from collections import Counter
from types import SimpleNamespace

import pretend_graph
import torch

ops = torch.ops.pretend


def properties(name: str, memory: int, capability: tuple[int, int]) -> SimpleNamespace:
    "What `torch.cuda.get_device_properties` returns."
    major, minor = capability
    return SimpleNamespace(name=name, total_memory=memory, major=major, minor=minor, multi_processor_count=40,
                           max_threads_per_multi_processor=1024)


def install(name: str = "pretended T4", memory: int = 15 * 2**30, bf16: bool = False, capability=(7, 5)):
    "Let `torch.cuda` find the GPU."
    ops.ready()
    ops.limit(memory)
    found = properties(name, memory, capability)
    torch.version.cuda = "12.8"

    def bf16_supported(including_emulation: bool = True) -> bool: return bf16 or including_emulation

    def set_fraction(fraction: float, *_): ops.limit(int(fraction * memory))

    of_device = dict(
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=lambda d: None,
        init=lambda: None,
        _lazy_init=lambda: None,
        is_initialized=lambda: True,
        _is_in_bad_fork=lambda: False,
        get_device_name=lambda *_: name,
        get_device_properties=lambda *_: found,
        _get_device_properties=lambda *_: found,
        get_device_capability=lambda *_: capability,
        _exchange_device=lambda d: 0,
        _maybe_exchange_device=lambda d: 0,
        is_bf16_supported=bf16_supported,
    )
    of_memory = dict(
        empty_cache=lambda: None,
        ipc_collect=lambda: None,
        memory_allocated=lambda *_: ops.held(),
        max_memory_allocated=lambda *_: ops.peak(),
        memory_reserved=lambda *_: ops.held(),
        max_memory_reserved=lambda *_: ops.peak(),
        reset_peak_memory_stats=lambda *_: ops.reset_peak(),
        mem_get_info=lambda *_: (memory - ops.held(), memory),
        set_per_process_memory_fraction=set_fraction,
    )
    of_random_numbers = dict(
        get_rng_state=lambda *_: ops.random_state(),
        set_rng_state=lambda state, *_: ops.set_random_state(state),
        get_rng_state_all=lambda: [ops.random_state()],
        set_rng_state_all=lambda states: ops.set_random_state(states[0]),
        manual_seed=ops.seed,
        manual_seed_all=ops.seed,
        seed_all=lambda: None,
    )
    for key, value in (of_device | of_memory | of_random_numbers | pretend_graph.REPLACED).items():
        setattr(torch.cuda, key, value)
    of_c = dict(
        _cuda_getDevice=lambda: 0,
        _cuda_setDevice=lambda d: None,
        _cuda_getDeviceCount=lambda: 1,
        _cuda_exchangeDevice=lambda d: 0,
        _cuda_maybeExchangeDevice=lambda d: 0,
        _cuda_getCurrentRawStream=lambda d: 0,
    )
    for key, value in of_c.items():
        if not hasattr(torch._C, key): setattr(torch._C, key, value)
    torch.UntypedStorage.clone = cloned


clone_on_cpu = torch.UntypedStorage.clone


def cloned(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    "A copy; torch's own asks CUDA for the new storage."
    if storage.device.type != "cuda": return clone_on_cpu(storage)
    return torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage).clone().untyped_storage()


def counts() -> Counter:
    "What was counted since the last call, by name: `op aten::mm`, `wait aten::nonzero`, `copy device to host`."
    lines = (line.split("\t") for line in ops.counts().splitlines())
    return Counter({what: int(times) for what, times in lines})

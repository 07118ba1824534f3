"""Pretended CUDA graphs and streams: what is captured is recorded, undone, and executed again by `replay`.

Real capture executes nothing. Here operations are executed, because Python needs their results to continue, and undone
at the end. The library refuses whatever waits for the device, or reads the host's memory, while a graph is captured.
"""
import gc
from contextlib import contextmanager
from itertools import count

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only


class Stream:
    "All streams are one; work is done when the call returns."
    numbers = count(1)

    def __init__(self, device=None, priority: int = 0, **kwargs):
        self.device = torch.device("cuda", 0)
        self.device_index = 0
        self.priority = priority
        self.cuda_stream = next(self.numbers)
        self.stream_id = self.cuda_stream

    def wait_stream(self, stream: "Stream"): pass
    def wait_event(self, event: "Event"): pass
    def record_event(self, event: "Event | None" = None) -> "Event": return event or Event()
    def query(self) -> bool: return True
    def synchronize(self): synchronize()


class Event:
    "A point in a stream, which is reached at once."
    def __init__(self, enable_timing: bool = False, blocking: bool = False, **kwargs): pass
    def record(self, stream: Stream | None = None): pass
    def wait(self, stream: Stream | None = None): pass
    def query(self) -> bool: return True
    def elapsed_time(self, end: "Event") -> float: return 0.
    def synchronize(self): synchronize()


class Now:
    "What the process does at present."
    default = Stream()
    stream = default
    recorder: "Recorder | None" = None
    refuses_waits = False


def synchronize(device=None):
    "Wait for the device; every wait is counted, and no capture allows one."
    torch.ops.pretend.synchronize()


@contextmanager
def use_stream(stream: Stream | None):
    "`torch.cuda.stream`: another current stream inside."
    before = Now.stream
    Now.stream = stream or before
    try: yield
    finally: Now.stream = before


def tensors(*values) -> list[torch.Tensor]:
    "Every tensor within arguments or results."
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


def key(x: torch.Tensor) -> int:
    "Which storage a tensor has."
    return x.untyped_storage()._cdata


def is_view(func) -> bool:
    "Does the operation only return other views of its arguments?"
    aliases = [r.alias_info for r in func._schema.returns]
    return bool(aliases) and all(a is not None and not a.is_write for a in aliases)


def written(func, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    "Arguments that an operation changes."
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write: continue
        value = kwargs.get(argument.name) if argument.kwarg_only or i >= len(args) else args[i]
        found += tensors(value)
    return found


class Recorder(TorchDispatchMode):
    "Records operations on the GPU with their tensors, and keeps what they overwrite."
    def __init__(self):
        super().__init__()
        self.steps: list[tuple] = []                              # Operation, arguments, result
        self.storages: dict[int, torch.UntypedStorage] = {}       # Each that was seen, kept alive
        self.made: set[int] = set()                               # Those that began within the capture
        self.before: dict[int, torch.UntypedStorage] = {}         # Copies of what was overwritten

    def see(self, x: torch.Tensor, made: bool):
        "Note a tensor's storage; one that a result shows first was made within the capture."
        if not x.is_cuda or key(x) in self.storages: return
        self.storages[key(x)] = x.untyped_storage()
        if made: self.made.add(key(x))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for x in tensors(args, kwargs): self.see(x, made=False)
        for x in written(func, args, kwargs):
            if x.is_cuda and key(x) not in self.made and key(x) not in self.before:
                self.before[key(x)] = x.untyped_storage().clone()
        # A number from the host's memory becomes part of the graph
        baked = tree_map_only(torch.Tensor, lambda x: x if x.is_cuda else x.clone(), (args, kwargs))
        out = func(*args, **kwargs)
        for x in tensors(out): self.see(x, made=True)
        if any(x.is_cuda for x in tensors(args, kwargs, out)): self.steps.append((func, *baked, out))
        return out

    def undo(self):
        "Nothing has been computed: old contents return, and what was made holds NaN, or -1."
        for of, storage in self.before.items(): self.storages[of].copy_(storage)
        self.before.clear()
        for of in self.made: self.storages[of].fill_(255)


class CUDAGraph:
    "Operations on fixed tensors that can be executed again."
    def __init__(self, keep_graph: bool = False):
        self.recorder = None

    def capture_begin(self, pool=None, capture_error_mode: str = "global"):
        if Now.recorder: raise RuntimeError("a capture within a capture (pretended)")
        Now.recorder = Recorder()
        torch.ops.pretend.capture(True)
        Now.recorder.__enter__()

    def capture_end(self):
        recorder = Now.recorder
        Now.recorder = None
        recorder.__exit__(None, None, None)
        torch.ops.pretend.capture(False)
        recorder.undo()
        self.recorder = recorder

    def instantiate(self): pass

    def pool(self) -> tuple[int, int]: return (0, 1)

    def reset(self):
        self.recorder = None

    def replay(self):
        "Execute the operations again, on the same tensors."
        if self.recorder is None: raise RuntimeError("there is no captured graph to replay (pretended)")
        with torch.no_grad(), torch._C._DisableAutocast():
            for func, args, kwargs, out in self.recorder.steps:
                if is_view(func): continue
                again = func(*args, **kwargs)
                for old, new in zip(tree_flatten(out)[0], tree_flatten(again)[0]):
                    if isinstance(old, torch.Tensor) and old is not new: old.copy_(new)


@contextmanager
def graph(cuda_graph: CUDAGraph, pool=None, stream: Stream | None = None, capture_error_mode: str = "global"):
    "`torch.cuda.graph`: what happens inside is captured. As torch's, it leaves its stream in use if that fails."
    synchronize()
    gc.collect()
    before = Now.stream
    Now.stream = stream or Stream()
    cuda_graph.capture_begin(pool, capture_error_mode)
    try: yield
    except BaseException:
        cuda_graph.capture_end()
        raise RuntimeError("operation failed due to a previous error during capture (pretended)") # noqa: B904
    cuda_graph.capture_end()
    Now.stream = before


def set_sync_debug_mode(mode: int | str):
    "Whether waits are refused; warnings are not pretended."
    Now.refuses_waits = mode in (2, "error")
    torch.ops.pretend.capture(Now.refuses_waits)


REPLACED = dict( # In torch.cuda
    get_sync_debug_mode=lambda: 2 * Now.refuses_waits,
    set_sync_debug_mode=set_sync_debug_mode,
    Stream=Stream,
    Event=Event,
    stream=use_stream,
    current_stream=lambda device=None: Now.stream,
    default_stream=lambda device=None: Now.default,
    set_stream=lambda stream: setattr(Now, "stream", stream),
    synchronize=synchronize,
    CUDAGraph=CUDAGraph,
    graph=graph,
    graph_pool_handle=lambda: (0, 1),
    is_current_stream_capturing=lambda: Now.recorder is not None,
)

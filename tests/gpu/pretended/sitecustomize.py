"""With this folder on PYTHONPATH every Python process finds a pretended GPU as soon as it imports torch.

PRETEND_BF16=1 gives it bfloat16, which a T4 lacks; PRETEND_MEMORY=BYTES gives it another size than 15 GiB.
"""
import importlib.abc
import importlib.util
import os
import sys


class PretendedGPU(importlib.abc.MetaPathFinder):
    "Finds torch once: the library is loaded before it, and its Python side is completed after it."
    def find_spec(self, name, path=None, target=None):
        if name != "torch": return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        exec_module = spec.loader.exec_module

        def run(module):
            import pretend_library
            pretend_library.load()
            exec_module(module)
            import pretend_gpu
            memory = int(os.environ.get("PRETEND_MEMORY") or 15 * 2**30)
            pretend_gpu.install(memory=memory, bf16=os.environ.get("PRETEND_BF16") == "1")
        spec.loader.exec_module = run
        return spec


sys.meta_path.insert(0, PretendedGPU())

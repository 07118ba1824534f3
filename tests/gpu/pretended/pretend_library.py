"""Build and load the library of the pretended GPU; before torch is imported, which asks once whether there is a GPU."""
import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).parent/"pretend_gpu.cpp"
TORCH = "2.13.0" # Its internal C++ interface is used


def problem() -> str | None:
    "Why there can be no pretended GPU here; None: there can."
    installed = version("torch").split("+")[0]
    if installed != TORCH: return f"the pretended GPU needs torch {TORCH}, and this is {installed}"
    if not shutil.which("g++"): return "the pretended GPU needs g++"
    return None


def library() -> Path:
    "The built library; the first call on a machine builds it, in about 20 seconds."
    torch = Path(find_spec("torch").origin).parent
    stamp = hashlib.sha256(SOURCE.read_bytes() + version("torch").encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir())/f"pretend_gpu_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid(): raise PermissionError(f"{folder} belongs to another user")
    built = folder/f"{stamp}.so"
    if built.exists(): return built
    with tempfile.TemporaryDirectory(dir=folder) as own: # Another process may build it at the same time
        command = ["g++", "-O1", "-w", "-shared", "-fPIC", "-std=c++20"]
        command += [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include", f"-L{torch}/lib"]
        command += ["-o", f"{own}/{stamp}.so", str(SOURCE), "-ltorch_cpu", "-lc10"]
        subprocess.run(command, check=True)
        os.replace(f"{own}/{stamp}.so", built)
    return built


def load():
    "Load the library, and what it needs of torch."
    built = library()
    folder = Path(find_spec("torch").origin).parent/"lib"
    for name in ("libgomp.so.1", "libc10.so", "libtorch_cpu.so"): ctypes.CDLL(str(folder/name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(built))

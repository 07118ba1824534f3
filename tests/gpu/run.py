"""Run the tests in this folder on this machine's GPU, or on a pretended one.

run.py [PYTEST ARGUMENTS]: with files among them, only these are run.
"""
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PRETENDED = HERE/"pretended"
FIND_GPU = "import sys, torch; sys.exit(not torch.cuda.is_available())"


def main(arguments: list[str]) -> int: # Of pytest; its exit status
    "Choose the GPU; without any, say why, and succeed."
    env = dict(os.environ)
    if subprocess.run([sys.executable, "-c", FIND_GPU]).returncode:
        sys.path.insert(0, str(PRETENDED))
        from pretend_library import library, problem
        if reason := problem():
            print(f"No test for a GPU is run: torch finds none here, and {reason}")
            return 0
        library() # Once, before several workers want it
        env["PYTHONPATH"] = os.pathsep.join([str(PRETENDED), *filter(None, [env.get("PYTHONPATH")])])
    named = any(Path(word.split("::")[0]).exists() for word in arguments)
    where = [] if named else [str(HERE)]
    return subprocess.run([sys.executable, "-m", "pytest", *where, *arguments], env=env).returncode


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))

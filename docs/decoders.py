"""The table of all decoders, as tests/test_architectures.py finds them: python docs/decoders.py prints it."""
import sys
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).parent.parent/"tests"))
from architectures import CANNOT, DECODERS, REFUSED, ROUGH, WITHOUT_CACHE  # noqa: E402

INTRO = """# Decoders

Every name in transformers' table of causal language models, built with random weights and two layers. A model that is
supported has the same log-probs as sampled, as scored in one pass, and by plain transformers for a row alone (to 1e-4),
with prompts and completions of unequal lengths in one batch; the gradient of autograd; a reference equal to the start;
the same numbers after saving, loading and merging; and a plan of its memory. With LoRA and with all weights.

A model of which transformers itself gives other numbers with padding on the left is refused before anything is trained.
"""


def decoders_table() -> str:
    "A Markdown page with one row per kind of result."
    good = [name for name in DECODERS if name not in REFUSED]
    found = {
        "supported": [name for name in good if name not in WITHOUT_CACHE and name not in ROUGH],
        "supported; samples without a cache, which is slow": WITHOUT_CACHE,
        "supported; steps of transformers' own `generate` are not exactly its single pass": ROUGH,
        "refused": sorted(REFUSED),
    }
    rows = ["| result | number | names |", "| --- | --- | --- |"]
    for result, names in found.items():
        rows.append(f"| {result} | {len(names)} | {', '.join(f'`{name}`' for name in names)} |")
    left = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in DECODERS]
    rows += ["", f"Not built ({len(left)}), and why:", "", *[f"- `{name}`: {CANNOT[name]}" for name in left]]
    return INTRO + "\n" + "\n".join(rows) + "\n"


if __name__ == "__main__": print(decoders_table())

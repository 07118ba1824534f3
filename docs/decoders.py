"""Tables of decoders, adapters and reward models, as the tests find them: python docs/decoders.py prints them."""
import sys
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).parent.parent/"tests"))
from architectures import CANNOT, CLASSIFIERS, DECODERS, READS_PADDING, REFUSED, ROUGH, WITHOUT_CACHE  # noqa: E402
from test_adapters import KINDS, NOT_MERGED  # noqa: E402
from test_adapters import REFUSED as NO_ADAPTER  # noqa: E402

INTRO = """# Models and adapters

## Decoders

Every name in transformers' table of causal language models, built with random weights and two layers. A model that is
supported has the same log-probs as sampled, as scored in one pass, and by plain transformers for a row alone (to 1e-4),
with prompts and completions of unequal lengths in one batch; the gradient of autograd; a reference equal to the start;
the same numbers after saving, loading and merging; and a plan of its memory. With LoRA and with all weights.

A model of which transformers itself gives other numbers with padding on the left is refused before anything is trained.
"""


MORE = """
## Adapters

Each kind of peft's table, and variants of LoRA (in small letters), on a small Llama: log-probs by three ways,
reference, gradients, saving, loading and merging. AdaMSS needs scikit-learn. CorDA and several active adapters are
refused; LoftQ was not tried, it needs a GPU.

{adapters}

## Reward models

Every sequence classifier of transformers' table that can be built ({classifiers} names): a score does not depend on the
other pairs of the batch, to 1e-4. With one that computes with padding, only pairs of equal length are scored together:
{padding}.
"""


def listed(names) -> str: return ", ".join(f"`{name}`" for name in names)


def table(found: dict[str, list[str]]) -> str:
    "One row per kind of result."
    rows = [f"| {result} | {len(names)} | {listed(names)} |" for result, names in found.items()]
    return "\n".join(["| result | number | names |", "| --- | --- | --- |", *rows])


def decoders_table() -> str:
    "A Markdown page."
    good = [name for name in DECODERS if name not in REFUSED]
    decoders = {
        "supported": [name for name in good if name not in WITHOUT_CACHE and name not in ROUGH],
        "supported; samples without a cache, which is slow": WITHOUT_CACHE,
        "supported; steps of transformers' own `generate` are not exactly its single pass": ROUGH,
        "refused": sorted(REFUSED),
    }
    adapters = {
        "supported": [name for name in KINDS if name not in NO_ADAPTER | NOT_MERGED],
        "supported, but `merge` is refused": sorted(NOT_MERGED),
        "refused": sorted(NO_ADAPTER),
    }
    left = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in DECODERS]
    why = "\n".join(f"- `{name}`: {CANNOT[name]}" for name in left)
    more = MORE.format(adapters=table(adapters), classifiers=len(CLASSIFIERS), padding=listed(sorted(READS_PADDING)))
    return f"{INTRO}\n{table(decoders)}\n\nNot built ({len(left)}), and why:\n\n{why}\n{more}"


if __name__ == "__main__": print(decoders_table())

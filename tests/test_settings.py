"Every setting is read somewhere: one that nobody reads would be a promise that nothing keeps."
import inspect
import re
from dataclasses import fields

import pytest
from conftest import ROOT
from transformers import TrainingArguments
from trl import ModelConfig
from trl.trainer.callbacks import SyncRefModelCallback

from rlhf_nb.config import REFUSED, DataArguments, MergeArguments, ModelArguments, PPOConfig, check_together

FILES = [p for p in (ROOT/"rlhf_nb").rglob("*.py") if p.name not in ("config.py", "_modidx.py")]
CODE = "\n".join(
    [
        *(p.read_text(encoding="utf-8") for p in FILES),
        inspect.getsource(check_together),
        inspect.getsource(SyncRefModelCallback),
    ]
)
INHERITED = {
    f.name for c in (TrainingArguments, ModelConfig) for f in fields(c)
}  # Their libraries read them, or test_fields.py walks through them
OWN = (
    {f.name for c in (PPOConfig, ModelArguments, DataArguments, MergeArguments) for f in fields(c)}
    - INHERITED
    - REFUSED.keys()
)


@pytest.mark.parametrize("name", sorted(OWN))
def test_setting_is_read(name):
    assert re.search(rf'args\.{name}\b|for name in \([^)]*"{name}"', CODE), f"nothing reads {name}"


def test_requirements_of_the_package_do_not_include_nbdev():
    settings = (ROOT/"settings.ini").read_text(encoding="utf-8")
    required = re.search(r"^requirements = (.*)$", settings, re.M)[1]
    assert "torch" in required and not re.search("nbdev|fastcore|execnb", required + CODE)

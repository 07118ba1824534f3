"Every setting is read somewhere: one that nobody reads would be a promise that nothing keeps."
import re
from dataclasses import fields

import pytest
from conftest import ROOT

from rlhf_nb.config import DataArguments, MergeArguments, ModelArguments, PPOConfig

CODE = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT/"rlhf_nb").glob("*.py") if p.name not in ("config.py", "_modidx.py"))


@pytest.mark.parametrize("name", sorted({f.name for c in (PPOConfig, ModelArguments, DataArguments, MergeArguments) for f in fields(c)}))
def test_setting_is_read(name):
    assert re.search(rf"args\.{name}\b", CODE), f"nothing reads {name}"


def test_requirements_of_the_package_do_not_include_nbdev():
    settings = (ROOT/"settings.ini").read_text(encoding="utf-8")
    required = re.search(r"^requirements = (.*)$", settings, re.M)[1]
    assert "torch" in required and not re.search("nbdev|fastcore|execnb", required + CODE)

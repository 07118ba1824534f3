"README_zh.md is in step with README.md, line by line; a failure names the lines to bring over."
import calendar
import re
from difflib import SequenceMatcher

import pytest
from conftest import ROOT

SWITCH = re.compile(r"English \| \[中文\]\(\S*README_zh\.md\)|\[English\]\(README\.md\) \| 中文")
NUMBER = re.compile(r"(?:(?<![A-Za-z\d])-)?\d+(?:[.,]\d+)*(?:e-?\d+)?")
MONTH = {name: str(i) for i, name in enumerate(calendar.month_name) if name}
VERDICT = {"yes": "yes", "支持": "yes", "no": "no", "不支持": "no"}


def lines(text: str) -> list[tuple[int, str, str]]:
    "Number, kind and text of each line; without the switch of languages, comments and blank lines outside code."
    out, fence = [], False
    for n, line in enumerate(text.split("\n"), 1):
        if code := fence or line.startswith(("```", "    ")): fence ^= line.startswith("```")
        kind = "code" if code else re.match(r"(#+(?= )|- |> |\||)", line)[0].strip() or "text"
        if code or not (SWITCH.fullmatch(line) or line.startswith("<!--") or not line): out.append((n, kind, line))
    return out


def facts(kind: str, line: str) -> dict[str, str]:
    "What a translation keeps."
    if kind == "code": return dict(kind=kind, code=line)
    said = re.sub(r"\]\([^)]*\)|`[^`]*`", "", line)
    said = re.sub(rf"({'|'.join(MONTH)})(?= \d{{4}})", lambda m: MONTH[m[0]], said)
    cells = [c.strip() for c in said.split("|")[1:-1]] if kind == "|" else []
    if cells: numbers = " | ".join(" ".join(NUMBER.findall(c)) for c in cells)
    else: numbers = " ".join(sorted(NUMBER.findall(said)))
    return dict(
        kind=kind,
        links=" ".join(a + b for a, b in re.findall(r"(!?\[)[^\]]*(\]\([^)]*\))", line)),
        settings=" ".join(sorted(re.findall(r"`[^`]*`", line))),
        numbers=numbers,
        verdicts=" | ".join(VERDICT.get(c, "") for c in cells),
        sample=line if cells and line.endswith((". |", "。 |")) else "")


def differences(en: str, zh: str) -> list[str]:
    "An entry for each thing that one of the two says and the other does not."
    left, right, out = lines(en), lines(zh), []
    signs = [[tuple(facts(*l[1:]).values()) for l in side] for side in (left, right)]
    for op, a, b, c, d in SequenceMatcher(None, *signs, autojunk=False).get_opcodes():
        if op == "equal": continue
        if [l[1] for l in left[a:b]] != [l[1] for l in right[c:d]]:
            out += [f"only in {name}, line {n} or a neighbour like it: {line}"
                    for name, part in (("README.md", left[a:b]), ("README_zh.md", right[c:d])) for n, _, line in part]
            continue
        for (n, kind, line), (m, _, other) in zip(left[a:b], right[c:d]):
            old, new = facts(kind, line), facts(kind, other)
            for f in old:
                if old[f] != new[f]: out.append(f"{f} differ\n  README.md:{n}: {old[f]}\n  README_zh.md:{m}: {new[f]}")
    return out


def test_chinese_readme_is_in_step():
    en, zh = ((ROOT/name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md"))
    assert len(SWITCH.findall(en)) == 1 and zh.startswith("[English](README.md) | 中文\n")
    found = differences(en, zh)
    assert not found, "bring README_zh.md in step:\n" + "\n".join(found)


EN = """<!-- A comment. -->
# Title
English | [中文](https://example.org/README_zh.md)

As of May 2026, 63 s with `a` and `b`; see [one](nbs/1.ipynb), [two](nbs/2.ipynb).

```sh
make demo   # all

make test
```
| | PPO | seconds |
| --- | --- | --- |
| mean | no | -1.5, 2e-6 |
| How? | So. | Well, so. |
![Curves](nbs/c.png)
"""
ZH = """[English](README.md) | 中文

# 标题

截至 2026 年 5 月，用 `b` 和 `a` 需 63 秒，见[一](nbs/1.ipynb)、[二](nbs/2.ipynb)。

```sh
make demo   # all

make test
```
| | PPO | 秒 |
| --- | --- | --- |
| 均值 | 不支持 | -1.5、2e-6 |
| How? | So. | Well, so. |

![曲线](nbs/c.png)
"""


def test_words_may_differ(): assert differences(EN, ZH) == []


@pytest.mark.parametrize("old, new, says", [
    ("63 秒", "64 秒", "numbers differ\n  README.md:5: 2026 5 63\n  README_zh.md:5: 2026 5 64"),
    ("5 月", "6 月", "numbers differ\n  README.md:5: 2026 5 63\n  README_zh.md:5: 2026 6 63"),
    ("-1.5", "1.5", "numbers differ\n  README.md:14:  |  | -1.5 2e-6\n  README_zh.md:14:  |  | 1.5 2e-6"),
    ("| 不支持 |", "| 不支持 | |",
     "numbers differ\n  README.md:14:  |  | -1.5 2e-6\n  README_zh.md:14:  |  |  | -1.5 2e-6"),
    ("不支持", "支持", "verdicts differ\n  README.md:14:  | no | \n  README_zh.md:14:  | yes | "),
    ("Well, so", "Well",
     "sample differ\n  README.md:15: | How? | So. | Well, so. |\n  README_zh.md:15: | How? | So. | Well. |"),
    ("`b`", "`c`", "settings differ\n  README.md:5: `a` `b`\n  README_zh.md:5: `a` `c`"),
    ("nbs/1", "nbs/3",
     "links differ\n  README.md:5: [](nbs/1.ipynb) [](nbs/2.ipynb)\n  README_zh.md:5: [](nbs/3.ipynb) [](nbs/2.ipynb)"),
    ("![曲线]", "[曲线]", "links differ\n  README.md:16: ![](nbs/c.png)\n  README_zh.md:17: [](nbs/c.png)"),
    ("# all", "# 全部", "code differ\n  README.md:8: make demo   # all\n  README_zh.md:8: make demo   # 全部"),
    ("make test\n", "", "only in README.md, line 10 or a neighbour like it: make test"),
    ("# 标题", "## 标题", "only in README_zh.md, line 3 or a neighbour like it: ## 标题"),
    ("| --- |", "多了\n| --- |", "only in README_zh.md, line 13 or a neighbour like it: 多了"),
])
def test_a_difference_is_named(old, new, says): assert says in differences(EN, ZH.replace(old, new, 1))

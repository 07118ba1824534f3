"Prompts: what readers refuse, the order of a run, and what a trainer accepts."
import json
from functools import partial

import pytest
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from rlhf_nb.config import DataArguments, PPOConfig
from rlhf_nb.data import (
    PromptOrder,
    chat_prompt,
    check_datasets,
    encode_prompt,
    find_files,
    load_prompts,
    longest_prefix,
    normalise,
    preparer,
    read_rows,
    template_kwargs,
)
from rlhf_nb.testing import data_dir, policy_tokenizer

TALK = [
    {"from": "human", "value": "I cough."},
    {"from": "gpt", "value": "How long?"},
    {"from": "human", "value": "A week."},
]


def raises(text, f, *args, error=ValueError, **kwargs):
    with pytest.raises(error) as e: f(*args, **kwargs)
    assert text in str(e.value), str(e.value)
    assert "\n" not in str(e.value)


# Files

@pytest.mark.parametrize(
    "name, content, text",
    [
        ("a.jsonl", " \n", "a.jsonl: empty file"),
        ("a.jsonl", "发烧".encode("gb18030"), "not UTF-8 at byte 0"),
        ("a.parquet", b"PAR0", "not a parquet file"),
        (
            "a.json",
            '[{"prompt": "one"}, \n{"prompt" "two"}]',
            "a.json: not JSON (Expecting ':' delimiter, line 2, column 11)",
        ),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, name, content, text):
    path = tmp_path/name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    raises(text, lambda: list(read_rows(path)))


def test_csv_lines(tmp_path):
    path = tmp_path/"a.csv"
    path.write_text("prompt,tag\nhello\u2028there,1\none, two, three\n", encoding="utf-8")
    (_, row), (_, bad) = read_rows(path)
    assert row == {"prompt": "hello\u2028there", "tag": "1"}
    assert str(bad) == f"{path}:3: more fields than the header has"


def test_a_folder_without_prompts(tmp_path):
    raises("no prompt files (.json", find_files, tmp_path)


@pytest.mark.parametrize("row, text", [
    ({"text": "x", "label": 1}, "no prompt, instruction or conversations; it has text, label"),
    ({"instruction": " "}, "instruction is empty"),
    ({"instruction": 3}, "instruction and input must be text"),
    ({"conversations": TALK[1:2]}, "no human turn"),
    ({"conversations": [{"from": "cat", "value": "miaow"}]}, "turn 1: from='cat' is none of human"),
    ({"conversations": [{"from": "human"}]}, "turn 1: no value"),
    (["x"], "not an object with named fields"),
    ({"prompt": "\ud83d"}, "text with half a surrogate pair"),
    ({"conversations": TALK + [{"from": "system", "value": "Be brief."}]}, "a system turn must come first")])
def test_a_row_that_is_no_prompt(row, text):
    raises("f.jsonl:7: " + text, preparer("alpaca", None, None, None), row, "f.jsonl:7")


def test_an_assistant_that_speaks_first_is_left_out():
    hello = {"from": "gpt", "value": "Hello!"}
    assert normalise({"conversations": [hello, *TALK]}) == normalise({"conversations": TALK})


def test_a_word_that_is_too_long_is_cut():
    assert longest_prefix("drink", lambda s: len(s) <= 3) == "dri"
    assert longest_prefix("drink", lambda s: False) == ""


def test_a_hub_data_set(tmp_path): # A folder stands in for one
    for split, n in (("train", 3), ("validation", 2)):
        Dataset.from_dict({"prompt": [f"{split} {i}" for i in range(n)]}).to_parquet(tmp_path/f"{split}.parquet")
    hub = load_prompts(DataArguments(dataset_name=str(tmp_path)), cache_dir=f"{tmp_path}/cache")
    assert sorted(hub["validation"]["prompt"]) == ["validation 0", "validation 1"] and len(hub["train"]) == 3


def test_nothing_to_train_on(tmp_path):
    raises("No data: give --train_file_dir", load_prompts, DataArguments())
    shipped = str(data_dir()/"finetune")
    raises(
        "leaves nothing to train on",
        load_prompts,
        DataArguments(train_file_dir=shipped, validation_split_percentage=99.99),
    )
    (tmp_path/"a.jsonl").write_text(json.dumps({"text": "x"}))
    args = DataArguments(train_file_dir=str(tmp_path), on_bad_row="skip")
    raises(f"{tmp_path}: no usable prompt, all 1 rows are bad", load_prompts, args)


# Chat templates

@pytest.fixture
def tok():
    tok = policy_tokenizer()
    tok.chat_template = (
        "{% for t in tools or [] %}({{t.name}}){% endfor %}{% for m in messages %}[{{m.role}}]{{m.content}}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{{mood}}{% endif %}"
    )
    return tok


def test_arguments_of_the_template_are_passed_on_and_a_row_has_the_last_word(tok):
    messages = [dict(role="user", content="Hi")]
    assert chat_prompt(messages, tok, mood="!") == "[user]Hi[assistant]!"
    assert tok.decode(encode_prompt(messages, tok, mood="!")) == "[user]Hi[assistant]!"
    rows = Dataset.from_list([dict(chat_template_kwargs=dict(mood="?"), tools=json.dumps([dict(name="look")])),
                              dict(chat_template_kwargs=dict(other=1), tools=None)])
    texts = [chat_prompt(messages, tok, **template_kwargs(row, dict(mood="!"))) for row in rows]
    assert texts == ["(look)[user]Hi[assistant]?", "[user]Hi[assistant]!"]
    ready = preparer("chat", None, tok, None, dict(mood="!"))
    assert ready(dict(instruction="Hi", tools=[dict(name="look")]), "")["prompt"] == "(look)[user]Hi[assistant]!"


def test_the_beginning_of_an_answer_is_continued(tok):
    begun = [dict(role="user", content="Hi"), dict(role="assistant", content="Well,")]
    assert chat_prompt(begun, tok) == "[user]Hi[assistant]Well,"


# The order

def numbered(n): return Dataset.from_dict(dict(prompt=[str(i) for i in range(n)]))


def taken(order, n): return [int(row["prompt"]) for row in order.take(n)]


def test_the_order_is_that_of_the_first_version():
    order = PromptOrder(numbered(7), seed=3)
    assert [taken(order, 5) for _ in range(3)] == [[5, 6, 2, 1, 4], [3, 0, 2, 1, 4], [0, 5, 6, 3, 4]]
    assert (order.seen, order.epoch, order.place) == (15, 2, 1)


KINDS = dict(dataset=numbered, stream=lambda n: numbered(n).to_iterable_dataset(num_shards=min(n, 2)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_order_resumes_anywhere(kind, shuffle):
    make = partial(PromptOrder, KINDS[kind](6), shuffle=shuffle)
    every = taken(make(seed=2), 30)
    for epoch in range(5): assert sorted(every[6 * epoch:6 * epoch + 6]) == list(range(6))
    if not shuffle: assert every == list(range(6)) * 5
    for start in range(20):
        order, later = make(seed=2), make(seed=9)
        assert taken(order, start) == every[:start]
        later.load_state_dict(json.loads(json.dumps(order.state_dict())))
        assert taken(later, 4) + taken(later, 6) == every[start:start + 10]
        assert later.seen == start + 10


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_batch_may_be_larger_than_the_data(n):
    for make in KINDS.values(): assert sorted(taken(PromptOrder(make(n), seed=0), 4 * n)) == sorted(list(range(n)) * 4)


def test_a_stream_that_breaks_loses_no_prompt():
    broken = [True]

    def rows():
        for i in range(5):
            if i == 3 and broken: raise OSError("gone")
            yield dict(prompt=str(i))

    order = PromptOrder(IterableDataset.from_generator(rows), seed=0, shuffle=False)
    assert taken(order, 2) == [0, 1]
    with pytest.raises(OSError): order.take(4)
    assert order.state_dict() == dict(seed=0, seen=2, epoch=0, place=2)
    broken.clear()
    assert taken(order, 4) == [2, 3, 4, 0]


def test_data_that_is_empty_ends_the_search():
    for make in KINDS.values():
        raises("train_dataset has no prompts", PromptOrder(make(2).filter(lambda row: False), seed=0).take, 1)
    order = PromptOrder(numbered(4), seed=0, shuffle=False)
    order.load_state_dict(dict(seed=0, seen=9, epoch=0, place=9)) # The data set has become smaller
    assert taken(order, 2) == [0, 1]


# What a trainer accepts

def check(train, evaluation=None, **settings):
    check_datasets(PPOConfig("out", report_to="none", **settings), train, evaluation)


def test_data_sets_of_all_kinds_are_accepted():
    data = numbered(3)
    stream = data.to_iterable_dataset()
    for train in (data, stream, stream.map(lambda row: row)):  # The last has no column names
        for evaluation in (
            None,
            data,
            stream,
            DatasetDict(a=data),
            IterableDatasetDict(a=stream),
            dict(a=data, b=stream),
        ):
            check(train, evaluation)
    talk = Dataset.from_list([dict(prompt=[dict(role="user", content="Hi")], output="Hello")])
    check(talk, talk, eval_strategy="steps", eval_steps=1, ptx_coef=.1, question_column="output")


@pytest.mark.parametrize("columns, text", [
    (dict(text=["a"]), "train_dataset has no column prompt; it has text"),
    (dict(prompt=["a"], image=["b"]), "train_dataset has the column image"),
    (dict(prompt=["a"], images=[["b"]]), "train_dataset has the column images"),
    (dict(prompt=[3]), "train_dataset: a prompt must be text or a list of messages, not '3'"),
    (dict(prompt=[[]]), "a prompt must be text or a list of messages, not '[]'"),
    (dict(prompt=[[dict(role="user", content=[dict(type="image")])]]), "train_dataset has images in its messages"),
    (dict(prompt=[]), "train_dataset has no prompts")])
def test_a_data_set_that_is_refused(columns, text):
    data = Dataset.from_dict(columns)
    raises(text, check, data)
    if len(data): raises(text, check, data.to_iterable_dataset())
    raises(text.replace("train_dataset", "eval_dataset"), check, numbered(1), data)
    raises(text.replace("train_dataset", "eval_dataset['hard']"), check, numbered(1), dict(easy=numbered(1), hard=data))


def test_what_settings_need():
    data = numbered(3)
    raises("train_dataset is missing", check, None)
    raises(
        "train_dataset has the splits train, test: choose one",
        check,
        DatasetDict(train=data, test=data),
        error=TypeError,
    )
    raises(
        "train_dataset must be a Dataset or an IterableDataset, not a list", check, [dict(prompt="a")], error=TypeError
    )
    raises(
        "eval_dataset['b'] must be a Dataset or an IterableDataset, not a NoneType",
        check,
        data,
        dict(a=data, b=None),
        error=TypeError,
    )
    raises("eval_strategy is set, but there is no eval_dataset", check, data, eval_strategy="steps", eval_steps=1)
    raises("ptx_coef needs the column output; train_dataset has prompt", check, data, ptx_coef=.1)
    raises(
        "question_column needs the column question; train_dataset has prompt", check, data, question_column="question"
    )
    asked = data.add_column("question", list("abc"))
    raises(
        "question_column needs the column question; eval_dataset has prompt",
        check,
        asked,
        data,
        question_column="question",
    )

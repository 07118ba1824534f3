"What a run looks like in a terminal, in a file and in a notebook while it goes on."
import fcntl
import os
import pty
import struct
import sys
import termios
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from test_cli import rlhf_nb, short

FAILS = """
from datasets import Dataset
from rlhf_nb.config import PPOConfig
from rlhf_nb.testing import tiny_policy
from rlhf_nb.trainer import PPOTrainer
def bad(prompts, completions, trainer_state, **columns):
    if trainer_state.global_step == 2: raise KeyError("judge")
    return [1.] * len(prompts)
model, tok = tiny_policy()
args = PPOConfig(%r, per_device_train_batch_size=2, max_completion_length=4, max_steps=4, report_to="none")
PPOTrainer(model, bad, args, Dataset.from_dict(dict(prompt=["a", "b"])), processing_class=tok).train()
"""
PAGE = """
from rlhf_nb.cli import make_trainer, train_parser
trainer = make_trainer(*train_parser().read(%r)[:3])
trainer.train()
"""


def on_a_terminal(command, columns=100, rows=40):
    "Exit status and all that was sent to the terminal."
    pid, fd = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm-256color", COLUMNS=str(columns), LINES=str(rows), PYTHONIOENCODING="utf-8")
        os.execvp(command[0], list(map(str, command)))
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    sent = b""
    while True:
        try: part = os.read(fd, 65536)
        except OSError: break
        if not part: break
        sent += part
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), sent.decode(errors="replace")


def flags(tiny, out):
    return [f for f in short(*tiny, out, "--do_eval", "--max_eval_samples", 4) if f != "--disable_tqdm"]


@pytest.mark.slow
def test_a_terminal_has_one_block_and_lines_above_it(tiny, tmp_path):
    status, sent = on_a_terminal([Path(sys.executable).parent/"rlhf-nb", *flags(tiny, tmp_path/"run")])
    assert status == 0, sent
    assert "2/2" in sent and "eval reward" in sent and "Completions of update 2" in sent and "▁" in sent
    assert "\x1b[1A" in sent and sent.rindex("\x1b[?25h") > sent.rindex("Completions of update 2"), "the cursor is back"


@pytest.mark.slow
def test_a_run_that_fails_gives_the_terminal_back(tmp_path):
    status, sent = on_a_terminal([sys.executable, "-c", FAILS % str(tmp_path/"run")])
    assert status == 1 and "judge" in sent and sent.rindex("\x1b[?25h") < sent.rindex("KeyError")


@pytest.mark.slow
def test_a_file_has_a_line_for_each_entry_and_quiet_none(tiny, tmp_path):
    said = rlhf_nb(*flags(tiny, tmp_path/"run"))
    lines = [line.split(" |")[0] for line in said.splitlines() if line.startswith("update ")]
    assert lines == ["update 0/2", "update 1/2", "update 2/2", "update 2/2"]
    assert rlhf_nb(*flags(tiny, tmp_path/"quiet"), "--quiet").count("update") == 0


@pytest.mark.slow
def test_a_notebook_has_one_page_that_is_replaced(tiny, tmp_path):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(PAGE % [str(f)
                                                                           for f in flags(tiny, tmp_path/"run")[1:]])])
    NotebookClient(nb, timeout=300, kernel_name="python3").execute()
    page, = [o.data for o in nb.cells[0].outputs if o.output_type == "display_data"]
    assert 'value="2" max="2"' in page["text/html"] and "data:image/png" in page["text/html"]
    assert "<th " in page["text/html"]
    assert page["text/plain"].startswith("update 2/2 |")

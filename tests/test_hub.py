"The model card and what is uploaded, on a hub that stands in for the real one."
import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import ModelCard
from peft import PeftModel
from test_cli import rlhf_nb, short
from transformers import AutoModelForCausalLM


class Hub(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.asked.append((self.path, self.headers["Authorization"]))
        if self.server.refuse(self.path): return self.answer(dict(error="quota exceeded"), 403)
        if self.path.endswith("/create"):
            name = f"me/{json.loads(body)['name']}"
            return self.answer(dict(url=f"{self.server.url}/{name}", id=name))
        if "/preupload/" in self.path:
            return self.answer(dict(files=[dict(path=f["path"], uploadMode="regular", shouldIgnore=False)
                                           for f in json.loads(body)["files"]]))
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            self.server.message = lines[0]["value"]["summary"]
            self.server.files |= {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines
                                  if line["key"] == "file"}
            return self.answer(dict(commitOid="0" * 40, commitUrl=f"{self.server.url}/me/x/commit/{'0' * 40}"))
        self.answer({})

    def answer(self, what, status=200):
        text = json.dumps(what).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args): pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.asked, server.files, server.message, server.refuse = [], {}, None, lambda path: False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def push(tiny, out, hub, *more, status=0):
    return rlhf_nb(*short(*tiny, out, "--do_eval", "--push_to_hub", *more), status=status, HF_ENDPOINT=hub.url,
                   HF_TOKEN="hf_secret", HF_HUB_OFFLINE="0")


@pytest.mark.slow
def test_what_is_uploaded(tiny, tmp_path, hub):
    said = push(tiny, tmp_path/"my-run", hub, "--hub_strategy", "every_save")
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "value_head.safetensors",
            "tokenizer.json", "curves.png", "run.json"} <= {*hub.files}
    private = [f for f in hub.files if "checkpoint" in f or "completions" in f or "tfevents" in f]
    assert not private, "completions and checkpoints stay here"
    assert sum("/commit/" in path for path, _ in hub.asked) == 3 and hub.message == "End of training"
    everything = b"".join(hub.files.values())
    assert "hf_secret" not in said and b"hf_secret" not in everything
    assert not [f for f in (tmp_path, *tiny) if str(f).encode() in everything], "no path of this machine"
    card = ModelCard(hub.files["README.md"].decode())
    assert (card.data.library_name, card.data.pipeline_tag, card.data.base_model) == ("peft", "text-generation", None)
    assert 'from_pretrained("me/my-run")' in card.text and "### Instruction:" in card.text
    assert "| reward |" in card.text and "curves.png" in card.text
    for name, content in hub.files.items():
        path = tmp_path/"loaded"/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny[0]), tmp_path/"loaded")


@pytest.mark.slow
def test_no_repository_is_said_before_training(tiny, tmp_path, hub):
    hub.refuse = lambda path: path.endswith("/create")
    said = push(tiny, tmp_path/"run", hub, status=2)
    assert "push_to_hub: no repository run" in said and "hf auth login" in said
    assert not (tmp_path/"run"/"adapter_config.json").exists()


@pytest.mark.slow
def test_a_hub_that_is_away_at_a_checkpoint_does_not_end_the_run(tiny, tmp_path, hub):
    hub.refuse = lambda path: "/preupload/" in path and sum("/preupload/" in p for p, _ in hub.asked) == 1
    said = push(tiny, tmp_path/"run", hub, "--hub_strategy", "every_save")
    assert "Not uploaded" in said and hub.message == "End of training"


@pytest.mark.slow
def test_an_upload_that_fails_loses_nothing(tiny, tmp_path, hub):
    hub.refuse = lambda path: "/commit/" in path
    said = push(tiny, tmp_path/"run", hub, status=1)
    assert "Not uploaded" in said and (tmp_path/"run"/"adapter_model.safetensors").exists()

"""What a run gives to the Hub: its model card and its files, without paths of this machine."""
import json
import logging
import os
import shutil
from concurrent.futures import Future
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader
from transformers import PreTrainedTokenizerBase

from .config import PATHS, REFUSED, PPOConfig, default_of, is_default
from .data import preparer
from .errors import RunError, first_line
from .metrics import METRICS, before_after
from .models import hub_name

logger = logging.getLogger(__name__)

SECRETS = ("token", "hub_token", "cache_dir")
# Settings that say nothing of a run
HIDDEN = {*REFUSED, *PATHS, "use_cpu", "overwrite_output_dir", "do_train", "do_eval", "report_to", "run_name",
          "project", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy", "hub_revision"}
DEFAULTS = {f.name: default_of(f) for f in fields(PPOConfig)}
EXAMPLE = "What is the sun made of?"


def run_settings(args: PPOConfig) -> dict[str, Any]: # JSON values
    "Return the settings of a run, without secrets and without where it lies on this machine."
    settings = json.loads(json.dumps(args.to_dict(), default=str))
    return without_paths({name: value for name, value in settings.items() if name not in PATHS})


def changed_settings(settings: dict[str, Any]) -> dict[str, Any]:
    "Return what is not at its default, without where things go."
    known = DEFAULTS.keys() - HIDDEN
    return {k: v for k, v in settings.items() if k in known and not is_default(v, DEFAULTS[k])}


def is_path(text: str) -> bool:
    "Is this a place on this machine: an absolute path, or a relative one that is there?"
    if "\n" in text or len(text) > 1000 or os.sep not in text: return False
    path = Path(text).expanduser()
    return len(path.parts) > 2 and path.is_absolute() or Path(text).exists()


def without_paths(value: Any) -> Any:
    "Return a JSON value without secrets, in which every path of this machine is its last part."
    if isinstance(value, dict): return {k: without_paths(v) for k, v in value.items() if k not in SECRETS}
    if isinstance(value, list): return [*map(without_paths, value)]
    return Path(value).name if isinstance(value, str) and is_path(value) else value


def make_public(folder: Path): # Of files to upload
    "Take secrets and paths of this machine out of the files that may have some."
    for path in [folder/"run.json", folder/"trainer_state.json", *folder.rglob("adapter_config.json")]:
        if not path.exists(): continue
        content = without_paths(json.loads(path.read_text(encoding="utf-8")))
        text = json.dumps(content, indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def example_prompt(data: dict[str, Any],               # Of run.json: prompt_template and system_prompt, where known
                   tokenizer: PreTrainedTokenizerBase, # The policy's
                   chat_template_kwargs: dict | None = None,
) -> str | None:                                       # None: the chat template refuses it
    "Write a question as the policy read one in training."
    template, system = data.get("prompt_template") or "{}", data.get("system_prompt")
    prepare = preparer(template, system, tokenizer, None, chat_template_kwargs)
    try: return prepare(dict(instruction=EXAMPLE), "model card")["prompt"]
    except ValueError as e: logger.warning("%s; the card is written without an example", first_line(e))


def card_data(about: dict[str, Any],     # What run.json holds
              dataset_name: str | None,  # None: the one of the run, if it is on the Hub
              tags: list[str],
) -> ModelCardData:
    "Make the card's header."
    base, adapter = hub_name(about["model"]["policy"]), about["model"]["adapter"]
    known = ["rlhf_nb", "ppo", "rlhf", "reinforcement-learning"] + ["lora"] * adapter
    if base and adapter: known.append(f"base_model:adapter:{base}")
    data = dataset_name or hub_name(about["data"].get("dataset_name"))
    return ModelCardData(base_model=base, library_name="peft" if adapter else "transformers",
                         pipeline_tag="text-generation", tags=[*dict.fromkeys([*known, *tags])],
                         datasets=[data] if data else None)


def as_link(name: str | None) -> str: # A hub name, or a path
    "Return a name as Markdown, with its page on the Hub if it has one."
    if not name: return "a model without a name"
    return f"[{name}](https://huggingface.co/{name})" if hub_name(name) and "/" in name else f"`{Path(name).name}`"


def model_card(about: dict[str, Any],           # What run.json holds
               history: list[dict],             # `trainer.state.log_history`
               repo: str,                       # On the Hub, or a folder's name
               prompt: str | None = None,       # From `example_prompt`; None: the card shows none
               tokenizer: PreTrainedTokenizerBase | None = None,
               curves: bool = False,            # Is there a curves.png beside it?
               **how: Any,                      # model_name, dataset_name and tags, as in `Trainer.create_model_card`
) -> ModelCard:
    "Make the card of a run."
    tags = how.get("tags") or []
    header = card_data(about, how.get("dataset_name"), [tags] if isinstance(tags, str) else tags)
    template = Environment(loader=PackageLoader("rlhf_nb")).get_template("card.md")
    return ModelCard(template.render(
        about, card_data=header.to_yaml(), name=how.get("model_name") or repo.split("/")[-1], repo=repo,
        as_link=as_link, changes=before_after(history, batches=False), metrics=METRICS, history=history,
        changed=changed_settings(about["settings"]), prompt=prompt, tokenizer=tokenizer, curves=curves))


def make_repo(args: PPOConfig,
              token: str | None = None,    # Default: args.hub_token
              private: bool | None = None, # Default: args.hub_private_repo
) -> str:                                  # Its full name
    "Make the repository on the Hub, if it is not there; `ValueError` if there is none to be had."
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    private = args.hub_private_repo if private is None else private
    try: return HfApi(token=token or args.hub_token).create_repo(name, private=private, exist_ok=True).repo_id
    except Exception as e: # Of the network, of the Hub and of huggingface_hub: many kinds
        login = "log in with `hf auth login` or set HF_TOKEN"
        raise ValueError(f"push_to_hub: no repository {name} ({first_line(e)}); {login}") from e


def upload(folder: Path,                  # Is deleted afterwards
           repo: str,                     # Its full name
           args: PPOConfig,
           commit_message: str = "End of training",
           blocking: bool = True,         # False: return at once
           token: str | None = None,      # Default: args.hub_token
           revision: str | None = None,   # Branch; default: args.hub_revision, else main
) -> CommitInfo | Future:
    "Upload a folder, without paths of this machine; `RunError` if that fails."
    api, revision = HfApi(token=token or args.hub_token), revision or args.hub_revision
    def work() -> CommitInfo:
        try:
            make_public(folder)
            if revision: api.create_branch(repo, branch=revision, exist_ok=True)
            return api.upload_folder(repo_id=repo, folder_path=folder, commit_message=commit_message, revision=revision)
        except Exception as e: # As in `make_repo`
            again = f"trainer.push_to_hub() tries again, or `hf upload {repo} {args.output_dir}`"
            raise RunError(f"Not uploaded ({first_line(e)}). {again}") from e
        finally: shutil.rmtree(folder)
    return work() if blocking else api.run_as_future(work)

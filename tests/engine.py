"A stand-in for TRL's vLLM client: a base model of its own, which receives weights by name and generates by itself."
import torch

from rlhf_nb.models import ActorCritic, Sampling
from rlhf_nb.rollout import WARPERS, Generation, generate, logits_processors, padded
from rlhf_nb.testing import tiny_policy


def uniforms_of(seed: int | None, length: int):
    "The numbers that a completion is sampled with, (1, length)."
    return None if seed is None else torch.rand(1, length, generator=torch.Generator().manual_seed(seed))


class Engine:
    "Each test makes a class of its own from it, whose one instance is under `made`."
    arch, logprobs_mode, made = "bloom", "processed_logprobs", None
    settings = 1., 1., 0, 0. # Repetition penalty, top-p, top-k, min-p

    def __init__(self, base_url=None, host="0.0.0.0", server_port=8000, group_port=51216, connection_timeout=0.0):
        self.policy = ActorCritic(tiny_policy(self.arch, initializer_range=.2)[0])
        self.asked, self.told, self.sent, self.joined = [], [], [], None
        type(self).made = self

    def get_server_info(self): return dict(model_config=dict(logprobs_mode=self.logprobs_mode))

    def init_communicator(self, device=0): self.joined = device

    def as_served(self, weight): return weight

    def update_named_params(self, metadata, named_params):
        assert self.joined is not None
        weights = dict(named_params)
        assert metadata == [(name, str(w.dtype).removeprefix("torch."), list(w.shape)) for name, w in weights.items()]
        served = {k: self.as_served(w) for k, w in weights.items()}
        missing, unexpected = self.policy.lm.load_state_dict(served, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}
        self.sent.append("weights")

    def reset_prefix_cache(self): self.sent.append("reset")

    def generate(self, prompts, features=None, n=1, repetition_penalty=1.0, temperature=1.0, top_p=1.0, top_k=0,
                 min_p=0.0, max_tokens=16, logprobs=0, structured_outputs_regex=None, generation_kwargs=None):
        told, (prompt,) = generation_kwargs, prompts
        assert (features, n, logprobs, structured_outputs_regex) == (None, 1, 0, None)
        assert (repetition_penalty, top_p, top_k, min_p) == self.settings
        assert told.keys() >= {"min_tokens", "stop_token_ids", "stop", "skip_special_tokens", "seed"}
        assert told["ignore_eos"]
        self.told.append(dict(prompts=prompts, temperature=temperature, max_tokens=max_tokens, **told))
        self.asked.append((tuple(prompt), told["seed"]))
        sampling = Sampling(temperature or 1., told["min_tokens"], tuple(told["stop_token_ids"]))
        restricted = {name: value for name, value in dict(top_p=top_p, top_k=top_k).items() if value not in (0, 1.)}
        generation = Generation(sampling, max_tokens, 0, warpers=logits_processors(restricted, WARPERS))
        query = padded([torch.tensor(prompt)], 0)
        ids, _, found, _ = generate(self.policy, *query, generation, uniforms_of(told["seed"], max_tokens))
        return dict(prompt_ids=prompts, completion_ids=ids.tolist(), logprobs=found[..., None].tolist(),
                    logprob_token_ids=ids[..., None].tolist())

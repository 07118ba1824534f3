"One `trainer.step` against the same step written out plainly: row by row, full logits, no padding, no library."
import math
from copy import deepcopy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from rlhf_nb.config import PPOConfig
from rlhf_nb.models import lora_targets
from rlhf_nb.testing import DECODERS, tiny_policy
from rlhf_nb.trainer import PPOTrainer

WORDS = (
    "Why?",
    "What helps against a cough at night, and how soon?",
    "Fever",
    "My son has had hiccups for three days",
    "Rest or walk?",
)


def make(arch, folder, lora, pad_is_eos=False, **settings):
    model, tok = tiny_policy(arch, initializer_range=.2)
    if pad_is_eos: tok.pad_token = tok.eos_token
    if lora:
        model = get_peft_model(
            model, LoraConfig(r=4, lora_dropout=0.3, target_modules=lora_targets(model), task_type="CAUSAL_LM")
        )
    kw = dict(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        steps_per_generation=3,
        gradient_accumulation_steps=2,
        num_iterations=2,
        max_completion_length=14,
        min_completion_length=2,
        temperature=0.8,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        adam_epsilon=1e-3,
        weight_decay=0.01,
        max_grad_norm=0.5,
        beta=0.2,
        bf16=False,
        use_cpu=True,
        max_steps=4,
        report_to="none",
        disable_tqdm=True,
        seed=1,
    )
    prompts = Dataset.from_dict(dict(prompt=list(WORDS)))
    trainer = PPOTrainer(
        model, lambda prompts, **k: [0.0] * len(prompts), PPOConfig(**kw | settings), prompts, processing_class=tok
    )
    torch.manual_seed(3)
    for p in trainer.policy.parameters():
        if p.requires_grad: p.data += .03 * torch.randn_like(p)
    trainer.sampler.eos_token_ids = (tok.eos_token_id, *range(5, 1000, 3))
    return trainer


def look(policy, lm, query, answer, sampling):
    "Log-probs, values and entropy of one answer, from the full logits of one row."
    out = lm(input_ids=torch.cat([query, answer])[None], output_hidden_states=True, use_cache=False)
    places = slice(len(query) - 1, len(query) + len(answer) - 1)
    logits = out.logits[0, places] / sampling.temperature
    early = torch.arange(len(answer))[:, None] < sampling.min_length
    ending = torch.zeros(logits.shape[1], dtype=torch.bool).index_fill(0, torch.tensor(sampling.eos_token_ids), True)
    dist = torch.distributions.Categorical(logits=logits.masked_fill(early & ending, -torch.inf))
    return dist.log_prob(answer), policy.value_head(out.hidden_states[-1][0, places])[:, 0], dist


def plain_step(policy, ref, rows, scores, args, sampling, orders):
    "The weights after one update; `orders` are the rows of each epoch."
    old = []
    with torch.no_grad():
        for (query, answer), score in zip(rows, scores):
            lp, v, _ = look(policy, policy.lm, query, answer, sampling)
            gap = lp - look(policy, ref, query, answer, sampling)[0]
            reward = [-args.beta * g.item() for g in gap]
            reward[-1] += score
            v, n = v.tolist(), len(answer)
            errors = [reward[t] + args.gamma * (v[t + 1] if t + 1 < n else 0) - v[t] for t in range(n)]
            advantage = [sum((args.gamma * args.lam) ** (k - t) * errors[k] for k in range(t, n)) for t in range(n)]
            old.append(
                (lp, torch.tensor(v), torch.tensor(advantage), torch.tensor([a + b for a, b in zip(advantage, v)]))
            )
    every = torch.cat([a for _, _, a, _ in old]).double()
    white = [((a - every.mean()) / (every.var() + 1e-8).sqrt()).float() for _, _, a, _ in old]
    names, params = zip(*[(n, p) for n, p in policy.named_parameters() if p.requires_grad])
    decayed = [not any(part in n for part in ("bias", "norm", "ln_")) for n in names]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    steps, size = 0, args.per_device_train_batch_size * args.gradient_accumulation_steps
    for order in orders:
        for start in range(0, len(order), size):
            group, loss = order[start:start + size], 0.
            tokens = sum(len(rows[i][1]) for i in group)
            for i in group:
                lp, v, _ = look(policy, policy.lm, *rows[i], sampling)
                old_lp, old_v, _, target = old[i]
                for t in range(len(lp)):
                    ratio, a = (lp[t] - old_lp[t]).exp(), white[i][t]
                    gain = torch.min(ratio * a, ratio.clamp(1 - args.epsilon, 1 + args.epsilon) * a)
                    near = old_v[t] + (v[t] - old_v[t]).clamp(-args.cliprange_value, args.cliprange_value)
                    miss = torch.max((v[t] - target[t]) ** 2, (near - target[t]) ** 2) / 2
                    loss = loss + (args.vf_coef * miss - gain) / tokens
            grads = torch.autograd.grad(loss, params, allow_unused=True)
            norm = math.sqrt(sum(g.pow(2).sum().item() for g in grads if g is not None))
            steps += 1
            for p, g, (m, s), decays in zip(params, grads, moments, decayed):
                if g is None: continue
                g = g * min(1., args.max_grad_norm / (norm + 1e-6))
                m.mul_(args.adam_beta1).add_(g, alpha=1 - args.adam_beta1)
                s.mul_(args.adam_beta2).add_(g * g, alpha=1 - args.adam_beta2)
                mean, var = m / (1 - args.adam_beta1 ** steps), s / (1 - args.adam_beta2 ** steps)
                p.data = p.data * (1 - args.learning_rate * args.weight_decay * decays) - args.learning_rate * mean / (
                    var.sqrt() + args.adam_epsilon
                )
    return params


def without_adapter(lm):
    def call(**kw):
        with lm.disable_adapter(): return lm(**kw)
    return call


def compare(trainer):
    "The step of the trainer, and the same written out, from the same answers."
    args, policy = trainer.args, trainer.policy
    plain = deepcopy(policy)
    out = trainer.rollout(list(WORDS))
    assert len(set(out.tokens.response_mask.sum(1).tolist())) > 1 and out.ended.any()
    rows = [(q[qm > 0], r[rm > 0]) for q, qm, r, rm in zip(*out.tokens)]
    scores = [1., -2., .5, 3., 0.]
    orders = torch.Generator()
    orders.set_state(trainer.sampler.generator.get_state())
    epochs = [torch.randperm(len(rows), generator=orders).tolist() for _ in range(args.num_iterations)]
    assert len({e[-1] for e in epochs}) > 1
    before = [p.detach().clone() for p in policy.parameters() if p.requires_grad]
    trainer.step(out, scores)
    ref = without_adapter(plain.lm) if plain.ref_lm is None else plain.ref_lm
    want = plain_step(plain, ref, rows, scores, args, trainer.sampler.sampling, epochs)
    got = [p for p in policy.parameters() if p.requires_grad]
    assert max((a - b).abs().max() for a, b in zip(before, got)) > 1e-4
    return max((a - b).abs().max().item() for a, b in zip(want, got))


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("arch", DECODERS)
def test_a_step_is_the_plain_step(arch, lora, tmp_path):
    assert compare(make(arch, tmp_path, lora)) < 1e-5


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_where_pad_is_eos(lora, tmp_path):
    assert compare(make("llama", tmp_path, lora, pad_is_eos=True)) < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        dict(per_device_train_batch_size=5, steps_per_generation=1, gradient_accumulation_steps=1),
        dict(per_device_train_batch_size=1, steps_per_generation=5, gradient_accumulation_steps=3),
        dict(lam=0.5, gamma=0.9, epsilon=0.001, cliprange_value=0.01),
        dict(vf_coef=2.0, learning_rate=5e-3),
    ],
    ids=str,
)
def test_with_other_settings(settings, tmp_path):
    assert compare(make("bloom", tmp_path, True, **settings)) < 1e-5

"""Train with PPO as TRL's own scripts do; for RLOO, change the word PPO and import from trl.

    python examples/ppo.py --dataset_name trl-lib/ultrafeedback-prompt --output_dir Qwen2.5-0.5B-PPO \\
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --use_peft --lora_target_modules q_proj v_proj \\
        --reward_model_name_or_path Skywork/Skywork-Reward-V2-Qwen3-0.6B \\
        --per_device_train_batch_size 8 --max_completion_length 64 --max_steps 200

dataset_name may be a folder with train.jsonl and test.jsonl. On several GPUs: accelerate launch examples/ppo.py ...
"""
from dataclasses import dataclass

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from rlhf_nb import PPOConfig, PPOTrainer


@dataclass
class Arguments(ScriptArguments):
    "The data set, and what rewards completions."
    reward_model_name_or_path: str | None = None
    wanted_length: int = 200 # Characters


def main(script, args, model):
    def brevity(completions, **kwargs):
        "Nothing for a completion of the wanted number of characters, less for a longer one."
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        return [-max(0., len(text) / script.wanted_length - 1) for text in texts]

    args.model_init_kwargs = dict(revision=model.model_revision, dtype=model.dtype,
                                  attn_implementation=model.attn_implementation)
    dataset = load_dataset(script.dataset_name, name=script.dataset_config)
    trainer = PPOTrainer(
        model=model.model_name_or_path,
        reward_funcs=[brevity] + [script.reward_model_name_or_path] * bool(script.reward_model_name_or_path),
        args=args,
        train_dataset=dataset[script.dataset_train_split],
        eval_dataset=dataset[script.dataset_test_split] if args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model))
    trainer.train()
    trainer.save_model(args.output_dir)
    if args.push_to_hub: trainer.push_to_hub(dataset_name=script.dataset_name)


if __name__ == "__main__": main(*TrlParser((Arguments, PPOConfig, ModelConfig)).parse_args_and_config())

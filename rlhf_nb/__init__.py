"""PPO for language models: rollout, score, advantages, update."""
__version__ = "0.1.0"
__all__ = ["PPOConfig", "PPOTrainer"]


def __getattr__(name: str):
    "Import the trainer when it is asked for: torch and transformers take seconds."
    if name == "PPOConfig":
        from .config import PPOConfig
        return PPOConfig
    if name == "PPOTrainer":
        from .trainer import PPOTrainer
        return PPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

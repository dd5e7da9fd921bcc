"""The dataclass of flags of each training stage."""

from importlib import import_module

STAGES = (
    *("pretrain", "full_sft", "lora", "dpo", "reward", "reason", "distillation"),
    *("ppo", "grpo", "spo", "agent"),
)


def args_class(stage: str) -> type:
    """The dataclass of a stage's flags."""
    module = import_module(f"trainer.train_{stage}")
    (cls,) = (
        x
        for x in vars(module).values()
        if getattr(x, "__module__", "") == module.__name__ and x.__name__.endswith("Args")
    )
    return cls

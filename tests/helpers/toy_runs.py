"""A run of a network so small that a step takes milliseconds, without any file of data."""

from pathlib import Path

import torch

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from tests.helpers.networks import SMALL
from trainer.runtime.optimizers import build_optimizer
from trainer.runtime.run import Run
from trainer.runtime.stage_args import TrainArgs


class ToyTokenizer:
    """It spells ids as numbers."""

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")

    def decode(self, ids: torch.Tensor) -> str:
        return " ".join(str(int(x)) for x in ids)


class ToyBatches:
    """Steps of one micro-batch, [1, 8]: two documents of four tokens, drawn by the step."""

    def __init__(self, num_steps: int):
        self.num_steps = num_steps

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> list[dict[str, torch.Tensor]]:
        ids = torch.randint(1, 97, (1, 8), generator=torch.Generator().manual_seed(step))
        return [
            {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(8)[None] % 4}
        ]

    def describe(self) -> str:
        return "toy batches"


def toy_args(**flags: object) -> TrainArgs:
    """Flags as if they had been written on a command line."""
    args = TrainArgs(**{"device": "cpu", "save_weight": "toy", **flags})
    args.given = set(flags)
    args.check()
    return args


def toy_run(folder: Path, **flags: object) -> Run:
    """A Run whose folder is `folder`."""
    run = Run(toy_args(save_dir=str(folder.parent), **flags))
    run.folder = folder
    return run


def toy_network(seed: int = 0, **shape: float) -> MiniMindForCausalLM:
    torch.manual_seed(seed)
    return MiniMindForCausalLM(MiniMindConfig(**{**SMALL, "hidden_size": 16, **shape})).train()


def train_step(run: Run, model: MiniMindForCausalLM, optimizer: object, step: int) -> float:
    """Learn from a step of ToyBatches; returns its loss."""
    (micro,) = ToyBatches(step + 1)[step]
    loss = model(**micro, num_items_in_batch=8).loss
    run.backward(loss)
    run.clip_and_step(model, optimizer, loss.item())
    return loss.item()


def toy_optimizer(model: torch.nn.Module, **flags: object) -> object:
    return build_optimizer(model, toy_args(**{"learning_rate": 1e-2, **flags}))

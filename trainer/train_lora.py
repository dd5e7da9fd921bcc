"""LoRA: teach a finished network something new by training small matrices next to frozen weights.

A weight W [out, in] becomes W + (alpha / r) B A, with A [r, in] and B [out, r] (Hu et al. 2021,
eq. 3). B begins as zeros, so training starts from the network as it is; r is small, so there is
little to train and to store. --use_rslora divides by sqrt(r) instead, which keeps large ranks
learning (Kalajdzievski 2023); --use_dora also trains the lengths of the rows of W (Liu et al.
2024). The loss is that of supervised fine-tuning.

    python trainer/train_lora.py --from_weight out/quickstart/full_sft_tiny    # a minute
    python dataset/lora_examples.py && python trainer/train_lora.py \\
        --data_path dataset/lora_examples/identity_train.jsonl \\
        dataset/toy_mini/sft_train.jsonl@0.1 --from_weight out/quickstart/full_sft_tiny \\
        --save_weight lora_identity
    python trainer/train_lora.py --data_path shop.jsonl --from_weight full_sft --rank 8 \\
        --target_modules q_proj v_proj --use_dora

What to expect: after a few hundred steps the network answers new phrasings of the new questions,
with the defaults 94% of them, while the old skills keep 87.5 of 88.2% (scripts/evaluate_stages.py).
With the new rows alone a small network forgets most of its skills: mix in old rows, as above and as
the default does, which lists the new file six times. Leave out old rows that contradict the new
ones. The medical example of dataset/lora_examples.py is too far from the toy world for the toy
network: give it one trained on real text. out/lora_<preset> holds the adapter alone, in PEFT's
format: try it with eval_llm.py --adapter, or merge it with scripts/convert_model.py merge.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.runtime.arguments import arg, check_flags, command, parse_args
from trainer.runtime.stage_args import ConversationArgs

if TYPE_CHECKING:
    from model.model_lora import LoRASettings


@dataclass
class LoRAArgs(ConversationArgs):
    data_path: list[str] = arg(
        [],
        "rows of conversations; FILE@0.4: that fraction of them (default: see docs/training.md; "
        "the toy world's and some of the rows that the network was fine-tuned on)",
    )
    from_weight: str = arg(
        "full_sft", "the network to adapt: a name in SAVE_DIR, checkpoint folder or .pth file"
    )
    save_weight: str = arg(
        "lora",
        "name of this run: SAVE_DIR/SAVE_WEIGHT_PRESET gets the adapter",
        aliases=("lora_name",),
    )
    rank: int = arg(
        16, "rank r of the matrices: how much can be learned", aliases=("lora_rank", "lora_r")
    )
    alpha: float = arg(32.0, "the change is scaled with alpha / r", aliases=("lora_alpha",))
    lora_dropout: float = arg(0.0, "dropout on the inputs of the adapters")
    target_modules: list[str] = arg(
        [],
        "layers to adapt, e.g. q_proj v_proj (default: all linear layers but head and router)",
        aliases=("lora_target_modules",),
    )
    use_rslora: bool = arg(False, "scale with alpha / sqrt(r)")
    use_dora: bool = arg(False, "train the lengths of the weights' rows too")
    epochs: int = 5
    batch_size: int = 2
    learning_rate: float = 2e-3
    weight_decay: float = arg(0.0, "decay of the matrices, towards the network as it was")

    def check(self) -> None:
        """ConversationArgs.check, a network to begin with, and the checks of `LoRASettings`."""
        super().check()
        if self.from_weight == "none":
            raise ValueError("--from_weight none: an adapter changes a trained network; name one")
        self.settings()

    def settings(self) -> "LoRASettings":
        """The adapters that the flags ask for; ValueError where they contradict each other."""
        from model.model_lora import LoRASettings

        shape = self.rank, self.alpha, self.lora_dropout, self.target_modules or None
        return LoRASettings(*shape, self.use_rslora, self.use_dora)


check_flags(LoRAArgs, __name__)  # --help need not wait for torch, which is imported below

from dataset.lm_dataset import SFTDataset
from model.model_lora import AdapterOnly, add_adapter
from trainer.runtime.checkpoint import TrainState
from trainer.runtime.data import open_datasets, training_batches
from trainer.runtime.evaluation import validate
from trainer.runtime.loop import Loop
from trainer.runtime.optimizers import build_optimizer, learning_rate_at, set_learning_rate
from trainer.runtime.run import Run
from trainer.runtime.weights import find_base, load_model


def main(argv: list[str] | None = None) -> None:
    args = parse_args(LoRAArgs, argv)
    with Run(args) as run:
        base = find_base(args, run.device)
        model, tokenizer = load_model(run)
        # few new rows, seen often, among more old ones, seen seldom: else the old skills are lost
        toy_files = 6 * ["lora_train.jsonl"] + ["sft_train.jsonl@0.5"]
        train_set, val_sets = open_datasets(
            run, tokenizer, SFTDataset, toy_files, seed=args.seed, **args.turn_options()
        )
        settings = args.settings()
        add_adapter(model, settings)  # from here on all other weights are frozen
        optimizer = build_optimizer(model, args)
        batches = training_batches(run, train_set, tokenizer.pad_token_id)
        adapter = AdapterOnly(model, settings, base)
        state = TrainState(model, tokenizer, optimizer, train_set.fingerprint, saved=adapter)
        loop = Loop(run, state, batches, partial(validate, run, model, tokenizer, val_sets))

        for step, micro_batches in loop:
            learning_rate = learning_rate_at(step, len(batches), args)
            set_learning_rate(optimizer, loop.learning_rate_factor * learning_rate)
            # each loss is a part of the step's mean: its sum / the targets of all micro-batches and
            # ranks; the parts add up
            num_targets = run.count_targets(micro_batches)
            for micro in micro_batches:
                with run.micro_step(is_last=micro is micro_batches[-1]):
                    loss = loop.net(
                        **run.to_device(micro),
                        num_items_in_batch=num_targets,
                        head_positions="targets",
                    ).loss
                    run.backward(loss)
                loop.means.add(loss=loss)
            metrics = loop.means.reduce(run.ranks)
            update = run.clip_and_step(model, optimizer, metrics["loss"])
            loop.log(update, micro_batches, num_targets, **metrics)  # validates, saves when due


if __name__ == "__main__":
    command(main)

"""LoRA: teach a finished network something new by training a few small matrices beside its frozen weights.

A weight W [out, in] is replaced by W + (alpha / r) B A, with A [r, in] and B [out, r] (Hu et al. 2021, eq. 3). B begins as
zeros, so training starts from the network as it is; r is small, so there is little to train and to store. --use_rslora divides
by sqrt(r) instead, which keeps large ranks learning (Kalajdzievski 2023); --use_dora also trains the lengths of the rows of W
(Liu et al. 2024). The loss is that of supervised fine-tuning: -log p of the assistant's tokens, divided by their number in the
step.

    python trainer/train_lora.py --from_weight out/quickstart/full_sft_tiny                   # a minute on a CPU, toy world
    python dataset/lora_examples.py && python trainer/train_lora.py --data_path dataset/lora_examples/identity_train.jsonl \\
        dataset/toy_mini/sft_train.jsonl@0.1 --from_weight out/quickstart/full_sft_tiny --save_weight lora_identity
    python trainer/train_lora.py --data_path shop.jsonl --from_weight full_sft --rank 8 --target_modules q_proj v_proj --use_dora

What to expect: new phrasings of the new questions are answered after a few hundred steps, with the defaults 94% of them, while
the old skills keep 87.5 of 88.2% (scripts/ladder.py). With the new rows alone a small network loses most of what it could do
before: mix in a share of the old rows, as above and as the default does, which lists the new file six times so that it is seen
more often. Leave out old rows that contradict the new ones. The medical example of dataset/lora_examples.py is too far from the
toy world for the toy network: give it one trained on real text. The run's folder, out/lora_<preset>, holds the adapter alone, in
PEFT's format, a few percent of the network's size: try it with eval_llm.py --adapter, or make one network of the two with
scripts/merge_lora.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.inspect_rows import show_rows
from dataset.lm_dataset import SFTDataset
from dataset.packing import PackedBatches
from dataset.toy_world import write_world
from model.model_lora import AdapterOnly, LoRASettings, add_adapter
from trainer.arguments import TrainArgs, arg, command, parse_args
from trainer.checkpoint import Checkpoint
from trainer.evaluation import validate, validation_sets
from trainer.loop import Loop
from trainer.optim import build_optimizer
from trainer.run import Run
from trainer.steps import count_targets, step_batches
from trainer.weights import find_weight, load_model, run_folder

TOY = ROOT / "dataset" / "toy_mini"


@dataclass
class LoRAArgs(TrainArgs):
    data_path: list[str] = arg([], "rows of conversations; FILE@0.4 takes that share of them (default: the toy world's, and some "
                                   "of those that the network was fine-tuned on)", nargs="+")
    from_weight: str = arg("full_sft", "the network to adapt: a name in SAVE_DIR, checkpoint folder or .pth file")
    save_weight: str = arg("lora", "name of this run: the adapter is saved in SAVE_DIR/SAVE_WEIGHT_PRESET")
    rank: int = arg(16, "rank r of the matrices: how much can be learned")
    alpha: float = arg(32.0, "the change is scaled with alpha / r")
    lora_dropout: float = arg(0.0, "share of an adapter's inputs that is left out at random")
    target_modules: list[str] = arg([], "layers to adapt, e.g. q_proj v_proj (default: all linear layers but head and router)",
                                    nargs="+")
    use_rslora: bool = arg(False, "scale with alpha / sqrt(r)")
    use_dora: bool = arg(False, "train the lengths of the weights' rows too")
    epochs: int = arg(5, "passes over the data")
    batch_size: int = arg(2, "packed rows of a micro-batch")
    learning_rate: float = arg(2e-3, "peak learning rate")
    weight_decay: float = arg(0.0, "decay of the matrices, which draws the network back to where it began")

    def check(self):
        """TrainArgs.check, a network to begin with, and what `LoRASettings` checks."""
        super().check()
        if self.from_weight == "none":
            raise ValueError("--from_weight none: an adapter changes a network that has learned something; name one")
        self.settings()

    def settings(self):
        return LoRASettings(self.rank, self.alpha, self.lora_dropout, self.target_modules or None, self.use_rslora, self.use_dora)


def main(argv=None):
    args = parse_args(LoRAArgs, argv)
    with Run(args) as run:
        if not args.data_path:
            run.ranks.from_first(lambda: write_world("mini", TOY))
            # few new rows, seen often, among more old ones, seen seldom: with the new ones alone the old skills are lost
            args.data_path = 6 * [str(TOY / "lora_train.jsonl")] + [str(TOY / "sft_train.jsonl@0.5")]
        base = find_weight(args.from_weight, args, run.device).resolve()
        model, tokenizer = load_model(args, run.device)
        folder = run_folder(args, model.config, run.ranks)

        def build(paths):
            return SFTDataset(paths, tokenizer, args.max_seq_len, bad_rows=args.bad_rows, cache_dir=args.cache_dir,
                              num_proc=args.num_proc, seed=args.seed)

        dataset = build(args.data_path)
        if args.inspect:
            return show_rows(dataset, tokenizer, args.inspect)
        run.say(dataset.report)
        training, held_out = validation_sets(args, dataset, build)
        add_adapter(model, args.settings())  # from here on all other weights are frozen
        optimizer = build_optimizer(model, args)
        adapter = AdapterOnly(model, args.settings(), base.relative_to(ROOT) if base.is_relative_to(ROOT) else base)
        checkpoint = Checkpoint(folder, args, run, adapter, tokenizer, optimizer, training.fingerprint)
        batches = step_batches(PackedBatches, training, args, run, tokenizer, checkpoint)
        trained = model.num_parameters(only_trainable=True)
        run.say(f"{folder}: {trained:,} of {model.num_parameters():,} parameters are trained, {len(batches)} steps on {run}, "
                f"{batches.padding_share:.1%} of the positions are padding; {run.memory_advice(model)}")
        net = run.wrap(model, optimizer)

        def evaluate(index):
            return validate(model, tokenizer, held_out, run, args, index)

        with Loop(folder, args, run, model, optimizer, checkpoint, batches, training.fingerprint,
                  evaluate if held_out else None) as loop:
            for micro_batches in loop:
                num_targets = run.sum(count_targets(micro_batches))  # of the whole step: all micro-batches of all ranks
                loss = 0.0
                for micro in micro_batches:
                    with run.micro_step(is_last=micro is micro_batches[-1]):
                        part = net(**run.to_device(micro), num_items_in_batch=num_targets, skip_logits=True).loss
                        run.backward(part)
                    loss += part.detach()
                loop.update(run.sum(loss), num_targets, micro_batches)  # clip, step, log, validate, save


if __name__ == "__main__":
    command(main)

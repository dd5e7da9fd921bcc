"""Supervised fine-tuning: the pretrained network learns to answer, from conversations.

The loss is that of pretraining, -log p(token | what precedes it), summed over the assistant's tokens alone, the end
token of each turn among them, and divided by their number in the optimizer step (Ouyang et al. 2022, section 3.5;
masked as in Zhou et al. 2023). Which tokens are the assistant's is what the chat template says, not a search for
markers, so nothing that a user types is ever trained on.

    python trainer/train_full_sft.py --max_steps 30 --from_weight none --save_weight try     # a minute on a CPU, toy world
    python trainer/train_full_sft.py --data_path chat_zh.jsonl.xz chat_en.jsonl.xz --preset minimind-3 --batch_size 64
    python trainer/train_full_sft.py --data_path my_shop.jsonl --from_weight out/full_sft_tiny --save_weight shop

What to expect: the loss begins well below pretraining's start, since the words are known, and falls quickly; watch the
held-out bits per byte for overfitting after more than a few epochs. --empty_think_share teaches answers without thinking
after an empty think block, and --system_prompt_share to listen to system prompts. The weights are in
out/full_sft_<preset>/: chat with eval_llm.py.
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
from trainer.arguments import TrainArgs, arg, check_share, command, parse_args
from trainer.checkpoint import Checkpoint
from trainer.evaluation import validate, validation_sets
from trainer.loop import Loop
from trainer.optim import build_optimizer
from trainer.run import Run
from trainer.steps import count_targets, step_batches
from trainer.weights import load_model, run_folder

TOY = ROOT / "dataset" / "toy_mini"


@dataclass
class SFTArgs(TrainArgs):
    data_path: list[str] = arg([], "rows of conversations; FILE@0.4 takes that share of them (default: the toy world)", nargs="+")
    from_weight: str = arg("pretrain", "start from this run (a name in SAVE_DIR), checkpoint folder or .pth file")
    save_weight: str = arg("full_sft", "name of this run: it is saved in SAVE_DIR/SAVE_WEIGHT_PRESET")
    learning_rate: float = arg(1e-3, "peak learning rate")
    system_prompt_share: float = arg(0.0, "share of the rows without a system message that get one")
    empty_think_share: float = arg(0.0, "share of the answers without reasoning that get an empty think block")

    def check(self):
        """TrainArgs.check, and the two shares."""
        super().check()
        check_share(self, "system_prompt_share", "empty_think_share")


def main(argv=None):
    args = parse_args(SFTArgs, argv)
    with Run(args) as run:
        if not args.data_path:
            run.ranks.from_first(lambda: write_world("mini", TOY))
            args.data_path = [str(TOY / "sft_train.jsonl")]
        model, tokenizer = load_model(args, run.device)
        folder = run_folder(args, model.config, run.ranks)

        def build(paths):
            return SFTDataset(
                paths, tokenizer, args.max_seq_len, bad_rows=args.bad_rows, cache_dir=args.cache_dir, num_proc=args.num_proc,
                seed=args.seed, system_prompt_share=args.system_prompt_share,
                empty_think_share=args.empty_think_share)

        dataset = build(args.data_path)
        if args.inspect:
            return show_rows(dataset, tokenizer, args.inspect)
        run.say(dataset.report)
        training, held_out = validation_sets(args, dataset, build)
        optimizer = build_optimizer(model, args)
        checkpoint = Checkpoint(folder, args, run, model, tokenizer, optimizer, training.fingerprint)
        batches = step_batches(PackedBatches, training, args, run, tokenizer, checkpoint)
        run.say(f"{folder}: {model.num_parameters() / 1e6:.1f}M parameters, {len(batches)} steps on {run}, "
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

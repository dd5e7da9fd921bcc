"""Pretraining: a network that knows nothing reads text and learns to predict the next token.

For a document x_1 ... x_n the loss is the mean negative log-likelihood -1/n * sum_t log p(x_t | x_<t), over all target
tokens of an optimizer step, however they are spread over rows and micro-batches (Bengio et al. 2003; Radford et al.
2018, eq. 1). Documents are packed into rows of --max_seq_len tokens and do not see each other.

    python trainer/train_pretrain.py --max_steps 30 --save_weight try        # a minute on a CPU, on the toy world
    python trainer/train_pretrain.py --data_path zh.jsonl.xz en.jsonl.xz@0.5 --preset minimind-3 --batch_size 64
    python trainer/train_pretrain.py --data_path zh.jsonl.xz en.jsonl.xz@0.5 --preset minimind-3 --batch_size 64 --from_resume

What to expect: the loss starts at ln(6400) = 8.8, falls below 4 within the first hundred steps while the commonest
tokens and words are learned, and then slowly. Held-out bits per byte tell how well it goes on; docs/LOG.md has curves.
The weights are in out/pretrain_<preset>/, a Hugging Face folder that train_full_sft.py starts from.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.inspect_rows import show_rows
from dataset.lm_dataset import PretrainDataset
from dataset.packing import PackedBatches
from dataset.toy_world import write_world
from trainer.arguments import TrainArgs, arg, command, parse_args
from trainer.checkpoint import Checkpoint
from trainer.evaluation import validate, validation_sets
from trainer.loop import Loop
from trainer.optim import build_optimizer
from trainer.run import Run
from trainer.steps import count_targets, step_batches
from trainer.weights import load_model, run_folder

TOY = ROOT / "dataset" / "toy_mini"


@dataclass
class PretrainArgs(TrainArgs):
    data_path: list[str] = arg([], 'rows {"text": "..."}; FILE@0.4 takes that share of them (default: the toy world)', nargs="+")
    save_weight: str = arg("pretrain", "name of this run: it is saved in SAVE_DIR/SAVE_WEIGHT_PRESET")
    learning_rate: float = arg(2e-3, "peak learning rate")


def main(argv=None):
    args = parse_args(PretrainArgs, argv)
    with Run(args) as run:
        if not args.data_path:
            run.ranks.from_first(lambda: write_world("mini", TOY))
            args.data_path = [str(TOY / "pretrain_train.jsonl")]
        model, tokenizer = load_model(args, run.device, chat=False)
        folder = run_folder(args, model.config, run.ranks)

        def build(paths):
            return PretrainDataset(paths, tokenizer, args.max_seq_len, bad_rows=args.bad_rows, cache_dir=args.cache_dir,
                                   num_proc=args.num_proc)

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

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
from trainer.optim import build_optimizer, learning_rate_at, set_learning_rate
from trainer.record import RunRecord, finish
from trainer.run import Run
from trainer.weights import load_model, run_folder

TOY = ROOT / "dataset" / "toy_mini"


@dataclass
class PretrainArgs(TrainArgs):
    data_path: list[str] = arg([], 'rows {"text": "..."}; FILE@0.4 takes that share of them (default: the toy world)', nargs="+")
    save_weight: str = arg("pretrain", "name of this run: it is saved in SAVE_DIR/SAVE_WEIGHT_PRESET")
    learning_rate: float = arg(2e-3, "peak learning rate")


def main(argv=None):
    args = parse_args(PretrainArgs, argv)
    run = Run(args)
    if not args.data_path:
        write_world("mini", TOY)
        args.data_path = [str(TOY / "pretrain_train.jsonl")]
    model, tokenizer = load_model(args, run.device, chat=False)
    folder = run_folder(args, model.config)

    def build(paths):
        return PretrainDataset(paths, tokenizer, args.max_seq_len, bad_rows=args.bad_rows, num_proc=args.num_workers)

    dataset = build(args.data_path)
    if args.inspect:
        return show_rows(dataset, tokenizer, args.inspect)
    print(dataset.report)
    training, held_out = validation_sets(args, dataset, build)
    batches = PackedBatches(
        training, batch_size=args.batch_size, accumulation_steps=args.accumulation_steps, max_seq_len=args.max_seq_len,
        seed=args.seed, epochs=args.epochs, max_steps=args.max_steps, pad_id=tokenizer.pad_token_id)
    optimizer = build_optimizer(model, args)
    checkpoint = Checkpoint(folder, args, run, model, tokenizer, optimizer, training.fingerprint)
    first, targets = checkpoint.restore() if args.from_resume else (0, 0)
    net = run.wrap(model)
    print(f"{folder}: {model.num_parameters() / 1e6:.1f}M parameters, steps {first} to {len(batches)} on {run.device}, "
          f"{batches.padding_share:.1%} of the positions are padding")

    with RunRecord(folder, args, first, targets, len(batches), data_fingerprint=training.fingerprint,
                   arithmetic=checkpoint.arithmetic, shape=model.config.to_dict()) as record:
        for step, micro_batches in enumerate(batches.from_step(first), start=first):
            learning_rate = learning_rate_at(step, len(batches), args)
            set_learning_rate(optimizer, learning_rate)
            num_targets = sum(int((micro["labels"] != -100).sum()) for micro in micro_batches)  # of the whole step
            step_loss = 0.0
            for micro in micro_batches:
                with run.autocast():
                    loss = net(**run.to_device(micro), num_items_in_batch=num_targets, skip_logits=True).loss
                run.backward(loss)
                step_loss += loss.item()
            grad_norm = run.clip_and_step(model, optimizer)

            done, is_last = step + 1, step + 1 == len(batches)
            record.advance(done, num_targets, step_loss, learning_rate)
            if done % args.log_interval == 0 or is_last:
                record.log(step=done, loss=step_loss, learning_rate=learning_rate, grad_norm=grad_norm)
            if held_out and (done % args.val_interval == 0 or is_last):
                scores, text = validate(model, tokenizer, held_out, run, args, index=done // args.val_interval)
                record.log(step=done, **scores)
                record.say(text)
            if done % args.save_interval == 0 or is_last:
                checkpoint.save(done, record.targets)
    finish(folder, args)


if __name__ == "__main__":
    command(main)

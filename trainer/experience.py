"""The samples of a rollout as packed micro-batches, with what the losses need of every sampled token.

A sequence stays whole, so a step's samples make the same update however they are cut into micro-batches or shared among ranks.
Shapes: `B` rows, `T` tokens of a row, `n` sampled tokens of a micro-batch, in row-major order.
"""

from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F

from dataset.packing import IGNORE, collate, cut, pack
from trainer.rollout import draw_seed
from trainer.run import evaluating


def collate_samples(rows, samples, columns, capacity, pad_id):
    """A micro-batch of `samples`; rows: lists of their numbers. Tensors on the CPU:

    input_ids, labels, position_ids: int64 [B, T]. labels are the sampled tokens, not shifted. is_source: bool [B, T], the
    positions at which they are predicted. targets, sequence: int64 [n], each one's id, and the number of its sample.
    `columns` {name: [tensor [number of sampled tokens] of each sample]} are there as [n].
    """
    def sequence(sample):
        ids = np.array(sample.prompt + sample.tokens)
        is_target = np.array([False] * len(sample.prompt) + sample.is_sampled)
        return {"input_ids": ids, "labels": np.where(is_target, ids, IGNORE)}

    batch = collate([[sequence(samples[i]) for i in row] for row in rows], capacity, max(1, len(rows)), pad_id)
    is_source = F.pad(batch["labels"][:, 1:] != IGNORE, (0, 1))
    order = list(chain.from_iterable(rows))
    counts = torch.tensor([samples[i].num_sampled for i in order], dtype=torch.long)
    batch |= {"is_source": is_source, "targets": F.pad(batch["labels"][:, 1:], (0, 1))[is_source],
              "sequence": torch.tensor(order, dtype=torch.long).repeat_interleave(counts)}
    empty = torch.empty(0)
    return batch | {name: torch.cat([empty, *(column[i] for i in order)]) for name, column in columns.items()}


def micro_batches_of(samples, numbers, columns, run, args, pad_id, seed):
    """The micro-batches of this rank for the samples of these numbers; the rows are packed by `seed` alone."""
    lengths = [len(samples[i].prompt) + len(samples[i].tokens) for i in numbers]
    packed = pack(lengths, args.max_seq_len, seed, 0)
    rows = [[numbers[i] for i in row] for row in packed]
    return [collate_samples(part, samples, columns, args.max_seq_len, pad_id)
            for part in cut(rows, args.batch_size, run.ranks.rank, run.ranks.world_size)]


def minibatches(num_samples, num_minibatches, seed, epoch):
    """Numbers of the samples, shuffled by (seed, epoch), in at most so many parts of about the same size."""
    order = np.random.default_rng([seed, epoch]).permutation(num_samples)
    return [part.tolist() for part in np.array_split(order, min(num_minibatches, num_samples))]


def for_each_token(score, model, samples, run, args, pad_id):
    """score(batch) -> [n], without gradient, for all samples: float32 [number of sampled tokens] of each, on every rank.

    The ranks share the work.
    """
    parts = []
    with evaluating(model), run.autocast():
        for micro in micro_batches_of(samples, list(range(len(samples))), {}, run, args, pad_id, 0):
            values, sequence = score(run.to_device(micro)).float().cpu(), micro["sequence"]
            numbers, counts = torch.unique_consecutive(sequence, return_counts=True)
            parts += zip(numbers.tolist(), values.split(counts.tolist()))
    found = dict(run.ranks.gather(parts))
    return [found.get(i, torch.empty(0)) for i in range(len(samples))]


def updates_of(samples, columns, run, args, pad_id, step):
    """Yield (this rank's micro-batches, sampled tokens, samples) of each of a step's updates, the counts over all ranks.

    Every one of --update_epochs has all samples, in up to --num_minibatches updates, shuffled by (seed, step, epoch).
    """
    for epoch in range(args.update_epochs if samples else 0):
        for part in minibatches(len(samples), args.num_minibatches, draw_seed(args.seed, step), epoch):
            micro_batches = micro_batches_of(samples, part, columns, run, args, pad_id, draw_seed(step, epoch))
            yield micro_batches, sum(samples[i].num_sampled for i in part), len(part)


def columns_of(samples, advantages):
    """What the losses need of every sampled token, where all tokens of a sample share its advantage."""
    return {"old_log_probs": [one.old_log_probs for one in samples],
            "advantages": [torch.full((one.num_sampled,), advantage) for one, advantage in zip(samples, advantages)]}

"""The samples of a step as packed micro-batches, with the numbers that the losses need.

A sequence, which is a sample with its prompt, stays whole. So a step's samples make the same update
however they are cut into micro-batches or divided among ranks. `experience` is {name: [tensor of
each sample, one number for each sampled token]}.

Shapes: `B` batch rows, `T` tokens of a row, `n` sampled tokens of a micro-batch, row after row.
"""

from collections.abc import Callable, Iterator
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F

from dataset.packing import IGNORE, collate, cut, pack
from trainer.losses.policy import token_log_probs
from trainer.rl.rollout import Sample, draw_seed
from trainer.runtime.process import evaluating
from trainer.runtime.run import Run

Experience = dict[str, list[torch.Tensor]]
Batch = dict[str, torch.Tensor]


def token_experience(samples: list[Sample], advantages: torch.Tensor) -> Experience:
    """The experience of samples whose tokens all share the sample's advantage, [n]."""
    pairs = zip(samples, advantages.tolist(), strict=True)
    return {
        "old_log_probs": [sample.old_log_probs for sample in samples],
        "advantages": [torch.full((sample.num_sampled,), x) for sample, x in pairs],
    }


def minibatches(
    run: Run, samples: list[Sample], experience: Experience, pad_id: int, step: int
) -> Iterator[tuple[list[Batch], int, int]]:
    """Yield (this rank's micro-batches, sampled tokens, samples) of each of a step's updates.

    The counts are of all ranks. Every one of --update_epochs has all samples, in up to
    --num_minibatches updates, shuffled by (seed, step, epoch).
    """
    args = run.args
    for epoch in range(args.update_epochs if samples else 0):
        seed = draw_seed(args.seed, step)
        for part in shuffled_parts(len(samples), args.num_minibatches, seed, epoch):
            seed_of_rows = draw_seed(step, epoch)
            micro_batches = micro_batches_of(run, samples, part, experience, pad_id, seed_of_rows)
            yield micro_batches, sum(samples[i].num_sampled for i in part), len(part)


def shuffled_parts(
    num_samples: int, num_minibatches: int, seed: int, epoch: int
) -> list[list[int]]:
    """Numbers of the samples, shuffled by (seed, epoch), in up to so many parts of similar size."""
    order = np.random.default_rng([seed, epoch]).permutation(num_samples)
    return [part.tolist() for part in np.array_split(order, min(num_minibatches, num_samples))]


def micro_batches_of(
    run: Run,
    samples: list[Sample],
    numbers: list[int],
    experience: Experience,
    pad_id: int,
    seed: int,
) -> list[Batch]:
    """This rank's micro-batches of the samples with these numbers, in rows decided by `seed`."""
    args, ranks = run.args, run.ranks
    lengths = [len(samples[i].prompt) + len(samples[i].tokens) for i in numbers]
    rows = [[numbers[i] for i in row] for row in pack(lengths, args.max_seq_len, seed, 0)]
    return [
        collate_samples(part, samples, experience, args.max_seq_len, pad_id)
        for part in cut(rows, args.batch_size, ranks.rank, ranks.world_size)
    ]


def collate_samples(
    rows: list[list[int]], samples: list[Sample], experience: Experience, capacity: int, pad_id: int
) -> Batch:
    """A micro-batch of `samples`; rows: lists of their numbers. Tensors on the CPU:

    input_ids, labels, position_ids: int64 [B, T]. labels are the sampled tokens, not shifted.
    is_source: bool [B, T], the positions that predict them. targets, sequence: int64 [n], each
    sampled token's id, and the number of its sample. The experience under its names, [n].
    """

    def sequence(sample: Sample) -> dict[str, np.ndarray]:
        ids = np.array(sample.prompt + sample.tokens)
        is_target = np.array([False] * len(sample.prompt) + sample.is_sampled)
        return {"input_ids": ids, "labels": np.where(is_target, ids, IGNORE)}

    sequences = [[sequence(samples[i]) for i in row] for row in rows]
    batch = collate(sequences, capacity, max(1, len(rows)), pad_id)
    is_source = F.pad(batch["labels"][:, 1:] != IGNORE, (0, 1))
    order = list(chain.from_iterable(rows))
    counts = torch.tensor([samples[i].num_sampled for i in order], dtype=torch.long)
    batch |= {
        "is_source": is_source,
        "targets": F.pad(batch["labels"][:, 1:], (0, 1))[is_source],
        "sequence": torch.tensor(order, dtype=torch.long).repeat_interleave(counts),
    }
    empty = torch.empty(0)
    return batch | {
        name: torch.cat([empty, *(tensors[i] for i in order)])
        for name, tensors in experience.items()
    }


def policy_outputs(
    net: torch.nn.Module, batch: Batch, num_tokens: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log p [n], entropies [n], the balance loss's part of the update's loss) at sampled tokens.

    num_tokens: of the whole update. The last is 0 unless the network is a mixture of experts.
    """
    out = net(
        batch["input_ids"],
        position_ids=batch["position_ids"],
        labels=batch["labels"],
        num_items_in_batch=num_tokens,
        head_positions=batch["is_source"],
    )
    return *token_log_probs(out.logits, batch["targets"], temperature), out.loss


def reference_log_probs(
    reference: torch.nn.Module, batch: Batch, temperature: float
) -> torch.Tensor:
    """log p of a micro-batch's sampled tokens under a frozen network, [n]."""
    with torch.no_grad():
        return policy_outputs(reference, batch, 1, temperature)[0]


def sample_log_probs(
    run: Run, net: torch.nn.Module, pad_id: int, samples: list[Sample]
) -> list[torch.Tensor]:
    """log p of each sample's tokens under a network as it is now; see `for_each_token`."""

    def score(batch: Batch) -> torch.Tensor:
        return reference_log_probs(net, batch, run.args.temperature)

    return for_each_token(run, net, score, samples, pad_id)


def for_each_token(
    run: Run,
    net: torch.nn.Module,
    score: Callable[[Batch], torch.Tensor],
    samples: list[Sample],
    pad_id: int,
) -> list[torch.Tensor]:
    """score(batch) -> [n] by the network `net`, without gradient, for all samples: float32 [sampled
    tokens] of each, on every rank. The ranks divide the work.
    """
    parts, numbers = [], list(range(len(samples)))
    with evaluating(net), run.autocast():
        for micro in micro_batches_of(run, samples, numbers, {}, pad_id, 0):
            values = score(run.to_device(micro)).float().cpu()
            found, counts = torch.unique_consecutive(micro["sequence"], return_counts=True)
            parts += zip(found.tolist(), values.split(counts.tolist()))
    tensors = dict(run.ranks.gather(parts))
    return [tensors.get(i, torch.empty(0)) for i in numbers]

"""Distillation's teacher, and completions that the student samples for it to correct."""

import hashlib
import json
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from dataset.packing import IGNORE, collate, pack
from model.engine import Engine
from model.model_minimind import MiniMindForCausalLM
from model.sampling import SamplingParams
from trainer.runtime.data import documents_of
from trainer.runtime.run import Run
from trainer.runtime.weights import SHAPE_FLAGS, find_weight, read_weight

Micro = dict[str, torch.Tensor]


def load_teacher(
    args: Any, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> MiniMindForCausalLM:
    """The network of --teacher, frozen. ValueError without it, or if its tokenizer is another."""
    own = {name: getattr(args, f"teacher_{name}") for name in SHAPE_FLAGS}
    asked = replace(args, **own)
    asked.given = {name for name in SHAPE_FLAGS if f"teacher_{name}" in args.given}
    source = find_weight(args.teacher, asked, device)
    if source.suffix != ".pth":  # a folder has its own tokenizer, which is compared below
        asked.tokenizer_path = ""
    teacher, theirs = read_weight(str(source), asked, device)
    if differences := tokenizer_differences(tokenizer, theirs):
        is_new = args.from_weight == "none"
        student = "MiniMind's own" if is_new else f"the one of {args.from_weight}"
        raise ValueError(
            f"the student's tokenizer ({student}) is not that of the teacher {args.teacher}: "
            f"{differences}. Probabilities can only be compared token by token: take a student of "
            "the teacher's tokenizer (--from_weight or --tokenizer_path), or let the teacher write "
            "rows (scripts/make_teacher_rows.py) and train on them with train_full_sft.py"
        )
    return teacher.to(device).eval().requires_grad_(False)


def tokenizer_differences(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> str:
    """How two tokenizers differ in tokens, ids, merges or added tokens; "" if they do not."""
    found = []
    for what, read in (
        ("vocabulary", lambda one: one.get_vocab()),
        ("added tokens", lambda one: one.get_added_vocab()),
        ("merges", lambda one: merge_ranks(one)),
    ):
        a, b = read(ours), read(theirs)
        if differing := [name for name in {**a, **b} if a.get(name) != b.get(name)]:
            example = min(differing, key=str)
            found.append(
                f"{len(differing)} entries of the {what} (e.g. {example!r}: {a.get(example)} and "
                f"{b.get(example)})"
            )
    return ", ".join(found)


def merge_ranks(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """{pair of tokens: rank} of a byte-pair encoding."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return {
        " ".join(pair) if isinstance(pair, list) else pair: rank
        for rank, pair in enumerate(model.get("merges", []))
    }


class OnPolicyCompletions:
    """Puts the student's own completions into a step (Agarwal et al. 2024, alg. 1, drawn per row).

    Which rows get one, and which one, depends on (seed, step, row) alone: a resumed run samples the
    same, and so do the same rows in other micro-batches or ranks, up to float ties.
    """

    def __init__(self, run: Run, model: MiniMindForCausalLM, tokenizer: PreTrainedTokenizerBase):
        self.args, self.pad_id = run.args, tokenizer.pad_token_id
        self.engine = Engine(
            model,
            tokenizer,
            max_batch_size=64,
            max_len=self.args.max_seq_len,
            dtype=None if run.device.type == "cpu" else run.dtype,
        )

    def replace_some(self, micro_batches: list[Micro], step: int) -> list[Micro]:
        """The micro-batches with some completions sampled anew.

        "labels" has all targets, "data_labels" those of the data alone.
        """
        args = self.args
        self.engine.refresh()
        batches = [documents_of(micro) for micro in micro_batches]
        draws = [(one, *self.draw(one, step)) for documents in batches for one in documents]
        chosen = [(one, seed) for one, draw, seed in draws if draw < args.on_policy_ratio]
        length = args.max_completion_length
        params = [SamplingParams(max_tokens=length, seed=seed) for _, seed in chosen]
        completions = self.engine.generate([prompt_of(one) for one, _ in chosen], params)
        for (one, _), completion in zip(chosen, completions):
            ids = torch.tensor(completion.tokens)
            is_prompt = torch.arange(len(ids)) < len(completion.prompt)
            one["input_ids"], one["labels"] = ids, ids.masked_fill(is_prompt, IGNORE)
            one["data_labels"] = torch.full_like(ids, IGNORE)
        return [self.packed(documents, step) for documents in batches]

    def draw(self, document: Micro, step: int) -> tuple[float, int]:
        """(a number from 0 to 1, a seed) for a document in a step."""
        text = f"{self.args.seed}:{step}:{document['input_ids'].tolist()}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return int.from_bytes(digest[:4], "big") / 2**32, int.from_bytes(digest[4:], "big")

    def packed(self, documents: list[Micro], step: int) -> Micro:
        """One micro-batch of documents, with as many batch rows as they need."""
        capacity, lengths = self.args.max_seq_len, [len(one["input_ids"]) for one in documents]
        rows = pack(lengths, capacity, self.args.seed, step)
        both = []
        for name in ("labels", "data_labels"):
            sequences = [
                {"input_ids": x["input_ids"].numpy(), "labels": x.get(name, x["labels"]).numpy()}
                for x in documents
            ]
            filled = [[sequences[i] for i in row] for row in rows]
            both.append(collate(filled, capacity, max(1, len(rows)), self.pad_id))
        return both[0] | {"data_labels": both[1]["labels"]}


def prompt_of(document: Micro) -> list[int]:
    """The tokens before the last completion of a document."""
    is_target = document["labels"] != IGNORE
    begins = is_target & ~F.pad(is_target[:-1], (1, 0))  # first tokens of the completions
    return document["input_ids"][: begins.nonzero()[-1, 0]].tolist()

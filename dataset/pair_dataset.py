"""Preference pairs: rows -> token trees in which two answers share their prompt, and batches of
such trees.

A pair is one sequence: the prompt, the chosen answer, the rejected one. Both answers continue where
the prompt ends, in their positions too, and neither sees the other. So the prompt is computed once,
and its gradient is that of both sides.

Shapes: `B` batch rows, `T` tokens of a batch row, `N` trees, `M` scored tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dataset.chat.format import encode_conversation
from dataset.files.hashes import fingerprint, hash64
from dataset.packing import IGNORE, PackedBatches, collate, pack
from dataset.token_cache import EncodedBlock, Report
from dataset.token_dataset import RowEncoder, TokenDataset, TokenSequence

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

PROMPT, CHOSEN, REJECTED = 0, 1, 2  # the branches of a tree


class Side(NamedTuple):
    """One conversation of a pair as tokens."""

    input_ids: list[int]
    is_target: list[bool]  # the assistant's
    start: int  # of the scored answer
    branch: int


class PairEncoder(RowEncoder):
    """`{"chosen", "rejected"}` -> one tree; targets are the assistant's tokens after the messages
    that both share.

    Where a tree is longer than max_seq_len, its answers lose their ends, the longer one first (in
    the report: cut). It is left out (too long) if a side has no target then, or with `whole` in any
    case. With `unpaired`, a row `{"conversations", "label"}` is a tree with one answer: what the
    assistant wrote after the user's last message.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_seq_len: int,
        bad_rows: str = "stop",
        whole: bool = False,
        unpaired: bool = False,
    ):
        super().__init__(tokenizer, max_seq_len, bad_rows)
        self.whole, self.unpaired = whole, unpaired

    def options(self) -> dict:
        return {"whole": self.whole, "unpaired": self.unpaired}

    def encode_row(
        self, row: dict, where: str, draw_key: int, report: Report
    ) -> list[TokenSequence]:
        """As RowEncoder says, but codes [n] replace is_target: 2 * branch + is_target, uint8."""
        is_unpaired = "label" in row and "chosen" not in row
        sides = [self.labelled_side(row)] if is_unpaired else self.two_sides(row)
        prompt = min(side.start for side in sides)
        if len(sides) == 2:  # the template may render shared messages by the next ones
            same = np.equal(sides[0].input_ids[:prompt], sides[1].input_ids[:prompt])
            prompt = int(np.append(same, False).argmin())
        lengths = [len(side.input_ids) - prompt for side in sides]
        kept = fit(lengths, self.max_seq_len - prompt)
        input_ids, codes = [sides[0].input_ids[:prompt]], [np.full(prompt, 2 * PROMPT)]
        for side, length in zip(sides, kept):
            answer = slice(prompt, prompt + length)
            is_scored = np.array(side.is_target[answer], dtype=bool) & (
                np.arange(prompt, prompt + length) >= side.start
            )
            input_ids.append(side.input_ids[answer])
            codes.append(2 * side.branch + is_scored)
        if kept != lengths:
            no_target = any(not (answer & 1).any() for answer in codes[1:])
            shortest = min(kept)
            is_same = len(sides) == 2 and input_ids[1][:shortest] == input_ids[2][:shortest]
            if self.whole or no_target or is_same:
                report.note("too_long", where)
                return []
            report.note("cut", where)
        input_ids, codes = np.concatenate(input_ids), np.concatenate(codes)
        return [(input_ids.astype(self.id_dtype), codes.astype(np.uint8))]

    def two_sides(self, row: dict) -> list[Side]:
        """The sides of a pair. Raises ValueError "what is wrong. fix"."""
        if "chosen" not in row or "rejected" not in row:
            raise ValueError(
                f'no "chosen" and "rejected" among the keys {list(row)}. A pair is {{"chosen": '
                '[messages], "rejected": [messages]}; `dataset/prepare_data.py convert` makes it '
                "of other formats."
            )
        sides = {}
        for name in ("chosen", "rejected"):
            try:
                sides[name] = self.read(row[name])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        chosen, rejected = sides.values()
        if chosen == rejected:
            raise ValueError("chosen and rejected are the same. Leave the row out.")
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        differing = [*chosen[shared : shared + 1], *rejected[shared : shared + 1]]
        if not shared or any(message["role"] != "assistant" for message in differing):
            raise ValueError(
                f"chosen and rejected have different prompts: message {shared} differs and is no "
                "answer. Give both the same messages up to an answer of the assistant."
            )
        sides = [self.side(chosen, shared, CHOSEN), self.side(rejected, shared, REJECTED)]
        if sides[0].input_ids == sides[1].input_ids:
            raise ValueError(
                "chosen and rejected are the same in the chat template. Leave the row out."
            )
        return sides

    def labelled_side(self, row: dict) -> Side:
        """The only side of an unpaired row. Raises ValueError."""
        if not self.unpaired:
            raise ValueError(
                'a row with "label" is no pair: only --loss_type kto learns from it. Give "chosen" '
                'and "rejected".'
            )
        if not isinstance(row["label"], bool):
            raise ValueError(
                f'"label" is {row["label"]!r}. Give true if the answer is wanted, false if it is '
                "not."
            )
        messages = self.read(row.get("conversations"))
        after_user = max(
            (i + 1 for i, message in enumerate(messages) if message["role"] == "user"), default=0
        )
        return self.side(messages, after_user, CHOSEN if row["label"] else REJECTED)

    def side(self, messages: list[dict], shared: int, branch: int) -> Side:
        """A conversation whose first `shared` messages are the prompt."""
        if any(message.get("train") is False for message in messages[shared:]):
            raise ValueError(
                "the compared answer is not to be trained. Leave the row out, or its weight."
            )
        messages = [{**message, "train": True} for message in messages]  # before: it is the prompt
        input_ids, is_target = encode_conversation(self.tokenizer, messages)
        is_answer = [message["role"] == "assistant" for message in messages]
        # of the spans: one for each message of the assistant
        starts = np.flatnonzero(np.diff([0, *is_target]) == 1)
        assert len(starts) == sum(is_answer)
        if not any(is_answer[shared:]):
            raise ValueError(
                f"no message of the assistant after message {shared - 1}. There must be an answer "
                "to learn from."
            )
        return Side(input_ids, is_target, int(starts[sum(is_answer[:shared])]), branch)

    def gather(
        self, sequences: list[TokenSequence], documents: list[int], report: Report
    ) -> EncodedBlock:
        pairs = [(ids, codes % 2 == 1, codes // 2) for ids, codes in sequences]
        # all pairs with one prompt are one document: a held-out split must not ask for trained ones
        documents = [hash64(ids[branch == PROMPT].tobytes()) for ids, _, branch in pairs]
        block = super().gather([pair[:2] for pair in pairs], documents, report)
        branch = np.concatenate([np.empty(0, np.uint8), *(branch for _, _, branch in pairs)])
        return block._replace(columns={**block.columns, "branch": branch})


def fit(lengths: list[int], room: int) -> list[int]:
    """Return the lengths, cut where their sum is above `room`: the longest lose first."""
    kept = list(lengths)
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    for place, index in enumerate(by_length):
        kept[index] = min(lengths[index], max(0, room) // (len(lengths) - place))
        room -= kept[index]
    return kept


class PairDataset(TokenDataset):
    """Preference pairs as trees (see TokenDataset, PairEncoder).

    `dataset[i]` also has "branch", int64 [n]: PROMPT, then CHOSEN, then REJECTED; labels are the
    scored tokens.
    """

    encoder_type = PairEncoder

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {**super().__getitem__(index), "branch": self.branch(index)}

    def branch(self, index: int) -> np.ndarray:
        """The branch of each token of a tree, int64 [n]."""
        return self.table["branch", self.rows[index]].astype(np.int64)

    def strangers(self) -> np.ndarray:
        """For each row the next one with another prompt, if any, around the end: int64 [N]."""
        prompts, N = self.table.documents[self.rows], len(self)
        ends = np.flatnonzero(prompts != np.roll(prompts, -1))
        if not len(ends):
            ends = np.arange(N)
        return (ends[np.searchsorted(ends, np.arange(N)) % len(ends)] + 1) % N


class MismatchedPairs:
    """Each prompt of a PairDataset with the answers of another row, as trees, from which KTO
    estimates its KL.

    The answers are cut so that the tree has max_seq_len tokens at most. `lengths` int32 [N].
    """

    def __init__(self, dataset: PairDataset):
        self.dataset, self.partners = dataset, dataset.strangers()
        self.fingerprint = fingerprint(mismatched=dataset.fingerprint)
        counts = np.array(
            [np.bincount(dataset.branch(i), minlength=3) for i in range(len(dataset))]
        )
        self.prompts = counts[:, PROMPT]
        self.answers = [
            fit(answers, dataset.max_seq_len - prompt)
            for answers, prompt in zip(counts[self.partners, 1:].tolist(), self.prompts.tolist())
        ]
        self.lengths = np.array(
            [prompt + sum(kept) for prompt, kept in zip(self.prompts, self.answers)], dtype=np.int32
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        ours, theirs = self.dataset[index], self.dataset[self.partners[index]]
        parts = [{name: x[: self.prompts[index]] for name, x in ours.items()}]
        for branch, length in zip((CHOSEN, REJECTED), self.answers[index]):
            parts.append(
                {name: x[theirs["branch"] == branch][:length] for name, x in theirs.items()}
            )
        return {name: np.concatenate([part[name] for part in parts]) for name in ours}


def collate_trees(
    rows: list[list[int]],
    dataset: PairDataset | MismatchedPairs,
    capacity: int,
    num_rows: int,
    pad_id: int,
) -> dict[str, torch.Tensor]:
    """One micro-batch of the trees `dataset[i]`, i from lists of indices, one list a batch row.

    Tensors on the CPU. input_ids, labels, position_ids, tree, branch: int64 [B, T]. `tree` numbers
    the trees, -1 is padding. items: int64 [N], the index of each tree. lengths: int64 [N, 2],
    scored tokens of the chosen and the rejected answer. targets, source, side: int64 [M]. Token
    `targets[m]` of answer `side[m]` (2 * tree, + 1 if rejected) is predicted at the `source[m]`-th
    of the positions that `is_source`, bool [B, T], marks, in row-major order. The first tokens of
    both answers are predicted at the same position, the prompt's last. is_end: bool [B, T], the
    last token of each answer.
    """
    import torch  # seconds, which an --inspect need not wait for

    sequences = [[dataset[index] for index in row] for row in rows]
    batch = collate(sequences, capacity, num_rows, pad_id)
    B, T = batch["input_ids"].shape
    tree, branches = np.full((B, T), -1), np.zeros((B, T), dtype=np.int64)
    is_end = np.zeros((B, T), dtype=bool)
    position_ids, number = batch["position_ids"].numpy(), 0
    sources, sides, targets = [[np.empty(0, np.int64)] for _ in range(3)]
    for b, row in enumerate(sequences):
        start = 0
        for sequence in row:
            branch, n = sequence["branch"], len(sequence["branch"])
            prompt, chosen, _ = np.bincount(branch, minlength=3)
            fork = prompt + chosen  # where the rejected answer begins
            tree[b, start : start + n], branches[b, start : start + n] = number, branch
            position_ids[b, start + fork : start + n] -= chosen
            is_end[b, [start + end - 1 for end in (fork, n) if end > prompt]] = True
            scored = np.flatnonzero(sequence["labels"] != IGNORE)
            source = np.where(scored == fork, prompt, scored) - 1
            sources.append(b * T + start + source)
            sides.append(2 * number + branch[scored] - CHOSEN)
            targets.append(sequence["input_ids"][scored])
            number, start = number + 1, start + n
    source, side = np.concatenate(sources), np.concatenate(sides)
    is_source = np.zeros(B * T, dtype=bool)
    is_source[source] = True
    arrays = {
        "tree": tree,
        "branch": branches,
        "is_end": is_end,
        "is_source": is_source.reshape(B, T),
        "source": np.cumsum(is_source)[source] - 1,
        "side": side,
        "targets": np.concatenate(targets),
        "items": np.array([index for row in rows for index in row], dtype=np.int64),
        "lengths": np.bincount(side, minlength=2 * number).reshape(-1, 2),
    }
    return batch | {name: torch.from_numpy(x) for name, x in arrays.items()}


def tree_mask(tree: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """Keys that a query sees, bool [B, 1, T, T]: its tree's prompt and its branch, up to itself."""
    mask = tree[:, :, None] == tree[:, None]  # B T T
    mask &= (branch[:, None] == PROMPT) | (branch[:, :, None] == branch[:, None])
    return mask.tril()[:, None]


class PairBatches(PackedBatches):
    """The optimizer steps of a run on trees: PackedBatches with `collate_trees`."""

    def describe(self) -> str:
        """How well the pairs are packed, for the user."""
        return f"{len(self.dataset) / len(self.rows(0)):.1f} pairs in a batch row"

    def micro_batch(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        return collate_trees(rows, self.dataset, self.capacity, max(1, len(rows)), self.pad_id)


def collate_packed(
    items: list[int], dataset: PairDataset | MismatchedPairs, capacity: int, pad_id: int
) -> dict[str, torch.Tensor]:
    """`collate_trees` of some trees of a dataset, in as many batch rows as they need."""
    packed = pack(dataset.lengths[items], capacity, seed=0, epoch=0)
    rows = [[items[i] for i in row] for row in packed]
    return collate_trees(rows, dataset, capacity, max(1, len(rows)), pad_id)

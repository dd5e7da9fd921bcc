"""Conversations with worked-out thoughts, for a model that thinks before it answers, or answers at once, as it is told."""

from __future__ import annotations

import random

from dataset.chat_format import normalize_conversation
from dataset.lm_dataset import SFTEncoder, TokenDataset


class ReasonEncoder(SFTEncoder):
    """A conversation whose last answer comes after a thought, or after the empty think block that stands for none.

    The sequence of a thinking row begins with the ids of `encode_prompt(..., enable_thinking=True)`, that of another
    one with those of enable_thinking=False. `direct_share` of the rows with reasoning lose it, decided by (seed, row)
    alone, and `empty_think_share` of the rows without reasoning get the empty block.
    """

    def __init__(self, tokenizer, max_seq_len: int, bad_rows: str, direct_share: float, empty_think_share: float, seed: int):
        super().__init__(tokenizer, max_seq_len, bad_rows, 0.0, empty_think_share, seed)
        self.direct_share = direct_share

    def augment(self, messages, draw_key):
        messages, _ = normalize_conversation(messages)  # think blocks inside content become reasoning_content
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
        thinks = last is not None and bool(messages[last].get("reasoning_content", "").strip())
        if thinks and random.Random(f"{self.seed}:{draw_key}:direct").random() < self.direct_share:
            messages = [{key: value for key, value in message.items() if key != "reasoning_content"} for message in messages]
            messages[last]["reasoning_content"] = ""
        return super().augment(messages, draw_key)


class ReasonDataset(TokenDataset):
    """Conversations, trained on the assistant's thoughts and words (see ReasonEncoder, TokenDataset)."""

    def __init__(self, data_path, tokenizer, max_seq_len: int, *, bad_rows: str = "stop", cache_dir=None,
                 num_proc: int | None = None, direct_share: float = 0.0, empty_think_share: float = 1.0, seed: int = 0):
        options = {"direct_share": direct_share, "empty_think_share": empty_think_share}
        for name, share in options.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is {share}. Give a share from 0 to 1.")
        encoder = ReasonEncoder(tokenizer, max_seq_len, bad_rows, seed=seed, **options)
        super().__init__(data_path, encoder, {**options, "seed": seed}, cache_dir, num_proc)

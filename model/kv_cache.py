"""Keys and values of many sequences in one piece of memory, allocated once, and the views of it
that a forward works on.

Shape letters:
    L layers   N slots   B rows of a call   K key/value heads   S positions   T tokens of a call
    d head width
"""

import torch
from transformers import PreTrainedConfig


class KVCache:
    """`num_slots` sequences of up to `max_len` tokens: two tensors [L, N, K, S, d]."""

    def __init__(
        self,
        config: PreTrainedConfig,
        num_slots: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        K, d = config.num_key_value_heads, config.head_dim
        shape = (config.num_hidden_layers, num_slots, K, max_len, d)
        # not `empty`: masked positions get weight 0, but 0 times leftovers in the memory may be nan
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.max_len = max_len

    def swap(self, a: int, b: int, num_tokens: int) -> None:
        """Exchange the first `num_tokens` positions of slots a and b."""
        for x in (self.keys, self.values):
            x[:, [a, b], :, :num_tokens] = x[:, [b, a], :, :num_tokens]

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first `num_tokens` positions of a slot to another."""
        for x in (self.keys, self.values):
            x[:, target, :, :num_tokens] = x[:, source, :, :num_tokens]

    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.keys.nbytes + self.values.nbytes


class AlignedView:
    """The cache for T more tokens in each of `num_rows` neighbouring slots from `first` on, which
    all hold `num_past`.
    """

    def __init__(self, cache: KVCache, first: int, num_rows: int, num_past: int):
        self.cache, self.rows, self.num_past = cache, slice(first, first + num_rows), num_past

    def get_seq_length(self) -> int:
        return self.num_past

    def get_mask_sizes(self, num_new: int, layer_idx: int) -> tuple[int, int]:
        return self.num_past + num_new, 0

    def update(self, k: torch.Tensor, v: torch.Tensor, layer_idx: int) -> list[torch.Tensor]:
        """Store k, v [B, K, T, d] behind the past; returns all of it [B, K, S, d], S = past + T."""
        both = []
        for x, new in ((self.cache.keys, k), (self.cache.values, v)):
            x = x[layer_idx, self.rows]
            self.store(x, new)
            both.append(x[:, :, : self.num_past + new.shape[2]])
        return both

    def store(self, x: torch.Tensor, new: torch.Tensor) -> None:
        x[:, :, self.num_past : self.num_past + new.shape[2]] = new


class RaggedView(AlignedView):
    """The cache for one more token in each of the first B slots, at its own of `positions` [B],
    with a look at `num_keys` positions; a position behind these is written all the same.
    """

    def __init__(self, cache: KVCache, positions: torch.Tensor, num_keys: int):
        super().__init__(cache, 0, len(positions), num_keys - 1)
        self.places = torch.arange(len(positions), device=positions.device), positions

    def store(self, x: torch.Tensor, new: torch.Tensor) -> None:
        rows, positions = self.places
        x[rows, :, positions] = new[:, :, 0]

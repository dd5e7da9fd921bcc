"""Keys and values of many sequences in one piece of memory, allocated once, and the views of it that a forward works on.

Shape letters: L layers   N slots   B rows of a call   K key/value heads   S positions   T tokens of a call   d head width
"""

import torch


class KVCache:
    """`num_slots` sequences of up to `max_len` tokens: two tensors [L, N, K, S, d]."""

    def __init__(self, config, num_slots, max_len, dtype, device):
        shape = (config.num_hidden_layers, num_slots, config.num_key_value_heads, max_len, config.head_dim)
        # not `empty`: what is masked gets weight 0, but 0 times whatever was in the memory may be nan
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.max_len = max_len

    def swap(self, a, b, num_tokens):
        """Exchange the first `num_tokens` positions of slots a and b."""
        for x in (self.keys, self.values):
            x[:, [a, b], :, :num_tokens] = x[:, [b, a], :, :num_tokens]

    def copy(self, source, target, num_tokens):
        """Copy the first `num_tokens` positions of a slot to another."""
        for x in (self.keys, self.values):
            x[:, target, :, :num_tokens] = x[:, source, :, :num_tokens]

    def nbytes(self):
        """Bytes of both tensors."""
        return self.keys.nbytes + self.values.nbytes


class PrefillView:
    """The cache as `num_rows` neighbouring slots from `first` see it that all hold `num_past` tokens and take in T more."""

    def __init__(self, cache, first, num_rows, num_past):
        self.cache, self.rows, self.num_past = cache, slice(first, first + num_rows), num_past

    def get_seq_length(self):
        return self.num_past

    def get_mask_sizes(self, num_new, layer_idx):
        return self.num_past + num_new, 0

    def update(self, k, v, layer_idx):
        """Store k, v [B, K, T, d] behind the past; returns all of it [B, K, S, d], S = past + T."""
        end = self.num_past + k.shape[2]
        both = []
        for x, new in ((self.cache.keys, k), (self.cache.values, v)):
            x = x[layer_idx, self.rows]
            x[:, :, self.num_past:end] = new
            both.append(x[:, :, :end])
        return both


class DecodeView:
    """The cache as the first B slots see it that take in one token each, at `positions` [B], and look at `num_keys` positions.

    same_position: the rows' position as a number, where it is one for all.
    """

    def __init__(self, cache, positions, num_keys, same_position=None):
        self.cache, self.positions, self.num_keys, self.same_position = cache, positions, num_keys, same_position
        self.rows = torch.arange(len(positions), device=positions.device)

    def get_seq_length(self):
        return self.num_keys - 1

    def get_mask_sizes(self, num_new, layer_idx):
        return self.num_keys, 0

    def update(self, k, v, layer_idx):
        """Store k, v [B, K, 1, d] at the rows' positions; returns [B, K, S, d]."""
        both = []
        for x, new in ((self.cache.keys, k), (self.cache.values, v)):
            x = x[layer_idx, :len(self.rows)]
            if self.same_position is None:
                x[self.rows, :, self.positions] = new[:, :, 0]
            else:  # a slice is written several times faster than scattered places
                x[:, :, self.same_position:self.same_position + 1] = new
            both.append(x[:, :, :self.num_keys])
        return both

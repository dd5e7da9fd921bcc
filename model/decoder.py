"""One token for each of the first B slots of a cache: the forward that decoding repeats, plain and as recorded CUDA graphs."""

import threading

import torch

from .kv_cache import DecodeView

KEYS_STEP = 256  # recorded graphs look at a multiple of so many positions
RECORDING = threading.Lock()  # one engine at a time; the others may compute meanwhile


class Decoder:
    """Calls `network` on the rows of a step: lists of B token ids and positions -> next-token logits [B, V], float32."""

    def __init__(self, network, cache):
        self.network, self.cache = network, cache
        self.device, self.dtype = cache.keys.device, cache.keys.dtype

    def __call__(self, tokens, positions):
        same = positions[0] if len(set(positions)) == 1 else None
        num_keys, ids = max(positions) + 1, torch.tensor([tokens, positions], device=self.device)
        mask = None if same is not None else self.mask_for(ids[1], num_keys)
        return self.forward(ids[0], ids[1], num_keys, mask, same)

    def mask_for(self, positions, num_keys):
        """What each row may see of `num_keys` positions, to be added to its scores: [B, 1, 1, S]."""
        behind = torch.arange(num_keys, device=self.device) > positions[:, None]
        return torch.zeros(behind.shape, dtype=self.dtype, device=self.device).masked_fill_(behind, -torch.inf)[:, None, None]

    def forward(self, ids, positions, num_keys, mask, same_position=None):
        view = DecodeView(self.cache, positions, num_keys, same_position)
        out = self.network.model(ids[:, None], attention_mask=mask, position_ids=positions[:, None], past_key_values=view)
        return self.network.lm_head(out.last_hidden_state[:, 0]).float()


class RecordedDecoder(Decoder):
    """The same from CUDA graphs, one for each number of rows (a power of two) and of keys, recorded when first needed.

    Rows that are added to fill up write at the cache's last position, which no sequence uses: its last token is never fed.
    """

    def __init__(self, network, cache):
        super().__init__(network, cache)
        self.graphs, self.pool = {}, None

    def __call__(self, tokens, positions):
        rows = min(1 << (len(tokens) - 1).bit_length(), self.cache.keys.shape[1])
        num_keys = min(-(-(max(positions) + 1) // KEYS_STEP) * KEYS_STEP, self.cache.max_len)
        filler = rows - len(tokens)
        ids = torch.tensor([tokens + [0] * filler, positions + [self.cache.max_len - 1] * filler], device=self.device)
        if (rows, num_keys) not in self.graphs:
            self.graphs[rows, num_keys] = self.record(ids.clone(), num_keys)
        replay, static_ids, logits = self.graphs[rows, num_keys]
        static_ids.copy_(ids)
        replay()
        return logits[:len(tokens)].clone()

    def record(self, ids, num_keys):
        """(function that runs the step again, its input [2, B], its output [B, V])."""
        def step():
            return self.forward(ids[0], ids[1], num_keys, self.mask_for(ids[1], num_keys))

        with RECORDING:
            stream = torch.cuda.Stream()  # what is loaded or tuned at the first call must not be recorded
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                logits = step()
            self.pool = graph.pool()
        return graph.replay, ids, logits

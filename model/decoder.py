"""One token for each of the first B slots of a cache: the forward that decoding repeats, plain and
as recorded CUDA graphs.
"""

import threading
from collections.abc import Callable

import torch

from .kv_cache import AlignedView, KVCache, RaggedView
from .model_minimind import MiniMindForCausalLM

KEYS_STEP = 256  # recorded graphs look at a multiple of so many positions
RECORDING = threading.Lock()  # one engine at a time; the others may compute meanwhile


class Decoder:
    """One step of `network`: B token ids and their positions -> logits [B, V], float32."""

    def __init__(self, network: MiniMindForCausalLM, cache: KVCache):
        self.network, self.cache = network, cache
        self.device, self.dtype = cache.keys.device, cache.keys.dtype

    def __call__(self, tokens: list[int], positions: list[int]) -> torch.Tensor:
        ids = torch.tensor([tokens, positions], device=self.device)
        if len(set(positions)) > 1:
            return self.forward_ragged(ids, max(positions) + 1)
        # a slice of the cache is written several times faster than scattered places
        return self.forward(ids, AlignedView(self.cache, 0, len(tokens), positions[0]))

    def forward_ragged(self, ids: torch.Tensor, num_keys: int) -> torch.Tensor:
        """`forward` for rows at positions of their own, with a look at `num_keys` positions."""
        ahead = torch.arange(num_keys, device=self.device) > ids[1][:, None]
        mask = torch.zeros(ahead.shape, dtype=self.dtype, device=self.device)
        mask.masked_fill_(ahead, -torch.inf)  # B S, added to the scores; hides what is to come
        return self.forward(ids, RaggedView(self.cache, ids[1], num_keys), mask[:, None, None])

    def forward(
        self, ids: torch.Tensor, view: AlignedView, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """ids [2, B], tokens and their positions -> logits [B, V]."""
        tokens, positions = ids[:, :, None]  # B 1 each
        out = self.network.model(
            tokens, attention_mask=mask, position_ids=positions, past_key_values=view
        )
        return self.network.lm_head(out.last_hidden_state[:, 0]).float()


class RecordedDecoder(Decoder):
    """The same from CUDA graphs, one for each number of rows (a power of two) and of keys, recorded
    when first needed.

    Rows that fill up the graph write at the cache's last position, which no sequence uses: its last
    token is never fed.
    """

    def __init__(self, network: MiniMindForCausalLM, cache: KVCache):
        super().__init__(network, cache)
        self.graphs, self.pool = {}, None

    def __call__(self, tokens: list[int], positions: list[int]) -> torch.Tensor:
        last = self.cache.max_len - 1
        rows = min(1 << (len(tokens) - 1).bit_length(), self.cache.keys.shape[1])
        num_keys = min(-(-(max(positions) + 1) // KEYS_STEP) * KEYS_STEP, self.cache.max_len)
        filler = rows - len(tokens)
        ids = [tokens + [0] * filler, positions + [last] * filler]
        ids = torch.tensor(ids, device=self.device)
        if (rows, num_keys) not in self.graphs:
            self.graphs[rows, num_keys] = self.record(ids.clone(), num_keys)
        replay, static_ids, logits = self.graphs[rows, num_keys]
        static_ids.copy_(ids)
        replay()
        return logits[: len(tokens)].clone()

    def record(
        self, ids: torch.Tensor, num_keys: int
    ) -> tuple[Callable[[], object], torch.Tensor, torch.Tensor]:
        """The function that runs the step again, its input [2, B] and its output [B, V]."""
        with RECORDING:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # loading and tuning at the first call must not be recorded
                    self.forward_ragged(ids, num_keys)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                logits = self.forward_ragged(ids, num_keys)
            self.pool = graph.pool()
        return graph.replay, ids, logits

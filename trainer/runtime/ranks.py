"""The processes that train one model together: who they are, and the few numbers they agree on.

torchrun and deepspeed start one process ("rank") per device and describe the group in environment
variables. DistributedDataParallel or DeepSpeed averages the gradients; the rest is here: sums, a
common answer, a common end. With one process everything below is the identity.
"""

import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")
PATIENCE = timedelta(minutes=10)  # for ranks that have not come yet


class Ranks:
    """`rank` of `world_size` processes, `local_rank` on this machine; `is_main_process`: rank 0.

    `store` is the memory that the processes of one launch share: torchrun's, which outlives the
    processes that it restarts, or rank 0's own. None before `start`, and without a launcher.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        self.is_main_process = self.rank == 0
        self.store: dist.Store | None = None
        self.in_torchruns_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    def start(self, device: torch.device, also_alone: bool = False) -> None:
        """Join the group: nccl between GPUs, gloo between CPUs. TimeoutError if a rank is missing.

        also_alone: a single process becomes a group of one, as DeepSpeed wants it.
        """
        self.device = device
        if dist.is_initialized():
            return
        if self.world_size > 1 or self.in_torchruns_store:
            self.store = next(rendezvous("env://", timeout=PATIENCE))[0]
            # older PyTorch puts the agent's own count of restarts there
            while isinstance(self.store, dist.PrefixStore):
                self.store = self.store.underlying_store
        if self.world_size > 1 or also_alone:
            store = self.store or dist.HashStore()
            store = dist.PrefixStore(agree_on_group(store, self.rank, self.world_size), store)
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=store,
                rank=self.rank,
                world_size=self.world_size,
            )

    def begin(self, folder: Path) -> None:
        """Note, for ranks that torchrun may restart, that `folder` is this launch's from now on."""
        if self.store and self.is_main_process:
            self.store.set(f"minimind/begun/{folder}", "")

    def has_begun(self, folder: Path) -> bool:
        """Whether dead ranks of this launch called `begin(folder)`; all ranks call together."""
        if self.store is None:
            return False
        if self.in_torchruns_store:
            return self.any(self.store.check([f"minimind/begun/{folder}"]))
        # nothing outlives a restart here; one of the agents has counted it
        return self.any(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))

    def sum(self, number: float | torch.Tensor) -> float:
        """The sum of a number over all ranks, as a float; waits for the slowest."""
        if self.world_size == 1:
            return float(number)
        total = torch.as_tensor(number, dtype=torch.float64, device=self.device).detach().clone()
        dist.all_reduce(total)
        return total.item()

    def sum_tensor(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor on the device over all ranks, elementwise; overwrites x."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def any(self, flag: object) -> bool:
        """Whether the flag is set on some rank."""
        return self.sum(bool(flag)) > 0

    def from_main(self, make: Callable[[], T]) -> T:
        """The result of `make()` on rank 0, on every rank, and its ValueError or OSError too."""
        if self.world_size == 1:
            return make()
        box = [None]
        if self.is_main_process:
            try:
                box = [make()]
            except (ValueError, OSError) as error:
                box = [error]
        dist.broadcast_object_list(box, src=0)
        if isinstance(box[0], Exception):
            raise box[0]
        return box[0]

    def gather(self, items: list) -> list:
        """The lists of all ranks, one after another, on every rank: any Python objects."""
        if self.world_size == 1:
            return items
        lists = [None] * self.world_size
        dist.all_gather_object(lists, items)
        return [item for part in lists for item in part]

    def close(self) -> None:
        """Leave the group."""
        if dist.is_initialized():
            if dist.get_backend() == "gloo":
                # a thread of gloo may still want the GIL to free the last tensors, and freeing the
                # group waits for that thread with the GIL held: leave it the GIL for a moment
                time.sleep(0.1)
            dist.destroy_process_group()


def agree_on_group(store: dist.Store, rank: int, world_size: int) -> str:
    """A name that the ranks which are there now have in common, and nobody else.

    torchrun's store outlives a restart, with the addresses of dead processes in it, and each of its
    agents counts restarts for itself: no name known beforehand is both new and common. So every
    rank calls with a word of its own, and rank 0 answers the last call of each with the group's
    name until it hears back: a dead process's word is answered in vain.
    """
    return lead_group(store, world_size) if rank == 0 else follow_group(store, rank)


def lead_group(store: dist.Store, world_size: int) -> str:
    """Rank 0's part of `agree_on_group`."""
    group, missing = uuid.uuid4().hex, set(range(1, world_size))
    end = time.monotonic() + PATIENCE.total_seconds()
    while missing:
        if time.monotonic() > end:
            raise TimeoutError(
                f"{len(missing)} of {world_size} ranks did not come within {PATIENCE} (rank "
                f"{min(missing)}, ...): look in the launcher's output for the "
                "cause, and start again"
            )
        for rank in sorted(missing):
            if store.check([f"minimind/{group}/{rank}"]):
                missing.remove(rank)
            elif store.check([f"minimind/call/{rank}"]):
                store.set(f"minimind/answer/{store.get(f'minimind/call/{rank}').decode()}", group)
        time.sleep(0.02)
    return group


def follow_group(store: dist.Store, rank: int) -> str:
    """The other ranks' part of `agree_on_group`."""
    word = uuid.uuid4().hex
    store.set(f"minimind/call/{rank}", word)
    try:
        group = store.get(f"minimind/answer/{word}").decode()
    except dist.DistError as error:
        raise TimeoutError(
            f"rank {rank} has had no answer from rank 0 within {PATIENCE}: look in the launcher's "
            "output for the cause, and start again"
        ) from error
    store.set(f"minimind/{group}/{rank}", "")
    return group

"""The processes that train one model together: who they are, and the few numbers that they must agree on.

torchrun and deepspeed start one process ("rank") per device and describe the group in environment variables. Gradients
are averaged by DistributedDataParallel or DeepSpeed; here is only what is left: sums, a common answer, a common end.
With one process everything below is the identity.
"""

import os
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

PATIENCE = timedelta(minutes=10)  # for ranks that have not come yet


class Ranks:
    """`rank` of `world_size` processes, `local_rank` among those of this machine; `is_first` is rank 0.

    `store` is what the processes of one launch know together: torchrun's, which outlives those that it starts again, or
    rank 0's own. None before `start`, and for a process that nobody launched.
    """

    def __init__(self):
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        self.is_first = self.rank == 0
        self.store, self.in_torchruns_store = None, os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    def start(self, device, also_alone=False):
        """Join the group: nccl between GPUs, gloo between CPUs. TimeoutError if somebody does not come.

        also_alone: a process by itself becomes a group of one; DeepSpeed wants to be told.
        """
        self.device = device
        if dist.is_initialized():
            return
        if self.world_size > 1 or self.in_torchruns_store:
            self.store = next(rendezvous("env://", timeout=PATIENCE))[0]
            while isinstance(self.store, dist.PrefixStore):  # older PyTorch puts the agent's own count of restarts there
                self.store = self.store.underlying_store
        if self.world_size > 1 or also_alone:
            store = self.store or dist.HashStore()
            store = dist.PrefixStore(agree_on_group(store, self.rank, self.world_size), store)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=self.rank,
                                    world_size=self.world_size)

    def begin(self, folder):
        """Note, for ranks that torchrun may have to start again, that what is in `folder` is this launch's from now on."""
        if self.store and self.is_first:
            self.store.set(f"minimind/begun/{folder}", "")

    def has_begun(self, folder):
        """Whether ranks of this launch that died called `begin(folder)`; all ranks call together."""
        if self.store is None:
            return False
        if self.in_torchruns_store:
            return self.any(self.store.check([f"minimind/begun/{folder}"]))
        # nothing outlives a restart here; an agent counts only those that it began itself, so one of them knows
        return self.any(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))

    def sum(self, number):
        """The sum of a number (or a tensor of one element) over all ranks, as a float; a wait for the slowest."""
        if self.world_size == 1:
            return float(number)
        total = torch.as_tensor(number, dtype=torch.float64, device=self.device).detach().clone()
        dist.all_reduce(total)
        return total.item()

    def sum_tensor(self, x):
        """The sum of a tensor on the device over all ranks, elementwise; overwrites x."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def any(self, flag):
        """Whether the flag is set on some rank."""
        return self.sum(bool(flag)) > 0

    def from_first(self, make):
        """What `make()` returns on rank 0, on every rank; a ValueError or OSError there is raised everywhere."""
        if self.world_size == 1:
            return make()
        box = [None]
        if self.is_first:
            try:
                box = [make()]
            except (ValueError, OSError) as error:
                box = [error]
        dist.broadcast_object_list(box, src=0)
        if isinstance(box[0], Exception):
            raise box[0]
        return box[0]

    def gather(self, items):
        """The lists that the ranks call with, one after another, on every rank: any Python objects."""
        if self.world_size == 1:
            return items
        lists = [None] * self.world_size
        dist.all_gather_object(lists, items)
        return [item for part in lists for item in part]

    def barrier(self):
        """Wait until all are here."""
        self.sum(0)

    def close(self):
        """Leave the group."""
        if dist.is_initialized():
            if dist.get_backend() == "gloo":
                # a thread of gloo may still want the GIL, to let go of the last tensors; who frees the group holds the GIL and
                # waits for that thread, so both would wait for ever: leave it the GIL for a moment
                time.sleep(0.1)
            dist.destroy_process_group()


def agree_on_group(store, rank, world_size):
    """A name that the ranks which are there now have in common, and nobody else.

    torchrun's store outlives a restart, with the addresses of the dead in it, and each of its agents counts restarts for
    itself: no name that is known beforehand is both new and common. So every rank calls with a word of its own, and rank 0
    answers the last call of each with the group's name until it hears back: a word of the dead is answered in vain.
    """
    return lead_group(store, world_size) if rank == 0 else follow_group(store, rank)


def lead_group(store, world_size):
    """Rank 0's part of `agree_on_group`."""
    group, missing, end = uuid.uuid4().hex, set(range(1, world_size)), time.monotonic() + PATIENCE.total_seconds()
    while missing:
        if time.monotonic() > end:
            raise TimeoutError(f"{len(missing)} of {world_size} ranks did not come within {PATIENCE} (rank {min(missing)}, ...): "
                               "look for what stopped them in the launcher's output, and start again")
        for rank in sorted(missing):
            if store.check([f"minimind/{group}/{rank}"]):
                missing.remove(rank)
            elif store.check([f"minimind/call/{rank}"]):
                store.set(f"minimind/answer/{store.get(f'minimind/call/{rank}').decode()}", group)
        time.sleep(0.02)
    return group


def follow_group(store, rank):
    """The other ranks' part of `agree_on_group`."""
    word = uuid.uuid4().hex
    store.set(f"minimind/call/{rank}", word)
    try:
        group = store.get(f"minimind/answer/{word}").decode()
    except dist.DistError as error:
        raise TimeoutError(f"rank {rank} has had no answer from rank 0 within {PATIENCE}: look for what stopped rank 0 in the "
                           "launcher's output, and start again") from error
    store.set(f"minimind/{group}/{rank}", "")
    return group

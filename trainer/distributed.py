"""The processes that train one model together: who they are, and the few numbers that they must agree on.

torchrun and deepspeed start one process ("rank") per device and describe the group in environment variables. Gradients
are averaged by DistributedDataParallel or DeepSpeed; here is only what is left: sums, a common answer, a common end.
With one process everything below is the identity.
"""

import os

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous


class Ranks:
    """`rank` of `world_size` processes, `local_rank` among those of this machine; `is_first` is rank 0."""

    def __init__(self):
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        self.restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))  # of the group, after one of it died
        self.is_first = self.rank == 0

    def start(self, device):
        """Join the group: nccl between GPUs, gloo between CPUs."""
        self.device = device
        if self.world_size > 1 and not dist.is_initialized():
            store, rank, world_size = next(rendezvous("env://"))
            # torchrun's store outlives a restart: a rank that is early must not find the addresses of the dead there
            store = dist.PrefixStore(f"attempt-{self.restarts}", store)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world_size)

    def sum(self, number):
        """The sum of a number (or a tensor of one element) over all ranks, as a float; a wait for the slowest."""
        if self.world_size == 1:
            return float(number)
        total = torch.as_tensor(number, dtype=torch.float64, device=self.device).detach().clone()
        dist.all_reduce(total)
        return total.item()

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

    def barrier(self):
        """Wait until all are here."""
        self.sum(0)

    def close(self):
        """Leave the group."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()

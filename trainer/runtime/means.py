"""Sums and means with names, over the micro-batches of a step and over all ranks."""

import torch

from trainer.runtime.ranks import Ranks


class Means:
    """Collects values by name; `reduce` returns each total or mean over all ranks, then clears.

        means.add(loss=loss)                                  # parts of a total: they add up
        means.add(num_tokens, entropy=entropies, approx_kl=x)  # values of items: their mean

    Each value is summed in its own type, the sums in float64 (where the device has it). Every rank
    must add the same names.
    """

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, torch.Tensor] = {}

    def add(self, count: int | torch.Tensor | None = None, **values: torch.Tensor | float) -> None:
        """Add tensors of any shape, each summed; count: of the items that they are values of.

        Without a count the values are parts that have been divided by the step's total already.
        """
        for name, value in values.items():
            total = torch.as_tensor(value).detach().sum()
            total = total.double() if total.device.type != "mps" else total.float()
            self.sums[name] = self.sums[name] + total if name in self.sums else total
            if count is not None:
                number = torch.as_tensor(count, dtype=total.dtype, device=total.device)
                self.counts[name] = self.counts.get(name, 0) + number

    def reduce(self, ranks: Ranks) -> dict[str, float]:
        """{name: total or mean} over all ranks, by one all-reduce; no name whose count is 0."""
        if not self.sums:
            return {}
        table = torch.stack([*self.sums.values(), *self.counts.values()])
        numbers = ranks.sum_tensor(table).tolist()
        totals = dict(zip(self.sums, numbers))
        counts = dict(zip(self.counts, numbers[len(totals) :]))
        self.sums, self.counts = {}, {}
        return {
            name: total / counts.get(name, 1)
            for name, total in totals.items()
            if counts.get(name, 1)
        }


def average(updates: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each name over several updates, which all have the same names; {} of none."""
    if not updates:
        return {}
    table = torch.tensor([list(update.values()) for update in updates], dtype=torch.float64)
    return dict(zip(updates[0], table.mean(0).tolist()))

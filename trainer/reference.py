"""Log-probabilities of the answers in a PairDataset: under the network in training, and under the frozen reference."""

import copy
import sys
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from dataset.pair_dataset import PairBatches, tree_mask
from dataset.token_cache import fingerprint
from model.native_format import network_sha256, replace_file
from trainer.preference_losses import answer_log_probs
from trainer.run import evaluating


def log_probs(net, batch, num_targets=1):
    """(log p of all answers, float32 [N, 2]; the balance loss's part of the step's loss) of a `collate_trees` batch.

    num_targets: of the whole step. The second is 0 unless the network is a mixture of experts, to keep them busy alike.
    """
    out = net(batch["input_ids"], attention_mask=tree_mask(batch["tree"], batch["branch"]), position_ids=batch["position_ids"],
              labels=batch["labels"], num_items_in_batch=num_targets, skip_nll=True, logits_to_keep=batch["is_source"])
    return answer_log_probs(out.logits, batch), out.loss


class Reference:
    """The network as it is when this is made, frozen: `reference(dataset, batch)` -> log p of the batch's answers [N, 2].

    args.reference "on_the_fly": a copy computes them, each time. "cached": they are computed here for all `datasets`, each
    once for these weights, and kept in args.cache_dir/reference; no copy stays. `name` says which weights it has. All ranks
    call together.
    """

    def __init__(self, model, datasets, pad_id, run, args):
        self.run, self.args, self.pad_id, self.net, self.tables = run, args, pad_id, None, {}
        self.name = run.ranks.from_first(lambda: network_sha256(model))
        if args.reference == "on_the_fly":
            self.net = copy.deepcopy(model).eval().requires_grad_(False)
            return
        for dataset in datasets:
            decides = dict(data=dataset.fingerprint, weights=self.name, device=run.device.type, dtype=str(run.dtype))
            path = Path(args.cache_dir) / "reference" / f"{fingerprint(**decides)}.safetensors"
            table = run.ranks.from_first(lambda path=path: load_file(path)["log_probs"] if path.exists() else None)
            self.tables[dataset.fingerprint] = self.compute(model, dataset, path) if table is None else table

    @torch.no_grad()
    def __call__(self, dataset, batch):
        if self.net:
            return log_probs(self.net, batch)[0]
        return self.tables[dataset.fingerprint][batch["items"].cpu()].to(self.run.device)

    def compute(self, model, dataset, path):
        """log p of all answers of a dataset [len(dataset), 2], which rank 0 writes to `path`."""
        ranks = self.run.ranks
        batches = PairBatches(dataset, batch_size=self.args.batch_size, accumulation_steps=1, max_seq_len=self.args.max_seq_len,
                              seed=self.args.seed, epochs=1, pad_id=self.pad_id, rank=ranks.rank, world_size=ranks.world_size)
        table = torch.zeros(len(dataset), 2, device=self.run.device)
        bar = tqdm(chain.from_iterable(batches), "reference", disable=not (ranks.is_first and sys.stderr.isatty()))
        with evaluating(model), self.run.autocast():
            for micro in bar:
                batch = self.run.to_device(micro)
                table[batch["items"]] = log_probs(model, batch)[0]
        table = ranks.sum_tensor(table).cpu()  # each row is one rank's
        if ranks.is_first:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, lambda temporary: save_file({"log_probs": table}, temporary))
        return table

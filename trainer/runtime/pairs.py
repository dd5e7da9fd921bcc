"""Preference pairs in training: log-probabilities under the network and the frozen reference,
their metrics, and validation on held-out pairs.
"""

import copy
import sys
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dataset.files.hashes import fingerprint
from dataset.pair_dataset import MismatchedPairs, PairBatches, collate_packed, tree_mask
from model.files import replace_file
from model.model_minimind import MiniMindForCausalLM
from model.native_format import network_sha256
from trainer.losses.preference import completion_log_probs
from trainer.runtime.data import single_pass
from trainer.runtime.evaluation import sample
from trainer.runtime.means import Means
from trainer.runtime.process import evaluating
from trainer.runtime.run import Run

STUCK = 0.02  # a mean reward margin below which nothing has been learned


def log_probs(
    net: torch.nn.Module, batch: dict[str, torch.Tensor], num_targets: float = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p of all completions, float32 [N, 2], the balance loss) of a `collate_trees` batch.

    num_targets: of the whole step. The balance loss is 0 unless the network is a mixture of
    experts.
    """
    out = net(
        batch["input_ids"],
        attention_mask=tree_mask(batch["tree"], batch["branch"]),
        position_ids=batch["position_ids"],
        labels=batch["labels"],
        num_items_in_batch=num_targets,
        head_positions=batch["is_source"],
    )
    return completion_log_probs(out.logits, batch), out.loss


class Reference:
    """The network as it is now, frozen: `reference(dataset, batch)` -> log p_ref [N, 2].

    --reference on_the_fly: a copy computes them, each time. cached: they are computed here for all
    `datasets`, once for these weights, and kept in --cache_dir/reference; no copy stays. `name`
    identifies the weights. All ranks call together.
    """

    def __init__(self, run: Run, model: MiniMindForCausalLM, datasets: list[Any], pad_id: int):
        self.run, self.pad_id, self.net, self.tables = run, pad_id, None, {}
        self.name = run.ranks.from_main(lambda: network_sha256(model))
        is_kto = run.args.loss_type == "kto"
        self.mismatched = {x.fingerprint: MismatchedPairs(x) for x in datasets} if is_kto else {}
        if run.args.reference == "on_the_fly":
            self.net = copy.deepcopy(model).eval().requires_grad_(False)
            return
        arithmetic = {"device": run.device.type, "dtype": str(run.dtype)}
        for dataset in (*datasets, *self.mismatched.values()):
            name = fingerprint(data=dataset.fingerprint, weights=self.name, **arithmetic)
            path = Path(run.args.cache_dir) / "reference" / f"{name}.safetensors"
            table = run.ranks.from_main(
                lambda path=path: load_file(path)["log_probs"] if path.exists() else None
            )
            if table is None:
                table = self.compute(model, dataset, path)
            self.tables[dataset.fingerprint] = table

    @torch.no_grad()
    def __call__(self, dataset: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if self.net:
            return log_probs(self.net, batch)[0]
        return self.tables[dataset.fingerprint][batch["items"].cpu()].to(self.run.device)

    def estimate_kl(
        self,
        model: MiniMindForCausalLM,
        dataset: Any,
        micro_batches: Iterable[dict[str, torch.Tensor]],
    ) -> float:
        """KTO's KL(p || p_ref): mean log p / p_ref of completions of other prompts, 0 at least.

        For the prompts of a whole step, over all ranks and without gradient, so that it does not
        depend on how the step is cut into micro-batches.
        """
        run, mismatched, total, count = self.run, self.mismatched[dataset.fingerprint], 0.0, 0.0
        with evaluating(model), run.autocast():
            for micro in micro_batches:
                items = micro["items"].tolist()
                trees = collate_packed(items, mismatched, dataset.max_seq_len, self.pad_id)
                batch = run.to_device(trees)
                total += (log_probs(model, batch)[0] - self(mismatched, batch)).sum()
                count += (batch["lengths"] > 0).sum()
        return max(0.0, run.sum(total) / max(run.sum(count), 1))

    def compute(self, model: MiniMindForCausalLM, dataset: Any, path: Path) -> torch.Tensor:
        """log p of all completions of a dataset, [len(dataset), 2]; rank 0 writes it to `path`."""
        run, args = self.run, self.run.args
        sizes = {"batch_size": args.batch_size, "max_seq_len": args.max_seq_len, "seed": args.seed}
        table = torch.zeros(len(dataset), 2, device=run.device)
        bar = tqdm(
            single_pass(run, dataset, self.pad_id, PairBatches, **sizes),
            "reference",
            disable=not (run.ranks.is_main_process and sys.stderr.isatty()),
        )
        with evaluating(model), run.autocast():
            for micro in bar:
                batch = run.to_device(micro)
                table[batch["items"]] = log_probs(model, batch)[0]
        table = run.ranks.sum_tensor(table).cpu()  # each row is one rank's
        if run.ranks.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, lambda temporary: save_file({"log_probs": table}, temporary))
        return table


def note_pairs(
    means: Means,
    losses: torch.Tensor,
    rewards: torch.Tensor,
    policy: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    per_completion: bool = False,
) -> None:
    """Note the losses [N] and the rewards, log p (if any) and lengths of pairs, all [N, 2].

    A missing side has length 0; without lengths both sides are there. The loss is a mean over the
    pairs, or, as in KTO, over the completions.
    """
    there = torch.ones_like(rewards, dtype=torch.bool) if lengths is None else lengths > 0
    pair = there.all(1)
    means.add(there.sum() if per_completion else pair.sum(), loss=losses)
    for what, x in (("rewards", rewards), ("log_probs", policy)):
        if x is None:
            continue
        for side, name in enumerate(("chosen", "rejected")):
            means.add(there[:, side].sum(), **{f"{what}/{name}": x[:, side] * there[:, side]})
        is_right = torch.sign(x[:, 0] - x[:, 1]) / 2 + 0.5  # 1, or 0, or 1/2 for neither
        means.add(pair.sum(), **{f"{what}/accuracies": is_right * pair})


def with_margin(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics, and the margin between chosen and rejected rewards where there are both."""
    if not {"rewards/chosen", "rewards/rejected"} <= metrics.keys():
        return metrics
    margin = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics | {"rewards/margins": margin}


Score = Callable[[Any, list[dict[str, torch.Tensor]], Means], None]


def validate_pairs(
    run: Run,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    val_sets: dict[str, Any],
    index: int,
    score: Score,
) -> tuple[dict[str, float], str]:
    """({"val_METRIC/NAME": number}, text) of held-out pairs; index chooses the sample in the text.

    score(dataset, micro_batches, means) notes the losses and rewards. A reward model writes no
    sample.
    """
    scores, lines = {}, []
    sizes = {"batch_size": run.args.batch_size, "max_seq_len": run.args.max_seq_len}
    for name, dataset in val_sets.items():
        means = Means()
        micro_batches = single_pass(run, dataset, tokenizer.pad_token_id, PairBatches, **sizes)
        with evaluating(model), run.autocast():
            score(dataset, list(micro_batches), means)
        metrics = with_margin(means.reduce(run.ranks))
        scores |= {f"val_{what}/{name}": x for what, x in metrics.items()}
        line = f"{name}: " + ", ".join(f"{what} {x:.3f}" for what, x in metrics.items())
        if isinstance(model, MiniMindForCausalLM):
            prompt, text = sample(model, tokenizer, dataset, index, run)
            line += f"; {prompt.strip()!r} -> {text.strip()!r}"
        lines.append(line)
    return scores, "\n".join(lines)


class StuckWarning:
    """Notices that the rewards' margin stays about 0: the learning rate is too low."""

    def __init__(self, num_steps: int, learning_rate: float):
        self.num_steps, self.learning_rate = num_steps, learning_rate
        self.check_at, self.margins = min(num_steps, max(10, num_steps // 3)), deque(maxlen=10)

    def after(self, done: int, margin: float | None) -> str:
        """A warning, or "", after `done` steps, the last of them with this margin."""
        if done > 1 and margin is not None:  # the first step's is from before any update
            self.margins.append(margin)
        is_due = done == self.check_at and len(self.margins)
        if not is_due or abs(sum(self.margins) / len(self.margins)) >= STUCK:
            return ""
        return (
            f"warning: after {done} of {self.num_steps} steps the rewards' margin is still about "
            f"0, where it began: --learning_rate {self.learning_rate:g} is too low, try ten times "
            "as much"
        )

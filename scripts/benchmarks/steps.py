"""Our network and transformers' own with the same weights, and a training step of each on the same
sequences. All that the benchmarks know about the trainer is here; scripts/doctor.py uses it too.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dataset.lm_dataset import PretrainDataset, SFTDataset
from dataset.packing import IGNORE, PackedBatches
from dataset.token_dataset import TokenDataset
from dataset.toy_world import write_world
from model.model_minimind import MiniMindForCausalLM
from trainer.runtime.arguments import ROOT
from trainer.runtime.checkpoint import Checkpoint, TrainState
from trainer.runtime.costs import step_work
from trainer.runtime.data import TOY, training_batches
from trainer.runtime.optimizers import build_optimizer
from trainer.runtime.run import Run
from trainer.runtime.stage_args import TrainArgs
from trainer.runtime.weights import load_network

DATASETS = {"pretrain": PretrainDataset, "sft": SFTDataset}
Batch = dict[str, torch.Tensor]
Work = tuple[int, int, int]  # positions, positions of the head, pairs of positions in attention


def reference_of(model: MiniMindForCausalLM, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The architecture that a checkpoint of `model` names (Qwen3, Llama, ...), by transformers."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(model.device)


class FirstRows(list):
    """The first sequences of a dataset, in memory, as PackedBatches reads them."""

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(sequence["input_ids"]) for sequence in self])


def open_dataset(
    stage: str, paths: list[str], max_seq_len: int, rows: int = 0
) -> TokenDataset | FirstRows:
    """The sequences of a stage, the first `rows` of them (0: all); no paths: the toy world's."""
    if not paths:
        write_world("mini", TOY)
        paths = [str(TOY / f"{stage}_train.jsonl")]
    dataset = DATASETS[stage](paths, AutoTokenizer.from_pretrained(ROOT / "model"), max_seq_len)
    return FirstRows(dataset[i] for i in range(min(rows, len(dataset)))) if rows else dataset


class Side:
    """A network with its optimizer; `step(n)` is one update on the n-th step of `batches`."""

    forward_options = {}

    def __init__(
        self, model: torch.nn.Module, run: Run, batches: PackedBatches, settings: TrainArgs
    ):
        self.model, self.run, self.batches, self.net = model, run, batches, run.wrap(model)
        self.optimizer = build_optimizer(model, settings)

    def step(self, step: int) -> float:
        """One update; returns its loss, the mean over the step's targets."""
        micro_batches = self.micro_batches(step)
        num_targets, total = self.run.count_targets(micro_batches), 0.0
        for micro in micro_batches:
            inputs = self.run.to_device(micro) | self.forward_options
            with self.run.autocast():
                loss = self.net(**inputs, num_items_in_batch=num_targets).loss
            self.run.backward(loss)
            total += loss.item()
        self.run.clip_and_step(self.model, self.optimizer, total)
        return total


class Ours(Side):
    """The step of trainer/train_pretrain.py and trainer/train_full_sft.py, on packed batches."""

    forward_options = {"head_positions": "targets"}

    @classmethod
    def start(cls, settings: TrainArgs, dataset: TokenDataset | FirstRows) -> Ours:
        """A run with these settings, before its first step."""
        run = Run(settings)
        model, tokenizer = load_network(settings, run.device)
        batches = training_batches(run, dataset, tokenizer.pad_token_id)
        ours = cls(model, run, batches, settings)
        ours.tokenizer = tokenizer
        return ours

    def checkpoint(self, folder: Path) -> Checkpoint:
        """Saves the run in a folder as the stages do."""
        self.run.folder, fingerprint = folder, self.batches.dataset.fingerprint
        state = TrainState(self.model, self.tokenizer, self.optimizer, fingerprint)
        return Checkpoint(self.run, state)

    def micro_batches(self, step: int) -> list[Batch]:
        return self.batches[step]

    def work(self, step: int) -> Work:
        return step_work(self.batches[step])


class Theirs(Side):
    """transformers' model on the same sequences, padded; `size` of them in a batch (0: all)."""

    forward_options = {"use_cache": False}

    def __init__(self, model: MiniMindForCausalLM, run: Run, batches: PackedBatches, size: int):
        super().__init__(reference_of(model).train(), run, batches, TrainArgs())
        self.size = size

    def micro_batches(self, step: int) -> list[Batch]:
        """Each batch is as wide as its longest sequence."""
        sequences = [self.batches.dataset[i] for i in sequences_of(self.batches, step)]
        size = self.size or len(sequences)
        parts = (sequences[start : start + size] for start in range(0, len(sequences), size))
        return [pad(part, self.batches.pad_id) for part in parts]

    def work(self, step: int) -> Work:
        """All positions go through the head; each attends to all before it, padding too."""
        shapes = [micro["input_ids"].shape for micro in self.micro_batches(step)]
        positions = sum(B * T for B, T in shapes)
        return positions, positions, sum(B * T * (T + 1) // 2 for B, T in shapes)


def sequences_of(batches: PackedBatches, step: int) -> list[int]:
    """Numbers of the sequences in a step of the first epoch."""
    first = step * batches.rows_per_step
    return [i for row in batches.rows(0)[first : first + batches.rows_per_step] for i in row]


def pad(sequences: list[dict[str, np.ndarray]], pad_id: int) -> Batch:
    """A batch as wide as its longest sequence: input_ids, labels, attention_mask, int64 [B, T]."""
    width = max(len(sequence["input_ids"]) for sequence in sequences)
    fillers = {"input_ids": pad_id, "labels": IGNORE, "attention_mask": 0}
    batch = {name: torch.full((len(sequences), width), x) for name, x in fillers.items()}
    for b, sequence in enumerate(sequences):
        columns = sequence | {"attention_mask": np.ones_like(sequence["input_ids"])}
        for name, row in batch.items():
            row[b, : len(columns[name])] = torch.from_numpy(columns[name])
    return batch

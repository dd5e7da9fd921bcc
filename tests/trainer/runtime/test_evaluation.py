"""Bits per byte against a row-by-row computation, and the beginning of a sample."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from dataset.lm_dataset import PretrainDataset, SFTDataset
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer.runtime.evaluation import bits_per_byte, sample
from trainer.runtime.run import Run
from trainer.runtime.stage_args import TrainArgs

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "model")


@pytest.fixture
def run():
    return Run(TrainArgs(device="cpu"))


def tiny_model(tokenizer, **changes):
    torch.manual_seed(0)
    return MiniMindForCausalLM(
        MiniMindConfig(
            **{
                **dict(
                    vocab_size=len(tokenizer),
                    hidden_size=16,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    intermediate_size=16,
                    initializer_range=0.2,
                ),
                **changes,
            }
        )
    )


@pytest.mark.parametrize("changes", [{}, {"num_experts": 4}])
def test_bits_per_byte_equals_a_loop_over_rows(changes, rows, tokenizer, run):
    model = tiny_model(tokenizer, **changes)
    dataset = PretrainDataset(rows["pretrain"], tokenizer, 64)
    nll = sum(
        torch.nn.functional.cross_entropy(
            model(torch.from_numpy(row["input_ids"])[None]).logits[0, :-1],
            torch.from_numpy(row["labels"])[1:],
            ignore_index=-100,
            reduction="sum",
        ).item()
        for row in dataset
    )
    text = sum(
        len(line.encode())
        for line in (__import__("json").loads(x)["text"] for x in rows["pretrain"].open())
    )
    score = bits_per_byte(model, tokenizer, dataset, run, 64, batch_size=3)
    assert score["bytes"] == text
    assert score["bpb"] == pytest.approx(nll / math.log(2) / text, rel=1e-5)
    assert model.training


def test_a_sample_begins_where_the_assistant_does(rows, tokenizer, run):
    model = tiny_model(tokenizer)
    prompt, _ = sample(
        model, tokenizer, SFTDataset(rows["sft"], tokenizer, 64), 0, run, max_new_tokens=2
    )
    assert prompt == "<|im_start|>user\nWhat is 0 plus 1?<|im_end|>\n<|im_start|>assistant\n"

"""A run that was changed is not resumed, and is told by which flag or file."""

from dataclasses import asdict

import pytest
import torch

from tests.helpers.toy_runs import toy_args, toy_run
from trainer.runtime.checkpoint import Checkpoint, TrainState
from trainer.train_full_sft import SFTArgs


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "toy"


def compare(folder, old, new, cls=None, **progress):
    """The message of a resumption with the flags `new` of a run that had the flags `old`."""
    make = (lambda **flags: toy_args(**flags)) if cls is None else cls
    run = toy_run(folder)
    run.args = make(**new)
    before = {
        "arguments": asdict(make(**old)),
        "fingerprint": "the data",
        "arithmetic": "float32 on cpu",
        "rows_per_step": make(**old).rows_per_step(1),
        "world_size": 1,
        **progress,
    }
    run.resume_from = (folder / "checkpoints" / "step-4", before)
    Checkpoint(run, TrainState(torch.nn.Linear(1, 1), None, None, "the data"))


@pytest.mark.parametrize(
    "old, new, message",
    [
        ({}, {"learning_rate": 0.5}, "--learning_rate 0.0005 -> 0.5"),
        ({"warmup_ratio": 0.1}, {"warmup_ratio": 0.2}, "--warmup_ratio 0.1 -> 0.2"),
        ({}, {"optimizer": "muon"}, "--optimizer 'adamw' -> 'muon'"),
        ({}, {"max_steps": 9}, "--max_steps None -> 9"),
        (
            {"batch_size": 4},
            {"batch_size": 3},
            "--batch_size 4 -> 3, so that a step has 3 batch rows (batch_size x accumulation_steps "
            "x ranks) instead of 4",
        ),
        (
            {},
            {"batch_size": 2, "accumulation_steps": 3},
            "--batch_size 8 -> 2 and --accumulation_steps 1 -> 3, so that a step has 6 batch rows",
        ),
    ],
)
def test_a_flag_that_decides_numbers_must_stay(old, new, message, folder):
    with pytest.raises(ValueError) as caught:
        compare(folder, old, new)
    text = str(caught.value)
    assert text.startswith(f"{folder}/checkpoints/step-4 cannot be resumed, because something")
    assert message in text
    assert text.endswith("start a new run without --from_resume under another --save_weight")


@pytest.mark.parametrize(
    "new",
    [
        {"save_interval": 7, "log_interval": 3, "keep": 9, "max_bad_steps": 2},
        {"data_path": ["elsewhere.jsonl"], "val_path": ["there.jsonl"]},  # by the fingerprint
        {"batch_size": 2, "accumulation_steps": 4, "gradient_checkpointing": True},
        {"num_workers": 3, "cache_dir": "x", "use_compile": True, "json": "y", "device": "cpu"},
    ],
)
def test_a_flag_that_decides_no_number_may_change(new, folder):
    compare(folder, {}, new)


def test_other_data_and_other_arithmetic_are_named(folder):
    with pytest.raises(ValueError, match=r"something changed: the data \(or the tokenizer, its te"):
        compare(folder, {}, {}, fingerprint="other data")
    with pytest.raises(ValueError, match=r"changed: bfloat16 on cuda -> float32 on cpu. Set"):
        compare(folder, {}, {}, arithmetic="bfloat16 on cuda")


def test_another_number_of_ranks_keeps_the_batch_rows_of_a_step(folder, capsys):
    compare(folder, {}, {}, rows_per_step=16, world_size=2)
    assert "2 ranks -> 1: a step keeps its 16 batch rows" in capsys.readouterr().out


def test_a_run_of_an_older_version_is_compared_under_the_new_names(folder):
    """warmup_share, as they wrote it, is warmup_ratio; a flag that they lacked is none."""

    def old(**shares):
        given = {"from_weight": "none", "save_weight": "sft"}
        arguments = asdict(SFTArgs(**given))
        for name in ("warmup", "decay", "min_lr", "val", "system_prompt", "empty_think"):
            arguments[f"{name}_share"] = shares.get(name, arguments.pop(f"{name}_ratio"))
            arguments.pop(f"{name}_ratio", None)
        del arguments["dropout"]
        return {"arguments": arguments, "rows_per_step": 8}

    compare(folder, {}, {"from_weight": "none", "save_weight": "sft"}, SFTArgs, **old())
    for name in ("warmup", "empty_think"):
        with pytest.raises(ValueError, match=rf"--{name}_ratio 0.25 -> 0.0"):
            compare(folder, {}, {"save_weight": "sft"}, SFTArgs, **old(**{name: 0.25}))


def test_a_flag_that_no_longer_exists_hinders_nothing(folder):
    arguments = asdict(toy_args()) | {"a_flag_of_the_past": 3}
    compare(folder, {}, {}, arguments=arguments)

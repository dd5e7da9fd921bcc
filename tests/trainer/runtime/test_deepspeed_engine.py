"""Sharded ranks learn what one rank learns without DeepSpeed, and their runs resume without it."""

import json
import multiprocessing
import shutil

import pytest
from transformers import AutoModelForCausalLM

from tests.helpers.ranks import MAIN, run_ranks
from tests.helpers.runs import assert_close_runs
from trainer.runtime.arguments import ROOT
from trainer.runtime.deepspeed_engine import remove_abandoned_lock
from trainer.runtime.metrics import read_metrics
from trainer.runtime.stage_args import TrainArgs, read_deepspeed_config

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
NAMES = {"pretrain": "pretrain_32x2", "sft": "full_sft_32x2"}
CONFIGS = ("ds_zero1", "ds_zero2", "ds_zero3", "ds_zero2_offload", "ds_zero3_offload")


def file_of(config):
    return str(ROOT / "trainer" / f"{config}.json")


@pytest.mark.parametrize("config", CONFIGS)
def test_our_configurations_leave_to_the_flags_what_the_flags_say(config):
    content = json.loads((ROOT / "trainer" / f"{config}.json").read_text())
    assert read_deepspeed_config(file_of(config)) == content
    args = TrainArgs(deepspeed=file_of(config))
    args.given = set()
    args.check()
    zero = content["zero_optimization"]
    assert str(zero["stage"]) in config and ("offload_optimizer" in zero) == ("offload" in config)


def test_the_lock_of_a_build_that_was_killed_is_removed(tmp_path):
    path = tmp_path / "lock"
    with path.open("w"):
        remove_abandoned_lock(path)
        assert path.exists()  # a process still builds
    remove_abandoned_lock(path)
    assert not path.exists()
    remove_abandoned_lock(path)  # and none is no error


@pytest.mark.slow
@pytest.mark.parametrize("stage", NAMES)
@pytest.mark.parametrize("config", CONFIGS)
def test_sharded_ranks_learn_what_one_learns(config, stage, flags, tmp_path):
    options = dict(max_steps=20, epochs=20, max_seq_len=32, save_interval=50, val_interval=10)
    options |= dict(accumulation_steps=2)
    MAIN[stage](flags(stage, save_dir=tmp_path / "one", batch_size=6, **options))
    options |= dict(deepspeed=file_of(config), batch_size=3)
    run_ranks(2, stage, flags(stage, save_dir=tmp_path / "two", **options))
    folder = tmp_path / "two" / NAMES[stage]
    assert_close_runs(tmp_path / "one" / NAMES[stage], folder, 20)
    assert type(AutoModelForCausalLM.from_pretrained(folder)).__name__ == "Qwen3ForCausalLM"


@pytest.mark.slow
def test_a_run_is_resumed_with_another_kind_of_sharding(flags, tmp_path):
    options = dict(
        max_steps=20, epochs=20, max_seq_len=32, save_interval=4, val_interval=10, keep=9
    )
    MAIN["pretrain"](flags(save_dir=tmp_path / "one", batch_size=4, **options))
    saved = tmp_path / "out" / NAMES["pretrain"]
    for config, stop in (("", 4), ("ds_zero1", 8), ("ds_zero3", 12), ("ds_zero2", 16), ("", 20)):
        more = {"deepspeed": file_of(config)} if config else {}
        run_ranks(2, "pretrain", [*flags(batch_size=2, **options, **more), "--from_resume"])
        for path in (saved / "checkpoints").iterdir():
            if int(path.name.split("-")[1]) > stop:
                shutil.rmtree(path)
    assert_close_runs(tmp_path / "one" / NAMES["pretrain"], saved, 20)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ds_zero2", "ds_zero3"])
def test_a_sharded_run_resumes_bit_for_bit(config, flags, tmp_path):
    options = dict(max_steps=12, epochs=20, max_seq_len=32, save_interval=4, val_interval=6)
    options |= dict(deepspeed=file_of(config))
    run_ranks(2, "pretrain", flags(**options))
    folder = tmp_path / "out" / NAMES["pretrain"]
    whole = (folder / "model.safetensors").read_bytes()
    shutil.rmtree(folder / "checkpoints" / "step-12")
    run_ranks(2, "pretrain", [*flags(**options), "--from_resume"])
    assert (folder / "model.safetensors").read_bytes() == whole


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ds_zero2", "ds_zero3"])
def test_a_step_that_is_not_finite_on_one_rank_is_left_out_on_all(config, flags, tmp_path):
    options = dict(max_steps=8, epochs=20, max_seq_len=32, save_interval=8, val_interval=8)
    command = flags(**options, deepspeed=file_of(config))
    out = run_ranks(2, "pretrain", command, poison=(1, 5))
    folder = tmp_path / "out" / NAMES["pretrain"]
    assert f"its rows are in {folder / 'bad_steps' / 'step-6-rank-*.jsonl'}" in out
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows if row["grad_norm"] is None] == [6]
    assert all(row["loss"] < 9 for row in rows)  # the weights are not poisoned
    names = sorted(path.name for path in (folder / "bad_steps").iterdir())
    assert names == ["step-6-rank-0.jsonl", "step-6-rank-1.jsonl"]


@pytest.mark.slow
def test_a_process_that_nobody_launched_is_a_group_of_one(flags, tmp_path):
    """And learns what it learns without DeepSpeed."""
    options = dict(max_steps=20, epochs=20, max_seq_len=32, save_interval=50, val_interval=10)
    options |= dict(batch_size=6)
    MAIN["pretrain"](flags(save_dir=tmp_path / "plain", **options))
    context = multiprocessing.get_context("forkserver")
    command = flags(**options, deepspeed=file_of("ds_zero2"))
    process = context.Process(target=MAIN["pretrain"], args=(command,))
    process.start()
    process.join(600)
    assert process.exitcode == 0
    name = NAMES["pretrain"]
    assert_close_runs(tmp_path / "plain" / name, tmp_path / "out" / name, 20)

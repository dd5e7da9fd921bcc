"""Several ranks learn what one rank learns: data-parallel and sharded, also when their number changes on the way."""

import importlib.util
import json
import multiprocessing
from datetime import timedelta

import pytest
import torch.distributed as dist
from ranks import MAIN, free_port, run_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trainer.distributed import agree_on_group
from trainer.metrics import read_metrics

NAMES = {"pretrain": "pretrain_32x2", "sft": "full_sft_32x2"}
needs_deepspeed = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="DeepSpeed is not installed")


def assert_close_runs(a, b, steps):
    """Same weights, losses, gradient norms and validation numbers within float error."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (a, b))
    assert ours.keys() == theirs.keys()
    for name in ours:  # 20 updates of up to 2e-3; AdamW makes much of the rounding of the few gradients that are near 0
        difference = (ours[name] - theirs[name]).abs()
        assert difference.max() < 1e-4 and difference.mean() < 2e-7
    rows = [read_metrics(folder / "metrics.jsonl") for folder in (a, b)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] and rows[0][-1]["step"] == steps
    for one, other in zip(*rows):
        assert one.keys() == other.keys()
        for name in {"loss", "val_loss/held_out", "val_bpb/held_out", "targets", "grad_norm"} & one.keys():
            assert one[name] == pytest.approx(other[name], rel=5e-4 if name == "grad_norm" else 2e-5)
        for name in (name for name in one if name.startswith("expert_load/")):
            assert one[name] == pytest.approx(other[name], abs=0.005)  # a token or two between two experts


@pytest.mark.parametrize("moe", [0, 1])
@pytest.mark.parametrize("stage", NAMES)
def test_two_ranks_learn_what_one_learns(stage, moe, flags, tmp_path):
    """20 steps over two epochs, whose last steps have fewer rows than ranks can share evenly."""
    options = dict(max_steps=20, epochs=20, max_seq_len=32, save_interval=50, val_interval=10, use_moe=moe)
    MAIN[stage](flags(stage, save_dir=tmp_path / "one", batch_size=6, accumulation_steps=2, **options))
    run_ranks(2, stage, flags(stage, save_dir=tmp_path / "two", batch_size=3, accumulation_steps=2, **options))
    name = NAMES[stage] + ("_moe" if moe else "")
    assert_close_runs(tmp_path / "one" / name, tmp_path / "two" / name, 20)


@needs_deepspeed
@pytest.mark.parametrize("stage", NAMES)
@pytest.mark.parametrize("config", ["ds_zero1", "ds_zero2", "ds_zero3", "ds_zero2_offload", "ds_zero3_offload"])
def test_sharded_ranks_learn_what_one_learns(config, stage, flags, tmp_path):
    options = dict(max_steps=20, epochs=20, max_seq_len=32, save_interval=50, val_interval=10)
    MAIN[stage](flags(stage, save_dir=tmp_path / "one", batch_size=6, accumulation_steps=2, **options))
    run_ranks(2, stage, flags(stage, save_dir=tmp_path / "two", batch_size=3, accumulation_steps=2, **options,
                              deepspeed=f"trainer/{config}.json"))
    folder = tmp_path / "two" / NAMES[stage]
    assert_close_runs(tmp_path / "one" / NAMES[stage], folder, 20)
    assert type(AutoModelForCausalLM.from_pretrained(folder)).__name__ == "Qwen3ForCausalLM"


def test_a_run_goes_on_with_another_number_of_ranks(flags, tmp_path, capsys):
    options = dict(max_steps=20, epochs=20, max_seq_len=32, save_interval=4, val_interval=10)
    MAIN["pretrain"](flags(save_dir=tmp_path / "one", batch_size=4, **options))
    again = [*flags(batch_size=4, **options), "--from_resume"]
    saved = tmp_path / "out" / NAMES["pretrain"]
    for ranks, stop, said in ((1, 8, ""), (2, 16, "1 ranks -> 2: a step keeps its 4 rows"), (1, 20, "")):
        stopping = [*again, "--keep", "9"]
        out = run_ranks(ranks, "pretrain", stopping) if ranks > 1 else MAIN["pretrain"](stopping) or capsys.readouterr().out
        assert said in out and ("a step keeps" in out) == bool(said)
        for path in (saved / "checkpoints").iterdir():  # as if the run had ended there
            if int(path.name.split("-")[1]) > stop:
                remove(path)
    assert_close_runs(tmp_path / "one" / NAMES["pretrain"], saved, 20)
    progress = json.loads((saved / "checkpoints" / "step-20" / "progress.json").read_text())
    assert (progress["rows_per_step"], progress["world_size"]) == (4, 1)


def test_a_step_that_cannot_keep_its_rows_is_refused_before_training(flags, tmp_path):
    """Rows for one rank alone, and a --batch_size with which two ranks would have more of them than the step had."""
    for rows, batch_size, message in (
            (1, 1, "a step of 1 rows leaves some of 2 processes without work. Start at most 1 processes"),
            (4, 3, "--batch_size 4 -> 3, so that a step has 6 rows (batch_size x accumulation_steps x ranks) instead of 4")):
        options = dict(max_steps=4, max_seq_len=32, save_dir=tmp_path / f"{rows}")
        MAIN["pretrain"](flags(batch_size=rows, **options))
        folder = tmp_path / f"{rows}" / NAMES["pretrain"]
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        out = run_ranks(2, "pretrain", [*flags(batch_size=batch_size, **options), "--from_resume"], expected=1)
        assert f"error: {message}" in out or f"because something changed: {message}" in out
        assert "going on" not in out and before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_ranks_that_are_started_again_agree_although_their_agents_count_differently(flags, tmp_path):
    """Two agents, one of which knows of no restart, and a store in which the dead have left their addresses."""
    options = dict(max_steps=8, epochs=4, max_seq_len=32)
    store = dist.TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)
    store.set("minimind/call/1", "the dead")
    run_ranks(2, "pretrain", flags(**options), launcher=(store.port, (0, 0)))
    folder = tmp_path / "out" / NAMES["pretrain"]
    whole = (folder / "model.safetensors").read_bytes()
    remove(folder / "checkpoints" / "step-8")
    for restarts in ((0, 1), (0, 0)):  # both times one of them at least does not know
        assert "going on after step" in run_ranks(2, "pretrain", flags(**options), launcher=(store.port, restarts))
        assert (folder / "model.safetensors").read_bytes() == whole
    new = dist.TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)
    for restarts in ((0, 0), (1, 1)):  # another launch has not begun that run, and being started again gives no right to it
        out = run_ranks(2, "pretrain", flags(**options), launcher=(new.port, restarts), expected=1)
        assert "holds a run, 8 updates long" in out


def test_ranks_that_do_not_come_are_counted(monkeypatch):
    monkeypatch.setattr("trainer.distributed.PATIENCE", timedelta(milliseconds=50))
    store = dist.TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False, timeout=timedelta(milliseconds=50))
    with pytest.raises(TimeoutError, match=r"2 of 3 ranks did not come .*rank 1"):
        agree_on_group(store, 0, 3)
    with pytest.raises(TimeoutError, match=r"rank 2 has had no answer from rank 0"):
        agree_on_group(store, 2, 3)


@needs_deepspeed
def test_a_run_goes_on_with_another_kind_of_sharding(flags, tmp_path):
    options = dict(max_steps=20, epochs=20, max_seq_len=32, save_interval=4, val_interval=10, keep=9)
    MAIN["pretrain"](flags(save_dir=tmp_path / "one", batch_size=4, **options))
    saved = tmp_path / "out" / NAMES["pretrain"]
    for config, stop in (("", 4), ("ds_zero1", 8), ("ds_zero3", 12), ("ds_zero2", 16), ("", 20)):
        more = ["--deepspeed", f"trainer/{config}.json"] if config else []
        run_ranks(2, "pretrain", [*flags(batch_size=2, **options), *more, "--from_resume"])
        for path in (saved / "checkpoints").iterdir():
            if int(path.name.split("-")[1]) > stop:
                remove(path)
    assert_close_runs(tmp_path / "one" / NAMES["pretrain"], saved, 20)


@needs_deepspeed
@pytest.mark.parametrize("config", ["ds_zero2", "ds_zero3"])
def test_a_sharded_run_resumes_bit_for_bit(config, flags, tmp_path):
    options = dict(max_steps=12, epochs=20, max_seq_len=32, save_interval=4, val_interval=6, deepspeed=f"trainer/{config}.json")
    run_ranks(2, "pretrain", flags(**options))
    folder = tmp_path / "out" / NAMES["pretrain"]
    whole = (folder / "model.safetensors").read_bytes()
    remove(folder / "checkpoints" / "step-12")
    run_ranks(2, "pretrain", [*flags(**options), "--from_resume"])
    assert (folder / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("config", ["", pytest.param("ds_zero2", marks=needs_deepspeed),
                                    pytest.param("ds_zero3", marks=needs_deepspeed)])
def test_what_is_not_finite_on_one_rank_is_left_out_on_all(config, flags, tmp_path):
    options = dict(max_steps=8, epochs=20, max_seq_len=32, save_interval=8, val_interval=8)
    more = ["--deepspeed", f"trainer/{config}.json"] if config else []
    out = run_ranks(2, "pretrain", [*flags(**options), *more], poison=(1, 5))
    assert f"its rows are in {tmp_path / 'out' / NAMES['pretrain'] / 'bad_steps' / 'step-6-rank-*.jsonl'}" in out
    folder = tmp_path / "out" / NAMES["pretrain"]
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows if row["grad_norm"] is None] == [6]
    assert all(row["loss"] < 9 for row in rows)  # the weights are not poisoned
    assert sorted(path.name for path in (folder / "bad_steps").iterdir()) == ["step-6-rank-0.jsonl", "step-6-rank-1.jsonl"]


@needs_deepspeed
def test_a_process_that_nobody_launched_is_a_group_of_one(flags, tmp_path):
    """And learns what it learns without DeepSpeed."""
    options = dict(max_steps=20, epochs=20, max_seq_len=32, save_interval=50, val_interval=10, batch_size=6)
    MAIN["pretrain"](flags(save_dir=tmp_path / "plain", **options))
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=MAIN["pretrain"], args=(flags(**options, deepspeed="trainer/ds_zero2.json"),))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert_close_runs(tmp_path / "plain" / NAMES["pretrain"], tmp_path / "out" / NAMES["pretrain"], 20)


def remove(folder):
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()

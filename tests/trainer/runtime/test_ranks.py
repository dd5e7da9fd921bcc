"""Several ranks: they agree on a group and on numbers, and learn what one rank learns."""

import json
import shutil
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from tests.helpers.ranks import MAIN, call_in_ranks, free_port, run_ranks
from tests.helpers.runs import assert_close_runs
from trainer.runtime.metrics import read_metrics
from trainer.runtime.ranks import Ranks, agree_on_group

NAMES = {"pretrain": "pretrain_32x2", "sft": "full_sft_32x2"}


def new_store(**options):
    return dist.TCPStore(
        "127.0.0.1", free_port(), is_master=True, wait_for_workers=False, **options
    )


# --- one rank and two ---


def test_with_one_process_everything_is_the_identity(tmp_path):
    ranks, x = Ranks(), torch.ones(2)
    assert (ranks.rank, ranks.world_size, ranks.is_main_process) == (0, 1, True)
    ranks.start(torch.device("cpu"))
    assert ranks.sum(torch.tensor(3)) == 3.0 and ranks.sum_tensor(x) is x
    assert ranks.any([1]) and not ranks.any(None)
    assert ranks.from_main(lambda: "made") == "made" and ranks.gather([1, 2]) == [1, 2]
    assert not ranks.has_begun(tmp_path)
    ranks.begin(tmp_path)
    ranks.close()


def test_the_environment_says_who_a_rank_is(monkeypatch):
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    ranks = Ranks()
    assert (ranks.rank, ranks.world_size, ranks.local_rank) == (3, 4, 1)
    assert ranks.local_world_size == 2 and not ranks.is_main_process


def talk(ranks):
    """All that two ranks can tell each other, as results of this rank."""

    def fail():
        raise ValueError("the first rank found a mistake")

    found = {
        "sum": ranks.sum(ranks.rank + 1),
        "sum_tensor": ranks.sum_tensor(torch.tensor([1.0, ranks.rank])).tolist(),
        "any": (ranks.any(ranks.rank == 1), ranks.any(False)),
        "from_main": ranks.from_main(lambda: {"rank": ranks.rank}),
        "gather": ranks.gather([ranks.rank] * (ranks.rank + 1)),
    }
    try:
        ranks.from_main(fail)
    except ValueError as error:
        found["error"] = str(error)
    return found


@pytest.mark.slow
def test_two_ranks_agree():
    assert call_in_ranks(2, talk) == 2 * [
        {
            "sum": 3.0,
            "sum_tensor": [2.0, 1.0],
            "any": (True, False),
            "from_main": {"rank": 0},
            "gather": [0, 1, 1],
            "error": "the first rank found a mistake",
        }
    ]


# --- the group ---


def agree(store, *ranks):
    """The names that ranks, each in a thread, agree on."""
    names = {}
    threads = [
        threading.Thread(
            target=lambda rank=rank: names.__setitem__(rank, agree_on_group(store, rank, 3))
        )
        for rank in ranks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


def test_ranks_agree_on_a_group_that_nobody_else_is_in():
    """Also in a store where the dead of an earlier attempt have left their words."""
    store = dist.HashStore()
    store.set("minimind/call/1", "the dead")
    first, second = agree(store, 0, 1, 2), agree(store, 2, 0, 1)
    assert len(set(first.values())) == len(set(second.values())) == 1
    assert first[0] != second[0]


def test_ranks_that_do_not_come_are_counted(monkeypatch):
    monkeypatch.setattr("trainer.runtime.ranks.PATIENCE", timedelta(milliseconds=50))
    store = new_store(timeout=timedelta(milliseconds=50))
    with pytest.raises(TimeoutError, match=r"2 of 3 ranks did not come .*rank 1"):
        agree_on_group(store, 0, 3)
    with pytest.raises(TimeoutError, match=r"rank 2 has had no answer from rank 0"):
        agree_on_group(store, 2, 3)


def test_a_launch_remembers_the_runs_that_it_began(tmp_path, monkeypatch):
    """In torchrun's store, or by its count of restarts where there is no such store."""
    ranks = Ranks()
    ranks.store, ranks.in_torchruns_store = dist.HashStore(), True
    assert not ranks.has_begun(tmp_path / "a")
    ranks.begin(tmp_path / "a")
    assert ranks.has_begun(tmp_path / "a") and not ranks.has_begun(tmp_path / "b")
    ranks.in_torchruns_store = False
    assert not ranks.has_begun(tmp_path / "a")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert ranks.has_begun(tmp_path / "b")


# --- training ---


@pytest.mark.slow
@pytest.mark.parametrize("moe", [0, 1])
@pytest.mark.parametrize("stage", NAMES)
def test_two_ranks_learn_what_one_learns(stage, moe, flags, tmp_path):
    """20 steps over two epochs, whose last steps have fewer batch rows than ranks can share
    evenly.
    """
    options = dict(max_steps=20, epochs=20, max_seq_len=32, save_interval=50, val_interval=10)
    options |= dict(use_moe=moe, accumulation_steps=2)
    MAIN[stage](flags(stage, save_dir=tmp_path / "one", batch_size=6, **options))
    run_ranks(2, stage, flags(stage, save_dir=tmp_path / "two", batch_size=3, **options))
    name = NAMES[stage] + ("_moe" if moe else "")
    assert_close_runs(tmp_path / "one" / name, tmp_path / "two" / name, 20)


@pytest.mark.slow
def test_a_run_is_resumed_with_another_number_of_ranks(flags, tmp_path, capsys):
    options = dict(max_steps=20, epochs=20, max_seq_len=32, save_interval=4, val_interval=10)
    MAIN["pretrain"](flags(save_dir=tmp_path / "one", batch_size=4, **options))
    again = [*flags(batch_size=4, keep=9, **options), "--from_resume"]
    saved = tmp_path / "out" / NAMES["pretrain"]
    for ranks, stop, said in (
        (1, 8, ""),
        (2, 16, "1 ranks -> 2: a step keeps its 4 batch rows"),
        (1, 20, ""),
    ):
        if ranks > 1:
            out = run_ranks(ranks, "pretrain", again)
        else:
            MAIN["pretrain"](again)
            out = capsys.readouterr().out
        assert said in out and ("a step keeps" in out) == bool(said)
        for path in (saved / "checkpoints").iterdir():  # as if the run had ended there
            if int(path.name.split("-")[1]) > stop:
                shutil.rmtree(path)
    assert_close_runs(tmp_path / "one" / NAMES["pretrain"], saved, 20)
    progress = json.loads((saved / "checkpoints" / "step-20" / "progress.json").read_text())
    assert (progress["rows_per_step"], progress["world_size"]) == (4, 1)


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "batch_rows, batch_size, message",
    [
        (1, 1, "leaves some of 2 processes without work. Start at most 1 processes"),
        (
            4,
            3,
            "because something changed: --batch_size 4 -> 3, so that a step has 6 batch rows "
            "(batch_size x accumulation_steps x ranks) instead of 4",
        ),
    ],
)
def test_a_step_that_cannot_keep_its_rows_is_refused(
    batch_rows, batch_size, message, flags, tmp_path
):
    """Before training: a row for one rank alone, or a --batch_size with which two ranks would have
    more of them than the step had.
    """
    options = dict(max_steps=4, max_seq_len=32)
    MAIN["pretrain"](flags(batch_size=batch_rows, **options))
    folder = tmp_path / "out" / NAMES["pretrain"]
    before = files_of(folder)
    command = [*flags(batch_size=batch_size, **options), "--from_resume"]
    out = run_ranks(2, "pretrain", command, expected=1)
    assert message in out and "resumed after" not in out and before == files_of(folder)


@pytest.mark.slow
def test_restarted_ranks_agree_although_their_agents_count_differently(flags, tmp_path):
    """Two agents, one of which knows of no restart, and a store in which the dead have left their
    addresses.
    """
    options = dict(max_steps=8, epochs=4, max_seq_len=32)
    store = new_store()
    store.set("minimind/call/1", "the dead")
    run_ranks(2, "pretrain", flags(**options), launcher=(store.port, (0, 0)))
    folder = tmp_path / "out" / NAMES["pretrain"]
    whole = (folder / "model.safetensors").read_bytes()
    shutil.rmtree(folder / "checkpoints" / "step-8")
    for restarts in ((0, 1), (0, 0)):  # both times one of them at least does not know
        out = run_ranks(2, "pretrain", flags(**options), launcher=(store.port, restarts))
        assert "resumed after step" in out
        assert (folder / "model.safetensors").read_bytes() == whole
    # another launch has not begun that run, and a restart gives no right to it
    new = new_store()
    for restarts in ((0, 0), (1, 1)):
        out = run_ranks(2, "pretrain", flags(**options), launcher=(new.port, restarts), expected=1)
        assert "holds a run, 8 updates long" in out


@pytest.mark.slow
def test_a_step_that_is_not_finite_on_one_rank_is_left_out_on_all(flags, tmp_path):
    options = dict(max_steps=8, epochs=20, max_seq_len=32, save_interval=8, val_interval=8)
    out = run_ranks(2, "pretrain", flags(**options), poison=(1, 5))
    folder = tmp_path / "out" / NAMES["pretrain"]
    assert f"its rows are in {folder / 'bad_steps' / 'step-6-rank-*.jsonl'}" in out
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows if row["grad_norm"] is None] == [6]
    assert all(row["loss"] < 9 for row in rows)  # the weights are not poisoned
    names = sorted(path.name for path in (folder / "bad_steps").iterdir())
    assert names == ["step-6-rank-0.jsonl", "step-6-rank-1.jsonl"]

"""Runs that are killed, interrupted, or fed with what is not finite: they end as if nothing had happened, or say why not."""

import itertools
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import free_port, run_ranks

from trainer import checkpoint, train_full_sft, train_pretrain
from trainer.arguments import command
from trainer.checkpoint import Checkpoint
from trainer.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
NAMES = {"pretrain": "pretrain_32x2", "sft": "full_sft_32x2"}
CLOCK = ("seconds", "tokens_per_second", "data_wait_share", "rollout_share", "peak_memory_gb")


def figures(folder):
    return [{name: x for name, x in row.items() if name not in CLOCK} for row in read_metrics(folder / "metrics.jsonl")]


def assert_same_end(a, b):
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert figures(a) == figures(b)


@pytest.fixture(scope="module")
def spawn():
    """spawn(flags): train in a process of its own, forked from one that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer.train_pretrain"])

    def start(flags, main=train_pretrain.main):
        process = context.Process(target=main, args=(flags,))
        process.start()
        return process
    return start


def wait_until(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and process.is_alive():
        assert time.monotonic() < end, "the run does not get on"
        time.sleep(0.001)


def train_until(flags, step, operation, reached):
    """Train, and stand still when the save of `step` begins its so-many-th operation on the disk, or else a step later."""
    count, seed, write = itertools.count(), train_pretrain.Run.seed, Checkpoint.write

    def stand_still():
        reached.touch()
        time.sleep(3600)

    def watched(action):
        def act(*given, **options):
            if threading.current_thread().name == f"save {step}" and next(count) == operation:
                stand_still()
            return action(*given, **options)
        return act

    def named(self, final, building, weights, state, progress):
        threading.current_thread().name = f"save {progress['step']}"
        write(self, final, building, weights, state, progress)

    for place, name in ((checkpoint, "sha256"), (checkpoint, "flush"), (os, "link"), (os, "replace"), (Path, "rename"),
                        (shutil, "rmtree")):
        setattr(place, name, watched(getattr(place, name)))
    Checkpoint.write = named
    train_pretrain.Run.seed = lambda run, number: stand_still() if number > step else seed(run, number)
    train_pretrain.main(flags)


def test_25_kills_at_random_moments_leave_no_trace(flags, spawn, tmp_path):
    """SIGKILL between and within saves; the run is started again each time and ends bit for bit like the one left alone.

    Where it must not get further before it is killed it stands still, so that no machine is too fast.
    """
    options = dict(max_steps=60, epochs=20, save_interval=1, val_interval=30)
    train_pretrain.main(flags(save_dir=tmp_path / "whole", **options))
    checkpoints, draw, within_a_save = tmp_path / "out" / NAMES["pretrain"] / "checkpoints", random.Random(0), 0

    def newest():
        return max((int(path.name.split("-")[1]) for path in checkpoints.glob("step-*")), default=0)

    for kill in range(25):
        goal, reached = min(newest() + draw.choice((1, 2, 3)), 58), tmp_path / f"reached-{kill}"
        operation = draw.randrange(28) if kill % 2 else None  # of the 28 or so of a save
        main = partial(train_until, step=goal, operation=operation, reached=reached)
        process = spawn([*flags(**options), "--from_resume"], main)
        wait_until(reached.exists if kill % 2 else lambda goal=goal: newest() >= goal, process)
        time.sleep(draw.random() * 0.02)
        assert process.is_alive()
        process.kill()
        process.join()
        within_a_save += any(checkpoints.glob(".step-*"))
    assert within_a_save >= 3
    train_pretrain.main([*flags(**options), "--from_resume"])
    assert_same_end(tmp_path / "out" / NAMES["pretrain"], tmp_path / "whole" / NAMES["pretrain"])
    assert not list(checkpoints.glob(".step-*"))


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_a_step_and_it_goes_on(number, status, flags, spawn, tmp_path):
    options = dict(max_steps=300, epochs=60, val_interval=300, save_interval=300)
    folder = tmp_path / "out" / NAMES["pretrain"]
    train_pretrain.main(flags(save_dir=tmp_path / "whole", **options))
    process = spawn(flags(**options))
    wait_until(lambda: len(read_metrics(folder / "metrics.jsonl")) > 5, process)
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == status
    step, = (int(path.name.split("-")[1]) for path in (folder / "checkpoints").iterdir())
    assert 5 < step < 300
    train_pretrain.main([*flags(**options), "--from_resume"])
    assert_same_end(folder, tmp_path / "whole" / NAMES["pretrain"])


def test_a_second_ctrl_c_stops_at_once():
    from trainer.stop_signals import StopSignals

    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGTERM)  # no second Ctrl-C
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Poison:
    """Makes the loss of chosen calls of the network's forward nan; counts optimizer steps from 0, over resumptions too."""

    def __init__(self, monkeypatch, bad):
        self.step = None
        seed, forward = train_pretrain.Run.seed, train_pretrain.Run.backward

        def remember(run, step):
            self.step = step
            seed(run, step)

        def poisoned(run, loss):
            forward(run, loss * float("nan") if bad(self.step, run.guard.learning_rate_share) else loss)

        monkeypatch.setattr(train_pretrain.Run, "seed", remember)
        monkeypatch.setattr(train_pretrain.Run, "backward", poisoned)


def test_a_bad_step_is_not_applied_and_its_rows_are_written(flags, tmp_path, monkeypatch, capsys):
    Poison(monkeypatch, lambda step, share: step == 5)
    train_pretrain.main(flags(max_steps=8))
    folder = tmp_path / "out" / NAMES["pretrain"]
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 9)) and rows[5]["grad_norm"] is None
    assert all(row["grad_norm"] for row in rows[:5] + rows[6:])
    text = (folder / "bad_steps" / "step-6-rank-0.jsonl").read_text()
    assert "make" in text and "step 6: loss 8." in capsys.readouterr().out  # the number that metrics.jsonl has too
    state = torch.load(folder / "checkpoints" / "step-8" / "training_state.pt", weights_only=True)
    assert state["optimizer"]["state"][0]["step"] == 7  # updates that were applied


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_after_some_bad_steps_in_a_row_the_run_goes_back_once_with_a_lower_rate(dtype, flags, tmp_path, monkeypatch, capsys):
    Poison(monkeypatch, lambda step, share: step in (5, 6, 7) and share == 1)
    options = dict(max_steps=12, epochs=3, max_bad_steps=3, schedule="wsd", decay_share=0, warmup_share=0, dtype=dtype)
    if dtype == "float16":
        monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda self: 1.0)  # no room below: no overflow that it can mend
    train_pretrain.main(flags(**options))
    assert "back to step 4, with half the learning rate" in capsys.readouterr().out
    rows = [row for row in read_metrics(tmp_path / "out" / NAMES["pretrain"] / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["learning_rate"] for row in rows] == [2e-3] * 4 + [1e-3] * 8


def test_what_the_guard_decided_is_resumed_too(flags, tmp_path, monkeypatch):
    Poison(monkeypatch, lambda step, share: step in (5, 6) and share == 1)
    options = dict(max_steps=12, epochs=3, max_bad_steps=2)
    train_pretrain.main(flags(save_dir=tmp_path / "whole", **options))
    folder = tmp_path / "out" / NAMES["pretrain"]
    wait = train_pretrain.Checkpoint.save

    def power_cut(self, step, targets):
        wait(self, step, targets)
        self.wait()
        if step == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_pretrain.Checkpoint, "save", power_cut)
        with pytest.raises(KeyboardInterrupt):
            train_pretrain.main(flags(**options))
    train_pretrain.main([*flags(**options), "--from_resume"])
    assert_same_end(folder, tmp_path / "whole" / NAMES["pretrain"])


def test_a_run_that_stays_bad_stops_and_keeps_the_good_checkpoint(flags, tmp_path, monkeypatch):
    Poison(monkeypatch, lambda step, share: step >= 5)
    with pytest.raises(FloatingPointError, match=r"2 steps in a row .*half the learning rate too.*bad_steps.*--learning_rate"
                                                 ) as error:
        train_pretrain.main(flags(max_steps=12, epochs=3, max_bad_steps=2))
    assert "float32" not in str(error.value)  # which it is
    checkpoints = tmp_path / "out" / NAMES["pretrain"] / "checkpoints"
    assert sorted(path.name for path in (checkpoints.parent / "bad_steps").iterdir()) == [
        "step-6-again-rank-0.jsonl", "step-6-rank-0.jsonl", "step-7-again-rank-0.jsonl", "step-7-rank-0.jsonl"]
    assert [path.name for path in checkpoints.iterdir()] == ["step-4"]
    monkeypatch.undo()
    Poison(monkeypatch, lambda step, share: True)
    with pytest.raises(FloatingPointError, match="no checkpoint to go back to"):
        train_pretrain.main([*flags(save_dir=tmp_path / "other", max_steps=12, epochs=3, max_bad_steps=2), "--overwrite"])
    assert len(list((tmp_path / "other" / NAMES["pretrain"] / "bad_steps").iterdir())) == 2


def test_a_stop_within_bad_steps_keeps_the_good_checkpoint(flags, tmp_path, monkeypatch, capsys):
    """Also the only one that is kept; the run is told to stop after its seventh step, of which two were bad."""
    folder = tmp_path / "out" / NAMES["pretrain"]
    poison = Poison(monkeypatch, lambda step, share: step >= 5)
    monkeypatch.setattr(train_pretrain.Run, "stop_asked", lambda run: poison.step == 6)
    for save_interval, kept, message in ((4, ["step-4"], f"not saved. Step 4 is, in {folder}: go on from there"),
                                         (100, [], "not saved. There is no checkpoint yet; their rows are in")):
        with pytest.raises(SystemExit) as end:
            train_pretrain.main([*flags(max_steps=12, epochs=3, save_interval=save_interval, keep=1), "--overwrite"])
        out = capsys.readouterr().out
        assert end.value.code == 143 and message in out and "stopped after step 7, the last 2 of them not finite" in out
        assert [path.name for path in folder.glob("checkpoints/*")] == kept


def test_a_run_that_ends_within_bad_steps_keeps_the_good_checkpoint(flags, tmp_path, monkeypatch, capsys):
    Poison(monkeypatch, lambda step, share: step >= 7)
    train_pretrain.main(flags(max_steps=9, epochs=3, keep=1))
    folder = tmp_path / "out" / NAMES["pretrain"]
    assert "warning: the last 2 steps had" in (out := capsys.readouterr().out) and "before them, step 4." in out
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-4"]
    assert (folder / "model.safetensors").read_bytes() == (folder / "checkpoints" / "step-4" / "model.safetensors").read_bytes()
    with pytest.raises(FloatingPointError, match=r"the last 2 steps had .* nothing was saved before them.*bad_steps"):
        train_pretrain.main([*flags(max_steps=9, epochs=3, save_interval=100), "--overwrite"])


def test_the_rows_of_few_bad_steps_are_kept(flags, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.guard.KEPT", 2)
    Poison(monkeypatch, lambda step, share: step in (1, 3, 5, 7))
    train_pretrain.main(flags(max_steps=9, epochs=3))
    names = [path.name for path in (tmp_path / "out" / NAMES["pretrain"] / "bad_steps").iterdir()]
    assert sorted(names) == ["step-6-rank-0.jsonl", "step-8-rank-0.jsonl"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "arguments.json", "step-1-rank-0.jsonl"])
def test_a_full_disk_is_one_line(name, flags, monkeypatch):
    write_text = Path.write_text

    def full(path, *text, **options):
        if name in path.name:
            raise OSError(28, "No space left on device")
        return write_text(path, *text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    Poison(monkeypatch, lambda step, share: True)
    with pytest.raises(SystemExit, match=rf"error: could not write .*{name} \(No space left on device\): make room on the disk"):
        command(lambda: train_pretrain.main(flags()))


@pytest.mark.parametrize("harm", ["truncated", "flipped"])
@pytest.mark.parametrize("name", ["model.safetensors", "training_state.pt", "progress.json", "manifest.json"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(harm, name, flags, tmp_path, capsys):
    train_pretrain.main(flags())
    folder = tmp_path / "out" / NAMES["pretrain"]
    whole = (folder / "model.safetensors").read_bytes()
    path = folder / "checkpoints" / "step-8" / name
    data = bytearray(path.read_bytes())
    if harm == "truncated":
        data = data[: len(data) // 2]
    else:
        data[len(data) // 2] ^= 1
    path.write_bytes(data)
    train_pretrain.main([*flags(), "--from_resume"])
    out = capsys.readouterr().out
    assert "falling back on the checkpoint before it" in out and "going on after step 4" in out
    assert (name if name != "manifest.json" else "step-8") in out
    assert (folder / "model.safetensors").read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_named_before_training(flags, tmp_path, monkeypatch):
    train_pretrain.main(flags())
    (tmp_path / "out" / "wrong_32x2").write_text("a file where the run's folder would be")
    with pytest.raises(ValueError, match=r"wrong_32x2 cannot be written \(Not a directory\): choose another --save_dir than"):
        train_pretrain.main(flags(save_weight="wrong"))
    folder = tmp_path / "out" / NAMES["pretrain"]
    deny(monkeypatch, folder)
    with pytest.raises(ValueError, match=r"pretrain_32x2 cannot be written"):
        train_pretrain.main([*flags(), "--from_resume"])


def deny(monkeypatch, folder):
    """Let no file be made in `folder`: the tests may run as root, whom permissions do not stop."""
    mkdtemp = tempfile.mkdtemp

    def refuse(suffix=None, prefix=None, dir=None):
        if dir == folder:
            raise OSError(30, "Read-only file system")
        return mkdtemp(suffix, prefix, dir)

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)


def test_a_token_cache_that_cannot_be_written_is_named_before_any_text_is_encoded(flags, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=r"cache cannot be written \(Read-only file system\)\. "
                                                                         r"Choose another --cache_dir than .*cache\.$"):
        (tmp_path / "cache").mkdir()
        deny(patch, tmp_path / "cache")
        command(lambda: train_pretrain.main(flags()))
    assert not list((tmp_path / "cache").iterdir())
    train_pretrain.main(flags(max_steps=1))
    deny(monkeypatch, tmp_path / "cache")
    train_pretrain.main([*flags(max_steps=1), "--overwrite"])  # everything is cached


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_place_where_not_even_root_can_write_is_named(flags):
    with pytest.raises(SystemExit, match=r"error: /proc cannot be written \(.*\): choose another --save_dir than /proc/nope"):
        command(lambda: train_pretrain.main(flags(save_dir="/proc/nope")))


def test_out_of_memory_ends_with_advice_that_can_be_followed(flags, tmp_path, monkeypatch):
    """Whatever the estimate said: less at a time, then recomputation; --from_resume where something is saved, and nothing
    next to it that it would refuse."""
    full_at = 0

    def full(run, step):
        if step == full_at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(train_pretrain.Run, "seed", full)
    before = "out of memory on cpu: CUDA out of memory. Tried to allocate 2.00 GiB."

    def advice(**changes):
        with pytest.raises(MemoryError) as error:
            train_pretrain.main([*flags(**{"max_seq_len": 256, "epochs": 9, **changes}), *resume])
        assert str(error.value).startswith(before)
        return str(error.value).removeprefix(before)

    resume = []
    assert advice(batch_size=4).startswith(" Way out: --batch_size 2 --accumulation_steps 2 gives the same update in ")
    assert advice(batch_size=1, accumulation_steps=4).startswith(
        " Way out: --batch_size 1 --accumulation_steps 4 --gradient_checkpointing gives the same update")
    least = dict(batch_size=1, accumulation_steps=4, gradient_checkpointing=1)
    text = advice(**least)
    assert "not even one row at a time fits" in text and "--gradient_checkpointing --max_seq_len 128 does" in text
    assert "from_resume" not in text and "is saved" not in text

    full_at = 5
    assert advice(batch_size=4).startswith(" Step 4 is saved. Way out: --batch_size 2 --accumulation_steps 2 --from_resume gives")
    resume = ["--from_resume"]
    text = advice(**least)
    assert "--max_seq_len 128 does" in text and text.endswith(", in a new run under another --save_weight")
    assert "--from_resume" not in text
    full_at = None
    train_pretrain.main([*flags(max_seq_len=256, epochs=9, batch_size=2, accumulation_steps=2), *resume])


def test_out_of_memory_before_the_weights_are_there(flags, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(train_pretrain, "load_model", full)
    with pytest.raises(MemoryError, match=r"the weights and their optimizer are too large: share them .* smaller --preset$"):
        train_pretrain.main(flags())


def children(pid):
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_killed_rank_comes_back_from_the_last_checkpoint(flags, tmp_path):
    """Two agents, as on two machines: their ranks are started again and end like two that nobody touched."""
    options = dict(max_steps=60, epochs=20, save_interval=5, val_interval=60)
    run_ranks(2, "pretrain", flags(save_dir=tmp_path / "whole", **options))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d",
              "--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1", "--max-restarts", "3",
              "--monitor-interval", "0.1", str(ROOT / "trainer" / "train_pretrain.py"), *flags(**options)]
    agents = [subprocess.Popen(launch, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}) for _ in range(2)]
    folder = tmp_path / "out" / NAMES["pretrain"]
    try:
        end = time.monotonic() + 120
        while not list((folder / "checkpoints").glob("step-*")) and time.monotonic() < end:
            time.sleep(0.01)
        second, = (pid for agent in agents for pid in children(agent.pid)
                   if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
        os.kill(second, signal.SIGKILL)
        outs = [agent.communicate(timeout=120)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()  # which ends its ranks; nothing if it has ended
    assert [agent.returncode for agent in agents] == [0, 0], outs
    assert sum("going on after step" in out for out in outs) == 1
    assert_same_end(folder, tmp_path / "whole" / NAMES["pretrain"])


@pytest.fixture
def launcher(monkeypatch):
    """This process as one that torchrun has started, with a store of torchrun's."""
    store = dist.TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port,
                        "TORCHELASTIC_USE_AGENT_STORE": True}.items():
        monkeypatch.setenv(name, str(value))
    return store


def test_a_replaced_run_does_not_come_back_when_its_replacement_is_started_again(flags, tmp_path, monkeypatch, capsys, launcher):
    """--overwrite with the flags of the run that is there, and a death before the first save."""
    folder = tmp_path / "out" / NAMES["pretrain"]
    train_pretrain.main(flags(val_share=0))
    train_pretrain.main(flags(save_dir=tmp_path / "whole", val_share=0))
    launcher.delete_key(f"minimind/begun/{folder}")  # the old run is of another launch

    class PowerCut(Exception):
        pass

    def cut(*_):
        raise PowerCut

    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr("trainer.loop.learning_rate_at", cut)
        train_pretrain.main([*flags(val_share=0), "--overwrite"])
    assert not list(folder.glob("checkpoints/*")) and not read_metrics(folder / "metrics.jsonl")
    assert not (folder / "model.safetensors").exists()  # it would pass for that of the new run
    capsys.readouterr()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train_pretrain.main([*flags(val_share=0), "--overwrite"])
    assert "going on after step" not in capsys.readouterr().out
    assert_same_end(folder, tmp_path / "whole" / NAMES["pretrain"])
    shutil.rmtree(folder / "checkpoints" / "step-8")
    train_pretrain.main([*flags(val_share=0), "--overwrite"])  # once more: now there is something of its own to go on from
    assert "going on after step 4" in capsys.readouterr().out
    assert_same_end(folder, tmp_path / "whole" / NAMES["pretrain"])


def test_what_is_replaced_is_kept_until_the_flags_and_the_data_are_found_good(flags, tmp_path):
    train_pretrain.main(flags())
    folder = tmp_path / "out" / NAMES["pretrain"]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="no such file"):
        train_pretrain.main([*flags(data_path=tmp_path / "nowhere.jsonl"), "--overwrite"])
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_full_sft_stops_and_resumes_as_well(flags, tmp_path, monkeypatch):
    options = dict(max_steps=8, save_interval=100)
    train_full_sft.main(flags("sft", save_dir=tmp_path / "whole", **options))
    monkeypatch.setattr(train_full_sft.Run, "stop_asked", lambda run: True)
    with pytest.raises(SystemExit):
        train_full_sft.main(flags("sft", **options))
    monkeypatch.undo()
    train_full_sft.main([*flags("sft", **options), "--from_resume"])
    assert_same_end(tmp_path / "out" / NAMES["sft"], tmp_path / "whole" / NAMES["sft"])

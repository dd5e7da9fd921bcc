"""Runs that are killed or interrupted end as if nothing had happened."""

import itertools
import multiprocessing
import os
import pty
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.helpers.ranks import free_port, run_ranks
from tests.helpers.runs import PowerCut, interrupt, metrics, poison_losses
from trainer import train_full_sft, train_pretrain
from trainer.runtime import checkpoint
from trainer.runtime.arguments import ROOT
from trainer.runtime.checkpoint import Checkpoint
from trainer.runtime.metrics import read_metrics

pytestmark = pytest.mark.slow
NAMES = {"pretrain": "pretrain_32x2", "sft": "full_sft_32x2"}


def assert_same_end(a, b):
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert metrics(a) == metrics(b)


@pytest.fixture(scope="module")
def spawn():
    """spawn(flags): train in a process of its own, forked from one that has imported everything
    already.
    """
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
    """Train, and stand still when the save of `step` begins its so-many-th operation on the disk,
    or else a step later.
    """
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

    for place, name in (
        (checkpoint, "file_sha256"),
        (checkpoint, "flush"),
        (os, "link"),
        (os, "replace"),
        (Path, "rename"),
        (shutil, "rmtree"),
    ):
        setattr(place, name, watched(getattr(place, name)))
    Checkpoint.write = named
    train_pretrain.Run.seed = lambda run, number: (
        stand_still() if number > step else seed(run, number)
    )
    train_pretrain.main(flags)


def test_25_kills_at_random_moments_leave_no_trace(flags, spawn, tmp_path):
    """SIGKILL between and within saves; the run is started again each time and ends bit for bit
    like the one left alone.

    Where it must not get further before it is killed it stands still, so that no machine is too
    fast.
    """
    options = dict(max_steps=60, epochs=20, save_interval=1, val_interval=30)
    train_pretrain.main(flags(save_dir=tmp_path / "whole", **options))
    checkpoints = tmp_path / "out" / NAMES["pretrain"] / "checkpoints"
    draw, within_a_save = random.Random(0), 0

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


@pytest.mark.parametrize(
    "number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_the_run_after_a_step_and_it_is_resumed(
    number, status, flags, spawn, tmp_path
):
    options = dict(max_steps=300, epochs=60, val_interval=300, save_interval=300)
    folder = tmp_path / "out" / NAMES["pretrain"]
    train_pretrain.main(flags(save_dir=tmp_path / "whole", **options))
    process = spawn(flags(**options))
    wait_until(lambda: len(read_metrics(folder / "metrics.jsonl")) > 5, process)
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == status
    (step,) = (int(path.name.split("-")[1]) for path in (folder / "checkpoints").iterdir())
    assert 5 < step < 300
    train_pretrain.main([*flags(**options), "--from_resume"])
    assert_same_end(folder, tmp_path / "whole" / NAMES["pretrain"])


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_is_closed_ends_the_run_with_a_checkpoint_but_not_under_nohup(
    ignored, flags, tmp_path
):
    """In a session of its own, whose terminal goes away."""
    options = dict(max_steps=100 if ignored else 5000, epochs=9999, val_interval=9999)
    script = [str(ROOT / "trainer" / "train_pretrain.py"), *flags(save_interval=9999, **options)]
    folder = tmp_path / "out" / NAMES["pretrain"]
    pid, terminal = pty.fork()
    if not pid:
        if ignored:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does, which redirects too
            os.dup2(os.open(tmp_path / "nohup.out", os.O_CREAT | os.O_WRONLY), 1)
            os.dup2(1, 2)
        os.execv(sys.executable, [sys.executable, *script])
    end = time.monotonic() + 120
    while len(read_metrics(folder / "metrics.jsonl")) < 5 and time.monotonic() < end:
        time.sleep(0.05)
        if select.select([terminal], [], [], 0)[0]:
            os.read(terminal, 1 << 16)  # else the run waits for room
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == (0 if ignored else 129)
    (step,) = (int(path.name.split("-")[1]) for path in (folder / "checkpoints").iterdir())
    assert step == 100 if ignored else 5 <= step < 5000


def test_full_sft_stops_and_resumes_as_well(flags, tmp_path, monkeypatch):
    options = dict(max_steps=8, save_interval=100)
    train_full_sft.main(flags("sft", save_dir=tmp_path / "whole", **options))
    monkeypatch.setattr(train_full_sft.Run, "stop_asked", lambda run: True)
    with pytest.raises(SystemExit):
        train_full_sft.main(flags("sft", **options))
    monkeypatch.undo()
    train_full_sft.main([*flags("sft", **options), "--from_resume"])
    assert_same_end(tmp_path / "out" / NAMES["sft"], tmp_path / "whole" / NAMES["sft"])


def children(pid):
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_killed_rank_comes_back_from_the_last_checkpoint(flags, tmp_path):
    """Two agents, as on two machines: their ranks are started again and end like two that nobody
    touched.
    """
    options = dict(max_steps=60, epochs=20, save_interval=5, val_interval=60)
    run_ranks(2, "pretrain", flags(save_dir=tmp_path / "whole", **options))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    launch += ["--nproc_per_node", "1", "--rdzv_backend", "c10d"]
    launch += ["--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1"]
    launch += ["--max-restarts", "3", "--monitor-interval", "0.1"]
    launch += [str(ROOT / "trainer" / "train_pretrain.py"), *flags(**options)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    agents = [subprocess.Popen(launch, env=environment, **pipes) for _ in range(2)]
    folder = tmp_path / "out" / NAMES["pretrain"]
    try:
        end = time.monotonic() + 120
        while not list((folder / "checkpoints").glob("step-*")) and time.monotonic() < end:
            time.sleep(0.01)
        (second,) = (
            pid
            for agent in agents
            for pid in children(agent.pid)
            if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
        )
        os.kill(second, signal.SIGKILL)
        outs = [agent.communicate(timeout=120)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()  # which ends its ranks; nothing if it has ended
    assert [agent.returncode for agent in agents] == [0, 0], outs
    assert sum("resumed after step" in out for out in outs) == 1
    assert_same_end(folder, tmp_path / "whole" / NAMES["pretrain"])


@pytest.fixture
def launcher(monkeypatch):
    """This process as one that torchrun has started, with a store of torchrun's."""
    store = dist.TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": store.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
    }.items():
        monkeypatch.setenv(name, str(value))
    return store


def test_a_replaced_run_does_not_come_back_when_its_replacement_is_started_again(
    flags, tmp_path, monkeypatch, capsys, launcher
):
    """--overwrite with the flags of the run that is there, and a death before the first save."""
    folder = tmp_path / "out" / NAMES["pretrain"]
    train_pretrain.main(flags(val_ratio=0))
    train_pretrain.main(flags(save_dir=tmp_path / "whole", val_ratio=0))
    launcher.delete_key(f"minimind/begun/{folder}")  # the old run is of another launch
    interrupt(train_pretrain, [*flags(val_ratio=0), "--overwrite"], step=0)
    assert not list(folder.glob("checkpoints/*")) and not read_metrics(folder / "metrics.jsonl")
    assert not (folder / "model.safetensors").exists()  # it would pass for that of the new run
    capsys.readouterr()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train_pretrain.main([*flags(val_ratio=0), "--overwrite"])
    assert "resumed after step" not in capsys.readouterr().out
    assert_same_end(folder, tmp_path / "whole" / NAMES["pretrain"])
    shutil.rmtree(folder / "checkpoints" / "step-8")
    # once more: now there is something of its own to resume
    train_pretrain.main([*flags(val_ratio=0), "--overwrite"])
    assert "resumed after step 4" in capsys.readouterr().out
    assert_same_end(folder, tmp_path / "whole" / NAMES["pretrain"])


def test_a_power_cut_right_after_a_save_loses_nothing(flags, tmp_path, monkeypatch):
    """Also what the guard had decided: the rate is half from then on."""
    poison_losses(monkeypatch, lambda step, count: step in (5, 6) and count < 2)
    options = dict(max_steps=12, epochs=3, max_bad_steps=2)
    train_pretrain.main(flags(save_dir=tmp_path / "whole", **options))
    poison_losses(monkeypatch, lambda step, count: step in (5, 6) and count < 2)
    save = Checkpoint.save

    def power_cut(self, step, *given):
        save(self, step, *given)
        self.wait()
        if step == 8:
            raise PowerCut

    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(Checkpoint, "save", power_cut)
        train_pretrain.main(flags(**options))
    train_pretrain.main([*flags(**options), "--from_resume"])
    folder = tmp_path / "out" / NAMES["pretrain"]
    assert_same_end(folder, tmp_path / "whole" / NAMES["pretrain"])
    rates = [
        row["learning_rate"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row
    ]
    assert rates[4] < 0.6 * rates[3]


def test_what_is_replaced_is_kept_until_the_flags_and_the_data_are_found_good(flags, tmp_path):
    train_pretrain.main(flags())
    folder = tmp_path / "out" / NAMES["pretrain"]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="no such file"):
        train_pretrain.main([*flags(data_path=tmp_path / "nowhere.jsonl"), "--overwrite"])
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name", ["model.safetensors", "training_state.pt", "progress.json", "manifest.json"]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(name, flags, tmp_path, capsys):
    """Half of a file is missing, or one bit of it is wrong: the run ends with the same weights."""
    train_pretrain.main(flags())
    folder = tmp_path / "out" / NAMES["pretrain"]
    whole = (folder / "model.safetensors").read_bytes()
    path = folder / "checkpoints" / "step-8" / name
    for is_cut in (True, False):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data[: len(data) // 2] if is_cut else data)
        train_pretrain.main([*flags(), "--from_resume"])
        out = capsys.readouterr().out
        assert "falling back on the checkpoint before it" in out and "resumed after step 4" in out
        assert (name if name != "manifest.json" else "step-8") in out
        assert (folder / "model.safetensors").read_bytes() == whole

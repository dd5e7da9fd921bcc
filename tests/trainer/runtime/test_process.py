"""The process of a run: devices, arithmetic, random numbers, signals, evaluation mode."""

import os
import random
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trainer.runtime import process
from trainer.runtime.process import (
    Compute,
    StopSignals,
    choose_device,
    choose_dtype,
    evaluating,
    is_out_of_memory,
    seed_everything,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpus(monkeypatch):
    """gpus(n): let there be n GPUs, as far as PyTorch is asked."""

    def make(count, has_bfloat16=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16
        )

    return make


def ranks(world_size, local_rank=0):
    return SimpleNamespace(
        world_size=world_size, local_world_size=world_size, local_rank=local_rank
    )


def test_the_device_is_the_gpu_if_there_is_one(gpus):
    gpus(0)
    assert choose_device("auto") == choose_device("cpu") == CPU
    gpus(2)
    assert choose_device("auto") == CUDA and choose_device("cuda:1") == torch.device("cuda:1")
    assert choose_device("cpu") == CPU


def test_each_rank_takes_the_gpu_of_its_number(gpus):
    gpus(2)
    assert choose_device("auto", ranks(2, local_rank=1)) == torch.device("cuda:1")
    assert choose_device("cuda", ranks(1)) == CUDA
    assert choose_device("cpu", ranks(4, local_rank=3)) == CPU


@pytest.mark.parametrize(
    "count, name, group, message",
    [
        (0, "cuda", None, "--device cuda: PyTorch sees no CUDA GPU here; use --device cpu"),
        (2, "cuda:1", ranks(2), "--device cuda:1 with 2 ranks: each takes .*CUDA_VISIBLE_DEVICES"),
        (2, "auto", ranks(3, 2), "3 ranks, but 2 GPUs on this machine: give a smaller --nproc"),
    ],
)
def test_a_device_that_is_not_there_is_refused(count, name, group, message, gpus):
    gpus(count)
    with pytest.raises(ValueError, match=message):
        choose_device(name, group)


def test_the_arithmetic_is_bfloat16_where_the_gpu_has_it(gpus):
    gpus(1)
    assert choose_dtype("auto", CUDA) == torch.bfloat16
    gpus(1, has_bfloat16=False)
    assert choose_dtype("auto", CUDA) == choose_dtype("auto", CPU) == torch.float32
    assert choose_dtype("float16", CPU) == torch.float16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matrix_products_run_in_the_arithmetic(dtype):
    compute, layer = Compute(SimpleNamespace(device="cpu", dtype=dtype)), torch.nn.Linear(3, 2)
    with compute.autocast():
        out = layer(torch.ones(1, 3))
    assert out.dtype == getattr(torch, dtype) and layer.weight.dtype == torch.float32
    moved = compute.to_device({"x": torch.ones(2), "y": torch.zeros(1)})
    assert moved.keys() == {"x", "y"} and moved["x"].device == CPU and compute.sum(3) == 3.0


def test_a_seed_decides_all_generators():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    seed_everything(7)
    first = draw()
    assert draw() != first
    seed_everything(7)
    assert draw() == first
    seed_everything(2**32 + 7)  # NumPy takes 32 bits
    assert draw()[1] == first[1]


def test_evaluation_mode_ends_also_after_an_error():
    model = torch.nn.Linear(1, 1)
    for was_training in (True, False):
        model.train(was_training)
        with pytest.raises(KeyError), evaluating(model):
            assert not model.training and not torch.is_grad_enabled()
            raise KeyError
        assert model.training == was_training and torch.is_grad_enabled()


def test_memory_that_ran_out_is_recognized():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("[enforce fail] can't allocate memory: you tried ..."))
    assert not is_out_of_memory(RuntimeError("shapes do not fit")) and not is_out_of_memory(None)


# --- signals ---


def test_a_second_ctrl_c_stops_at_once():
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGTERM)  # no second Ctrl-C
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_hangup_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received == signal.SIGHUP


def test_torchrun_passes_a_ctrl_c_on_that_the_terminal_has_sent_already(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    signals, clock = StopSignals(), SimpleNamespace(now=100.0)
    monkeypatch.setattr(process.time, "monotonic", lambda: clock.now)
    signals.note(signal.SIGINT, None)
    clock.now += 1.0
    signals.note(signal.SIGINT, None)  # the same keystroke
    clock.now += 2.0
    with pytest.raises(KeyboardInterrupt):
        signals.note(signal.SIGINT, None)


def test_only_rank_0_says_that_it_stops(monkeypatch, capfd):
    for rank, said in (("1", ""), ("0", "stopping after this step; Ctrl-C again stops at once")):
        monkeypatch.setenv("RANK", rank)
        StopSignals().note(signal.SIGTERM, None)
        assert capfd.readouterr().err.strip().startswith(said)


def test_outside_of_the_main_thread_signals_stay_with_the_caller():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    seen = []

    def enter():
        with StopSignals() as signals:
            seen.append(signals.received)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [None]
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

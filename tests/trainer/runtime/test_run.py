"""One optimizer step against plain PyTorch; the seeds, the plan of memory and the end of a run."""

import math
import signal
from types import SimpleNamespace

import pytest
import torch

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from tests.helpers.networks import SMALL
from trainer.runtime.optimizers import OptimizerGroup, build_optimizer
from trainer.runtime.run import Inspected, Run
from trainer.runtime.stage_args import TrainArgs

X = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.5, 2.0], [0.0, 1.0, -2.0]])


def make_run(**changes):
    return Run(TrainArgs(**{"device": "cpu", **changes}))


def linear():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


def tiny():
    torch.manual_seed(0)
    return MiniMindForCausalLM(MiniMindConfig(**SMALL))


def weights(model):
    return {name: x.detach().clone() for name, x in model.named_parameters()}


def assert_equal(a, b, **tolerance):
    torch.testing.assert_close(a, b, **{"rtol": 0, "atol": 0, **tolerance})


def step(run, model, optimizer, loss=1.0):
    """One step on X, a row at a time."""
    for number, row in enumerate(X):
        with run.micro_step(is_last=number == 2):
            run.backward(model(row).square().sum() / 3)
    return run.clip_and_step(model, optimizer, loss)


# --- the step ---


@pytest.mark.parametrize("grad_clip", [0.0, 0.05, 1e3])
def test_steps_are_those_of_plain_pytorch(grad_clip):
    run, model, plain = make_run(grad_clip=grad_clip), linear(), linear()
    ours, theirs = (torch.optim.AdamW(x.parameters(), lr=0.1) for x in (model, plain))
    for _ in range(3):
        update = step(run, model, ours, loss=2.5)
        for row in X:
            (plain(row).square().sum() / 3).backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), grad_clip or math.inf)
        theirs.step()
        theirs.zero_grad()
        assert_equal(weights(model), weights(plain))
        assert update == (2.5, norm.item(), True) and update.grad_norm > 0.05
        assert all(x.grad is None for x in model.parameters())


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_left_out_and_forgotten(bad):
    run, model = make_run(), linear()
    optimizer, before = torch.optim.SGD(model.parameters(), lr=0.1), weights(model)
    run.backward(model(X).sum() * (math.nan if bad == "gradient" else 1))
    update = run.clip_and_step(model, optimizer, math.inf if bad == "loss" else 1.0)
    assert not update.is_finite
    assert math.isnan(update.grad_norm) if bad == "gradient" else math.isinf(update.loss)
    assert_equal(weights(model), before)
    assert all(x.grad is None for x in model.parameters())
    assert step(run, model, optimizer).is_finite and not torch.equal(model.weight, before["weight"])


def test_float16_scales_the_loss_and_unscales_the_gradients():
    run, model, plain = make_run(dtype="float16", grad_clip=5e-3), linear(), linear()
    ours, theirs = (torch.optim.SGD(x.parameters(), lr=10) for x in (model, plain))
    with run.micro_step(is_last=True):
        loss = 1e-3 * model(X).float().square().sum()
        run.backward(loss)
    assert 10 < model.weight.grad.abs().max() < math.inf  # scaled
    update = run.clip_and_step(model, ours, loss.item())
    (1e-3 * plain(X).square().sum()).backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 5e-3)
    theirs.step()
    assert norm > 5e-3 and update.is_finite
    assert update.grad_norm == pytest.approx(norm.item(), rel=1e-2)
    assert_equal(weights(model), weights(plain), atol=2e-3)


def test_an_overflow_in_float16_halves_the_scale_and_is_no_bad_step():
    run, model = make_run(dtype="float16"), linear()
    optimizer, before = torch.optim.SGD(model.parameters(), lr=0.1), weights(model)
    run.scaler.scale(torch.zeros(1))  # as backward does
    scale = run.scaler.get_scale()
    for x in model.parameters():
        x.grad = torch.full_like(x, math.inf)
    update = run.clip_and_step(model, optimizer, 1.0)
    assert update.is_finite and math.isinf(update.grad_norm)
    assert run.scaler.get_scale() == scale / 2
    assert_equal(weights(model), before)


def test_an_overflow_at_a_scale_of_1_is_a_bad_step(monkeypatch):
    run, model = make_run(dtype="float16"), linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.scaler.scale(torch.zeros(1))
    monkeypatch.setattr(run.scaler, "get_scale", lambda: 1.0)
    for x in model.parameters():
        x.grad = torch.full_like(x, math.inf)
    assert not run.clip_and_step(model, optimizer, 1.0).is_finite


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_several_optimizers_step_as_one_and_share_the_norm(dtype):
    run, model = make_run(dtype=dtype, grad_clip=0.5), linear()
    parts = [torch.optim.SGD([x], lr=0.1) for x in model.parameters()]
    run.scaler.scale(torch.zeros(1))
    scale, before = run.scaler.get_scale(), weights(model)
    model.weight.grad = torch.full_like(model.weight, 3.0 * scale)
    model.bias.grad = torch.full_like(model.bias, 4.0 * scale)
    update = run.clip_and_step(model, OptimizerGroup(*parts), 1.0)
    norm = (6 * 9 + 2 * 16) ** 0.5
    assert update.grad_norm == pytest.approx(norm)
    expected = {"weight": 3.0, "bias": 4.0}
    moved = {name: before[name] - 0.1 * 0.5 / norm * x for name, x in expected.items()}
    assert_equal(weights(model), moved, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "overflown", ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"]
)
def test_an_overflow_for_one_optimizer_stops_the_other_too(overflown):
    """float16: nothing is learned from such a step, and the scale is halved; the next one is
    applied.
    """
    model = tiny()
    optimizer = build_optimizer(model, TrainArgs(optimizer="muon"))
    run = make_run(dtype="float16")
    run.scaler.scale(torch.zeros(1))
    scale, before = run.scaler.get_scale(), weights(model)
    for bad in (True, False):
        for name, x in model.named_parameters():
            x.grad = torch.full_like(x, math.inf if bad and name == overflown else 1.0)
        assert run.clip_and_step(model, optimizer, 1.0).is_finite
        assert all(torch.equal(x, before[name]) for name, x in model.named_parameters()) == bad
        assert run.scaler.get_scale() == scale / 2


def test_the_parts_of_several_ranks_add_up():
    """The exchange of gradients takes a mean over the ranks, so each part counts as often."""
    run, model = make_run(), linear()
    run.backward(model(X).sum())
    alone = model.weight.grad.clone()
    model.weight.grad = None
    run.ranks.world_size = 4
    run.backward(model(X).sum())
    assert torch.equal(model.weight.grad, 4 * alone)


def test_the_forward_of_a_micro_batch_runs_in_the_arithmetic_and_the_backward_outside():
    run, model = make_run(dtype="bfloat16"), linear()
    with run.micro_step(is_last=True):
        out = model(X)
        assert out.dtype == torch.bfloat16 and torch.is_autocast_enabled("cpu")
        out.register_hook(lambda grad: seen.append(torch.is_autocast_enabled("cpu")))
        seen = []
        run.backward(out.float().sum())
    assert seen == [False] and model.weight.grad.dtype == torch.float32


def test_targets_are_counted_over_all_micro_batches():
    labels = [torch.tensor([[-100, 3, 4]]), torch.tensor([[-100, -100], [5, 0]])]
    assert make_run().count_targets([{"labels": x} for x in labels]) == 4.0


def test_the_wrapped_network_recomputes_layers_or_is_compiled():
    run, model = make_run(gradient_checkpointing=True), tiny()
    assert run.wrap(model) is model is run.net and model.is_gradient_checkpointing
    run, model = make_run(use_compile=True), linear()
    assert run.wrap(model) is run.net is not model and run.net._orig_mod is model


# --- seeds ---


def test_a_seed_of_its_own_for_each_step_rank_and_run():
    def draw(step, rank=0, seed=42):
        run = make_run(seed=seed)
        run.ranks.rank = rank
        run.seed(step)
        return torch.rand(1).item()

    assert draw(3) == draw(3)
    assert len({draw(3), draw(4), draw(3, rank=1), draw(3, seed=43)}) == 4


def test_all_ranks_begin_with_the_same_weights():
    seen = []
    for _ in range(2):
        make_run()
        seen.append(torch.rand(1).item())
    make_run(seed=1)
    assert seen[0] == seen[1] != torch.rand(1).item()


def test_deterministic_kernels_on_demand(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    make_run()
    make_run(deterministic=True)
    assert asked == [True]


# --- the end ---


def test_a_run_that_shows_its_data_ends_quietly_and_closes_its_contexts():
    closed = []
    for error in (None, Inspected, KeyError):
        run = make_run()
        run.contexts.callback(closed.append, error)
        if error is KeyError:
            with pytest.raises(KeyError), run:
                raise KeyError
        else:
            with run:
                if error:
                    raise error
    assert closed == [None, Inspected, KeyError]


def out_of_memory(run):
    with pytest.raises(MemoryError) as caught, run:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore lines")
    return str(caught.value)


def test_memory_that_ran_out_before_the_weights_were_there():
    text = out_of_memory(make_run())
    assert text.startswith("out of memory on cpu: CUDA out of memory. Tried to allocate 2 GiB.")
    assert "more lines" not in text and "is saved" not in text
    assert "the weights and their optimizer are too large: distribute them over GPUs" in text
    assert text.endswith("choose a smaller --preset")


def test_memory_that_ran_out_in_a_step():
    run = make_run(batch_size=4)
    run.estimate_memory(tiny())
    assert " Fix: --batch_size 2 --accumulation_steps 2 gives the same update" in out_of_memory(run)
    run.saved_step = 8
    text = out_of_memory(run)
    assert (
        " Step 8 is saved. Fix: --batch_size 2 --accumulation_steps 2 --from_resume gives" in text
    )


def test_the_estimate_of_memory_is_of_the_trained_weights_and_the_sharding(monkeypatch):
    seen = []
    monkeypatch.setattr("trainer.runtime.run.StepMemory", lambda *given: seen.append(given[-1]))
    model = tiny()
    model.lm_head.requires_grad_(False)
    run = make_run(optimizer="muon")
    run.estimate_memory(model)
    run.args.deepspeed = "trainer/ds_zero3_offload.json"
    run.ranks.world_size = 2
    run.estimate_memory(model)
    trained = sum(x.numel() for x in model.parameters() if x.requires_grad)
    assert 0 < trained < model.num_parameters()
    plain, sharded = seen
    assert (plain.trained, plain.optimizer, plain.zero_stage) == (trained, "muon", 0)
    assert (sharded.zero_stage, sharded.world_size, sharded.offload_optimizer) == (3, 2, True)


def test_a_run_in_words(capsys):
    run = make_run(dtype="bfloat16")
    assert str(run) == "cpu in bfloat16"
    run.print0("one", 2)
    run.ranks.world_size, run.ranks.is_main_process = 3, False
    run.print0("not from here")
    assert str(run) == "3 ranks of cpu in bfloat16" and capsys.readouterr().out == "one 2\n"


def test_a_stop_on_one_rank_stops_all():
    run = make_run()
    assert not run.stop_asked()
    run.signals.received = signal.SIGTERM
    assert run.stop_asked()
    run.signals.received, run.ranks = None, SimpleNamespace(any=lambda flag: True)
    assert run.stop_asked()

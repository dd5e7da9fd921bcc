"""Schedules against values by hand, decay, Muon against PyTorch's, several optimizers as one."""

import pytest
import torch

from tests.helpers.toy_runs import toy_args, toy_network, toy_run
from trainer.runtime.optimizers import (
    Muon,
    OptimizerGroup,
    build_optimizer,
    learning_rate_at,
    orthogonalize,
    set_learning_rate,
)


def rates(num_steps, **changes):
    """The learning rates of all steps."""
    flags = dict(learning_rate=1.0, warmup_ratio=0.2, min_lr_ratio=0.1) | changes
    return [learning_rate_at(step, num_steps, toy_args(**flags)) for step in range(num_steps)]


def test_cosine():
    found = rates(10)
    assert found[:3] == [0.5, 1.0, 1.0] and found[9] == pytest.approx(0.1)
    assert found[2:] == sorted(found[2:], reverse=True)
    assert rates(9)[5] == pytest.approx(0.55)  # half way down


def test_warmup_stable_decay():
    expected = [0.5, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325, 0.1]
    assert rates(10, schedule="wsd", decay_ratio=0.4) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_one_step_and_no_warmup_are_defined(schedule):
    decay = {"decay_ratio": 0.0} if schedule == "wsd" else {}
    assert rates(1, warmup_ratio=0.0, schedule=schedule, **decay) == [pytest.approx(1.0)]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_learning_rate_is_set_in_all_groups(kind):
    optimizer = build_optimizer(toy_network(), toy_args(optimizer=kind))
    set_learning_rate(optimizer, 0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_matrices_decay_and_norms_do_not(kind, tmp_path):
    model = toy_network(qk_norm=True)
    flags = dict(learning_rate=0.1, weight_decay=0.5, optimizer=kind, grad_clip=0.0)
    run, optimizer = toy_run(tmp_path / "toy", **flags), build_optimizer(model, toy_args(**flags))
    for x in model.parameters():
        x.grad = torch.zeros_like(x)
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    run.clip_and_step(model, optimizer, 0.0)
    for name, x in model.named_parameters():
        expected = before[name] if "norm" in name else before[name] * 0.95
        torch.testing.assert_close(x.detach(), expected)


def test_muon_trains_the_layers_matrices_but_the_router():
    model = toy_network(num_experts=4)
    muon, adamw = build_optimizer(model, toy_args(optimizer="muon")).parts
    names = {x: name for name, x in model.named_parameters()}
    ours = {names[x] for group in muon.param_groups for x in group["params"]}
    theirs = {names[x] for group in adamw.param_groups for x in group["params"]}
    assert ours | theirs == set(names.values()) and not ours & theirs
    assert all(".layers." in name and "norm" not in name for name in ours)
    assert {"model.embed_tokens.weight", "model.layers.0.mlp.gate.weight"} <= theirs


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (3, 16, 24)])
def test_orthogonalize_keeps_directions_and_evens_out_lengths(shape):
    x = torch.randn(shape)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    out = orthogonalize(x)
    assert torch.linalg.svdvals(out).min() > 0.6 and torch.linalg.svdvals(out).max() < 1.25
    along = torch.einsum("...mi,...mn,...in->...i", u, out, v)
    torch.testing.assert_close(
        along.sum(-1), torch.linalg.svdvals(out).sum(-1), rtol=1e-3, atol=1e-3
    )


def test_muon_equals_pytorchs():
    ours, theirs = (
        torch.nn.Parameter(torch.randn(24, 40, generator=torch.Generator().manual_seed(0)))
        for _ in range(2)
    )
    start = ours.detach().clone()
    mine = Muon([ours], lr=0.1, weight_decay=0.1)
    reference = torch.optim.Muon(
        [theirs], lr=0.1, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(4):
        ours.grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(step + 1))
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    assert (ours - theirs).norm() < 0.02 * (theirs - start).norm()  # PyTorch iterates in bfloat16


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_frozen_parameters_have_no_states(kind):
    """And a single trained matrix makes one group alone, which both kinds step, save and load."""
    model = toy_network().requires_grad_(False)
    name = "model.layers.0.self_attn.q_proj.weight"
    trained = model.get_parameter(name).requires_grad_(True)
    args = toy_args(optimizer=kind, weight_decay=0.5)
    optimizer = build_optimizer(model, args)
    assert [group["params"] for group in optimizer.param_groups] == [[trained]]
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model(torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    optimizer.step()
    after = model.state_dict()
    assert [x for x in after if not torch.equal(after[x], before[x])] == [name]
    build_optimizer(model, args).load_state_dict(optimizer.state_dict())


def test_several_optimizers_save_and_load_as_one():
    """By the names of their classes; the states are each one's own."""
    model = toy_network()
    optimizer = build_optimizer(model, toy_args(optimizer="muon"))
    assert isinstance(optimizer, OptimizerGroup) and len(optimizer.param_groups) == 3
    model(torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    for part in optimizer.parts:
        part.step()
    optimizer.zero_grad()
    assert all(x.grad is None for x in model.parameters())
    state = optimizer.state_dict()
    assert state.keys() == {"Muon", "AdamW"}
    other = build_optimizer(toy_network(), toy_args(optimizer="muon"))
    other.load_state_dict(state)
    torch.testing.assert_close(other.state_dict(), state, rtol=0, atol=0)

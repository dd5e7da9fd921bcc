"""Schedules against values worked out by hand, and which parameters decay."""

from types import SimpleNamespace

import pytest
import torch

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer.arguments import TrainArgs
from trainer.muon import Muon, orthogonalize
from trainer.optim import build_optimizer, learning_rate_at
from trainer.run import Run


def schedule(**changes):
    options = dict(learning_rate=1.0, warmup_share=0.2, min_lr_share=0.1, decay_share=0.4, schedule="cosine", **changes)
    return SimpleNamespace(**options)


def test_cosine():
    rates = [learning_rate_at(step, 10, schedule()) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[9] == pytest.approx(0.1)
    assert learning_rate_at(5, 9, SimpleNamespace(**{**vars(schedule()), "warmup_share": 0.2})) == pytest.approx(0.55)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_warmup_stable_decay():
    args = SimpleNamespace(**{**vars(schedule()), "schedule": "wsd"})
    rates = [learning_rate_at(step, 10, args) for step in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325, 0.1])


def test_one_step_and_no_warmup_are_defined():
    for kind in ("cosine", "wsd"):
        args = SimpleNamespace(learning_rate=1.0, warmup_share=0.0, min_lr_share=0.1, decay_share=0.0, schedule=kind)
        assert learning_rate_at(0, 1, args) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_matrices_decay_and_norms_do_not(kind):
    model = MiniMindForCausalLM(MiniMindConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                               num_key_value_heads=1, intermediate_size=16, qk_norm=True))
    optimizer = build_optimizer(model, SimpleNamespace(learning_rate=0.1, weight_decay=0.5, beta2=0.95, optimizer=kind))
    for x in model.parameters():
        x.grad = torch.zeros_like(x)
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    Run(TrainArgs(device="cpu", grad_clip=0.0)).clip_and_step(model, optimizer, 0.0)
    for name, x in model.named_parameters():
        torch.testing.assert_close(x.detach(), before[name] if "norm" in name else before[name] * 0.95)


@pytest.mark.parametrize("overflown", ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_what_overflows_for_one_optimizer_stops_the_other_too(overflown):
    """float16: nothing is learned from such a step, and the scale is halved; the next one is applied."""
    model = MiniMindForCausalLM(MiniMindConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                               num_key_value_heads=1, intermediate_size=16))
    optimizer = build_optimizer(model, TrainArgs(optimizer="muon"))
    run = Run(TrainArgs(device="cpu", dtype="float16"))
    run.scaler.scale(torch.zeros(1))  # as backward does
    scale, before = run.scaler.get_scale(), {name: x.detach().clone() for name, x in model.named_parameters()}
    for bad in (True, False):
        for name, x in model.named_parameters():
            x.grad = torch.full_like(x, float("inf") if bad and name == overflown else 1.0)
        run.clip_and_step(model, optimizer, 1.0)
        assert all(torch.equal(x, before[name]) for name, x in model.named_parameters()) == bad
        assert run.scaler.get_scale() == scale / 2 and not run.guard.in_a_row


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (3, 16, 24)])
def test_orthogonalize_keeps_directions_and_evens_out_lengths(shape):
    x = torch.randn(shape)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    out = orthogonalize(x)
    assert torch.linalg.svdvals(out).min() > 0.6 and torch.linalg.svdvals(out).max() < 1.25
    along = torch.einsum("...mi,...mn,...in->...i", u, out, v)
    torch.testing.assert_close(along.sum(-1), torch.linalg.svdvals(out).sum(-1), rtol=1e-3, atol=1e-3)


def test_muon_equals_pytorchs():
    ours, theirs = (torch.nn.Parameter(torch.randn(24, 40, generator=torch.Generator().manual_seed(0))) for _ in range(2))
    start = ours.detach().clone()
    mine = Muon([ours], lr=0.1, weight_decay=0.1)
    reference = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        ours.grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(step + 1))
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    assert (ours - theirs).norm() < 0.02 * (theirs - start).norm()  # PyTorch iterates in bfloat16


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_frozen_parameters_have_no_states(kind):
    """And where a single matrix is trained, there is one group alone, which both kinds can step, save and load."""
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                                               intermediate_size=16)).requires_grad_(False)
    trained = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    args = TrainArgs(optimizer=kind, weight_decay=0.5)
    optimizer = build_optimizer(model, args)
    assert [group["params"] for group in optimizer.param_groups] == [[trained]]
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model(torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    optimizer.step()
    assert [name for name, x in model.state_dict().items() if not torch.equal(x, before[name])] == [
        "model.layers.0.self_attn.q_proj.weight"]
    build_optimizer(model, args).load_state_dict(optimizer.state_dict())

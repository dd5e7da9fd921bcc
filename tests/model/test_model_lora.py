"""Adapters compute what PEFT computes: trained by us and read by PEFT, trained by PEFT and read by
us, merged, and several.
"""

import json
import warnings
from functools import partial
from itertools import product

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.init import kaiming_uniform_
from transformers import AutoModelForCausalLM

from model.engine import Engine
from model.model_lora import (
    AdapterOnly,
    LoRASettings,
    adapter_names,
    add_adapter,
    fold_adapters,
    free_name,
    load_adapter,
    merge_adapter,
    read_adapter,
    set_adapter,
)
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.native_format import network_sha256
from model.sampling import SamplingParams
from tests.helpers.networks import SMALL

SHAPE = dict(SMALL, vocab_size=96)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
NETWORKS = {  # each is written as the standard architecture of that name
    "llama": {},
    "qwen3": dict(qk_norm=True),
    "qwen3_moe": dict(qk_norm=True, **MOE),
    "granitemoeshared": dict(norm_topk_prob=True, shared_expert_intermediate_size=40, **MOE),
    "minimind": dict(qk_norm=True, shared_expert_intermediate_size=40, **MOE),
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
EXPERTS = ["gate_up_proj", "down_proj"]
SHARED = ["input_linear", "output_linear"]
TARGETS = {  # PEFT's names of all layers that we adapt
    "llama": dict(target_modules=ATTENTION + FEED_FORWARD),
    "qwen3": dict(target_modules=ATTENTION + FEED_FORWARD),
    "qwen3_moe": dict(target_modules=ATTENTION, target_parameters=EXPERTS),
    "granitemoeshared": dict(target_modules=ATTENTION + SHARED, target_parameters=EXPERTS),
}
DORA, RSLORA = {"use_dora": True}, {"use_rslora": True}


def on(*target_modules, **options):
    return {"target_modules": list(target_modules), **options}


SOME = ({}, RSLORA, on("q_proj", "v_proj"), on("q_proj", "v_proj", **DORA))
KINDS = [
    *product(NETWORKS, SOME),
    ("llama", DORA),
    ("qwen3", DORA | RSLORA),
    ("llama", on("layers.1.mlp.up_proj", "layers.0.self_attn.o_proj")),
    ("qwen3_moe", on("down_proj")),
    ("qwen3_moe", on("gate_up_proj", "k_proj")),
    ("qwen3_moe", on("layers.1.mlp.experts.down_proj", "layers.0.mlp.experts.gate_up_proj")),
    ("granitemoeshared", on("shared_expert.gate_proj", "up_proj", **DORA)),
    ("granitemoeshared", on("shared_expert.down_proj", "experts.down_proj")),
    ("minimind", on("gate_proj", **DORA)),
]


def network(kind="qwen3", seed=0, **changes):
    torch.manual_seed(seed)
    return MiniMindForCausalLM(MiniMindConfig(**{**SHAPE, **NETWORKS[kind], **changes})).eval()


def ids():
    return torch.arange(20, 60).view(2, 20)


def logits(model):
    with torch.no_grad():
        return model(ids()).logits


def randomize(model):
    """Set all adapters' parameters off their beginning."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if ".lora" in name:
                x.add_(torch.randn_like(x) * 0.3)


def ours_on_disk(folder, kind, **options):
    """Save a network and a random adapter that we made for it; returns the adapted network."""
    model, settings = network(kind), LoRASettings(rank=3, alpha=8, **options)
    model.save_pretrained(folder / "base")
    add_adapter(model, settings)
    randomize(model)
    AdapterOnly(model, settings, folder / "base").save_pretrained(folder / "adapter")
    return model


def peft_on_disk(folder, kind="qwen3", seed=0, **options):
    """Save a random adapter that PEFT made for transformers' network; returns both."""
    network(kind).save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, **TARGETS[kind], **options})
    peft = get_peft_model(base, config).eval()
    randomize(peft)
    with torch.no_grad():
        for name, x in peft.named_parameters():
            if ".lora" in name:
                x.add_(torch.randn_like(x) * 0.3 * seed)
    peft.save_pretrained(folder / "adapter")
    return peft


def read_by_peft(folder):
    """transformers' network with PEFT's adapter; fails on a key that is missing or left over."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base", trust_remote_code=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return PeftModel.from_pretrained(base, folder / "adapter").eval()


# ---- one adapter, against PEFT


@pytest.mark.parametrize("kind, options", KINDS)
def test_peft_reads_what_we_write(kind, options, tmp_path):
    model = ours_on_disk(tmp_path, kind, **options)
    expected = logits(model)
    assert (expected - logits(network(kind))).abs().max() > 0.05
    peft = read_by_peft(tmp_path)
    torch.testing.assert_close(logits(peft), expected, rtol=1e-4, atol=2e-5)
    count = sum(x.numel() for name, x in peft.named_parameters() if ".lora" in name)
    if kind != "granitemoeshared":  # whose block-diagonal matrices have zeros
        assert count == sum(x.numel() for x in model.parameters() if x.requires_grad)
    torch.testing.assert_close(logits(fold_adapters(model)), expected, rtol=1e-4, atol=2e-5)
    assert model.state_dict().keys() == network(kind).state_dict().keys()


@pytest.mark.parametrize("kind, options", KINDS)
def test_what_we_write_comes_back_bit_for_bit(kind, options, tmp_path):
    model = ours_on_disk(tmp_path, kind, **options)
    settings = LoRASettings(rank=3, alpha=8, **options)
    expected = AdapterOnly(model, settings, "").state_dict()
    fresh = network(kind)
    add_adapter(fresh, settings)
    part = AdapterOnly(fresh, settings, "")
    state = part.read_weights(tmp_path / "adapter")
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    part.load_state_dict(state)
    assert torch.equal(logits(fresh), logits(model))


OUT, GATE_UP = "layers.1.mlp.experts.down_proj", "experts.gate_up_proj"


@pytest.mark.parametrize(
    "kind, options",
    [
        *product(TARGETS, ({}, RSLORA)),
        ("llama", DORA),
        ("qwen3", DORA | RSLORA),
        ("granitemoeshared", on("input_linear", "q_proj", target_parameters=None, **DORA)),
        ("qwen3", on("q_proj", "v_proj")),
        ("qwen3", {"target_modules": r".*layers\.1.*\.(up|k)_proj"}),
        ("qwen3", dict(rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.up_proj": 32})),
        ("qwen3_moe", dict(rank_pattern={"gate_up_proj": 2}, alpha_pattern={OUT: 32})),
        # PEFT turns these into experts; all-linear has the router among them
        ("qwen3_moe", on("q_proj", *FEED_FORWARD, target_parameters=None)),
        ("qwen3_moe", {"target_modules": "all-linear", "target_parameters": None}),
        ("qwen3_moe", on(target_parameters=["mlp.experts.down_proj"])),
        ("granitemoeshared", on("o_proj", target_parameters=[GATE_UP, "router.weight"])),
    ],
)
def test_we_read_what_peft_writes(kind, options, tmp_path):
    expected = logits(peft_on_disk(tmp_path, kind, **options))
    bare = logits(network(kind))
    assert (expected - bare).abs().max() > 0.05
    model = network(kind)
    load_adapter(model, tmp_path / "adapter", "theirs")
    assert torch.equal(logits(model), bare)  # it is off
    set_adapter(model, "theirs")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=2e-5)
    merged = merge_adapter(network(kind), tmp_path / "adapter")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("llama", {}),
        ("qwen3", RSLORA),
        ("qwen3", DORA),
        ("qwen3_moe", {}),
        ("granitemoeshared", {}),
    ],
)
def test_gradients_are_those_of_peft(kind, options, tmp_path):
    """Of the same loss, on transformers' network, through PEFT's layers; read back as if they were
    an adapter.
    """
    model = ours_on_disk(tmp_path, kind, **options)
    settings = LoRASettings(rank=3, alpha=8, **options)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peft = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).eval()
    for net in (model, peft):
        predicted = net(ids()).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(predicted, ids()[:, 1:].flatten()).backward()
    ours = {name: x.grad for name, x in model.named_parameters() if x.requires_grad}
    assert ours and all(x.grad is None for x in model.parameters() if not x.requires_grad)
    if kind == "granitemoeshared":
        # the zeros of the block-diagonal matrix have gradients there, and are not trained here
        for name, x in peft.named_parameters():
            if "input_linear.lora_B" in name:
                x.grad.mul_(torch.block_diag(*[torch.ones(40, 3)] * 2))
    with torch.no_grad():
        for x in peft.parameters():
            if x.grad is not None:
                x.copy_(x.grad)
    peft.save_pretrained(tmp_path / "gradients")
    with pytest.raises(ValueError, match="was trained on another network"):  # PEFT does not say
        AdapterOnly(model, settings, "").read_weights(tmp_path / "gradients")
    part = AdapterOnly(model, settings, "")
    part.base_sha256 = None
    theirs = part.read_weights(tmp_path / "gradients")
    assert theirs.keys() == ours.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-6)


def test_an_adapter_begins_as_in_peft():
    model, before = network(), logits(network())
    torch.manual_seed(5)
    add_adapter(model, LoRASettings(rank=4, **on("layers.0.self_attn.q_proj", **DORA)))
    torch.manual_seed(5)
    layer = model.model.layers[0].self_attn.q_proj
    low_rank, expected = layer.lora["weight"]["default"], torch.empty(4, 32)
    kaiming_uniform_(expected, a=5**0.5)
    torch.testing.assert_close(low_rank.A.data, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(low_rank.magnitude.data, layer.weight.norm(dim=1))
    assert not low_rank.B.any() and low_rank.scale == 8
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)
    model = network("qwen3_moe")
    add_adapter(model, LoRASettings(rank=4))
    A = model.model.layers[0].mlp.experts.lora["down_proj"]["default"].A
    # the fan is that of one expert
    assert A.shape == (4, 4, 24) and 0.95 * 24**-0.5 < A.abs().max() <= 24**-0.5
    torch.testing.assert_close(logits(model), logits(network("qwen3_moe")), rtol=1e-5, atol=1e-6)


# ---- training


def test_only_the_adapter_is_trained_and_weights_keep_their_names():
    model, bare = network("granitemoeshared"), network("granitemoeshared").state_dict()
    add_adapter(model, LoRASettings(rank=2))
    trained = {name for name, x in model.named_parameters() if x.requires_grad}
    D, kv, F, shared, E = 32, 16, 24, 40, 4
    per_layer = 4 * D + 2 * (D + kv) * 2 + E * (D + 2 * F + F + D) * 2 + 3 * (D + shared) * 2
    assert sum(model.get_parameter(name).numel() for name in trained) == 2 * (per_layer + 4 * D)
    result = model.load_state_dict(bare, strict=False)
    assert not result.unexpected_keys and set(result.missing_keys) == trained
    assert all("lora" in name for name in trained)


@pytest.mark.parametrize("kind, options", [("qwen3", {}), ("qwen3", DORA), ("qwen3_moe", {})])
def test_compiled_and_checkpointed_training_is_the_same(kind, options):
    """Logits and gradients, of packed documents; graphs of the whole network, though without the
    C++ that they could become.
    """
    batch = dict(input_ids=ids(), position_ids=torch.arange(20).remainder(7)[None].expand(2, 20))
    results = []
    for way in ("eager", "compiled", "checkpointed"):
        model = network(kind, num_hidden_layers=1).train()
        add_adapter(model, LoRASettings(rank=4, **options))
        randomize(model)
        if way == "checkpointed":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        net = torch.compile(model, backend="aot_eager") if way == "compiled" else model
        out = net(**batch).logits
        out.square().sum().backward()
        results.append([out.detach(), *(x.grad for x in model.parameters() if x.requires_grad)])
    assert len(results[0]) > 10 and all(x.any() for x in results[0])
    for result in results[1:]:
        for ours, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)


def test_a_compiled_layer_is_the_same():
    """To machine code and back."""
    model = network(num_hidden_layers=1)
    add_adapter(model, LoRASettings(rank=4, use_dora=True, target_modules=["q_proj"]))
    randomize(model)
    layer, x = model.model.layers[0].self_attn.q_proj, torch.randn(6, 32)
    results = []
    for net in (layer, torch.compile(layer)):
        out = net(x)
        grads = torch.autograd.grad(out.square().sum(), list(layer.lora.parameters()))
        results.append((out, *grads))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_dropout_is_of_the_adapter_alone_and_of_training_alone():
    model = network()
    add_adapter(model, LoRASettings(rank=4, dropout=0.5))
    bare = logits(network())
    torch.testing.assert_close(logits(model.train()), bare, rtol=1e-5, atol=1e-6)  # B is 0
    randomize(model)
    assert not torch.equal(logits(model), logits(model))
    assert torch.equal(logits(model.eval()), logits(model))
    layer, x = model.model.layers[0].self_attn.q_proj.train(), torch.randn(5000, 32)
    low_rank = layer.lora["weight"]["default"]
    torch.manual_seed(3)
    ours = layer(x)
    torch.manual_seed(3)
    mask = torch.nn.functional.dropout(torch.ones_like(x), 0.5)
    expected = x @ layer.weight.T + 2 * 4 * ((x * mask) @ low_rank.A.T @ low_rank.B.T)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_autocast_stays_in_its_arithmetic():
    for kind, options in (("qwen3", {}), ("qwen3", DORA), ("qwen3_moe", {})):
        model = network(kind)
        add_adapter(model, LoRASettings(rank=4, **options))
        randomize(model)
        with torch.autocast("cpu", torch.bfloat16):
            low = model(ids()).logits
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), logits(model), rtol=0.1, atol=0.1)


# ---- several adapters


def test_adapters_are_switched_added_and_weighted(tmp_path):
    one = peft_on_disk(tmp_path / "one", **on("q_proj", "up_proj"))
    two = peft_on_disk(tmp_path / "two", seed=1, **on("q_proj", "down_proj", **RSLORA))
    first, second, bare = logits(one), logits(two), logits(network())
    one.load_adapter(tmp_path / "two" / "adapter", "two")
    one.base_model.set_adapter(["default", "two"])
    both = logits(one)
    model = network()
    for name in ("one", "two"):
        load_adapter(model, tmp_path / name / "adapter", name)
    assert adapter_names(model) == ["one", "two"]
    for names, expected in (
        ("two", second),
        (["one", "two"], both),
        (None, bare),
        ("one", first),
        ({"two": 1.0}, second),
        ({"one": 0.0}, bare),
    ):
        set_adapter(model, names)
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=2e-5)
    assert (both - first).abs().max() > 0.05
    folders = [tmp_path / name / "adapter" for name in ("two", "one")]
    merged = merge_adapter(network(), *folders)
    torch.testing.assert_close(logits(merged), both, rtol=1e-4, atol=2e-5)

    set_adapter(model, {"one": 0.5, "two": -2})
    layers = {name: read_adapter(tmp_path / name / "adapter") for name in ("one", "two")}
    by_hand = network()
    with torch.no_grad():
        for name, coef in (("one", 0.5), ("two", -2)):
            for layer, (A, B, scale, _) in layers[name].items():
                by_hand.get_parameter(f"{layer}.weight").add_(coef * scale * B @ A)
    torch.testing.assert_close(logits(model), logits(by_hand), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(fold_adapters(model)), logits(by_hand), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"no adapter 'one'; there are: none"):
        set_adapter(model, "one")


def test_the_sum_of_two_doras_is_that_of_their_changes(tmp_path):
    def weight(net):
        return net.model.layers[1].self_attn.q_proj.weight

    model, expected = network(), weight(network())
    for name, seed in (("one", 0), ("two", 1)):
        peft = peft_on_disk(tmp_path / name, seed=seed, **on("q_proj", **DORA))
        load_adapter(model, tmp_path / name / "adapter", name)
        expected = expected + weight(peft.merge_and_unload()) - weight(network())
    set_adapter(model, ["one", "two"])
    x, layer = torch.randn(3, 32), model.model.layers[1].self_attn.q_proj
    torch.testing.assert_close(layer(x), x @ expected.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight(fold_adapters(model)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_the_engine_decodes_with_what_is_switched_on(kind, tmp_path, tokenizer):
    model = network(kind, vocab_size=len(tokenizer))
    add_adapter(model, LoRASettings(rank=4), "one")
    randomize(model)
    engine, prompt = Engine(model, tokenizer, 2, 40), [5, 6, 7]
    greedy, found = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), {}
    for name in ("one", None, "one"):
        set_adapter(model, name)
        engine.refresh()
        (request,) = engine.generate([prompt], greedy)
        options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
        assert request.tokens == model.generate(torch.tensor([prompt]), **options)[0].tolist()
        assert found.setdefault(name, request.tokens) == request.tokens
    assert found["one"] != found[None]


# ---- mistakes


def test_an_adapter_for_another_network_changes_nothing(tmp_path):
    peft_on_disk(tmp_path)
    for shape, message in (
        (dict(num_hidden_layers=1), r"no linear layer model\.layers\.1"),
        (dict(hidden_size=64), r"down_proj is \[.*\] in the network"),
    ):
        other = network(**shape)
        before = {name: x.clone() for name, x in other.state_dict().items()}
        for change in (merge_adapter, partial(load_adapter, name="a")):
            with pytest.raises(ValueError, match=message):
                change(other, tmp_path / "adapter")
            assert other.state_dict().keys() == before.keys()
            assert all(torch.equal(x, before[name]) for name, x in other.state_dict().items())


INITS = ("pissa_niter_4", "OLoRA", "corda", "loftq", "lora_ga")


def test_faulty_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"adapter_config\.json cannot be read"):
        read_adapter(tmp_path)
    peft_on_disk(tmp_path, "qwen3_moe")
    folder = tmp_path / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    for change, message in (
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"bias": "all"}, "bias is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
        ({"lora_bias": True}, "lora_bias is not supported"),
        ({"r": 3}, "of rank 3"),
        ({"r": None}, "adapter_config.json: r None, lora_alpha 8 "),
        ({"r": 0}, "r 0, lora_alpha 8 "),
        ({"r": 4.0}, "r a whole number"),
        ({"lora_alpha": 0}, "r 4, lora_alpha 0 "),
        ({"lora_alpha": None}, "r 4, lora_alpha None "),
        ({"rank_pattern": {"q_proj": 0}}, "single layers"),
        ({"alpha_pattern": {"q_proj": "8"}}, "single layers"),
        ({"use_dora": True}, "has no lora_magnitude_vector, but use_dora is True"),
        *(({"init_lora_weights": how}, f"'{how}' has changed the network's") for how in INITS),
        ({"target_parameters": ["other"]}, "names no weight of model.layers.0.mlp.experts"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            read_adapter(folder)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="peft_type None"):
        read_adapter(folder)
    del config["r"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="r None"):
        read_adapter(folder)
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 4}))
    tensors = load_file(folder / "adapter_model.safetensors")
    halves = {name: x for name, x in tensors.items() if "lora_A" in name}
    for contents, message in (
        ({**tensors, "lm_head.weight": torch.ones(1)}, "holds lm_head.weight: only LoRA"),
        (halves, "has no lora_A and lora_B of rank 4"),
    ):
        save_file(contents, folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=message):
            read_adapter(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors cannot be read"):
        read_adapter(folder)


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("qwen3", on("w1"), f"no layer w1; there are {', '.join(ATTENTION + FEED_FORWARD)}"),
        ("qwen3_moe", on("gate_proj"), "no layer gate_proj; there are .*, gate_up_proj, down_proj"),
        ("qwen3_moe", on("gate"), "no layer gate;"),
        ("qwen3", on("lm_head"), "no layer lm_head"),
        ("qwen3_moe", DORA, "use_dora .* experts.* target_modules k_proj o_proj q_proj v_proj"),
        ("qwen3_moe", {"dropout": 0.1}, "dropout together with experts"),
        ("granitemoeshared", on("gate_proj"), "gate_proj and up_proj .* are one layer"),
    ],
)
def test_impossible_targets_are_refused_before_anything_changes(kind, options, message):
    model = network(kind)
    with pytest.raises(ValueError, match=message):
        add_adapter(model, LoRASettings(**options))
    assert all(x.requires_grad for x in model.parameters()) and not adapter_names(model)


def test_settings_and_names_out_of_range_are_refused():
    for options in ({"rank": 0}, {"alpha": 0}, {"dropout": 1.0}):
        with pytest.raises(ValueError, match=r"give a rank of 1 or more"):
            LoRASettings(**options)
    model = network()
    add_adapter(model, LoRASettings(rank=2), "one")
    for name, message in (
        ("one", "already"),
        ("a.b", "without dots"),
        ("keys", "cannot be named"),
        ("", "cannot be named"),
        ("training", "cannot be named"),
    ):
        with pytest.raises(ValueError, match=message):
            add_adapter(model, LoRASettings(rank=2), name)


def test_a_run_resumes_on_its_own_network_only(tmp_path):
    ours_on_disk(tmp_path, "llama")
    other, settings = network("llama", seed=7), LoRASettings(rank=3, alpha=8)
    add_adapter(other, settings)
    part = AdapterOnly(other, settings, "full_sft")
    with pytest.raises(ValueError, match=r"trained on another network than full_sft is now"):
        part.read_weights(tmp_path / "adapter")


def test_any_wish_becomes_a_name():
    model, names = network(), ["lora", "lora-2", "lora-3"]
    names += ["adapter-train", "adapter-training", "my_run_1", "adapter-"]
    wishes = ("lora", "lora", "lora", "train", "training", "my run.1", "")
    for wish, name in zip(wishes, names, strict=True):
        assert free_name(model, wish) == name
        add_adapter(model, LoRASettings(rank=2, target_modules=["q_proj"]), name)


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_2", "olora", "eva", "orthogonal", "mica"])
def test_an_adapter_that_needs_another_base_is_refused_and_others_are_read(how, tmp_path):
    """The reference is PEFT's own network in memory, whose base is as the adapter needs it."""
    expected = logits(peft_on_disk(tmp_path, init_lora_weights=how))
    if how.startswith(("pissa", "olora")):
        with pytest.raises(ValueError, match=f"init_lora_weights '{how}' has changed"):
            merge_adapter(network(), tmp_path / "adapter")
    else:
        merged = merge_adapter(network(), tmp_path / "adapter")
        torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=2e-5)


def test_a_dora_without_its_lengths_is_refused(tmp_path):
    peft_on_disk(tmp_path, use_dora=True)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: x for name, x in tensors.items() if "magnitude" not in name}, path)
    with pytest.raises(ValueError, match="has no lora_magnitude_vector, but use_dora is True"):
        read_adapter(tmp_path / "adapter")
    save_file(tensors, path)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": False}))
    with pytest.raises(ValueError, match="has a lora_magnitude_vector, but use_dora is False"):
        read_adapter(tmp_path / "adapter")


def test_another_network_of_the_same_shape_gives_a_warning(tmp_path):
    ours_on_disk(tmp_path / "ours", "qwen3")
    peft_on_disk(tmp_path / "theirs")
    ours, theirs = tmp_path / "ours" / "adapter", tmp_path / "theirs" / "adapter"
    theta = {"rope_type": "default", "rope_theta": 1e4}
    message = "ours/adapter was trained on another network than this"
    for changes in (dict(seed=7), dict(rope_parameters=theta), dict(rms_norm_eps=1e-5)):
        with pytest.warns(UserWarning, match=message):
            merge_adapter(network(**changes), ours)
        with pytest.warns(UserWarning, match=message):
            load_adapter(network(**changes), ours, "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_adapter(network(seed=7), theirs)
        model = MiniMindForCausalLM.from_pretrained(tmp_path / "ours" / "base")
        load_adapter(model, theirs, "theirs")
        load_adapter(model, ours, "ours")  # next to another one


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_hash_of_a_network_is_that_of_its_function(kind, tmp_path):
    # dropout and positions concern training and caches alone
    model = network(kind, dropout=0.1, max_position_embeddings=64)
    expected = network_sha256(model)
    model.save_pretrained(tmp_path)
    assert network_sha256(MiniMindForCausalLM.from_pretrained(tmp_path)) == expected
    add_adapter(model, LoRASettings(rank=2))
    assert network_sha256(model) == expected == network_sha256(network(kind))
    others = [network(kind, seed=1), network(kind, rms_norm_eps=1e-5)]
    others += [network(kind, num_experts_per_tok=1)] if "num_experts" in NETWORKS[kind] else []
    with torch.no_grad():
        model.model.norm.weight[-1].add_(1e-6)
    assert len({expected, *map(network_sha256, [model, *others])}) == 2 + len(others)


def test_lengths_are_computed_in_float32_under_autocast():
    model = network()
    add_adapter(model, LoRASettings(rank=4, use_dora=True))
    randomize(model)
    layer = model.model.layers[0].self_attn.q_proj
    low_rank = layer.lora["weight"]["default"]
    exact = layer.weight.double() + low_rank.scale * low_rank.B.double() @ low_rank.A.double()
    with torch.autocast("cpu", torch.bfloat16):
        ours = low_rank.sum_with(layer.weight)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)

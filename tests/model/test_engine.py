"""The engine against transformers' greedy decoding; and a completion does not depend on the rest of
the batch.
"""

import random
from itertools import product

import pytest
import torch

from model.decoder import RecordedDecoder
from model.engine import Engine, common_prefix
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.sampling import SamplingParams
from tests.helpers.networks import assert_close

SMALL = dict(num_hidden_layers=2, intermediate_size=96, max_position_embeddings=512)
SHARED_EXPERT = dict(shared_expert_intermediate_size=64, norm_topk_prob=True)
SHAPES = {
    "llama": dict(hidden_size=64, num_attention_heads=8),
    "qwen3": dict(hidden_size=48, num_attention_heads=4, head_dim=16, qk_norm=True),
    "qwen3_moe": dict(hidden_size=48, num_attention_heads=4, qk_norm=True, num_experts=4),
    "shared_expert": dict(
        hidden_size=64, num_attention_heads=4, num_experts=4, num_experts_per_tok=2, **SHARED_EXPERT
    ),
}


def network(shape="qwen3"):
    torch.manual_seed(0)
    # tied, a random network repeats its input
    shape = dict(SMALL, num_key_value_heads=2, tie_word_embeddings=False, **SHAPES[shape])
    model = MiniMindForCausalLM(MiniMindConfig(**shape)).eval()
    with torch.no_grad():
        for x in model.parameters():
            if x.dim() > 1:
                x.mul_(4)  # so that the best token stands out
    return model


def prompts(lengths, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(32, 6400) for _ in range(n)] for n in lengths]


def greedy(model, prompt, number):
    ids = torch.tensor([prompt])
    options = dict(max_new_tokens=number, do_sample=False, eos_token_id=None)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return out[0, len(prompt) :].tolist()


def params(**options):
    return SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True, **options})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch, chunk", [(1, 512), (3, 7), (8, 64)])
def test_greedy_text_is_that_of_transformers(tokenizer, shape, batch, chunk):
    model = network(shape)
    asked = prompts([1, 2, 30, 7, 100, 3, 45])
    asked += [asked[4] + [50, 51], asked[4][:40] + [52], list(asked[2])]  # begin like others
    engine = Engine(model, tokenizer, max_batch_size=batch, max_len=256, prefill_chunk=chunk)
    done = engine.generate(asked, params())
    assert [request.completion for request in done] == [greedy(model, ids, 12) for ids in asked]
    assert {request.finish_reason for request in done} == {"length"}
    assert sum(request.num_reused for request in done) >= 40
    assert not engine.running and not engine.waiting and engine.prefilling is None


def test_sampled_text_does_not_depend_on_the_others(tokenizer):
    engine = Engine(network(), tokenizer, max_batch_size=5, max_len=128)
    asked = prompts([3, 20, 33, 8, 50, 5, 12])
    options = [
        params(temperature=1.0, seed=seed, top_p=1 - seed / 20, frequency_penalty=seed / 10)
        for seed in range(7)
    ]
    together = engine.generate(asked, options)
    for prompt, one, request in zip(asked, options, together):
        single = Engine(engine.model, tokenizer, max_batch_size=1, max_len=128)
        (alone,) = single.generate([prompt], one)
        assert alone.completion == request.completion
        assert alone.log_probs == pytest.approx(request.log_probs, abs=1e-3)
    (other,) = engine.generate(asked[:1], params(temperature=1.0, seed=99))
    assert other.completion != together[0].completion


def test_log_probs_are_those_of_the_distribution_sampled_from(tokenizer):
    model = network()
    engine = Engine(model, tokenizer, max_len=128)
    (request,) = engine.generate(prompts([9]), params(temperature=0.7, seed=1, logprobs=3))
    logits = model(torch.tensor([request.tokens])).logits[0, 8:-1]
    chosen = torch.tensor(request.sampled)[:, None]
    expected = (logits / 0.7).log_softmax(-1).gather(1, chosen)[:, 0]
    assert_close(torch.tensor(request.log_probs), expected, 1e-4)
    bare = logits.log_softmax(-1)
    for row, token, (log_prob, best) in zip(bare, request.sampled, request.top, strict=True):
        assert log_prob == pytest.approx(row[token].item(), abs=1e-4)
        assert [other for other, _ in best] == row.topk(3).indices.tolist()


def test_the_prompt_of_several_samples_and_of_the_next_turn_is_computed_once(tokenizer):
    engine = Engine(network(), tokenizer, max_batch_size=4, max_len=256)
    (prompt,) = prompts([60])
    options = [params(temperature=1.0, seed=seed) for seed in range(4)]
    samples = engine.generate([prompt] * 4, options)
    assert [request.num_reused for request in samples] == [0, 59, 59, 59]
    assert len({tuple(request.completion) for request in samples}) == 4
    turn = samples[2].tokens + [40, 41, 42]
    (following,) = engine.generate([turn], params())
    # the last token was sampled, but not fed any more
    assert following.num_reused == len(samples[2].tokens) - 1
    assert following.completion == greedy(engine.model, turn, 12)
    engine.refresh()
    assert engine.generate([turn], params())[0].num_reused == 0


def test_requests_join_and_leave_between_steps(tokenizer):
    engine = Engine(network(), tokenizer, max_batch_size=2, max_len=256, prefill_chunk=16)
    asked = prompts([5, 40, 60, 9])
    lengths = (3, 20, 6, 4)
    requests = [engine.add(ids, params(max_tokens=n)) for ids, n in zip(asked, lengths)]
    engine.step()
    assert requests[0] in engine.running and requests[3] in engine.waiting
    engine.cancel(requests[1])
    assert requests[1] in [output.request for output in engine.step()]
    assert requests[1].finish_reason == "cancelled"
    while any(request.finish_reason is None for request in requests):
        engine.step()
    for i in (0, 2, 3):
        assert requests[i].completion == greedy(engine.model, asked[i], lengths[i])
    waiting = [engine.add(prompt, params()) for prompt in asked]
    engine.step()
    for request in waiting:
        engine.cancel(request)
    engine.step()
    assert engine.num_unfinished == 0
    assert {request.finish_reason for request in waiting} == {"cancelled"}


def test_the_ends_of_a_completion(tokenizer):
    model = network()
    engine = Engine(model, tokenizer, max_len=64)
    (prompt,) = prompts([10])
    plain = engine.generate([prompt], params(max_tokens=8))[0]
    third = plain.completion[2]
    stopped = engine.generate([prompt], params(max_tokens=8, stop_token_ids=(third,)))[0]
    assert stopped.completion == plain.completion[:2] and stopped.finish_reason == "stop"
    assert stopped.sampled == plain.completion[:3]
    piece = plain.text[3:6]
    by_text = engine.generate([prompt], params(max_tokens=8, stop=(piece,)))[0]
    assert (by_text.text, by_text.finish_reason) == (plain.text[: plain.text.index(piece)], "stop")
    full = engine.generate([prompt], params(max_tokens=500))[0]
    assert len(full.tokens) == 64 and full.finish_reason == "length"
    engine.end_ids.add(third)
    assert engine.generate([prompt], params(ignore_eos=False))[0].completion == plain.completion[:2]
    longer = engine.generate([prompt], params(ignore_eos=False, min_tokens=5))[0].completion
    assert len(longer) >= 5 and third not in longer[:5]


def test_streamed_pieces_join_to_the_text(tokenizer):
    engine = Engine(network(), tokenizer, max_len=128)
    (prompt,), pieces = prompts([6]), []
    request = engine.add(prompt, params(max_tokens=40, temperature=1.0, seed=3))
    while request.finish_reason is None:
        pieces += [output.text for output in engine.step()]
    decoded = tokenizer.decode(request.completion, skip_special_tokens=True)
    assert "".join(pieces) == request.text == decoded


def test_impossible_prompts_and_sizes_are_refused(tokenizer):
    engine = Engine(network(), tokenizer, max_len=32)
    for prompt, message in (
        ([], "empty"),
        ([5] * 32, "32 tokens, and 32 is the most"),
        ([6400], "no token 6400"),
        ([-1], "no token -1"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.add(prompt, params())
    with pytest.raises(ValueError, match="max_len 1000: the model has 512 positions"):
        Engine(network(), tokenizer, max_len=1000)
    assert engine.num_unfinished == 0


def test_the_form_of_a_step_that_is_recorded_computes_the_same(tokenizer, monkeypatch):
    """On a GPU the steps are recorded; here they run each time, with the same filled-up rows, keys
    and mask.
    """

    def record(self, ids, num_keys):
        def replay():
            logits.copy_(self.forward_ragged(ids, num_keys))

        logits = torch.zeros(ids.shape[1], 6400)
        return replay, ids, logits

    monkeypatch.setattr(RecordedDecoder, "record", record)
    monkeypatch.setattr("model.decoder.KEYS_STEP", 32)
    model = network()
    engine = Engine(model, tokenizer, max_batch_size=6, max_len=100, prefill_chunk=20)
    engine.decoder = RecordedDecoder(engine.network, engine.cache)
    asked = prompts([5, 40, 60, 9, 33, 88, 21, 60])
    asked += [asked[5] + [50]]
    expected = [greedy(model, ids, 12)[: 100 - len(ids)] for ids in asked]
    assert [request.completion for request in engine.generate(asked, params())] == expected
    assert set(engine.decoder.graphs) <= set(product((1, 2, 4, 6), (32, 64, 96, 100)))
    with pytest.raises(ValueError, match="cuda_graphs: the model is on cpu"):
        Engine(model, tokenizer, cuda_graphs=True)


def test_int8_weights_stay_close_to_the_exact_ones(tokenizer):
    for shape in SHAPES:
        model = network(shape)
        exact, rough = (Engine(model, tokenizer, max_len=64, int8=int8) for int8 in (False, True))
        ids = torch.tensor([prompts([20])[0]])
        with torch.inference_mode():
            expected = exact.network(ids).logits.log_softmax(-1)
            many = rough.network(ids).logits.log_softmax(-1)
            few = rough.network(ids[:, :5]).logits.log_softmax(-1)
        for ours, theirs in ((many, expected), (few, expected[:, :5])):
            kl = (theirs.exp() * (theirs - ours)).sum(-1).mean()
            assert kl < 0.02
        assert len(rough.generate(prompts([20]), params())[0].completion) == 12


def test_common_prefix():
    assert common_prefix([1, 2, 3], [1, 2, 4, 5]) == common_prefix([1, 2], [1, 2, 3]) == 2
    assert common_prefix([], [1]) == common_prefix([9], [1]) == 0

"""The engine against transformers' greedy decoding, and its promises: nothing depends on who else is being answered."""

import random
import threading
import time

import pytest
import torch

from model.decoder import RecordedDecoder
from model.engine import Engine, common_prefix
from model.engine_thread import EngineThread
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.sampling import SamplingParams

SHAPES = {
    "llama": dict(hidden_size=64, num_attention_heads=8, num_key_value_heads=2),
    "qwen3": dict(hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16, qk_norm=True),
    "qwen3_moe": dict(hidden_size=48, num_attention_heads=4, num_key_value_heads=2, qk_norm=True, num_experts=4),
    "shared_expert": dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
                          shared_expert_intermediate_size=64, norm_topk_prob=True)}


def network(shape="qwen3", **changes):
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(
        **{"num_hidden_layers": 2, "intermediate_size": 96, "max_position_embeddings": 512,
           "tie_word_embeddings": False, **SHAPES[shape], **changes})).eval()  # tied, a random network repeats its input
    with torch.no_grad():
        for x in model.parameters():
            if x.dim() > 1:
                x.mul_(4)  # so that the likeliest token stands out
    return model


def prompts(lengths, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(32, 6400) for _ in range(n)] for n in lengths]


def greedy(model, prompt, number):
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=number, do_sample=False, eos_token_id=None)
    return out[0, len(prompt):].tolist()


def params(**options):
    return SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True, **options})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch, chunk", [(1, 512), (3, 7), (8, 64)])
def test_greedy_text_is_that_of_transformers(tokenizer, shape, batch, chunk):
    model = network(shape)
    asked = prompts([1, 2, 30, 7, 100, 3, 45])
    asked += [asked[4] + [50, 51], asked[4][:40] + [52], list(asked[2])]  # some begin like another one
    engine = Engine(model, tokenizer, max_batch_size=batch, max_len=256, prefill_chunk=chunk)
    done = engine.generate(asked, params())
    assert [request.answer for request in done] == [greedy(model, prompt, 12) for prompt in asked]
    assert {request.finish_reason for request in done} == {"length"}
    assert sum(request.num_reused for request in done) >= 40
    assert not engine.running and not engine.waiting and engine.prefilling is None


def test_sampled_text_does_not_depend_on_the_others(tokenizer):
    engine = Engine(network(), tokenizer, max_batch_size=5, max_len=128)
    asked = prompts([3, 20, 33, 8, 50, 5, 12])
    options = [params(temperature=1.0, seed=seed, top_p=1 - seed / 20, frequency_penalty=seed / 10) for seed in range(7)]
    together = engine.generate(asked, options)
    for prompt, one, request in zip(asked, options, together):
        alone = Engine(engine.model, tokenizer, max_batch_size=1, max_len=128).generate([prompt], one)[0]
        assert alone.answer == request.answer
        assert alone.log_probs == pytest.approx(request.log_probs, abs=1e-3)
    other = engine.generate(asked[:1], params(temperature=1.0, seed=99))[0]
    assert other.answer != together[0].answer


def test_log_probs_are_those_of_the_distribution_sampled_from(tokenizer):
    model = network()
    engine = Engine(model, tokenizer, max_len=128)
    request, = engine.generate(prompts([9]), params(temperature=0.7, seed=1, logprobs=3))
    logits = model(torch.tensor([request.tokens])).logits[0, 8:-1]
    chosen = torch.tensor(request.sampled)[:, None]
    torch.testing.assert_close(torch.tensor(request.log_probs), (logits / 0.7).log_softmax(-1).gather(1, chosen)[:, 0],
                               atol=1e-4, rtol=1e-4)
    bare = logits.log_softmax(-1)
    for row, token, (log_prob, best) in zip(bare, request.sampled, request.top, strict=True):
        assert log_prob == pytest.approx(row[token].item(), abs=1e-4)
        assert [other for other, _ in best] == row.topk(3).indices.tolist()


def test_the_prompt_of_several_samples_and_of_the_next_turn_is_computed_once(tokenizer):
    engine = Engine(network(), tokenizer, max_batch_size=4, max_len=256)
    prompt, = prompts([60])
    samples = engine.generate([prompt] * 4, [params(temperature=1.0, seed=seed) for seed in range(4)])
    assert [request.num_reused for request in samples] == [0, 59, 59, 59]
    assert len({tuple(request.answer) for request in samples}) == 4
    turn = samples[2].tokens + [40, 41, 42]
    following, = engine.generate([turn], params())
    assert following.num_reused == len(samples[2].tokens) - 1  # the last token was sampled, but not fed any more
    assert following.answer == greedy(engine.model, turn, 12)
    engine.refresh()
    assert engine.generate([turn], params())[0].num_reused == 0


def test_requests_join_and_leave_between_steps(tokenizer):
    engine = Engine(network(), tokenizer, max_batch_size=2, max_len=256, prefill_chunk=16)
    asked = prompts([5, 40, 60, 9])
    requests = [engine.add(prompt, params(max_tokens=number)) for prompt, number in zip(asked, (3, 20, 6, 4))]
    engine.step()
    assert requests[0] in engine.running and requests[3] in engine.waiting
    engine.cancel(requests[1])
    outputs = engine.step()
    assert requests[1].finish_reason == "cancelled" and any(output.request is requests[1] for output in outputs)
    while any(request.finish_reason is None for request in requests):
        engine.step()
    for request, prompt, number in zip(requests, asked, (3, 0, 6, 4)):
        assert number == 0 or request.answer == greedy(engine.model, prompt, number)
    waiting = [engine.add(prompt, params()) for prompt in asked]
    engine.step()
    for request in waiting:
        engine.cancel(request)
    engine.step()
    assert engine.num_unfinished == 0 and {request.finish_reason for request in waiting} == {"cancelled"}


def test_the_ends_of_an_answer(tokenizer):
    model = network()
    engine = Engine(model, tokenizer, max_len=64)
    prompt, = prompts([10])
    plain = engine.generate([prompt], params(max_tokens=8))[0]
    third = plain.answer[2]
    stopped = engine.generate([prompt], params(max_tokens=8, stop_token_ids=(third,)))[0]
    assert (stopped.answer, stopped.sampled, stopped.finish_reason) == (plain.answer[:2], plain.answer[:3], "stop")
    piece = plain.text[3:6]
    by_text = engine.generate([prompt], params(max_tokens=8, stop=(piece,)))[0]
    assert (by_text.text, by_text.finish_reason) == (plain.text[:plain.text.index(piece)], "stop")
    full = engine.generate([prompt], params(max_tokens=500))[0]
    assert len(full.tokens) == 64 and full.finish_reason == "length"
    engine.end_ids.add(third)
    assert engine.generate([prompt], params(ignore_eos=False))[0].answer == plain.answer[:2]
    longer = engine.generate([prompt], params(ignore_eos=False, min_tokens=5))[0]
    assert len(longer.answer) >= 5 and third not in longer.answer[:5]


def test_streamed_pieces_join_to_the_text(tokenizer):
    engine = Engine(network(), tokenizer, max_len=128)
    request, pieces = engine.add(prompts([6])[0], params(max_tokens=40, temperature=1.0, seed=3)), []
    while request.finish_reason is None:
        pieces += [output.text for output in engine.step()]
    assert "".join(pieces) == request.text == tokenizer.decode(request.answer, skip_special_tokens=True)


def test_what_cannot_be_answered_is_said(tokenizer):
    engine = Engine(network(), tokenizer, max_len=32)
    for prompt, message in (([], "empty"), ([5] * 32, "32 tokens, and 32 is the most"), ([6400], "no token 6400"),
                            ([-1], "no token -1")):
        with pytest.raises(ValueError, match=message):
            engine.add(prompt, params())
    with pytest.raises(ValueError, match="max_len 1000: the model has 512 positions"):
        Engine(network(), tokenizer, max_len=1000)
    assert engine.num_unfinished == 0


def test_the_form_of_a_step_that_is_recorded_computes_the_same(tokenizer, monkeypatch):
    """On a GPU the steps are recorded; here they run each time, with the same filled-up rows, keys and mask."""
    def record(self, ids, num_keys):
        logits = torch.zeros(ids.shape[1], 6400)
        return lambda: logits.copy_(self.forward(ids[0], ids[1], num_keys, self.mask_for(ids[1], num_keys))), ids, logits

    monkeypatch.setattr(RecordedDecoder, "record", record)
    monkeypatch.setattr("model.decoder.KEYS_STEP", 32)
    model = network()
    engine = Engine(model, tokenizer, max_batch_size=6, max_len=100, prefill_chunk=20)
    engine.decoder = RecordedDecoder(engine.network, engine.cache)
    asked = prompts([5, 40, 60, 9, 33, 88, 21, 60])
    asked += [asked[5] + [50]]
    done = engine.generate(asked, params())
    assert [request.answer for request in done] == [greedy(model, p, 12)[:100 - len(p)] for p in asked]
    assert set(engine.decoder.graphs) <= {(rows, keys) for rows in (1, 2, 4, 6) for keys in (32, 64, 96, 100)}
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
        assert len(rough.generate(prompts([20]), params())[0].answer) == 12


def test_common_prefix():
    assert common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix([1, 2], [1, 2, 3]) == 2 and common_prefix([], [1]) == 0 and common_prefix([9], [1]) == 0


def test_a_thread_serves_many(tokenizer):
    model = network()
    runner = EngineThread(Engine(model, tokenizer, max_batch_size=3, max_len=128))
    asked, answers = prompts([4, 9, 30, 2, 17, 8]), {}

    def ask(i):
        answers[i] = "".join(output.text for output in runner.stream(asked[i], params(max_tokens=6 + i)))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine = Engine(model, tokenizer, max_len=128)
    assert answers == {i: engine.generate([asked[i]], params(max_tokens=6 + i))[0].text for i in range(6)}
    for output in runner.stream(asked[0], params(max_tokens=100)):
        request = output.request
        break  # leaving the loop cancels
    runner.close()
    assert request.finish_reason == "cancelled" and runner.num_running == runner.num_waiting == 0
    with pytest.raises(RuntimeError, match="has stopped"):
        runner.submit(asked[0], params(), print)


def test_a_slow_reader_gets_all_of_the_text(tokenizer):
    runner = EngineThread(Engine(network(), tokenizer, max_len=64))
    stream, text = runner.stream(prompts([5])[0], params(max_tokens=20)), ""
    for output in stream:
        while output.request.finish_reason is None:
            time.sleep(0.01)
        text += output.text
    assert text == output.request.text and len(output.request.answer) == 20
    runner.close()


def test_nothing_comes_in_behind_the_end(tokenizer, monkeypatch):
    runner = EngineThread(Engine(network(), tokenizer, max_len=64))
    make = runner.engine.new_request

    def slow(*args):
        runner.close()
        return make(*args)

    monkeypatch.setattr(runner.engine, "new_request", slow)
    with pytest.raises(RuntimeError, match="has stopped"):
        runner.submit([40, 41], params(), print)
    assert not runner.inbox and not runner.unfinished
    with pytest.raises(RuntimeError, match="has stopped"):
        runner.call(print)


def test_who_waits_hears_that_the_engine_failed(tokenizer, monkeypatch):
    engine = Engine(network(), tokenizer, max_len=64)
    monkeypatch.setattr(engine, "step", lambda: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    runner = EngineThread(engine)
    with pytest.raises(RuntimeError, match="division by zero"):
        list(runner.stream([40, 41], params()))

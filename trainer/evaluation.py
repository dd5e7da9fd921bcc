"""How good a language model is on held-out rows: bits per byte, and what it writes."""

import math
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F

from dataset.chat_format import encode_prompt
from dataset.lm_dataset import token_byte_lengths
from dataset.packing import PackedBatches
from dataset.toy_scorer import ask_all
from model.engine import Engine
from model.sampling import SamplingParams
from trainer.run import evaluating

MAX_LEN = 4096  # tokens of a question of the toy world's longest kind, its answer, and room


def validation_sets(args, dataset, build):
    """(training view, {name: held-out view}): the files of --val_path, each by itself, or --val_share of the data.

    `build(paths)` makes a dataset of files with the stage's own settings.
    """
    if args.val_path:
        names = [Path(path).name.split(".jsonl")[0] for path in args.val_path]
        if len(set(names)) < len(names):
            raise ValueError(f"--val_path: two files are called {max(names, key=names.count)!r}, and their figures would be "
                             "mixed up; rename one")
        return dataset, {name: build(path) for name, path in zip(names, args.val_path)}
    if not args.val_share:
        return dataset, {}
    training, held_out = dataset.held_out_split(args.val_share, seed=args.seed, max_rows=args.val_max_rows)
    return training, {"held_out": held_out}


def bits_per_byte(model, tokenizer, dataset, run, max_seq_len, batch_size=8):
    """Mean loss on the targets of `dataset`: {"loss": nats per token, "bpb": bits per byte of text, "tokens", "bytes"}.

    End tokens are predicted too and cost their bits, but stand for no bytes. The ranks share the rows.
    """
    byte_lengths = token_byte_lengths(tokenizer).to(run.device)
    batches = PackedBatches(dataset, batch_size=batch_size, accumulation_steps=1, max_seq_len=max_seq_len, seed=0, epochs=1,
                            pad_id=tokenizer.pad_token_id, rank=run.ranks.rank, world_size=run.ranks.world_size)
    nll = num_tokens = num_bytes = 0.0
    with evaluating(model):
        for micro in chain.from_iterable(batches):
            micro = run.to_device(micro)
            targets = F.pad(micro["labels"][:, 1:], (0, 1), value=-100)
            with run.autocast():
                hidden = model.model(micro["input_ids"], position_ids=micro["position_ids"]).last_hidden_state
                nll += model.nll_sum(hidden, targets).item()
            kept = targets[targets != -100]
            num_tokens += kept.numel()
            num_bytes += byte_lengths[kept].sum().item()
    nll, num_tokens, num_bytes = (run.sum(x) for x in (nll, num_tokens, num_bytes))
    return {"loss": nll / num_tokens, "bpb": nll / math.log(2) / num_bytes, "tokens": int(num_tokens), "bytes": int(num_bytes)}


def validate(model, tokenizer, held_out, run, args, index):
    """Score every held-out view: ({"val_loss/name": nats per token, "val_bpb/name": bits per byte}, a sample to print)."""
    scores, sentences = {}, []
    for name, view in held_out.items():
        score = bits_per_byte(model, tokenizer, view, run, args.max_seq_len, args.batch_size)
        scores |= {f"val_loss/{name}": score["loss"], f"val_bpb/{name}": score["bpb"]}
        prompt, text = sample(model, tokenizer, view, index, run)
        sentences.append(f"{name}: {score['bpb']:.4f} bits per byte; {prompt.strip()!r} -> {text.strip()!r}")
    return scores, "\n".join(sentences)


def sample(model, tokenizer, dataset, index, run, max_new_tokens=64):
    """What the model writes, greedily, after the beginning of a held-out row: (prompt, continuation), both text.

    The beginning is what precedes the first target (a conversation up to the assistant's turn), or a few words of a
    document. Through `generate`, which works on sharded networks too.
    """
    row = dataset[index % len(dataset)]
    ids, labels = torch.as_tensor(row["input_ids"]), torch.as_tensor(row["labels"])
    first_target = int((labels != -100).nonzero()[0])
    prompt = ids[: max(first_target, min(12, len(ids) // 2))].to(run.device)
    with evaluating(model), run.autocast():
        out = model.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], max_new_tokens=max_new_tokens,
                             do_sample=False)
    return tokenizer.decode(prompt), tokenizer.decode(out[0, len(prompt):])


def toy_answers(engine, questions, enable_thinking=None, max_new_tokens=128, temperature=0.0, seed=0):
    """Put questions of the toy world to a model, many at once: [(question, answered rightly)].

    temperature: 0 takes the likeliest tokens; above, answers are sampled, each with a seed of its own.
    """
    def replies(requests):
        prompts = [encode_prompt(engine.tokenizer, messages, tools, enable_thinking) for messages, tools in requests]
        how = [SamplingParams(temperature, max_tokens=max_new_tokens, seed=seed * 100_000 + i) for i in range(len(prompts))]
        texts = [request.text for request in engine.generate(prompts, how)] if temperature else (
            greedy_texts(engine, prompts, max_new_tokens))
        opened = "<think>\n" if enable_thinking else ""  # by the prompt: a thought that never ends is no answer
        return [opened + text for text in texts]

    return ask_all(questions, replies)


def evaluation_engine(model, tokenizer, run, max_batch_size=64):
    """An Engine for measuring `model`, in the run's arithmetic."""
    return Engine(model, tokenizer, max_batch_size, min(MAX_LEN, model.config.max_position_embeddings), run.dtype)


def greedy_texts(engine, prompts, max_new_tokens):
    """Greedy continuations, as text, of prompts given as lists of token ids."""
    return [request.text for request in engine.generate(prompts, SamplingParams(temperature=0, max_tokens=max_new_tokens))]

"""How good a language model is on held-out rows: bits per byte, and a sample of its text."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from dataset.token_dataset import token_byte_lengths
from model.model_minimind import MiniMindForCausalLM
from trainer.runtime.data import single_pass
from trainer.runtime.process import Compute, evaluating
from trainer.runtime.run import Run


def bits_per_byte(
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Any,
    run: Compute,
    max_seq_len: int,
    batch_size: int = 8,
) -> dict[str, float]:
    """Mean loss on all targets: {"loss": nats per token, "bpb": bits per byte, "tokens", "bytes"}.

    End tokens are predicted too and cost their bits, but stand for no bytes. The ranks share the
    work.
    """
    byte_lengths = torch.from_numpy(token_byte_lengths(tokenizer)).to(run.device)
    sizes = {"batch_size": batch_size, "max_seq_len": max_seq_len}
    nll = num_tokens = num_bytes = 0.0
    with evaluating(model):
        for micro in single_pass(run, dataset, tokenizer.pad_token_id, **sizes):
            micro = run.to_device(micro)
            targets = F.pad(micro["labels"][:, 1:], (0, 1), value=-100)
            with run.autocast():
                out = model.model(micro["input_ids"], position_ids=micro["position_ids"])
                nll += model.nll_sum(out.last_hidden_state, targets).item()
            kept = targets[targets != -100]
            num_tokens += kept.numel()
            num_bytes += byte_lengths[kept].sum().item()
    nll, num_tokens, num_bytes = (run.sum(x) for x in (nll, num_tokens, num_bytes))
    bpb = nll / math.log(2) / num_bytes
    return {
        "loss": nll / num_tokens,
        "bpb": bpb,
        "tokens": int(num_tokens),
        "bytes": int(num_bytes),
    }


def validate(
    run: Run,
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    val_sets: dict[str, Any],
    index: int,
) -> tuple[dict[str, float], str]:
    """({"val_loss/NAME": nats per token, "val_bpb/NAME": bits per byte}, a sample to print).

    Of each validation set; index chooses the sample.
    """
    args, scores, sentences = run.args, {}, []
    for name, dataset in val_sets.items():
        score = bits_per_byte(model, tokenizer, dataset, run, args.max_seq_len, args.batch_size)
        scores |= {f"val_loss/{name}": score["loss"], f"val_bpb/{name}": score["bpb"]}
        prompt, text = sample(model, tokenizer, dataset, index, run)
        sentences.append(
            f"{name}: {score['bpb']:.4f} bits per byte; {prompt.strip()!r} -> {text.strip()!r}"
        )
    return scores, "\n".join(sentences)


def sample(
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Any,
    index: int,
    run: Compute,
    max_new_tokens: int = 64,
) -> tuple[str, str]:
    """(prompt, greedy continuation) of the beginning of a held-out sequence, both text.

    The prompt ends before the first target (a conversation up to the assistant's turn), or after a
    few words of a document. By `generate`, which works on sharded networks too.
    """
    row = dataset[index % len(dataset)]
    ids, labels = torch.as_tensor(row["input_ids"]), torch.as_tensor(row["labels"])
    first_target = int((labels != -100).nonzero()[0])
    prompt = ids[: max(first_target, min(12, len(ids) // 2))].to(run.device)
    with evaluating(model), run.autocast():
        out = model.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt)[None],
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
    return tokenizer.decode(prompt), tokenizer.decode(out[0, len(prompt) :])

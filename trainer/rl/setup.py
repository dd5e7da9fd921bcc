"""The set-up of a stage of reinforcement learning: the policy, its prompts, and its sampler's
source.
"""

import copy
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dataset.chat.tools import EVERYDAY_TOOLS, ToolBox, everyday_tools, load_tools
from dataset.files.hashes import fingerprint
from dataset.inspect_rows import show_prompts
from dataset.prompt_dataset import PromptDataset, PromptSteps
from model.model_lora import AdapterOnly, LoRASettings, add_adapter
from model.model_minimind import MiniMindForCausalLM
from model.native_format import network_sha256
from trainer.rl.arguments import reward_weights
from trainer.rl.rewards import check_row, tools_of
from trainer.rl.rollout import Rollout
from trainer.runtime.arguments import ROOT
from trainer.runtime.data import split_validation, use_default_data
from trainer.runtime.run import Inspected, Run
from trainer.runtime.weights import find_base, load_model


def load_policy(
    run: Run,
) -> tuple[MiniMindForCausalLM, Any, PreTrainedTokenizerBase, MiniMindForCausalLM | None]:
    """(network to train, the part of it that a checkpoint saves, tokenizer, reference or None).

    The reference, with --beta, is a frozen copy. With --lora_rank the network's weights are frozen,
    and the checkpoint is the adapter.
    """
    args = run.args
    base = find_base(args, run.device)
    model, tokenizer = load_model(run)
    reference = copy.deepcopy(model).eval().requires_grad_(False) if args.beta else None
    if not args.lora_rank:
        return model, model, tokenizer, reference
    settings = LoRASettings(args.lora_rank, 2.0 * args.lora_rank)
    add_adapter(model, settings)
    return model, AdapterOnly(model, settings, base), tokenizer, reference


def open_prompts(
    run: Run, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, toy_name: str = "rl"
) -> tuple[PromptDataset, dict[str, PromptDataset], str]:
    """(training prompts, {name: held-out ones}, fingerprint of these and of the initial weights).

    Of --data_path, or of the toy world's part `toy_name`.
    """
    args, names = run.args, reward_weights(run.args)
    use_default_data(run, [f"{toy_name}_train.jsonl"], f"{toy_name}_heldout.jsonl")

    def build(paths: list[str]) -> PromptDataset:
        return PromptDataset(
            paths,
            tokenizer,
            args.max_seq_len - args.max_completion_length,
            bad_rows=args.bad_rows,
            enable_thinking=args.thinking,
            check=lambda row: check_row(row, names),
        )

    dataset = build(args.data_path)
    if args.inspect:
        show_prompts(dataset, tokenizer, args.inspect)
        raise Inspected
    run.print0(dataset.report)
    training, held_out = split_validation(run, dataset, build)
    start = run.ranks.from_main(lambda: network_sha256(model))
    return training, held_out, fingerprint(data=training.fingerprint, start=start)


def open_tools(run: Run, datasets: list[PromptDataset], toy_tools: ToolBox) -> ToolBox:
    """The tools of --tools, by default the toy world's: all that the rows of `datasets` offer.

    Without --tools, those of dataset/chat/everyday_tools.py join where rows offer them. ValueError
    if no row offers a tool, or if some are missing.
    """
    path = run.args.tools
    tools = load_tools(path) if path else toy_tools
    offered = {name for dataset in datasets for row in dataset.rows for name in tools_of(row)}
    if not offered:
        raise ValueError(
            'no row offers a tool: put "tools" on its system message, or take train_grpo.py for '
            "rows without"
        )
    if not (missing := sorted(offered - tools.tools.keys())):
        return tools
    everyday, file = everyday_tools(missing), EVERYDAY_TOOLS.relative_to(ROOT)
    if everyday and not path:
        run.print0(f"tools of {file}, because rows offer them: {', '.join(missing)}")
        return ToolBox([*tools.tools.values(), *everyday])
    hint = f" ({file} has {', '.join(missing)})" if everyday else ""
    raise ValueError(
        f"rows offer {', '.join(missing)}, and {path or 'the toy world'} has "
        f"{', '.join(tools.tools)}: give a file that has all of them with --tools{hint}"
    )


def prompt_steps(run: Run, dataset: PromptDataset) -> PromptSteps:
    """The steps of a run: which prompts each of them has."""
    args = run.args
    return PromptSteps(len(dataset), args.num_prompts, args.seed, args.epochs, args.max_steps)


def open_rollout(
    run: Run, model: torch.nn.Module, saved: Any, tokenizer: PreTrainedTokenizerBase
) -> Rollout:
    """What samples: this process, or the server of --rollout_url.

    saved: as `load_policy` gives it.
    """
    if not run.args.rollout_url:
        return Rollout(run, model, tokenizer)
    from trainer.rl.remote_rollout import RemoteRollout  # its httpx is needed here alone

    return RemoteRollout(run, model, saved, tokenizer)

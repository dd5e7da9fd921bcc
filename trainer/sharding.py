"""Sharded training with DeepSpeed ZeRO (Rajbhandari et al. 2020): each rank keeps a part of what all need.

Stage 1 shards the optimizer's states, 2 also the gradients, 3 also the parameters. What a run saves is what an unsharded
one saves, whole tensors under their names: so it can be resumed with another stage, another number of ranks or none.
"""

import json
import os
from pathlib import Path

import torch

STATES = ("exp_avg", "exp_avg_sq")  # of AdamW, per parameter


def read_config(args):
    """The DeepSpeed configuration of --deepspeed with what the other flags say filled in.

    ValueError for a file that cannot be used or that says something that a flag of ours says too.
    """
    path = Path(args.deepspeed)
    if not path.is_file():
        raise ValueError(f"--deepspeed {path}: no such file; trainer/ds_zero2.json is one")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error
    ours = {"train_batch_size": "--batch_size", "train_micro_batch_size_per_gpu": "--batch_size", "optimizer": "--optimizer",
            "gradient_accumulation_steps": "--accumulation_steps", "gradient_clipping": "--grad_clip", "bf16": "--dtype",
            "fp16": "--dtype", "scheduler": "--schedule", "torch_autocast": "--dtype"}
    twice = [name for name in config if name in ours and config[name] != "auto"]
    if twice:
        raise ValueError(f"{path}: leave {', '.join(twice)} out, {', '.join(sorted({ours[name] for name in twice}))} says that")
    zero = config.get("zero_optimization", {})
    if zero.get("stage") not in (1, 2, 3):
        raise ValueError(f"{path}: zero_optimization.stage is {zero.get('stage')}; give 1, 2 or 3, or leave --deepspeed out")
    if any(zero.get(name, {}).get("device") == "nvme" for name in ("offload_optimizer", "offload_param")):
        raise ValueError(f"{path}: offloading to nvme is not supported here; offload to cpu")
    return {name: value for name, value in config.items() if name not in ours}


class Sharded:
    """A DeepSpeed engine around `net` and its AdamW `optimizer`; `model` is the network inside, `run` the process's Run.

    TrainArgs.check has made sure that DeepSpeed is there and that the flags are what it can serve.
    """

    def __init__(self, net, model, optimizer, run):
        import deepspeed

        config = read_config(run.args)
        os.environ.setdefault("LOCAL_RANK", "0")  # a process that nobody launched lacks it, and DeepSpeed asks for it by name
        self.model, self.stage = model, config["zero_optimization"]["stage"]
        self.trained = [name for name, x in model.named_parameters() if x.requires_grad]
        self.grouped = [list(group["params"]) for group in optimizer.param_groups]  # before they become flat
        self.hyperparameters = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        self.engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config={
            **config, "train_micro_batch_size_per_gpu": run.args.batch_size, "gradient_accumulation_steps": 1,
            "gradient_clipping": run.args.grad_clip, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
            "torch_autocast": {"enabled": run.dtype != torch.float32, "dtype": str(run.dtype)}})
        self.zero = self.engine.optimizer
        self.create_states()

    def create_states(self):
        """Make AdamW's states at once: it would do so in its first step, but a resumed run fills them before that."""
        flat = self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        for x in flat:
            self.zero.optimizer.state[x] = {"step": torch.zeros((), device=x.device),
                                            **{name: torch.zeros_like(x) for name in STATES}}
        if self.stage < 3:
            self.zero._lazy_init_hp_params_optimizer_state()  # so that each parameter knows its part of them

    def clip_and_step(self, loss, guard):
        """Clip and step; returns the gradients' norm. DeepSpeed itself leaves out a step whose norm is not finite."""
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        guard.check(loss, norm)
        return norm

    def weights(self):
        """All that is trained, float32 on the CPU, by name: a call for all ranks together; {} but on the first."""
        from deepspeed.utils import safe_get_full_fp32_param

        whole = ((name, safe_get_full_fp32_param(self.model.get_parameter(name))) for name in self.trained)
        state = {name: x.cpu().view(self.shape(name)) for name, x in whole if self.engine.global_rank == 0}
        if "model.embed_tokens.weight" in state and self.model.config.tie_word_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        return state

    def shape(self, name):
        """Shape of a parameter, also where its data is elsewhere."""
        x = self.model.get_parameter(name)
        return getattr(x, "ds_shape", x.shape)

    def optimizer_state(self):
        """What the unsharded AdamW's state_dict() would be: a call for all ranks together; None but on the first."""
        from deepspeed.utils import safe_get_full_optimizer_state

        state, groups, count = {}, [], 0
        updates = next(iter(self.zero.optimizer.state.values()))["step"].cpu()
        for parameters, hyperparameters in zip(self.grouped, self.hyperparameters):
            groups.append({**hyperparameters, "params": list(range(count, count + len(parameters)))})
            for x in parameters:
                shape = getattr(x, "ds_shape", x.shape)
                whole = {name: safe_get_full_optimizer_state(x, name).cpu().view(shape) for name in STATES}
                state[count] = {"step": updates, **whole}
                count += 1
        return {"state": state, "param_groups": groups} if self.engine.global_rank == 0 else None

    def load(self, weights, optimizer_state):
        """Take over whole weights by name and an AdamW state_dict(), each rank its part."""
        for name in self.trained:
            self.set(self.model.get_parameter(name), weights[name], None)
        states = [optimizer_state["state"][index] for group in optimizer_state["param_groups"] for index in group["params"]]
        for x, state in zip((x for group in self.grouped for x in group), states, strict=True):
            for name in STATES:
                self.set(x, state[name], name)
        for flat in self.zero.optimizer.state.values():
            flat["step"].copy_(states[0]["step"])

    def set(self, x, value, state_name):
        """Set this rank's part of a parameter (state_name None) or of one of its optimizer states from the whole."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        value = value.detach().float()
        if self.stage < 3:
            if state_name is None:
                x.data.copy_(value)
                safe_set_full_fp32_param(x, value.to(x.device))
            else:
                safe_set_full_optimizer_state(x, value.to(x.device), state_name)
            return
        size = x.ds_tensor.numel()  # the last rank's part may be longer than what is left for it
        padded = torch.nn.functional.pad(value.flatten(), (0, size * self.engine.world_size - value.numel()))
        part = padded.view(self.engine.world_size, size)[self.engine.global_rank].to(x.ds_tensor.device)
        if state_name is None:
            x.ds_tensor.data.copy_(part)
            safe_set_local_fp32_param(x, part)
        else:
            safe_set_local_optimizer_state(x, part, state_name)

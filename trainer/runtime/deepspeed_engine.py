"""Sharded training with DeepSpeed ZeRO (Rajbhandari et al. 2020): each rank keeps a part of what
all need.

Stage 1 shards the optimizer's states, 2 also the gradients, 3 also the parameters. What a run saves
is what an unsharded one saves, whole tensors under their names: so it can be resumed with another
stage, another number of ranks or none.
"""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from filelock import FileLock

from trainer.runtime.stage_args import TrainArgs, read_deepspeed_config

STATES = ("exp_avg", "exp_avg_sq")  # of AdamW, per parameter


class DeepSpeedEngine:
    """DeepSpeed's engine, `wrapped`, around `net` and its AdamW; `model` is the network inside.

    TrainArgs.check has made sure that DeepSpeed is installed and can serve these flags.
    """

    def __init__(
        self,
        net: torch.nn.Module,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        args: TrainArgs,
        dtype: torch.dtype,
    ):
        import deepspeed

        build_cpu_op()
        config = read_deepspeed_config(args.deepspeed)
        # DeepSpeed asks for it by name, and a process without a launcher lacks it
        os.environ.setdefault("LOCAL_RANK", "0")
        self.model, self.stage = model, config["zero_optimization"]["stage"]
        self.trained = [name for name, x in model.named_parameters() if x.requires_grad]
        groups = optimizer.param_groups
        self.grouped = [list(group["params"]) for group in groups]  # before they become flat
        self.hyperparameters = [
            {name: value for name, value in group.items() if name != "params"} for group in groups
        ]
        config |= {
            "train_micro_batch_size_per_gpu": args.batch_size,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": args.grad_clip,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "torch_autocast": {"enabled": dtype != torch.float32, "dtype": str(dtype)},
        }
        self.wrapped, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
        self.zero = self.wrapped.optimizer
        self.create_states()

    def create_states(self) -> None:
        """Make AdamW's states at once: a resumed run fills them before its first step."""
        name = (
            "fp32_partitioned_groups_flat" if self.stage == 3 else "single_partition_of_fp32_groups"
        )
        for x in getattr(self.zero, name):
            states = {name: torch.zeros_like(x) for name in STATES}
            self.zero.optimizer.state[x] = {"step": torch.zeros((), device=x.device), **states}
        if self.stage < 3:
            # so that each parameter knows its part of them
            self.zero._lazy_init_hp_params_optimizer_state()

    def clip_and_step(self) -> float:
        """Clip and step; returns the gradients' norm, which must be finite for the step."""
        self.wrapped.step()
        return float(self.wrapped.get_global_grad_norm())

    def weights(self) -> dict[str, torch.Tensor]:
        """All that is trained, float32 on the CPU, by name; all ranks call, {} but on rank 0."""
        from deepspeed.utils import safe_get_full_fp32_param

        whole = (
            (name, safe_get_full_fp32_param(self.model.get_parameter(name)))
            for name in self.trained
        )
        state = {
            name: x.cpu().view(whole_shape(self.model.get_parameter(name)))
            for name, x in whole
            if self.wrapped.global_rank == 0
        }
        if "model.embed_tokens.weight" in state and self.model.config.tie_word_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        return state

    def optimizer_state(self) -> dict | None:
        """The unsharded AdamW's state_dict(); all ranks call together, None but on rank 0."""
        from deepspeed.utils import safe_get_full_optimizer_state

        state, groups, count = {}, [], 0
        updates = next(iter(self.zero.optimizer.state.values()))["step"].cpu()
        for parameters, hyperparameters in zip(self.grouped, self.hyperparameters):
            numbers = list(range(count, count + len(parameters)))
            groups.append({**hyperparameters, "params": numbers})
            for x in parameters:
                whole = {
                    name: safe_get_full_optimizer_state(x, name).cpu().view(whole_shape(x))
                    for name in STATES
                }
                state[count] = {"step": updates, **whole}
                count += 1
        return {"state": state, "param_groups": groups} if self.wrapped.global_rank == 0 else None

    def load(self, weights: dict[str, torch.Tensor], optimizer_state: dict) -> None:
        """Take over whole weights by name and an AdamW state_dict(), each rank its part."""
        for name in self.trained:
            self.set(self.model.get_parameter(name), weights[name], None)
        states = [
            optimizer_state["state"][index]
            for group in optimizer_state["param_groups"]
            for index in group["params"]
        ]
        for x, state in zip((x for group in self.grouped for x in group), states, strict=True):
            for name in STATES:
                self.set(x, state[name], name)
        for flat in self.zero.optimizer.state.values():
            flat["step"].copy_(states[0]["step"])

    def set(self, x: torch.Tensor, value: torch.Tensor, state_name: str | None) -> None:
        """Set this rank's part of a parameter (state_name None) or of one of its optimizer states
        from the whole.
        """
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
        rank, world_size = self.wrapped.global_rank, self.wrapped.world_size
        padded = F.pad(value.flatten(), (0, size * world_size - value.numel()))
        part = padded.view(world_size, size)[rank].to(x.ds_tensor.device)
        if state_name is None:
            x.ds_tensor.data.copy_(part)
            safe_set_local_fp32_param(x, part)
        else:
            safe_set_local_optimizer_state(x, part, state_name)


def whole_shape(x: torch.nn.Parameter) -> torch.Size:
    """Shape of a parameter, also where its data is elsewhere."""
    return getattr(x, "ds_shape", x.shape)


def build_cpu_op() -> None:
    """Compile or load the C++ op of DeepSpeed's ranks on a CPU, one process at a time.

    torch marks a build with a file named `lock`. A process that is killed while it builds leaves
    the file, and all later ones would wait for it forever. A GPU needs no such op.
    """
    import deepspeed
    from torch.utils.cpp_extension import _get_build_directory

    builder = deepspeed.accelerator.get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return
    folder = Path(_get_build_directory(builder.NAME, verbose=False))
    with FileLock(folder.with_suffix(".lock")):  # freed with its process, however that ends
        if not (folder / f"{builder.NAME}.so").exists():
            print("DeepSpeed compiles its op for the CPU, once: about a minute", flush=True)
        remove_abandoned_lock(folder / "lock")
        builder.load()


def remove_abandoned_lock(path: Path) -> None:
    """Remove torch's mark of a build if no process holds it open, as each builder does."""
    import psutil  # DeepSpeed installs it

    path = path.resolve()
    if path.exists():
        for process in psutil.process_iter(["open_files"]):
            if str(path) in (file.path for file in process.info["open_files"] or ()):
                return
        print(f"removed {path}: the process that built this op was killed", flush=True)
        path.unlink(missing_ok=True)

"""Typed dataclasses as command lines: a field is a flag, its comment is the help, its default the default."""

import argparse
import dataclasses
import importlib.util
import os
import sys
import traceback
import types
import typing
from dataclasses import MISSING, dataclass, field
from pathlib import Path

from model.model_minimind import PRESETS
from trainer.sharding import read_config

ROOT = Path(__file__).resolve().parents[1]


def arg(default, help, choices=None, nargs=None):
    """A dataclass field that is also a flag; a list default is copied for each instance."""
    metadata = {"help": help, "choices": choices, "nargs": nargs}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def parse_bool(text):
    """True or False from what people write after a switch: 1, true, yes, on and their opposites."""
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither yes nor no: write 1 or 0, or only the flag")


def parse_args(cls, argv=None):
    """Fill the dataclass `cls` from the command line (default: this process's), then call its `check()`.

    Switches work as `--flag`, `--flag 1` and `--flag 0`. `given` on the result is the set of flags that were written.
    A mistake, in the syntax or found by `check` (ValueError), ends the program with status 2 and says what to change.
    """
    module = sys.modules[cls.__module__]
    parser = argparse.ArgumentParser(description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="%(prog)s [--flag value ...]   (--help lists the flags)")
    hints = typing.get_type_hints(cls)
    for one in dataclasses.fields(cls):
        kind, extra = hints[one.name], {}
        if isinstance(kind, types.UnionType):  # int | None: the flag takes an int
            kind = next(part for part in kind.__args__ if part is not type(None))
        if kind is bool:
            kind, extra = parse_bool, {"nargs": "?", "const": True}
        elif one.metadata["nargs"]:
            kind, extra = kind.__args__[0], {"nargs": one.metadata["nargs"]}
        default = one.default if one.default is not MISSING else one.default_factory()
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        note = "" if shown in (None, "") else f" (default: {shown})".replace("%", "%%").replace(f"{ROOT}/", "")
        parser.add_argument(f"--{one.name}", type=kind, choices=one.metadata["choices"], default=argparse.SUPPRESS,
                            help=one.metadata["help"].replace("%", "%%") + note, **extra)
    given = vars(parser.parse_args(argv))
    args = cls(**given)
    args.given = set(given)
    try:
        getattr(args, "check", lambda: None)()
    except ValueError as error:
        parser.error(str(error))
    return args


def check_positive(args, *names):
    """ValueError unless each of these flags is above 0, or None."""
    for name in names:
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise ValueError(f"--{name} {getattr(args, name)}: give more than 0")


def check_not_negative(args, *names):
    """ValueError unless each of these flags is 0 or more, or None."""
    for name in names:
        if getattr(args, name) is not None and getattr(args, name) < 0:
            raise ValueError(f"--{name} {getattr(args, name)}: give 0 or more")


def check_share(args, *names):
    """ValueError unless each of these flags is a share from 0 to 1."""
    for name in names:
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name} {getattr(args, name)}: give a share from 0 to 1")


def check_installed(flag, package, wanted=None):
    """ValueError unless the package that the flag needs is there; wanted: what to give pip. Imports nothing."""
    known = sys.modules.get(package) if package in sys.modules else importlib.util.find_spec(package)
    if known is None:
        raise ValueError(f"{flag} needs a package that is not installed: python -m pip install {wanted or package}")


def command(main):
    """Run `main()` as a program: what the user can put right ends it with one line, everything else with a traceback.

    The user's are the errors that this project raises itself on purpose: ValueError, OSError, ImportError,
    FloatingPointError and MemoryError with a message of ours.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: what was saved is intact, and a training run goes on with --from_resume")
    except (ValueError, OSError, ImportError, FloatingPointError, MemoryError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        if not raised_in.is_relative_to(ROOT) or "site-packages" in raised_in.parts:
            raise
        sys.exit(f"error: {error}")


@dataclass
class TrainArgs:
    """The flags that every training stage has; a stage's own dataclass adds and overrides."""

    data_path: list[str] = arg([], "files of rows (.jsonl, .gz, .xz); FILE@0.4 takes that share of its rows", nargs="+")
    save_dir: str = arg(str(ROOT / "out"), "folder that holds the folders of all runs")
    save_weight: str = arg("", "name of this run: it is saved in SAVE_DIR/SAVE_WEIGHT_PRESET")
    from_weight: str = arg("none", "start from this run (a name in SAVE_DIR), checkpoint folder or .pth file; none: from nothing")
    from_resume: bool = arg(False, "go on with an interrupted run where its last checkpoint stands")
    overwrite: bool = arg(False, "replace the run of that name, should there be one")
    preset: str = arg("", "shape of the network (default: minimind-3 with a GPU, tiny without)", choices=list(PRESETS))
    hidden_size: int | None = arg(None, "width of the network, in place of the preset's")
    num_hidden_layers: int | None = arg(None, "layers, in place of the preset's")
    use_moe: bool = arg(False, "mixture of 4 experts, in place of the preset's feed-forward")
    max_seq_len: int = arg(512, "tokens of a packed row: the longest that is trained on")
    epochs: int = arg(1, "passes over the data")
    max_steps: int | None = arg(None, "end after so many optimizer steps, though --epochs would go on")
    batch_size: int = arg(8, "packed rows of a micro-batch")
    accumulation_steps: int = arg(1, "micro-batches of an optimizer step")
    learning_rate: float = arg(5e-4, "peak learning rate")
    schedule: str = arg("cosine", "after the warm-up: cosine to the floor, or wsd: stable, then a linear decay",
                        choices=["cosine", "wsd"])
    warmup_share: float = arg(0.02, "share of the steps with a rising learning rate")
    decay_share: float = arg(0.2, "wsd: share of the steps, at the end, with a falling one")
    min_lr_share: float = arg(0.1, "learning rate of the last step, as a share of the peak")
    optimizer: str = arg("adamw", "adamw for all parameters, or muon for the layers' matrices: more is learned per token",
                         choices=["adamw", "muon"])
    dropout: float = arg(0.0, "share of what a layer adds to the residual stream that is left out at random")
    weight_decay: float = arg(0.1, "decay of the matrices (norms have none)")
    beta2: float = arg(0.95, "AdamW: decay rate of the second moment")
    grad_clip: float = arg(1.0, "largest norm of the gradient; 0: no clipping")
    device: str = arg("auto", "cpu, cuda, cuda:1, ...; auto: the GPU if there is one")
    dtype: str = arg("auto", "arithmetic of the matrix products; auto: bfloat16 on a GPU that has it, else float32",
                     choices=["auto", "float32", "bfloat16", "float16"])
    use_compile: bool = arg(False, "torch.compile the network: slow first steps, faster ones after")
    gradient_checkpointing: bool = arg(False, "compute each layer again in backward: about a third slower, far less memory")
    deepspeed: str = arg("", "shard with DeepSpeed ZeRO as this file says: trainer/ds_zero1.json, ds_zero2.json, ds_zero3.json")
    deterministic: bool = arg(False, "on a GPU use kernels that always sum in the same order: slower, resumes bit for bit")
    num_workers: int | None = arg(None, "processes that build batches beside training (default: 2 with a GPU, else none)")
    num_proc: int | None = arg(None, "processes that turn text into tokens (default: all cores)")
    cache_dir: str = arg(str(ROOT / "dataset" / "cache"), "folder for the tokens of the data, made once")
    bad_rows: str = arg("stop", "a faulty row stops the run, or is counted and skipped", choices=["stop", "skip"])
    val_path: list[str] = arg([], "validate on these files, each by itself, in place of a share of the data", nargs="+")
    val_share: float = arg(0.01, "share of the documents held out for validation; 0: none")
    val_max_rows: int = arg(500, "hold out at most so many documents")
    val_interval: int = arg(200, "steps between two validations, each with a sample; the last step always validates")
    log_interval: int = arg(10, "steps between two lines in metrics.jsonl")
    save_interval: int = arg(200, "steps between two checkpoints; the last step is always saved")
    keep: int = arg(2, "checkpoints that are kept: the newest, and those to fall back on should it be damaged")
    max_bad_steps: int = arg(5, "steps in a row with a loss or gradient that is not finite before the run goes back or stops")
    use_wandb: bool = arg(False, "report to Weights & Biases: the same as --tracker wandb")
    tracker: str = arg("none", "report the figures there too", choices=["none", "wandb", "swanlab", "tensorboard"])
    wandb_project: str = arg("MiniMind", "project of the tracker")
    wandb_run_name: str = arg("", "name of the run in the tracker (default: its folder's)")
    seed: int = arg(42, "decides the weights at the start, the order of the data and every random choice on the way")
    inspect: int = arg(0, "print so many rows with what is trained on in colour, and stop")
    json: str = arg("", "write the figures of the run to this file too")
    local_rank: int = arg(0, "given by the deepspeed launcher to its processes")

    ACCUMULATES = True  # --accumulation_steps cuts a step into micro-batches, and --deepspeed is there; else both are refused
    # what may change between an interrupted run and its resumption: it decides no number, or is compared in another way
    FREE = ("save_dir", "cache_dir", "from_resume", "overwrite", "device", "dtype", "num_workers", "num_proc", "log_interval",
            "save_interval", "inspect", "json", "from_weight", "batch_size", "accumulation_steps", "use_compile",
            "gradient_checkpointing", "deepspeed", "deterministic", "keep", "max_bad_steps", "use_wandb", "tracker",
            "wandb_project", "wandb_run_name", "local_rank")

    def rows_per_step(self, world_size):
        """What a step has of what a run is cut into: the same when the run is gone on with, however it is shared then."""
        return self.batch_size * self.accumulation_steps * world_size

    def check(self):
        """ValueError for values out of range and for flags that contradict each other."""
        check_positive(self, "max_seq_len", "epochs", "batch_size", "accumulation_steps", "val_interval", "log_interval",
                       "save_interval", "learning_rate", "max_steps", "hidden_size", "num_hidden_layers", "num_proc", "keep",
                       "max_bad_steps")
        check_not_negative(self, "grad_clip", "weight_decay", "seed", "inspect", "num_workers")
        check_share(self, "dropout", "warmup_share", "decay_share", "min_lr_share", "val_share")
        if self.max_seq_len < 2:
            raise ValueError("--max_seq_len 1: a row needs a token to see and one to predict; give 2 or more")
        if self.schedule == "wsd" and self.warmup_share + self.decay_share > 1:
            raise ValueError("--warmup_share and --decay_share add up to more than 1")
        if "decay_share" in self.given and self.schedule != "wsd":
            raise ValueError("--decay_share has an effect with --schedule wsd only; leave it out or choose wsd")
        if self.val_path and "val_share" in self.given:
            raise ValueError("--val_path and --val_share are two ways to choose the held-out rows: leave one of them out")
        if "val_max_rows" in self.given and (self.val_path or not self.val_share):
            raise ValueError("--val_max_rows limits the --val_share, which is not used here: leave it out")
        if self.overwrite and self.from_resume:
            raise ValueError("--overwrite begins anew and --from_resume goes on: choose one")
        if self.use_wandb and self.tracker not in ("none", "wandb"):
            raise ValueError(f"--use_wandb is --tracker wandb, but --tracker {self.tracker} is given too: choose one")
        self.check_tracker()
        if self.deepspeed:
            self.check_deepspeed()
        if self.dropout == 1:
            raise ValueError("--dropout 1 leaves nothing: give less than 1")
        if self.use_moe and "moe" in self.preset:
            raise ValueError(f"--use_moe with --preset {self.preset}, which is one already: leave one of them out")

    def check_tracker(self):
        """ValueError for a tracker that is not installed, and for flags that the chosen one does not use."""
        tracker, names = "wandb" if self.use_wandb else self.tracker, sorted({"wandb_project", "wandb_run_name"} & self.given)
        if names and tracker in ("none", "tensorboard"):
            flags = " and ".join(f"--{name}" for name in names)
            raise ValueError(f"{flags} with --tracker {tracker}: only wandb and swanlab use that; leave it out, or choose one "
                             "of them")
        if tracker != "none" and os.environ.get("RANK", "0") == "0":  # the others do not report
            check_installed(f"--tracker {tracker}", tracker)

    def check_deepspeed(self):
        """ValueError for a file that cannot be used, and for what DeepSpeed cannot do here."""
        if self.optimizer != "adamw":
            raise ValueError(f"--deepspeed shards AdamW's states, not --optimizer {self.optimizer}'s: leave one of them out")
        if self.dtype == "float16":
            raise ValueError("--deepspeed works with --dtype bfloat16 or float32 here: choose one of them")
        stage = read_config(self)["zero_optimization"]["stage"]
        if self.use_compile and stage == 3:
            raise ValueError(f"--use_compile with ZeRO stage 3 ({self.deepspeed}), which takes the parameters away from compiled "
                             "code: leave --use_compile out, or take stage 1 or 2")
        check_installed("--deepspeed", "deepspeed", "deepspeed==0.19.8")

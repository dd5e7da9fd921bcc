"""What this machine has and what training here will take: devices, arithmetic, memory, and an estimate for every preset.

    python scripts/doctor.py
    python scripts/doctor.py --tokens 1000000000 --json out/doctor.json
    python scripts/doctor.py --device cpu --seconds 30         # a longer measurement is a steadier one

The estimate is a model with four measured constants: the rate of a large matrix product, the rate of a large copy, and,
from real optimizer steps of the `tiny` preset at two sizes, what everything between the matrix products costs and what a
step costs before it computes anything. A preset's time is then its arithmetic (6 * active weights * tokens + attention)
and its elementwise traffic at those rates, with AdamW. What the quick start will take on a CPU is measured with real steps
of its own plan. Other work on the machine makes both measurement and training slower.
"""

import os
import platform
import re
import shutil
import sys
import sysconfig
import warnings
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

try:
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from dataset.packing import PackedBatches
    from dataset.processes import num_cores
    from dataset.toy_world import write_world
    from model.model_minimind import PRESETS, MiniMindConfig, MiniMindForCausalLM
    from scripts import bench_training as bench
    from scripts import quickstart
    from trainer import costs
    from trainer.arguments import TrainArgs, arg, command, parse_args
    from trainer.costs import Rates
    from trainer.metrics import write_json
    from trainer.run import DTYPES, Run
    from trainer.train_full_sft import SFTArgs
    from trainer.train_pretrain import PretrainArgs
    from trainer.weights import load_model
except ImportError as error:
    sys.exit(f"error: {error}\nInstall what the project needs, into an environment of its own: bash scripts/quickstart.sh does "
             "it, or python -m pip install -r requirements.txt")

GIB = 2**30
ROWS, LENGTH = 8, 512  # of the micro-batch that is estimated: the defaults of --batch_size and --max_seq_len
TARGET_SHARE = {"pretrain": 1.0, "sft": 0.6}  # of the tokens; chats are mostly answers
# a line of requirements.txt
PIN = re.compile(r'([\w-]+)==([\w.]+)(?:; python_version (>=|<) "3\.(\d+)")?(?:; sys_platform != "(\w+)")?')


@dataclass
class DoctorArgs:
    tokens: int = arg(100_000_000, "size of the pretraining corpus that is estimated, in tokens")
    sft_tokens: int = arg(50_000_000, "size of the fine-tuning corpus, in tokens")
    seconds: float = arg(10.0, "how long to measure, about")
    device: str = arg("auto", "cpu, cuda, cuda:1, ...; auto: the GPU if there is one")
    json: str = arg("", "write the figures to this file too")

    def check(self):
        """ValueError for values out of range."""
        for name in ("tokens", "sft_tokens", "seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} {getattr(self, name)}: give more than 0")


def packages(problems):
    """{package: version here} of requirements.txt; what is missing or not the pinned version goes to `problems`."""
    found = {}
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith(("#", "-")):
            continue
        name, pinned, relation, minor, not_on = PIN.fullmatch(line.strip()).groups()
        if (relation and (sys.version_info >= (3, int(minor))) != (relation == ">=")) or not_on == sys.platform:
            continue
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            problems.append(f"{name} is missing: python -m pip install {name}=={pinned}")
            continue
        if found[name].partition("+")[0] != pinned:  # after a plus: for which GPU it was built
            problems.append(f"{name} {found[name]} is not the pinned {pinned}, the version that is tested: "
                            f"python -m pip install {name}=={pinned}")
    return found


def cpu_name():
    """The processor's name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpu_name(device):
    """What the GPU is, if training runs on one."""
    if device.type != "cuda":
        return "none that PyTorch sees" if not torch.cuda.is_available() else "not used: --device cpu"
    about = torch.cuda.get_device_properties(device)
    return f"{about.name}, {about.total_memory / GIB:.1f} GiB, compute capability {about.major}.{about.minor}"


def attention_kernels(device, dtype):
    """{kernel: what of {"causal", "masked"} it computes, forward and backward} with grouped heads, as the model calls it."""
    found = {}
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        q, k, v = (torch.randn(1, heads, 64, 64, device=device, dtype=dtype, requires_grad=True) for heads in (4, 2, 2))
        mask, works = torch.ones(64, 64, dtype=torch.bool, device=device).tril()[None, None], []
        for kind, how in (("causal", {"is_causal": True}), ("masked", {"attn_mask": mask})):
            try:
                with sdpa_kernel(getattr(SDPBackend, name)), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the reasons why a kernel does not do it
                    F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **how).sum().backward()
                works.append(kind)
            except RuntimeError:  # torch's way to say that this kernel does not exist here
                continue
        found[name.lower().removesuffix("_attention")] = works
    return found


def compiler(device, problems):
    """What torch.compile would build with; what it lacks goes to `problems`."""
    if device.type == "cuda":
        if find_spec("triton"):
            return f"triton {metadata.version('triton')}"
        problems.append("triton is missing, without which --use_compile fails: it comes with PyTorch's CUDA build for Linux")
        return "missing"
    names = [os.environ.get("CXX", "g++"), "g++", "clang++", "cl"]
    found = next(filter(None, map(shutil.which, names)), None)
    if not found:
        problems.append("no C++ compiler is found, without which --use_compile fails: apt install g++, xcode-select --install")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        problems.append("Python.h is missing, without which --use_compile fails: apt install python3-dev")
        found = None
    return found or "incomplete"


def measure_steps(settings, dataset, seconds):
    """Of a run with these TrainArgs: median seconds of a real step, its mean (positions, targets, pairs), number of steps."""
    run = Run(settings)
    model, tokenizer = load_model(settings, run.device)
    batches = PackedBatches(dataset, batch_size=settings.batch_size, accumulation_steps=settings.accumulation_steps, seed=0,
                            max_seq_len=settings.max_seq_len, epochs=settings.epochs, pad_id=tokenizer.pad_token_id)
    ours = bench.Ours(model, run, batches, settings)
    ours.step(0)
    times, work = [], []
    while len(times) < 3 or (sum(times) < seconds and len(times) + 1 < len(batches)):
        step = len(times) + 1
        times.append(bench.timed(ours, [step], run.device)[0])
        work.append(ours.work(step))
    return median(times), [sum(column) / len(work) for column in zip(*work)], len(batches)


def calibrate(dataset, device, rates, seconds):
    """Rates from real steps of `tiny` on ROWS rows and on one: the difference is work, the rest is per step."""
    config, params = shape("tiny")
    both = (TrainArgs(preset="tiny", device=str(device), batch_size=rows, max_seq_len=LENGTH) for rows in (ROWS, 1))
    (large, work, _), (small, one, _) = (measure_steps(settings, dataset, seconds / 2) for settings in both)
    more_bytes = costs.elementwise_bytes(config, *work[:2]) - costs.elementwise_bytes(config, *one[:2])
    more_flops = costs.training_flops(config, *work) - costs.training_flops(config, *one)
    spent = large - small - more_flops / rates["matrix"]
    elementwise = more_bytes / max(spent, more_bytes / rates["copy"])  # never faster than a copy
    found = Rates(**rates, elementwise=elementwise)
    rest = small if device.type == "cuda" else small - found.seconds(config, params, device, *one)
    found.step_per_layer = max(0.0, rest) / config.num_hidden_layers
    return found


def shape(preset):
    """(configuration, number of parameters) of a preset, without making its weights."""
    config = MiniMindConfig.from_preset(preset)
    with torch.device("meta"):
        return config, MiniMindForCausalLM(config).num_parameters()


def estimate(preset, rates, budgets, device, dtype, free):
    """One row of the table: parameters, memory of a step, and hours for each stage's `budgets` of tokens."""
    (config, params), positions = shape(preset), ROWS * LENGTH
    memory = costs.memory_bytes(config, params, positions, dtype)
    fits = None if free is None else memory < 0.9 * free
    row = {"preset": preset, "parameters": params, "memory_gib": memory / GIB, "fits": fits}
    for stage, tokens in budgets.items():
        pairs = positions * LENGTH / 2  # documents that fill a row: the most that attention can cost
        step = rates.seconds(config, params, device, positions, TARGET_SHARE[stage] * positions, pairs)
        row |= {f"{stage}_tokens_per_s": positions / step, f"{stage}_hours": tokens / positions * step / 3600}
    return row


def quick_start(tokenizer, seconds):
    """{stage: seconds} that scripts/quickstart.py trains on a CPU: a real step of its plan, times the number of steps."""
    plan, found = quickstart.CPU, {}
    folder = ROOT / "dataset" / f"toy_{plan['level']}"
    write_world(plan["level"], folder)
    for stage, kind in (("pretrain", PretrainArgs), ("sft", SFTArgs)):
        settings = parse_args(kind, ["--preset", plan["preset"], "--device", "cpu", "--from_weight", "none", *plan[stage]])
        dataset = bench.STAGES[stage]([str(folder / f"{stage}_train.jsonl")], tokenizer, settings.max_seq_len)
        step, _, count = measure_steps(settings, dataset, seconds / 2)
        found[stage] = step * count
    return found


def describe(figures):
    """The first table: what is here."""
    speeds, memory = figures["flops_per_s"], figures["free_memory_gib"]
    rows = {
        "Python": platform.python_version(),
        "packages": ", ".join(f"{name} {version}" for name, version in figures["packages"].items()),
        "processor": f"{figures['cpu']}, {figures['cores']} cores usable, {torch.get_num_threads()} threads",
        "GPU": figures["gpu"],
        "trains on": f"{figures['device']} in {figures['dtype']}",
        "matrix product": ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in speeds.items())
                          + f"; native are {', '.join(n for n in speeds if is_native(n, speeds))}, the others emulated",
        "attention kernels": ", ".join(f"{name}: {' and '.join(how) or 'none'}" for name, how in figures["attention"].items()),
        "torch.compile with": figures["compiler"],
        "free memory": "unknown" if memory is None else f"{memory:.1f} GiB",
        "free disk for out/": f"{figures['free_disk_gib']:.1f} GiB",
    }
    for name, text in rows.items():
        print(f"{name:<20} {text}")
    for problem in figures["problems"]:
        print(f"! {problem}")


def is_native(name, speeds):
    """Whether the device computes in that type: half precision that is not emulated is clearly faster than float32."""
    return name == "float32" or speeds[name] > 1.3 * speeds["float32"]


def duration(hours):
    """Hours as a person would say them."""
    if hours * 60 < 90:
        return f"{hours * 60:,.1f} min" if hours * 60 < 10 else f"{hours * 60:,.0f} min"
    return f"{hours:,.1f} h" if hours < 48 else f"{hours / 24:,.0f} days"


def print_estimates(figures, args):
    """The second table: every preset."""
    print(f"\n{'preset':<16} {'parameters':>10} {'memory':>9} {'fits':>5} {f'pretrain {args.tokens / 1e6:,.0f}M tokens':>26} "
          f"{f'SFT {args.sft_tokens / 1e6:,.0f}M tokens':>26}")
    for row in figures["presets"]:
        stages = [f"{duration(row[f'{stage}_hours'])} ({row[f'{stage}_tokens_per_s']:,.0f}/s)" for stage in ("pretrain", "sft")]
        fits = {True: "yes", False: "no", None: "?"}[row["fits"]]
        print(f"{row['preset']:<16} {row['parameters'] / 1e6:>9.1f}M {row['memory_gib']:>5.1f} GiB {fits:>5} "
              f"{stages[0]:>26} {stages[1]:>26}")
    print(f"\nOne micro-batch of {ROWS} rows of {LENGTH} tokens a step, AdamW; tokens/s count every token.")
    if toy := figures["quick_start_seconds"]:
        print(f"The quick start on this CPU trains for {duration(toy['pretrain'] / 3600)} (pretraining) and "
              f"{duration(toy['sft'] / 3600)} (fine-tuning).")
    if any(row["fits"] is False for row in figures["presets"]):
        print("What does not fit may with a smaller --batch_size: all but 16 bytes a parameter shrinks with it.")


def main(argv=None):
    args = parse_args(DoctorArgs, argv)
    run = Run(TrainArgs(device=args.device))
    device, problems = run.device, []
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5 * num_cores():
        problems.append(f"the machine is busy (load {load:.1f} on {num_cores()} cores): every time below is too long; measure "
                        "again when it is quiet")
    print("measuring ...", flush=True)
    free = costs.free_memory(device)
    speeds = {name: costs.matrix_rate(device, dtype, seconds=0.08 * args.seconds) for name, dtype in DTYPES.items()}
    figures = {
        "packages": packages(problems), "cpu": cpu_name(), "cores": num_cores(), "gpu": gpu_name(device), "device": str(device),
        "dtype": str(run.dtype).removeprefix("torch."), "flops_per_s": speeds,
        "attention": attention_kernels(device, run.dtype), "compiler": compiler(device, problems),
        "free_memory_gib": None if free is None else free / GIB, "free_disk_gib": shutil.disk_usage(ROOT).free / GIB}
    if device.type == "cpu" and is_native("bfloat16", speeds):
        problems.append(f"bfloat16 products are {speeds['bfloat16'] / speeds['float32']:.1f} times as fast as float32 on this "
                        "processor: --dtype bfloat16 speeds up the larger presets")
    describe(figures | {"problems": problems})

    write_world("mini", bench.TOY)
    tokenizer = load_model(TrainArgs(preset="tiny", device="cpu"), torch.device("cpu"))[1]
    dataset = bench.STAGES["pretrain"]([str(bench.TOY / "pretrain_train.jsonl")], tokenizer, LENGTH)
    measured = {"matrix": speeds[figures["dtype"]], "copy": costs.copy_rate(device, 0.05 * args.seconds)}
    rates = calibrate(dataset, device, measured, 0.4 * args.seconds)
    budgets = {"pretrain": args.tokens, "sft": args.sft_tokens}
    figures |= {
        "rates": vars(rates), "problems": problems,
        "quick_start_seconds": quick_start(tokenizer, 0.2 * args.seconds) if device.type == "cpu" else {},
        "presets": [estimate(name, rates, budgets, device, run.dtype, free) for name in PRESETS]}
    print_estimates(figures, args)
    if args.json:
        write_json(args.json, figures)


if __name__ == "__main__":
    command(main)

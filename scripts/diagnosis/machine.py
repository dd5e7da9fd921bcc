"""The machine: packages, processor, GPU, attention kernels, compiler. Faults go to `problems`, a
list of sentences with the fix.
"""

import os
import platform
import re
import shutil
import sys
import sysconfig
import warnings
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dataset.files.processes import num_cores
from trainer.runtime import costs
from trainer.runtime.arguments import ROOT
from trainer.runtime.memory import free_memory
from trainer.runtime.process import DTYPES, Compute

GIB = 2**30
# a line of requirements.txt
PIN = re.compile(
    r'([\w-]+)==([\w.]+)(?:; python_version (>=|<) "3\.(\d+)")?(?:; sys_platform != "(\w+)")?'
)


def packages(problems: list[str]) -> dict[str, str]:
    """{package: version here} of requirements.txt; missing and other versions are problems."""
    found = {}
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith(("#", "-")):
            continue
        name, pinned, relation, minor, not_on = PIN.fullmatch(line.strip()).groups()
        is_newer = minor and sys.version_info >= (3, int(minor))
        if (relation and is_newer != (relation == ">=")) or not_on == sys.platform:
            continue
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            problems.append(f"{name} is missing: python -m pip install {name}=={pinned}")
            continue
        if found[name].partition("+")[0] != pinned:  # after a plus: for which GPU it was built
            problems.append(
                f"{name} {found[name]} is not the pinned {pinned}, the version that is tested: "
                f"python -m pip install {name}=={pinned}"
            )
    return found


def cpu_name() -> str:
    """The processor's name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
    named = re.search("^model name.*?:(.*)", text, re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine()


def gpu_name(device: torch.device) -> str:
    """The GPU, or the reason why none is used."""
    if device.type != "cuda":
        is_there = torch.cuda.is_available()
        return "not used: --device cpu" if is_there else "none that PyTorch sees"
    about = torch.cuda.get_device_properties(device)
    memory = f"{about.total_memory / GIB:.1f} GiB"
    return f"{about.name}, {memory}, compute capability {about.major}.{about.minor}"


def attention_kernels(device: torch.device, dtype: torch.dtype) -> dict[str, list[str]]:
    """{kernel: kinds of attention, "causal" and "masked", that it trains with grouped heads}."""
    found = {}
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        q, k, v = (
            torch.randn(1, heads, 64, 64, device=device, dtype=dtype, requires_grad=True)
            for heads in (4, 2, 2)
        )
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


def compiler(device: torch.device, problems: list[str]) -> str:
    """The compiler for torch.compile; missing parts are problems."""
    if device.type == "cuda":
        if find_spec("triton"):
            return f"triton {metadata.version('triton')}"
        problems.append(
            "triton is missing, without which --use_compile fails: it comes with PyTorch's CUDA "
            "build for Linux"
        )
        return "missing"
    names = [os.environ.get("CXX", "g++"), "g++", "clang++", "cl"]
    found = next(filter(None, map(shutil.which, names)), None)
    if not found:
        problems.append(
            "no C++ compiler is found, without which --use_compile fails: apt install g++, "
            "xcode-select --install"
        )
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        problems.append(
            "Python.h is missing, without which --use_compile fails: apt install python3-dev"
        )
        found = None
    return found or "incomplete"


def examine(run: Compute, seconds: float, problems: list[str]) -> dict[str, Any]:
    """All facts about the machine; measuring each of three types takes about `seconds`."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5 * num_cores():
        problems.append(
            f"the machine is busy (load {load:.1f} on {num_cores()} cores): every time below is "
            "too long; measure again when it is quiet"
        )
    free = free_memory(run.device)
    speeds = {
        name: costs.matrix_rate(run.device, dtype, seconds=seconds)
        for name, dtype in DTYPES.items()
    }
    facts = {
        "packages": packages(problems),
        "cpu": cpu_name(),
        "cores": num_cores(),
        "gpu": gpu_name(run.device),
        "device": str(run.device),
        "dtype": str(run.dtype).removeprefix("torch."),
        "flops_per_s": speeds,
        "attention": attention_kernels(run.device, run.dtype),
        "compiler": compiler(run.device, problems),
        "free_memory_gib": None if free is None else free / GIB,
        "free_disk_gib": shutil.disk_usage(ROOT).free / GIB,
    }
    if run.device.type == "cpu" and is_native("bfloat16", speeds):
        problems.append(
            f"bfloat16 products are {speeds['bfloat16'] / speeds['float32']:.1f} times as fast as "
            "float32 on this processor: --dtype bfloat16 speeds up the larger presets"
        )
    return facts


def is_native(name: str, speeds: dict[str, float]) -> bool:
    """Whether the device computes in that type: half precision is clearly faster than float32."""
    return name == "float32" or speeds[name] > 1.3 * speeds["float32"]


def describe(facts: dict[str, Any], problems: list[str]) -> None:
    """Print the facts and the problems."""
    speeds, memory = facts["flops_per_s"], facts["free_memory_gib"]
    rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in speeds.items())
    native = ", ".join(name for name in speeds if is_native(name, speeds))
    kernels = [f"{name}: {' and '.join(how) or 'none'}" for name, how in facts["attention"].items()]
    rows = {
        "Python": platform.python_version(),
        "packages": ", ".join(f"{name} {version}" for name, version in facts["packages"].items()),
        "processor": f"{facts['cpu']}, {facts['cores']} cores usable, "
        f"{torch.get_num_threads()} threads",
        "GPU": facts["gpu"],
        "trains on": f"{facts['device']} in {facts['dtype']}",
        "matrix product": f"{rates}; native are {native}, the others emulated",
        "attention kernels": ", ".join(kernels),
        "torch.compile with": facts["compiler"],
        "free memory": "unknown" if memory is None else f"{memory:.1f} GiB",
        "free disk for out/": f"{facts['free_disk_gib']:.1f} GiB",
    }
    for name, text in rows.items():
        print(f"{name:<20} {text}")
    for problem in problems:
        print(f"! {problem}")

"""Which code runs the loops of kernels.py: Triton on GPUs, plain PyTorch elsewhere; and Triton itself, if it is there.

    uses_triton       what runs for a tensor; `using` changes it for a while, the environment's HOPE_KERNELS for good
    chunks_by_triton  the same for a chunk, and layers_by_triton for a layer, where others may be faster, as measured
    foreseen_on_gpu   for tensors without numbers: layers as a GPU has them
    suits, scans      whether it can, for given tensors; `fall_back` warns, once, where plain PyTorch runs after all
    precision         how products are computed

kernels.py offers `uses_triton`, `using` and `scans` as its own.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

try:
    import triton
    import triton.language as tl
    from triton import jit
    from triton.language import constexpr
except ImportError:  # not for this platform: the reference does everything
    triton = tl = None
    jit = constexpr = lambda z, **how: z

CHOICES = "auto", "reference", "triton"
# In tests/bench/gpu.json: the ways beside "triton", in float32; by group, the kernel that was checked.
OTHERS = "chunks", "reference", "compiled"
CHECKED = {"chunk": "dgd_chunk", "layer": "memory_layer"}


def chosen() -> str:
    """The environment's HOPE_KERNELS; ValueError unless it is one of CHOICES."""
    choice = os.environ.get("HOPE_KERNELS") or "auto"
    if choice not in CHOICES:
        raise ValueError(f"HOPE_KERNELS is {choice!r}; allowed: {', '.join(CHOICES)}; unset it for auto")
    return choice


def uses_triton(z: Tensor) -> bool:
    """Whether the Triton kernels run for tensors on z's device, as the environment's HOPE_KERNELS says: "auto" (Triton
    on GPUs), "reference" or "triton". ValueError for anything else, RuntimeError for "triton" where it can't run."""
    choice = chosen()
    if choice == "triton" and triton is None:
        raise RuntimeError("HOPE_KERNELS is triton, which is not installed; `pip install triton`, or set it to auto")
    if choice == "triton" and not z.is_cuda and not os.environ.get("TRITON_INTERPRET"):
        raise RuntimeError(f"HOPE_KERNELS is triton, which needs a GPU, but tensors are on {z.device}; set it to auto")
    if choice == "auto" and triton is not None and z.is_cuda and (0, 0) < capability(z.device) < (8, 0):
        fall_back("GPUs before sm_80 have neither TF32 nor bfloat16 products; HOPE_KERNELS=triton tries")
        return False
    return triton is not None and (choice == "triton" or choice == "auto" and z.is_cuda)


def chunks_by_triton(z: Tensor) -> bool:
    """Whether Triton runs `dgd_chunk` for tensors on z's device: where `uses_triton`, unless nothing forces it and
    tests/bench/gpu.json says that others are faster on this GPU (`python tests/bench/gpu.py --measure`)."""
    return taken("chunk", z)


def layers_by_triton(z: Tensor) -> bool:
    """The same for `fused.memory_layer`, and within `foreseen_on_gpu` for tensors without numbers."""
    if foreseen and (z.is_meta or isinstance(z, FakeTensor)):
        return chosen() == "triton" or chosen() == "auto" and not slow_at("layer")
    return taken("layer", z)


def taken(group: str, z: Tensor) -> bool:
    """Whether Triton runs what this group of tests/bench/measure.py times, for tensors on z's device."""
    if not uses_triton(z) or not z.is_cuda or chosen() == "triton":
        return uses_triton(z)
    return torch.cuda.get_device_name(z.device) not in slow_at(group)


@lru_cache(maxsize=None)
def slow_at(group: str) -> list[str]:
    """The GPU that was measured, if there Triton is wrong in what this group times, or fails, or takes longer for it and
    its backward pass than the fastest other way in the same precision, at the largest batch that was measured of both."""
    path = Path(__file__).with_name("tests") / "bench" / "gpu.json"
    found = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    ours, others = {}, {}  # batch -> us
    for row in found["rows"].get(group, []):
        if "forward_us" in row and row["how"] in ("triton", *OTHERS):
            of, us = ours if row["how"] == "triton" else others, row["forward_us"] + row["backward_us"]
            of[row["batch"]] = min(us, of.get(row["batch"], us))
    both = ours.keys() & others.keys()
    slow = ours[max(both)] > others[max(both)] if both else bool(others)
    for row in found["rows"].get("kernels", []):
        if row.get("kernel", "").startswith(CHECKED[group]):
            slow |= not (row["right"] and row["same_bits"])
    return [found["device"]["name"]] if slow and "device" in found else []


foreseen = False


@contextmanager
def foreseen_on_gpu() -> Iterator[None]:
    """For as long as it lasts, tensors without numbers (fake, or on meta) take `fused.memory_layer` for layers that it
    fits, as tensors on a GPU would, unless HOPE_KERNELS is "reference". All else is for them as on a CPU."""
    global foreseen
    before, foreseen = foreseen, True
    try:
        yield
    finally:
        foreseen = before


@contextmanager
def using(choice: str) -> Iterator[None]:
    """For as long as it lasts, HOPE_KERNELS is `choice`, for the whole process: "reference", "triton" or "auto"
    (see `uses_triton`). What it was comes back at the end, also after an error. ValueError for any other choice."""
    if choice not in CHOICES:
        raise ValueError(f"kernels.using({choice!r}): allowed are {', '.join(CHOICES)}")
    before = os.environ.get("HOPE_KERNELS")
    os.environ["HOPE_KERNELS"] = choice
    try:
        yield
    finally:
        if before is None:
            del os.environ["HOPE_KERNELS"]
        else:
            os.environ["HOPE_KERNELS"] = before


@lru_cache(maxsize=None)
def capability(device: torch.device) -> tuple[int, int]:
    """Of an NVIDIA GPU; (0, 0) for AMD's."""
    return (0, 0) if torch.version.hip else torch.cuda.get_device_capability(device)


def precision(device: torch.device) -> str:
    """How the chunk kernels multiply, see `_dot`. `torch.set_float32_matmul_precision("high")` allows plain TF32."""
    if device.type == "cuda" and capability(device) < (8, 0):  # AMD's multiply float32 as it is
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@lru_cache(maxsize=None)
def fall_back(why: str) -> None:
    warnings.warn(f"kernels: the plain PyTorch reference runs instead of Triton: {why}", stacklevel=3)


def suits(*tensors: Tensor | None) -> bool:
    """Whether `dgd_chunk`'s kernels take these M, m, X, ...; a warning, once, says why not."""
    M, _, X = tensors[:3]
    wrong = {z.dtype for z in tensors if z is not None} - {torch.float32, torch.bfloat16, torch.float16}
    if wrong:
        fall_back(f"no kernel for {', '.join(map(str, wrong))}; use float32 or bfloat16")
    elif max(M.shape[-2:]) > 256:
        fall_back(f"a memory of {M.shape[-2]} x {M.shape[-1]} is wider than 256; use more heads or a smaller `expand`")
    return not wrong and max(M.shape[-2:]) <= 256 and min(M.numel(), X.numel()) > 0


def scans(x: Tensor, width: int) -> bool:
    """Whether `memory_scan` runs for streams like x of heads this wide: by Triton, without gradients."""
    if torch.is_grad_enabled() or x.dtype == torch.float64 or not uses_triton(x):
        return False
    if width > 128:
        fall_back(f"chunk by chunk: heads of {width} are wider than 128, too wide for a single launch; use more heads")
    return width <= 128


def on_device(device: torch.device):
    """Kernels are launched on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

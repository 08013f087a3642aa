"""The operations that have forms of their own on a GPU: are they right there, and how quick?"""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.core import document_mask
from model.kernels import operations, plain
from model.kernels.rows import plan_rows
from scripts.gpu_parts.timed import kernels, milliseconds

Facts = Iterator[dict[str, Any]]
Form = Callable[..., Tensor]
OPTIONAL = (
    "ray", "deepspeed", "transformers", "vllm", "flash_attn", "liger_kernel", "torchao", "deep_gemm", "deep_ep",
    "torchtitan", "triton",
)  # fmt: skip
# heads, features of a key, features of a value: the 16B model's, the small recipe's, the tiny one's.
HEADS = ((16, 192, 128), (8, 96, 64), (8, 16, 16))
# experts, rows, features in and out. The last three: widths no kernel likes, an expert without rows, no row at all.
PRODUCTS = (
    (64, 24576, 2048, 1408), (16, 65536, 512, 256), (4, 1024, 128, 64), (8, 512, 100, 64), (64, 40, 64, 64),
)  # fmt: skip
NEAR = 2e-2  # of the largest value: bf16 keeps 8 bits, and sums round once more


def environment(device: torch.device) -> Facts:
    """Versions, the device, the rates it reaches alone, and which optional libraries are there."""
    yield {
        "case": "versions",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        yield {
            "case": "device", "name": about.name, "capability": f"{about.major}.{about.minor}",
            "bytes": about.total_memory, "cudnn": torch.backends.cudnn.version(), "nccl": torch.cuda.nccl.version(),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }  # fmt: skip
    size = 8192 if device.type == "cuda" else 512
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        took = milliseconds(lambda a=a, b=b: a @ b, device)
        yield {"case": f"product of two {size} x {size} {dtype}", "flops_per_s": 2 * size**3 / took * 1e3}
    source = torch.empty(2**31 if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    took = milliseconds(lambda: target.copy_(source), device)
    yield {"case": "copy", "bytes_per_s": 2 * source.numel() / took * 1e3}
    for name in OPTIONAL:
        try:
            yield {"case": f"library {name}", "version": getattr(importlib.import_module(name), "__version__", "?")}
        except Exception as error:  # noqa: BLE001 - a broken library is a finding, not an end
            yield {"case": f"library {name}", "missing": f"{type(error).__name__}: {str(error)[:100]}"}


def attention(device: torch.device) -> Facts:
    """Packed documents through our form, in values and gradients as the formula; then torch's kernels one by one."""
    seq = 4096 if device.type == "cuda" else 128
    doc_ids = (torch.arange(seq, device=device) // (seq // 4))[None]
    mask = document_mask(doc_ids)
    for heads, width, v_dim in HEADS:
        name = f"{heads} heads of {width}/{v_dim}"
        inputs = [
            torch.randn(1, heads, seq, dim, device=device, dtype=torch.bfloat16, requires_grad=True)
            for dim in (width, width, v_dim)
        ]
        flops = 7 * seq * seq * heads * (width + v_dim) // 4  # forward and backward of what four documents see
        known = (mask, width**-0.5, None, True)
        yield _against(name, operations.attention, plain.attention, (*inputs, *known), flops, device)
        if device.type == "cuda":
            yield from _fused(name, inputs, mask, device)
            yield _flex(name, inputs, doc_ids, mask, device)


def experts(device: torch.device) -> Facts:
    """The grouped feed-forward in bf16 and fp32 as the formula, in values and gradients, at odd widths as well."""
    for count, rows, width, inner in PRODUCTS:
        if device.type != "cuda" and rows > 1024:
            continue
        chosen = torch.rand(rows, count, device=device).topk(2, -1).indices
        shapes = (count, 2 * inner, width), (count, width, inner)
        matrices = [(torch.randn(*shape, device=device) * width**-0.5).requires_grad_() for shape in shapes]
        known = torch.rand(rows, 2, device=device), plan_rows(chosen, count)
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(rows, width, device=device, dtype=dtype, requires_grad=True)
            name = f"{count} experts, {rows} rows, {width} to {inner}, {str(dtype).removeprefix('torch.')}"
            inputs, flops = (x, *matrices, *known), 36 * rows * width * inner
            yield _against(name, operations.experts, plain.experts, inputs, flops, device)


def _against(
    name: str, form: Form, formula: Form, inputs: Sequence[Any], flops: int, device: torch.device
) -> dict[str, Any]:
    """A form beside its formula: how far values and gradients are apart, and the form's time."""
    try:
        found = _with_gradients(form, inputs)
        apart = max(map(_apart, found, _with_gradients(formula, inputs)))
        took = milliseconds(lambda: _with_gradients(form, inputs), device)
    except RuntimeError as error:  # a shape that a kernel refuses
        return {"case": name, "ok": False, "refused": str(error).splitlines()[0][:200]}
    counted = kernels(lambda: _with_gradients(form, inputs), device)
    return {"case": name, "ok": apart <= NEAR, "apart": apart, "ms": took, "flops_per_s": flops / took * 1e3, **counted}


def _with_gradients(form: Form, inputs: Sequence[Any]) -> list[Tensor]:
    """The value, and its gradients for the inputs that want one; the value's own gradient is drawn from a seed."""
    out = form(*inputs)
    generator = torch.Generator(out.device).manual_seed(0)
    grad = torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype)
    wanted = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
    return [out, *torch.autograd.grad(out, wanted, grad)]


def _apart(found: Tensor, meant: Tensor) -> float:
    """The largest difference, in shares of the largest value."""
    return float((found.float() - meant.float()).abs().max() / meant.float().abs().max().clamp_min(1e-30))


def _fused(name: str, inputs: Sequence[Tensor], mask: Tensor, device: torch.device) -> Facts:
    """Each of torch's fused kernels on the same call, forward and backward."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call() -> None:
        out = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION):
        case = f"{name}, {backend.name.lower()} with a mask"
        try:
            with sdpa_kernel(backend):
                yield {"case": case, "ms": milliseconds(call, device)}
        except RuntimeError as error:
            yield {"case": case, "refused": str(error).splitlines()[0][:200]}


def _flex(name: str, inputs: Sequence[Tensor], doc_ids: Tensor, mask: Tensor, device: torch.device) -> dict[str, Any]:
    """The compiled kernel that skips what documents hide."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (doc_ids[0][i] == doc_ids[0][j])

    seq, case = doc_ids.shape[1], f"{name}, flex_attention"
    try:
        blocks = create_block_mask(visible, 1, None, seq, seq, device=str(device))
        compiled = torch.compile(flex_attention, dynamic=False)

        def form(*given: Tensor) -> Tensor:
            return compiled(*given, block_mask=blocks)

        meant = _with_gradients(plain.attention, (*inputs, mask, inputs[0].shape[-1] ** -0.5, None, True))
        apart = max(map(_apart, _with_gradients(form, inputs), meant))
        return {"case": case, "ms": milliseconds(lambda: _with_gradients(form, inputs), device), "apart": apart}
    except Exception as error:  # noqa: BLE001 - a compiler's error is the finding
        return {"case": case, "refused": f"{type(error).__name__}: {str(error)[:200]}"}

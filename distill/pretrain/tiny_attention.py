"""Faster attention for training small bf16 models on a CPU.

PyTorch's fused CPU attention is slow backwards in bf16 (profiled: half of a training step of tiny-video); three
plain matrix products are twice as fast at 576 tokens. The switch is a mode of the calling thread for the duration
of a `with` block; nothing is patched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _Attention(torch.autograd.Function):
    """softmax(q k^T / sqrt(d) + bias) v for (b, h, n, d), all products in the inputs' dtype; bias (1, n, m) or None."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        b, h, n, d = q.shape
        q, k, v = (x.reshape(b * h, -1, d).contiguous() for x in (q, k, v))
        q = q * d**-0.5
        scores = torch.bmm(q, k.transpose(1, 2)) if bias is None else torch.baddbmm(bias, q, k.transpose(1, 2))
        p = torch.softmax(scores, -1)
        ctx.save_for_backward(q, k, v, p)
        ctx.shape = (b, h, -1, d)
        return torch.bmm(p, v).view(b, h, n, d)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, p = ctx.saved_tensors
        grad = grads[0].reshape(q.shape).contiguous()
        dv = torch.bmm(p.transpose(1, 2), grad)
        dp = torch.bmm(grad, v.transpose(1, 2))
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
        dq = torch.bmm(ds, k) * q.shape[-1] ** -0.5
        dk = torch.bmm(ds.transpose(1, 2), q)
        return dq.view(ctx.shape), dk.view(ctx.shape), dv.view(ctx.shape), None


class BmmAttention(TorchFunctionMode):
    """Within this context unmasked bf16 attention on the CPU is computed with batched matrix products."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
            call = dict(zip(names, args, strict=False)) | kwargs
            plain = call.get("attn_mask") is None and not call.get("dropout_p") and not call.get("is_causal")
            if plain and call.get("scale") is None and call["query"].device.type == "cpu":
                q, k, v = (call[n].to(torch.bfloat16) for n in ("query", "key", "value"))
                apply: Any = _Attention.apply
                return apply(q, k, v)
        return func(*args, **kwargs)


class MaskedBmmAttention(TorchFunctionMode):
    """Within this context all attention is batched matrix products under one mask, given once for all layers.

    seen: bool (n, m), True where a query sees a key; None for everywhere. The mask of the call itself is not read, so
    it has to say the same. Tensors on other devices than the CPU take the fused kernel.
    """

    def __init__(self, seen: Tensor | None) -> None:
        super().__init__()
        self.bias = None
        if seen is not None:
            self.bias = torch.zeros(1, *seen.shape).masked_fill(~seen.cpu(), -torch.inf)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention and args[0].device.type == "cpu":
            apply: Any = _Attention.apply
            dtype = args[2].dtype  # under autocast rotary positions leave queries and keys in float32, values in bf16
            bias = None if self.bias is None else self.bias.to(dtype)
            return apply(*(x.to(dtype) for x in args[:3]), bias)
        return func(*args, **(kwargs or {}))

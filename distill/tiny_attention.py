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
    """softmax(q k^T / sqrt(d)) v for (b, h, n, d), all products in the inputs' dtype."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, n, d = q.shape
        q, k, v = (x.reshape(b * h, -1, d).contiguous() for x in (q, k, v))
        q = q * d**-0.5
        p = torch.softmax(torch.bmm(q, k.transpose(1, 2)), -1)
        ctx.save_for_backward(q, k, v, p)
        ctx.shape = (b, h, -1, d)
        return torch.bmm(p, v).view(b, h, n, d)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, p = ctx.saved_tensors
        grad = grads[0].reshape(q.shape).contiguous()
        dv = torch.bmm(p.transpose(1, 2), grad)
        dp = torch.bmm(grad, v.transpose(1, 2))
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
        dq = torch.bmm(ds, k) * q.shape[-1] ** -0.5
        dk = torch.bmm(ds.transpose(1, 2), q)
        return dq.view(ctx.shape), dk.view(ctx.shape), dv.view(ctx.shape)


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

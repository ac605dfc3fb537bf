"""A judge of samples: what the blocks of a network see of them, and a small head on each.

Sauer et al., Fast High-Resolution Image Synthesis with Latent Adversarial Diffusion Distillation, arXiv 2403.12015,
section 3: a frozen diffusion network is the discriminator's eye, at noise levels that are drawn. What differs from it
and from SANA-Sprint (arXiv 2503.09641, section 3.3): a head looks at one token after the other and has neither batch nor
spectral normalisation, so that a row's loss does not depend on its neighbours and no pass over the data changes a
buffer.

Shapes: B rows; x, z [B, ...]; tau float64 [B] radians; features of block h [B, ...]; its logits [B, L_h], one a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, leaky_relu, relu, softplus

from hasten.distill.network.host_call import Condition
from hasten.distill.network.paths import spread
from hasten.distill.network.roles import Role
from hasten.errors import ModelError, UsageError, nearest
from hasten.pipelines.host import Output
from hasten.pipelines.seams.structure import candidates

Rule = Literal["hinge", "softplus"]
"""`hinge`: LADD's. `softplus`: the logistic loss of the first GANs, whose best logit is log p - log q."""

Speaker = Callable[[Tensor, Tensor, Condition], Tensor]
"""(x, tau, condition) -> F: one evaluation of the network that is listened to."""

BLOCKS = 4
"""How many blocks are listened to where none are named."""


class Head(nn.Module):
    """features [B, L, C] -> logits float32 [B, L]. The last layer starts at zero: at first a judge says nothing, and
    pulls nobody anywhere. The same weights for the same number, whatever was drawn before."""

    def __init__(self, channels: int, width: int, number: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(number)
        self.first, self.middle = (_unfilled(many, width) for many in (channels, width))
        # Without a bias: at first, what data and samples say of one cancels, and Adam would make a step of the rounding.
        self.last = _unfilled(width, 1, bias=False)
        with torch.no_grad():
            for layer in (self.first, self.middle):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
                nn.init.zeros_(layer.bias)
            nn.init.zeros_(self.last.weight)

    def forward(self, features: Tensor) -> Tensor:
        features = features.to(self.first.weight.dtype)
        # A single channel is all that it is: normalised, it would be zero whatever it says.
        plain = features if features.shape[-1] == 1 else layer_norm(features, features.shape[-1:])
        inner = leaky_relu(self.first(plain), 0.2)
        inner = inner + leaky_relu(self.middle(inner), 0.2)
        logits: Tensor = self.last(inner)[..., 0]
        return logits


class Judge:
    """Heads on blocks of a role's network.

    blocks: names of modules; () for four, evenly among the network's lists of blocks. Where a block returns several
    tensors, its largest is looked at: that of the picture, but for very long prompts. Raises `ModelError` for a network
    without lists of blocks, or whose blocks return no rows; `UsageError` for names that it lacks.
    """

    def __init__(self, role: Role, blocks: Sequence[str] = (), width: int = 64) -> None:
        self.role = role
        network = role.host.network
        self.names = tuple(blocks) or _some_blocks(network)
        modules = dict(network.named_modules())
        for name in self.names:
            if name not in modules:
                raise UsageError(f"{type(network).__name__} has no block {name!r}.{nearest(name, modules)}")
        self._sites = [modules[name] for name in self.names]
        parameter = next(network.parameters())
        made = [Head(channels, width, number) for number, channels in enumerate(self._channels())]
        self.heads = nn.ModuleList(made).to(parameter.device)

    @contextmanager
    def listening(self) -> Iterator[list[Tensor]]:
        """While open, each evaluation adds the blocks' features [B, L, C], in the order of `names`; then no hook is left."""
        found: list[Tensor] = []

        def heard(_: nn.Module, __: Any, answer: Any) -> None:
            found.append(_tokens(max(Output(answer).tensors, key=Tensor.numel)))

        with ExitStack() as stack:
            for site in self._sites:
                handle = site.register_forward_hook(heard)
                stack.callback(handle.remove)
            yield found

    def logits(self, features: Sequence[Tensor]) -> list[Tensor]:
        """A head's opinion of every token: [B, L_h] for each block."""
        if len(features) != len(self.heads):
            raise ModelError(f"{len(self.heads)} blocks were listened to, and {len(features)} answers came in one evaluation.")
        return [head(each) for head, each in zip(self.heads, features, strict=True)]

    def asked(self, x: Tensor, tau: Tensor, condition: Condition, speak: Speaker | None = None) -> list[Tensor]:
        """Logits on x of noise level tau. speak: evaluates the network; the role itself if None."""
        with self.listening() as features:
            (speak or self.role.velocity)(x, tau, condition)
        return self.logits(features)

    def pull(
        self, made: Tensor, tau: Tensor, z: Tensor, condition: Condition, rule: Rule, speak: Speaker | None = None
    ) -> tuple[Tensor, Tensor]:
        """(student's loss [B], its gradient by `made` [B, ...]), both without a graph.

        No gradient reaches heads or network, whoever trains them: only the way back to `made` is walked.
        """
        with torch.enable_grad(), self.role.playing():
            leaf = made.detach().requires_grad_()
            rows = of_student(self.asked(noised(leaf, tau, z), tau, condition, speak), rule)
            (gradient,) = torch.autograd.grad(rows.sum(), leaf)
        return rows.detach(), gradient

    def _channels(self) -> list[int]:
        """Features of each block, seen in an evaluation of one row of zeros."""
        host = self.role.host
        like = next(host.network.parameters())
        x = torch.zeros(1, *host.shape, device=like.device)
        with torch.no_grad(), self.listening() as features:
            host(x, torch.full((1,), 0.5, device=like.device), Condition({}))
        odd = [tuple(each.shape) for each in features if len(each) != 1]
        if odd or len(features) != len(self.names):
            raise ModelError(
                f"The blocks {', '.join(self.names)} of {type(host.network).__name__} cannot be judged: {len(features)} of"
                f" them answered, {len(odd)} with something else than one row for one row. Name others in `blocks`."
            )
        return [int(each.shape[-1]) for each in features]


def noised(x0: Tensor, tau: Tensor, z: Tensor) -> Tensor:
    """cos(tau) x0 + sin(tau) z."""
    return spread(tau.cos(), x0) * x0 + spread(tau.sin(), x0) * z


def of_judge(real: Sequence[Tensor], fake: Sequence[Tensor], rule: Rule) -> Tensor:
    """The judge's loss [B]: real samples shall get high logits, made ones low ones."""
    if rule == "hinge":
        return (_rows(real, lambda d: relu(1 - d)) + _rows(fake, lambda d: relu(1 + d))) / 2
    return _rows(real, lambda d: softplus(-d)) + _rows(fake, softplus)


def of_student(fake: Sequence[Tensor], rule: Rule) -> Tensor:
    """The student's loss [B]: what it makes shall get high logits."""
    return _rows(fake, lambda d: -d) if rule == "hinge" else _rows(fake, lambda d: softplus(-d))


def carried(rows: Tensor, made: Tensor, gradient: Tensor) -> Tensor:
    """`rows` [B], whose gradient by `made` is `gradient`: what was differentiated before goes on into the student."""
    product = (made * gradient).flatten(1).sum(1)
    return rows + (product - product.detach())


def _rows(logits: Sequence[Tensor], loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean over tokens, then over heads: every block has one voice. [B]."""
    return torch.stack([loss(each).mean(1) for each in logits]).mean(0)


def _unfilled(inner: int, outer: int, bias: bool = True) -> nn.Linear:
    """A layer without numbers, which draws none."""
    return nn.Linear(inner, outer, bias, device="meta").to_empty(device="cpu")


def _tokens(features: Tensor) -> Tensor:
    """[B, C], [B, L, C] or a convolution's [B, C, ...] as [B, L, C]."""
    if features.ndim == 2:
        return features[:, None]
    return features if features.ndim == 3 else features.flatten(2).transpose(1, 2)


def _some_blocks(network: nn.Module) -> tuple[str, ...]:
    names = [f"{name}.{number}" for name, blocks in candidates(network).items() for number in range(len(blocks))]
    if not names:
        raise ModelError(
            f"{type(network).__name__} keeps no lists of blocks to listen to. Name modules of it in `blocks`."
        )
    places = [round((k + 1) * len(names) / BLOCKS) - 1 for k in range(BLOCKS)]
    return tuple(dict.fromkeys(names[max(0, place)] for place in places))

"""Who plays whom: teacher, student, target and critic on one frozen base, or on copies.

With adapters, every trained role is a LoRA of its own on the same weights, and the teacher is the base with none of them
(or with the style that was given as `base`): a role costs its adapter alone. With `full`, a role is a copy of the
network. Either way a role is asked for by name, and answers as a velocity on the circle (`paths.py`).

Shapes: B rows; x [B, ...] on the circle; tau float64 [B] radians; F float32 [B, ...].
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hasten.distill.loop.draw import Draw
from hasten.distill.network.host_call import Condition, HostCall
from hasten.distill.network.paths import guided, spread
from hasten.distill.network.timed_lora import HOLDER, give_time
from hasten.errors import ModelError, UsageError

if TYPE_CHECKING:
    from hasten.distill.network.role_attention import RoleAttention

TARGETS = ("Linear", "Conv1d", "Conv2d", "Conv3d")
"""Kinds of layers that an adapter is put on where no names are given."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA: rank, alpha (its scale is alpha / rank), and the layers it is on: ends of their names, None for all
    linear and convolutional ones. experts: parts of the ranks whose weights follow the time; 1 for an ordinary LoRA."""

    rank: int = 32
    alpha: float = 32.0
    layers: tuple[str, ...] | None = None
    experts: int = 1


class Role:
    """One player: a network and the adapters that are on while it plays.

    adapters: names, () for the base as it is. `trained`: whether its weights are to be changed. attention: what its
    network's attention does while somebody plays (None: always the network's own), and `sparse`, whether it does so here.
    """

    attention: RoleAttention | None = None
    sparse = False

    def __init__(self, name: str, host: HostCall, stage: Stage | None, adapters: tuple[str, ...], trained: bool) -> None:
        self.name, self.host, self.stage, self.adapters, self.trained = name, host, stage, adapters, trained

    def playing(self) -> AbstractContextManager[None]:
        """While open, the network is this role."""
        on = nullcontext() if self.stage is None else self.stage.on(self.adapters)
        if self.attention is None:
            return on
        return _all([on, self.attention.sparse() if self.sparse else self.attention.dense()])

    def answer(self, x: Tensor, tau: Tensor, condition: Condition) -> Tensor:
        """What the network itself says, in its own terms (`host.path.output`). x on the circle."""
        path = self.host.path
        with self.playing():
            return self.host(spread(path.scale(tau), x) * x, path.time(tau), condition)

    def velocity(self, x: Tensor, tau: Tensor, condition: Condition) -> Tensor:
        """F = dx / dtau."""
        p, q = (spread(factor, x) for factor in self.host.path.factors(self._within(tau)))
        return p * x + q * self.answer(x, tau, condition)

    def data(self, x: Tensor, tau: Tensor, condition: Condition) -> Tensor:
        """x0 as the role sees it from here: cos(tau) x - sin(tau) F."""
        return spread(tau.cos(), x) * x - spread(tau.sin(), x) * self.velocity(x, tau, condition)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name -> what is trained of this role: its last adapter's weights, or all of its network's."""
        named = dict(self.host.network.named_parameters())
        if self.stage is None:
            return named
        own = self.adapters[-1] if self.trained else None
        return {name: value for name, value in named.items() if own in name.split(".")}

    def _within(self, tau: Tensor) -> Tensor:
        end = getattr(self.host.path, "end", None)
        return tau if end is None else tau.clamp(max=end)


class Guided:
    """A role that is guided: u + s (c - u), in one evaluation of twice as many rows.

    s: a number, or float [B]; rows with s = 1 could do without, but a batch is evaluated as one.
    """

    def __init__(self, role: Role, empty: Condition, s: float | Tensor) -> None:
        self.role, self.empty, self.s = role, empty, s

    def velocity(self, x: Tensor, tau: Tensor, condition: Condition) -> Tensor:
        """F under guidance. The change from answers to velocities is linear, so either may be guided."""
        if isinstance(self.s, float) and self.s == 1.0:
            return self.role.velocity(x, tau, condition)
        both = Condition.join([condition, self.empty.rows(torch.zeros(len(x), dtype=torch.int64))])
        c, u = self.role.velocity(torch.cat([x, x]), torch.cat([tau, tau]), both).chunk(2)
        return guided(u, c, self.s)

    def playing(self) -> AbstractContextManager[None]:
        """As `Role.playing`."""
        return self.role.playing()


class Stage:
    """A network with named adapters, of which some are on. Switching costs one pass over the adapted layers, and
    nothing where the wanted ones are on already."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network.requires_grad_(False)
        self._layers: list[Any] = []
        self._trained: list[nn.Parameter] = []
        self._active: tuple[str, ...] = ()
        self._style: tuple[str, ...] = ()

    def add(self, name: str, adapter: Adapter) -> None:
        """Put a new adapter, which changes nothing yet, on the network. Raises `UsageError` for layers that it lacks."""
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        wanted = list(adapter.layers) if adapter.layers else self._all()
        config = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=wanted)
        try:
            with warnings.catch_warnings():  # peft warns where there is an adapter already; here that is the point
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                inject_adapter_in_model(config, self.network, adapter_name=name)
        except ValueError as error:
            raise UsageError(f"The adapter {name!r} fits no layer of {type(self.network).__name__}: {error}") from error
        self._layers = [module for module in self.network.modules() if isinstance(module, BaseTunerLayer)]
        self._set(())

    def train(self, parameters: Iterable[nn.Parameter]) -> None:
        """Gradients for these, whichever adapters are on: a loss may be differentiated when another role plays. They are
        kept in float32 beside a base in half precision, which would round small steps away."""
        for parameter in parameters:
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
            self._trained.append(parameter)
        self._set(self._active)

    @contextmanager
    def on(self, names: tuple[str, ...]) -> Iterator[None]:
        """These adapters and no others, until the context ends; then those that were on before."""
        with self._only((*self._style, *names)):
            yield

    @contextmanager
    def styled(self, names: tuple[str, ...]) -> Iterator[None]:
        """While open, whoever plays has these adapters, too."""
        before, self._style = self._style, names
        try:
            yield
        finally:
            self._style = before

    def present(self) -> Callable[[], AbstractContextManager[None]]:
        """How to have the adapters on, later, that are on now."""
        playing = self._active
        return lambda: self._only(playing)

    @contextmanager
    def _only(self, names: tuple[str, ...]) -> Iterator[None]:
        before = self._active
        if names != before:
            self._set(names)
        try:
            yield
        finally:
            if names != before:
                self._set(before)

    def _set(self, names: tuple[str, ...]) -> None:
        for layer in self._layers:
            layer.set_adapter(list(names), inference_mode=True)
            layer.enable_adapters(bool(names))
        self._active = names
        for parameter in self._trained:
            parameter.requires_grad_(True)

    def _all(self) -> list[str]:
        """Full names of the layers that an adapter can be on and that are no adapter's own."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        found = [
            name
            for name, module in self.network.named_modules()
            if isinstance(module, BaseTunerLayer) or type(module).__name__ in TARGETS
        ]
        tuned = tuple(f"{name}." for name in found)
        return [name for name in found if not name.startswith(tuned)]


class Roles(dict[str, Role]):
    """name -> role, of one training. styles: adapters on the network, of which one may be on for all roles in a step, and
    where each came from."""

    styles: Mapping[str, str] = MappingProxyType({})

    @classmethod
    def on_one_base(cls, host: HostCall, trained: Iterable[str], adapter: Adapter, base: Iterable[str] = ()) -> Self:
        """teacher, and each of `trained` as an adapter on the teacher's own weights.

        base: adapters that are already on the network and that every role keeps (a style), the teacher too.
        """
        stage = Stage(host.network)
        stays = tuple(base)
        roles = cls(teacher=Role("teacher", host, stage, stays, False))
        for name in trained:
            stage.add(name, adapter)
            if adapter.experts > 1:
                give_time(host, name, adapter.experts)
            roles[name] = Role(name, host, stage, (*stays, name), True)
            stage.train(roles[name].parameters().values())
        return roles

    @classmethod
    def of_copies(cls, host: HostCall, trained: Iterable[str]) -> Self:
        """teacher, and each of `trained` as a whole copy of it: as much memory again for every role."""
        host.network.requires_grad_(False)
        roles = cls(teacher=Role("teacher", host, None, (), False))
        for name in trained:
            twin = replace(host, network=copy.deepcopy(host.network).requires_grad_(True))
            roles[name] = Role(name, twin, None, (), True)
        return roles

    def recompute(self) -> None:
        """Keep the activations of no block: each is evaluated again in the backward pass (gradient checkpointing).

        Raises `ModelError` for a network that diffusers cannot do that with.
        """
        for role in self.values():
            network: Any = role.host.network
            if HOLDER in network._modules:
                raise UsageError("Experts follow the time of the last call, and checkpointing evaluates again later. Leave it out.")
            if not getattr(network, "_supports_gradient_checkpointing", False):
                raise ModelError(f"{type(network).__name__} has no gradient checkpointing. Leave train.checkpointing out.")
            keepers = [keeper for keeper in (role.stage, role.attention) if keeper is not None]
            network.enable_gradient_checkpointing(_recomputing(keepers) if keepers else None)

    def styled(self, draw: Draw) -> AbstractContextManager[None]:
        """While open, everybody has the style of this step: one of `styles` or none, each as often."""
        stage = self["teacher"].stage
        if not self.styles or stage is None:
            return nullcontext()
        number = draw.one_below("style", len(self.styles) + 1)
        return stage.styled(tuple(self.styles)[number - 1 : number] if number else ())

    def of(self, name: str) -> Role:
        """This role. Raises `ModelError` where the training has none of that name."""
        if name not in self:
            raise ModelError(f"This training has no role {name!r}; it has {', '.join(self)}.")
        return self[name]


class _Keeper(Protocol):
    def present(self) -> Callable[[], AbstractContextManager[None]]: ...


def _recomputing(keepers: Sequence[_Keeper]) -> Callable[..., Any]:
    """How a block is evaluated once more in the backward pass instead of keeping what it computed. The role that plays now
    plays then, too, whoever does otherwise."""

    def recomputed(block: Any, *args: Any, **kwargs: Any) -> Any:
        now = [keeper.present() for keeper in keepers]
        again = (nullcontext(), _all(each() for each in now))
        return checkpoint(block, *args, use_reentrant=False, context_fn=lambda: again, **kwargs)

    return recomputed


@contextmanager
def _all(contexts: Iterable[AbstractContextManager[Any]]) -> Iterator[None]:
    """Several contexts as one, entered in order when it is."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


@torch.no_grad()
def follow(target: Role, student: Role, decay: float) -> None:
    """target <- decay target + (1 - decay) student, weight by weight (an exponential average)."""
    own: list[Tensor] = list(target.parameters().values())
    new: list[Tensor] = list(student.parameters().values())
    torch._foreach_lerp_(own, new, 1 - decay)

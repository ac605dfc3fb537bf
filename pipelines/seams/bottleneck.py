"""Bottleneck Sampling on an unmodified pipeline: its scheduler hands back latents of another size.

The pipeline's loop hands what the scheduler's `step` returns to its network and does not look at the size; where it does,
because it tells the network the places of its tokens, the network is told fitting ones, or the pipeline is refused.

Shapes: B rows; x [B, C, H, W] or [B, C, F, H, W] the latents, or tokens [B, S, D] of 2 x 2 latents each (FLUX).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.errors import RefusedError, UsageError
from hasten.level import Level
from hasten.pipelines.host import Layout, denoisers, is_whole_compiled
from hasten.pipelines.quiet import quiet
from hasten.pipelines.seams.few_calls import generators
from hasten.pipelines.seams.host_path import HostPath
from hasten.samplers.bottleneck import Bottleneck, Stage, nodes
from hasten.samplers.data_steps import noise_in, renoised, toward
from hasten.scheduler import is_flow
from hasten.session import Attachment

Size = tuple[int, ...]
Note = Callable[[str], None]

PLACED = ("image_rotary_emb", "rotary_emb", "freqs_cis", "img_shapes", "video_coords", "rope_interpolation_scale", "freqs_cos")
"""Arguments of networks that hold the places of tokens in a form that is not known here."""

PACKED = ["latents", "batch_size", "num_channels_latents", "height", "width"]
"""Arguments of `_pack_latents` of the pipelines that fold 2 x 2 latents into a token."""

IDS = "img_ids"
"""The argument that holds them as rows (., y, x) of whole numbers: FLUX.1's."""


class Latents:
    """How the latents of one pipeline are laid out and resized. patch: (frames, height, width) of one token."""

    def __init__(self, network: nn.Module, packed: bool) -> None:
        config: Any = network.config
        patch = getattr(config, "patch_size", 1) or 1
        space = patch[-1] if isinstance(patch, list | tuple) else patch
        halvings = len(getattr(config, "down_block_types", None) or (0,)) - 1  # a UNet halves its input so often
        self.packed = packed
        self.read: int | None = getattr(config, "in_channels", None)
        self.side = 2 if packed else int(space) * 2**halvings
        self.time = int(patch[0]) if isinstance(patch, list | tuple) and len(patch) == 3 else 1
        self.rows: int | None = None  # of tokens, where they are packed

    def opened(self, x: Tensor) -> Tensor:
        """Latents with axes of space."""
        if not self.packed:
            return x
        if self.rows is None or x.shape[1] % self.rows:
            raise RefusedError(f"The places of this network's {x.shape[1]} tokens are not those of a picture.")
        x = x.reshape(len(x), self.rows, -1, x.shape[2] // 4, 2, 2)
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def closed(self, x: Tensor) -> Tensor:
        """The same as the pipeline has them."""
        if not self.packed:
            return x
        x = x.reshape(*x.shape[:2], x.shape[2] // 2, 2, x.shape[3] // 2, 2)
        self.rows = x.shape[2]
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def size(self, full: Size, stage: Stage) -> Size:
        """([F,] H, W) of a stage, whole patches; full: those of the pipeline."""
        *frames, height, width = full
        told = [max(self.side, round(side * stage.scale / self.side) * self.side) for side in (height, width)]
        if frames:
            told = [self._frames(frames[0], stage.frames), *told]
        return tuple(told)

    def _frames(self, frames: int, share: float) -> int:
        """The first latent frame of a clip is a picture; those after it are shared out."""
        return frames if share == 1 else max(self.time, round((1 + (frames - 1) * share) / self.time) * self.time)

    @staticmethod
    def resized(x: Tensor, size: Size) -> Tensor:
        """Averages where it shrinks, straight lines in between where it grows."""
        if tuple(x.shape[2:]) == size:
            return x
        small = tuple(min(a, b) for a, b in zip(x.shape[2:], size, strict=True))
        if small != tuple(x.shape[2:]):
            x = F.interpolate(x, size=small, mode="area")
        return x if small == size else F.interpolate(x, size=size, mode="trilinear" if len(size) == 3 else "bilinear")


class StagedRun:
    """One run in the making: its evaluations, and what is known of the present stage."""

    def __init__(self, part: Bottleneck, path: HostPath, latents: Latents, note: Note) -> None:
        self.part, self.latents, self.note = part, latents, note
        self.nodes = nodes(part, path.steps)
        found = [path.at(node.progress, part.stages[node.stage].shift) for node in self.nodes]
        self.times = [time for time, _ in found]
        self.levels = [level for _, level in found]
        self.index = 0
        self.full: Size = ()
        self.noise: list[torch.Generator] = []
        self._before: tuple[Tensor, Level] | None = None
        self._kept: dict[Size, Tensor] = {}

    def go(self, answer: Tensor, x: Tensor) -> Tensor:
        """The latents of the next evaluation; in the end the data."""
        if self.index >= len(self.nodes):
            raise RefusedError(f"This run has {len(self.nodes)} evaluations, and its loop asked for another.")
        if self.index == 0:
            self.noise, self.full = generators(x), tuple(self.latents.opened(x).shape[2:])
            self._check(x)
            self._say_rounded()
        node, level = self.nodes[self.index], self.levels[self.index]
        assert level.data is not None
        a, b = level.data
        own = x.float()
        data = own * a + answer.float() * b
        self.index += 1
        if self.index == len(self.nodes):
            return data.to(x.dtype)
        after = self.levels[self.index]
        if node.last:
            self._before = None
            return self._changed(own, data, level, after, self.part.stages[node.stage + 1]).to(x.dtype)
        made = toward(own, data, level, after, self._before)
        self._before = (data, level) if self.part.order == 2 else None
        return made.to(x.dtype)

    def _changed(self, x: Tensor, data: Tensor, level: Level, after: Level, stage: Stage) -> Tensor:
        """The data at the next stage's size, with the noise of its first level."""
        x, data = self.latents.opened(x), self.latents.opened(data)
        size = self.latents.size(self.full, stage)
        if self.part.noise == "kept":
            self._kept[tuple(data.shape[2:])] = noise_in(x, data, level)
        data = self.latents.resized(data, size)
        noise = self._kept.get(size)
        if noise is None:
            noise = torch.stack([torch.randn(data.shape[1:], generator=each) for each in self.noise]).to(data.device)
        return self.latents.closed(renoised(data, noise, after))

    def _check(self, x: Tensor) -> None:
        channels, read = x.shape[2 if self.latents.packed else 1], self.latents.read
        if read is not None and read != channels:
            raise RefusedError(
                f"The network reads {read} channels, and the loop walks {channels}: it joins something to the latents that is"
                " not resized with them. Several resolutions are for pipelines that do not."
            )

    def _say_rounded(self) -> None:
        for stage in self.part.stages:
            told = [side * stage.scale for side in self.full[-2:]]
            made = self.latents.size(self.full, stage)[-2:]
            if tuple(told) != made:
                self.note(
                    f"Latents of {self.full[-2]} x {self.full[-1]} times {stage.scale:g} are no whole patches;"
                    f" {made[0]} x {made[1]} are used."
                )


class _Staged:
    """What is put onto one pipeline. run: the one in the making, None before the first."""

    def __init__(self, pipe: Any, part: Bottleneck, note: Note) -> None:
        networks = denoisers(pipe)
        self.part, self.note = part, note
        self.networks = list(networks.values())
        self.layouts = [Layout.of(network) for network in self.networks]
        _refuse_unknown(pipe, self.networks, self.layouts)
        self.packed = any(IDS in layout.names for layout in self.layouts)
        self.latents = Latents(self.networks[0], self.packed)
        self.run: StagedRun | None = None
        self._ids: dict[tuple[int, int], Tensor] = {}

    def scheduler(self, host: Any) -> Any:
        """A scheduler of diffusers with the run's levels and steps, on the path of `host`."""
        import diffusers

        path = type(host).from_config(host.config)
        kind = "FlowMatchEulerDiscreteScheduler" if is_flow(host) else "DPMSolverMultistepScheduler"
        with quiet("diffusers"):
            made: Any = getattr(diffusers, kind).from_config(host.config)

        @functools.wraps(path.set_timesteps)
        def set_timesteps(*args: Any, **kwargs: Any) -> None:
            path.set_timesteps(*args, **kwargs)
            walked = HostPath(path)
            self.run = StagedRun(self.part, walked, self.latents, self.note)
            device = torch.as_tensor(path.timesteps).device
            kind = torch.float32 if walked.flow else torch.int64
            made.timesteps = torch.tensor(self.run.times, dtype=kind, device=device)
            made.sigmas = torch.tensor([*(level.sigma for level in self.run.levels), 0.0], device=device)
            made.num_inference_steps = len(self.run.times)

        @functools.wraps(made.step)
        def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.run is None:
                raise RefusedError("This scheduler has not been told how many steps to take: call set_timesteps first.")
            return _answer(self.run.go(model_output, sample))

        made.set_timesteps, made.step = set_timesteps, step
        return made

    def forward(self, forward: Any, layout: Layout, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A network's forward that is told the places of the tokens it gets."""
        told = dict(zip(layout.names, args, strict=False)) | kwargs
        x, ids = told[layout.sample], told.get(IDS)
        if isinstance(ids, Tensor) and isinstance(x, Tensor):
            if self.run is not None and self.run.index == 0:
                self.latents.rows = int(ids[..., 1].max()) + 1
                self._ids.clear()
            if x.shape[1] != ids.shape[-2]:
                told[IDS] = self._places(ids, x.shape[1])
        return forward(**told)

    def _places(self, ids: Tensor, tokens: int) -> Tensor:
        """Places of the low resolution's tokens, of the form of those of the full one."""
        rows = self.latents.rows
        assert rows is not None
        key = (rows, tokens)
        if key not in self._ids:
            columns = tokens // rows
            y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            places = torch.zeros(tokens, ids.shape[-1])
            places[:, 1], places[:, 2] = y.flatten(), x.flatten()
            if self.part.positions == "stretched":
                largest = ids.flatten(0, -2).amax(0).cpu().float() + 1
                places[:, 1] = (places[:, 1] + 0.5) * largest[1] / rows - 0.5
                places[:, 2] = (places[:, 2] + 0.5) * largest[2] / columns - 0.5
            self._ids[key] = places.to(ids)
        return self._ids[key].expand(*ids.shape[:-2], -1, -1)


def _refuse_unknown(pipe: Any, networks: list[nn.Module], layouts: list[Layout]) -> None:
    """Raises `RefusedError` for pipelines whose loop looks at the size of the latents, by name."""
    for network, layout in zip(networks, layouts, strict=True):
        placed = [name for name in PLACED if name in layout.names]
        placed += [name for name in ("height", "width", "num_frames") if name in layout.names]
        if placed:
            raise RefusedError(
                f"{type(network).__name__} is told {', '.join(placed)} by its pipeline, which are of one resolution; no"
                " other can be put in their place here. Several resolutions are for networks that see the size of their input."
            )
        if IDS in layout.names and is_whole_compiled(network):
            raise RefusedError(f"This {type(network).__name__} is compiled as a whole, so that it cannot be told other places.")
        if IDS in layout.names and not _packs_by_twos(pipe):
            raise RefusedError(f"{type(pipe).__name__} folds its latents into tokens in a way that is not known here.")
    call = inspect.signature(type(pipe).__call__).parameters
    fixed = [name for name in ("strength", "mask_image", "control_image", "controlnet_conditioning_scale") if name in call]
    if fixed:
        raise RefusedError(
            f"{type(pipe).__name__} takes {', '.join(fixed)}: its loop starts in the middle or holds pictures of one size. Several"
            " resolutions are for pipelines that make pictures from noise and words alone."
        )
    if pipe.config.get("expand_timesteps"):
        raise RefusedError(f"This {type(pipe).__name__} tells its network a time for each token (expand_timesteps), of one size.")


def _packs_by_twos(pipe: Any) -> bool:
    """Does it fold 2 x 2 latents into a token, as FLUX.1's pipelines do?"""
    pack = getattr(type(pipe), "_pack_latents", None)
    return pack is not None and list(inspect.signature(pack).parameters) == PACKED


def _answer(x: Tensor) -> Any:
    from diffusers.schedulers.scheduling_utils import SchedulerOutput

    return SchedulerOutput(prev_sample=x)


def sample_in_stages(attachment: Attachment, pipe: Any, part: Bottleneck, note: Note) -> str:
    """Let `pipe` change its resolution on the way until `attachment` is restored. Returns what was done, in words.

    Raises `RefusedError` for pipelines where that cannot be right, and for schedulers that do not say how noisy they are.
    """
    if not hasattr(pipe, "scheduler"):
        raise UsageError(f"{type(pipe).__name__} has no scheduler of its own, which several resolutions need.")
    staged = _Staged(pipe, part, note)
    attachment.replace(pipe, "scheduler", staged.scheduler(pipe.scheduler))
    if staged.packed:
        for network, layout in zip(staged.networks, staged.layouts, strict=True):
            inner = network.forward

            @functools.wraps(inner)
            def forward(*args: Any, _inner: Any = inner, _layout: Layout = layout, **kwargs: Any) -> Any:
                return staged.forward(_inner, _layout, args, kwargs)

            attachment.replace(network, "forward", forward)
    return told(part)


def told(part: Bottleneck) -> str:
    """The stages in words."""
    each = [
        f"{stage.begin:g} to {stage.until:g} in {stage.steps:g} of the steps at scale {stage.scale:g}"
        + (f" and {stage.frames:g} of the frames" if stage.frames != 1 else "")
        for stage in part.stages
    ]
    return "; ".join(each) + f"; noise {part.noise}"

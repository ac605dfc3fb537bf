"""Fewer layers of a causal model: leaving layers out, nested exits, routers that read the prompt.

Shapes: B texts of at most L tokens; K layers; V logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hasten.distill.loop.draw import Draw
from hasten.distill.method import Batch, Facts
from hasten.distill.methods.first import First, Routers, route, routed_states
from hasten.distill.methods.sorted_exits import SortedExits, before, exit_states
from hasten.distill.network.host_call import Condition
from hasten.distill.network.roles import Adapter
from hasten.distill.text.depth import only
from hasten.distill.text.roles import TextCall, TextRoles, Texts
from hasten.errors import UsageError
from hasten.pipelines.text_models.families import choose
from tests.distill.test_text_methods import EOS, MASK, PAD, VOCAB, texts, trainer

DEPTH = 4


def deep(layers: int = DEPTH) -> Any:
    """A causal Llama of random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=3,
            num_key_value_heads=3, initializer_range=0.3, max_position_embeddings=64, eos_token_id=EOS, pad_token_id=PAD,
            bos_token_id=None,
        )  # fmt: skip
        made = LlamaForCausalLM(config).eval()
    made.config.mask_token_id = MASK
    made.config.hasten_diffusion = {"kind": "causal", "shifted": False}
    return made


def call(layers: int = DEPTH) -> TextCall:
    return TextCall.of(choose(deep(layers)))


def inside(rows: Texts) -> Tensor:
    return (rows.place >= rows.start[:, None]) & (rows.place < rows.end[:, None])


def stirred(layers: int = DEPTH, seed: int = 2) -> Routers:
    """Routers that want some layers for some prompts."""
    made = Routers(24, layers)
    with torch.no_grad():
        made.weight.copy_(torch.randn(made.weight.shape, generator=torch.Generator().manual_seed(seed)))
        made.bias.zero_()
    return made.requires_grad_(True)


# --- leaving layers out -----------------------------------------------------------------------------


def test_the_first_layers_are_the_model_of_so_many_layers() -> None:
    whole, ids = call(), torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
    for depth in range(1, DEPTH):
        small = deep(depth)
        small.load_state_dict({k: v for k, v in whole.network.state_dict().items() if k in small.state_dict()})
        with only(whole, [number < depth for number in range(DEPTH)]):
            found = whole.host.own(ids)
        torch.testing.assert_close(found, small(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_layers_that_are_left_out_do_not_run_and_come_back_bit_for_bit() -> None:
    whole, ids = call(), torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
    network: Any = whole.network
    before_it, ran = whole.host.own(ids), list[int]()
    for number, layer in enumerate(network.model.layers):
        layer.register_forward_hook(lambda module, args, out, number=number: ran.append(number))
    with only(whole, [True, False, True, False]):
        assert not torch.allclose(whole.host.own(ids), before_it, atol=1e-2)
        assert ran == [0, 2]
        grown = network.generate(ids, max_new_tokens=6, do_sample=False, min_new_tokens=6)
        told = ids
        for _ in range(6):  # without a cache: the whole text again for each token
            logits = whole.host.own(told)[:, -1]
            logits[:, EOS] = -torch.inf
            told = torch.cat([told, logits.argmax(1, keepdim=True)], 1)
        assert torch.equal(grown, told)
    assert set(ran) == {0, 2} and torch.equal(whole.host.own(ids), before_it)
    assert "layers" not in vars(network.model)


@pytest.mark.parametrize("which", [[False, True, True, True], [True, True]])
def test_the_first_layer_stays_and_every_layer_is_spoken_of(which: list[bool]) -> None:
    with pytest.raises(UsageError, match="all 4"), only(call(), which):
        pass


# --- nested exits -----------------------------------------------------------------------------------


def test_one_evaluation_gives_what_each_exit_alone_gives() -> None:
    roles = TextRoles.of_model(call(), (), Adapter(4, 4.0))
    role, rows = roles.text("teacher"), texts()
    asked = before(inside(rows))
    found = exit_states(role, rows, asked, (1, 3, 4))
    for number, depth in enumerate((1, 3, 4)):
        with only(role.call, [layer < depth for layer in range(DEPTH)]):
            alone = role.states(rows.ids, rows.end, asked)
        assert torch.equal(found[:, number], alone)
    assert torch.equal(exit_states(role, rows, asked, (3,))[:, 0], found[:, 1])


def test_the_loss_is_the_mean_cross_entropy_of_all_exits() -> None:
    whole, rows = call(), texts(1)
    state = SortedExits(exits=(3, 1)).start(Facts(TextRoles.of_model(whole, ("student",), Adapter(4, 4.0)), 1, (17,)))
    found = state.loss("student", Batch(rows.condition, Condition({})), Draw(0, 0, [0]), 0, {}).rows
    start, end = int(rows.start), int(rows.end)
    expected = []
    for depth in (1, 3, 4):
        with only(whole, [layer < depth for layer in range(DEPTH)]):
            logits = whole.allowed(whole.host.own(rows.ids[:, :end])[0])
        expected.append(F.cross_entropy(logits[start - 1 : end - 1], rows.ids[0, start:end]))
    torch.testing.assert_close(found, torch.stack(expected).mean()[None], rtol=1e-4, atol=1e-4)


def test_exits_that_a_model_has_not_are_refused(tmp_path: Path) -> None:
    assert SortedExits().of(7) == (2, 4, 6, 7) and SortedExits(exits=(5, 1, 5)).of(6) == (1, 5, 6)
    for method in (SortedExits(exits=(0,)), SortedExits(exits=(1, 2)), SortedExits()):
        with pytest.raises(UsageError, match="after 1 to 1 of them"):
            trainer(method, tmp_path, kind="causal")


# --- routers ----------------------------------------------------------------------------------------


def test_values_in_training_are_those_of_layers_that_are_really_left_out() -> None:
    roles, rows, routers = TextRoles.of_model(call(), (), Adapter(4, 4.0)), texts(12), stirred()
    role, asked = roles.text("teacher"), before(inside(rows))
    with torch.no_grad():
        states, share = routed_states(role, routers, rows, asked)
    row, seen = asked.nonzero()[:, 0], set[tuple[bool, ...]]()
    for number, (start, end) in enumerate(zip(rows.start.tolist(), rows.end.tolist(), strict=True)):
        which = route(role.call, routers, rows.ids[number : number + 1, :start])[0]
        seen.add(tuple(which.tolist()))
        with only(role.call, which.tolist()):
            alone = role.call.inner(rows.ids[number : number + 1, :end])[0, start - 1 : end - 1]
        torch.testing.assert_close(states[row == number], alone, rtol=1e-4, atol=1e-4)
        assert float(share[number]) == pytest.approx(float(which.float().mean()))
    assert len(seen) > 3


def test_prompts_are_routed_together_as_alone() -> None:
    whole, routers = call(), stirred()
    prompts = torch.randint(3, VOCAB, (9, 5), generator=torch.Generator().manual_seed(4))
    together, ran = route(whole, routers, prompts), list[int]()
    alone = torch.cat([route(whole, routers, prompt[None]) for prompt in prompts])
    assert torch.equal(together, alone) and bool(together[:, 0].all()) and 0 < int(together[:, 1:].sum()) < 27
    network: Any = whole.network
    for layer in network.model.layers:
        layer.register_forward_hook(lambda module, args, out: ran.append(len(args[0])))
    route(whole, routers, prompts)
    assert ran == [count for count in together.sum(0).tolist() if count]


def test_a_router_s_gradient_is_that_of_the_mixture() -> None:
    """The share of layers moves by p (1 - p) / K with a router's bias; a state by p (1 - p) times what its layer adds."""
    roles, rows, routers = TextRoles.of_model(call(2), (), Adapter(4, 4.0)), texts(1), stirred(2)
    role, asked = roles.text("teacher"), before(inside(rows))
    states, share = routed_states(role, routers, rows, asked)
    seen: list[Tensor] = []
    network: Any = role.call.network
    network.model.layers[1].register_forward_hook(lambda module, args, out: seen.extend((args[0], out)))
    role.call.inner(rows.ids[:, : int(rows.end)])
    chance = routers.chance(1, seen[0], rows.start).detach()
    slope = (chance * (1 - chance))[0]
    grad = torch.autograd.grad(share.sum(), routers.bias, retain_graph=True)[0]
    torch.testing.assert_close(grad[0], slope / 2)
    weight = torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
    grad = torch.autograd.grad((states * weight).sum(), routers.bias)[0]
    x, y = (state[0, int(rows.start) - 1 : int(rows.end) - 1] for state in seen)
    chosen = y if bool(chance >= 0.5) else x
    _, way = torch.autograd.functional.jvp(network.model.norm, chosen, y - x)
    torch.testing.assert_close(grad[0], slope * (way * weight).sum(), rtol=1e-3, atol=1e-4)


def test_layers_that_cost_too_much_are_given_up_and_free_ones_are_kept(tmp_path: Path) -> None:
    shares = {}
    for cost in (0.0, 20.0):
        done = trainer(First(share=cost), tmp_path / str(cost), kind="causal", steps=40, lr=0.1)
        done.fit()
        rows = texts()
        state: Any = done.state
        shares[cost] = routed_states(state.learner, state.routers, rows, before(inside(rows)))[1].detach()
    assert bool((shares[20.0] == 0.5).all()) and float(shares[0.0].mean()) > 0.5

from __future__ import annotations

import pytest
from torch import nn

from hasten.session import Attachment


class Thing:
    def hello(self) -> str:
        return "class"


def test_replaced_and_put_back_in_reverse_order() -> None:
    thing, attachment = Thing(), Attachment()
    assert attachment.replace(thing, "hello", lambda: "one")() == "class"
    assert attachment.replace(thing, "hello", lambda: "two")() == "one"
    assert thing.hello() == "two"
    attachment.restore()
    assert thing.hello() == "class" and vars(thing) == {}
    attachment.restore()


def test_instance_attribute_comes_back_as_the_same_object() -> None:
    thing, attachment, own = Thing(), Attachment(), object()
    thing.own = own  # type: ignore[attr-defined]
    attachment.replace(thing, "own", None)
    attachment.restore()
    assert vars(thing) == {"own": own} and thing.own is own  # type: ignore[attr-defined]


def test_other_instances_and_the_class_are_untouched() -> None:
    thing, other, attachment = Thing(), Thing(), Attachment()
    attachment.replace(thing, "hello", lambda: "mine")
    assert other.hello() == Thing().hello() == "class"


def test_registered_children_of_a_module_stay_registered() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(2, 2)])
    names, attachment = list(model.state_dict()), Attachment()
    attachment.replace(model, "blocks", ["a plain list"])
    assert model.blocks == ["a plain list"] and list(model.state_dict()) == names
    attachment.restore()
    assert isinstance(model.blocks, nn.ModuleList) and "blocks" not in vars(model)


def test_missing_attribute_is_an_error_and_changes_nothing() -> None:
    thing, attachment = Thing(), Attachment()
    with pytest.raises(AttributeError):
        attachment.replace(thing, "absent", 1)
    attachment.restore()
    assert vars(thing) == {}


def test_one_failing_call_does_not_keep_the_rest_from_being_restored() -> None:
    thing, attachment = Thing(), Attachment()
    attachment.replace(thing, "hello", lambda: "one")
    attachment.on_restore(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attachment.restore()
    assert thing.hello() == "class"

"""Schedules over steps, and how recipes write them."""

import pytest
from pydantic import BaseModel, ValidationError

from fewstep.config.schedule import Weight, resolve_step
from fewstep.core.schedules import Constant, Piecewise, Ramp


class Holder(BaseModel):
    weight: Weight


def weight(value, total=100):
    return Holder.model_validate({"weight": value}).weight.resolve(total)


def test_ramps_are_constant_outside():
    linear, cosine = Ramp(1.0, 3.0, 10, 20), Ramp(1.0, 3.0, 10, 20, cosine=True)
    assert [linear(step) for step in (0, 10, 15, 20, 99)] == [1.0, 1.0, 2.0, 3.0, 3.0]
    assert [cosine(step) for step in (0, 10, 15, 20, 99)] == pytest.approx([1.0, 1.0, 2.0, 3.0, 3.0])
    assert cosine(12) < linear(12)
    assert Ramp(4.0, 0.0, 0, 4)(1) == 3.0


def test_piecewise_holds_each_value_from_its_step():
    schedule = Piecewise({0: 0.0, 3: 1.0, 7: 0.5})
    assert [schedule(step) for step in (0, 2, 3, 6, 7, 100)] == [0.0, 0.0, 1.0, 1.0, 0.5, 0.5]


def test_a_number_is_a_constant_and_is_written_as_one():
    assert weight(2) == Constant(2.0)
    assert Holder.model_validate({"weight": 2}).model_dump(mode="json") == {"weight": 2.0}


def test_steps_are_numbers_or_shares():
    assert resolve_step("85%", 225) == 191
    assert weight({"kind": "piecewise", "values": {0: 0, "50%": 1}}, total=10) == Piecewise({0: 0.0, 5: 1.0})
    ramp = {"kind": "cosine", "start": 1, "end": 0, "first_step": "10%", "last_step": 60}
    assert weight(ramp) == Ramp(1.0, 0.0, 10, 60, cosine=True)


def test_written_schedules_are_read_back():
    value = {"kind": "piecewise", "values": {0: 0.0, "85%": 1.0, 200: 2.0}}
    written = Holder.model_validate({"weight": value}).model_dump(mode="json")
    assert Holder.model_validate(written) == Holder.model_validate({"weight": value})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("high", "expected a number"),
        (-1, "greater than or equal to 0"),
        ({"kind": "piecewise", "values": {3: 1}}, "a value for step 0"),
        ({"kind": "piecewise", "values": {0: 1, "half": 2}}, "a share of the steps"),
        ({"kind": "linear", "last_step": "120%"}, "a share of the steps"),
        ({"kind": "sine"}, "does not match any of the expected tags"),
    ],
)
def test_mistakes_are_refused(value, message):
    with pytest.raises(ValidationError, match=message):
        Holder.model_validate({"weight": value})


def test_a_ramp_that_ends_before_it_begins_is_refused():
    with pytest.raises(ValueError, match="last_step 10 is not after first_step 50"):
        weight({"kind": "linear", "first_step": 50, "last_step": "10%"})

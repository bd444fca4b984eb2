"""Times of a decoding step, as a recipe holds them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slicegpt.step_times import StepTimes

times = st.builds(StepTimes, *[st.floats(1e-15, 1e3)] * 5)


@given(times)
def test_a_text_gives_back_four_digits(found):
    again = StepTimes.parse(str(found))
    assert str(again) == str(found)
    for name in ("step", "layer", "mlp", "attention", "shortcut"):
        assert getattr(again, name) == pytest.approx(getattr(found, name), rel=5.1e-4)


def test_it_is_a_sum():
    found = StepTimes(1.0, 0.5, 0.1, 0.01, 0.001)
    assert found.seconds(4, 10, 20, 30) == pytest.approx(1 + 2 + 1 + 0.2 + 0.03)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1 2 3",
        "step 1 layer 1 mlp 1 attention 1",
        "step 1 layer 1 mlp 1 attention 1 shortcut 1 more 1",
        "step 1 layer 1 mlp 1 attention 1 shortcut x",
        "step 1 layer 1 mlp 1 attention 1 shortcut 1, or so",
        "step 1 layer 1 mlp 0 attention 1 shortcut 1",
        "step 1 layer 1 mlp -1 attention 1 shortcut 1",
        "step 1 layer 1 mlp 1 attention inf shortcut 1",
        "step 1 layer nan mlp 1 attention 1 shortcut 1",
    ],
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match=r"must|could not"):
        StepTimes.parse(text)

"""What a model's card says of how it is read."""

from typing import Any

import pytest

from rlhf.report.cards import is_plain


@pytest.mark.parametrize(
    ("settings", "adapter", "expected"),
    [
        ({"objective": "bt", "extra": None, "experts": None}, False, True),
        ({}, False, True),
        ({"objective": "bt"}, True, False),
        ({"objective": "gated"}, False, False),
        ({"extra": "critique"}, False, False),
        ({"extra": "length"}, False, True),
        ({"experts": "gate"}, False, False),
    ],
)
def test_transformers_alone_is_named_where_it_gives_the_scores(
    settings: dict[str, Any], adapter: bool, expected: bool
) -> None:
    assert is_plain(settings, adapter=adapter) is expected

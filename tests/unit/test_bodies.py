"""Member names that nobody means are refused quickly, and are not repeated."""

from __future__ import annotations

import json
import time

import pytest

from dicom_depot.domain.errors import InvalidRequest
from dicom_depot.web.bodies import parse_json, parse_source


def test_a_member_name_that_is_too_long_is_refused_before_it_is_looked_at() -> None:
    body = json.dumps({"destination": {"sourc" * 1_000_000: 1}}).encode()
    began_at = time.monotonic()
    with pytest.raises(InvalidRequest, match="a member name has 5000000 characters; at most 256") as caught:
        parse_json(body)
    assert "sourc" not in caught.value.message
    assert time.monotonic() - began_at < 2


@pytest.mark.parametrize(("name", "said"), [("sources", "Did you mean 'source'"), ("source" * 20, "Known members: ")])
def test_the_nearest_name_is_looked_for_among_short_ones(name: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        parse_source(parse_json(json.dumps({name: 1}).encode()), 1, dict)

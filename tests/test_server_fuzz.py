"""Whatever the body: an answer or a 4xx."""

import pytest
from hypothesis import given, settings

from tests.fuzz_target import Target
from tests.fuzzing import VALID, bodies


@pytest.fixture(scope="module")
def target():
    target = Target()
    yield target
    target.close()


@pytest.mark.parametrize("path", VALID)
def test_what_is_changed_below_was_valid(target, path):
    import json

    assert target.check(path, json.dumps(VALID[path]).encode()) == 200


@settings(max_examples=200, database=None)
@given(body=bodies())
def test_no_body_is_an_error_of_the_server(target, body):
    target.check(*body)

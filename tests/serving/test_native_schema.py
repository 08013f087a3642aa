"""The native engine keeps what its own OpenAPI schema says."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from tests.serving.made_servers import save_model, serving, start

pytestmark = pytest.mark.slow

load_all_checks()
# A schema cannot say that a prompt fits the context, or that a chat template takes the messages: such a request is
# refused though it has the right form.
LEFT_OUT = CHECKS.get_by_names(["positive_data_acceptance"])


@pytest.fixture(scope="module")
def schema(tmp_path_factory):
    with serving(start(save_model(tmp_path_factory.mktemp("served") / "hf"), "native")) as address:
        yield schemathesis.openapi.from_url(f"{address}/openapi.json")


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_every_answer_is_one_that_the_schema_knows(schema, path, mode):
    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(schema[path]["POST"].as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        case.call_and_validate(excluded_checks=LEFT_OUT, timeout=60)

    check()


def test_the_schema_knows_every_path(schema):
    assert set(schema) == {"/health", "/v1/models", "/v1/chat/completions", "/v1/completions"}

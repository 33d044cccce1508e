"""Tests that need something that not every machine has."""

import os

import pytest


def needs(name: str, reason: str) -> pytest.MarkDecorator:
    """Skips a test for `reason`, if there is one, but not where HPCDIT_REQUIRE lists `name`: there it is to fail."""
    required = name in os.environ.get("HPCDIT_REQUIRE", "").split(",")
    return pytest.mark.skipif(bool(reason) and not required, reason=reason or "nothing is missing")

"""Options of the unit tests."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden", action="store_true", help="rewrite the expected outputs of the replay tests instead of comparing"
    )


@pytest.fixture
def rewrites_golden(request: pytest.FixtureRequest) -> bool:
    """Whether expected outputs are rewritten. The option is unknown when only a directory above was named."""
    return bool(request.config.getoption("--golden", default=False))

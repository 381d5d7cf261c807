"""What the promises are held against."""

from __future__ import annotations

import pytest

from tests.support import toy


@pytest.fixture(params=toy.DRAFTS)
def kind(request) -> str:
    """Every kind of draft: each promise holds for all of them."""
    return request.param

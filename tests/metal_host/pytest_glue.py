"""The mark for tests that need the harness."""

import os
import sys

import pytest

from . import why_not


def _reason() -> str:
    """Why such tests are skipped, or nothing.

    Not on Linux where CI is set: .ci/run promises a compiler there, and a test without
    one fails.
    """
    if os.environ.get("CI") and sys.platform.startswith("linux"):
        return ""
    return why_not() or ""


needs_host = pytest.mark.skipif(bool(_reason()), reason=_reason())

"""Runs the conformance suites of `lamina.testing` against every driver."""

import pytest

pytest.register_assert_rewrite("lamina.testing")

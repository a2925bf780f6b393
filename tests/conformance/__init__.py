"""Every driver of the house against the suites that `lamina.testing` ships."""

import pytest

pytest.register_assert_rewrite("lamina.testing")

"""How a caller learns that a request to storage failed: by an exception that its error caused, or by a warning with it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def warned_errors() -> Iterator[list[Exception]]:
    """The errors that warnings of Lamina name meanwhile."""
    found: list[Exception] = []

    def listen(record: logging.LogRecord) -> bool:
        found.extend(argument for argument in record.args or () if isinstance(argument, Exception))
        return False

    listener, logger = logging.Handler(logging.WARNING), logging.getLogger("lamina")
    listener.addFilter(listen)
    logger.addHandler(listener)
    try:
        yield found
    finally:
        logger.removeHandler(listener)


def comes_from(error: BaseException | None, causes: Sequence[BaseException]) -> bool:
    """Whether one of `causes` is `error`, or caused it."""
    while error is not None:
        if any(error is cause for cause in causes):
            return True
        error = error.__cause__ or error.__context__
    return False

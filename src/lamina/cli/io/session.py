"""What the commands of one run share: the open image, how it was opened, and the requests that run beside them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ...errors import OptionError
from .output import Output
from .target import Target

if TYPE_CHECKING:
    from ...filters.blkdebug.rules import Rules
    from ...image import Image
    from ...workers import Task, Workers

#: Requests that can be under way at the same time; more wait in line.
_IN_FLIGHT = 32
#: Seconds between two looks at requests that may be stopped.
_LOOK_AGAIN = 0.005


class Session:
    """One image at a time, or none. Commands run in one thread; what `submit` got runs in others."""

    def __init__(self, output: Output, default: Target) -> None:
        """`default`: how `open` opens, where its own options do not say otherwise."""
        self.output = output
        self.default = default
        self.failed = False  #: whether any command has failed so far
        self.target: Target | None = None
        self._image: Image | None = None
        self._workers: Workers | None = None
        self._waiting: list[Task[None]] = []
        #: Where requests of the open image may be stopped; None as long as no command asked for that.
        self.rules: Rules | None = None

    @property
    def is_open(self) -> bool:
        return self._image is not None

    @property
    def image(self) -> Image:
        if self._image is None:
            raise OptionError("no image is open", hint="open one: open FILE")
        return self._image

    @property
    def opened_as(self) -> Target:
        """How the open image was opened."""
        return self.target or self.default

    def open(self, target: Target) -> None:
        if self._image is not None:
            raise OptionError("an image is open already", path=self._image.filename, hint="close it first: close")
        self._image = target.open()
        self.target = target

    def close(self) -> None:
        """Wait for what is under way, then close the image, if one is open. What is stopped goes on."""
        rules, self.rules = self.rules, None
        if rules is not None:
            rules.release()
        try:
            self.drain()
        finally:
            image, self._image = self._image, None
            if image is not None:
                image.close()

    def reopen(self, target: Target) -> None:
        """Open the same image in another way. If that fails it is open as it was before."""
        self.drain()
        image, before = self.image, self.opened_as
        target.require_durable(image.node)
        # Both at once would exclude each other by their locks.
        self.close()
        try:
            self.open(target)
        except BaseException:
            self.open(before)
            raise

    def submit(self, work: Callable[[], None]) -> None:
        """Run `work` beside the commands that follow."""
        if self._workers is None:
            from ...workers import Workers

            self._workers = Workers(_IN_FLIGHT, "io")
        self._waiting = [one for one in self._waiting if not one.finished or one.wait()]
        self._waiting.append(self._workers.submit(work))

    def running(self) -> int:
        """How many requests are under way beside the commands."""
        return sum(not one.finished for one in self._waiting)

    def drain(self) -> None:
        """Wait until nothing is under way. OptionError if a request is stopped, since only a command lets it go on."""
        while self.rules is not None and self.running():
            if tags := self.rules.stopped:
                raise OptionError(f"a request is stopped at {tags[-1]!r}", hint=f"let it go on: resume {tags[-1]}")
            time.sleep(_LOOK_AGAIN)
        waiting, self._waiting = self._waiting, []
        # All of them, before one that failed is told.
        errors = [error for one in waiting if (error := one.wait()) is not None]
        if errors:
            raise errors[0]

    def end(self) -> None:
        """Close the image, and give the threads back."""
        try:
            self.close()
        finally:
            if self._workers is not None:
                self._workers.close()
            self.output.flush()

"""The common state of the commands: the open image, its options, and the requests in the background."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ...errors import NotSupported, OptionError
from .output import Output
from .target import Target

if TYPE_CHECKING:
    from ...filters.blkdebug.rules import Rules
    from ...image import Image
    from ...workers import Task, Workers

#: The maximum number of concurrent requests in the background; further requests are queued.
_IN_FLIGHT = 32
#: The interval in seconds at which `drain` checks for stopped requests.
_POLL_INTERVAL = 0.005


def _reopened(image: Image, target: Target) -> bool:
    """Whether the image could be opened for writing, or for reading alone, as it is."""
    try:
        image.reopen(read_only=target.read_only)
    except NotSupported:
        return False
    return True


class Session:
    """A session with at most one open image. Commands run in one thread; `submit` runs functions in other threads."""

    def __init__(self, output: Output, default: Target) -> None:
        """`default`: the options of the program, which are the defaults of the command `open`."""
        self.output = output
        self.default = default
        self.failed = False  #: whether a command has failed
        self.target: Target | None = None
        self._image: Image | None = None
        self._workers: Workers | None = None
        self._waiting: list[Task[None]] = []
        #: The rules of the blkdebug node of the open image; None before the first command `break`.
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
        """The options with which the image was opened."""
        return self.target or self.default

    def open(self, target: Target) -> None:
        if self._image is not None:
            raise OptionError("an image is open already", path=self._image.filename, hint="close it first: close")
        self._image = target.open()
        self.target = target

    def close(self) -> None:
        """Resume stopped requests, wait for the requests in the background, and close the image, if one is open."""
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
        """Open the image again with other options. If that fails, it is opened with the previous ones."""
        self.drain()
        image, before = self.image, self.opened_as
        only_writing = target == replace(before, read_only=target.read_only) and not target.copy_on_read
        if only_writing and _reopened(image, target):
            self.target = target
            return
        target.require_durable(image.node)
        # Closed first, since its locks conflict with those of a second open.
        self.close()
        try:
            self.open(target)
        except BaseException:
            self.open(before)
            raise

    def submit(self, work: Callable[[], None]) -> None:
        """Run `work` in the background."""
        if self._workers is None:
            from ...workers import Workers

            self._workers = Workers(_IN_FLIGHT, "io")
        self._waiting = [one for one in self._waiting if not one.finished or one.wait()]
        self._waiting.append(self._workers.submit(work))

    def running(self) -> int:
        """The number of requests in progress in the background."""
        return sum(not one.finished for one in self._waiting)

    def drain(self) -> None:
        """Wait for all requests in the background. Raises OptionError for a stopped request, which only a command resumes."""
        while self.rules is not None and self.running():
            if tags := self.rules.stopped:
                raise OptionError(f"a request is stopped at {tags[-1]!r}", hint=f"resume it: resume {tags[-1]}")
            time.sleep(_POLL_INTERVAL)
        # Waits for all requests before the first error is raised. After an interrupt the next call waits for them: the
        # message of a request is not to follow that of the end of the program.
        errors = [error for one in self._waiting if (error := one.wait()) is not None]
        self._waiting = []
        if errors:
            raise errors[0]

    def end(self) -> None:
        """Close the image and end the threads."""
        try:
            self.close()
        finally:
            if self._workers is not None:
                self._workers.close()
            self.output.flush()

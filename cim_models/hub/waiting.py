"""How long a server that says nothing is waited for, and what is tried again. Needs no torch."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as OutOfTime
from functools import partial
from typing import Any, TypeVar

from cim_models.errors import WeightsError

TOTAL, IDLE, STEP = 25.0, 15.0, 8.0
"""Seconds without anything arriving: of all sources together, of one source, of one request."""
ENOUGH = 100_000
"""Bytes: a server that sends less in that time is as good as away."""
PAUSES = (0.5, 1.0, 2.0)
"""Seconds before a request is made again after a trouble that may pass."""

Result = TypeVar("Result")


class Unreachable(WeightsError):
    """A server that does not answer, or says that it cannot now."""


class Missing(WeightsError):
    """A file, a revision or a repository of which the server says that there is none (404)."""


class Passing(Exception):
    """A trouble that may pass; its text says what it was."""


class Patience:
    """A time that runs out unless something arrives, and how much had.

    Args:
        seconds: That it lasts.
    """

    def __init__(self, seconds: float = IDLE):
        self.seconds = seconds
        self.size = 0
        self.renew()

    def renew(self) -> None:
        """Something has arrived."""
        self.until = time.monotonic() + self.seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return max(self.until - time.monotonic(), 0.0)

    def look(self, size: int) -> bool:
        """Watches a file that grows; false when it has not grown by `ENOUGH` for too long."""
        if size - self.size >= ENOUGH:
            self.size = size
            self.renew()
        return self.left > 0


def _in_time(call: Callable[[], Result], seconds: float) -> Result:
    """What a call gives, in a thread that is left behind when it takes longer: no timeout reaches a name server."""
    outcome: Future[Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return outcome.result(seconds)
    except OutOfTime:
        raise Passing(f"the server cannot be reached: no answer in {seconds:.0f} s, perhaps of a name server") from None


def persist(what: str, call: Callable[[float], Result], patience: Patience, effects: bool = False) -> Result:
    """Makes a request, again after troubles that may pass, until patience runs out.

    Args:
        what: It is for, in messages.
        call: Makes it, given the seconds that it may wait for an answer.
        patience: Renewed by every answer, and by a call that renews it itself.
        effects: The call writes something, so it is waited for, whatever it does.

    Raises:
        Unreachable: If there is no answer, or 429 or 5xx, for ever.
        Missing: If there is no such thing.
        WeightsError: If the answer is no; `explain` says what to do.
    """
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )
    from huggingface_hub.utils import httpx

    failures, trouble = 0, Exception()
    while True:
        before = patience.until
        try:
            wait = max(0.1, min(STEP, patience.left))
            result = call(wait) if effects else _in_time(partial(call, wait), patience.left + 1)
            patience.renew()
            return result
        except OfflineModeIsEnabled as error:
            raise Unreachable(f"{what}: HF_HUB_OFFLINE is set") from error
        except HfHubHTTPError as error:
            code = error.response.status_code
            if code != 429 and code < 500:
                raise (Missing if code == 404 else WeightsError)(f"{what}: {explain(error)}") from error
            trouble, said = error, f"the server answers {code}"
        except (
            HFValidationError,
            LocalTokenNotFoundError,
            ImportError,  # of what a SOCKS proxy needs
            httpx.InvalidURL,
            httpx.TooManyRedirects,
        ) as error:
            raise WeightsError(f"{what}: {error}") from error
        except (httpx.TransportError, httpx.DecodingError, Passing, ValueError) as error:
            trouble, said = error, str(error) or type(error).__name__
            if not isinstance(error, Passing):
                said = f"the server cannot be reached: {said}"
        failures = 1 if patience.until != before else failures + 1
        pause = PAUSES[min(failures, len(PAUSES)) - 1]
        if failures > len(PAUSES) or patience.left <= pause:
            raise Unreachable(f"{what}: {said}") from trouble
        time.sleep(pause)


def explain(error: Any) -> str:
    """What the Hub's refusal means for the user."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    code = error.response.status_code
    if isinstance(error, GatedRepoError):
        return f"access is gated ({code}): accept the terms on the repository's page, then give token=True or a token"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no such repository, or it is private ({code}): check the name, or give token=True or a token"
    if isinstance(error, RevisionNotFoundError):
        return f"there is no such revision ({code}): give a branch, a tag or a commit of 40 digits that exists"
    if isinstance(error, EntryNotFoundError):
        return f"there is no such file ({code})"
    said = error.server_message or "without a reason"
    if code == 401:
        return f"refused (401, {said}): check the token, or leave it out for public weights"
    return f"refused ({code}, {said}): check the name and HF_ENDPOINT, or give token=True or a token"

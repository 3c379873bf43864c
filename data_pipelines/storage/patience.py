"""How long what may pass is tried again."""

from __future__ import annotations

import time
from collections.abc import Callable
from random import SystemRandom
from typing import TypeVar

from data_pipelines.errors import DataError
from data_pipelines.storage.addresses import shown
from data_pipelines.storage.wording import TransientError

_DELAYS_S = (0.1, 30.0)  # before the second attempt, and at most
_LEAST_ATTEMPTS = 3  # a machine that was stopped for a while finds its patience used up by the first

# Delays have to differ between ranks that met the same error, or all would come back at once. No data depends on them.
_jitter = SystemRandom()

T = TypeVar("T")


class Patience:
    """Waits ever longer between attempts, and gives up in the end.

    Args:
        name: What is read or written, as messages name it.
        limit_s: How long it is tried after the last progress.
        setting: How the user changes that, as the end of a sentence.
    """

    def __init__(self, name: str, limit_s: float, setting: str = "; data.patience_s is how long a read is tried again"):
        self._name, self._limit_s, self._setting = name, limit_s, setting
        self.renew()

    def renew(self) -> None:
        """There was progress."""
        self._since, self._attempts = time.monotonic(), 0

    def wait(self, trouble: TransientError, action: str) -> None:
        """Raises DataError once the patience is used up."""
        self._attempts += 1
        waited_s = time.monotonic() - self._since
        left_s = self._limit_s - waited_s
        if left_s <= 0 and self._attempts >= _LEAST_ATTEMPTS:
            raise DataError(
                f"{self._name} cannot be {action}: {self._attempts} attempts in {waited_s:.0f} s, the last one: "
                f"{trouble}. See that its server can be reached{self._setting}."
            )
        first_s, most_s = _DELAYS_S
        delay_s = min(first_s * 2.0 ** min(self._attempts - 1, 20), most_s) * _jitter.uniform(0.5, 1)
        time.sleep(min(max(delay_s, trouble.retry_after_s), left_s) if left_s > 0 else delay_s)


def patiently(location: str, patience_s: float, action: str, attempt: Callable[[], T]) -> T:
    patience = Patience(f"Shard {shown(location)}", patience_s)
    while True:
        try:
            return attempt()
        except TransientError as trouble:
            patience.wait(trouble, action)

"""What a person can mend: one line that states the fact, and the names of the parameters that decide it.

Nothing here or below knows what a parameter is called on a command line. A front end that has flags for them says so
when it shows the error: see `cli.explain`.
"""

from __future__ import annotations


class FesteError(ValueError):
    """A fact that stands in the way. names: the parameters that would mend it (configuration fields, arguments)."""

    def __init__(self, message: str, *names: str) -> None:
        super().__init__(message)
        self.names = names

"""Lines for the server's log that are printed once, however often their reason comes up."""

import sys

MOST_LINES = 200  # clients choose the texts, and they do not end


class Notices:
    """Prints each text once on stderr, up to MOST_LINES of them."""

    def __init__(self):
        self.printed: set[str] = set()

    def print_once(self, text: str) -> None:
        """Print a text unless it was printed before; its control characters are escaped."""
        if text not in self.printed and len(self.printed) < MOST_LINES:
            self.printed.add(text)
            print(text.encode("unicode_escape").decode(), file=sys.stderr, flush=True)

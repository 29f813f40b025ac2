"""Server-sent events by the rules of the WHATWG standard, out of bytes that were cut anywhere.

A line ends with CRLF, LF or CR, and with nothing else: str.splitlines would also break the text of an answer
at U+2028, U+2029 and U+0085. An event ends with an empty line, and what has none when the stream ends is no
event. It does not reconnect, and knows nothing of JSON.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator

LINE_END = re.compile("\r\n|\n|\r")


class Events:
    """The data of the events of one stream, as they become complete."""

    def __init__(self) -> None:
        # A byte order mark may stand before everything; bytes that are no UTF-8 become U+FFFD.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self._begun: list[str] = []  # parts of the line that is not over yet
        self._after_cr = False  # a line feed that follows belongs to the line end before it
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> Iterator[str]:
        """The data of every event that ends within these bytes, its lines joined by line feeds."""
        text = self._decoder.decode(chunk)
        if not text:
            return
        if self._after_cr and text[0] == "\n":
            text = text[1:]
        self._after_cr = text.endswith("\r")
        first, *others = LINE_END.split(text)
        self._begun.append(first)
        for following in others:
            line = "".join(self._begun)
            self._begun = [following]
            if line:
                self._take(line)
            elif self._data:
                data, self._data = "\n".join(self._data), []
                yield data

    def _take(self, line: str) -> None:
        """One line of an event. Comments begin with a colon; other fields than `data` say nothing to us."""
        field, _, value = line.partition(":")
        if field == "data":
            self._data.append(value.removeprefix(" "))

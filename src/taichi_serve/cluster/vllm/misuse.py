"""What vLLM says about a command line that is wrong, in one line of ours."""

from __future__ import annotations

import re

from pydantic import ValidationError

# Pydantic's frame around the one sentence that says what is wrong.
FRAME = re.compile(r"\d+ validation errors? for \w+\s|Value error, |\[type=.*", re.DOTALL)


def one_line(wrong: BaseException) -> str:
    """The message without line breaks, and without what only a programmer can read."""
    if isinstance(wrong, OSError) and wrong.filename:
        return f"{wrong.filename}: {wrong.strerror}"
    return " ".join(FRAME.sub("", str(wrong)).split()) or type(wrong).__name__


def one_line_given(error: Exception, argv: list[str]) -> str:
    """vLLM's reason, without what pydantic puts around it, and the flags it may be about."""
    said = str(error)
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = f"{first['loc'][0]}: " if first["loc"] else ""
        said = where + first["msg"].removeprefix("Value error, ")
    return " ".join(said.split()) + given(argv)


def given(argv: list[str]) -> str:
    """The flags of a command line, in brackets."""
    flags = [word.split("=")[0] for word in argv if word.startswith("--")]
    return f" (given: {', '.join(flags)})" if flags else ""

"""A profile on disk: what was measured of one model on one device with one set of settings.

JSON, one file, small enough for a repository. Loading is strict: an unknown field, a wrong type or a value
out of range is one error that names the file and the field.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from taichi_serve.latency.fit import FitError, Sample, fit, held_out_error
from taichi_serve.latency.model import Batch, Roofline
from taichi_serve.sliders import Kind

SCHEMA = 1

Count = Annotated[int, msgspec.Meta(ge=0)]
Number = Annotated[float, msgspec.Meta(ge=0.0)]
Positive = Annotated[float, msgspec.Meta(gt=0.0)]


class ProfileError(ValueError):
    """A profile that cannot be used; the message names the file and the field."""


class StepRow(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One measured step, as a JSON array in this order: counts as in Batch, then seconds."""

    prefill_tokens: Count
    attention: Number
    decodes: Count
    kv_tokens: Count
    seconds: Positive


class Transfer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The gap of a move between two kinds of instances: latency (s) plus KV bytes over bytes_per_second."""

    source: Kind
    target: Kind
    latency: Number
    bytes_per_second: Positive

    def seconds(self, kv_bytes: float) -> float:
        """Seconds to move so many bytes."""
        return self.latency + kv_bytes / self.bytes_per_second


class Fit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The coefficients of latency/model.py's Roofline, and the relative error on held-out steps."""

    launch: Number
    mixed: Number
    token: Number
    attention: Number
    decode: Number
    kv: Number
    knee: Number
    error_median: Number
    error_p95: Number

    def model(self) -> Roofline:
        """The step model with these coefficients."""
        return Roofline(
            self.launch, self.mixed, self.token, self.attention, self.decode, self.kv, knee=self.knee
        )


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything measured of one model on one device. Tokens, bytes and seconds."""

    schema: int
    model: str
    device: str
    versions: dict[str, str]
    settings: dict[str, str | int | float | bool]
    kv_capacity: Annotated[int, msgspec.Meta(gt=0)]
    bytes_per_token: Annotated[int, msgspec.Meta(gt=0)]
    steps: list[StepRow]
    fit: Fit
    transfers: list[Transfer] = []

    def transfer(self, source: Kind, target: Kind) -> Transfer | None:
        """How fast KV moves between instances of these kinds, if that was measured."""
        return next((t for t in self.transfers if (t.source, t.target) == (source, target)), None)


def fit_steps(rows: Sequence[StepRow]) -> Fit:
    """Fit the step model to measured rows, with its held-out error; raises ValueError on too few rows."""
    samples = [Sample(Batch(r.prefill_tokens, r.attention, r.decodes, r.kv_tokens), r.seconds) for r in rows]
    model: Roofline = fit(samples)
    error: FitError = held_out_error(samples)
    return Fit(
        model.launch,
        model.mixed,
        model.token,
        model.attention,
        model.decode,
        model.kv,
        model.knee,
        error.median,
        error.p95,
    )


def load(path: Path) -> Profile:
    """Read a profile; raises ProfileError naming the file and the field at fault."""
    try:
        raw = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ProfileError(f"{path}: not JSON: {error}") from error
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if schema != SCHEMA:  # said first: a file of another schema differs in many fields
        raise ProfileError(f"{path}: schema: is {schema!r}, this version reads {SCHEMA}; measure it again")
    try:
        return msgspec.convert(raw, Profile)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at ")
        field = where.strip("`").removeprefix("$.") or "top level"
        raise ProfileError(f"{path}: {field}: {what}") from error


def save(profile: Profile, path: Path) -> None:
    """Write a profile so that a crash leaves the old file or the new one, never half of one."""
    text = msgspec.json.format(msgspec.json.encode(profile), indent=1)
    # One row a line: a formatter that breaks every number would make the file ten times as long.
    draft = path.with_suffix(path.suffix + ".new")
    draft.write_bytes(_rows_on_one_line(text))
    draft.replace(path)


def _rows_on_one_line(text: bytes) -> bytes:
    lines, row = [], b""
    for line in text.splitlines():
        if row or line == b"  [":
            row += line.strip() + (b" " if line.endswith(b",") else b"")
            if line in (b"  ]", b"  ],"):
                lines.append(b"  " + row.rstrip())
                row = b""
        else:
            lines.append(line)
    return b"\n".join(lines) + b"\n"

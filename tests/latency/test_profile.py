"""A profile survives the disk, and a broken one says which file and field is at fault."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from taichi_serve.latency.model import Batch
from taichi_serve.latency.profile import Fit, Profile, ProfileError, StepRow, Transfer, fit_steps, load, save
from taichi_serve.sliders import Kind

PROFILE = Profile(
    schema=1,
    model="tiny",
    device="one core",
    versions={"vllm": "0.32.0"},
    settings={"dtype": "float32", "block_size": 16},
    kv_capacity=100_000,
    bytes_per_token=4096,
    steps=[StepRow(128, 8256.0, 4, 4000, 0.01), StepRow(0, 0.0, 4, 4004, 0.005)],
    fit=Fit(0.004, 0.0, 1e-5, 0.0, 1e-4, 1e-8, 64, 0.03, 0.1),
    transfers=[Transfer(Kind.P_HEAVY, Kind.D_HEAVY, 0.02, 4.096e8)],
)


def written(path: Path, field: str, value: object) -> Path:
    raw = msgspec.to_builtins(PROFILE)
    raw[field] = value
    path.write_bytes(msgspec.json.encode(raw))
    return path


def test_profile_survives_the_disk_with_one_row_a_line(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    save(PROFILE, path)
    assert load(path) == PROFILE
    assert "[128, 8256.0, 4, 4000, 0.01]," in [line.strip() for line in path.read_text().splitlines()]
    assert list(tmp_path.iterdir()) == [path]


def test_transfer_takes_its_latency_and_its_bytes() -> None:
    # 20 ms + 1000 tokens x 4096 B / 409.6 MB/s = 30 ms.
    link = PROFILE.transfer(Kind.P_HEAVY, Kind.D_HEAVY)
    assert link is not None
    assert link.seconds(1000 * PROFILE.bytes_per_token) == pytest.approx(0.03)
    assert PROFILE.transfer(Kind.D_HEAVY, Kind.P_HEAVY) is None


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("kv_capacity", 0, "kv_capacity: Expected `int` >= 1"),
        ("kv_capacity", "many", "kv_capacity: Expected `int`, got `str`"),
        ("steps", [[1, 0.5, 0, 0, -1.0]], "steps[0][4]: Expected `float` > 0.0"),
        ("steps", [[1, 0.5, 0]], "steps[0]: Expected `array` of at least length 5, got 3"),
        ("schema", 7, "schema: is 7, this version reads 1; measure it again"),
        ("colour", "red", "top level: Object contains unknown field `colour`"),
        ("fit", {"launch": 0.1}, "fit: Object missing required field `mixed`"),
    ],
)
def test_broken_profile_names_the_file_and_the_field(
    tmp_path: Path, field: str, value: object, says: str
) -> None:
    path = written(tmp_path / "p.json", field, value)
    with pytest.raises(ProfileError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: {says}")


def test_missing_or_torn_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot be read"):
        load(tmp_path / "none.json")
    (tmp_path / "torn.json").write_text('{"schema": 1, "mod')
    with pytest.raises(ProfileError, match="not JSON"):
        load(tmp_path / "torn.json")


def test_fit_of_rows_says_its_own_error() -> None:
    model = PROFILE.fit.model()
    rows = [
        StepRow(p, float(p * p), d, 50 * d, model.seconds(Batch(p, float(p * p), d, 50 * d)))
        for p in (0, 32, 128, 512)
        for d in (1, 4, 16)
    ]
    assert fit_steps(rows).error_p95 < 1e-3

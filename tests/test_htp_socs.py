"""SoCs by part, marketing name and phone, and those that a user adds."""

from __future__ import annotations

from pathlib import Path

import pytest

from fraqat_compiler.errors import UsageError
from fraqat_compiler.registry import parse_target
from fraqat_compiler.targets.htp import HtpTarget
from fraqat_compiler.targets.htp.socs import find_soc, known_socs


@pytest.mark.parametrize(
    "name",
    ["sm8750", "SM8750", "Snapdragon 8 Elite", "snapdragon 8 elite mobile", "Galaxy S25 Ultra", "samsung galaxy s25+"],
)
def test_a_soc_has_many_names(name: str) -> None:
    assert (find_soc(name).part, find_soc(name).soc_model, find_soc(name).htp_arch) == ("SM8750", 69, 79)


def test_the_table_is_whole() -> None:
    socs = known_socs()
    assert len(socs) > 50
    assert len({soc.part for soc in socs}) == len({soc.soc_model for soc in socs}) == len(socs)
    assert all(soc.part and 68 <= soc.htp_arch <= 99 and soc.vtcm_mb > 0 for soc in socs)


@pytest.mark.parametrize(
    ("name", "hint"), [("sm8751", "SM8750"), ("galaxy s25 utra", r"galaxy s25 ultra \(SM8750\)"), ("?", "full name")]
)
def test_an_unknown_soc_is_told_its_neighbours(name: str, hint: str) -> None:
    with pytest.raises(UsageError, match=hint):
        HtpTarget(soc=name)


@pytest.fixture
def own_socs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "socs.csv"
    monkeypatch.setenv("FRAQAT_SOCS", str(path))
    return path


def test_a_file_of_the_user_adds_socs_and_phones(own_socs: Path) -> None:
    header = "part,marketing_name,soc_model,htp_arch,vtcm_mb,devices\n"
    own_socs.write_text(f"{header}sm9999,Snapdragon 9,120,85,16,Pocket One\nsm8750,,,,4,Pocket Two | Pocket 2\n")
    new, changed = find_soc("pocket one"), find_soc("Pocket Two")
    assert (new.part, new.soc_model, new.htp_arch, new.vtcm_mb) == ("SM9999", 120, 85, 16)
    assert (changed.part, changed.soc_model, changed.htp_arch, changed.vtcm_mb) == ("SM8750", 69, 79, 4)
    assert find_soc("Galaxy S25 Ultra") == changed
    with pytest.raises(UsageError, match="4 MiB"):
        HtpTarget(soc="pocket 2", vtcm_mb=8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("part,arch\nsm9999,85\n", "wrong columns: arch"),
        ("", "no part"),
        ("part,htp_arch\nsm9999,85\n", "SM9999 .* lacks numbers"),
        ("part,htp_arch\nsm8750,v79\n", "SM8750 .* lacks numbers"),
    ],
)
def test_a_wrong_file_of_the_user_is_told(own_socs: Path, content: str | None, message: str) -> None:
    if content is not None:
        own_socs.write_text(content)
    with pytest.raises(UsageError, match=message):
        HtpTarget()


def test_soc_and_device_are_one_option() -> None:
    assert parse_target('htp{device="Galaxy S25 Ultra"}').chip == HtpTarget().chip  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=r"soc=sm8650 and device=Galaxy S25 Ultra are both given"):
        HtpTarget(soc="sm8650", device="Galaxy S25 Ultra")
    with pytest.raises(UsageError, match=r"soc=sm8750 and device=Galaxy S24 are both given"):
        HtpTarget(soc="sm8750", device="Galaxy S24")
    with pytest.raises(UsageError, match="SM8750"):
        HtpTarget(device="galaxy s25 utra")


@pytest.mark.parametrize("megabytes", [-1, 9])
def test_vtcm_must_be_there(megabytes: int) -> None:
    with pytest.raises(UsageError, match="8 MiB"):
        HtpTarget(vtcm_mb=megabytes)

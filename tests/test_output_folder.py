from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fraqat_compiler.errors import OutputError, TargetError, VerificationError
from fraqat_compiler.manifest import changed_files, read_manifest, write_manifest
from fraqat_compiler.output_folder import LOCK_FILE, MANIFEST_FILE, RESULTS_FILE, STAGING, OutputFolder

REPORT: dict[str, Any] = {"options": {"seed": 3}, "pipeline": "pack-int4", "target": {"text": "htp"}}


def compile_into(folder: Path, **files: str) -> Path:
    """What a compile does to its folder."""
    with OutputFolder(folder) as output:
        for name, text in files.items():
            path = output.staging / name.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        write_manifest(output.staging, REPORT)
        return output.commit()


def visible(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {LOCK_FILE}


def test_a_commit_moves_everything_and_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = compile_into(tmp_path / "deep" / "out", model="m", extra__data="d")
    assert visible(folder) == {"model", "extra/data", MANIFEST_FILE}
    assert changed_files(folder) == []


def test_nothing_is_visible_without_a_commit(tmp_path: Path) -> None:
    with OutputFolder(tmp_path) as output:
        (output.staging / "model").write_text("half")
    assert visible(tmp_path) == set()


def test_a_failed_compile_leaves_the_results_of_the_one_before(tmp_path: Path) -> None:
    compile_into(tmp_path, model="first")
    with pytest.raises(FileNotFoundError), OutputFolder(tmp_path) as output:
        (output.staging / "model").write_text((tmp_path / "not there").read_text())
    assert (tmp_path / "model").read_text() == "first"
    assert changed_files(tmp_path) == []


def test_the_logs_of_a_failure_are_kept_until_the_next_compile(tmp_path: Path) -> None:
    def fail() -> None:
        with OutputFolder(tmp_path) as output:
            (output.staging / "draft").mkdir()
            (output.staging / "draft" / "htp.log").write_text("said the library")
            raise TargetError("refused.")

    with pytest.raises(TargetError) as caught:
        fail()
    assert (tmp_path / "logs" / "htp.log").read_text() == "said the library"
    assert caught.value.__notes__ == [f"the log is in {tmp_path / 'logs' / 'htp.log'}"]
    compile_into(tmp_path, model="m")
    assert visible(tmp_path) == {"model", MANIFEST_FILE}


def test_a_new_compile_replaces_the_results_and_nothing_else(tmp_path: Path) -> None:
    compile_into(tmp_path, model="first", htp_binary="b")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step").write_text("c")
    compile_into(tmp_path, model="second")
    assert visible(tmp_path) == {"model", "notes.txt", "checkpoints/step", MANIFEST_FILE}
    assert (tmp_path / "model").read_text() == "second"


def test_a_commit_that_was_cut_off_is_cleaned_up_by_the_next(tmp_path: Path) -> None:
    compile_into(tmp_path, model="first", old="o")
    # as after a power cut: the names are noted, the manifest is gone, one new file is in place
    (tmp_path / RESULTS_FILE).write_text(json.dumps([MANIFEST_FILE, "model", "old", "half"]))
    (tmp_path / MANIFEST_FILE).unlink()
    (tmp_path / "half").write_text("h")
    with pytest.raises(VerificationError, match="no compile finished"):
        read_manifest(tmp_path)
    compile_into(tmp_path, model="second")
    assert visible(tmp_path) == {"model", MANIFEST_FILE}


def test_a_folder_of_other_files_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mine.pt").write_text("weeks of training")
    (tmp_path / MANIFEST_FILE).write_text('{"packages": ["another tool"]}')
    with pytest.raises(OutputError, match="no compile wrote"), OutputFolder(tmp_path):
        pass
    assert visible(tmp_path) == {"checkpoints/mine.pt", MANIFEST_FILE}


def test_a_copied_result_is_ours_though_the_lock_was_left_behind(tmp_path: Path) -> None:
    compile_into(tmp_path, model="first")
    (tmp_path / LOCK_FILE).unlink()
    compile_into(tmp_path, other="second")
    assert visible(tmp_path) == {"other", MANIFEST_FILE}


def test_a_manifest_cannot_have_files_elsewhere_removed(tmp_path: Path) -> None:
    folder, other = tmp_path / "out", tmp_path / "precious"
    other.write_text("p")
    compile_into(folder, model="m")
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["files"]["../precious"] = manifest["files"]["model"]
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    compile_into(folder, model="m")
    assert other.read_text() == "p"


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"), OutputFolder(tmp_path / "file"):
        pass


def test_two_compiles_cannot_share_a_folder(tmp_path: Path) -> None:
    script = "import sys; from pathlib import Path; from fraqat_compiler.output_folder import OutputFolder\n"
    script += "with OutputFolder(Path(sys.argv[1])): print('in', flush=True); sys.stdin.readline()"
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "in\n"
    with pytest.raises(OutputError, match="in use"), OutputFolder(tmp_path):
        pass
    assert (tmp_path / STAGING).is_dir()  # the other's, untouched
    other.communicate("\n")
    with OutputFolder(tmp_path):
        pass


def test_a_killed_compile_leaves_the_folder_usable(tmp_path: Path) -> None:
    script = "import os, sys; from pathlib import Path; from fraqat_compiler.output_folder import OutputFolder\n"
    script += "output = OutputFolder(Path(sys.argv[1])).__enter__()\n"
    script += "(output.staging / 'model').write_text('half'); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", script, str(tmp_path)])
    assert (tmp_path / STAGING / "model").is_file()
    compile_into(tmp_path, other="whole")
    assert visible(tmp_path) == {"other", MANIFEST_FILE}


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 64 kB: the real thing, where mounting is allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", place], capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_is_told_and_the_old_results_stay(small_disk: Path) -> None:
    compile_into(small_disk / "out", model="first")
    with pytest.raises(OutputError, match="the disk is full"):
        compile_into(small_disk / "out", model="x" * 100_000)
    assert (small_disk / "out" / "model").read_text() == "first"
    assert changed_files(small_disk / "out") == []


def test_a_read_only_place_is_told(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OutputError, match="read-only"), OutputFolder(small_disk / "out"):
        pass


def test_a_limit_on_file_size_is_told(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OutputError, match="limit on its size"):
            compile_into(tmp_path, model="x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_refusal_elsewhere_keeps_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match="elsewhere"), OutputFolder(tmp_path / "out"):
        raise PermissionError(13, "elsewhere", "/data/set")


def test_the_manifest_is_the_same_for_the_same_results(tmp_path: Path) -> None:
    first, second = (compile_into(tmp_path / name, model="m") for name in ("a", "b"))
    content = (first / MANIFEST_FILE).read_bytes()
    assert content == (second / MANIFEST_FILE).read_bytes()
    assert str(tmp_path).encode() not in content
    manifest = read_manifest(first)
    assert (manifest["seed"], manifest["pipeline"], manifest["target"]) == (3, "pack-int4", "htp")
    assert manifest["packages"]["torch"]


def test_changed_and_missing_files_are_named(tmp_path: Path) -> None:
    folder = compile_into(tmp_path, model="m", other="o", kept="k")
    (folder / "model").write_text("tampered")
    (folder / "other").unlink()
    assert changed_files(folder) == ["model has changed since it was compiled", "other is missing"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": 3}'])
def test_a_damaged_manifest_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_FILE).write_text(text)
    with pytest.raises(VerificationError, match="damaged"):
        read_manifest(tmp_path)

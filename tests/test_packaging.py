"""What a user gets from the wheel, the source archive and an editable install."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "fraqat_compiler": "fraqat_compiler",
    "fraqat_compiler.passes": "passes",
    "fraqat_compiler.targets": "targets",
}
LINKS = ("fraqat_compiler/passes", "fraqat_compiler/targets")
NOT_SHIPPED = {"README.md"}


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build in, so that no build output lies in the working tree."""
    copy = tmp_path_factory.mktemp("checkout") / "source"
    copy.mkdir()
    for name in ("fraqat_compiler", "passes", "targets"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(folder),
        str(checkout),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def source_archive(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    program = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", program], cwd=checkout, check=True, capture_output=True)
    return next(folder.glob("*.tar.gz"))


def shipped_files() -> set[str]:
    """Every file of the three source folders, under the path it has in site-packages."""
    files = set()
    for package, folder in FOLDERS.items():
        inside = package.replace(".", "/")
        files |= {f"{inside}/{path.relative_to(ROOT / folder)}" for path in source_files(ROOT / folder)}
    return files


def source_files(folder: Path) -> list[Path]:
    return [
        path
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name not in NOT_SHIPPED
    ]


def package_of(file: str) -> str:
    return file.rpartition("/")[0].replace("/", ".")


def test_the_list_of_packages_is_what_lies_on_disk(settings: dict[str, Any]) -> None:
    on_disk = {package_of(file) for file in shipped_files() if file.endswith("/__init__.py")}
    assert set(settings["tool"]["setuptools"]["packages"]) == on_disk
    with_modules = {package_of(file) for file in shipped_files() if file.endswith(".py")}
    assert with_modules == on_disk, "a folder with modules has no __init__.py"


@pytest.mark.parametrize("link", LINKS)
def test_type_checkers_find_the_folders_through_relative_links(link: str) -> None:
    assert (ROOT / link).is_symlink()
    assert (ROOT / link).readlink() == Path("..") / Path(link).name


def test_the_wheel_holds_every_source_and_data_file_under_its_full_name(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == shipped_files()


def test_the_wheel_puts_one_name_into_site_packages(wheel: Path) -> None:
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fraqat_compiler"}


def test_the_wheel_installs_the_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    entry_points = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "fraqat = fraqat_compiler.cli:main" in archive.read(entry_points).decode()


def test_a_wheel_built_from_the_source_archive_is_the_same(source_archive: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(source_archive) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = next(path for path in tmp_path.iterdir() if path.is_dir())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(tmp_path),
        str(unpacked),
    ]
    subprocess.run(command, check=True, capture_output=True)
    rebuilt = zipfile.ZipFile(next(tmp_path.glob("*.whl")))
    assert sorted(rebuilt.namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_an_installed_wheel_imports_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(tmp_path), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    program = "import fraqat_compiler.passes as p, fraqat_compiler.targets as t; print(p.__file__); print(t.__file__)"
    result = run_python(program, path=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [
        str(tmp_path / f"fraqat_compiler/{name}/__init__.py") for name in ("passes", "targets")
    ]


@pytest.mark.parametrize("name", ["passes", "targets"])
def test_the_bare_name_is_refused_with_the_right_one(name: str) -> None:
    result = run_python(f"import {name}", path=ROOT)
    assert result.returncode != 0
    assert f"import fraqat_compiler.{name}, not {name}" in result.stderr


def run_python(program: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Run a program that sees `path` before all else, away from the checkout."""
    prelude = f"import sys; sys.path.insert(0, {str(path)!r}); "
    return subprocess.run([sys.executable, "-c", prelude + program], cwd=path.parent, capture_output=True, text=True)


def test_the_tests_run_within_the_bounds_that_the_package_asks_for(settings: dict[str, Any]) -> None:
    project = settings["project"]
    wanted = [Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"]["dev"])]
    outside = [str(need) for need in wanted if not need.specifier.contains(version(need.name), prereleases=True)]
    assert not outside

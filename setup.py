"""Builds ``deep_ep_py._C``, and where nvcc is ``lib/libdeep_ep_cuda.so``, with CMake and ninja. Metadata is in
pyproject.toml.

``DEEP_EP_CUDA`` is ``auto`` (the default), ``on`` (no nvcc is an error) or ``off``. ``CMAKE_ARGS`` holds further
arguments for CMake, for this build alone, such as ``-DDEEP_EP_SANITIZE=address`` or ``-DDEEP_EP_WERROR=ON``. Where
ccache is on PATH, compilers run through it; ``-DDEEP_EP_CCACHE=OFF`` is without.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CUDA_LIBRARY = Path("lib", "libdeep_ep_cuda.so")
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"


def tool(name: str) -> str:
    """Path of a program of the build environment, which need not be activated."""
    found = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if found is None:
        raise SystemExit(f"deep_ep_py: `{name}` was not found; install it (pip install {name}) or build with isolation")
    return found


def run(command: list[str]) -> None:
    """Runs a step; where it fails its own output is the last thing shown, not a traceback through setuptools."""
    sys.stdout.flush()
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(f"deep_ep_py: failed: {shlex.join(command)}")


def discard_foreign_cache() -> None:
    """A tree copied with its build folder carries a cache of the old place, which CMake refuses."""
    cache = BUILD / "CMakeCache.txt"
    if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT.as_posix()}\n" not in cache.read_text():
        shutil.rmtree(BUILD)


def replace_with(target: Path, source: Path) -> None:
    """A running process may have the old file mapped: replace it, never write into it."""
    staged = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(source, staged)
    staged.chmod(0o755)
    staged.replace(target)


def pybind11_folder() -> Path:
    """A copy of pybind11 beside the objects. An isolated build has it in a new place on each run, so everything that
    includes it would be compiled again."""
    import pybind11

    copy = BUILD / f"pybind11-{pybind11.__version__}"
    if not copy.exists():
        shutil.rmtree(staged := copy.with_suffix(".part"), ignore_errors=True)
        shutil.copytree(Path(pybind11.__file__).parent, staged)
        staged.rename(copy)
    return copy / Path(pybind11.get_cmake_dir()).relative_to(Path(pybind11.__file__).parent)


def place(made: Path, package: Path) -> None:
    """Put what was built into a package's folder; what an earlier build put there and this one lacks goes."""
    for file in made.rglob("*.so"):
        target = package / file.relative_to(made)
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_with(target, file)
    if not (made / CUDA_LIBRARY).exists():
        (package / CUDA_LIBRARY).unlink(missing_ok=True)


class BuildExtension(build_ext):
    """Runs CMake in a folder of the source tree that outlives the command, so that a second build is incremental."""

    def build_extension(self, ext: Extension) -> None:
        discard_foreign_cache()
        cmake = tool("cmake")
        configure = [
            cmake,
            *("-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja"),
            # Given every time: an isolated build finds them in a new place on each run.
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11_folder()}",
            "-UDEEP_EP_*",  # what an earlier build was told
            f"-DDEEP_EP_CUDA={os.environ.get('DEEP_EP_CUDA') or 'auto'}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        run(configure)
        run([cmake, "--build", str(BUILD), "--target", "deep_ep_package"])
        made = BUILD / "package"
        shutil.rmtree(made, ignore_errors=True)  # an earlier build may have been told to make more
        run([cmake, "--install", str(BUILD), "--component", "package", "--prefix", str(made)])
        place(made, Path(self.get_ext_fullpath(ext.name)).parent)

    def copy_extensions_to_source(self) -> None:
        """Of an editable install and of ``--inplace``: setuptools would copy the extension module alone."""
        place(BUILD / "package", ROOT / "deep_ep_py")


class BuildPackage(build_py):
    """Starts from an empty folder: setuptools would package modules that an earlier build left in build/lib."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "deep_ep_py", ignore_errors=True)
        super().run()


setup(
    ext_modules=[Extension("deep_ep_py._C", sources=[])],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPackage},
)

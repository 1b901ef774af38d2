"""What pyproject.toml cannot say: packages that are found, and ``configs`` beside them as ``miepo.configs``."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["miepo*"]), "miepo.configs"],
    package_dir={"miepo.configs": "configs"},
)

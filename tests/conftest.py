from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.tiny import save_tiny_model

INTEGRATION = Path(__file__).parent / "integration"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs whole commands, processes, servers or pages as slow."""
    for item in items:
        if INTEGRATION in item.path.parents:
            item.add_marker("slow")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a chat template."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny_base"), chat=False)

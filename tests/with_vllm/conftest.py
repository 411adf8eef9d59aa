"""These tests need vLLM, which has an environment of its own: `make test-vllm`."""

import importlib.util
import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# both ask for it at the start, long before a test runs
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if HERE in Path(item.fspath).parents:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed: make test-vllm"))

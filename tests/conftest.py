"""Every test sees 8 CPU devices and float32 products in float32, whatever machine it runs on."""

import os
from pathlib import Path

import pytest

# Read by jax when it is imported, and by the processes that tests start.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of the golden arrays; KVPO_GOLDEN_DIR names another one."""
    return Path(os.environ.get("KVPO_GOLDEN_DIR", Path(__file__).parent / "golden"))

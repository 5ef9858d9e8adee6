"""Every test sees 8 CPU devices and float32 products in float32, whatever machine it runs on."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

# Read by jax when it is imported, and by the processes that tests start.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
# Compiling is most of the work here: do it quickly, and the same program once.
flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="kvpo_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of the golden arrays; KVPO_GOLDEN_DIR names another one."""
    return Path(os.environ.get("KVPO_GOLDEN_DIR", Path(__file__).parent / "golden"))

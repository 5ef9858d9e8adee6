"""Every test sees 8 CPU devices and float32 products in float32, whatever machine it runs on."""

import atexit
import ctypes
import gc
import os
import resource
import shutil
import tempfile
from pathlib import Path

import pytest

# Read by jax when it is imported, and by the processes that tests start; tools/check_device.py
# runs some of them on its device.
os.environ["JAX_PLATFORMS"] = os.environ.get("KVPO_TEST_PLATFORM", "cpu")
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
# Compiling is most of the work here: do it quickly, and the same program once. The emitters of
# fusions take twice the time of XLA's older ones, and a core to itself gains nothing from modules
# in parts.
flags = "--xla_force_host_platform_device_count=8"
if os.environ["JAX_PLATFORMS"] == "cpu":  # a device's own JAX may not know of these
    flags += (
        " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
        " --xla_cpu_parallel_codegen_split_count=1"
    )
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="kvpo_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# Tracing makes many objects and hardly a cycle: looking for these took a fifth of the time.
gc.set_threshold(20_000, 20, 50)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of the golden arrays; KVPO_GOLDEN_DIR names another one."""
    return Path(os.environ.get("KVPO_GOLDEN_DIR", Path(__file__).parent / "golden"))


@pytest.fixture(scope="session")
def browser() -> str:
    """Chromium. `.ci/run` installs it; a developer's machine need not have it."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    return found or pytest.skip("Chromium is not installed here; .ci/run installs it")


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> tuple[str, str]:
    """The address of a server of `equipment.GROUP_REWARD` by groups, and the file of its token."""
    from equipment import GROUP_REWARD, reward_server  # which import jax

    folder = tmp_path_factory.mktemp("server")
    (folder / "own_reward.py").write_text(GROUP_REWARD)
    (folder / "token").write_text("very-secret\n")
    given = [f"--scorer={folder / 'own_reward.py'}:judge", f"--token_file={folder / 'token'}"]
    given += ["--groups", "--components=light,over_group,before,clips"]
    with reward_server(folder, *given) as url:
        yield url, str(folder / "token")


@pytest.fixture(autouse=True)
def compiled_programs_are_freed(request):
    """Frees the programs of earlier tests once they take much memory; they are compiled anew.

    Imported libraries and fixtures stay, a gigabyte and more of them late in a session: what
    counts is what came since the programs were freed last.
    """
    yield
    stash = request.config.stash
    if resident_gigabytes() > stash.get(KEPT, 0.4) + 0.8:
        import jax

        jax.clear_caches()
        gc.collect()
        # glibc keeps what was freed, more than a gigabyte of it, unless it is told to give it back.
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)
        stash[KEPT] = resident_gigabytes()


KEPT = pytest.StashKey[float]()


# ---------------------------------------------------------------- memory of a worker


def resident_gigabytes() -> float:
    """The memory that this process has now; on other systems than Linux the largest so far."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return peak_gigabytes()
    return int(statm.read_text().split()[1]) * resource.getpagesize() / 1e9


def peak_gigabytes() -> float:
    """The largest memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def pytest_sessionfinish(session):
    """A worker tells the process that started it what memory it took."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["peak_gigabytes"] = peak_gigabytes()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Collects what the workers told."""
    told = getattr(node, "workeroutput", {}).get("peak_gigabytes")
    if told is not None:
        node.config.stash.setdefault(PEAKS, []).append(told)


PEAKS = pytest.StashKey[list[float]]()


def pytest_terminal_summary(terminalreporter, config):
    """Prints the memory of the largest worker below the results."""
    peak = max(config.stash.get(PEAKS, []), default=peak_gigabytes())
    terminalreporter.write_line(f"peak memory of a worker: {peak:.1f} GB")

"""Settings that the examples' tests share."""

import signal

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(autouse=True)
def same_ctrl_c():
    """Ctrl-C raises: what is started in the background would ignore it.

    And it does so again after `command_line.run`, which lets it end the process.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where vocabularies are kept: not where the user has theirs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "came-optax"


@pytest.fixture(scope="package", autouse=True)
def compile_once(tmp_path_factory):
    """A resumed run, or one on other data, compiles what another one did."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = [jax.config.values[name] for name in names]
    for values in [str(tmp_path_factory.mktemp("xla")), 0], before:
        for name, value in zip(names, values, strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is not before:
            yield

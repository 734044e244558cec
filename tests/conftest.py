"""Fixtures: devices, fresh random numbers, poisoned memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch

CONFORMANCE = pytest.StashKey[Counter[str]]()

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Every test that takes it runs once for each kind of device."""
    return str(request.param)


@pytest.fixture(autouse=True)
def fresh_random_numbers(request: pytest.FixtureRequest) -> None:
    """New inputs in each run; the seed is shown when a test fails."""
    seed = torch.seed()
    request.node.add_report_section("setup", "seed", f"torch.manual_seed({seed})")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that torch.empty hands out, to kernels too, is full of NaN: what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    """For a test that changes the number of threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="second derivatives of every one of torch's own cases")


@pytest.fixture
def count_conformance(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Counts a case of torch's own that ours passed."""
    counts = request.config.stash.setdefault(CONFORMANCE, Counter())

    def count(kind: str) -> None:
        counts[kind] += 1

    return count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """How many of torch's own cases were run."""
    counts = config.stash.get(CONFORMANCE, None)
    if counts:
        of = ", ".join(f"{number} of {kind}" for kind, number in counts.items())
        terminalreporter.write_line(f"conformance with torch.nn: {sum(counts.values())} cases passed ({of})")

"""Threads, forks, signals and memory that runs out: same bits, no hang, no crash.

What depends on how a process began runs in one of its own, with a time limit.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import nlpkernels

LIMIT = 120  # seconds that nothing here comes near to


def run_python(code: str, **environment: str) -> str:
    """What a program of its own prints; it has to end well, and in time."""
    command = [sys.executable, "-c", "import os, torch, nlpkernels\n" + textwrap.dedent(code)]
    ended = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_threads_that_train_one_sparse_table() -> None:
    """Each of them may be the first to see it."""
    run_python(
        """
        import sys, threading
        torch.set_num_threads(1)
        sys.setswitchinterval(1e-5)
        ids, grad = torch.arange(8), torch.ones(8, 8)
        for _ in range(1500):
            table = nlpkernels.Embedding(64, 8, sparse=True)
            start = threading.Barrier(4)

            def train():
                start.wait()
                for _ in range(5):
                    table(ids).backward(grad)

            threads = [threading.Thread(target=train) for _ in range(4)]
            for thread in threads: thread.start()
            for thread in threads: thread.join()
            assert (table.weight.grad.to_dense()[:8] == 20).all()
        """
    )


def work(seed: int) -> Callable[[], list[Tensor]]:
    """Forward and backward passes that are cut by sequences, by hidden units, by bags and by rows."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    torch.manual_seed(seed)
    layers = [
        (nlpkernels.LSTM(40, 96, bidirectional=True), draw(5, 48, 40)),
        (nlpkernels.GRU(256, 256), draw(6, 1, 256)),
        (nlpkernels.LSTM(256, 384, proj_size=64), draw(3, 2, 256)),
        (nlpkernels.RNN(64, 512), draw(1, 3, 64)),
    ]
    bag = nlpkernels.EmbeddingBag(3000, 96, mode="sum", padding_idx=0)
    ids = torch.randint(3000, (300, 40), generator=generator)
    weight = draw(300, 96)

    def run() -> list[Tensor]:
        results: list[Tensor] = []
        for layer, x in layers:
            layer.zero_grad()
            output, _ = layer(x)
            output.square().sum().backward()
            results += [output.detach(), *(p.grad for p in layer.parameters())]
        bag.zero_grad()
        pooled = bag(ids)
        (pooled * weight).sum().backward()
        return [*results, pooled.detach(), bag.weight.grad]

    return run


def assert_same_bits(got: list[Tensor], expected: list[Tensor]) -> None:
    for i, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(one, other), f"result {i} differs by {(one - other).abs().max()}"


@pytest.mark.parametrize("threads", [2, 3, 4, 7, 16, 64])
def test_more_threads_than_cores(threads: int, restored_threads: None) -> None:
    run = work(1)
    torch.set_num_threads(1)
    alone = run()
    torch.set_num_threads(threads)
    assert_same_bits(run(), alone)


def test_one_sequence_does_not_wait_for_cores(restored_threads: None) -> None:
    """Threads that wait for each other once a step are no more than there are cores."""
    layer, x = nlpkernels.GRU(256, 256), torch.randn(500, 1, 256)
    torch.set_num_threads(64)
    begin = time.monotonic()
    layer(x)
    assert time.monotonic() - begin < LIMIT


def test_calls_at_once(restored_threads: None) -> None:
    """From many Python threads, each with a number of threads of its own, while others change theirs."""
    runs = [work(seed) for seed in range(6)]
    torch.set_num_threads(1)
    alone = [run() for run in runs]
    failures: list[BaseException] = []

    def call(i: int) -> None:
        try:
            for turn in range(4):
                torch.set_num_threads(1 + (i + turn) % 5)
                assert_same_bits(runs[i](), alone[i])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=(i,), daemon=True) for i in range(len(runs))]
    for thread in threads:
        thread.start()
    end = time.monotonic() + LIMIT
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
        assert not thread.is_alive(), "a call hangs"
    if failures:
        raise failures[0]


def test_one_layer_serves_many_threads(restored_threads: None) -> None:
    layer = nlpkernels.LSTM(128, 256, num_layers=2)
    x = torch.randn(20, 4, 128)
    with torch.no_grad():
        alone = layer(x)[0]
        results: list[Tensor] = []
        threads = [threading.Thread(target=lambda: results.append(layer(x)[0]), daemon=True) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
    assert len(results) == 8
    for result in results:
        assert torch.equal(result.detach(), alone)


def test_another_thread_changes_the_number_between_passes() -> None:
    run_python(
        """
        import threading
        lstm = nlpkernels.LSTM(512, 512, proj_size=256, bidirectional=True)
        x = torch.randn(1, 2, 512, requires_grad=True)
        y = lstm(x)[0].sum()
        thread = threading.Thread(target=torch.set_num_threads, args=(16,))
        thread.start(), thread.join()
        y.backward()
        assert x.grad.isfinite().all()
        """
    )


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_another_thread_changes_the_number_before_a_call(kind: str) -> None:
    """A thread takes over what another has set at its first question, which may be in the middle of a call."""
    run_python(
        f"""
        import threading
        torch.set_num_threads(1)
        layer, x = nlpkernels.{kind}(1024, 1024), torch.randn(4, 32, 1024)
        torch.get_num_threads()
        thread = threading.Thread(target=torch.set_num_threads, args=(8,))
        thread.start(), thread.join()
        with torch.no_grad():
            first, second = layer(x)[0], layer(x)[0]
        assert torch.equal(first, second), (first - second).abs().max()
        """
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"OMP_NUM_THREADS": "2,8"},
        {"OMP_NUM_THREADS": "4", "OMP_DYNAMIC": "true"},
        {"OMP_NUM_THREADS": "4", "OMP_THREAD_LIMIT": "1"},
        {"OMP_NUM_THREADS": "4", "OMP_THREAD_LIMIT": "3"},
        {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "passive"},
        {"OMP_NUM_THREADS": "2", "OMP_MAX_ACTIVE_LEVELS": "4", "OMP_NESTED": "true"},
    ],
    ids=lambda settings: " ".join(settings.values()),
)
def test_settings_of_openmp(settings: dict[str, str]) -> None:
    """Whatever number of threads comes in the end, results have the bits of one thread."""
    code = f"""
        import hashlib, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_threads import work
        run = work(3)
        print(*[hashlib.sha256(tensor.contiguous().numpy()).hexdigest() for tensor in run()])
    """
    assert run_python(code, **settings) == run_python(code, OMP_NUM_THREADS="1")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("parent_had_threads", [False, True])
def test_fork(parent_had_threads: bool) -> None:
    """In a child OpenMP waits for threads that are gone, for ever; ours work alone there."""
    run_python(
        f"""
        import signal
        torch.set_num_threads({2 if parent_had_threads else 1})
        layer, x = nlpkernels.LSTM(256, 256), torch.randn(20, 64, 256)
        bag, ids = nlpkernels.EmbeddingBag(1000, 256), torch.randint(1000, (500, 50))
        before = layer(x)[0].detach(), bag(ids).detach()
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            if not {parent_had_threads}:
                torch.set_num_threads(2)
            output, pooled = layer(x)[0], bag(ids)
            same = torch.equal(output, before[0]) and torch.equal(pooled, before[1])
            with torch.autograd.set_multithreading_enabled(False):
                (output.sum() + pooled.sum()).backward()
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
        """
    )


def test_interrupt() -> None:
    """Ctrl-C ends the program when the call at work returns."""
    out = run_python(
        """
        import signal, threading, time
        layer, x = nlpkernels.LSTM(512, 512), torch.randn(400, 8, 512)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job has not
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        calls = 0
        try:
            while True:
                with torch.no_grad():
                    layer(x)
                calls += 1
        except KeyboardInterrupt:
            print("interrupted")
        """
    )
    assert out == "interrupted\n"


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS limits memory on Linux")
def test_memory_runs_out() -> None:
    """An error, also where it is a thread of a parallel region that asked; and no table has changed."""
    run_python(
        """
        import resource
        torch.set_num_threads(2)
        lstm, gru = nlpkernels.LSTM(512, 512, bidirectional=True, proj_size=128), nlpkernels.GRU(1024, 1024)
        table = torch.randn(4000, 300)
        sum_of_squares = torch.zeros(4000, 300)
        ids, grad = torch.randint(4000, (4000, 100)), torch.randn(4000, 300)
        big, long = torch.randn(60, 256, 512), torch.randn(600, 1, 1024)
        none = torch.empty(0, dtype=torch.long)

        def update():
            before, state = table.clone(), sum_of_squares.clone()
            try:
                torch.ops.nlpkernels.embedding_bag_update(
                    grad, table, sum_of_squares, None, ids, None, None, none, "sum", -1, False, False, "adagrad",
                    [0.1, 1e-9],
                )
            except BaseException:
                assert torch.equal(before, table) and torch.equal(state, sum_of_squares)
                raise

        calls = [lambda: lstm(big)[0].sum().backward(), lambda: gru(long)[0].sum().backward(), update,
                 lambda: nlpkernels.functional.embedding_bag(ids, table)]
        calls[2](), calls[1](), calls[0](), calls[3]()  # all threads have begun
        with open("/proc/self/statm") as statm:
            now = int(statm.read().split()[0]) * resource.getpagesize()
        failures = {MemoryError: 0, RuntimeError: 0}
        for megabytes in list(range(0, 40, 2)) + list(range(40, 400, 40)):
            resource.setrlimit(resource.RLIMIT_AS, (now + (megabytes << 20), resource.RLIM_INFINITY))
            for call in calls:
                try:
                    call()
                except (MemoryError, RuntimeError) as error:
                    failures[MemoryError if isinstance(error, MemoryError) else RuntimeError] += 1
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        for call in calls:
            call()
        assert sum(failures.values()) > 0
        """
    )

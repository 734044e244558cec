"""DistributedDataParallel and FSDP2, two processes on gloo, started by torchrun as users start them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nlpkernels


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.lstm = nn.LSTM(6, 8, 2, bidirectional=True, proj_size=4)
        self.gru = nn.GRU(8, 4)
        self.bag = nn.EmbeddingBag(20, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.gru(self.lstm(self.embedding(ids))[0])[0][-1] + self.bag(ids.t())


def train(model: nn.Module, ids: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids).square().mean().backward()
        optimizer.step()


def worker() -> None:
    """Both wrappers train on half of the batch each to what torch.nn's layers become on the whole of it."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    start = Model().state_dict()
    ids = torch.randint(20, (5, 6))  # [T, B]
    expected = Model()
    expected.load_state_dict(start)
    train(expected, ids)
    for name in ("ddp", "fsdp"):
        model = Model()
        model.load_state_dict(start)
        assert nlpkernels.convert(model).swapped
        if name == "ddp":
            wrapped: nn.Module = DistributedDataParallel(model)
        else:
            for layer in (model.lstm, model.gru):
                fully_shard(layer)
            wrapped = fully_shard(model)
        train(wrapped, ids[:, 3 * rank : 3 * rank + 3])
        for (key, got), want in zip(model.named_parameters(), expected.parameters(), strict=True):
            whole = got.full_tensor() if hasattr(got, "full_tensor") else got
            torch.testing.assert_close(whole.detach(), want.detach(), msg=f"{name}: {key} differs")
        if rank == 0:
            print(f"{name} agrees")
    torch.distributed.destroy_process_group()
    # All is checked. A thread of gloo may hold tensors of the last collective while Python shuts down, and abort the
    # process when it lets go of them (pytorch issue 190489, whichever layers are in use): so leave at once.
    sys.stdout.flush()
    os._exit(0)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_processes() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    root = str(Path(nlpkernels.__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ddp agrees" in done.stdout
    assert "fsdp agrees" in done.stdout


if __name__ == "__main__":
    worker()

"""What language_model.py, contextual.py and tagger.py share: two providers take steps in turns, and a table of both."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sentiment import CHECK_EVERY, CLIP, WARM_UP_STEPS, machine, progress_bars
from torch import Tensor, nn


@dataclass
class Run:
    """A model with the layers of one provider, and what was measured while it trained."""

    model: Any  # with a method `loss` of a batch
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def loss(self, batch: Any) -> Tensor:
        return self.model.loss(batch)

    def step(self, batch: Any, seed: int) -> None:
        """Forward, backward and optimizer, with the time that they took together."""
        torch.manual_seed(seed)  # so that both providers drop the same values out
        start = time.perf_counter()
        loss = self.loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())


@torch.no_grad()
def difference(model: nn.Module, twin: nn.Module, loss: Callable[[Any], Tensor], seed: int) -> float:
    """How far the losses of two models are apart when the twin has the model's parameters."""
    twin.load_state_dict(model.state_dict())
    losses = []
    for either in (model, twin):
        torch.manual_seed(seed)
        losses.append(loss(either).item())
    return abs(losses[0] - losses[1])


def take_turns(
    runs: dict[str, Run], batches: Iterable[Any], steps: int, seed: int, check: Callable[[Any, int], float]
) -> float:
    """Each batch is a step of both. Returns the largest of the differences that `check` finds now and then."""
    turns, apart = list(runs.values()), 0.0
    with progress_bars(Console()) as progress:
        task = progress.add_task("training", total=steps)
        for step, batch in enumerate(batches):
            if step % CHECK_EVERY == 0:
                apart = max(apart, check(batch, seed + step))
            for run in turns:
                run.step(batch, seed + step)
            turns.reverse()  # neither always goes first
            progress.update(task, advance=1, refresh=True)
    return apart


def compare(
    runs: dict[str, Run], apart: float, heading: str, scores: dict[str, str], options: argparse.Namespace
) -> dict[str, Any]:
    """Print the table, with the score of each provider under a heading of its own. Returns what is in it."""
    pairs = list(zip(runs["torch.nn"].seconds, runs["nlpkernels"].seconds, strict=True))
    speed_up = statistics.median(theirs / ours for theirs, ours in pairs[WARM_UP_STEPS:] or pairs)
    note = f"""largest difference: between the losses that both have with
the parameters of torch.nn's model, every {CHECK_EVERY} steps
speed-up: median over the steps, each on the same batch"""
    table = Table("layers of", title=machine(options), caption=note)
    for title in (heading, "largest\ndifference", "ms per step\n(median)", "speed-up"):
        table.add_column(title, justify="right")
    for provider, run in runs.items():
        ours = provider == "nlpkernels"
        table.add_row(
            provider,
            scores[provider],
            f"{apart:.1e}" if ours else "",
            f"{1e3 * statistics.median(run.seconds):.1f}",
            f"{speed_up:.2f} x" if ours else "",
        )
    Console().print(table)
    losses = {provider: run.losses for provider, run in runs.items()}
    return {"largest_loss_difference": apart, "speed_up": speed_up, "losses": losses}

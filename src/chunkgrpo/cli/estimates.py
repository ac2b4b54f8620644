# SPDX-License-Identifier: Apache-2.0
"""Printing an estimate in words and tables."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table
from rich.text import Text

from chunkgrpo.config.derived import num_planned, num_trained
from chunkgrpo.config.schema import ChunkGRPOObjective, ConfigError
from chunkgrpo.core.subset import num_chosen
from chunkgrpo.cost import chunk_sizes
from chunkgrpo.estimate import ACCELERATORS, GIB, Estimate


def geometry(estimate: Estimate) -> list[str]:
    """Return a description of an iteration in words, a sentence or two per line."""
    config, cost = estimate.config, estimate.cost
    s, o = config.sampling, config.objective
    trained, images = num_trained(config), estimate.images
    chosen = num_chosen(images, config.credit.keep, o.updates)
    lines = [
        f"Each iteration draws {s.prompts} prompts x {s.group_size} images = {images} images "
        f"of {estimate.size[0]} x {estimate.size[1]} pixels in {trained + 1} sampler steps."
    ]
    each = "each image" if chosen == images else f"the {chosen} images of largest advantage"
    if isinstance(o, ChunkGRPOObjective):
        sizes = chunk_sizes(config)
        about = "about " if o.plan.measured else ""
        lines.append(
            f"{num_planned(config)} of {trained} trainable steps are stochastic and form {about}"
            f"{_count(len(sizes), 'chunk')} of {_listed(sizes)}; "
            f"{_number(cost.pairs / chosen)} steps of {each} are trained, in the mean."
        )
    else:
        lines.append(f"{_number(cost.pairs / chosen)} noised copies of {each} are trained on.")
    pairs = cost.pairs / o.updates
    lines += [
        f"An iteration takes {_count(o.updates, 'optimizer step')} of "
        f"{_number(chosen / o.updates)} images = {_number(pairs)} (image, step) pairs each, "
        f"in {_count(math.ceil(pairs / o.micro_batch), 'micro-batch', 'es')} of at most "
        f"{o.micro_batch}. Memory grows with the micro-batch, not with the chunks.",
        f"The run: {_count(config.iterations, 'iteration')} = "
        f"{_count(config.iterations * o.updates, 'optimizer step')} and "
        f"{config.iterations * images:,} images from "
        f"{config.iterations * s.prompts:,} draws of a prompt.",
    ]
    return lines


def sharing(estimate: Estimate, gpus: int) -> tuple[str, ...]:
    """Return the share of one of several GPUs: images, pairs and micro-batches."""
    o = estimate.config.objective
    images = math.ceil(estimate.images / gpus)
    pairs = estimate.cost.pairs / o.updates / gpus
    note = ""
    if gpus > estimate.images:
        note = f"{gpus - estimate.images} of them idle: raise sampling.prompts"
    elif images * gpus > estimate.images:
        note = "uneven: some wait"
    elif gpus > 1 and pairs < o.micro_batch:
        note = "micro-batches not full"
    batches = str(math.ceil(pairs / o.micro_batch))
    return (str(gpus), str(images), _number(pairs), batches, note)


def print_estimate(
    console: Console,
    estimate: Estimate,
    utilisation: float,
    price: float | None = None,
    gpus: tuple[int, ...] = (1, 8, 64),
) -> None:
    """Print an estimate: words first, then operations, memory, time and money.

    Args:
        console: Where it is printed.
        estimate: The estimate.
        utilisation: Share of the peak rate that the run reaches, in (0, 1].
        price: Price of a GPU-hour, in any currency.
        gpus: Numbers of GPUs to compare.

    Raises:
        ConfigError: If the utilisation, the price or a number of GPUs is out of range.
    """
    if not 0 < utilisation <= 1:
        raise ConfigError(f"utilisation {utilisation} must lie in (0, 1], e.g. 0.4")
    if price is not None and price < 0:
        raise ConfigError(f"price {price} must not be negative")
    if any(n < 1 for n in gpus):
        raise ConfigError(f"numbers of GPUs must be at least 1, got {min(gpus)}")
    print_words(console, estimate)
    print_batch(console, estimate, gpus)
    print_memory(console, estimate)
    console.print(disk(estimate), highlight=False)
    print_time(console, estimate, utilisation, price, gpus)


def print_words(console: Console, estimate: Estimate) -> None:
    """Print the description of the run."""
    m, network = estimate.config.model, estimate.network
    share = 100 * network.trainable / network.parameters
    console.print(Text.assemble((estimate.config.name, "bold"), f": {m.path}"))
    said = [
        *geometry(estimate),
        f"The transformer has {_big(network.parameters)} weights; {m.adaptation.kind} trains "
        f"{_big(network.trainable)} ({share:.{0 if share >= 10 else 2}f} %).",
    ]
    for line in said:
        console.print(line, highlight=False)


def print_batch(console: Console, estimate: Estimate, gpus: tuple[int, ...]) -> None:
    """Print how GPUs share the batch, and the operations of an iteration."""
    table = Table("GPUs", "images a GPU", "pairs a GPU and optimizer step", "micro-batches", "")
    for number in gpus:
        table.add_row(*sharing(estimate, number))
    table.title = "The same batch shared out; an optimizer step stays the same"
    console.print(table)
    table = Table("phase", "rows", "TFLOP", "share", title="One iteration")
    for phase in estimate.phases:
        part = f"{100 * phase.flops / estimate.iteration_flops:.1f} %"
        table.add_row(phase.name, f"{phase.rows:,.0f}", f"{phase.flops / 1e12:,.4g}", part)
    table.add_row("all", "", f"{estimate.iteration_flops / 1e12:,.4g}", "", style="bold")
    console.print(table)


def print_memory(console: Console, estimate: Estimate) -> None:
    """Print the memory of one GPU at the peak of each phase."""
    table = Table("at the peak of", "GiB", "of which", title="Estimated memory of one GPU")
    held = ", ".join(f"{k} {_gib(v)}" for k, v in estimate.resident.items() if v / GIB >= 0.005)
    for name, size in estimate.memory.items():
        table.add_row(name, _gib(size), held if name == "train" else "")
    console.print(table)


def disk(estimate: Estimate) -> str:
    """Return what the run writes to disk, in words."""
    space = estimate.disk
    return (
        f"Disk: {_bytes(space.each)} a checkpoint, {_count(space.kept, 'of them', '')} at once at "
        f"most, and {_bytes(space.model)} for the tuned model: {_bytes(space.in_all)} in all."
    )


def print_time(
    console: Console,
    estimate: Estimate,
    utilisation: float,
    price: float | None,
    gpus: tuple[int, ...],
) -> None:
    """Print time and cost on common accelerators."""
    heads = ["accelerator", "memory", "s an iteration", "GPU-hours a run"]
    if price is not None:
        heads.append(f"cost at {price:g} an hour")
    table = Table(*heads, title=f"Time at {100 * utilisation:g} % of the peak rate, one GPU")
    for accelerator in ACCELERATORS:
        fits = estimate.peak <= accelerator.memory * 1e9
        verdict = "fits" if fits else Text("does not fit", "red")
        hours = estimate.hours(accelerator, utilisation)
        cells = [
            accelerator.name,
            f"{accelerator.memory:g} GB: {verdict}",
            f"{estimate.seconds(accelerator, utilisation):,.3g}",
            f"{hours:,.3g}",
        ]
        table.add_row(*cells, *([f"{hours * price:,.2f}"] if price is not None else []))
    console.print(table)
    if len(gpus) > 1:
        table = Table("accelerator", *(f"{n} GPU{'s' * (n > 1)}" for n in gpus))
        table.title = "Seconds an iteration, communication not counted"
        for accelerator in ACCELERATORS:
            times = (estimate.seconds(accelerator, utilisation, n) for n in gpus)
            table.add_row(accelerator.name, *(f"{t:,.3g}" for t in times))
        console.print(table)
    console.print(
        "Not counted: reward models, encoding prompts, loading, communication between GPUs. "
        "GPU-hours include the evaluations.",
        highlight=False,
    )


def _listed(sizes: tuple[int, ...]) -> str:
    *head, last = sizes
    if not head or set(head) == {last}:
        return _count(last, "step") + (" each" if head else "")
    return ", ".join(map(str, head)) + f" and {_count(last, 'step')}"


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number:,} {what}{'' if number == 1 else plural}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value - round(value)) < 0.05 else f"{value:,.1f}"


def _big(value: float) -> str:
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


def _bytes(value: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e3:.3g} kB"


def _gib(value: float) -> str:
    return f"{value / GIB:,.3g}"

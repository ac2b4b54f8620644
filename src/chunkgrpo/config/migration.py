# SPDX-License-Identifier: Apache-2.0
"""How the settings of version 0.1 are spelled since 0.2.0, for the message that refuses them."""

from __future__ import annotations

_NOW = {
    "checkpoint_every": "checkpoints.every",
    "chunks": "objective.plan and objective.selection",
    "chunks.plan": "objective.plan.kind",
    "chunks.sizes": "objective.plan.sizes (of kind explicit)",
    "chunks.size": "objective.plan.size (of kind equal)",
    "chunks.min_size": "objective.plan.min_size",
    "chunks.difference": "objective.plan.difference (of kind adaptive)",
    "chunks.num_chunks": "objective.plan.num_chunks (of kind optimal)",
    "chunks.explained": "objective.plan.explained (of kind optimal)",
    "chunks.distance": "objective.plan.distance",
    "chunks.refresh": "objective.plan.refresh",
    "chunks.selection": "objective.selection.kind ('softmax' is {kind: weighted, softmax: true})",
    "chunks.fraction": "objective.selection.fraction",
    "chunks.correction": "objective.selection.correction",
    "chunks.floor": "objective.selection.floor (of kind learned)",
    "chunks.decay": "objective.selection.decay (of kind learned)",
    "chunks.usefulness": "objective.selection.usefulness (of kind learned)",
    "chunks.indices": "objective.selection.indices (of kind listed)",
    "sampling.diffusion": "sampling.transition.kind",
    "sampling.eta": "sampling.transition.eta",
    "sampling.shift": "sampling.schedule.shift (of kind shifted, formerly schedule 'paper')",
    "sampling.merge_entropy": "sampling.merge.least (of kind entropy)",
    "sampling.window": "objective.window (prefix and tail are sampling.prefix and sampling.tail)",
    "sampling.window.kind": "objective.window.kind",
    "sampling.window.prefix": "sampling.prefix",
    "sampling.window.tail": "sampling.tail.kind",
    "sampling.window.tail_fraction": "sampling.tail.fraction (of kind dpm)",
    "objective.algorithm": "objective.kind",
    "objective.clip_low": "objective.trust.low (of kind clip)",
    "objective.clip_high": "objective.trust.high (of kind clip)",
    "objective.advantage": "credit.convention",
    "objective.advantage_clip": "credit.clip (and objective.advantage_clip of diffusion_nft, awm)",
    "objective.credit": "credit.assign",
    "objective.keep": "credit.keep",
    "objective.trust_options": "objective.trust.options (of kind imported)",
    "objective.kl_threshold": "objective.trust.threshold (of kind kl_mask)",
    "objective.implicit_sizes": "objective.outer_weights.sizes (of kind implicit)",
    "objective.kl_form": "objective.kl.kind: transition or rate, each with a weight",
    "objective.forward": "objective, with kind diffusion_nft or awm and its fields beside it",
    "objective.fraction": "objective.times.fraction (of kind shuffled)",
    "objective.forward.fraction": "objective.times.fraction (of kind shuffled)",
    "objective.forward.times": "objective.times.number (of kind stratified)",
    "objective.forward.power": "objective.log_prob.power (of kind ghuber)",
    "objective.forward.old": "objective.old (of diffusion_nft) or objective.average (of awm)",
    "model.method": "model.adaptation.kind: lora or full",
    "model.rank": "model.adaptation.rank (of kind lora)",
    "model.alpha": "model.adaptation.alpha (of kind lora)",
    "model.targets": "model.adaptation.targets",
    "model.compile_backend": "model.compile.backend (of kind blocks)",
    "optimizer.kind": "optimizer.name",
    "optimizer.ema": "ema.decay",
    "optimizer.ema_warmup": "ema.warmup",
    "watched_rewards.0.hold": "credit.project_out, a list of names of watched rewards",
}
_SAME_BELOW = {
    "sampling.window": ("objective.window", ("size", "start", "low", "high", "every", "stride",
                        "decay", "rate", "after", "indices")),
    "objective.forward": ("objective", ("beta", "log_prob", "mode", "advantage_max", "ema_weight")),
}  # fmt: skip

MOVED: dict[str, str] = {key: f"since 0.2.0 it is {now}" for key, now in _NOW.items()} | {
    f"{old}.{name}": f"since 0.2.0 it is {new}.{name}"
    for old, (new, names) in _SAME_BELOW.items()
    for name in names
}
"""Former key -> where it is now, as the end of a sentence."""

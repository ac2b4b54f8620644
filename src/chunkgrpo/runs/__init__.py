# SPDX-License-Identifier: Apache-2.0
"""A run from its configuration to its report, in one folder.

:mod:`.folder` makes run folders; :mod:`.training` trains, evaluates and reports; :mod:`.resuming`
goes on with a run that is there, and :mod:`.history` keeps what happened to it;
:mod:`.evaluations` keeps evaluations on disk; :mod:`.reporting` writes what a finished run shows;
:mod:`.loading` loads its models for sampling, evaluation and export.
"""

from chunkgrpo.runs.folder import new_folder
from chunkgrpo.runs.loading import (
    draw_both,
    evaluate_run,
    export_run,
    find_base,
    find_tuned,
    load_tuned,
    load_untrained,
)
from chunkgrpo.runs.resuming import read_run, resumed_config
from chunkgrpo.runs.training import encode_ahead, train_run

__all__ = [
    "draw_both",
    "encode_ahead",
    "evaluate_run",
    "export_run",
    "find_base",
    "find_tuned",
    "load_tuned",
    "load_untrained",
    "new_folder",
    "read_run",
    "resumed_config",
    "train_run",
]

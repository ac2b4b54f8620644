# SPDX-License-Identifier: Apache-2.0
"""Suppressing messages of the libraries that load and run models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from logging import LogRecord, getLogger


def _says_more_than_torchvision(record: LogRecord) -> bool:
    """Let a log record pass unless it says that images are processed without torchvision."""
    return "requires torchvision" not in record.getMessage()


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Suppress progress bars, warnings about truncated prompts and notes on torchvision."""
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    bars = transformers_logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    handlers = getLogger(transformers_logging.get_logger().name).handlers
    for handler in handlers:
        handler.addFilter(_says_more_than_torchvision)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(_says_more_than_torchvision)
        logging.set_verbosity(level)
        logging.enable_progress_bar()
        if bars:
            transformers_logging.enable_progress_bar()

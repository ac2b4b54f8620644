# SPDX-License-Identifier: Apache-2.0
"""Typed, strict settings, where they are read from, and what is built from them.

:mod:`.schema` is the tree of settings; :mod:`.files` reads it from YAML, recipes and ``--set``;
:mod:`.rules` holds the rules between its parts; :mod:`.build` makes a run of it.
"""

from chunkgrpo.config.files import dump_config, load_config, parse_config
from chunkgrpo.config.schema import Config, ConfigError

__all__ = ["Config", "ConfigError", "dump_config", "load_config", "parse_config"]

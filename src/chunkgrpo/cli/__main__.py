# SPDX-License-Identifier: Apache-2.0
"""``python -m chunkgrpo.cli``."""

from chunkgrpo.cli import main

if __name__ == "__main__":
    main()

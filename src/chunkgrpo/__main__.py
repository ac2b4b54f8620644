# SPDX-License-Identifier: Apache-2.0
"""``python -m chunkgrpo``: the command line, as torchrun and the like start it."""

from chunkgrpo.cli import main

if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""What a run needs besides mathematics: files, checkpoints, seeds, precision, distribution."""

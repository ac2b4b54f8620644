# SPDX-License-Identifier: Apache-2.0
"""What a run needs besides the method: files, checkpoints, seeds, weights, memory, kernels."""

# SPDX-License-Identifier: Apache-2.0
"""Post-train flow-matching text-to-image models with reinforcement learning, chunk by chunk."""

__version__ = "0.2.0"

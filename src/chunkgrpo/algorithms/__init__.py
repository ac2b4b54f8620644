# SPDX-License-Identifier: Apache-2.0
"""Algorithms: from experience to the pieces of a loss."""

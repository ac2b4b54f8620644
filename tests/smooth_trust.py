# SPDX-License-Identifier: Apache-2.0
"""Trust regions that tests name by their import path."""

from chunkgrpo.core.trust import KlMask, NoTrustRegion


def one(threshold=1e-5):
    return KlMask(threshold)


def other():
    return NoTrustRegion()

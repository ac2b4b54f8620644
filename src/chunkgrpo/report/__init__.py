# SPDX-License-Identifier: Apache-2.0
"""Reports of a run: metrics, tables, curves, image grids and one HTML page.

Nothing is imported here, so that asking for one part does not load the plotting library of
another: ``from chunkgrpo.report.metrics import MetricsWriter``.
"""

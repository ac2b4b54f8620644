# SPDX-License-Identifier: Apache-2.0
"""Policies: models that turn a noisy latent and a prompt into a velocity."""

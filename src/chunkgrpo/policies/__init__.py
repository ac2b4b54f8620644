# SPDX-License-Identifier: Apache-2.0
"""Policies: models that predict a velocity from a noisy latent and a prompt."""

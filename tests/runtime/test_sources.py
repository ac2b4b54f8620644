# SPDX-License-Identifier: Apache-2.0
"""Paths and hub ids are told apart without a network."""

import socket
import time

import pytest

from chunkgrpo.policies.architecture import read_architecture
from chunkgrpo.policies.loading import load_policy
from chunkgrpo.prompts import read_prompts
from chunkgrpo.rewards.loading import check_source, weight_file
from chunkgrpo.runtime.sources import local_path, why_local

PATHS = [
    "/models/sd3", "./sd3", "../sd3", "~/sd3", "sd3/", "a/b/c", "sd3", "sd3.safetensors",
    "folder/weights.pt", "here/sd3", "my models/sd3", "", "a/\0", "größe/sd3",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()

    def refused(*arguments, **options):
        raise AssertionError("a network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)


@pytest.mark.parametrize("name", PATHS)
def test_what_can_only_be_a_path_is_one(name) -> None:
    with pytest.raises(FileNotFoundError):
        local_path(name)


@pytest.mark.parametrize(
    "name", ["owner/name", "black-forest-labs/FLUX.1-dev", "Qwen/Qwen-Image", "a_b/c.d-e_1"]
)
def test_what_may_be_a_hub_id_is_none(name, tmp_path) -> None:
    assert why_local(name) is None and local_path(name) is None
    with pytest.raises(FileNotFoundError, match="it is a path"):
        local_path(tmp_path / name)  # a Path is one
    (tmp_path / name).mkdir(parents=True)
    assert local_path(name) is not None


def test_the_home_is_expanded(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/here") == tmp_path / "here"


@pytest.mark.parametrize("name", [each for each in PATHS if each and "\0" not in each])
@pytest.mark.parametrize(
    "reader",
    [
        load_policy,
        read_architecture,
        read_prompts,
        lambda name: check_source("clip", name),
        lambda name: weight_file("aesthetic", name),
        lambda name: weight_file("aesthetic", f"{name}:weights.pt"),
    ],
)
def test_every_reader_refuses_at_once_in_one_line(name, reader) -> None:
    started = time.perf_counter()
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        reader(name)
    assert time.perf_counter() - started < 5
    assert "\n" not in str(error.value) and name in str(error.value)

# SPDX-License-Identifier: Apache-2.0
"""What of a prompt's record decides how it is encoded."""

import hashlib
import json
import logging

import pytest
import torch

import tiny_pipelines
from chunkgrpo.policies.adaptation import Adaptation
from chunkgrpo.policies.loading import load_policy
from chunkgrpo.policies.toy import GaussianPolicy
from chunkgrpo.runs import encode_ahead
from chunkgrpo.types import Prompt

TEXT = "a red star"
RECORDS = [Prompt(TEXT, negative_prompt="blurred"), Prompt(TEXT), Prompt(TEXT, negative_prompt="")]


def velocities(policy, prompts):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *policy.latent_shape, generator=generator).expand(
        len(prompts), *policy.latent_shape
    )
    with torch.no_grad():
        return policy.velocity(x, torch.full((len(prompts),), 0.7), policy.encode(prompts))


def test_a_records_negative_prompt_is_used_instead_of_the_policys(tiny_policy):
    policy = tiny_policy(guidance=4.0, negative_prompt="dark")
    found = velocities(policy, RECORDS)
    for row, negative in zip(found, ("blurred", "dark", ""), strict=True):
        own = tiny_policy(guidance=4.0, negative_prompt=negative)
        torch.testing.assert_close(row, velocities(own, [TEXT])[0], rtol=1e-5, atol=1e-6)
    apart = [(found[i] - found[j]).abs().max() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert min(apart) > 1e-4


def test_negative_prompts_are_not_used_without_guidance_and_one_warning_says_so(
    tiny_policy, caplog
):
    policy = tiny_policy(guidance=1.0)
    calls = []
    policy.pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    with caplog.at_level(logging.WARNING, "chunkgrpo"):
        policy.encode([TEXT])
        assert not caplog.records and len(calls) == 1
        for _ in range(2):
            rows = policy.encode(RECORDS).tensors
    assert len(calls) == 1  # nothing of the records is read but the text
    assert all(torch.equal(t, t[:1].expand_as(t)) for t in rows.values())
    [warning] = [record.getMessage() for record in caplog.records]
    assert "classifier-free guidance is off; to turn it on, set guidance above 1" in warning


@pytest.mark.parametrize(
    ("build", "options", "advice"),
    [
        (tiny_pipelines.flux, {}, "to turn it on, set true_cfg above 1"),
        (tiny_pipelines.flux2, {}, "this model has none"),
        (tiny_pipelines.z_image, {"guidance": 0.0}, "to turn it on, set guidance above 0"),
    ],
)
def test_how_guidance_is_turned_on_depends_on_the_family(build, options, advice, tmp_path, caplog):
    build().save_pretrained(tmp_path)
    policy = load_policy(tmp_path, Adaptation("none"), size=(32, 32), **options)
    with caplog.at_level(logging.WARNING, "chunkgrpo"):
        policy.encoding_keys(RECORDS)
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning.endswith(f"guidance is off; {advice}")


@pytest.mark.parametrize("kind", ["pipeline", "closed form"])
def test_images_are_refused_by_what_reads_none(tiny_policy, kind):
    policy = tiny_policy() if kind == "pipeline" else GaussianPolicy(torch.zeros(2))
    assert policy.reads_images is False
    with pytest.raises(ValueError, match="'a cross' has source images, but this policy reads no"):
        policy.encode([TEXT, Prompt("a cross", images=("a.png",))])
    assert len(policy.encode([TEXT, Prompt("a cross")])) == 2


def test_rows_in_memory_are_known_by_text_and_effective_negative_prompt(tiny_policy):
    policy = tiny_policy(guidance=4.0, negative_prompt="dark")
    calls = []
    policy.pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    policy.encode([TEXT])
    first, calls[:] = len(calls), []
    # Metadata, label and the policy's own negative prompt make no other row.
    policy.encode([Prompt(TEXT, {"n": 1}, group="x"), Prompt(TEXT, negative_prompt="dark")])
    assert not calls
    policy.encode(RECORDS)
    assert len(calls) == 2 * first
    policy.encode(RECORDS)
    assert len(calls) == 2 * first


def test_files_of_prompts_without_a_negative_prompt_keep_their_name(tiny_pipeline_path, tmp_path):
    def load(**options):
        options = {"precision": "fp32", "max_sequence_length": 4, "guidance": 4.0} | options
        return load_policy(tiny_pipeline_path, embedding_cache=tmp_path, **options)

    policy = load(negative_prompt="dark")
    rows = policy.encode([*RECORDS, Prompt(TEXT, negative_prompt="dark")])
    folder = policy.embeddings.folder
    plain = f"{hashlib.sha256(TEXT.encode()).hexdigest()[:32]}"
    names = sorted(path.stem for path in folder.glob("*.safetensors"))
    assert len(names) == 3 and plain in names
    assert all(name.startswith(plain) for name in names)
    assert json.loads((folder / "identity.json").read_text())["settings"]["negative_prompt"] == (
        "dark"
    )
    # Found again without text encoders, by a run's own way.
    warm, said = load(negative_prompt="dark"), []
    encode_ahead(warm, RECORDS, lambda text: said.append(text) or (lambda done, total: None))
    assert said == [f"found 3 encoded prompts in {folder}, text encoders not loaded"]
    again = warm.encode(RECORDS)
    for name, tensor in again.tensors.items():
        assert torch.equal(tensor, rows.tensors[name][:3])
    with pytest.raises(ValueError, match="source images"):
        encode_ahead(warm, [Prompt(TEXT, images=("a.png",))], lambda text: lambda *_: None)
    # Where guidance is off there is one row, whatever the records say.
    unguided = load(guidance=1.0)
    unguided.encode(RECORDS)
    assert len(list(unguided.embeddings.folder.glob("*.safetensors"))) == 1

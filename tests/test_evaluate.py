# SPDX-License-Identifier: Apache-2.0
"""Evaluation: fixed prompts and seeds give fixed images and scores that line up."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from chunkgrpo.core import make_sigmas
from chunkgrpo.evaluate import Evaluation, EvaluationSettings, evaluate, sample_images
from chunkgrpo.prompts import PromptSet
from chunkgrpo.rewards import FunctionReward, RewardError
from chunkgrpo.types import Prompt, as_prompts

SIGMAS = make_sigmas(3)
PROMPTS = PromptSet(
    (
        Prompt("a star", group="one"),
        Prompt("two circles", group="many"),
        Prompt("a red cross", group="one"),
        Prompt("a square", group="one"),
    )
)


class Recorder:
    """A reward that keeps what it saw."""

    name = "recorder"

    def __init__(self):
        self.images, self.prompts = [], []

    def __call__(self, images, prompts):
        self.images.append(images)
        self.prompts += prompts
        return images.mean((1, 2, 3))


def assert_same_images(a, b):
    """Up to one grey level where a value sat on the edge between two."""
    difference = (a.int() - b.int()).abs()
    assert a.shape == b.shape and a.dtype == b.dtype == torch.uint8
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3


@pytest.fixture(scope="module")
def policy():
    from chunkgrpo.policies.sd3 import StableDiffusion3Policy
    from chunkgrpo.shapes.build import TEST_SIZE, build_pipeline

    return StableDiffusion3Policy.from_options(
        build_pipeline(TEST_SIZE), precision="fp32", max_sequence_length=4
    )


def test_an_image_depends_on_its_prompt_and_seed_alone(policy):
    texts, seeds = list(PROMPTS.texts), [5, 6, 7, 8]
    whole = sample_images(policy, texts, SIGMAS, seeds)
    assert whole.shape == (4, 3, 32, 32) and whole.float().std() > 1
    for batch_size in (1, 3):
        assert_same_images(sample_images(policy, texts, SIGMAS, seeds, batch_size), whole)
    backward = sample_images(policy, texts[::-1], SIGMAS, seeds[::-1])
    assert_same_images(backward.flip(0), whole)
    others = sample_images(policy, texts, SIGMAS, [15, 16, 17, 18])
    assert (others.int() - whole.int()).abs().float().mean() > 1


def test_progress_counts_images(policy):
    seen = []
    sample_images(
        policy, list(PROMPTS.texts), SIGMAS, [1, 2, 3, 4], 3, lambda *both: seen.append(both)
    )
    assert seen == [(3, 4), (4, 4)]


def test_scores_line_up_with_prompts_and_images(policy):
    recorder = Recorder()
    lengths = FunctionReward("length", lambda images, prompts: [float(len(p)) for p in prompts])
    result = evaluate(policy, PROMPTS, SIGMAS, [recorder, lengths], EvaluationSettings(3, 2))
    assert result.images.shape == (12, 3, 32, 32) and result.num_seeds == 3
    assert recorder.prompts == [text for text in PROMPTS.texts for _ in range(3)]
    assert torch.equal((recorder.images[0] * 255).round().to(torch.uint8), result.images)
    expected = (result.images.float() / 255).mean((1, 2, 3)).view(4, 3).numpy()
    assert np.allclose(result.scores["recorder"], expected)
    assert result.scores["length"].tolist() == [[float(len(p))] * 3 for p in PROMPTS.texts]
    assert result.mean("recorder") == pytest.approx(expected.mean())
    # Images of one prompt differ, and each is what its own seed gives.
    assert len({tuple(image.flatten().tolist()) for image in result.images[:3]}) == 3
    red, green, blue = (result.images[:, c].double().mean().item() / 255 for c in range(3))
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    assert result.health["brightness"] == pytest.approx(luma, abs=1e-5)
    assert "diversity" in result.health


def test_the_seed_decides_the_images_and_the_batch_does_not(policy):
    first = evaluate(policy, PROMPTS, SIGMAS, [Recorder()], EvaluationSettings(2, 2))
    again = evaluate(policy, PROMPTS, SIGMAS, [Recorder()], EvaluationSettings(2, 2, 3))
    other = evaluate(policy, PROMPTS, SIGMAS, [Recorder()], EvaluationSettings(2, 3))
    assert_same_images(first.images, again.images)
    assert np.allclose(first.scores["recorder"], again.scores["recorder"], atol=1e-4)
    assert (first.images.int() - other.images.int()).abs().float().mean() > 1
    # More seeds keep the images there were.
    more = evaluate(policy, PROMPTS, SIGMAS, [Recorder()], EvaluationSettings(3, 2))
    kept = more.images.unflatten(0, (4, 3))[:, :2].flatten(0, 1)
    assert_same_images(kept, first.images)
    assert "diversity" not in evaluate(policy, PROMPTS, SIGMAS, [Recorder()]).health


def test_groups_and_clusters_name_the_same_scores():
    scores = np.arange(8, dtype=np.float32).reshape(4, 2)
    result = Evaluation(PROMPTS, 2, {"r": scores}, torch.zeros(8, 3, 8, 8, dtype=torch.uint8), {})
    groups = result.by_group("r")
    assert list(groups) == ["one", "many"]
    assert groups["one"].tolist() == [0, 1, 4, 5, 6, 7]
    assert groups["many"].tolist() == [2, 3]
    assert result.clusters() == {
        "one": ["a star"] * 2 + ["a red cross"] * 2 + ["a square"] * 2,
        "many": ["two circles"] * 2,
    }
    assert result.mean("r") == 3.5


class Flat:
    """As many flat grey images as asked; the prompt is the level of grey."""

    latent_shape, device = (1,), torch.device("cpu")

    def encode(self, prompts):
        from chunkgrpo.types import Conditioning

        return Conditioning({"grey": torch.tensor([[float(p.text)] for p in prompts])})

    def velocity(self, x, sigma, conditioning):
        # Euler steps from any noise end at the grey level exactly.
        return (x - conditioning.tensors["grey"]) / sigma[:, None]

    def decode(self, x):
        return (x / 255)[:, :, None, None].expand(-1, 3, 5, 5).contiguous()

    def parameters(self):
        return []

    def reference(self):
        return nullcontext()

    def save(self, folder):
        pass


def test_long_sets_are_scored_in_order():
    """Scoring goes in pieces of 512 images; nothing may shift between them."""

    number = 600
    prompts = PromptSet(as_prompts(str(i % 256) for i in range(number)))
    reward = FunctionReward("grey", lambda images, prompts: images[:, 0, 0, 0] * 255)
    result = evaluate(Flat(), prompts, make_sigmas(2), [reward], EvaluationSettings(batch_size=200))
    assert np.allclose(result.scores["grey"][:, 0], [i % 256 for i in range(number)], atol=0.01)


def test_the_noise_of_a_prompt_is_its_own():
    """Equal prompts, too, are sampled from different noise, image by image."""

    class Noise(Flat):
        """Images of the noise itself: a velocity of 0 leaves it as it is."""

        def velocity(self, x, sigma, conditioning):
            return torch.zeros_like(x)

        def decode(self, x):
            return torch.sigmoid(x)[:, :, None, None].expand(-1, 3, 5, 5).contiguous()

    prompts = PromptSet(as_prompts(["7"] * 20))
    seen = Recorder()
    evaluate(Noise(), prompts, make_sigmas(2), [seen], EvaluationSettings(num_seeds=2))
    levels = torch.cat(seen.images)[:, 0, 0, 0]
    assert len(levels.unique()) > 30  # of 40; in 8 bits some meet by chance


def test_metadata_reach_rewards_beyond_the_first_piece():
    """Scoring goes in pieces of 512 images."""
    records = [Prompt("7", metadata={"number": n}) for n in range(600)]
    seen = []

    def wanting(images, prompts, metadata):
        seen.extend(each["number"] for each in metadata)
        return images.mean((1, 2, 3))

    reward = FunctionReward("wanting", wanting)
    reward.needs_metadata = True
    evaluate(Flat(), PromptSet(tuple(records)), make_sigmas(2), [reward])
    assert seen == list(range(600))


def test_a_lenient_reward_may_fail_beyond_the_first_piece():
    prompts = PromptSet(as_prompts(str(n % 256) for n in range(600)))

    def broken(images, prompts):
        scores = images.mean((1, 2, 3))
        scores[[prompt == "50" for prompt in prompts]] = float("nan")
        return scores

    settings = EvaluationSettings(lenient={"broken"})
    reward = FunctionReward("broken", broken)
    found = evaluate(Flat(), prompts, make_sigmas(2), [reward], settings).scores["broken"]
    assert np.flatnonzero(np.isnan(found[:, 0])).tolist() == [50, 306, 562]
    with pytest.raises(RewardError, match="broken"):
        evaluate(Flat(), prompts, make_sigmas(2), [reward])

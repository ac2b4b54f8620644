# SPDX-License-Identifier: Apache-2.0
"""The embedded pipeline: tokenizers that know every word, its optimizer, and its pretraining."""

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkgrpo.shapes import grammar
from chunkgrpo.shapes.build import (
    PROMPT_TOKENS,
    TEST_SIZE,
    PipelineSize,
    build_pipeline,
    clip_tokenizer,
    learn_merges,
)
from chunkgrpo.shapes.muon import Muon, orthogonalize

TASKS = grammar.TASKS + getattr(grammar, "EXTRA_TASKS", ())
SPLITS = ("train", "held_out", "held_out_pairs")
SAMPLE = ["a red star", "", "a group of three circles", "a photo of an orange cross left of a star"]


@pytest.fixture(scope="module")
def pipe():
    return build_pipeline(TEST_SIZE)


@pytest.fixture(scope="module")
def reloaded(pipe, tmp_path_factory):
    from diffusers import DiffusionPipeline

    folder = tmp_path_factory.mktemp("pipe")
    pipe.save_pretrained(folder)
    return DiffusionPipeline.from_pretrained(folder)


# --- tokenizers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_every_word_is_one_clip_token_also_after_a_reload(pipe, reloaded, name):
    before, after = getattr(pipe, name), getattr(reloaded, name)
    words = grammar.words()
    assert len(words) > 50
    ids = before(list(words), add_special_tokens=False).input_ids
    assert {len(each) for each in ids} == {1}
    assert len({each[0] for each in ids}) == len(words)
    assert before.unk_token_id not in {each[0] for each in ids}
    assert [before.decode(each).strip() for each in ids] == list(words)
    assert after(list(words), add_special_tokens=False).input_ids == ids
    assert after.model_max_length == before.model_max_length == PROMPT_TOKENS
    assert len(after) == len(before) == pipe.text_encoder.config.vocab_size


def test_every_word_is_one_t5_token_also_after_a_reload(pipe, reloaded):
    words = grammar.words()
    for tokenizer in (pipe.tokenizer_3, reloaded.tokenizer_3):
        ids = tokenizer(list(words), add_special_tokens=False).input_ids
        assert {len(each) for each in ids} == {1}
        assert len({each[0] for each in ids}) == len(words)
        assert tokenizer.unk_token_id not in {each[0] for each in ids}
        assert [tokenizer.decode(each).strip() for each in ids] == list(words)
    assert len(reloaded.tokenizer_3) == pipe.text_encoder_3.config.vocab_size


def test_words_outside_the_grammar_are_spelt_out(pipe):
    clip = pipe.tokenizer("zebra", add_special_tokens=False).input_ids
    assert len(clip) > 1 and pipe.tokenizer.decode(clip).strip() == "zebra"
    t5 = pipe.tokenizer_3("zebra", add_special_tokens=False).input_ids
    assert pipe.tokenizer_3.unk_token_id not in t5
    assert pipe.tokenizer_3.decode(t5).strip() == "zebra"


def test_the_longest_prompt_fits(pipe):
    prompts = chain.from_iterable(grammar.prompts(t, s) for t in TASKS for s in SPLITS)
    longest = max((prompt.text for prompt in prompts), key=lambda text: len(text.split()))
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        ids = tokenizer(longest, truncation=False).input_ids
        assert len(ids) == len(longest.split()) + 2 <= PROMPT_TOKENS
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text("abc", min_size=1, max_size=7), min_size=1, max_size=12, unique=True),
    st.randoms(use_true_random=False),
)
def test_merges_make_one_token_of_each_word(words, random):
    random.shuffle(words)
    tokenizer = clip_tokenizer(words)
    for word in words:
        ids = tokenizer(word, add_special_tokens=False).input_ids
        assert len(ids) == 1, (words, word, learn_merges(words))


def test_merges_are_few():
    words = grammar.words()
    assert len(learn_merges(words)) <= sum(len(word) - 1 for word in words)
    assert learn_merges(["a", "b"]) == []
    assert learn_merges(["ab"]) == [("a", "b</w>")]


def test_the_seed_decides_the_weights():
    first, again, other = (build_pipeline(TEST_SIZE, seed) for seed in (0, 0, 1))

    def weights(pipe):
        return pipe.transformer.state_dict() | pipe.vae.state_dict()

    assert all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(again).values()))
    assert any(
        not torch.equal(a, b) for a, b in zip(weights(first).values(), weights(other).values())
    )
    before = torch.get_rng_state()
    build_pipeline(TEST_SIZE)
    assert torch.equal(torch.get_rng_state(), before)


def test_pretraining_encodes_as_the_pipeline_does(pipe):
    from chunkgrpo.shapes.pretrain.transformer import Networks, t5_ids

    networks = Networks(pipe)
    clip = pipe.tokenizer(
        SAMPLE, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    for rows in (1, 16, 64):
        with torch.no_grad():
            joint, pooled = networks.encode(clip, t5_ids(pipe, SAMPLE, rows))
            expected, _, expected_pooled, _ = pipe.encode_prompt(
                SAMPLE, None, None, do_classifier_free_guidance=False, max_sequence_length=rows
            )
        assert torch.equal(joint, expected) and torch.equal(pooled, expected_pooled)
        assert joint.shape[1] == PROMPT_TOKENS + rows


# --- the optimizer ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 64, 16), (2, 16, 64), (1, 8, 200)])
def test_singular_values_go_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrices)
    assert result.shape == matrices.shape and result.dtype == torch.bfloat16
    values = torch.linalg.svdvals(result.float())
    assert values.max() < 1.3
    # Square Gaussian matrices have some singular values next to 0, which take longer.
    assert (values > 0.6).float().mean() > 0.9
    # Directions stay: the result is a positive function of the input's singular values.
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    diagonal = torch.diagonal(u.mT @ result.float() @ vh.mT, dim1=-2, dim2=-1)
    assert (diagonal > 0).float().mean() > 0.9


def test_a_batch_of_matrices_is_each_for_itself():
    matrices = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(0))
    scales = torch.tensor([2.0**-10, 1.0, 2.0**10])[:, None, None]
    together = orthogonalize(matrices * scales)
    for i in range(3):
        alone = orthogonalize(matrices[i : i + 1])
        assert (together[i].float() - alone[0].float()).abs().max() < 0.03
    assert (orthogonalize(torch.zeros(1, 4, 4)) == 0).all()


def test_one_step_has_the_promised_size():
    weight = torch.zeros(32, 8, requires_grad=True)
    weight.grad = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    Muon([weight], lr=0.1).step()
    values = torch.linalg.svdvals(weight.detach())
    assert values.max() < 0.1 * 2 * 1.3 and values.min() > 0.1 * 2 * 0.6  # sqrt(32 / 8) = 2
    assert (weight.detach() * weight.grad).sum() < 0  # downhill


def test_weight_decay_shrinks_and_missing_gradients_are_left_alone():
    weight, idle = torch.ones(4, 4, requires_grad=True), torch.ones(4, 4, requires_grad=True)
    weight.grad = torch.zeros(4, 4)
    Muon([weight, idle], lr=0.1, weight_decay=0.5).step()
    assert torch.allclose(weight.detach(), torch.full((4, 4), 0.95))
    assert (idle == 1).all()


def test_it_trains_a_convolution():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 3, 6, 6, generator=generator)
    wanted = torch.randn(5, 3, 3, 3, generator=generator)
    target = torch.nn.functional.conv2d(x, wanted)
    weight = torch.zeros(5, 3, 3, 3, requires_grad=True)
    optimizer = Muon([weight], lr=0.2)
    losses = []
    for _ in range(60):
        loss = (torch.nn.functional.conv2d(x, weight) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


# --- pretraining --------------------------------------------------------------------------------

SMALL = PipelineSize(
    width=32, layers=2, head_dim=16, clip_width=16, clip_layers=2, t5_width=32,
    vae_channels=(8, 8, 8, 8), latent_channels=4, latent_size=8,
)  # fmt: skip


def weights_in(folder):
    from safetensors.torch import load_file

    return {
        f"{path.relative_to(folder)} {name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.mark.slow
def test_pretraining_goes_on_where_it_stopped(tmp_path, monkeypatch):
    from diffusers import DiffusionPipeline

    from chunkgrpo.shapes import pretrain as package
    from chunkgrpo.shapes.pretrain import PretrainSettings, pretrain, transformer

    evaluate = transformer.quick_accuracy
    monkeypatch.setattr(
        transformer, "quick_accuracy", lambda pipe, number, seed: evaluate(pipe, 6, seed, steps=2)
    )
    small = PretrainSettings(
        num_scenes=40,
        vae_steps=3,
        decoder_steps=3,
        transformer_steps=3,
        guidance_steps=2,
        size=SMALL,
    )
    whole = pretrain(tmp_path / "whole", small)
    expected = weights_in(whole)
    assert expected

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transformer, "train_transformer", stop)
        with pytest.raises(KeyboardInterrupt):
            pretrain(tmp_path / "parts", small)
    with monkeypatch.context() as patch:
        patch.setattr(package.shutil, "copy", stop)
        with pytest.raises(KeyboardInterrupt):
            pretrain(tmp_path / "parts", small)
    found = weights_in(pretrain(tmp_path / "parts", small))
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert (tmp_path / "whole" / "checksums.json").read_text() == (
        tmp_path / "parts" / "checksums.json"
    ).read_text()

    pipe = DiffusionPipeline.from_pretrained(whole)
    assert pipe.transformer.dtype == torch.float32
    fresh = build_pipeline(SMALL)
    before = fresh.transformer.proj_out.weight.half().float()
    assert not torch.equal(pipe.transformer.proj_out.weight, before)
    assert pipe.vae.config.scaling_factor != 1


@pytest.mark.slow
def test_a_stage_goes_on_in_its_middle(tmp_path, monkeypatch):
    from chunkgrpo.shapes.pretrain import transformer, vae
    from chunkgrpo.shapes.pretrain.common import StageLog

    monkeypatch.setattr(transformer, "quick_accuracy", lambda *_, **__: {"strict": 0.0})
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 16, 16, 3), generator=generator, dtype=torch.uint8)
    latents = torch.randn(6, 4, 4, 4, generator=generator)
    captions = torch.randint(0, 3, (6, 3), generator=generator)
    write = StageLog.write

    def stages(folder):
        folder.mkdir(exist_ok=True)

        def train_vae():
            pipe = build_pipeline(TEST_SIZE)
            vae.train_vae(pipe.vae, images, folder, 202, 0, batch_size=2)
            return pipe.vae.state_dict()

        def train_transformer():
            pipe = build_pipeline(TEST_SIZE)
            scenes = transformer.Scenes(pipe, latents, captions, SAMPLE[:3])
            transformer.train_transformer(pipe, scenes, folder, 102, 0)
            return transformer.Networks(pipe).state_dict()

        def distil_guidance():
            pipe = build_pipeline(TEST_SIZE)
            scenes = transformer.Scenes(pipe, latents, captions, SAMPLE[:3])
            transformer.distil_guidance(pipe, scenes, folder, 102, 0, 2.0)
            return transformer.Networks(pipe).state_dict()

        return train_vae, train_transformer, distil_guidance

    def stop(log, step, **values):
        if step == log.total_steps - 2:
            raise KeyboardInterrupt
        write(log, step, **values)

    for whole, parts in zip(stages(tmp_path / "whole"), stages(tmp_path / "parts"), strict=True):
        expected = whole()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(StageLog, "write", stop)
            parts()
        found = parts()
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.slow
def test_distilled_guidance_is_guidance(tmp_path, monkeypatch):
    """Without guidance the student answers as its teacher does with it, and keeps the empty."""
    from chunkgrpo.shapes.pretrain import transformer

    monkeypatch.setattr(transformer, "quick_accuracy", lambda *_, **__: {"strict": 0.0})
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(6, 4, 4, 4, generator=generator)
    captions = torch.arange(6)[:, None] % 3
    pipe, teacher = build_pipeline(TEST_SIZE), build_pipeline(TEST_SIZE)
    scenes = transformer.Scenes(pipe, latents, captions, SAMPLE[:3])
    # A teacher whose captions matter, so that there is something to distil.
    for each in (pipe, teacher):
        with torch.no_grad():
            each.transformer.time_text_embed.text_embedder.linear_2.weight.mul_(30)
            each.transformer.proj_out.weight.mul_(10)
    transformer.distil_guidance(pipe, scenes, tmp_path, 300, 0, 3.0)
    batch = scenes.draw(64, torch.Generator().manual_seed(9))
    student, taught = transformer.Networks(pipe), transformer.Networks(teacher)
    empty = scenes.clip_ids[-1].expand(64, -1)
    with torch.no_grad():
        answer = student(batch.x, batch.sigma, batch.clip_ids, batch.t5_ids)
        plain = taught(batch.x, batch.sigma, batch.clip_ids, batch.t5_ids)
        v_empty = taught(batch.x, batch.sigma, empty, batch.t5_ids)
    wanted = v_empty + 3 * (plain - v_empty)
    before, after = (plain - wanted).square().mean(), (answer - wanted).square().mean()
    assert before > 1e-4
    assert after < 0.2 * before

from __future__ import annotations

import dataclasses
from random import Random

import pytest
import torch

from prunesweep.models import BlockCut, UserError, arch_of, blocks_of, cut
from prunesweep.models.layers.mixers import ConvMixer
from prunesweep.pruners.spvit.choices import spvit_cut
from prunesweep.pruners.spvit.mixed import MixedConvMixer, SPViTMixed, SPViTMixedSettings
from tests.generate import random_arch, random_cut, random_images, random_model


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("seed", range(8))
def test_mixed_weights_train_and_freeze_to_an_equal_model(family: str, seed: int) -> None:
    """With widths and blocks cut, too: the convolutions share what is left of the heads."""
    random = Random(seed)
    arch = random_arch(random, family, ragged=False)
    dense, widths, x = random_model(arch, seed), random_cut(random, arch), random_images(arch, seed)
    blocks = []
    for block, choice in zip(arch.blocks, widths.blocks, strict=True):
        equal = choice.v is None or len({len(head) for head in choice.v}) == 1
        mixer = random.choice(["conv1x1", "conv3x3"]) if block.mixer == "attn" and equal else None
        blocks.append(dataclasses.replace(choice, mixer=mixer if choice.keep else None))
    decision = dataclasses.replace(widths, blocks=tuple(blocks))
    model, number = cut(dense, decision), sum(choice.mixer is not None for choice in blocks)
    start = model(x)
    hook = SPViTMixed(dense, decision)
    hook.wrap(model)
    mixers = [m for m in model.modules() if isinstance(m, MixedConvMixer)]
    assert len(mixers) == number
    torch.testing.assert_close(model(x), start, rtol=0, atol=1e-9)
    assert len({id(p) for p in model.parameters()} & {id(p) for p in dense.parameters()}) == 0

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    model(x).square().sum().backward()
    assert all(m.head_probs.grad is not None and m.v.weight.grad is not None for m in mixers)
    optimizer.step()
    model.eval()
    trained = model(x)
    assert not number or (trained - start).abs().max() > 1e-6
    assert hook.finish() == number
    assert not any(isinstance(m, MixedConvMixer) for m in model.modules())
    torch.testing.assert_close(model(x), trained, rtol=0, atol=1e-9)
    again = cut(dense, decision)  # strictly what the record says
    again.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(again(x), trained, rtol=0, atol=1e-9)


def test_the_temperature_is_a_setting() -> None:
    arch = random_arch(Random(1), "swin", missing=False, extras=False, ragged=False)
    assert max(block.heads for block in arch.blocks) > 1
    dense = random_model(arch, 0)
    decision = spvit_cut(arch, ["conv3x3"] * arch.depth)
    outputs = []
    for alpha in (None, 0.5):
        model = cut(dense, decision)
        SPViTMixed(dense, decision, SPViTMixedSettings(alpha=alpha)).wrap(model)
        with torch.no_grad():
            for block in blocks_of(model):
                block.attn.head_probs[0] = 3.0
        outputs.append(model(random_images(arch, 0)))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def test_another_model_than_the_cut_one_is_refused() -> None:
    arch = random_arch(Random(1), missing=False, extras=False, ragged=False)
    dense = random_model(arch, 0)
    decision = spvit_cut(arch, ["conv3x3"] * arch.depth)
    with pytest.raises(UserError, match=r"is not models.cut\(dense, decision\)"):
        SPViTMixed(dense, decision).wrap(random_model(arch, 1))


def test_heads_of_unequal_widths_are_refused() -> None:
    arch = random_arch(Random(1), missing=False, extras=False, ragged=False)
    block = dataclasses.replace(arch.blocks[0], heads=2, v=(3, 5))
    arch = dataclasses.replace(arch, stages=(dataclasses.replace(arch.stages[0], blocks=(block,)),))
    decision = dataclasses.replace(spvit_cut(arch, ["conv1x1"]), blocks=(BlockCut(mixer="conv1x1"),))
    dense = random_model(arch, 0)
    model = cut(dense, decision)
    assert isinstance(blocks_of(model)[0].attn, ConvMixer)
    assert arch_of(model).blocks[0].v == 5
    with pytest.raises(UserError, match=r"blocks\[0\].v = \[3, 5\]: heads must have equal widths"):
        SPViTMixed(dense, decision).wrap(model)

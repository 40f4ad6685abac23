from __future__ import annotations

import pytest
import torch

from prunesweep.models.families import family_of
from prunesweep.models.layers.conv_mixing import ConvSharing, mix_conv, tap_columns

H, D, E = 3, 8, 4  # heads, width, head width


def sharing(family: str) -> ConvSharing:
    own = family_of(family).conv_sharing
    assert own is not None
    return own


def weights(seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Head probabilities, value weight and bias, projection weight and bias."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(H, 9), (H * E, D), (H * E,), (D, H * E), (D,)]
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)


def pixel_by_pixel(x: torch.Tensor, parts: tuple[torch.Tensor, ...], columns: dict[tuple[int, int], int], alpha: float):
    """The bottleneck's channels and the output weight, by loops over pixels, taps and heads; ``x`` is (D, h, w)."""
    probs, v_weight, v_bias, proj, _ = parts
    rows, cols = x.shape[1:]
    hidden, out = torch.zeros(E, rows, cols, dtype=x.dtype), torch.zeros(D, E, dtype=x.dtype)
    for (dy, dx), column in columns.items():
        share = torch.softmax(probs[:, column] / alpha, 0)
        for h in range(H):
            own = slice(h * E, (h + 1) * E)
            out += share[h] * proj[:, own]
            for y in range(rows):
                for c in range(cols):
                    hidden[:, y, c] += share[h] * v_bias[own]  # at the border too
                    if 0 <= y + dy < rows and 0 <= c + dx < cols:
                        hidden[:, y, c] += share[h] * (v_weight[own] @ x[:, y + dy, c + dx])
    return hidden, out


COLUMNS = {  # by (row, column) offset, counted by hand
    ("vit", 3): dict(zip([(y, x) for x in (-1, 0, 1) for y in (-1, 0, 1)], range(9), strict=True)),
    ("swin", 3): dict(zip([(y, x) for x in (-1, 0, 1) for y in (-1, 0, 1)], [1, 2, 3, 4, 0, 5, 6, 7, 8], strict=True)),
    ("vit", 1): {(0, 0): 4},
    ("swin", 1): {(0, 0): 0},
}


@pytest.mark.parametrize(("family", "kernel"), COLUMNS)
def test_it_is_the_mixture_of_the_heads_at_every_pixel(family: str, kernel: int) -> None:
    parts = weights()
    conv = mix_conv(*parts, columns=sharing(family).columns(kernel), alpha=0.7)
    x = torch.randn(D, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    hidden, out = pixel_by_pixel(x, parts, COLUMNS[family, kernel], 0.7)
    got = torch.nn.functional.conv2d(x[None], conv.weight, conv.bias, padding=kernel // 2)[0]
    torch.testing.assert_close(got, hidden, rtol=0, atol=1e-12)
    torch.testing.assert_close(conv.out_weight, out[..., None, None], rtol=0, atol=1e-12)
    assert torch.equal(conv.out_bias, parts[-1])


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_equal_probabilities_average_the_heads(family: str) -> None:
    _, *shared = weights()
    own = sharing(family)
    conv = mix_conv(torch.ones(H, 9, dtype=torch.float64), *shared, columns=own.columns(3), alpha=own.alpha)
    mean = shared[0].reshape(H, E, D).mean(0)
    torch.testing.assert_close(conv.weight, mean[..., None, None].expand(E, D, 3, 3), rtol=0, atol=1e-12)
    torch.testing.assert_close(conv.bias, 9 * shared[1].reshape(H, E).mean(0), rtol=0, atol=1e-12)


def test_a_sharp_softmax_gives_each_tap_one_head() -> None:
    _, v_weight, *rest = weights()
    owners = torch.tensor([0, 1, 2, 2, 1, 0, 0, 2, 1])  # by column of head_probs
    probs = torch.nn.functional.one_hot(owners, H).T.double()
    conv = mix_conv(probs, v_weight, *rest, columns=sharing("vit").columns(3), alpha=1e-2)
    for (dy, dx), column in COLUMNS["vit", 3].items():
        own = v_weight.reshape(H, E, D)[owners[column]]
        torch.testing.assert_close(conv.weight[:, :, dy + 1, dx + 1], own, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_a_1x1_convolution_is_the_centre_of_a_3x3(family: str) -> None:
    parts = weights()
    one, three = (mix_conv(*parts, columns=sharing(family).columns(k), alpha=1.0) for k in (1, 3))
    assert torch.equal(one.weight[..., 0, 0], three.weight[..., 1, 1])
    assert sorted(sharing(family).columns(3).flatten().tolist()) == list(range(9))


def test_gradients_reach_probabilities_and_shared_weights() -> None:
    parts = tuple(t.requires_grad_() for t in weights())
    conv = mix_conv(*parts, columns=tap_columns(3, centre_first=True), alpha=1.0)
    torch.stack([t.square().sum() for t in conv]).sum().backward()
    assert all(t.grad is not None and t.grad.abs().max() > 0 for t in parts)

"""Which of timm's names a record can express: the numbers that the README quotes, and the reasons."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import timm

from prunesweep.models import Arch
from prunesweep.models.families import FAMILIES, families_with
from prunesweep.models.represented import verdicts

README = Path(__file__).parents[2] / "README.md"
# of timm 1.0.31
AT_LEAST = {
    "vit": 318,
    "eva": 148,
    "beit": 22,
    "diff": 5,
    "cait": 10,
    "xcit": 42,
    "swin": 19,
    "swin_v2": 12,
    "hiera": 24,
    "sam": 3,
    "pvt_v2": 7,
    "pit": 8,
    "metaformer": 50,
}


def test_the_page_of_models_has_every_family_and_says_which_are_not_computed() -> None:
    page = (README.parent / "docs" / "models.md").read_text()
    rows = {
        name: row
        for row in page.splitlines()
        if row.startswith("| `")
        for name in re.findall("`(\\w+)`", row.split("|")[1])
    }
    assert rows.keys() == FAMILIES.keys()
    assert {name for name, row in rows.items() if "not computed" in row} == FAMILIES.keys() - set(
        families_with("streams")
    )
    assert {name for name, row in rows.items() if "no token plans" in row} <= FAMILIES.keys() - set(
        families_with("tokens")
    )


def test_verdicts_say_why() -> None:
    names = [
        "vit_tiny_patch16_224.augreg_in21k",
        "resnet18.a1_in1k",
        "pvt_v2_b2_li.in1k",
        "qwen3_vit_88m_enc.qwen3_5_0_8b",
        "vit_dwee_patch16_reg1_gap_256",
    ]
    found = verdicts(names)
    assert [(one.kind, one.family, one.reason) for one in found] == [
        ("VisionTransformer", "vit", None),
        ("ResNet", None, "is a ResNet"),
        ("PyramidVisionTransformerV2", "pvt_v2", None),
        (
            "Qwen3VitEncoder",
            None,
            "it gives one vector for every 2x2 patches, as a language model wants them; "
            "create it with global_pool = 'avg'",
        ),
        ("VisionTransformer", "diff", None),
    ]
    assert Arch.from_timm(names[0]).family == found[0].family


@pytest.mark.slow
def test_the_numbers_of_timm_s_names() -> None:
    found = verdicts()
    able = Counter(one.family for one in found if one.family)
    quoted = re.search(r"(\d+) of the ([\d,]+) names that timm ([\d.]+) has weights for", README.read_text())
    assert quoted is not None
    if timm.__version__ != quoted[3]:
        pytest.skip(f"the numbers are those of timm {quoted[3]}")
    assert all(able[family] >= count for family, count in AT_LEAST.items())
    assert (able.total(), len(found)) == (int(quoted[1]), int(quoted[2].replace(",", "")))
    for part in ("dino.", "dinov2.", "mae", "siglip", "clip", "deit"):  # under their plain names
        own = [one for one in found if part in one.name and one.kind.startswith("VisionTransformer")]
        assert all(one.family for one in own), part

"""``prunesweep models``."""

from __future__ import annotations

import json

import pytest

from prunesweep.models import represented
from tests.launch.test_cli import call


def test_models_are_listed_with_their_reasons(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["deit_tiny_patch16_224.fb_in1k", "swin_tiny_patch4_window7_224.ms_in1k", "resnet18.a1_in1k"]
    names.append("qwen3_vit_88m_enc.qwen3_5_0_8b")
    monkeypatch.setattr(represented.timm, "list_models", lambda **_: names)
    code, text, _ = call(capsys, "models")
    assert code == 0
    assert "no family for: ResNet 1" in text
    assert "it gives one vector" in text
    assert "2 of the 4 names that timm" in text
    _, text, _ = call(capsys, "models", "--all")
    assert "swin_tiny_patch4_window7_224.ms_in1k: swin\nresnet18.a1_in1k: refused, is a ResNet" in text
    _, text, _ = call(capsys, "models", "--json")
    assert [one["family"] for one in json.loads(text)] == ["vit", "swin", None, None]

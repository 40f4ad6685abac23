from __future__ import annotations

import hashlib
import json
from pathlib import Path
from random import Random

import pytest
import timm
import torch
from safetensors import safe_open

from prunesweep.models import UserError, arch_of, cut, load, load_provenance, read_arch, save
from prunesweep.models.io.files import publish_folder, write_text
from tests.generate import random_arch, random_cut, random_images, random_model


@pytest.fixture
def saved(tmp_path: Path) -> tuple[torch.nn.Module, Path]:
    random = Random(5)
    arch = random_arch(random, missing=False)
    model = cut(random_model(arch, 5, torch.float32), random_cut(random, arch))
    return model.eval(), save(model, tmp_path / "model", {"method": "test", "seed": 5})


@pytest.mark.parametrize("seed", range(8))
def test_timm_loads_it_in_one_line_bit_equal(seed: int, tmp_path: Path) -> None:
    random = Random(seed)
    arch = random_arch(random)
    model = cut(random_model(arch, seed, torch.float32), random_cut(random, arch)).eval()
    save(model, tmp_path / "model")
    again = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    assert arch_of(again) == arch_of(model)
    x = random_images(arch, seed, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
        assert torch.equal(load(tmp_path / "model")(x), model(x))


def test_a_stock_timm_model_can_be_saved(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=5, depth=2).eval()
    save(model, tmp_path / "model")
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "model")(x), model(x))


def test_the_record_is_in_both_files(saved: tuple[torch.nn.Module, Path]) -> None:
    model, path = saved
    record = arch_of(model).to_dict()
    assert json.loads((path / "config.json").read_text())["model_args"]["arch"] == record
    with safe_open(path / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["arch"]) == record
    assert read_arch(path) == arch_of(model)
    assert load_provenance(path) == {"method": "test", "seed": 5}
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(p.name for p in path.parent.iterdir()) == ["model"]


def test_another_number_of_classes_keeps_the_body(saved: tuple[torch.nn.Module, Path]) -> None:
    model, path = saved
    other = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=13)
    assert other.num_classes == arch_of(other).num_classes == 13
    weights = model.state_dict()
    body = {name for name in weights if not name.startswith("head")}
    assert all(torch.equal(other.state_dict()[name], weights[name]) for name in body)


def test_the_record_cannot_be_overruled(saved: tuple[torch.nn.Module, Path]) -> None:
    with pytest.raises(UserError, match="this model's record says"):
        timm.create_model(f"local-dir:{saved[1]}", pretrained=True, img_size=64)
    with pytest.raises(UserError, match="unknown model argument embed_dim"):
        timm.create_model(f"local-dir:{saved[1]}", pretrained=True, embed_dim=64)


def test_a_model_that_no_longer_fits_its_record_is_not_saved(tmp_path: Path) -> None:
    model = random_model(random_arch(Random(4), missing=False), 4, torch.float32)
    model.head = torch.nn.Linear(3, 3)
    with pytest.raises(UserError, match="its record no longer fits"):
        save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_entry_point_needs_a_record() -> None:
    with pytest.raises(UserError, match="needs arch="):
        timm.create_model("prunesweep")


def test_saving_replaces_what_was_there(saved: tuple[torch.nn.Module, Path]) -> None:
    model, path = saved
    (path / "stray").touch()
    save(model, path)
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "model.safetensors"]


def test_damage_is_named(saved: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    _, path = saved
    weights, config = path / "model.safetensors", path / "config.json"
    whole, text = weights.read_bytes(), config.read_text()

    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        load(path)
    weights.write_bytes(whole)

    config.write_text(text.replace('"in_chans": 3', '"in_chans": 1').replace('"in_chans": 1', '"in_chans": 2', 1))
    with pytest.raises(UserError, match=r"different records|must be|lacks"):
        load(path)
    for damaged in (text[:50].encode(), b"\xff" + text.encode(), b'{"architecture": "prunesweep"}', b"[]"):
        config.write_bytes(damaged)
        with pytest.raises(UserError, match="config.json is damaged"):
            load(path)
    config.write_text(text.replace('"architecture": "prunesweep"', '"architecture": "resnet50"'))
    with pytest.raises(UserError, match="holds a 'resnet50'"):
        load(path)
    config.unlink()
    with pytest.raises(UserError, match="config.json is missing"):
        load(path)
    with pytest.raises(UserError, match="is not a saved model"):
        load(tmp_path / "nowhere")


def test_weights_other_than_those_saved_are_refused(saved: tuple[torch.nn.Module, Path]) -> None:
    model, path = saved
    weights, config = path / "model.safetensors", path / "config.json"
    whole, text = weights.read_bytes(), config.read_text()
    expected = json.loads(text)["weights_sha256"]
    assert expected == hashlib.sha256(whole).hexdigest()

    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # one bit of one weight: a valid file
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    with pytest.raises(UserError, match=rf"model.safetensors is damaged: .*{found}, but .*config.json says {expected}"):
        load(path)
    assert read_arch(path) == arch_of(model)

    older = json.loads(text)
    del older["weights_sha256"]
    weights.write_bytes(whole)
    config.write_text(json.dumps(older))
    loaded = load(path).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_loaded_weights_are_independent_of_the_file(saved: tuple[torch.nn.Module, Path]) -> None:
    model, path = saved
    loaded = load(path)
    assert {p.data_ptr() % 16 for p in loaded.parameters()} == {0}  # kernels round differently at odd addresses
    x = random_images(arch_of(model), 0, dtype=torch.float32)
    with torch.no_grad():
        before = loaded(x)
        size = (path / "model.safetensors").stat().st_size
        with (path / "model.safetensors").open("r+b") as file:  # in place: a mapped file would change with it
            file.write(bytes(size))
        assert torch.equal(loaded(x), before)


def test_publishing_is_all_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with publish_folder(target) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(RuntimeError, match="half"), publish_folder(target) as folder:
        (folder / "a").write_text("new")
        raise RuntimeError("half done")
    assert (target / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    write_text(tmp_path / "file", "x")
    write_text(tmp_path / "file", "y")
    assert (tmp_path / "file").read_text() == "y"
    assert len(list(tmp_path.iterdir())) == 2

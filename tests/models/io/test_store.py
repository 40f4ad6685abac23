from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prunesweep.models import UserError, arch_of, cut, load, load_provenance, preprocessing_of, read_arch, save
from prunesweep.models.builder import set_label_names
from prunesweep.models.families import family_of
from prunesweep.models.io.files import publish_folder, write_text
from prunesweep.models.io.store import check_saved
from tests.generate import FAMILIES, random_arch, random_cut, random_images, random_model


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


@pytest.mark.parametrize("classes", ["ab", {"a", "b"}])
def test_names_without_an_order_are_refused(classes: Any, tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=2)
    with pytest.raises(UserError, match="has no order of names; give a list of them"):
        save(model, tmp_path / "model", classes=classes)
    assert not (tmp_path / "model").exists()


def test_another_number_of_classes_keeps_the_body(saved: tuple[torch.nn.Module, Path]) -> None:
    model, path = saved
    other = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=13)
    assert other.num_classes == arch_of(other).num_classes == 13
    weights = model.state_dict()
    body = {name for name in weights if not name.startswith("head")}
    assert all(torch.equal(other.state_dict()[name], weights[name]) for name in body)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_record_follows_a_new_classifier(family: str, tmp_path: Path) -> None:
    arch = random_arch(Random(1), family)
    save(random_model(arch, 1, torch.float32), tmp_path / "model", classes=list(map(str, range(arch.num_classes))))
    model: Any = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, drop_rate=0.5).eval()
    assert any(isinstance(m, torch.nn.Dropout) and m.p == 0.5 for m in model.modules())
    model.reset_classifier(arch.num_classes + 2)
    save(model, tmp_path / "other")
    again: Any = load(tmp_path / "other")
    assert arch_of(again) == dataclasses.replace(arch, num_classes=arch.num_classes + 2)
    assert "label_names" not in again.pretrained_cfg
    x = random_images(arch, 0, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("copied", [False, True])
def test_a_replaced_classifier_of_as_many_classes_has_no_names(family: str, copied: bool, tmp_path: Path) -> None:
    arch = random_arch(Random(1), family)
    names = [f"class {k}" for k in range(arch.num_classes)]
    save(random_model(arch, 1, torch.float32), tmp_path / "model", classes=names)
    model: Any = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    model = copy.deepcopy(model) if copied else model
    assert preprocessing_of(model)["label_names"] == names
    model.reset_classifier(arch.num_classes)
    assert "label_names" not in preprocessing_of(model)
    save(model, tmp_path / "other")
    assert "label_names" not in load(tmp_path / "other").pretrained_cfg  # type: ignore[operator]
    set_label_names(model, names)  # as training on data of these classes does
    save(model, tmp_path / "other")
    assert load(tmp_path / "other").pretrained_cfg["label_names"] == names  # type: ignore[index]


@pytest.mark.parametrize(("family", "seed"), [("vit", 3), ("vit", 4), *(("swin", seed) for seed in range(6))])
def test_the_record_follows_a_new_image_size(family: str, seed: int, tmp_path: Path) -> None:
    arch = random_arch(Random(seed), family)
    save(random_model(arch, seed, torch.float32), tmp_path / "model")
    model: Any = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    rows, columns = arch.img_size
    model.set_input_size(img_size=(2 * rows, 3 * columns))
    save(model, tmp_path / "larger")
    again = load(tmp_path / "larger")
    assert arch_of(again).img_size == (2 * rows, 3 * columns)
    x = random_images(arch_of(again), 0, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x))


def test_a_token_plan_is_for_one_image_size(tmp_path: Path) -> None:
    arch = random_arch(Random(6), "vit")
    assert arch.blocks[0].tokens is not None
    model: Any = random_model(arch, 6, torch.float32)
    larger = (2 * arch.img_size[0], arch.img_size[1])
    for resize in (model.set_input_size, super(type(model), model).set_input_size):  # ours, and timm's behind our back
        with pytest.raises(UserError, match="block 0 merges or scales tokens by a plan for 6x6 images; set the size"):
            resize(img_size=larger)
            save(model, tmp_path / "model")


@pytest.mark.parametrize("family", FAMILIES)
def test_features_only(family: str, tmp_path: Path) -> None:
    """As timm's own models: the maps of the last three blocks where there is one stage, of every stage of others."""
    arch = random_arch(Random(4), family)
    save(random_model(arch, 4, torch.float32), tmp_path / "model")
    whole: Any = load(tmp_path / "model")
    part: Any = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, features_only=True).eval()
    x = random_images(arch, 0, dtype=torch.float32)
    with torch.no_grad():
        found, wanted = part(x), whole.forward_intermediates(x, intermediates_only=True)
    assert part.feature_info.channels() == [m.shape[1] for m in found]
    assert len(found) == (min(3, arch.depth) if family_of(arch).single_stage else len(arch.stages))
    for ours, theirs in zip(found, wanted[-len(found) :], strict=True):
        assert torch.equal(ours, theirs)


def test_class_names_are_saved(saved: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    model, path = saved
    names = [f"class {k}" for k in range(arch_of(model).num_classes)]
    save(model, tmp_path / "named", classes=names)
    again: Any = load(tmp_path / "named")
    assert again.pretrained_cfg["label_names"] == names
    assert "label_names" not in load(path).pretrained_cfg  # type: ignore[operator]
    save(again, tmp_path / "more")
    assert load(tmp_path / "more").pretrained_cfg["label_names"] == names  # type: ignore[index]
    for wrong, message in ((names[1:], "the model has"), ([names[0], *names[:-1]], "'class 0' is there 2 times")):
        with pytest.raises(UserError, match=f"classes: .*{message}"):
            save(model, tmp_path / "no", classes=wrong)
    assert not (tmp_path / "no").exists()


def test_provenance_stays_with_a_model(saved: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    path = saved[1]
    facts = load_provenance(path)
    for model in (load(path), timm.create_model(f"local-dir:{path}", pretrained=True)):
        save(model, tmp_path / "again")
        assert load_provenance(tmp_path / "again") == facts
        save(model, tmp_path / "again", {"method": "other"})
        assert load_provenance(tmp_path / "again") == {"method": "other"}


def test_accuracies_go_with_the_weights_that_had_them(saved: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    path = save(saved[0], tmp_path / "measured", {"method": "test", "top1": 98.0})
    for model in (load(path), timm.create_model(f"local-dir:{path}", pretrained=True)):
        save(model, tmp_path / "again")
        assert load_provenance(tmp_path / "again") == {"method": "test", "top1": 98.0}
        with torch.no_grad():
            next(model.parameters()).add_(1.0)
        save(model, tmp_path / "again")
        assert load_provenance(tmp_path / "again") == {"method": "test"}


def test_the_record_cannot_be_overruled(saved: tuple[torch.nn.Module, Path]) -> None:
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
    for entry in ("model_args", "pretrained_cfg", "provenance"):
        for odd in (None, [], "x", 3):
            config.write_text(json.dumps({**json.loads(text), entry: odd}))
            with pytest.raises(UserError, match=f"config.json is damaged: {entry} = .*: must be a JSON object"):
                load(path)
    config.write_text(text.replace('"architecture": "prunesweep"', '"architecture": "resnet50"'))
    with pytest.raises(UserError, match="holds a 'resnet50'"):
        load(path)
    config.unlink()
    with pytest.raises(UserError, match="config.json is missing"):
        load(path)
    with pytest.raises(UserError, match=r"nowhere is not a saved model: config.json is missing$"):
        load(tmp_path / "nowhere")
    for place in ("run/source", "run/front/02", "several/0.5"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.json").touch()
    for folder, inside in (("run", "run/front/02"), ("several", "several/0.5")):
        with pytest.raises(UserError, match=f"models inside; give one of them, for example {tmp_path / inside}$"):
            load(tmp_path / folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act": "relu"}, "config.json: act = 'relu': must be one of gelu"),
        ({"act": "gleu"}, "did you mean 'gelu'"),
        ({"num_classes": 10**9}, "arch.num_classes = 1000000000: numbers must be finite and at most"),
        ({"source": 3}, "arch.source = 3: must be str"),
    ],
)
def test_an_odd_record_is_refused_by_its_field(
    saved: tuple[torch.nn.Module, Path], changes: dict[str, Any], message: str
) -> None:
    config = json.loads((saved[1] / "config.json").read_text())
    config["model_args"]["arch"] |= changes
    (saved[1] / "config.json").write_text(json.dumps(config))
    for read in (load, read_arch):
        with pytest.raises(UserError, match=message):
            read(saved[1])
    with pytest.raises(UserError, match=message.removeprefix("config.json: ")):
        timm.create_model(f"local-dir:{saved[1]}", pretrained=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_ptc": 0.9}, "pretrained_cfg has an unknown key 'crop_ptc'. did you mean 'crop_pct'"),
        ({"mean": [0.5, "x", 0.5]}, r"pretrained_cfg.mean = \[0.5, 'x', 0.5\]: must be"),
        ({"std": None}, ""),
        ({"std": [0.5, 0.0, 0.5]}, r"pretrained_cfg.std = \[0.5, 0.0, 0.5\]: must be"),
        ({"crop_pct": "all"}, "pretrained_cfg.crop_pct = 'all': must be"),
        ({"interpolation": "cubic"}, "pretrained_cfg.interpolation = 'cubic': must be"),
        ({"label_names": 7}, "pretrained_cfg.label_names = 7: must be"),
        ({"label_names": ["a", "a"]}, "pretrained_cfg.label_names: 'a' is there 2 times"),
        ({"label_names": ["a"]}, r"config.json: pretrained_cfg.label_names has 1 names, the model \d+ classes"),
        ({"crop_pct": 50}, "pretrained_cfg.crop_pct = 50: must be a number above 0 and at most 2"),
        ({"crop_mode": "foo"}, "pretrained_cfg.crop_mode = 'foo': must be one of center, squash, border"),
    ],
)
def test_odd_preprocessing_is_refused_by_its_key(
    saved: tuple[torch.nn.Module, Path], changes: dict[str, Any], message: str
) -> None:
    config = json.loads((saved[1] / "config.json").read_text())
    config["pretrained_cfg"] |= changes
    del config["config_digest"]
    (saved[1] / "config.json").write_text(json.dumps(config))
    if not message:
        load(saved[1])
        return
    with pytest.raises(UserError, match=message):
        load(saved[1])


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_weights_of_another_type_than_the_others_are_named(
    saved: tuple[torch.nn.Module, Path], kind: torch.dtype
) -> None:
    path = saved[1] / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    weights = load_file(path)
    name = "blocks.0.norm1.weight" if "blocks.0.norm1.weight" in weights else "blocks.0.norm2.weight"
    save_file({**weights, name: weights[name].to(kind)}, path, metadata)
    config = json.loads((saved[1] / "config.json").read_text())
    del config["weights_sha256"]
    (saved[1] / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"{name} is {kind}, others are float32".replace("torch.", "")):
        load(saved[1])


def test_a_configuration_that_was_changed_is_named(saved: tuple[torch.nn.Module, Path]) -> None:
    config = saved[1] / "config.json"
    facts = json.loads(config.read_text())
    facts["provenance"]["seed"] += 1
    config.write_text(json.dumps(facts))
    for read in (load, check_saved, load_provenance):
        with pytest.raises(
            UserError, match=r"config.json is damaged: it has changed .* remove its entry 'config_digest'"
        ):
            read(saved[1])
    del facts["config_digest"]
    config.write_text(json.dumps(facts, indent=3))
    assert load(saved[1]).provenance["seed"] == 6


def test_a_saved_model_is_checked_without_building_it(
    saved: tuple[torch.nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunesweep.models.io.store.build_with", None)
    assert check_saved(saved[1]) == arch_of(saved[0])
    weights = saved[1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        check_saved(saved[1])


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
    del older["weights_sha256"], older["config_digest"]
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


def stock() -> torch.nn.Module:
    shape = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "num_heads": 2, "depth": 1, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **shape).eval()


@pytest.mark.filterwarnings("ignore")  # torch moves its quantisation to torchao
def test_weights_that_a_file_cannot_hold_are_refused(tmp_path: Path) -> None:
    quantised = torch.ao.quantization.quantize_dynamic(stock(), {torch.nn.Linear}, dtype=torch.qint8)
    with torch.device("meta"):
        empty = stock()
    partly = load(save(stock(), tmp_path / "model"))
    partly.head.to("meta")
    for model, said in (
        (quantised, r"is quantised or sharded: .* Save it before that"),
        (empty, "is on the meta device and has no values"),
        (partly, r"head.weight is on the meta device"),
    ):
        with pytest.raises(UserError, match=said):
            save(model, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_compiled_model_is_saved_as_the_model_that_it_is(tmp_path: Path) -> None:
    ours = load(save(stock(), tmp_path / "ours", {"method": "test"}))
    for model in (stock(), ours):
        again = load(save(torch.compile(model), tmp_path / "model"))
        assert all(torch.equal(own, again.state_dict()[name]) for name, own in model.state_dict().items())
    assert load_provenance(tmp_path / "model") == {"method": "test"}


@pytest.mark.parametrize("name", ["", ".", "/", "..", "file", "file/x", "/proc/nowhere", "null\0", "a" * 300])
def test_a_folder_that_cannot_be_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(UserError, match=r"a folder of its own|no folder can be made there"):
        save(stock(), name)
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_equal_models_are_equal_files(tmp_path: Path) -> None:
    """So digests of files tell models apart, and nothing else."""
    model = random_model(random_arch(Random(3), "vit"), 3)
    files = [(save(model, tmp_path / str(i)) / "model.safetensors").read_bytes() for i in range(6)]
    assert set(files) == {files[0]}

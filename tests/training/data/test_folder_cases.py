"""Image folders as they are found in the wild: each must be read rightly, or refused with the reason."""

from __future__ import annotations

import io
import random
import shutil
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch.utils.data import DataLoader

from prunesweep.models import UserError
from prunesweep.training import (
    EvalMetrics,
    Recipe,
    World,
    absolute_name,
    chance_warning,
    evaluate,
    fit,
    open_data,
    seeded,
)
from prunesweep.training.batches import EpochBatches
from prunesweep.training.data import KINDS, Data, register
from prunesweep.training.data import folder as folder_module
from prunesweep.training.data.images import read_image
from prunesweep.training.data.loader import PersistentLoader

PREPROCESSING = {"input_size": (3, 16, 16), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "crop_pct": 1.0}


def draw(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), (value, value // 2, 7)).save(path)


@pytest.fixture
def four(tmp_path: Path) -> Path:
    """Four classes, three images each for training and two for validation."""
    return make(tmp_path / "four", ["c0", "c1", "c2", "c3"])


def make(root: Path, classes: list[str], ending: Callable[[int], str] = lambda c: "png") -> Path:
    for split, n in (("train", 3), ("val", 2)):
        for c, name in enumerate(classes):
            for i in range(n):
                draw(root / split / name / f"{i}.{ending(c)}", 40 * c + i)
    return root


def opened(root: Path, **options: object) -> Data:
    return open_data(f"imagefolder:{root}", PREPROCESSING, **options)  # type: ignore[arg-type]


def val_labels(data: Data) -> list[int]:
    return [int(y) for _, y in data.split("val", augment=None)]


def test_an_empty_class_of_validation_shifts_no_label(four: Path) -> None:
    for file in (four / "val" / "c1").iterdir():
        file.unlink()
    data = opened(four)
    assert val_labels(data) == [0, 0, 2, 2, 3, 3]
    assert data.info.classes == ("c0", "c1", "c2", "c3")
    assert any("no images in" in note and "'c1'" in note for note in data.info.notes)


def test_a_class_may_lack_its_folder_in_validation_but_not_in_training(four: Path) -> None:
    shutil.rmtree(four / "val" / "c1")
    data = opened(four)
    assert val_labels(data) == [0, 0, 2, 2, 3, 3]
    assert data.info.classes == ("c0", "c1", "c2", "c3")
    assert any("no images in" in note and "'c1'" in note for note in data.info.notes)
    shutil.rmtree(four / "train" / "c2")
    with pytest.raises(UserError, match="no folder in .*/train for class 'c2', which .*/val has"):
        opened(four)


def test_an_empty_class_of_training_is_refused(four: Path) -> None:
    for file in (four / "train" / "c1").iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match="no image that can be read in .*train for class 'c1'"):
        opened(four)


@pytest.mark.parametrize("ending", ["webp", "tif", "bmp", "PNG", "gif"])
def test_whatever_pillow_reads_is_read(tmp_path: Path, ending: str) -> None:
    root = make(tmp_path / "kinds", ["c0", "c1", "c2"], lambda c: ending if c == 1 else "png")
    data = opened(root)
    assert val_labels(data) == [0, 0, 1, 1, 2, 2]
    assert data.train_labels().tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_hidden_and_system_entries_are_no_data(four: Path) -> None:
    before = opened(four).info.fingerprint
    for split in ("train", "val"):
        draw(four / split / ".ipynb_checkpoints" / "a-checkpoint.png", 0)
        draw(four / split / "@eaDir" / "a.png", 0)
        (four / split / "__MACOSX").mkdir()
        (four / split / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
        (four / split / "c0" / "._0.png").write_bytes(b"\0\5\26\7")
        (four / split / "c0" / "Thumbs.db").write_bytes(b"x")
    (four / "train" / "c0" / "notes.txt").write_text("x")
    data = opened(four)
    assert data.info.fingerprint == before
    assert data.info.num_classes == 4
    assert any("hidden or made by a system" in note and "1 of kind .txt" in note for note in data.info.notes)


def test_nested_folders_are_refused(tmp_path: Path) -> None:
    root = make(tmp_path / "nested", ["super0/c0", "super1/c1"])
    with pytest.raises(UserError, match="it must look like .*/train/CLASS/IMAGE"):
        opened(root)


def test_a_damaged_image_counts_once(four: Path) -> None:
    bad = four / "val" / "c2" / "0.png"
    bad.write_bytes(bad.read_bytes()[:40])
    data = opened(four)
    with pytest.warns(UserWarning, match="an image cannot be read .*/val/c2/0.png: ") as caught:
        read = [torch.cat([y for _, y in data.val_loader(3)]).tolist() for _ in range(30)]
    assert read == [[0, 0, 1, 1, 2, 3, 3]] * 30
    assert len(caught) == 1
    for file in (four / "val").rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match="none of 8 images can be read"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        list(opened(four).split("val", augment=None))


def test_a_decompression_bomb_is_unreadable(four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (400, 400)).save(four / "val" / "c0" / "big.png")
    data = opened(four)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.warns(UserWarning, match="exceeds limit"):
        assert sum(len(y) for _, y in data.val_loader(4)) == 8


def test_links_are_known_by_what_they_lead_to(four: Path) -> None:
    prints = []
    for swap in (0, 1):
        for split in ("train", "val"):
            for k in (0, 1):
                place, store = four / split / f"c{k}", four.parent / f"{split}{k}"
                if not store.exists():
                    place.rename(store)
                else:
                    place.unlink()
                place.symlink_to(four.parent / f"{split}{k ^ swap}")
        prints.append(opened(four).info.fingerprint)
    assert prints[0] != prints[1]


@pytest.mark.parametrize("change", ["pixel", "label", "name", "order", "preprocessing", "split"])
def test_every_change_changes_the_fingerprint(tmp_path: Path, change: str) -> None:
    root = make(tmp_path / "bmp", ["a", "b"], lambda c: "bmp")
    before = opened(root).info.fingerprint
    assert before == opened(root).info.fingerprint
    one = root / "train" / "a" / "1.bmp"
    if change == "pixel":
        content = bytearray(one.read_bytes())
        content[-1] ^= 1
        one.write_bytes(content)
    elif change == "label":
        one.rename(root / "train" / "b" / "9.bmp")
    elif change == "name":
        one.rename(root / "train" / "a" / "1b.bmp")
    elif change == "split":
        one.rename(root / "val" / "a" / "9.bmp")
    if change == "order":
        after = opened(root, classes=["b", "a"]).info.fingerprint
    elif change == "preprocessing":
        name = f"imagefolder:{root}"
        as_list = {k: list(v) if isinstance(v, tuple) else v for k, v in PREPROCESSING.items()}
        assert open_data(name, as_list).info.fingerprint == before
        after = open_data(name, {**PREPROCESSING, "crop_mode": "squash"}).info.fingerprint
    else:
        after = opened(root).info.fingerprint
    assert after != before


def test_the_fingerprint_of_a_copy_is_the_same(tmp_path: Path) -> None:
    a, b = (make(tmp_path / name, ["x", "y"]) for name in ("one", "two"))
    assert opened(a).info.fingerprint == opened(b).info.fingerprint


def test_an_index_is_made_once(four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunesweep.training.data.index.SETTLED_NS", -(10**12))
    want = opened(four).info

    def scan(*_: object) -> None:
        raise AssertionError("listed again")

    monkeypatch.setattr(folder_module, "_scan", scan)
    assert opened(four).info == want
    draw(four / "train" / "c0" / "new.png", 1)
    with pytest.raises(AssertionError, match="listed again"):
        opened(four)


NAMES = ["R", "Strasse", "acht", "cat A", "dog_G", "k", "class10", "class2"]


def test_class_order(tmp_path: Path) -> None:
    root = make(tmp_path / "names", NAMES)
    natural, codepoint = (opened(root, class_order=order).info for order in ("natural", "codepoint"))
    assert natural.classes == ("acht", "cat A", "class2", "class10", "dog_G", "k", "R", "Strasse")
    assert codepoint.classes == tuple(sorted(NAMES))
    assert natural.fingerprint != codepoint.fingerprint
    cfg = {**PREPROCESSING, "label_names": list(codepoint.classes)}  # a model's own names
    assert open_data(f"imagefolder:{root}", cfg).info == codepoint
    listed = tmp_path / "classes.txt"
    listed.write_text("\n".join(NAMES))
    assert opened(root, classes=listed).info.classes == tuple(NAMES)
    with pytest.raises(UserError, match="not the class folders of data .*: x"):
        opened(root, classes=[*NAMES, "x"])
    with pytest.raises(UserError, match="'R' is there twice"):
        opened(root, classes=[*NAMES, "R"])


def test_grey_images_of_16_bits_are_scaled() -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "png")
    assert np.asarray(read_image(file))[0, :, 0].tolist() == [0, 1, 128, 255]
    portable = io.BytesIO(b"P5 4 1 65535\n" + values.astype(">u2").tobytes())
    assert np.asarray(read_image(portable))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize(("mode", "kind"), [("F", "floats"), ("I", "32-bit or signed numbers")])
def test_pixels_of_unknown_range_are_not_read(mode: str, kind: str, four: Path) -> None:
    """Clipped to 8 bits, they would be black or white."""
    pixels = np.array([[0, 1], [300, 70_000]], dtype={"F": np.float32, "I": np.int32}[mode])
    Image.fromarray(pixels).save(four / "val" / "c0" / "0.tif")
    data = opened(four)
    with pytest.warns(UserWarning, match=f"val/c0/0.tif: its pixels are {kind}, whose black and white are not known"):
        assert sum(len(y) for _, y in data.val_loader(4)) == 8
    for file in (four / "train" / "c0").iterdir():
        Image.fromarray(pixels).save(file.with_suffix(".tif"))
        file.unlink()
    with pytest.raises(UserError, match=f"no image that can be read in .* class 'c0' .*its pixels are {kind}"):
        opened(four)


def test_a_damaged_image_of_training_is_replaced_by_another(four: Path) -> None:
    (four / "train" / "c1" / "2.png").write_bytes(b"no image")
    data = opened(four)
    with pytest.warns(UserWarning, match=r"training takes another one, .*: .*/train/c1/2.png: "):
        assert [int(y) for _, y in data.split("train", augment=None)] == [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3]


def test_a_whole_batch_that_cannot_be_read_is_left_out(four: Path) -> None:
    for i in range(2):
        (four / "val" / "c3" / f"{i}.png").write_bytes(b"no image")
    data = opened(four)

    class First(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert len(x)
            return torch.eye(4)[:1].repeat(len(x), 1)

    with pytest.warns(UserWarning, match="evaluation leaves it out"):
        found = evaluate(First(1, 1), data.val_loader(2))
    assert found["top1"] == pytest.approx(100 * 2 / 6)


def test_evaluation_prepares_images_as_timm_does(four: Path) -> None:
    """Over all preprocessing that timm's pretrained ViT, DeiT, Swin and PVTv2 models have."""
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    image, seen = Image.fromarray(pixels), set()
    image.save(four / "val" / "c0" / "0.png")
    for name in timm.list_pretrained(["vit_*", "deit*", "swin_*", "pvt_v2*"]):
        cfg = timm.get_pretrained_cfg(name).to_dict()
        config = resolve_data_config(pretrained_cfg=cfg)
        key = str(sorted(config.items()))
        if key not in seen:
            seen.add(key)
            data = open_data(f"imagefolder:{four}", cfg)
            assert torch.equal(data.split("val", augment=None)[0][0], create_transform(**config)(image)), name
    assert any("squash" in key for key in seen)


def test_a_source_is_prepared_with_its_crop_mode(four: Path) -> None:
    Image.new("RGB", (20, 40), (9, 9, 9)).save(four / "val" / "c0" / "0.png")
    for mode in ("squash", "border", "center"):
        cfg = {**PREPROCESSING, "crop_mode": mode}
        data = open_data(f"imagefolder:{four}", cfg)
        with Image.open(four / "val" / "c0" / "0.png") as image:
            want = create_transform(**resolve_data_config(pretrained_cfg=cfg))(image.convert("RGB"))
        assert torch.equal(data.split("val", augment=None)[0][0], want)


def write_shard(path: Path, labels: list[int], value: int = 0) -> None:
    with tarfile.open(path, "w") as tar:
        for i, label in enumerate(labels):
            image = io.BytesIO()
            Image.new("RGB", (16, 16), (value, i, 0)).save(image, "bmp")
            for ending, content in (("bmp", image.getvalue()), ("cls", str(label).encode())):
                entry = tarfile.TarInfo(f"{i:03}.{ending}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def test_shards_fingerprint_sees_labels_and_pixels(tmp_path: Path) -> None:
    prints = []
    for k, (labels, value) in enumerate([([0, 1, 2], 0), ([0, 2, 1], 0), ([0, 1, 2], 1), ([0, 1, 2], 0)]):
        folder = tmp_path / str(k)
        folder.mkdir()
        write_shard(folder / "train-0.tar", labels, value)
        write_shard(folder / "val-0.tar", [0, 1, 2])
        prints.append(open_data(f"wds:{folder}", PREPROCESSING).info.fingerprint)
    assert prints[0] == prints[3]
    assert len(set(prints)) == 3
    (tmp_path / "0" / "val-1.tar").write_bytes(b"x" * 2000)
    with pytest.raises(UserError, match="val-1.tar is no tar file"):
        open_data(f"wds:{tmp_path / '0'}", PREPROCESSING)


@pytest.mark.parametrize("kind", ["imagefolder", "wds", "wikitext"])
def test_paths_of_every_kind_become_absolute(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_name(f"{kind}:here") == f"{kind}:{tmp_path}/here"
    with pytest.raises(UserError, match=f"{tmp_path}/here"):
        open_data(f"{kind}:here")
    with pytest.raises(UserError, match="must be 'digits'"):
        open_data(f"{kind}:")
    assert absolute_name("hfds:a/b") == "hfds:a/b"


def test_a_kind_from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunesweep.training.data.registry.KINDS", known := dict(KINDS))

    class Mine(KINDS["digits"]):  # type: ignore[misc, name-defined]
        kind = "mine"

    register(Mine)
    assert known["mine"] is Mine
    assert open_data("mine").info.num_classes == 10
    with pytest.raises(ValueError, match="registered already"):
        register(type("Other", (Mine,), {}))


class Noisy(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.rand(1) + index + random.random() + np.random.rand()


def test_persistent_workers_draw_what_fresh_ones_draw() -> None:
    def epochs(persistent: bool, first: int = 0) -> list[torch.Tensor]:
        batches = EpochBatches(8, 4, World())
        if persistent:
            loader = PersistentLoader.make(Noisy(), batches, workers=1, pin_memory=False)
        else:
            loader = DataLoader(Noisy(), batch_sampler=batches, num_workers=1)
        found = []
        for epoch in range(first, 2):
            with seeded(epoch):
                batches.start(epoch)
                found.append(torch.cat([*loader, torch.rand(1, 1)]))
        return found

    want = epochs(persistent=False)
    assert all(torch.equal(a, b) for a, b in zip(epochs(persistent=True), want, strict=True))
    assert torch.equal(epochs(persistent=True, first=1)[0], want[1]), "as after a resume"


def test_accuracy_at_chance_is_explained(four: Path) -> None:
    data, model = opened(four), torch.nn.Linear(1, 1)
    assert chance_warning(model, data, EvalMetrics(26.0)) is None
    assert "may be untrained" in (chance_warning(model, data, EvalMetrics(8.0)) or "")  # one order as the other
    model.pretrained_cfg = {"label_names": ["a", "b", "c", "d"]}  # type: ignore[assignment]
    assert "named otherwise (a, ..)" in (chance_warning(model, data, EvalMetrics(25.0)) or "")
    model.pretrained_cfg = {"label_names": list(data.info.classes)}  # type: ignore[assignment]
    assert "may be untrained" in (chance_warning(model, data, EvalMetrics(25.0)) or "")


def test_a_data_set_is_described(four: Path) -> None:
    lines = opened(four).describe()
    assert lines[0].endswith("12 train, 8 val, 4 classes (c0 .. c3)")
    assert lines[1] == "preprocessing: resize 16 bicubic, centre crop 16, mean 0.5, 0.5, 0.5, std 0.25, 0.25, 0.25"
    wide = {**PREPROCESSING, "input_size": (3, 16, 32), "crop_pct": 0.9, "crop_mode": "squash"}
    text = open_data(f"imagefolder:{four}", wide).describe()[1]
    assert text.startswith("preprocessing: squash to 17x35 bicubic, centre crop 16x32, mean")
    assert open_data("digits").describe() == [
        "digits: 1,347 train, 450 val, 10 classes",
        "preprocessing: mean 0.3053, std 0.376",
    ]


def test_the_other_order_is_tried_where_accuracy_is_at_chance(tmp_path: Path) -> None:
    """A model that was trained with torchvision's order of classes, and says nothing of their names."""
    root = tmp_path / "names"
    for split, n in (("train", 2), ("val", 3)):
        for c, name in enumerate(sorted(NAMES)):
            for i in range(n):
                draw(root / split / name / f"{i}.png", 30 * c)
    data = opened(root)

    def brightness(x: torch.Tensor) -> torch.Tensor:
        wanted = (torch.arange(8) * 30 / 255 - 0.5) / 0.25
        return -(x[:, :1].mean((2, 3)) - wanted).abs()

    class Trained(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return brightness(x)

    model = Trained(1, 1)
    found = EvalMetrics.of(evaluate(model, data.val_loader(8)))
    assert found.top1 <= 12.5
    assert "but 100.00 % with the classes in the order R .. k (class_order = 'codepoint')" in (
        chance_warning(model, data, found) or ""
    )
    model.pretrained_cfg = {"label_names": sorted(NAMES)}  # type: ignore[assignment]
    named = open_data(f"imagefolder:{root}", {**PREPROCESSING, **model.pretrained_cfg})
    assert evaluate(model, named.val_loader(8))["top1"] == 100


@pytest.mark.parametrize(("hits", "warned"), [(1.0, True), (0.6, True), (0.0, False)])
def test_the_other_order_is_measured_where_accuracy_is_above_chance(hits: float, warned: bool, tmp_path: Path) -> None:
    """Two of eight classes have other numbers in the other order: the model is right on six of them in any case."""
    names = ("a1", "a10", "a2", "b", "c", "d", "e", "f")  # torchvision's order; timm's has a2 before a10
    root = tmp_path / "names"
    for split, n in (("train", 20), ("val", 2)):
        for c, name in enumerate(names):
            for i in range(n):
                draw(root / split / name / f"{i}.png", 30 * c)
    data = opened(root)
    assert data.info.classes[:3] == ("a1", "a2", "a10")

    class Trained(torch.nn.Linear):
        """Knows the classes in torchvision's order; takes the second and the third for each other in some images."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            known = (x[:, :1].mean((2, 3)) * 0.25 * 255 + 127.5) / 30
            label = known.round().long()[:, 0]
            label = torch.where((label == 1) & (torch.arange(len(x)) >= hits * len(x)), 2, label)
            return torch.nn.functional.one_hot(label, 8).float()

    model = Trained(1, 1)
    model.train()
    assert (said := chance_warning(model, data, EvalMetrics(75.0))) is None or warned
    assert model.training
    if warned:
        assert "top-1 of 75.00 % is with the classes in the order a1 .. f. In" in said
        assert "In the order a1 .. f (class_order = 'codepoint'), 2 of them have other labels; of 40 training" in said
    if hits == 1:
        assert "0.00 % are right as it is, and 100.00 % in that order: the model has no such class names" in said
    right = opened(root, class_order="codepoint")
    assert chance_warning(model, right, EvalMetrics(100.0)) is None
    model.pretrained_cfg = {"label_names": list(names)}  # type: ignore[assignment]
    assert chance_warning(model, data, EvalMetrics(75.0)) is None  # matched by name where data are opened with it


def test_a_trained_model_carries_the_names_of_the_classes_it_was_trained_on(four: Path) -> None:
    data = opened(four)
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 4}
    model = timm.create_model("vit_tiny_patch16_224", **shape)
    model.pretrained_cfg |= {"label_names": ["of", "another", "data", "set"]}
    fit(model, data, Recipe(epochs=1, batch_size=4))
    assert model.pretrained_cfg["label_names"] == ["c0", "c1", "c2", "c3"]

"""Characters of three scripts in many fonts: 80 classes of grey images that a small transformer does not saturate."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
import torchvision.transforms.v2 as T
from torch.utils.data import Dataset

from prunesweep.models import UserError
from prunesweep.training.recipe import Recipe

from .base import Batch, Data, DataInfo, OpenOptions, Transformed
from .glyph_images import PIXELS, distance_maps, draw_images
from .index import Arrays, load_index, save_index
from .registry import register

__all__ = ["CHARACTERS", "Glyphs", "font_files"]

# of letters that look alike in these fonts, one is a class: Latin B of B, Β and В, capital S of S and s
LATIN = "ABCDEFGHJKLMNOPQRSTUVWXYZabdefghnqrt23456789"
GREEK = "ΓΔΘΛΞΠΣΦΨΩαβδζηθλμξπσφω"
CYRILLIC = "БДЖИЦЧШЩЫЭЮЯб"
CHARACTERS = LATIN + GREEK + CYRILLIC

# packages of the extra "demo" (OFL 1.1), and of their fonts those that have all of these characters
WEIGHTS = "Thin ExtraLight Light Regular Medium SemiBold Bold ExtraBold Black"
ITALICS = "ThinItalic ExtraLightItalic LightItalic Italic MediumItalic SemiBoldItalic BoldItalic ExtraBoldItalic"
FONTS = {
    "font_manrope": ("Manrope", "ExtraLight Light Regular Medium SemiBold Bold ExtraBold"),
    "font_source_sans_pro": ("SourceSansPro", "ExtraLight Light Regular Semibold Bold Black"),
    "font_source_serif_pro": ("SourceSerifPro", "ExtraLight Light Regular Semibold Bold Black"),
    "fontpkg_fira_sans": ("FiraSans", f"{WEIGHTS} {ITALICS} BlackItalic"),
}
FONTS_DIGEST = "a10e31e523e147ab"  # of the versions that the benchmarks are about
VERSION = 1  # of how images are drawn


def font_files() -> list[Path]:
    """Return the font files that characters are drawn from, in a fixed order.

    Raises:
        UserError: one is not installed.
    """
    needed = {name for name in ("fontTools", "scipy") if importlib.util.find_spec(name) is None}
    files = []
    for package, (family, styles) in FONTS.items():
        found = importlib.util.find_spec(package)
        own = [Path(place) / "files" for place in (found.submodule_search_locations or () if found else ())]
        files += [folder / f"{family}-{style}.ttf" for folder in own for style in styles.split()]
        if not own or not all(path.is_file() for path in files):
            needed.add(package)
    if needed:
        raise UserError(f"data 'glyphs' needs {', '.join(sorted(needed))}: pip install -e '.[demo]'")
    return files


@register
class Glyphs(Data):
    """Images of 80 characters in 37 fonts, turned, slanted, noisy and cluttered; every class has as many.

    They are drawn once from installed fonts and kept in the user's cache.

    Args:
        train, val: images of every character.
        loader_workers: processes that load and augment images; 0 does it in this process.

    Raises:
        UserError: the extra ``demo`` is not installed.
    """

    kind = "glyphs"
    TRAIN, VAL = 250, 125
    MEAN, STD = 0.3427, 0.2118

    @classmethod
    def open(cls, argument: str, options: OpenOptions) -> Self:
        return cls(loader_workers=options.loader_workers)

    def __init__(self, *, train: int = TRAIN, val: int = VAL, loader_workers: int = 0) -> None:
        super().__init__(loader_workers=loader_workers)
        fonts = font_files()
        of_fonts = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in fonts)).hexdigest()
        arrays = _images(fonts, {"train": train, "val": val}, of_fonts)
        self._splits = {
            split: (torch.from_numpy(arrays[split]).unsqueeze(1), torch.from_numpy(arrays[f"{split} labels"]))
            for split in ("train", "val")
        }
        content = hashlib.sha256(f"{self.MEAN} {self.STD}".encode())
        for name in sorted(arrays):
            content.update(arrays[name].tobytes())
        other = "fonts of other versions than the benchmarks': the images differ from theirs"
        self.info = DataInfo(
            name="glyphs",
            num_classes=len(CHARACTERS),
            input_size=(1, PIXELS, PIXELS),
            mean=(self.MEAN,),
            std=(self.STD,),
            fingerprint=content.hexdigest()[:16],
            classes=tuple(CHARACTERS),
            notes=() if of_fonts.startswith(FONTS_DIGEST) else (other,),
        )

    @property
    def train_images(self) -> int:
        return len(self.train_labels())

    def labels(self, split: str) -> Sequence[int]:
        return self._splits[split][1].tolist()

    def train_labels(self) -> torch.Tensor:
        return self._splits["train"][1]

    def split(self, split: str, *, augment: Recipe | None) -> Dataset[Batch]:
        data = _Bytes(*self._splits[split])
        normalize = T.Normalize([self.MEAN], [self.STD])
        if augment is None:
            return Transformed(data, normalize)
        return Transformed(data, T.Compose([T.RandomCrop(PIXELS, padding=2, padding_mode="edge"), normalize]))


class _Bytes(Dataset[Batch]):
    """Images kept as bytes (N, C, rows, columns), given as floats in [0, 1]."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return self.images[index].float() / 255, self.labels[index]


def _images(fonts: Sequence[Path], counts: dict[str, int], of_fonts: str) -> Arrays:
    """Return images and labels of every split, those that were kept or new ones, which are kept."""
    made_from = Path(f"{VERSION} {CHARACTERS} {counts} {of_fonts}")  # stands for a folder: what the images follow from
    if (kept := load_index("glyphs", made_from)) is not None:
        return kept[1]
    maps = distance_maps(fonts, CHARACTERS)
    arrays: Arrays = {}
    for seed, (split, count) in enumerate(counts.items()):
        arrays[split], arrays[f"{split} labels"] = draw_images(maps, count, seed)
    save_index("glyphs", made_from, {}, arrays)
    return arrays

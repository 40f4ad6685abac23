"""Texts for language models, as numbered words in windows.

``pydocs`` is the language reference that CPython ships (``pydoc_data.topics``, some 90,000 words of English), the
embedded text. ``wikitext:PATH`` has ``PATH/wiki.{train,valid,test}.tokens``, words between blanks as WikiText-103 is
published (arXiv 1609.07843).

Words are numbered as by ``fairseq-preprocess``, so that its models find their words: four special ones, then words by
falling frequency in the training text, ties in alphabetical order, filled up to a multiple of 8. If a ``dict.txt`` of
fairseq lies beside the files, its numbers are used. Every line ends with ``</s>``. Encoded texts are kept in the
user's cache, found by the content of the files.
"""

from __future__ import annotations

import hashlib
import json
import pydoc_data.topics
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from prunesweep.models import Arch, UserError
from prunesweep.models.errors import NotHere
from prunesweep.models.io.files import publish_folder
from prunesweep.models.io.reading import read_json
from prunesweep.training.recipe import Recipe
from prunesweep.training.world import World

from .base import Batch, Data, DataInfo, OpenOptions
from .index import cache_home
from .registry import register

__all__ = ["IGNORED", "Corpus", "PyDocs", "TextData", "WikiText", "check_words", "encode", "make_vocabulary"]

IGNORED = -100  # the target of a word that is context only
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
END, UNKNOWN = SPECIAL.index("</s>"), SPECIAL.index("<unk>")
MULTIPLE = 8  # a vocabulary's size is a multiple of this
SPLITS = {"train": "train", "val": "valid", "test": "test"}
WORDS_AT_A_TIME = 2**15  # in a batch of evaluation, at most
FORMAT = "2"  # version of cached texts
SUMS = "sums.json"  # of cached texts: SHA-256 of every file

Numbers = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Corpus:
    """A vocabulary (``words`` by number) and encoded texts by split (``train``, ``val``, ``test``)."""

    words: tuple[str, ...]
    texts: Mapping[str, Numbers]

    @property
    def vocabulary(self) -> str:
        """16 hex digits that hash the list of words."""
        return hashlib.sha256("\n".join(self.words).encode()).hexdigest()[:16]


class Windows(Dataset[Batch]):
    """Pieces of a text, (words (T,), next words (T,)), int64; together they predict every word once.

    A piece predicts ``length - context`` words that no other piece predicts. It sees up to ``context`` words in front
    of them, whose targets are ``IGNORED``, as are places behind the text's end. ``</s>`` stands before the first word.

    Args:
        text: (N,) word numbers.
        length: T.
        context: words of a piece that are only seen.
        whole: leave out the last piece if the text does not fill it.
    """

    def __init__(self, text: Numbers, length: int, context: int, *, whole: bool = False) -> None:
        self.text, self.length, self.context = text, length, context
        self.stride = length - context
        self.pieces = len(text) // self.stride if whole else -(-len(text) // self.stride)

    def __len__(self) -> int:
        return self.pieces

    def __getitem__(self, index: int) -> Batch:
        first, end = index * self.stride, min((index + 1) * self.stride, len(self.text))
        start = max(0, first - self.context)
        targets = torch.full((self.length,), IGNORED)
        words = torch.full((self.length,), END)
        targets[first - start : end - start] = torch.from_numpy(self.text[first:end].astype(np.int64))
        before = torch.from_numpy(self.text[max(0, start - 1) : end - 1].astype(np.int64))
        at = 1 if start == 0 else 0
        words[at : at + len(before)] = before
        return words, targets


class TextData(Data):
    """A training, a validation and a test text; the last one is ``split("test")``.

    A piece of ``length`` words is what an image is in other data. Validation has ``context`` words of context: more is
    slower and gives lower perplexities, so a perplexity is comparable only at equal length and context.

    Args:
        name: name of the data set.
        corpus: vocabulary and texts.
        length: words in a piece.
        context: words of a piece of validation that are seen but not predicted.
        loader_workers: processes that make pieces; 0 does it in this process.

    Raises:
        UserError: ``context`` leaves nothing to predict, or the training text is shorter than a piece.
    """

    def __init__(self, name: str, corpus: Corpus, length: int, *, context: int = 0, loader_workers: int = 0) -> None:
        super().__init__(loader_workers=loader_workers)
        if not 0 <= context < length:
            raise UserError(f"context = {context}: must lie in 0..{length - 1}, below the length of {length} words")
        if len(corpus.texts["train"]) < length:
            raise UserError(f"data {name!r}: a text of {len(corpus.texts['train'])} words, pieces are {length} long")
        self.corpus, self.length, self.context = corpus, length, context
        content = hashlib.sha256(f"{corpus.vocabulary} {length} {context}".encode())
        for text in corpus.texts.values():
            content.update(text.data)
        self.info = DataInfo(
            name=name,
            num_classes=len(corpus.words),
            input_size=(1, 1, length),
            mean=(0.5,),
            std=(0.5,),
            fingerprint=content.hexdigest()[:16],
            vocabulary=corpus.vocabulary,
        )

    def split(self, split: str, *, augment: Recipe | None) -> Dataset[Batch]:
        train = split == "train"
        return Windows(self.corpus.texts[split], self.length, 0 if train else self.context, whole=train)

    def describe(self) -> list[str]:
        counts = ", ".join(f"{len(text):,} {split}" for split, text in self.corpus.texts.items())
        seen = f", {self.context} of them only seen in validation" if self.context else ""
        pieces = f"{self.info.num_classes:,} different ones, in pieces of {self.length}{seen}"
        return [f"{self.info.name}: words: {counts}; {pieces}", *self.info.notes]

    @property
    def train_images(self) -> int:
        """Number of pieces of the training text."""
        return len(self.corpus.texts["train"]) // self.length

    def train_labels(self) -> torch.Tensor:
        raise UserError(f"data {self.info.name!r}: a text has no classes, so nothing can be drawn per class")

    def val_loader(self, batch_size: int, world: World | None = None, *, split: str = "val") -> DataLoader[Batch]:
        """Return a loader of every word of a split once, in order; long pieces come in smaller batches.

        Args:
            batch_size: pieces in a batch, at most.
            world: the workers that share the pieces.
            split: ``val`` or ``test``.
        """
        return self._val_loader(split, max(1, min(batch_size, WORDS_AT_A_TIME // self.length)), world)


def make_vocabulary(lines: Iterable[list[str]], least: int = 1) -> tuple[str, ...]:
    """Return the words of a text in fairseq's order, filled up to a multiple of 8.

    Args:
        lines: the words of every line.
        least: how often a word has to occur.
    """
    counts = Counter(word for line in lines for word in line)
    found = sorted(word for word, n in counts.items() if n >= least and word not in SPECIAL)
    return _filled((*SPECIAL, *sorted(found, key=lambda word: -counts[word])))


def _filled(words: tuple[str, ...]) -> tuple[str, ...]:
    return words + tuple(f"madeupword{i:04d}" for i in range(-len(words) % MULTIPLE))


def encode(lines: Iterable[list[str]], words: tuple[str, ...]) -> Numbers:
    """Return the numbers (N,) int32 of all words, with the number of ``</s>`` at the end of every line.

    Args:
        lines: the words of every line.
        words: the vocabulary; other words become ``<unk>``.
    """
    number = {word: i for i, word in enumerate(words)}
    found = (n for line in lines for n in (*(number.get(word, UNKNOWN) for word in line), END))
    return np.fromiter(found, np.int32)


@lru_cache(maxsize=1)
def _pydocs() -> Corpus:
    """Return all topics as paragraphs, each once; of every ten runs of twenty paragraphs, the last two are held out.

    Paragraphs are taken once because topics repeat each other: the training text would otherwise hold much of the
    others.
    """
    topics = pydoc_data.topics.topics
    paragraphs = (" ".join(p.split()) for name in sorted(topics) for p in re.split(r"\n\s*\n", topics[name]))
    lines = [re.findall(r"\w+|[^\w\s]", p) for p in dict.fromkeys(paragraphs) if p]
    places = {"train": range(8), "val": (8,), "test": (9,)}
    texts = {split: [line for i, line in enumerate(lines) if i // 20 % 10 in own] for split, own in places.items()}
    words = make_vocabulary(texts["train"], least=2)
    return Corpus(words, {split: encode(text, words) for split, text in texts.items()})


def _read(file: Path) -> Iterator[list[str]]:
    try:
        with file.open(encoding="utf-8") as lines:
            yield from (line.split() for line in lines)
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no text in UTF-8: {error}") from error


def _read_dictionary(file: Path) -> tuple[str, ...]:
    """Read fairseq's ``dict.txt``: a word and its count per line."""
    words = []
    for number, line in enumerate(_read(file), start=1):
        if len(line) != 2 or not line[1].isdigit():
            raise UserError(f"{file}, line {number}: {' '.join(line)!r} is not a word and its count")
        words.append(line[0])
    return (*SPECIAL, *words)


def _wikitext(path: Path) -> Corpus:
    files = {split: path / f"wiki.{name}.tokens" for split, name in SPLITS.items()}
    missing = [file.name for file in files.values() if not file.is_file()]
    if missing:
        raise NotHere(
            f"data 'wikitext:{path}': {', '.join(missing)} not there. It takes a folder with wiki.train.tokens, "
            "wiki.valid.tokens and wiki.test.tokens, one paragraph per line, words between blanks"
        )
    dictionary = path / "dict.txt"
    facts = [FORMAT, *map(_sha256, [*files.values(), *([dictionary] if dictionary.is_file() else [])])]
    folder = cache_home("texts") / hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
    if not _is_sound(folder):
        words = _read_dictionary(dictionary) if dictionary.is_file() else make_vocabulary(_read(files["train"]))
        with publish_folder(folder) as scratch:
            (scratch / "words.txt").write_text("\n".join(words), encoding="utf-8")
            for split, file in files.items():
                np.save(scratch / f"{split}.npy", encode(_read(file), words))
            sums = {file.name: _sha256(file) for file in scratch.iterdir()}
            (scratch / SUMS).write_text(json.dumps(sums), encoding="utf-8")
    words = tuple((folder / "words.txt").read_text(encoding="utf-8").split("\n"))
    return Corpus(words, {split: np.load(folder / f"{split}.npy", mmap_mode="r") for split in files})


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _is_sound(folder: Path) -> bool:
    """Whether a folder of cached texts is there and holds what was written."""
    try:
        sums = read_json(folder / SUMS)
        return all(_sha256(folder / name) == sums.get(name) for name in ("words.txt", *(f"{s}.npy" for s in SPLITS)))
    except (OSError, ValueError, AttributeError):
        return False


def check_words(arch: Arch, data: Data) -> None:
    """Check that a language model and the data number the same words alike.

    Args:
        arch: architecture of the model.
        data: the opened data set.

    Raises:
        UserError: one is of texts and the other of images, or their vocabularies differ.
    """
    info, known = data.info, "" if arch.text is None else arch.text.vocabulary
    if (arch.text is None) != (not info.vocabulary):
        kinds = ("images", "texts") if arch.text is None else ("texts", "images")
        raise UserError(f"{arch.source} is a model of {kinds[0]}, data {info.name!r} are {kinds[1]}")
    if arch.text is not None and arch.num_classes != info.num_classes:
        raise UserError(
            f"{arch.source} knows {arch.num_classes:,} words, the vocabulary of data {info.name!r} has "
            f"{info.num_classes:,}: put the dict.txt that the model was trained with beside the token files"
        )
    if known and known != info.vocabulary:
        raise UserError(
            f"{arch.source} was trained with vocabulary {known}, data {info.name!r} have {info.vocabulary}: the same "
            "number of words, but not the same words; use the text it was trained on, or its dict.txt"
        )


def _length(options: OpenOptions, default: int) -> int:
    """Return the words of a piece: ``options.length``, or a language model's length, or the default."""
    size = tuple(options.preprocessing.get("input_size") or ())
    return options.length or (size[2] if size[1:2] == (1,) else default)


@register
class PyDocs(TextData):
    """The language reference that CPython ships, in pieces of 64 words."""

    kind = "pydocs"

    @classmethod
    def open(cls, argument: str, options: OpenOptions) -> Self:
        length = _length(options, 64)
        return cls("pydocs", _pydocs(), length, context=options.context, loader_workers=options.loader_workers)


@register
class WikiText(TextData):
    """A folder of token files as WikiText-103 is published, in pieces of 512 words (fairseq's tokens_per_sample)."""

    kind = "wikitext"
    argument = "PATH"

    @classmethod
    def open(cls, argument: str, options: OpenOptions) -> Self:
        corpus, length = _wikitext(Path(argument)), _length(options, 512)
        name = f"wikitext:{argument}"
        return cls(name, corpus, length, context=options.context, loader_workers=options.loader_workers)

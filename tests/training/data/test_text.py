from __future__ import annotations

import dataclasses
import importlib
import math
import os
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from prunesweep.models import UserError, build
from prunesweep.models.families.lm import LanguageModel, lm_arch
from prunesweep.training import (
    EVAL_BATCH,
    Distill,
    Epoch,
    EvalMetrics,
    Recipe,
    World,
    check_words,
    evaluate,
    fit,
    open_data,
    open_text,
)
from prunesweep.training.data import text as text_module
from prunesweep.training.data.text import IGNORED, Corpus, TextData, Windows, encode, make_vocabulary
from prunesweep.training.task import make_task

WORDS = ("<s>", "<pad>", "</s>", "<unk>")


def random_text(random: Random, words: int, most: int = 30) -> np.ndarray:
    return np.array([random.randrange(3, words) for _ in range(random.randint(20, most))], dtype=np.int32)


def tiny_data(seed: int = 0, *, length: int = 6, context: int = 0) -> TextData:
    random = Random(seed)
    texts = {split: random_text(random, 24, 40) for split in ("train", "val", "test")}
    return TextData("tiny", Corpus(tuple(f"w{i}" for i in range(24)), texts), length, context=context)


def tiny_model(data: TextData, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    known = {"words": data.info.num_classes, "length": data.length, "vocabulary": data.info.vocabulary}
    return build(lm_arch(cutoffs=(8, 16), width=16, depth=1, heads=2, mlp=16, **known)).eval()


def pieces_of(data: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [data[i] for i in range(len(data))]


@pytest.mark.parametrize("seed", range(20))
def test_every_word_is_predicted_once_with_its_context(seed: int) -> None:
    random = Random(seed)
    text, length = random_text(random, 50), random.randint(2, 12)
    context = random.randrange(length)
    seen = []
    for words, targets in pieces_of(Windows(text, length, context)):
        assert words.shape == targets.shape == (length,)
        places = torch.nonzero(targets != IGNORED)[:, 0]
        for place in places.tolist():
            at = len(seen)
            seen.append(int(targets[place]))
            before = [2, *text[:at].tolist()]  # the text follows a </s>
            assert words[: place + 1].tolist() == before[-(place + 1) :]
            assert place + 1 >= min(context, at) + 1
        assert (words[places.max() + 1 :] == 2).all()
    assert seen == text.tolist()


def test_training_pieces_are_whole() -> None:
    data = tiny_data(length=7, context=3)
    pieces = pieces_of(data.split("train", augment=None))
    assert len(pieces) == data.train_images == len(data.corpus.texts["train"]) // 7
    assert all((targets != IGNORED).all() for _, targets in pieces)
    assert (
        torch.cat([targets for _, targets in pieces]).tolist() == data.corpus.texts["train"][: 7 * len(pieces)].tolist()
    )


def test_word_numbers_are_those_of_fairseq() -> None:
    """By falling count, ties in alphabetical order, special words first, filled up to a multiple of 8."""
    lines = [["b", "a", "c"], ["c", "<unk>", "d"], []]
    words = make_vocabulary(lines)
    assert words == (*WORDS, "c", "a", "b", "d")
    assert make_vocabulary([*lines, ["e"]])[8:] == ("e", *(f"madeupword{i:04d}" for i in range(7)))
    assert make_vocabulary(lines, least=2) == (*WORDS, "c", "madeupword0000", "madeupword0001", "madeupword0002")
    assert encode([["a", "x", "<unk>"], []], words).tolist() == [5, 3, 3, 2, 2]


def test_the_embedded_text() -> None:
    data = open_data("pydocs")
    assert isinstance(data, TextData)
    assert (data.info.input_size, data.info.num_classes % 8) == ((1, 1, 64), 0)
    corpus = data.corpus
    assert corpus.words[:4] == WORDS
    for split, text in corpus.texts.items():
        assert len(text) > (60_000 if split == "train" else 8_000)
        assert 0 <= text.min() <= text.max() < len(corpus.words)
        assert (text == 3).mean() < 0.07, "unknown words"
    lines = {split: set(" ".join(map(str, text)).split(" 2 ")) for split, text in corpus.texts.items()}
    shared = [line for line in lines["train"] & lines["val"] if len(line.split()) > 20]
    assert not shared, "held-out paragraphs are not in the training text"
    frequencies = np.bincount(corpus.texts["train"], minlength=len(corpus.words))[4:]
    assert (np.diff(frequencies) <= 0).all()
    assert open_data("pydocs").info == data.info


def write(folder: Path, **texts: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in {"train": "a b b\n\nc a b <unk>\n", "valid": "a c\n", "test": "b x\n", **texts}.items():
        (folder / f"wiki.{name}.tokens").write_text(text)
    return folder


@pytest.fixture
def wiki(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write(tmp_path / "wiki")


def test_token_files(wiki: Path) -> None:
    data = open_text(f"wikitext:{wiki}", {}, length=4)
    assert data.corpus.words[:7] == (*WORDS, "b", "a", "c")
    assert data.corpus.texts["train"].tolist() == [5, 4, 4, 2, 2, 6, 5, 4, 3, 2]
    assert data.corpus.texts["val"].tolist() == [5, 6, 2]
    assert data.corpus.texts["test"].tolist() == [4, 3, 2]
    found = {"input_size": (1, 1, 5)}
    assert open_data(f"wikitext:{wiki}", found).info.input_size == (1, 1, 5)  # as long as the model's texts


def test_encoded_texts_are_cached_by_content(wiki: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_text(f"wikitext:{wiki}", {}, length=4)
    monkeypatch.setattr(text_module, "encode", None)  # nothing is encoded again
    moved = open_text(f"wikitext:{wiki.rename(tmp_path / 'moved')}", {}, length=4)
    assert moved.info.fingerprint == first.info.fingerprint
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    wiki, train = tmp_path / "moved", tmp_path / "moved" / "wiki.train.tokens"
    times = train.stat().st_atime_ns, train.stat().st_mtime_ns
    write(wiki, train="a c c\n\nb a c <unk>\n")
    os.utime(train, ns=times)  # of equal size and time
    changed = open_text(f"wikitext:{wiki}", {}, length=4)
    assert changed.corpus.words[4:7] == ("c", "a", "b")
    assert changed.info.vocabulary != first.info.vocabulary


@pytest.mark.parametrize("file", ["val.npy", "words.txt", "sums.json"])
def test_damaged_texts_of_the_cache_are_made_again(file: str, wiki: Path, tmp_path: Path) -> None:
    first = open_text(f"wikitext:{wiki}", {}, length=4)
    (folder,) = (tmp_path / "cache" / "prunesweep" / "texts").iterdir()
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    again = open_text(f"wikitext:{wiki}", {}, length=4)
    assert again.info.fingerprint == first.info.fingerprint
    assert again.corpus.words == first.corpus.words
    assert file == "sums.json" or (folder / file).read_bytes() == whole
    (folder / file).unlink()
    assert open_text(f"wikitext:{wiki}", {}, length=4).info.fingerprint == first.info.fingerprint


def test_a_dictionary_of_fairseqs_has_the_say(wiki: Path) -> None:
    open_text(f"wikitext:{wiki}", {}, length=4)
    (wiki / "dict.txt").write_text("c 9\na 5\nmadeupword0000 0\n")
    data = open_text(f"wikitext:{wiki}", {}, length=4)
    assert data.corpus.words == (*WORDS, "c", "a", "madeupword0000")
    assert data.corpus.texts["val"].tolist() == [5, 4, 2]
    (wiki / "dict.txt").write_text("c 9\na b c\n")
    with pytest.raises(UserError, match="dict.txt, line 2: 'a b c' is not a word and its count"):
        open_text(f"wikitext:{wiki}", {})


def test_what_is_not_there_or_no_text_is_named(wiki: Path, tmp_path: Path) -> None:
    (wiki / "wiki.valid.tokens").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="wiki.valid.tokens is no text in UTF-8"):
        open_text(f"wikitext:{wiki}", {}, length=4)
    (wiki / "wiki.valid.tokens").unlink()
    with pytest.raises(UserError, match="wiki.valid.tokens not there. It takes a folder with wiki.train.tokens"):
        open_text(f"wikitext:{wiki}", {})
    with pytest.raises(UserError, match="'digits' is no text"):
        open_text("digits", {})
    with pytest.raises(UserError, match="of texts, 'pydocs' or 'wikitext:PATH'"):
        open_data("pydoc")
    with pytest.raises(UserError, match="context = 64: must lie in 0..63"):
        open_text("pydocs", {}, context=64)
    with pytest.raises(UserError, match="a text of 10 words, pieces are 512 long"):
        open_text(f"wikitext:{write(tmp_path / 'other')}", {})
    with pytest.raises(UserError, match="a text has no classes"):
        open_data("pydocs").calibration(1, 1, 0, per_class=True)


def brute_force(model: nn.Module, data: TextData, split: str) -> list[float]:
    """log p of every word of a split from the window that predicts it."""
    text, stride = data.corpus.texts[split].tolist(), data.length - data.context
    found = []
    for t, word in enumerate(text):
        start = max(0, t // stride * stride - data.context)
        before = torch.tensor([[2, *text][start : t + 1]])
        found.append(float(model(before)[0, -1, word]))
    return found


@pytest.mark.parametrize("context", [0, 4])
@torch.no_grad()
def test_perplexity_is_that_of_every_word_in_its_window(context: int) -> None:
    data = tiny_data(context=context)
    model = tiny_model(data)
    log_p = brute_force(model, data, "val")
    found = evaluate(model, data.val_loader(EVAL_BATCH))
    assert found["loss"] == pytest.approx(-sum(log_p) / len(log_p), rel=1e-5)
    assert found["ppl"] == pytest.approx(math.exp(found["loss"]))
    tested = evaluate(model, data.val_loader(EVAL_BATCH, split="test"))
    assert tested["loss"] == pytest.approx(-np.mean(brute_force(model, data, "test")), rel=1e-5)


@torch.no_grad()
def test_accuracy_is_that_of_the_next_word(monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny_data()
    model = tiny_model(data)
    right = among = total = 0
    for words, targets in data.val_loader(3):
        order = model(words).argsort(-1, descending=True)[..., :5]
        wanted = targets != IGNORED
        right += int((order[..., 0] == targets)[wanted].sum())
        among += int((order == targets[..., None]).any(-1)[wanted].sum())
        total += int(wanted.sum())
    found = evaluate(model, data.val_loader(3))
    assert (found["top1"], found["top5"]) == pytest.approx((100 * right / total, 100 * among / total))
    monkeypatch.setattr(
        importlib.import_module("prunesweep.training.evaluation"), "LOGITS_AT_A_TIME", 1
    )  # word by word
    assert evaluate(model, data.val_loader(3)) == pytest.approx(found)


def test_workers_share_the_text() -> None:
    data = tiny_data()
    shares = [targets for rank in range(3) for _, targets in data.val_loader(2, World(rank, 3))]
    whole = [targets for _, targets in data.val_loader(2)]
    assert sorted(torch.cat(shares).tolist()) == sorted(torch.cat(whole).tolist())


def test_the_loss_is_cross_entropy_of_the_next_words() -> None:
    data = tiny_data()
    model = tiny_model(data)
    words, targets = data.split("train", augment=None)[0]
    found = make_task(model, Recipe(loss_weight=0.5), None)(words[None], targets[None])
    want = -0.5 * model(words[None]).gather(-1, targets[None, :, None]).mean()
    torch.testing.assert_close(found["loss"], want)


def test_distillation_is_on_the_whole_distribution() -> None:
    data = tiny_data()
    student, teacher = tiny_model(data, 0), tiny_model(data, 1)
    pieces = [data.split("train", augment=None)[i] for i in range(2)]
    words, targets = (torch.stack(part) for part in zip(*pieces, strict=True))
    terms = (Distill(weight=2.0, temperature=3.0), Distill(kind="hard", weight=0.5))
    task = make_task(student, Recipe(loss_weight=0.7, distill=terms), teacher)
    assert not task.train().teachers["0"].training
    student.eval()
    found = task(words, targets)
    z, t = student(words).flatten(0, 1), teacher(words).flatten(0, 1)
    kl = ((t / 3).softmax(-1) * ((t / 3).log_softmax(-1) - (z / 3).log_softmax(-1))).sum(-1).mean()
    nll = nn.functional.nll_loss
    want = 0.7 * nll(z, targets.flatten()) + 2 * 9 * kl + 0.5 * nll(z, t.argmax(-1))
    torch.testing.assert_close(found["loss"], want)
    found["loss"].backward()
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixup": 0.2}, "mixup = 0.2: is for images"),
        ({"label_smoothing": 0.1}, "label_smoothing = 0.1: is for images"),
        ({"distill": [{"kind": "feature"}]}, "distilled by kind = 'soft' or 'hard'"),
        ({"distill": [{}]}, "there is no source model to learn from"),
    ],
)
def test_what_has_no_meaning_for_words_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_task(tiny_model(tiny_data()), Recipe(**settings), None)


def test_a_small_model_learns_the_text_and_goes_on_from_its_state(tmp_path: Path) -> None:
    data = open_text("pydocs", {}, length=16)
    arch = lm_arch(words=data.info.num_classes, cutoffs=(150, 600), width=32, depth=1, heads=2, mlp=64, length=16)
    recipe = Recipe(epochs=2, batch_size=256, lr=5e-3)

    def trained(**options: object) -> tuple[nn.Module, list[Epoch]]:
        torch.manual_seed(0)
        model, epochs = build(arch), list[Epoch]()
        fit(model, data, recipe, on_epoch=epochs.append, **options)
        return model, epochs

    model, epochs = trained()
    assert isinstance(model, LanguageModel)
    before = evaluate(build(arch), data.val_loader(EVAL_BATCH))["ppl"]
    assert epochs[1].ppl < epochs[0].ppl < 0.5 * before
    assert epochs[1].ppl == evaluate(model, data.val_loader(EVAL_BATCH))["ppl"]
    state = tmp_path / "state.safetensors"
    trained(state=state, should_stop=lambda: True)
    again, rest = trained(state=state)
    assert [e.epoch for e in rest] == [2]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_words_and_numbers_must_agree() -> None:
    data = tiny_data()
    arch = tiny_model(data).arch
    check_words(arch, data)
    check_words(dataclasses.replace(arch, text=dataclasses.replace(arch.text, vocabulary="")), data)
    other = TextData("other", dataclasses.replace(data.corpus, words=data.corpus.words[::-1]), 6)
    with pytest.raises(UserError, match="the same number of words, but not the same words"):
        check_words(arch, other)
    with pytest.raises(UserError, match="knows 24 words, the vocabulary of data 'pydocs' has"):
        check_words(arch, open_data("pydocs"))
    with pytest.raises(UserError, match="is a model of texts, data 'digits' are images"):
        fit(build(arch), open_data("digits"), Recipe())


def test_quality_is_the_perplexity_where_there_is_one() -> None:
    assert str(EvalMetrics.of({"top1": 12.34, "loss": 3.0})) == "top-1 12.34 %"
    found = EvalMetrics.of({"top1": 30, "ppl": 20.5, "loss": 3.0})
    assert (str(found), found.as_dict()) == ("ppl 20.50", {"top1": 30.0, "ppl": 20.5, "loss": 3.0})
    assert EvalMetrics(30.0).as_dict() == {"top1": 30.0}

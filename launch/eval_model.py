"""``prunesweep eval``: measure a model by labels, by comparison with a source, or by a measure of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import PlainConsole
from .data_options import UNREADABLE, ClassesOption, ClassOrderOption, UnreadableOption, check_data, data_options
from .eval_run import evaluate_run, is_run
from .nothing_left import check_answers, check_weights
from .place import brought

__all__ = ["evaluate"]

WORST = 10  # classes that are named


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="folder of a saved model, or of a run, whose front is measured, or its URL, or a timm name with its "
            "pretrained weights",
            show_default=False,
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, glyphs, imagefolder:PATH, images:PATH, wds:PATH or hfds:NAME; texts: pydocs or "
            "wikitext:PATH; a run has its own",
            show_default=False,
        ),
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=2, help="texts: words that are seen at a time  [default: the model's]")
    ] = None,
    context: Annotated[int, typer.Option(min=0, help="texts: how many of them are seen but not predicted")] = 0,
    test: Annotated[bool, typer.Option("--test", help="texts: the test split")] = False,
    class_order: ClassOrderOption = None,
    classes: ClassesOption = None,
    unreadable: UnreadableOption = UNREADABLE,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="a source to compare with, a folder or a timm name; needed without labels", show_default=False
        ),
    ] = None,
    quality: Annotated[
        str | None,
        typer.Option(
            help="knn or probe, of a backbone without a head: top-1 of the nearest training images, or of a linear "
            "probe; python:MODULE:FUNCTION: a function of one's own",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="a stable form for scripts")] = False,
) -> None:
    """Measure a saved model's accuracy or perplexity, and how far it agrees with a source; or a run's front again."""
    from prunesweep.models import UserError, arch_of, cost, load
    from prunesweep.models.io.objects import is_url
    from prunesweep.models.precision import to_float32
    from prunesweep.search.report.display import Display
    from prunesweep.training import (
        EVAL_BATCH,
        EvalMetrics,
        Quality,
        chance_warning,
        check_fits,
        check_order,
        open_data,
        open_text,
    )
    from prunesweep.training import evaluate as measure
    from prunesweep.training.jobs.one_shot import check_source, open_source
    from prunesweep.training.labelled_features import QUALITIES

    if is_url(model):
        model = str(brought(model))
    other, folder = length is not None or context or test, Path(model)
    if is_run(folder):
        if other or (class_order, classes, teacher, quality, unreadable) != (None, None, None, None, UNREADABLE):
            raise UserError(f"of a run only --data and --json may be given: {model} is measured as it was searched")
        evaluate_run(folder, data, as_json=as_json)
        return
    if data is None:
        raise UserError("--data is missing: name what the model is measured on, e.g. digits or imagefolder:PATH")
    options = data_options(class_order, classes, unreadable)
    if other and (class_order is not None or classes is not None):
        raise UserError("--class-order, --classes: texts have no classes")
    check_data(data, options)
    own = None if quality is None else Quality.find(quality, "--quality")
    if quality in QUALITIES and teacher is not None:
        raise UserError(f"--quality {quality}: compares with labels, --teacher with a source; give one of them")
    for name in (model, *([] if teacher is None else [teacher])):
        check_source(name)
    loaded = to_float32(load(model)) if folder.exists() else to_float32(open_source(model))
    check_weights(loaded, folder)
    arch = arch_of(loaded)
    if other:
        opened: Any = open_text(data, loaded.pretrained_cfg, length=length, context=context)
    else:
        opened = open_data(data, loaded.pretrained_cfg, **options)
    check_fits(arch, opened)
    if quality in QUALITIES:
        _measure_features(loaded, opened, str(quality), as_json=as_json)
        return
    if teacher is None and own is None and not opened.info.labelled:
        raise UserError(f"{data} has no labels: give the model to compare with, --teacher SOURCE")
    if teacher is None and own is None and arch.headless:
        raise UserError(
            f"{model} has no head, so it gives features: give the model to compare them with, --teacher SOURCE, or "
            "what they are measured by, --quality knn or probe"
        )
    source: Any = None if teacher is None else to_float32(open_source(teacher))
    if source is not None:
        check_fits(arch_of(source), opened, name=teacher)
        if classes is None:
            check_order(source.pretrained_cfg, opened, f"--teacher {teacher}")
        theirs, ours = (tuple(one.pretrained_cfg.get("label_names") or ()) for one in (source, loaded))
        if not opened.info.labelled and theirs != ours and set(theirs) == set(ours):
            raise UserError(
                f"--teacher {teacher}: has the classes of {model} in another order, from {theirs[0]!r} to "
                f"{theirs[-1]!r} instead of from {ours[0]!r} to {ours[-1]!r}, so their answers do not compare"
            )
        given, wanted = _outputs(arch_of(source)), _outputs(arch)
        if given != wanted:
            raise UserError(
                f"--teacher {teacher}: has {given}, {model} has {wanted}: only models of the same classes can agree, "
                "and features be compared with as many of the model's own source"
            )
    if not as_json:
        PlainConsole(stderr=True).print("\n".join(opened.describe()), highlight=False, soft_wrap=True, markup=False)
    listed = opened.val_images
    batches = opened.val_loader(EVAL_BATCH, **({"split": "test"} if test else {}))
    figures: dict[str, Any] = {} if own is None else {**own.figures(loaded, opened, batches)}
    spent = cost(arch)
    if own is None or source is not None or (not arch.headless and opened.info.labelled):
        with Display(PlainConsole(stderr=True)).working(f"measuring {model}"):
            figures |= measure(loaded, batches, source=source, per_class=True)
    found = EvalMetrics.of(figures)
    check_answers(found, folder)
    recall = figures.get("recall", [])
    if as_json:
        by_class = {"recall": recall} if recall else {}
        named = {} if own is None else {"measure": own.name}
        print(json.dumps({**named, **found.with_interval(), **by_class, "macs": spent.macs, "params": spent.params}))
    else:
        listed_too = f" of {listed:,}" if opened.val_images != listed else ""  # some of them cannot be read
        said = f"{found.told(own and own.name)}{listed_too}, {spent.macs:,} MACs, {spent.params:,} params"
        PlainConsole().print(said, highlight=False, soft_wrap=True)
        if line := _worst(recall, opened.info.classes):
            PlainConsole().print(line, highlight=False, soft_wrap=True, markup=False)
    if warning := chance_warning(loaded, opened, found):
        PlainConsole(stderr=True).print(f"warning: {warning}", highlight=False, soft_wrap=True, markup=False)


def _worst(recall: list[float | None], names: tuple[str, ...]) -> str:
    """Say which classes are answered worst, all of them where they are few."""
    known = sorted((share, label) for label, share in enumerate(recall) if share is not None)
    if not known or known[0][0] == 100:
        return ""
    shown = known[:WORST]
    which = "recall by class, the worst first" if len(shown) == len(known) else f"recall of the worst {WORST} classes"
    return f"{which}: " + ", ".join(f"{names[label] if names else label} {share:.1f} %" for share, label in shown)


def _measure_features(model: Any, opened: Any, quality: str, *, as_json: bool) -> None:
    """Print what a backbone's features are worth by the data's labels."""
    from prunesweep.models import UserError, arch_of, cost
    from prunesweep.training.labelled_features import labelled_top1
    from prunesweep.training.metrics import wilson_interval

    arch = arch_of(model)
    if not arch.headless:
        raise UserError(f"--quality {quality}: is for a backbone without a head; this model has {_outputs(arch)}")
    found, spent = labelled_top1(model, opened, quality), cost(arch)
    top1, images = found[f"{quality}_top1"], int(found["images"])
    low, high = (100 * end for end in wilson_interval(top1 / 100, images))
    if as_json:
        ends = {f"{quality}_top1_low": low, f"{quality}_top1_high": high}
        print(json.dumps({**found, **ends, "macs": spent.macs, "params": spent.params}))
        return
    name = {"knn": "k-NN", "probe": "linear probe"}[quality]
    text = f"{name} top-1 {top1:.2f} % ({low:.2f} to {high:.2f}), {images:,} images"
    PlainConsole().print(f"{text}, {spent.macs:,} MACs, {spent.params:,} params", highlight=False, soft_wrap=True)


def _outputs(arch: Any) -> str:
    return f"{arch.outputs} {'features' if arch.headless else 'classes'}"

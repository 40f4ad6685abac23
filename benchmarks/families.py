"""What computed models of Swin and PVTv2 are worth: ``python -m benchmarks.families [--cache DIR] [--part trained]``.

Small models of both families are trained here on the digits, enlarged. At every budget, on the validation split and
without any training: channels and units chosen by Taylor importance, as cut; the same recovered; projected to the
widths that Taylor leaves; equal shares, refitted. KL is to the source, in nats. ``--part trained`` is UVC beside
``instant`` at a half of the MACs of a Swin for the digits as they are, 8 x 8 pixels (results/families_uvc.json).
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from benchmarks.record import begun, write_result
from benchmarks.subspaces import uniform
from prunesweep.models import Arch, Block, Stage, arch_of, build, cost, cut, load, save
from prunesweep.pruners import TrainedMethod, get_method, kl_divergence, taylor, width_path
from prunesweep.pruners.subspaces import SourceStatistics, compress, instant, projected_widths, recover
from prunesweep.training import EVAL_BATCH, Compared, EvalMetrics, evaluate_all, fit, load_recipe, open_data
from prunesweep.training.jobs.placement import Placement
from prunesweep.training.jobs.prune_training import TrainedPruning
from prunesweep.training.jobs.recovery import Recovery

RESULT = Path(__file__).parent / "results" / "families.json"
TRAINED = RESULT.with_name("families_uvc.json")
BUDGETS = (0.7, 0.5, 0.26, 0.15)
IMAGES, BATCH = 684, 57
EPOCHS = {"swin": 80, "pvt_v2": 30}


def record(family: str) -> Arch:
    """A model of a few hundred thousand weights: two stages of windows, or three of reduced maps."""
    shape: dict[str, Any] = {"in_chans": 1, "num_classes": 10, "class_token": False, "pool": "avg"}
    if family == "swin":
        stages = (
            Stage(width=48, grid=(8, 8), window=(4, 4), blocks=(block(0, 48, 3), block(1, 48, 3, shifted=True))),
            Stage(width=96, grid=(4, 4), window=(4, 4), blocks=tuple(block(i, 96, 6) for i in range(2, 6))),
        )
        sizes: dict[str, Any] = {"img_size": (16, 16), "patch_size": (2, 2), "norm_eps": 1e-5}
    else:
        stages = (
            Stage(width=32, grid=(8, 8), sr_ratio=4, blocks=tuple(block(i, 32, 1, sr=32) for i in range(2))),
            Stage(width=64, grid=(4, 4), sr_ratio=2, blocks=tuple(block(i, 64, 2, sr=64) for i in range(2, 4))),
            Stage(width=128, grid=(2, 2), blocks=tuple(block(i, 128, 4) for i in range(4, 6))),
        )
        sizes = {"img_size": (32, 32), "patch_size": (4, 4)}
    return Arch(family=family, source=f"digits-{family}", stages=stages, **sizes, **shape)


def block(index: int, width: int, heads: int, **options: Any) -> Block:
    """A stock block with an MLP of four times its width."""
    own = width // heads
    return Block(src=index, heads=heads, qk=own, v=own, scale=own**-0.5, mlp=4 * width, **options)


def digits(size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images and labels of the training and the validation split, enlarged to ``size``."""
    data = load_digits()
    train, val = train_test_split(range(len(data.target)), test_size=0.25, random_state=0, stratify=data.target)
    x = (torch.tensor(data.images).float().unsqueeze(1) / 16 - 0.3053) / 0.3760
    x, y = F.interpolate(x, size=size, mode="bilinear", align_corners=False), torch.tensor(data.target)
    return x[train], y[train], x[val], y[val]


def trained(family: str, cache: Path) -> nn.Module:
    """The source, trained once: AdamW, one cycle, shifts by one pixel of the small image."""
    folder = cache / f"digits-{family}"
    if folder.exists():
        return load(folder).eval()
    torch.manual_seed(0)
    model = build(record(family))
    x, y, _, _ = digits((8, 8))
    size, steps = arch_of(model).img_size, EPOCHS[family] * (len(x) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps)
    for _ in range(EPOCHS[family]):
        for own in torch.randperm(len(x)).split(64)[: len(x) // 64]:
            down, right = torch.randint(-1, 2, (2,)).tolist()
            images = F.interpolate(torch.roll(x[own], (down, right), (2, 3)), size=size, mode="bilinear")
            loss = F.cross_entropy(model(images), y[own], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    save(model.eval(), folder)
    return model


def one_family(family: str, cache: Path) -> dict[str, Any]:
    """All models of one family."""
    source = trained(family, cache)
    arch = arch_of(source)
    x, y, images, labels = digits(arch.img_size)
    drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:IMAGES].split(BATCH)
    batches, rows = [x[own] for own in drawn], list[dict[str, Any]]()

    @torch.no_grad()
    def measured(small: nn.Module) -> dict[str, float]:
        wanted, got = source(images), small(images)
        return {
            "share": cost(arch_of(small)).macs / cost(arch).macs,
            "kl": kl_divergence(wanted, got).mean().item(),
            "top1": 100 * (got.argmax(1) == labels).double().mean().item(),
        }

    def add(how: str, budget: float, small: nn.Module) -> None:
        rows.append({"how": how, "budget": budget, **measured(small)})
        print(family, rows[-1], flush=True)

    statistics = SourceStatistics.collect(source, batches)
    path = width_path(arch, taylor.score(source, [(x[own], y[own]) for own in drawn]))
    for budget in BUDGETS:
        chosen = path.cut(path.step_for(budget * cost(arch).macs))
        add("taylor, as cut", budget, cut(source, chosen).eval())
        add("taylor, recovered", budget, recover(source, chosen, batches))
        widths = projected_widths(arch, chosen)
        add("taylor, projected", budget, compress(source, widths, batches, statistics=statistics))
        add("equal shares", budget, compress(source, uniform(source, budget), batches, statistics=statistics))
    return {"family": family, "source": measured(source), "rows": rows}


def decided(epochs: int, cache: Path) -> dict[str, Any]:
    """UVC at a half of the MACs, as it comes and finetuned by recipe ``quick``, and ``instant``, untrained."""
    folder, whole = cache / "digits-swin-8x8", record("swin")
    if not folder.exists():
        model = build(dataclasses.replace(whole, img_size=(8, 8), patch_size=(1, 1)))
        fit(model, open_data("digits"), load_recipe("quick", {"epochs": EPOCHS["swin"], "lr": 1.5e-3, "distill": []}))
        save(model.eval(), folder)
    source = load(folder).eval()
    data = open_data("digits", source.pretrained_cfg)
    batches = list(Recovery(images=IMAGES).calibration(data))
    began = time.process_time()
    (point,) = instant(source, batches, (0.5,))
    rows = [({"how": "instant, untrained", "seconds": time.process_time() - began}, point.model)]
    with tempfile.TemporaryDirectory() as out:
        recipe, began = load_recipe("quick", {"epochs": epochs}), time.process_time()
        paced = get_method("uvc", TrainedMethod).paced(whole, epochs * (data.train_images // recipe.batch_size))
        run = TrainedPruning(source, "digits", "uvc", (0.5,), recipe, Path(out) / "out", options=paced)
        for one in run.run(Placement(1)):
            rows.append(({"how": "uvc", "seconds": time.process_time() - began}, load(one.folder)))
    trained, began = copy.deepcopy(rows[-1][1]), time.process_time()
    fit(trained, data, load_recipe("quick"), teacher=source)
    rows.append(({"how": "uvc, finetuned", "seconds": time.process_time() - began}, trained))
    models = [({"how": "source"}, source), *rows]
    figures = evaluate_all([model for _, model in models], Compared(data.val_loader(EVAL_BATCH), source))
    macs = cost(arch_of(source)).macs
    found = [
        {**row, "macs": cost(arch_of(model)).macs / macs, **EvalMetrics.of(own).with_interval()}
        for (row, model), own in zip(models, figures, strict=True)
    ]
    print(*found, sep="\n")
    return {"epochs": epochs, "rows": found}


def main() -> None:
    given = begun(__doc__, cache=Path("runs/cache"), part="computed", epochs=12)
    if given.part == "trained":
        write_result(TRAINED, images=IMAGES, **decided(given.epochs, given.cache))
        return
    found = [one_family(family, given.cache) for family in EPOCHS]
    write_result(RESULT, batch=BATCH, images=IMAGES, families=found)


if __name__ == "__main__":
    main()

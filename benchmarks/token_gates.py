"""UVC with token gates beside UVC without: ``python -m benchmarks.token_gates [--seeds 3]``.

The sources are those of the digits example. At each budget UVC decides for twelve epochs of recipe ``quick``, down to
the budget in half of the updates, as for any short run; the models as they come out, and after three more epochs, are
measured on the validation split: top-1 in percent and KL to the source in nats (results/token_gates.json).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import by_seed
from benchmarks.subspaces import source_of
from prunesweep.models import arch_of, cost, load
from prunesweep.pruners import TrainedMethod, get_method
from prunesweep.training import EVAL_BATCH, Compared, fit, load_recipe, open_data
from prunesweep.training.jobs.placement import Placement
from prunesweep.training.jobs.prune_training import TrainedPruning

RESULT = Path(__file__).parent / "results" / "token_gates.json"
BUDGETS = (0.6, 0.3, 0.15)
WAYS: dict[str, dict[str, Any]] = {"without": {}, "with": {"token_gates": True}}
EPOCHS = 12


def one_seed(seed: int, cache: Path) -> dict[str, Any]:
    """Figures of both ways at every budget, from the source of a seed."""
    source: Any = source_of(seed, cache)
    data = open_data("digits", source.pretrained_cfg)
    answers = Compared(data.val_loader(EVAL_BATCH), source)
    recipe, whole = load_recipe("quick", {"epochs": EPOCHS}), arch_of(source)
    paced = get_method("uvc", TrainedMethod).paced(whole, EPOCHS * (data.train_images // recipe.batch_size))
    rows = list[dict[str, Any]]()
    for budget in BUDGETS:
        for way, settings in WAYS.items():
            with tempfile.TemporaryDirectory() as folder:
                options = {**paced, **settings}
                run = TrainedPruning(
                    source, "digits", "uvc", (budget,), recipe, Path(folder) / "out", options, seed=seed
                )
                (one,) = run.run(Placement(1))
                model = load(one.folder)
            arch, row = arch_of(model), {"budget": budget, "way": way}
            row["macs"] = cost(arch).macs / cost(whole).macs
            row["shape"] = {
                "blocks": arch.depth,
                "tokens": [block.tokens or arch.tokens for block in arch.blocks],
                "heads": [block.heads for block in arch.blocks],
                "mlp": [block.mlp for block in arch.blocks],
            }
            for name in ("decided", "finetuned"):
                if name == "finetuned":
                    fit(model, data, load_recipe("quick"), teacher=source, seed=seed)
                found = answers.measure(model.eval())
                row[name] = {"top1": found.top1, "kl": found.kl}
            print(row, flush=True)
            rows.append(row)
    return {"seed": seed, "rows": rows}


if __name__ == "__main__":
    by_seed(__doc__, one_seed, RESULT, epochs=EPOCHS)

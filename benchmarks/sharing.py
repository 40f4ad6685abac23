"""What all units of a search read, as files or through Ray's object store: ``python -m benchmarks.sharing``.

The source's weights and a teacher's logits, read side by side by actors on one node, as ``WorkerContext`` of
``search.execution.task`` and ``training.teacher_cache`` read them, and as arrays that the driver has put into the
object store. Seconds are until the last actor has a model and has looked at every logit, memory is what the actors add
to the node (proportional set size, so what they share counts once). Each way is run several times in turns; the page
cache is warm, as it is on a node for every actor but the first. Writes benchmarks/results/sharing.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import timm
import torch
from safetensors.torch import load_file, save_file

from prunesweep.models import Arch, load, read_arch, save
from prunesweep.models.builder import build
from prunesweep.models.io.files import write_text
from prunesweep.models.io.provenance import versions
from prunesweep.training.teacher_cache import SHARD

from .upvit_exact import processor

RESULT = Path(__file__).parent / "results" / "sharing.json"
CLASSES = 1000
ROUNDS = 5


@ray.remote(num_cpus=0)
class Unit:
    """A process that units run in."""

    def memory(self) -> int:
        """Kilobytes that this process adds to the node: what is its own, and its part of what others map too."""
        torch.set_num_threads(1)
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))

    def from_files(self, source: Path, logits: list[Path]) -> float:
        """Read everything from files; a number that depends on all logits."""
        self._model = load(source)
        self._logits = [load_file(path)["logits"] for path in logits]
        return self._look()

    def from_store(self, arch: Arch, arrays: dict[str, Any]) -> float:
        """As ``from_files``, from arrays that are mapped from the object store; weights are copied, to be trained."""
        self._model = build(arch)
        self._model.load_state_dict({k: torch.from_numpy(v) for k, v in arrays["weights"].items()})
        self._logits = [torch.from_numpy(shard).view(torch.bfloat16) for shard in arrays["logits"]]
        return self._look()

    def _look(self) -> float:
        return sum(int(shard.view(torch.int16).max()) for shard in self._logits)


def one_round(way: str, actors: int, source: Path, shards: list[Path]) -> dict[str, float]:
    """Seconds and megabytes of one way, in new processes."""
    units = [Unit.remote() for _ in range(actors)]
    before = sum(ray.get([unit.memory.remote() for unit in units]))
    begun = time.perf_counter()
    if way == "files":
        looks = ray.get([unit.from_files.remote(source, shards) for unit in units])
    else:
        weights = {k: v.numpy() for k, v in load(source).state_dict().items()}
        logits = [load_file(path)["logits"].view(torch.int16).numpy() for path in shards]
        kept = ray.put({"weights": weights, "logits": logits})
        looks = ray.get([unit.from_store.remote(read_arch(source), kept) for unit in units])
    seconds = time.perf_counter() - begun
    assert len(set(looks)) == 1
    added = sum(ray.get([unit.memory.remote() for unit in units])) - before
    for unit in units:
        ray.kill(unit)
    return {"seconds": seconds, "megabytes": added / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--images", type=int, default=200_000, help="of the training split, with 1,000 logits each")
    parser.add_argument("--actors", type=int, default=4)
    args = parser.parse_args()
    rounds: dict[str, list[dict[str, float]]] = {"files": [], "object store": []}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        save(timm.create_model(args.model), source)
        shards = []
        for start in range(0, args.images, SHARD):
            shards.append(Path(folder, f"{start // SHARD:05}.safetensors"))
            rows = min(SHARD, args.images - start)
            save_file({"logits": torch.randn(rows, CLASSES, dtype=torch.bfloat16)}, shards[-1])
        size = sum(path.stat().st_size for path in (*shards, *source.iterdir())) / 2**20
        ray.init(
            address="local",
            num_cpus=args.actors,
            object_store_memory=2 * 2**30,
            include_dashboard=False,
            log_to_driver=False,
        )
        for _ in range(ROUNDS):
            for way, found in rounds.items():
                found.append(one_round(way, args.actors, source, shards))
                print(way, found[-1], flush=True)
        ray.shutdown()
    median = {
        way: {key: statistics.median(each[key] for each in found) for key in found[0]} for way, found in rounds.items()
    }
    print(median)
    given = {"model": args.model, "images": args.images, "actors": args.actors}
    facts = {**given, "megabytes": size, "device": processor(), "versions": versions()}
    write_text(RESULT, json.dumps({**facts, "median": median, "rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
